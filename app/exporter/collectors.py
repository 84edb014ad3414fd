"""What is asked of the database, and the families that come of it.

Labels are bounded: queues and tasks are the sheet's, or `other`; classes, states and roles are fixed lists.
All series of a family are there from the beginning, at 0.
"""

import socket
import ssl
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping
from datetime import datetime, timedelta
from typing import Any, ClassVar

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from psycopg2.extensions import cursor as Cursor  # noqa: N812 - a class

from app.core.topology import Topology

OTHER = "other"
"""Label of a queue, a task or a role that is not the plane's."""

STATES = ("ready", "delayed", "held")
CLASSES = ("permanent", "transient", "timeout", "poison", "unknown_task", "invalid", "expired")
RESULTS = {"resolved": "succeeded", "returned": "failed"}
"""How a replay ended, by the action that the audit has for it."""
ROLES = ("app_owner", "app_user", "app_rw", "app_ro")
TABLES = (
    *("kombu_message", "kombu_queue", "kombu_holder", "celery_taskmeta", "celery_tasksetmeta"),
    *("celery_task_failures", "celery_task_failure_payloads", "celery_task_failure_errors"),
    *("celery_task_failure_audit", "celery_task_failure_replays"),
)


class Collected:
    """One part of the numbers, asked for in one go."""

    name: ClassVar[str]
    every: ClassVar[float] = 0.0
    """Seconds until it is asked again once it succeeded, at least."""

    def __init__(self, sheet: Topology) -> None:
        self.sheet = sheet
        self.queues = (*sheet.queues, OTHER)

    @abstractmethod
    def collect(self, cursor: Cursor) -> list[Metric]:
        """Ask, and make the families.

        Raises:
            psycopg2.Error: it can't be asked; the numbers of the last time hold no longer.
        """

    def queue(self, name: str) -> str:
        """The label of a queue."""
        return name if name in self.sheet.queues else OTHER

    def task(self, name: str | None) -> str:
        """The label of a task."""
        return name if name in self.sheet.queue_by_task else OTHER


def gauge(
    name: str,
    documentation: str,
    labels: Iterable[str] = (),
    values: Mapping[Any, float] | None = None,
    value: float | None = None,
) -> Metric:
    """A gauge with a value for each tuple of label values, or one value without labels."""
    family = GaugeMetricFamily(
        name, documentation, value=value, labels=None if value is not None else list(labels)
    )
    for of, number in (values or {}).items():
        family.add_metric(of, float(number))
    return family


