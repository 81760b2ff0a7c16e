from collections.abc import Iterator

import pytest

from tests.multiprocess.cluster import Cluster


@pytest.fixture(scope="session")
def two_ranks_kept() -> Iterator[list[Cluster]]:
    kept = [Cluster(2)]
    yield kept
    kept[0].close()


@pytest.fixture
def two_ranks(two_ranks_kept: list[Cluster]) -> Cluster:
    """Two ranks, made anew when an earlier test has ended one."""
    if not two_ranks_kept[0].alive:
        two_ranks_kept[0].close()
        two_ranks_kept[0] = Cluster(2)
    return two_ranks_kept[0]


@pytest.fixture(scope="session")
def three_ranks() -> Iterator[Cluster]:
    cluster = Cluster(3)
    yield cluster
    cluster.close()
