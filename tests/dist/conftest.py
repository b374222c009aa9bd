from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from pool import Pool

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
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