class Queues(Collected):
    """What waits, for how long, and who would take it."""

    name = "queues"

    # Who sleeps until a message comes has a lock on the queue, who works holds messages; both are holders.
    _CONSUMERS = """
        WITH alive AS (
            SELECT pid, objid::bigint AS holder FROM pg_locks
            WHERE locktype = 'advisory' AND classid = 1802331490 AND objsubid = 2 AND granted
                AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
        ), living AS (
            SELECT id FROM kombu_holder
            WHERE id IN (SELECT holder FROM alive) OR beat_at > clock_timestamp() - interval '20 s'
        ), held AS (
            SELECT queue_id, holder, count(*) AS number FROM kombu_message
            WHERE holder IS NOT NULL GROUP BY queue_id, holder
        ), consuming AS (
            SELECT queue_id, holder FROM held
            UNION
            SELECT sleeping.objid::bigint, alive.holder FROM pg_locks AS sleeping JOIN alive USING (pid)
            WHERE sleeping.locktype = 'advisory' AND sleeping.classid = 1802331489 AND sleeping.objsubid = 2
                AND sleeping.granted
        )
        SELECT q.name,
            (SELECT count(*) FROM consuming c JOIN living l ON l.id = c.holder WHERE c.queue_id = q.id),
            (SELECT coalesce(sum(number), 0) FROM held WHERE queue_id = q.id),
            (SELECT coalesce(sum(number), 0) FROM held
                WHERE queue_id = q.id AND holder NOT IN (SELECT id FROM living)),
            (SELECT count(*) FROM living)
        FROM kombu_queue q WHERE q.holder IS NULL
    """
    _READY = """
        SELECT q.name, m.number FROM kombu_queue q JOIN (
            SELECT queue_id, count(*) AS number FROM kombu_message
            WHERE visible AND due_at IS NULL GROUP BY queue_id) AS m ON m.queue_id = q.id
        WHERE q.holder IS NULL
    """
    _DELAYED = """
        SELECT q.name, m.number FROM kombu_queue q JOIN (
            SELECT queue_id, count(*) AS number FROM kombu_message
            WHERE due_at IS NOT NULL GROUP BY queue_id) AS m ON m.queue_id = q.id
        WHERE q.holder IS NULL
    """
    _OLDEST = """
        SELECT q.name, extract(epoch FROM clock_timestamp() - min(h.waiting_since))::float8
        FROM skeldir_watch_heads() h JOIN kombu_queue q ON q.id = h.queue_id GROUP BY q.name
    """
    _LIVING = """
        SELECT count(*) FROM kombu_holder
        WHERE beat_at > clock_timestamp() - interval '20 s' OR id IN (
            SELECT objid::bigint FROM pg_locks
            WHERE locktype = 'advisory' AND classid = 1802331490 AND objsubid = 2 AND granted
                AND database = (SELECT oid FROM pg_database WHERE datname = current_database()))
    """

    def collect(self, cursor: Cursor) -> list[Metric]:
        """Messages by state, their age, consumers and holders."""
        messages = {(queue, state): 0 for queue in self.queues for state in STATES}
        consumers = dict.fromkeys(((queue,) for queue in self.queues), 0)
        oldest = dict.fromkeys(((queue,) for queue in self.queues), 0.0)
        held_by_dead = 0
        cursor.execute(self._CONSUMERS)
        for name, consuming, held, lost, _ in cursor.fetchall():
            consumers[(self.queue(name),)] += consuming
            messages[self.queue(name), "held"] += int(held)
            held_by_dead += int(lost)
        for state, query in (("ready", self._READY), ("delayed", self._DELAYED)):
            cursor.execute(query)
            for name, number in cursor.fetchall():
                messages[self.queue(name), state] += number
        cursor.execute(self._OLDEST)
        for name, age in cursor.fetchall():
            key = (self.queue(name),)
            oldest[key] = max(oldest[key], age)
        cursor.execute(self._LIVING)
        (holders,) = cursor.fetchone() or (0,)
        return [
            gauge("celery_queue_messages", "Messages by state.", ("queue", "state"), messages),
            gauge(
                "celery_queue_oldest_ready_age_seconds",
                "How long the oldest message that is due has waited; one with an ETA since then.",
                ("queue",),
                oldest,
            ),
            gauge(
                "celery_queue_consumers",
                "Living processes that hold messages of the queue or sleep until one comes.",
                ("queue",),
                consumers,
            ),
            gauge(
                "celery_broker_holders_alive", "Processes whose session with the broker lives.", value=holders
            ),
            gauge(
                "celery_broker_held_by_dead",
                "Messages of processes that are gone and that nobody has taken back yet.",
                value=held_by_dead,
            ),
        ]


class DeadLetters(Collected):
    """What failed and is open: one pass over the open rows."""

    name = "dead_letters"

    _OPEN = """
        SELECT queue, task, class, state, count(*),
            extract(epoch FROM clock_timestamp() - min(last_failed_at))::float8,
            extract(epoch FROM clock_timestamp() - min(changed_at))::float8,
            extract(epoch FROM max(last_failed_at))::float8
        FROM celery_task_failures WHERE state IN ('pending', 'in_progress') GROUP BY queue, task, class, state
    """

    def collect(self, cursor: Cursor) -> list[Metric]:
        """Open rows by queue, task and class, and the oldest ones."""
        found = {
            (queue.name, task, kind): 0
            for queue in self.sheet.queues.values()
            for task in queue.tasks
            for kind in CLASSES
        }
        oldest = dict.fromkeys(((queue,) for queue in self.queues), 0.0)
        newest = {(queue, kind): 0.0 for queue in self.queues for kind in CLASSES}
        replayed = 0.0
        cursor.execute(self._OPEN)
        for queue, task, kind, state, number, age, since, last in cursor.fetchall():
            key = (self.queue(queue), self.task(task), kind)
            newest[key[::2]] = max(newest[key[::2]], last)
            found[key] = found.get(key, 0) + number
            oldest[key[:1]] = max(oldest[key[:1]], age)
            if state == "in_progress":
                replayed = max(replayed, since)
        return [
            gauge(
                "celery_dlq_open",
                "Dead letters that are pending or being replayed.",
                ("queue", "task_name", "failure_class"),
                found,
            ),
            gauge(
                "celery_dlq_oldest_open_age_seconds",
                "Time since the oldest open dead letter last failed.",
                ("queue",),
                oldest,
            ),
            # An arrival is seen in it also when it came while no exporter counted.
            gauge(
                "celery_dlq_newest_failure_timestamp_seconds",
                "When the newest open dead letter last failed; 0 when none is open.",
                ("queue", "failure_class"),
                newest,
            ),
            gauge(
                "celery_dlq_in_progress_oldest_age_seconds",
                "How long the oldest replay that hasn't ended is under way.",
                value=replayed,
            ),
        ]


