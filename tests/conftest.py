from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.rank_pool import Pool

RANKS = [Path(__file__).parent / name for name in ("distributed", "gradients")]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if any(folder in item.path.parents for folder in RANKS):
            item.add_marker(pytest.mark.dist)


@pytest.fixture(scope="session")
def ranks() -> Iterator[Callable[..., Pool]]:
    """ranks(N) is a pool of N resident ranks with a default group; ranks(N, bare=True) has none."""
    pools: dict[tuple[int, bool], Pool] = {}

    def of_size(size: int, *, bare: bool = False) -> Pool:
        if (size, bare) not in pools:
            pools[size, bare] = Pool(size, bare=bare)
        return pools[size, bare]

    yield of_size
    for pool in pools.values():
        pool.close()
