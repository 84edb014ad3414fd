"""The drills: how each alert's fault is made on the real plane, and how it is undone.

Every script is for root in bash. An `undo` may run twice, and when nothing was made: it also runs by itself
on the plane's host should the drill vanish. What it leaves is said in docs/monitoring.md.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from app.core.topology import load_topology
from app.observability.context import PUBLISHED_HEADER

SHEET = load_topology()
PING, REFRESH, MODEL = (
    next(task for task in SHEET.queue_by_task if task.endswith(f".{name}"))
    for name in ("ping", "refresh_all_materialized_views", "route")
)
PINGS, REFRESHES, MODELS = (SHEET.queue_by_task[task].name for task in (PING, REFRESH, MODEL))
QUEUES = frozenset({PINGS, REFRESHES, MODELS})
Answer = str | Callable[[str], str]

_PSQL = "runuser -u postgres -- psql -XAtq skeldir"
_PYTHON = 'CREDENTIALS_DIRECTORY=/etc/skeldir/operator "$SKELDIR_HOME"/current/venv/bin/python'


@dataclass(frozen=True)
class Fault:
    """Something that is broken on a host of a place, or with `workers` on each host of them."""

    place: str
    make: str
    undo: str = "true"


@dataclass(frozen=True)
class Drill:
    """One alert's drill.

    Attributes:
        what: the fault, in a few words.
        labels: what tells this alert from the same one of something else.
        faults: made in order, undone in the reverse one.
        breaks: what nobody else can use meanwhile; a drill that breaks or needs it waits.
        needs: what must be whole meanwhile.
        explained_by: a louder alert that the same fault may fire, whose message then stands for this one's.
        outside: the page can't mend the cause (a bad release, a service that is away); that is done for it
            after its Mitigation and before its Verify recovered.
        answers: to what the page's blocks ask.
    """

    what: str
    faults: tuple[Fault, ...]
    labels: dict[str, str] = field(default_factory=dict)
    breaks: frozenset[str] = frozenset()
    needs: frozenset[str] = frozenset()
    explained_by: str = ""
    outside: bool = False
    answers: dict[str, Answer] = field(default_factory=dict)


def _unit(queue: str) -> str:
    return f"skeldir-worker@{queue}.service"


def _address(queue: str) -> str:
    """Where the host of a unit asks it, as a word of a script."""
    settings = f"/etc/skeldir/worker/{queue}.env"
    return f"\"$(sed -n 's/^CELERY_METRICS_ADDR=//p' {settings}):{SHEET.queues[queue].metrics_port}\""


def _given_up(unit: str) -> str:
    """Kill a unit as often as systemd starts it, until it starts it no more."""
    return f"""
for _ in $(seq 200); do
  [ "$(systemctl show -P ActiveState {unit})" != failed ] || exit 0
  systemctl kill --signal=KILL --kill-whom=all {unit} 2>/dev/null || true
  systemctl start --no-block {unit} 2>/dev/null || true
  sleep 0.1
done
echo "{unit} is still started" && exit 1
"""


def _started(unit: str) -> str:
    return f"systemctl reset-failed {unit} 2>/dev/null; systemctl start {unit}"


def _publish(code: str) -> str:
    return f"{_PYTHON} - <<'CODE'\nfrom app.celery_app import celery_app as app\n{code}\nCODE\n"


def _of_a_drill(task: str) -> str:
    """Which dead letters a drill leaves."""
    return f"--queue {SHEET.queue_by_task[task].name} --task {task} --class permanent --since 1h"


def _ignored(task: str) -> str:
    return f'skeldir dlq ignore {_of_a_drill(task)} --state pending --reason "of a drill" >/dev/null || true'


def _failing(task: str, number: int) -> Fault:
    """Jobs with an argument that their task doesn't have, and their dead letters given up afterwards."""
    mine = _of_a_drill(task)
    return Fault(
        "worker",
        f"""
set -e
before=$(skeldir dlq list {mine} --limit 10000 --json | grep -c '"id"' || true)
{_publish(f"for _ in range({number}): app.send_task({task!r}, kwargs=dict(of_a_drill=1))")}
for _ in $(seq 60); do
  found=$(skeldir dlq list {mine} --limit 10000 --json | grep -c '"id"' || true)
  [ $((found - before)) -lt {number} ] || exit 0
  sleep 1
done
echo "only $((found - before)) of {number} jobs failed" && exit 1
""",
        _ignored(task),
    )


