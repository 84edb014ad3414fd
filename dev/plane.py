"""A plane on a developer's machine: PostgreSQL, the schema, a worker a queue and the scheduler, as processes.

Everything lies in one folder (`.skeldir`): the data, passwords, logs, and `env` for other terminals.
"""

import fcntl
import hashlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import IO, Any

import psycopg2

from app.core.topology import Topology, load_topology
from dev import ROOT
from dev.server import (
    BIN,
    ROLES,
    database_role,
    free_port,
    libraries,
    make_data,
    server_binaries,
    unprivileged,
)

DATABASE = "skeldir"
HOST = "127.0.0.1"
_FOREIGN = ("DATABASE_URL", "CELERY_", "SKELDIR_", "CREDENTIALS_DIRECTORY", "NOTIFY_SOCKET", "WATCHDOG_")
"""What a plane's processes must not inherit from the terminal: another plane's settings."""


class DevError(Exception):
    """The plane can't run; a sentence that says why and what to do."""


@dataclass
class Process:
    """A worker or the scheduler; `port` is where it answers for itself."""

    name: str
    command: list[str | Path]
    port: int
    log: Path
    started: subprocess.Popen[Any] | None = None
    offset: int = 0
    """How much of its log was shown."""

    @property
    def state(self) -> str:
        """`ready`, `starting`, or how it ended."""
        if self.started is None:
            return "stopped"
        if (status := self.started.poll()) is not None:
            return f"ended ({status})"
        return "ready" if answers(self.port) else "starting"

    def new_lines(self) -> Iterator[str]:
        """What was written since the last look, whole lines alone."""
        with suppress(FileNotFoundError), self.log.open("rb") as file:
            file.seek(self.offset)
            whole, newline, _ = file.read().rpartition(b"\n")
            self.offset += len(whole) + len(newline)
            yield from whole.decode(errors="replace").splitlines() if newline else ()


def address() -> str:
    """Where workers listen: loopback, or another one that CELERY_METRICS_ADDR names."""
    return os.environ.get("CELERY_METRICS_ADDR", HOST)


def ask(port: int, path: str) -> tuple[int, bytes]:
    """What a process of the plane answers on its own port; status 0 for nothing."""
    connection = HTTPConnection(address(), port, timeout=1)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read()
    except (OSError, HTTPException):
        return 0, b""
    finally:
        connection.close()


def answers(port: int) -> bool:
    """Whether the process there takes jobs."""
    return ask(port, "/health/ready")[0] == 200


