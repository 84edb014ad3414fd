"""A private PostgreSQL for tests: a real server on a free loopback port, in a directory of its own.

`Cluster` is the server (start, stop, kill, freeze), `Database` one database on it as one of the project's
roles sees it. Roles and grants come from the Ansible role `database` and tables from Alembic, as on a real
host; nothing of either is written a second time here.
"""

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

import psycopg2
from psycopg2 import sql
from psycopg2.extensions import connection

from dev import ROOT
from dev.server import (
    BIN,
    ROLES,
    database_role,
    free_port,
    libraries,
    make_data,
    run_tool,
    server_binaries,
    unprivileged,
)

# Every character that a DSN, a shell or a template could trip over.
PASSWORDS = {role: f"{role}'s p@ss:w/rd %41 #?&" for role in ROLES}


def self_signed(directory: Path, name: str, days: int = 2) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 and its key; who trusts the one trusts whoever has the other.

    With `days` below 0 it has ended already.
    """
    certificate, key = directory / f"{name}.crt", directory / f"{name}.key"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"),
            *("-noenc", "-keyout", key, "-out", certificate, "-subj", f"/CN={name}"),
            *("-addext", "subjectAltName=IP:127.0.0.1"),
        ],
        capture_output=True,
        check=True,
    )
    # `req` knows no days below 0.
    signed = ["openssl", "x509", "-in", certificate, "-signkey", key, "-days", str(days), "-out", certificate]
    subprocess.run(signed, capture_output=True, check=True)
    return certificate, key


@dataclass
class Cluster:
    """One server. `fsync=True` for tests of what survives a crash; it is off otherwise, which is faster.

    The port stays the same over `stop` and `start`. Superuser is `postgres`, by SCRAM like everybody else.
    """

    fsync: bool = False
    settings: dict[str, str] = field(default_factory=dict)
    host: str = "127.0.0.1"
    port: int = field(default_factory=free_port)
    password: str = "superuser of the test cluster"
    directory: Path = field(init=False)
    process: subprocess.Popen[bytes] | None = None

    def __post_init__(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="skeldir-postgres-"))
        who = unprivileged()
        if who:
            os.chown(self.directory, who["user"], who["group"])
        make_data(self.data, self.password, *([] if self.fsync else ["--no-sync"]))

    @property
    def data(self) -> Path:
        """The data directory."""
        return self.directory / "data"

    @property
    def log(self) -> Path:
        """The server's log."""
        return self.directory / "log"

    def start(self, seconds: float = 30) -> "Cluster":
        """Start the server and wait until it answers."""
        options = {
            "port": str(self.port),
            "listen_addresses": self.host,
            "unix_socket_directories": str(self.directory),
            "fsync": "on" if self.fsync else "off",
            "full_page_writes": "on" if self.fsync else "off",
            "timezone": "UTC",
            "log_min_messages": "warning",
            **self.settings,
        }
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [
                    server_binaries() / "postgres",
                    "-D",
                    self.data,
                    *(word for key, value in options.items() for word in ("-c", f"{key}={value}")),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
                env=libraries(server_binaries()),
                start_new_session=True,  # Ctrl-C in the terminal is for the tests, which then stop the server
                **unprivileged(),
            )
        deadline = time.monotonic() + seconds
        while True:
            try:
                self.connect().close()
            except psycopg2.OperationalError:
                if self.process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"PostgreSQL did not start:\n{self.log.read_text()[-2000:]}") from None
                time.sleep(0.05)
            else:
                return self

    def stop(self, mode: str = "fast") -> None:
        """End the server as `pg_ctl stop -m MODE` does: smart, fast or immediate (a crash)."""
        if self.process is None:
            return
        self.resume()
        how = {"smart": signal.SIGTERM, "fast": signal.SIGINT, "immediate": signal.SIGQUIT}[mode]
        self.process.send_signal(how)
        self.process.wait(timeout=30)
        self.process = None

    @contextmanager
    def away(self, mode: str = "fast") -> Iterator[None]:
        """Stopped for a while; started again, unless that was done meanwhile, whatever happens."""
        self.stop(mode)
        try:
            yield
        finally:
            if self.process is None:
                self.start()

    def restart(self, mode: str = "fast") -> None:
        """Stop and start again on the same port."""
        self.stop(mode)
        self.start()

    def pause(self) -> None:
        """Freeze the server and all its processes: connections stay open and nothing answers."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Undo `pause`."""
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        for pid in self._pids():
            with suppress(ProcessLookupError):  # a child that ended meanwhile
                os.kill(pid, number)

    def _pids(self) -> list[int]:
        """The postmaster and its children."""
        if self.process is None or self.process.poll() is not None:
            return []
        pids = [self.process.pid]
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                parent = int(stat.read_text().rpartition(")")[2].split()[1])
            except OSError:  # it ended meanwhile
                continue
            if parent == self.process.pid:
                pids.append(int(stat.parent.name))
        return pids

    def certify(self, certificate: Path, key: Path) -> None:
        """Give it a certificate, which it presents from its next start or reload on, where `ssl` is on."""
        for source, name in ((certificate, "server.crt"), (key, "server.key")):
            target = self.data / name
            target.write_bytes(source.read_bytes())
            target.chmod(0o600)
            if who := unprivileged():
                os.chown(target, who["user"], who["group"])

    def destroy(self) -> None:
        """Stop the server and remove its directory."""
        self.stop("immediate")
        shutil.rmtree(self.directory, ignore_errors=True)

    def dsn(self, user: str = "postgres", database: str = "postgres") -> str:
        """A DSN with the password, percent-encoded as a URL wants it."""
        password = PASSWORDS.get(user, self.password)
        return f"postgresql://{user}:{quote(password, safe='')}@{self.host}:{self.port}/{database}"

    def connect(self, user: str = "postgres", database: str = "postgres") -> connection:
        """A psycopg2 connection in autocommit mode."""
        session = psycopg2.connect(self.dsn(user, database), connect_timeout=5)
        session.autocommit = True
        return session

    def execute(self, statement: str | sql.Composable, database: str = "postgres") -> None:
        """Run one statement as the superuser."""
        session = self.connect(database=database)
        try:
            session.cursor().execute(statement)
        finally:
            session.close()

    def copy_database(self, template: str, name: str) -> "Database":
        """A copy of a database, with its owner and its own grants, which CREATE DATABASE leaves out."""
        new, old = sql.Identifier(name), sql.Identifier(template)
        self.execute(sql.SQL("CREATE DATABASE {} TEMPLATE {} OWNER app_owner").format(new, old))
        self.execute(
            sql.SQL(
                "UPDATE pg_database SET datacl = t.datacl FROM pg_database t"
                " WHERE t.datname = {} AND pg_database.datname = {}"
            ).format(sql.Literal(template), sql.Literal(name))
        )
        return Database(self, name)

    def drop_database(self, name: str) -> None:
        """Drop a database, whoever is connected to it."""
        self.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name)))