def _background(name: str, command: str) -> str:
    """A process of systemd's that the next script of this name ends; it ends itself after 20 minutes."""
    words = f"--quiet --collect --unit=skeldir-drill-{name} --property=RuntimeMaxSec=1200 --setenv=PGAPPNAME=skeldir-drill"
    return f"systemd-run {words} {command}"


def _over(name: str) -> str:
    return f"systemctl stop skeldir-drill-{name}.service 2>/dev/null || true\n"


_POSTGRES_STARTED = """
pg_lsclusters --no-header | while read -r version name _; do systemctl start "postgresql@$version-$name.service"; done
"""

_LOCKED = Fault(
    "database",
    f"""
set -e
{_background("lock", f'''{_PSQL} -c "LOCK TABLE events; SELECT pg_sleep(1200)"''')}
for _ in $(seq 50); do
  held=$({_PSQL} -c "SELECT count(*) FROM pg_locks WHERE relation = 'events'::regclass AND mode = 'AccessExclusiveLock' AND granted")
  [ "$held" = 0 ] || exit 0
  sleep 0.2
done
echo "the table events can't be locked" && exit 1
""",
    _over("lock")
    + f"""{_PSQL} -c "SELECT pg_terminate_backend(pid) FROM pg_locks JOIN pg_stat_activity USING (pid)
      WHERE relation = 'events'::regclass AND application_name = 'skeldir-drill'" >/dev/null""",
)

_POISON = Fault(
    "worker",
    # The job waits for the lock, so its process can be killed in the middle of it.
    f"""
set -e
address={_address(REFRESHES)}
number() {{ curl -sf "$address/metrics" | awk -v name="$1" 'index($0, name "{{") == 1 {{ sum += $NF }} END {{ print sum + 0 }}'; }}
lost=$(number celery_task_worker_lost_total)
{_publish(f"app.send_task({REFRESH!r})")}
for killed in 1 2 3; do
  for _ in $(seq 150); do
    [ "$(number celery_task_in_flight)" = 0 ] || break
    sleep 0.2
  done
  pkill --signal KILL --parent "$(systemctl show -P MainPID {_unit(REFRESHES)})"
  for _ in $(seq 150); do
    [ "$(number celery_task_worker_lost_total)" -lt $((lost + killed)) ] || continue 2
    sleep 0.2
  done
  echo "the job's process was not lost for the time $killed" && exit 1
done
""",
    f'skeldir dlq ignore --queue {REFRESHES} --task {REFRESH} --class poison --since 1h --state pending --reason "of a drill" '
    ">/dev/null || true",
)

_BACKLOG = Fault(
    "worker",
    # Jobs in a queue that was taken from all its workers by mistake.
    _publish(
        f"""
import time
said = app.control.cancel_consumer({PINGS!r}, pattern="{PINGS}@*", matcher="glob", reply=True, timeout=5)
assert said, "no worker heard it"
time.sleep(1)
for _ in range(50):
    app.send_task({PING!r})
"""
    ),
    # Its own units: told without a pattern, those of other queues would take its jobs from then on, too.
    _publish(
        f'app.control.add_consumer({PINGS!r}, pattern="{PINGS}@*", matcher="glob", reply=True, timeout=2)'
    ),
)

# Jobs that say they were published an hour ago.
_LATE = Fault(
    "worker",
    _publish(
        f"""
import time
from celery.signals import before_task_publish
@before_task_publish.connect(weak=False)
def an_hour_ago(headers, **_):
    headers["{PUBLISHED_HEADER}"] = time.time() - 3600
for _ in range(20):
    app.send_task({PING!r})
"""
    ),
)

_AGED = Fault(
    "database",
    f"""{_PSQL} -c "UPDATE kombu_message SET \\"timestamp\\" = \\"timestamp\\" - interval '1 hour'
  WHERE queue_id = (SELECT id FROM kombu_queue WHERE name = '{PINGS}')" """,
)

# One run of what runs most often is overdue at once, and can't be noted.
_OVERDUE = Fault(
    "database",
    f"""{_PSQL} -1 -v ON_ERROR_STOP=1 -c "REVOKE UPDATE ON celery_schedule FROM app_user" -c "UPDATE celery_schedule
  SET last_due = last_due - interval '2 days' WHERE name = (SELECT name FROM celery_schedule ORDER BY last_due DESC LIMIT 1)" >/dev/null""",
    f"""{_PSQL} -c "GRANT UPDATE ON celery_schedule TO app_user" >/dev/null""",
)


