"""Options and arguments that several verbs share."""

from collections.abc import Sequence
from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
RunFile = Annotated[
    str,
    typer.Argument(metavar="RUN.yaml", help="A run file, or the name of one in configs/runs."),
]
RunName = Annotated[str, typer.Argument(metavar="RUN", help="A run folder, or its name in runs/.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="a.b=c", help="Keys of the run file to set.")
]
Nproc = Annotated[
    int | None, typer.Option("--nproc", min=1, help="Ranks on this host: cluster.ranks_per_node.")
]
Cluster = Annotated[str | None, typer.Option(help="The name of a cluster: short for cluster=NAME.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print what would be run; write and start nothing.")
]


def with_cluster(overrides: Sequence[str] | None, cluster: str | None) -> list[str]:
    """The overrides, after the choice of a whole cluster whose keys they may change."""
    return [*([f"cluster={cluster}"] if cluster else []), *(overrides or [])]
