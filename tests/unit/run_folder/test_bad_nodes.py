"""Hosts that the next start leaves out: written by the run, read by whatever starts it."""

import os
from pathlib import Path

from lmscale.run_folder.bad_nodes import read_bad_nodes, write_bad_nodes
from lmscale.run_folder.paths import RunFolder


def test_what_was_written_is_read_by_name(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    assert read_bad_nodes(folder) == []
    write_bad_nodes(folder, {"node2": "the disk is full\nno GPU", "node1": "drifted"})
    assert [(bad.host, bad.why) for bad in read_bad_nodes(folder)] == [
        ("node1", "drifted"),
        ("node2", "the disk is full"),
    ]


def test_a_node_named_again_is_news(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    write_bad_nodes(folder, {"node1": "drifted"})
    before = read_bad_nodes(folder)
    write_bad_nodes(folder, {"node1": "drifted"})
    assert [bad for bad in read_bad_nodes(folder) if bad not in before]


def test_strange_files_are_no_trouble(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.bad_nodes.mkdir()
    (folder.bad_nodes / ".nfs0001").touch()
    (folder.bad_nodes / "node3").write_bytes(b"\xff\n")
    (folder.bad_nodes / "node4").touch()
    (folder.bad_nodes / "gone").symlink_to("nowhere")  # as a file that is removed while it is read
    (folder.bad_nodes / "node5").mkdir()
    found = {bad.host: bad.why for bad in read_bad_nodes(folder)}
    assert found.keys() == {"node3", "node4", "node5"}
    assert found["node4"] == "no reason given"
    assert "is a folder" in found["node5"]


def test_a_fifo_among_the_bad_nodes_still_names_its_host(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.bad_nodes.mkdir()
    os.mkfifo(folder.bad_nodes / "n1")
    (node,) = read_bad_nodes(folder)
    assert node.host == "n1"
    assert "FIFO" in node.why