def _refused(function: str, role: str) -> Fault:
    """A grant that a deployment forgot."""
    return Fault(
        "database",
        f"""{_PSQL} -c "REVOKE EXECUTE ON FUNCTION {function} FROM {role}" >/dev/null""",
        f"""{_PSQL} -c "GRANT EXECUTE ON FUNCTION {function} TO {role}" >/dev/null""",
    )


_SNAPSHOT = Fault(
    "database",
    f"""
set -e
cat >/run/skeldir-drill-transactions.sql <<'SQL'
SET synchronous_commit = off;
DO $$ BEGIN FOR i IN 1..5100000 LOOP PERFORM pg_current_xact_id(); COMMIT; END LOOP; END $$;
SQL
chmod 644 /run/skeldir-drill-transactions.sql
{_background("snapshot", f'''bash -c "(echo 'BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT count(*) FROM kombu_queue;'; exec sleep 1200) | {_PSQL}"''')}
{_background("transactions", f"{_PSQL} -f /run/skeldir-drill-transactions.sql")}
""",
    _over("snapshot")
    + _over("transactions")
    + f"""rm -f /run/skeldir-drill-transactions.sql
{_PSQL} -c "SELECT pg_terminate_backend(pid) FROM pg_stat_activity
  WHERE application_name = 'skeldir-drill' AND query LIKE '%pg_current_xact_id%' AND pid <> pg_backend_pid()" >/dev/null""",
)

_GUESTS = Fault(
    "database",
    f"""
set -e
echo '\\sleep 1200 s' >/run/skeldir-drill-guests.sql
chmod 644 /run/skeldir-drill-guests.sql
free=$({_PSQL} -c "SELECT current_setting('max_connections')::int - current_setting('superuser_reserved_connections')::int
  - coalesce(current_setting('reserved_connections', true), '0')::int - count(*) + 1 FROM pg_stat_activity WHERE backend_type = 'client backend'")
{_background("guests", 'runuser -u postgres -- pgbench -n -c "$free" -T 1200 -f /run/skeldir-drill-guests.sql skeldir')}
""",
    _over("guests") + "rm -f /run/skeldir-drill-guests.sql",
)

# The consumer's loop is the main thread; ptrace stops that one alone, and the port still answers. Should it hold
# the interpreter's lock just then, nothing would: then it is let go and stopped again.
_STALLED = f"""
set -e
systemctl service-watchdogs no
cat >/run/skeldir-drill-stall.py <<'CODE'
import ctypes, os, sys, time
from urllib.request import urlopen
process, address = int(sys.argv[1]), sys.argv[2]
trace = ctypes.CDLL(None, use_errno=True).ptrace
SEIZE, INTERRUPT, DETACH = 0x4206, 0x4207, 17
for _ in range(20):
    if trace(SEIZE, process, None, None) or trace(INTERRUPT, process, None, None):
        sys.exit("process %d can't be traced: error %d" % (process, ctypes.get_errno()))
    try:
        urlopen("http://%s/metrics" % address, timeout=3).read()
        break
    except OSError:
        trace(DETACH, process, None, None)
        time.sleep(0.1)
# Who traces a process hears of its end first, and must let it go.
while os.WIFSTOPPED(os.waitpid(process, 0x40000000)[1]):
    pass
CODE
{_background("stall", f'/usr/bin/python3 /run/skeldir-drill-stall.py "$(systemctl show -P MainPID {_unit(MODELS)})" {_address(MODELS)}')}
"""

_JOURNAL = "/var/log/journal/$(cat /etc/machine-id)"
_FULL = Fault(
    "database",
    # A small file system over the journal's folder, full of old journals.
    f"""
set -e
journal={_JOURNAL} image=/var/tmp/skeldir-drill.img
mkdir -p "$journal"
journalctl --rotate && journalctl --flush
sample=$(mktemp)
cp "$(find "$journal" -name '*@*.journal' | head -n 1)" "$sample"
truncate --size=300M $image
mkfs.ext4 -q -m 0 -F $image
[ -e /dev/loop-control ] || mknod /dev/loop-control c 10 237
device=$(losetup --find | cut -d" " -f1) # it says "(lost)" beside one that has no node yet
[ -e "$device" ] || mknod "$device" b 7 "${{device#/dev/loop}}"
losetup "$device" $image
mount "$device" "$journal"
for number in $(seq 10000 99999); do
  [ "$(df --output=pcent "$journal" | tail -n 1 | tr -d ' %')" -lt 95 ] || break
  cp "$sample" "$journal/system@$(printf '%032x' 1)-00000000000$number-0005f0000000$(printf '%04x' $((number - 10000))).journal" || break
done
rm "$sample"
""",
    """
image=/var/tmp/skeldir-drill.img
device=$(losetup --noheadings --output NAME --associated $image 2>/dev/null)
[ -z "$device" ] || { umount --lazy "$device"; losetup --detach "$device"; }
rm -f $image
""",
)


