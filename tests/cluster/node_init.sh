#!/bin/bash
# Process 1 of a node's pid namespace: its own hostname, /etc/hosts, /proc and /dev/shm; then slurmd, reaping orphans.
root=$1 node=$2
hostname "$node"
for file in hosts nsswitch.conf resolv.conf; do mount --bind "$root/etc/$file" "/etc/$file"; done
mount -t proc proc /proc
mount -t tmpfs -o size=512m tmpfs /dev/shm
mkdir -p "$root/spool/$node" "$root/nodes/$node"
mount --bind "$root/nodes/$node" "$root/local" # the node's own disk, at the same path on each
slurmd -D -N "$node" >>"$root/log/slurmd.$node.out" 2>&1 &
daemon=$!
while kill -0 "$daemon" 2>/dev/null; do
    wait
    sleep 0.2
done
# slurmd was killed: the node, and what it runs, live on until somebody pulls the plug.
while :; do
    sleep 3600 &
    wait
done
