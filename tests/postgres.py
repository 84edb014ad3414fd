"""A private PostgreSQL for tests: a real server on a free loopback port, in a directory of its own.

`Cluster` is the server (start, stop, kill, freeze), `Database` one database on it as one of the project's
roles sees it. Roles and grants come from the Ansible role `database` and tables from Alembic, as on a real
host; nothing of either is written a second time here.
"""

import json
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

import psycopg2
from psycopg2 import sql
from psycopg2.extensions import connection

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
# Every character that a DSN, a shell or a template could trip over.
PASSWORDS = {role: f"{role}'s p@ss:w/rd %41 #?&" for role in ("app_owner", "app_user", "app_rw", "app_ro")}


def server_binaries() -> Path:
    """The directory with PostgreSQL's server programs; RuntimeError says what to install.

    `SKELDIR_TEST_POSTGRES` names it (`scripts/postgres-binaries 18` makes one of another version); else it is
    Debian's newest.
    """
    if chosen := os.environ.get("SKELDIR_TEST_POSTGRES"):
        if not Path(chosen, "postgres").is_file():
            raise RuntimeError(f"SKELDIR_TEST_POSTGRES is {chosen}, where there is no program `postgres`")
        return Path(chosen)
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"), key=lambda p: int(p.parts[-3]))
    if found:
        return found[-1].parent
    if on_path := shutil.which("postgres"):
        return Path(on_path).resolve().parent
    raise RuntimeError(
        "no PostgreSQL server was found in /usr/lib/postgresql/*/bin nor on the PATH;"
        " install Debian's package `postgresql` (or `postgresql-15`, `-16`, `-17`)"
    )


def free_port() -> int:
    """A loopback port that nothing listens on at the moment."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def unprivileged() -> dict[str, int | list[int]]:
    """How to start a process as somebody else when this is root: PostgreSQL refuses to run as root."""
    if os.geteuid() != 0:
        return {}
    for name in ("postgres", "nobody"):
        try:
            user = pwd.getpwnam(name)
        except KeyError:
            continue
        return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
    raise RuntimeError("running as root, and there is no user `postgres` or `nobody` to run PostgreSQL as")


def _make_data(tool: str, *arguments: str) -> None:
    """Run a tool of the server's that makes a data directory, as who the server runs as."""
    done = subprocess.run(
        [server_binaries() / tool, *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd="/",
        **unprivileged(),  # type: ignore[call-overload]
    )
    if done.returncode:
        raise RuntimeError(f"{tool} failed: {done.stderr}")


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
        password_file = self.directory / "password"
        password_file.write_text(self.password)
        if who:
            for path in (self.directory, password_file):
                os.chown(path, who["user"], who["group"])  # type: ignore[arg-type]
        _make_data(
            "initdb",
            f"--pgdata={self.data}",
            "--username=postgres",
            "--auth=scram-sha-256",
            f"--pwfile={password_file}",
            "--encoding=UTF8",
            "--locale=C",
            *([] if self.fsync else ["--no-sync"]),
        )

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
                # Unpacked from a wheel, a standby would load the system's libpq, of another version.
                env=os.environ | {"LD_LIBRARY_PATH": str(server_binaries().parent / "lib")},
                start_new_session=True,  # Ctrl-C in the terminal is for the tests, which then stop the server
                **unprivileged(),  # type: ignore[call-overload]
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
            os.chown(self.directory, who["user"], who["group"])  # type: ignore[arg-type]
        _make_data(
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
    variables = {
        "database_name": name,
        "database_passwords": PASSWORDS,
        "database_login_host": cluster.host,
        "database_login_port": cluster.port,
        "database_login_password": cluster.password,
    }
    play = [
        {
            "name": "Provision the test database",
            "hosts": "localhost",
            "connection": "local",
            "gather_facts": False,
            "roles": ["database"],
        }
    ]
    with tempfile.TemporaryDirectory(prefix="skeldir-play-") as directory:
        playbook, extra = Path(directory) / "play.json", Path(directory) / "variables.json"
        playbook.write_text(json.dumps(play))
        extra.touch(mode=0o600)
        extra.write_text(json.dumps(variables))
        return subprocess.run(
            [
                BIN / "ansible-playbook",
                *("--inventory", "localhost,"),
                *("--extra-vars", f"@{extra}"),
                # psycopg2 of this environment, not of the machine's own Python
                *("--extra-vars", f"ansible_python_interpreter={sys.executable}"),
                *arguments,
                playbook,
            ],
            cwd=ROOT,
            env={
                **os.environ,
                "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"),
                "ANSIBLE_ROLES_PATH": str(ROOT / "roles"),
            },
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