def _first_column(said: str) -> str:
    return said.partition("|")[0].strip()


DRILLS: dict[str, Drill] = {
    "PostgresDown": Drill(
        "Postgres is stopped",
        (Fault("database", "systemctl stop 'postgresql@*.service'", _POSTGRES_STARTED),),
        breaks=QUEUES | {"postgres"},
    ),
    "CeleryPlaneDown": Drill(
        "all units are stopped",
        (
            Fault(
                "workers", "systemctl stop skeldir-workers.target", "systemctl start skeldir-workers.target"
            ),
        ),
        breaks=QUEUES,
        needs=frozenset({"postgres"}),
    ),
    "CeleryQueueNoConsumer": Drill(
        "a unit is killed until systemd gives it up",
        (Fault("workers", _given_up(_unit(MODELS)), _started(_unit(MODELS))),),
        {"queue": MODELS},
        breaks=frozenset({MODELS}),
        needs=frozenset({"postgres"}),
        answers={"QUEUE": MODELS},
    ),
    "CeleryWorkerDown": Drill(
        "a unit's consumer is frozen (SIGSTOP)",
        (
            Fault(
                "worker",
                # The watchdog would end it before Prometheus' patience is over.
                f"systemctl service-watchdogs no && systemctl kill --signal=STOP --kill-whom=main {_unit(MODELS)}",
                f"systemctl kill --signal=CONT --kill-whom=main {_unit(MODELS)} 2>/dev/null;"
                f" systemctl service-watchdogs yes; {_started(_unit(MODELS))}",
            ),
        ),
        {"queue": MODELS},
        breaks=frozenset({MODELS}),
        needs=frozenset({"postgres"}),
        explained_by="CeleryQueueNoConsumer",  # where no other host serves the queue
        answers={"QUEUE": MODELS},
    ),
    "CeleryWorkerLoopStalled": Drill(
        "a consumer's loop is stopped, and only that (ptrace)",
        (
            Fault(
                "worker",
                _STALLED,
                _over("stall") + f"systemctl service-watchdogs yes; {_started(_unit(MODELS))}",
            ),
        ),
        {"queue": MODELS},
        breaks=frozenset({MODELS}),
        needs=frozenset({"postgres"}),
        answers={"QUEUE": MODELS},
    ),
    "SkeldirBeatDown": Drill(
        "every scheduler is stopped",
        (
            Fault(
                "workers",
                "systemctl stop skeldir-beat.service 2>/dev/null || true",  # a worker host need not have one
                "! systemctl --quiet is-enabled skeldir-beat.service || systemctl start skeldir-beat.service",
            ),
        ),
        breaks=frozenset({"beat"}),
        needs=frozenset({"postgres"}),
    ),
    "SkeldirBeatOverdue": Drill(
        "the scheduler may no longer note its runs",
        (_OVERDUE,),
        breaks=frozenset({"beat"}),
        needs=frozenset({"postgres"}),
        outside=True,
    ),
    "SkeldirExporterDown": Drill(
        "the exporter is killed until systemd gives it up",
        (Fault("exporter", _given_up("skeldir-exporter.service"), _started("skeldir-exporter.service")),),
        breaks=frozenset({"exporter"}),
    ),
    "SkeldirExporterCollectorFailing": Drill(
        "the exporter may no longer ask for the sessions",
        (_refused("skeldir_watch_sessions", "app_ro"),),
        {"collector": "sessions"},
        breaks=frozenset({"exporter"}),
        needs=frozenset({"postgres"}),
        outside=True,
    ),
    "CeleryQueueOldestAge": Drill(
        "a backlog: jobs that wait for an hour, made older than they are, and workers that don't consume",
        (_BACKLOG, _AGED),
        {"queue": PINGS, "severity": "critical"},
        breaks=frozenset({PINGS}),
        needs=frozenset({"postgres", "exporter"}),
        explained_by="CeleryQueueNoConsumer",
        answers={"QUEUE": PINGS},
    ),
    "CeleryTaskWorkerLost": Drill(
        "a poison job: its process is killed at each delivery",
        (_LOCKED, _POISON),
        {"queue": REFRESHES, "task_name": REFRESH},
        breaks=frozenset({REFRESHES}),
        needs=frozenset({"postgres", "dead letters"}),
        outside=True,
        answers={"QUEUE": REFRESHES},
    ),
    "CeleryDlqBurst": Drill(
        "eighty jobs fail for good",
        (_failing(PING, 80),),
        {"queue": PINGS},
        breaks=frozenset({PINGS}),
        needs=frozenset({"postgres", "exporter", "dead letters"}),
        outside=True,
        answers={"QUEUE": PINGS},
    ),
    "CeleryDlqArrivals": Drill(
        "one job fails for good",
        (_failing(REFRESH, 1),),
        {"queue": REFRESHES, "failure_class": "permanent"},
        breaks=frozenset({REFRESHES}),
        needs=frozenset({"postgres", "exporter", "dead letters"}),
        outside=True,
    ),
    "CeleryDlqCaptureErrors": Drill(
        "dead letters may no longer be written, and a job fails",
        (
            Fault("worker", "true", f"sleep 5\n{_ignored(REFRESH)}"),  # once it is one
            _refused("celery_task_failure_capture", "app_user"),
            Fault("worker", _publish(f"app.send_task({REFRESH!r}, kwargs=dict(of_a_drill=1))")),
        ),
        {"queue": REFRESHES},
        breaks=frozenset({REFRESHES, "dead letters"}),
        needs=frozenset({"postgres"}),
        outside=True,
        answers={"QUEUE": REFRESHES},
    ),
    "CeleryWaitBudgetBurn": Drill(
        "twenty jobs start an hour late, as they say",
        (_LATE,),
        {"queue": PINGS, "severity": "critical"},
        breaks=frozenset({PINGS}),
        needs=frozenset({"postgres"}),
        answers={"QUEUE": PINGS},
    ),
    "CelerySuccessBudgetBurn": Drill(
        "a dozen jobs fail, and nearly none succeeds",
        (_failing(MODEL, 12),),
        {"queue": MODELS, "severity": "critical"},
        breaks=frozenset({MODELS}),
        needs=frozenset({"postgres", "dead letters"}),
        outside=True,
        answers={"QUEUE": MODELS},
    ),
    "PostgresConnectionsHigh": Drill(
        "guests take every connection that is left",
        (_GUESTS,),
        {"severity": "critical"},
        breaks=QUEUES | {"connections"},
        needs=frozenset({"postgres", "exporter"}),
        answers={"ROLE": _first_column},
    ),
    "PostgresXminHeld": Drill(
        "a forgotten transaction, five million transactions ago",
        (_SNAPSHOT,),
        needs=frozenset({"postgres", "exporter"}),
        answers={"PID": _first_column},
    ),
    "HostDiskFilling": Drill(
        "a file system full of old journals",
        (_FULL,),
        {"severity": "critical"},
        needs=frozenset({"postgres"}),
    ),
    "TargetDown": Drill(
        "a node exporter is stopped",
        (
            Fault(
                "monitoring",
                "systemctl stop prometheus-node-exporter.service",
                "systemctl start prometheus-node-exporter.service",
            ),
        ),
        {"job": "node"},
        needs=frozenset({"beat"}),  # its page starts each unit that is not
    ),
}

_TIME = "only time mends it: a window of hours, or an age of a day"
UNDRILLED = {
    "Watchdog": "every drill begins with its arrival",
    "AlertmanagerNotificationsFailing": "nobody would be told of it",
    "PrometheusRuleFailing": "a rule that fails is a mistake in prometheus/rules/, which CI refuses",
    "CeleryMessagesHeldByDead": "any living worker gives them back: it takes a mistake in the broker",
    "CeleryTaskTimeouts": _TIME,
    "CeleryRetryStorm": "no task of the plane retries without its other side being away",
    "CeleryDlqOld": _TIME,
    "CeleryDlqReplayStuck": _TIME,
    "PostgresOldTransaction": "a quarter of an hour must pass",
    "PostgresVacuumBehind": _TIME,
    "PostgresCertificateEnding": "a certificate takes the authority's key, which is on no host",
}
"""Alerts without a drill, and why; tests/rules/record.py records their troubles, and rules and pages are tested."""
