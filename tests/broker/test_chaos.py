"""The short form of `python -m bench.chaos`."""

import pytest

from bench.chaos import Chaos
from tests.broker.conftest import Database


@pytest.mark.timeout(300)
def test_chaos_loses_nothing(database: Database) -> None:
    cluster = database.cluster
    chaos = Chaos(database.dsn(), seed=11, restart=lambda: cluster.restart("immediate"))
    assert chaos.run(jobs=150, seconds=15) == {}
