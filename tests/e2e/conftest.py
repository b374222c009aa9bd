"""Fixtures of the end-to-end tests; what they are made of is tests/support/small_job.py."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.jobs import Job, prepare_corpus, processes_of


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small prepared collection."""
    return prepare_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    """A job in an empty folder; whatever it leaves running is an error."""
    yield Job(tmp_path)
    left = processes_of(tmp_path)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left, "processes outlived the test"
