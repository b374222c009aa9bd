"""Jobs on Slurm: the batch script, the only commands that touch the cluster, and what they answer."""