@dataclass
class Plane:
    """One plane; `say` shows a line to the developer."""

    folder: Path
    say: Callable[[str], None]
    processes: dict[str, Process] = field(default_factory=dict)
    secrets: dict[str, Any] = field(default_factory=dict)
    _guard: subprocess.Popen[str] | None = None
    _children: list[subprocess.Popen[Any]] = field(default_factory=list)

    @property
    def data(self) -> Path:
        """PostgreSQL's data directory; its parent belongs to who the server runs as."""
        return self.folder / "postgres" / "data"

    def dsn(self, role: str) -> str:
        """The DSN of a role."""
        port, password = self.secrets["port"], self.secrets["passwords"][role]
        return f"postgresql://{role}:{password}@{HOST}:{port}/{DATABASE}"

    @contextmanager
    def running(self) -> Iterator[None]:
        """Everything up; when the block ends, in whatever way, nothing of it is left.

        Raises:
            DevError: it can't run.
        """
        self.folder.mkdir(mode=0o755, parents=True, exist_ok=True)
        with self._alone() as guarded:
            self._start_guard(guarded)
            try:
                self._start_server()
                self.provision()
                self.migrate()
                self.start(load_topology())
                yield
            finally:
                self._end()

    @contextmanager
    def _alone(self) -> Iterator[IO[str]]:
        """One at a time in a folder; a guard that still clears away what another left is waited for."""
        with (self.folder / "lock").open("a+") as lock, (self.folder / "guard.lock").open("a") as guarded:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.seek(0)
                raise DevError(
                    f"Another `skeldir dev` (process {lock.read().strip() or 'unknown'}) runs in"
                    f" {self.folder}: stop it, or name another folder with --folder."
                ) from None
            lock.truncate(0)
            lock.write(str(os.getpid()))
            lock.flush()
            deadline = time.monotonic() + 30
            while True:
                try:
                    fcntl.flock(guarded, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise DevError(
                            f"What the last `skeldir dev` in {self.folder} left doesn't end."
                        ) from None
                    time.sleep(0.1)
            yield guarded

    def _start_guard(self, guarded: IO[str]) -> None:
        self._guard = subprocess.Popen(
            [sys.executable, "-S", "-E", Path(__file__).with_name("guard.py")],
            stdin=subprocess.PIPE,
            text=True,
            cwd="/",
            pass_fds=[guarded.fileno()],  # it holds the lock as long as it lives
            start_new_session=True,
        )

    def _tell_guard(self, kind: str, pid: int) -> None:
        if not self._guard or not self._guard.stdin:
            raise DevError("The plane is not running.")
        try:
            self._guard.stdin.write(f"{kind} {pid}\n")
            self._guard.stdin.flush()
        except BrokenPipeError:
            raise DevError("The process that clears up after this one was ended; start again.") from None

    def _spawn(
        self,
        command: Sequence[str | Path],
        log: Path,
        env: Mapping[str, str],
        kind: str = "group",
        **options: Any,
    ) -> subprocess.Popen[Any]:
        with log.open("ab") as output, _undisturbed():
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=dict(env),
                start_new_session=True,  # Ctrl-C is for this process, which then ends the others in order
                **({"cwd": ROOT} | options),
            )
            self._children.append(process)
            self._tell_guard(kind, process.pid)
        return process

    def _end(self) -> None:
        """Let the guard end everything; it is told by the end of its input."""
        if not self._guard or not self._guard.stdin:
            return
        with suppress(BrokenPipeError):
            self._guard.stdin.close()
        while self._guard.poll() is None:
            for child in self._children:
                child.poll()  # or it would stay as a zombie
            time.sleep(0.02)

    def _start_server(self) -> None:
        binaries = self._binaries()
        self.secrets = self._remembered()
        home = self.data.parent
        home.mkdir(mode=0o700, exist_ok=True)
        if who := unprivileged():
            os.chown(home, who["user"], who["group"])
            self._check_that_the_server_gets_there(home)
        if not self.data.exists():
            (self.folder / "provisioned").unlink(missing_ok=True)
            self.say("Making a database: only this once.")
            new = home / "new"
            shutil.rmtree(new, ignore_errors=True)  # of a first start that was interrupted
            make_data(new, self.secrets["administrator"], "--no-sync")
            new.rename(self.data)
        options = {
            "port": str(self.secrets["port"]),
            "listen_addresses": HOST,
            "unix_socket_directories": str(home) if len(str(home)) < 90 else "",
            "timezone": "UTC",
            "log_min_messages": "warning",
            "synchronous_commit": "off",  # a crash of the machine may cost a developer's last second
        }
        words = (word for key, value in options.items() for word in ("-c", f"{key}={value}"))
        log = self.folder / "postgres.log"
        server = self._spawn(
            [binaries / "postgres", "-D", self.data, *words],
            log,
            libraries(binaries),
            kind="server",
            cwd="/",
            **unprivileged(),
        )
        self._wait_for_server(server, log)

    def _binaries(self) -> Path:
        version = self.data / "PG_VERSION"
        major = version.read_text().strip() if version.exists() else None
        try:
            return server_binaries(major)
        except RuntimeError as error:
            if major is None:
                return self._from_a_wheel()
            raise DevError(
                f"The data in {self.folder} is PostgreSQL {major}'s, and {error}. Or remove the folder."
            ) from error

    def _from_a_wheel(self) -> Path:
        self.say("This machine has no PostgreSQL server: getting one from PyPI (12 MB, once).")
        done = subprocess.run(
            [ROOT / "scripts/postgres-binaries", "17"],
            env=os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}"},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            said = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
            raise DevError(
                f"No PostgreSQL server is on this machine, and none could be had from PyPI ({said}):"
                " install one, such as Debian's package `postgresql`."
            )
        return Path(done.stdout.strip())

    def _check_that_the_server_gets_there(self, home: Path) -> None:
        there = subprocess.run(["/usr/bin/test", "-x", home], check=False, cwd="/", **unprivileged())
        if there.returncode:
            raise DevError(
                f"As root, PostgreSQL runs as another user, who can't reach {home}: run this as yourself, or"
                " name a folder that all may enter with --folder."
            )

    def _remembered(self) -> dict[str, Any]:
        """The passwords, made once, and a port that is free, if it can be the same as last time."""
        file = self.folder / "secrets.json"
        known: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
        if not known:
            shutil.rmtree(self.data, ignore_errors=True)  # whose passwords nobody knows
            known = {
                "administrator": secrets.token_hex(16),
                "passwords": {role: secrets.token_hex(16) for role in ROLES},
                "port": free_port(),
            }
        if not _is_free(HOST, known["port"]):
            known["port"] = free_port()
        _write(file, json.dumps(known))
        _write(
            self.folder / "env",
            f"# For other terminals: set -a; . {self.folder}/env\n"
            f"DATABASE_URL={Plane(self.folder, self.say, secrets=known).dsn('app_rw')}\n"
            f"CELERY_METRICS_ADDR={address()}\n",
        )
        return known

    def _wait_for_server(self, server: subprocess.Popen[Any], log: Path) -> None:
        deadline = time.monotonic() + 30
        while True:
            try:
                psycopg2.connect(
                    host=HOST,
                    port=self.secrets["port"],
                    user="postgres",
                    password=self.secrets["administrator"],
                    dbname="postgres",
                    connect_timeout=5,
                ).close()
            except psycopg2.OperationalError as error:
                if server.poll() is not None or time.monotonic() > deadline:
                    said = (log.read_text(errors="replace").strip().splitlines() or [str(error)])[-1]
                    raise DevError(f"PostgreSQL did not start ({said}); see {log}.") from error
                time.sleep(0.05)
            else:
                return

    def provision(self) -> None:
        """Make the roles and grants, when they or what makes them are new."""
        role = sorted(path for path in (ROOT / "roles/database").rglob("*.yml"))
        made_by = hashlib.sha256(b"".join(path.read_bytes() for path in role)).hexdigest()
        note = self.folder / "provisioned"
        if note.exists() and note.read_text() == made_by:
            return
        self.say("Making its roles, by the Ansible role `database`.")
        if not (BIN / "ansible-playbook").exists():
            raise DevError(
                f"There is no Ansible beside {sys.executable}: ./plane tools installs what is needed."
            )
        server = HOST, self.secrets["port"], self.secrets["administrator"]
        with database_role(*server, DATABASE, self.secrets["passwords"]) as (command, env):
            self._step("roles", command, env)
        note.write_text(made_by)

    def migrate(self) -> None:
        """Bring the schema to the newest revisions."""
        revisions = sorted((ROOT / "alembic").rglob("*.py"))
        made_by = hashlib.sha256(b"".join(path.read_bytes() for path in revisions)).hexdigest()
        note = self.folder / "migrated"
        provisioned = (self.folder / "provisioned").stat().st_mtime
        if note.exists() and note.read_text() == made_by and note.stat().st_mtime >= provisioned:
            return
        self.say("Migrating.")
        self._step("migrations", [BIN / "alembic", "upgrade", "heads"], self._environment("app_owner"))
        note.write_text(made_by)

    def _step(self, name: str, command: Sequence[str | Path], env: Mapping[str, str]) -> None:
        """Run what must be done before the workers start.

        Raises:
            DevError: with what it said.
        """
        log = self.folder / f"{name}.log"
        log.unlink(missing_ok=True)
        process = self._spawn(command, log, env)
        if status := process.wait():
            tail = "\n".join(log.read_text(errors="replace").strip().splitlines()[-15:])
            raise DevError(f"The {name} failed with status {status}:\n{tail}")
        self._tell_guard("gone", process.pid)

    def _environment(self, role: str) -> dict[str, str]:
        mine = {name: value for name, value in os.environ.items() if not name.startswith(_FOREIGN)}
        return mine | {"DATABASE_URL": self.dsn(role), "CELERY_METRICS_ADDR": address()}

    def start(self, sheet: Topology) -> None:
        """Start a process for each queue of the sheet and the scheduler, as their units do.

        Raises:
            DevError: a port is taken.
        """
        (self.folder / "log").mkdir(exist_ok=True)
        wanted = _wanted(sheet)
        self._check_ports(wanted)
        before, self.processes = self.processes, {}
        for name, (port, words) in wanted.items():
            log = self.folder / "log" / f"{name}.log"
            if name not in before:
                log.unlink(missing_ok=True)
            offset = before[name].offset if name in before else 0
            process = Process(name, [BIN / "skeldir", *words], port, log, offset=offset)
            process.started = self._spawn(process.command, log, self._environment("app_user"))
            self.processes[name] = process

    def _check_ports(self, wanted: Mapping[str, tuple[int, list[str]]]) -> None:
        """Those of this plane's own living processes will be free once they are stopped."""
        own = {p.port for p in self.processes.values() if p.started and p.started.poll() is None}
        for name, (port, _) in wanted.items():
            if port not in own and not _is_free(address(), port):
                raise DevError(
                    f"Port {port}, which app/topology.yml gives to {name}, is taken by another process:"
                    " stop it, or give this plane another address, such as CELERY_METRICS_ADDR=127.0.0.2."
                )

    def stop(self) -> None:
        """End the workers and the scheduler: what they run may finish, for a while."""
        running = [process.started for process in self.processes.values() if process.started]
        for number, patience in ((signal.SIGTERM, 5.0), (signal.SIGKILL, 10.0)):
            deadline = time.monotonic() + patience
            for process in running:
                if process.poll() is None or number == signal.SIGKILL:
                    with suppress(ProcessLookupError):
                        os.killpg(process.pid, number)
            while any(process.poll() is None for process in running) and time.monotonic() < deadline:
                time.sleep(0.02)
        for process in running:
            self._tell_guard("gone", process.pid)
            self._children.remove(process)
        for ended in self.processes.values():
            ended.started = None

    def reload(self) -> str:
        """Work with the code as it is now; what is broken is said, and what runs goes on running.

        Returns:
            What keeps the code from running; empty when it runs.
        """
        checked = subprocess.run(
            [BIN / "skeldir", "topology", "check"],
            cwd=ROOT,
            env=self._environment("app_user"),
            capture_output=True,
            text=True,
            check=False,
        )
        if checked.returncode:
            return checked.stderr.strip() or f"`skeldir topology check` ended with {checked.returncode}"
        try:
            self.migrate()
            sheet = load_topology()
            self._check_ports(_wanted(sheet))  # before anything is stopped
            self.stop()
            self.start(sheet)
        except DevError as error:
            return str(error)
        return ""

    def revive(self) -> Iterator[str]:
        """Start again what a signal ended; who ended by itself waits for other code. The names of both."""
        for name, process in self.processes.items():
            if process.started is None or (status := process.started.poll()) is None:
                continue
            self._tell_guard("gone", process.started.pid)
            self._children.remove(process.started)
            with suppress(ProcessLookupError):  # its children
                os.killpg(process.started.pid, signal.SIGKILL)
            if status < 0:
                process.started = self._spawn(process.command, process.log, self._environment("app_user"))
                yield f"{name} was ended by signal {-status} and starts again"
            else:
                process.started = None
                yield f"{name} ended with status {status}; it starts again when the code changes"


@contextmanager
def _undisturbed() -> Iterator[None]:
    """What would interrupt waits for the end of the block: what the guard does not know would stay.

    By handlers, because a signal that is blocked stays so in a process that is started meanwhile.
    """
    came: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        for number in before:
            signal.signal(number, lambda number, _: came.append(number))
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for each in came[:1]:
            signal.raise_signal(each)


def _wanted(sheet: Topology) -> dict[str, tuple[int, list[str]]]:
    """The port and the words of each process."""
    wanted = {queue.name: (queue.metrics_port, ["worker", queue.name]) for queue in sheet.queues.values()}
    if sheet.beat:
        wanted["beat"] = (sheet.beat.port, ["beat"])
    return wanted


def _is_free(host: str, port: int) -> bool:
    with socket.socket() as s, suppress(OSError):
        s.setsockopt(
            socket.SOL_SOCKET, socket.SO_REUSEADDR, 1
        )  # as the servers do: what was closed is no hindrance
        s.bind((host, port))
        return True
    return False


def _write(file: Path, text: str) -> None:
    """Write what only its owner may read."""
    file.touch(mode=0o600)
    file.write_text(text)
