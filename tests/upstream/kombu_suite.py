"""What kombu's suite needs to know of a transport; put among its own files, whose base classes it uses."""

import os

import kombu
import pytest

from .common import (
    BaseEventLoop,
    BaseExchangeTypes,
    BaseFailover,
    BaseMessage,
    BasePriority,
    BaseTimeToLive,
    BasicFunctionality,
)

URL = f"sqla+{os.environ['DATABASE_URL']}"
NOWHERE = "sqla+postgresql://nobody@127.0.0.1:1/nothing"


@pytest.fixture
def connection():
    return kombu.Connection(URL)


@pytest.fixture
def invalid_connection():
    return kombu.Connection(NOWHERE)


@pytest.fixture
def failover_connection():
    return kombu.Connection([NOWHERE, URL])


class TestBasicFunctionality(BasicFunctionality):
    pass


class TestExchangeTypes(BaseExchangeTypes):
    pass


class TestTimeToLive(BaseTimeToLive):
    pass


class TestPriority(BasePriority):
    pass


class TestFailover(BaseFailover):
    pass


class TestMessage(BaseMessage):
    pass


class TestEventLoop(BaseEventLoop):
    pass
