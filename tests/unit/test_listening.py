"""How a process ends that can't listen: what is taken is not tried again, what may only be late is."""

import os
import socket

import pytest
from prometheus_client import CollectorRegistry

from app.core.dsn import sqlalchemy_url
from app.observability.health import DatabaseProbe, Health, Pulse
from app.observability.server import listen

TAKEN, NOBODYS = "127.0.0.1", "192.0.2.1"


@pytest.mark.parametrize(("address", "status"), [(TAKEN, os.EX_CONFIG), (NOBODYS, 1)])
def test_a_taken_port_is_final_and_an_address_that_is_not_there_yet_is_not(
    capsys: pytest.CaptureFixture[str], address: str, status: int
) -> None:
    health = Health(Pulse(60), DatabaseProbe(sqlalchemy_url("postgresql://nobody@127.0.0.1:1/nowhere")))
    with socket.create_server((TAKEN, 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(SystemExit) as ended:
            listen(address, port, health, CollectorRegistry(), remedy="Do this.")
    assert ended.value.code == status
    said = capsys.readouterr().err
    assert said.startswith(f"Can't listen on {address}:{port} for /health and /metrics: ")
    assert said.endswith(". Do this.\n")