class Arrivals(Collected):
    """What became a dead letter, and how replays ended, since this process began to look.

    Rows are removed in the end, so counting them would go backwards; what is new is added instead. Each look
    goes back a minute before the last one: a transaction commits after the time and the number it took.
    """

    name = "arrivals"

    _BACK = timedelta(minutes=1)
    _ROWS_BACK = 1000
    _NEW = """
        SELECT id, failures, queue, class, last_failed_at FROM celery_task_failures
        WHERE last_failed_at >= %s
    """
    _ENDED = "SELECT id, action FROM celery_task_failure_audit WHERE id > %s"

    def __init__(self, sheet: Topology) -> None:
        super().__init__(sheet)
        self._arrivals = Counter({(queue, kind): 0 for queue in self.queues for kind in CLASSES})
        self._replays = Counter(dict.fromkeys(((result,) for result in RESULTS.values()), 0))
        self._seen: dict[int, tuple[int, datetime]] = {}
        self._ended: set[int] = set()
        self._since: datetime | None = None
        self._last_row = 0

    def collect(self, cursor: Cursor) -> list[Metric]:
        """Add what is new to the counters."""
        cursor.execute(
            "SELECT clock_timestamp(), coalesce((SELECT max(id) FROM celery_task_failure_audit), 0)"
        )
        now, last_row = cursor.fetchone() or (None, 0)
        assert isinstance(now, datetime)  # noqa: S101 - one row always comes
        begins = self._since is None
        since = (self._since or now) - self._BACK
        cursor.execute(self._NEW, (since,))
        for row, failures, queue, kind, failed_at in cursor.fetchall():
            # What was not seen failed once since; a replay that failed is the same row again.
            known, _ = self._seen.get(row, (failures - 1, failed_at))
            self._seen[row] = (failures, failed_at)
            if not begins:
                self._arrivals[self.queue(queue), kind] += failures - known
        cursor.execute(self._ENDED, (max(self._last_row if not begins else last_row, 0) - self._ROWS_BACK,))
        for row, action in cursor.fetchall():
            if row not in self._ended:
                self._ended.add(row)
                if action in RESULTS and not begins:
                    self._replays[(RESULTS[action],)] += 1
        self._since = now
        self._last_row = last_row
        self._seen = {row: seen for row, seen in self._seen.items() if seen[1] >= now - self._BACK}
        self._ended = {row for row in self._ended if row > last_row - self._ROWS_BACK}
        return [
            _counter(
                "celery_dlq_arrivals",
                "Jobs that failed for good since the exporter started, failed replays included.",
                ("queue", "failure_class"),
                self._arrivals,
            ),
            _counter(
                "celery_dlq_replays",
                "Replays that ended since the exporter started.",
                ("result",),
                self._replays,
            ),
        ]


def _counter(name: str, documentation: str, labels: Iterable[str], values: Mapping[Any, float]) -> Metric:
    family = CounterMetricFamily(name, documentation, labels=list(labels))
    for of, number in values.items():
        family.add_metric(of, number)
    return family


class Tables(Collected):
    """What the plane's tables take, and whether vacuum comes to them."""

    name = "tables"

    _SIZES = """
        SELECT c.relname, pg_total_relation_size(c.oid), coalesce(s.n_dead_tup, 0),
            coalesce(extract(epoch FROM s.last_autovacuum)::float8, 0)
        FROM pg_class c LEFT JOIN pg_stat_all_tables s ON s.relid = c.oid
        WHERE c.relnamespace = 'public'::regnamespace AND c.relkind = 'r' AND c.relname = ANY (%s)
    """

    def collect(self, cursor: Cursor) -> list[Metric]:
        """Sizes, dead rows and the last autovacuum of each table, and the size of the database."""
        cursor.execute(self._SIZES, (list(TABLES),))
        rows = cursor.fetchall()
        cursor.execute("SELECT pg_database_size(current_database())")
        (size,) = cursor.fetchone() or (0,)
        return [
            gauge(
                "celery_table_size_bytes",
                "Size of a table with its indexes and TOAST.",
                ("table",),
                {(table,): size for table, size, _, _ in rows},
            ),
            gauge(
                "celery_table_dead_tuples",
                "Rows that vacuum has yet to remove, as PostgreSQL estimates them.",
                ("table",),
                {(table,): dead for table, _, dead, _ in rows},
            ),
            gauge(
                "celery_table_last_autovacuum_timestamp_seconds",
                "When autovacuum last finished with a table; 0 when it never has.",
                ("table",),
                {(table,): vacuumed for table, _, _, vacuumed in rows},
            ),
            gauge("celery_postgres_database_size_bytes", "Size of the plane's database.", value=size),
        ]


