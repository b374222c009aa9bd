"""Where run files, the files of single sections and the templates of clusters are found."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

_FOLDERS = {"model": "models", "cluster": "clusters"}


def configs_dir() -> Path:
    """The folder configs/."""
    return _shipped("configs")


def cluster_dir() -> Path:
    """The folder cluster/, of templates."""
    return _shipped("cluster")


def section_folder(section: str) -> Path:
    """The folder in configs/ for named files of a section: models/, clusters/, else its name."""
    return configs_dir() / _FOLDERS.get(section, section)


def find_run(source: str | Path, *, cwd: Path) -> Path | None:
    """The run file: a path, else a name in configs/runs; `.yaml` may be left out."""
    return next(_files(str(source), (cwd, configs_dir() / "runs")), None)


def find_section(section: str, text: str, *, beside: Path, last: Sequence[Path]) -> list[Path]:
    """Files a section's text may mean: beside the run file, by name in configs/, then in `last`."""
    return list(_files(text, (beside, section_folder(section), configs_dir(), *last)))


def names(folder: Path) -> list[str]:
    """What may be given by name from a folder of configs/."""
    return sorted(path.stem for path in folder.glob("*.yaml"))


def _shipped(name: str) -> Path:
    """A folder of the project: inside an installed package, else of the checkout beside it."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "_shipped" / name
    return inside if inside.is_dir() else package.parent / name


def _files(text: str, folders: Sequence[Path]) -> Iterator[Path]:
    for folder in folders:
        for name in (text, f"{text}.yaml"):
            path = folder / os.path.expanduser(name)
            if text and os.path.isfile(path):  # unlike Path.is_file it takes any text, however long
                yield path
