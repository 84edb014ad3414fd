"""The rivals' servers, Debian's own builds, each on a free loopback port in a directory of its own."""

import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path

from tests.postgres import Cluster, free_port, provisioned_cluster

RABBITMQ = Path("/usr/lib/rabbitmq/bin/rabbitmq-server")


def missing() -> dict[str, str]:
    """Rivals that can't take part, and what to install for them."""
    absent = {}
    if not RABBITMQ.exists():
        absent["rabbitmq"] = "apt-get install --no-install-recommends rabbitmq-server"
    if not shutil.which("redis-server"):
        absent["redis"] = "apt-get install --no-install-recommends redis-server"
    elif find_spec("redis") is None:
        absent["redis"] = "pip install redis"
    return absent


@contextmanager
def postgres() -> Iterator[Cluster]:
    """A server with default settings, the project's migrated database and an empty one, `stock`."""
    servers = provisioned_cluster(Cluster(fsync=True))
    cluster = next(servers)
    try:
        cluster.execute("CREATE DATABASE stock")
        yield cluster
    finally:
        servers.close()


@contextmanager
def rabbitmq() -> Iterator[str]:
    """RabbitMQ; yields its URL."""
    with _home("rabbitmq") as home:
        epmd_port, port, dist_port = free_port(), free_port(), free_port()
        environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(home),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "ERL_EPMD_PORT": str(epmd_port),
            "RABBITMQ_NODENAME": f"bench{os.getpid()}@localhost",
            "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODE_PORT": str(port),
            "RABBITMQ_DIST_PORT": str(dist_port),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1}",
            "RABBITMQ_MNESIA_BASE": str(home / "mnesia"),
            "RABBITMQ_LOG_BASE": str(home / "log"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(home / "plugins"),
            "RABBITMQ_CONF_ENV_FILE": str(home / "none"),
        }
        with (
            _process("rabbitmq", ["epmd", "-port", str(epmd_port)], environment, epmd_port),
            _process("rabbitmq", [RABBITMQ], environment, port),
        ):
            yield f"amqp://guest:guest@127.0.0.1:{port}//"


@contextmanager
def redis() -> Iterator[str]:
    """Redis with its append-only file, synced each second; yields its URL."""
    with _home("redis") as home:
        port = free_port()
        command = ["redis-server", "--bind", "127.0.0.1", "--port", str(port), "--dir", str(home)]
        environment = {"PATH": os.environ["PATH"], "HOME": str(home)}
        with _process("redis", [*command, "--appendonly", "yes"], environment, port):
            yield f"redis://127.0.0.1:{port}/0"


def milliseconds_to_disk(cluster: Cluster) -> float:
    """What waiting for one commit takes on this machine, the median of a hundred."""
    times = []
    with closing(cluster.connect()) as session, session.cursor() as cursor:
        for _ in range(100):
            start = time.perf_counter()
            cursor.execute("SELECT pg_logical_emit_message(true, 'bench', 'x')")
            times.append(time.perf_counter() - start)
    return sorted(times)[50] * 1000


@contextmanager
def _home(owner: str) -> Iterator[Path]:
    """A directory of its own, the service user's when this is root."""
    home = Path(tempfile.mkdtemp(prefix=f"skeldir-bench-{owner}-"))
    try:
        if user := _user(owner):
            os.chown(home, user.pw_uid, user.pw_gid)
        yield home
    finally:
        shutil.rmtree(home, ignore_errors=True)


def _user(owner: str) -> pwd.struct_passwd | None:
    return pwd.getpwnam(owner) if os.geteuid() == 0 else None


@contextmanager
def _process(
    owner: str, command: Sequence[str | Path], environment: dict[str, str], port: int, seconds: float = 60
) -> Iterator[None]:
    """A server from when it listens until the block ends; then it and what it started are ended."""
    user = _user(owner)
    home = Path(environment["HOME"])
    with (home / "output").open("ab") as output:
        process = subprocess.Popen(
            command,
            cwd=home,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            **({"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []} if user else {}),
        )
    try:
        deadline = time.monotonic() + seconds
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                if process.poll() is not None or time.monotonic() > deadline:
                    said = (home / "output").read_text()[-2000:]
                    raise RuntimeError(f"{command[0]} did not start:\n{said}") from None
                time.sleep(0.1)
        yield
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=15)
