"""Working through an alert's page on lab hosts: every block pasted on the host that the page is for.

These are the pages of alerts that no drill makes. The plane is well there, so what a page tells to do must
leave it well, and what it tells to look at must change nothing.
"""

from pathlib import Path

from testinfra.host import Host

from drills.faults import UNDRILLED
from tests.lab import invocations, lab_host, scheduler_paused, sql, unit, wait_until
from tests.rules.runbooks import HOSTS, alert_pages, front_matter
from tests.runbooks import Reader, Run, read_page

QUEUE = "llm"
ANSWERS = {"QUEUE": QUEUE}
"""What is true on a plane that is well."""
# The lab has no monitoring host of its own.
PLACES = {"worker": "worker1", "database": "db1", "exporter": "worker1", "monitoring": "worker1"}
assert set(PLACES) == set(HOSTS)


def pages_for(*hosts: str) -> list[Path]:
    """The pages without a drill whose commands are for such hosts."""
    return [path for path in alert_pages() if path.stem in UNDRILLED and front_matter(path)["host"] in hosts]


def work_through(path: Path, worker: Host, database: Host) -> None:
    """Paste a page's blocks, section by section."""
    reader = Reader(read_page(path), _pasted_on(lab_host(PLACES[front_matter(path)["host"]])))
    with scheduler_paused(worker, database):  # its jobs store things, too
        before = _state(worker, database)
        reader.paste("Diagnosis", **ANSWERS)
        assert _state(worker, database) == before, "a look changed something"
    reader.paste("Mitigation")
    wait_until(lambda: all(worker.service(unit(queue)).is_running for queue in _queues(before)), 60)
    reader.paste("Verify recovered")
    reader.assert_nothing_is_left()


def _pasted_on(host: Host) -> Run:
    def run(script: str) -> tuple[int, str]:
        done = host.run("bash -c %s", f"exec 2>&1\n{script}")
        return done.rc, done.stdout

    return run


def _state(worker: Host, database: Host) -> tuple[dict[str, str], str]:
    """What a look must not change: which processes run, and what the plane has stored."""
    count = "SELECT (SELECT count(*) FROM {}), (SELECT count(*) FROM {}), (SELECT count(*) FROM {})"
    tables = ("kombu_message", "celery_taskmeta", "celery_task_failures")
    return invocations(worker), sql(database, count.format(*tables))


def _queues(before: tuple[dict[str, str], str]) -> list[str]:
    """Queues whose units ran; those that a page stops on purpose it starts again under Verify recovered."""
    return [name.partition("@")[2].removesuffix(".service") for name in before[0] if f"@{QUEUE}." not in name]