@dataclass
class Standby(Cluster):
    """A server that starts as another one's streaming standby, with a copy of all that it has."""

    primary: Cluster | None = None

    def __post_init__(self) -> None:
        assert self.primary
        self.password = self.primary.password
        self.directory = Path(tempfile.mkdtemp(prefix="skeldir-postgres-"))
        if who := unprivileged():
            os.chown(self.directory, who["user"], who["group"])
        run_tool(
            "pg_basebackup",
            f"--pgdata={self.data}",
            f"--dbname={self.primary.dsn()}",
            *("--checkpoint=fast", "--wal-method=stream", "--no-sync", "--write-recovery-conf"),
        )

    def promote(self) -> None:
        """Make it a primary; returns when it accepts writes."""
        self.execute("SELECT pg_promote(true, 30)")


@dataclass(frozen=True)
class Database:
    """One database of a cluster."""

    cluster: Cluster
    name: str

    def dsn(self, user: str = "app_user") -> str:
        """The DSN of one role."""
        return self.cluster.dsn(user, self.name)

    def connect(self, user: str = "app_user") -> connection:
        """A psycopg2 connection of one role, in autocommit mode."""
        return self.cluster.connect(user, self.name)

    def rows(self, query: str, user: str = "postgres") -> list[tuple[object, ...]]:
        """All rows of one query, by default as the superuser, who sees every tenant."""
        session = self.connect(user)
        try:
            cursor = session.cursor()
            cursor.execute(query)
            return cursor.fetchall()
        finally:
            session.close()


def run_database_role(cluster: Cluster, name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the Ansible role `database` against the cluster over TCP, as against a managed server."""
    with database_role(cluster.host, cluster.port, cluster.password, name, PASSWORDS) as (
        command,
        environment,
    ):
        return subprocess.run(
            [*command, *arguments],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=110,
            check=False,
        )


def run_alembic(dsn: str | None, *arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run the `alembic` command with a DATABASE_URL, as a person would."""
    environment = {key: value for key, value in os.environ.items() if key != "DATABASE_URL"}
    if dsn is not None:
        environment["DATABASE_URL"] = dsn
    return subprocess.run(
        [BIN / "alembic", *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )


def provisioned_cluster(cluster: Cluster | None = None) -> Iterator[Cluster]:
    """A server with the roles, `provisioned` (grants, no tables) and `skeldir` (migrated to the heads)."""
    cluster = cluster or Cluster()
    try:
        cluster.start()
        for step in (
            lambda: run_database_role(cluster, "skeldir"),
            lambda: run_alembic(cluster.dsn("app_owner", "skeldir"), "upgrade", "heads"),
        ):
            done = step()
            if done.returncode:
                raise RuntimeError(f"{done.args[0]} failed:\n{done.stdout}\n{done.stderr}")
            if "provisioned" not in [
                r[0] for r in Database(cluster, "postgres").rows("SELECT datname FROM pg_database")
            ]:
                cluster.copy_database("skeldir", "provisioned")
        yield cluster
    finally:
        cluster.destroy()
