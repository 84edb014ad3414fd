"""Fixtures that more than one folder of tests uses."""

import itertools
from collections.abc import Iterator

import pytest

from tests.postgres import Cluster, Database, provisioned_cluster

_number = itertools.count(1)


@pytest.fixture(scope="session")
def postgres() -> Iterator[Cluster]:
    """A PostgreSQL with the project's roles, one for the whole run.

    Its databases `skeldir` (migrated) and `provisioned` (grants alone) are templates: connect to copies.
    """
    yield from provisioned_cluster()


@pytest.fixture
def database(postgres: Cluster) -> Iterator[Database]:
    """A migrated database for one test alone."""
    yield from _copy(postgres, "skeldir")


@pytest.fixture
def empty_database(postgres: Cluster) -> Iterator[Database]:
    """A database for one test alone, with the roles and their grants but without any table."""
    yield from _copy(postgres, "provisioned")


def _copy(cluster: Cluster, template: str) -> Iterator[Database]:
    name = f"test_{next(_number)}"
    yield cluster.copy_database(template, name)
    cluster.drop_database(name)