class Sessions(Collected):
    """Who is connected, and what keeps vacuum from its work."""

    name = "sessions"

    # reserved_connections is new in PostgreSQL 16.
    _LIMIT = """
        SELECT current_setting('max_connections')::int
            - current_setting('superuser_reserved_connections')::int
            - coalesce(current_setting('reserved_connections', true), '0')::int
    """

    def __init__(self, sheet: Topology, budget: int | None) -> None:
        super().__init__(sheet)
        self._budget = budget

    def collect(self, cursor: Cursor) -> list[Metric]:
        """Connections against their limit and the plane's budget; the oldest transaction and snapshot."""
        cursor.execute("SELECT * FROM skeldir_watch_sessions()")
        xmin_age, transaction_age, roles, numbers = cursor.fetchone() or (0, 0.0, [], [])
        connections = dict.fromkeys(((role,) for role in (*ROLES, OTHER)), 0)
        for role, number in zip(roles, numbers, strict=True):
            connections[(role if role in ROLES else OTHER,)] += number
        cursor.execute(self._LIMIT)
        (limit,) = cursor.fetchone() or (0,)
        found = [
            gauge(
                "celery_postgres_oldest_xmin_age_transactions",
                "How many transactions old the oldest snapshot is that keeps vacuum from removing rows.",
                value=xmin_age,
            ),
            gauge(
                "celery_postgres_oldest_transaction_age_seconds",
                "How long the oldest transaction in the plane's database is open.",
                value=transaction_age,
            ),
            gauge("celery_postgres_connections", "Client connections to the server.", ("role",), connections),
            gauge(
                "celery_postgres_connections_limit", "Connections for roles without privileges.", value=limit
            ),
        ]
        if self._budget:
            found.append(
                gauge(
                    "celery_postgres_connection_budget",
                    "Connections that all units together, operators and the reserve need at most.",
                    value=self._budget,
                )
            )
        return found


class Certificates(Collected):
    """Until when the server's certificate holds, and the ones that vouch for it.

    Nobody can connect any more from its end on, and sessions that stand tell nobody.
    """

    name = "certificates"
    every = 60.0  # the server starts a process for it

    _SSL_REQUEST = (8).to_bytes(4, "big") + (80877103).to_bytes(4, "big")
    """PostgreSQL's own message for it (its documentation, "Message Formats")."""
    _NO_CHECK_TIME = 0x200000
    """X509_V_FLAG_NO_CHECK_TIME of OpenSSL: one that has ended tells its end, too."""

    def collect(self, cursor: Cursor) -> list[Metric]:
        """Ask the server that the session is with, as a new session would."""
        ends = {("server",): 0.0, ("authority",): 0.0}
        session = cursor.connection.info
        authorities = session.dsn_parameters.get("sslrootcert", "system")
        if session.ssl_in_use and authorities != "system":
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.check_hostname = False  # the session has verified whose it is
            context.verify_flags |= self._NO_CHECK_TIME
            context.load_verify_locations(authorities)
            with socket.create_connection((session.host, session.port), timeout=5) as connection:
                connection.sendall(self._SSL_REQUEST)
                connection.recv(1)
                with context.wrap_socket(connection) as encrypted:
                    ends["server",] = _not_after(encrypted.getpeercert())
            # While one takes the other's place both are trusted; whoever is left vouches on.
            ends["authority",] = max(map(_not_after, context.get_ca_certs()))
        return [
            gauge(
                "celery_postgres_certificate_not_after_timestamp_seconds",
                "When a certificate ends that sessions with the database need; 0 where none is verified.",
                ("certificate",),
                ends,
            )
        ]


def _not_after(certificate: Any) -> float:
    return float(ssl.cert_time_to_seconds(certificate["notAfter"]))


def collectors(sheet: Topology, budget: int | None) -> list[Collected]:
    """All of them, the most important first."""
    return [
        Queues(sheet),
        DeadLetters(sheet),
        Arrivals(sheet),
        Sessions(sheet, budget),
        Tables(sheet),
        Certificates(sheet),
    ]
