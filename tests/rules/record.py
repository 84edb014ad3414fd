"""Make the plane's troubles, and write down what its targets say: `python -m tests.rules.record`.

Needs what the tests on a real Postgres need, and Debian's prometheus, prometheus-alertmanager and
prometheus-node-exporter; as root, for a small file system to fill. Takes about six minutes. The result is
`monitoring.recordings.FILE`, which is committed.
"""

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.request import urlopen

from app.core.topology import load_topology
from monitoring import recordings
from monitoring.recordings import Series, Writer
from tests.postgres import ROOT, Cluster, Database, free_port, provisioned_cluster, self_signed
from tests.rules.troubled_plane import MODULE
from tests.workers import Worker, environment, started

SHEET = load_topology()
HEAD = """What a real plane's targets said in its troubles: see monitoring/recordings.py.
Made by `python -m tests.rules.record`; don't edit."""
# Of programs that are not ours only what is used.
FOREIGN = (
    "prometheus_rule_evaluation_failures_total",
    "alertmanager_notifications_failed_total",
    "node_filesystem_",
)
SETTINGS = {
    "max_connections": "50",
    "synchronous_commit": "off",
    "autovacuum_naptime": "1s",
    "autovacuum_vacuum_cost_delay": "0",
}
REPLAY = ("dlq", "replay", "--class", "timeout", "--reason", "recorded", "--rate", "100")
BUSY, *IDLE = SHEET.queues


class Targets:
    """Who is scraped, by job and instance as Prometheus names them; ports of this run stay out of it."""

    def __init__(self, path: Path) -> None:
        self._writer = Writer(path, HEAD)
        self.ports: dict[tuple[str, str], int] = {}
        self.disk = Path("/disk")

    def port(self, job: str, instance: str) -> int:
        """The port of a target of this machine, a free one the first time."""
        return self.ports.setdefault((job, instance), free_port())

    def add(self, job: str, instance: str, port: int) -> None:
        self.ports[job, instance] = port

    def scrape(self, job: str, instance: str) -> Series | None:
        try:
            with urlopen(f"http://127.0.0.1:{self.ports[job, instance]}/metrics", timeout=5) as answer:
                found = recordings.samples(answer.read().decode())
        except OSError:
            return None
        if job in ("celery-worker", "skeldir-exporter", "skeldir-beat"):
            return found
        # Of this machine's file systems only its root and the one to fill, whose place is of one run.
        named = {key.replace(f'="{self.disk}"', '="/disk"'): value for key, value in found.items()}
        places = ('mountpoint="/"', 'mountpoint="/disk"')
        return {
            key: value
            for key, value in named.items()
            if key.startswith(FOREIGN) and ("mountpoint=" not in key or any(place in key for place in places))
        }

    def moment(self, name: str) -> None:
        self._writer.moment(name, time.time(), {key: self.scrape(*key) for key in self.ports})
        print(f"{time.strftime('%H:%M:%S')} {name}", flush=True)

    def value(self, job: str, metric: str, **labels: str) -> float:
        """Sum of a metric's series with these labels, over a job's targets that answer."""
        wanted = [f'{label}="{value}"' for label, value in labels.items()]
        return sum(
            value
            for (of, instance) in self.ports
            if of == job
            for key, value in (self.scrape(of, instance) or {}).items()
            if recordings.name_of(key) == metric and all(word in key for word in wanted)
        )


def wait(condition: Callable[[], Any], seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {seconds} s")
        time.sleep(0.3)


class Plane:
    """Workers of two queues, the exporter, and a Prometheus and an Alertmanager in trouble."""

    def __init__(self, cluster: Cluster, folder: Path, targets: Targets) -> None:
        self.cluster = cluster
        self.database = Database(cluster, "skeldir")
        self.folder = folder
        self.targets = targets
        self.stacks: dict[str, ExitStack] = {}
        self.workers: dict[str, Worker] = {}

    def start_worker(self, queue: str, *, wait_for_it: bool = True) -> None:
        port = self.targets.port("celery-worker", f"worker1:{SHEET.queues[queue].metrics_port}")
        words = ["worker", "--queues", queue, "--concurrency", str(SHEET.queues[queue].concurrency), "-n"]
        command = [sys.executable, "-m", "celery", "-A", MODULE, *words, f"{queue}@recorded"]
        env = environment(self.database.dsn(), CELERY_METRICS_PORT=str(port))
        stack = self.stacks[queue] = ExitStack()
        self.workers[queue] = stack.enter_context(started(command, self.folder / queue, env))
        if wait_for_it:
            wait(lambda: self.targets.value("celery-worker", "celery_worker_ready", queue=queue) == 1)

    def start_drained(self) -> None:
        """Another host's unit of the busy queue, drained all the time: it must keep nothing from ringing."""
        port = self.targets.port("celery-worker", f"worker2:{SHEET.queues[BUSY].metrics_port}")
        code = f"from {MODULE} import stand_by_for; stand_by_for({BUSY!r})"
        env = environment(self.database.dsn(), CELERY_METRICS_PORT=str(port))
        stack = self.stacks["drained"] = ExitStack()
        stack.enter_context(started([sys.executable, "-c", code], self.folder / "drained", env))
        wait(lambda: self.told("celery_worker_drained") == 1)

    def start_exporter(self) -> None:
        port = self.targets.port("skeldir-exporter", f"worker1:{SHEET.exporter.port}")
        code = f"from {MODULE} import run_exporter; run_exporter({port})"
        dsn = f"{self.database.dsn('app_ro')}?sslmode=verify-full&sslrootcert={self.folder / 'server.crt'}"
        env = environment(dsn, SKELDIR_CONNECTION_BUDGET="57")
        stack = self.stacks["exporter"] = ExitStack()
        self.workers["exporter"] = stack.enter_context(
            started([sys.executable, "-c", code], self.folder / "exporter", env)
        )
        wait(lambda: self.exported("celery_postgres_database_size_bytes"))

    def start_beat(self) -> None:
        port = self.targets.port("skeldir-beat", f"worker1:{SHEET.beat.port}")
        command = [sys.executable, "-c", f"from {MODULE} import run_beat; run_beat({port})"]
        stack = self.stacks["beat"] = ExitStack()
        log, env = self.folder / "beat", environment(self.database.dsn())
        self.workers["beat"] = stack.enter_context(started(command, log, env))
        wait(lambda: self.scheduled("skeldir_beat_active") == 1)

    def certify(self, days: int) -> None:
        """Give the server a certificate that holds for so long; returns when the exporter knows it."""
        self.cluster.certify(*self_signed(self.folder, "server", days))
        self.sql("ALTER SYSTEM SET ssl = on", "SELECT pg_reload_conf()")
        ends, end = "celery_postgres_certificate_not_after_timestamp_seconds", time.time() + days * 86400
        if "exporter" in self.stacks:
            wait(lambda: abs(self.exported(ends, certificate="server") - end) < 3600)

    def scheduled(self, metric: str) -> float:
        return self.targets.value("skeldir-beat", metric)

    def exported(self, metric: str, **labels: str) -> float:
        return self.targets.value("skeldir-exporter", metric, **labels)

    def told(self, metric: str, **labels: str) -> float:
        return self.targets.value("celery-worker", metric, **labels)

    def kill(self, name: str) -> None:
        """End it and all its children at once, as a host does that loses power."""
        subprocess.run(["kill", "-KILL", "--", f"-{self.workers[name].process.pid}"], check=True)
        self.workers[name].process.wait()

    def send(self, task: str, number: int = 1, **options: Any) -> None:
        code = (
            f"from tests.rules import troubled_plane as t\n"
            f"for _ in range({number}): t.{task}.apply_async(**{options!r})"
        )
        env = environment(self.database.dsn())
        subprocess.run([sys.executable, "-c", code], env=env, cwd=ROOT, check=True, timeout=60)

    def sql(self, *statements: str) -> None:
        session = self.database.connect("postgres")
        try:
            for statement in statements:
                session.cursor().execute(statement)
        finally:
            session.close()


@contextmanager
def troubled_monitoring(folder: Path, targets: Targets) -> Iterator[None]:
    """A Prometheus whose rule can't be evaluated, and an Alertmanager whose receiver refuses everything."""
    prometheus, alertmanager = free_port(), free_port()
    (folder / "rules.yml").write_text(
        "groups: [{name: broken, interval: 1s, rules: [{record: x, expr: 'up * on (job) group_left () up'},"
        " {alert: Rings, expr: vector(1)}]}]"
    )
    (folder / "prometheus.yml").write_text(
        f"""
global: {{scrape_interval: 1s, evaluation_interval: 1s}}
rule_files: [{folder}/rules.yml]
alerting: {{alertmanagers: [{{static_configs: [{{targets: ['127.0.0.1:{alertmanager}']}}]}}]}}
scrape_configs:
  - job_name: twice
    static_configs: [{{targets: ['127.0.0.1:{prometheus}', 'localhost:{prometheus}']}}]
"""
    )
    (folder / "alertmanager.yml").write_text(
        "route: {receiver: refuses, group_wait: 1s, group_interval: 1s}\n"
        f"receivers: [{{name: refuses, webhook_configs: [{{url: 'http://127.0.0.1:{prometheus}/no'}}]}}]\n"
    )
    commands = (
        [
            "prometheus",
            f"--config.file={folder}/prometheus.yml",
            f"--storage.tsdb.path={folder}/prometheus",
            f"--web.listen-address=127.0.0.1:{prometheus}",
            "--rules.alert.resend-delay=1s",  # it meets Alertmanager later than its first alert
        ],
        [
            "prometheus-alertmanager",
            f"--config.file={folder}/alertmanager.yml",
            f"--storage.path={folder}/alertmanager",
            f"--web.listen-address=127.0.0.1:{alertmanager}",
            "--cluster.listen-address=",
        ],
    )
    with (folder / "monitoring.log").open("wb") as log:
        processes = [subprocess.Popen(command, stdout=log, stderr=log) for command in commands]
    targets.add("prometheus", "monitor1:9090", prometheus)
    targets.add("alertmanager", "monitor1:9093", alertmanager)
    try:
        yield
    finally:
        for process in processes:
            process.terminate()
            process.wait(timeout=20)


@contextmanager
def small_disk(folder: Path, targets: Targets) -> Iterator[Path]:
    """A node exporter on a machine with a small file system, which this yields."""
    image, mount, port = folder / "disk.img", folder / "disk", free_port()
    mount.mkdir()
    with image.open("wb") as file:
        file.truncate(32 * 2**20)
    subprocess.run(["mkfs.ext4", "-q", "-m", "0", image], check=True)
    subprocess.run(["mount", "-o", "loop", image, mount], check=True)
    command = [
        "prometheus-node-exporter",
        f"--web.listen-address=127.0.0.1:{port}",
        "--collector.disable-defaults",
    ]
    targets.add("node", "db1:9100", port)
    targets.disk = mount
    try:
        node = subprocess.Popen([*command, "--collector.filesystem"], stderr=subprocess.DEVNULL)
        try:
            yield mount
        finally:
            node.terminate()
            node.wait(timeout=20)
    finally:
        subprocess.run(["umount", mount], check=True)


def record(plane: Plane, disk: Path) -> None:
    """One trouble after the other; each moment's name is what `monitoring.proofs` calls it."""
    targets, cluster = plane.targets, plane.cluster
    began = plane.database.connect("app_rw")  # the transaction that grows old
    wait(lambda: targets.value("prometheus", "prometheus_rule_evaluation_failures_total") > 0)
    wait(lambda: targets.value("alertmanager", "alertmanager_notifications_failed_total") > 0)
    wait(lambda: targets.value("node", "node_filesystem_size_bytes") > 0)
    targets.moment("calm")
    time.sleep(3)

    plane.send("ok", 60)
    wait(lambda: plane.told("celery_task_success_total", queue=BUSY) >= 60)
    targets.moment("busy")
    plane.send("ok", 200)
    wait(lambda: plane.told("celery_task_success_total", queue=BUSY) >= 260)
    targets.moment("busier")

    plane.send("slow", 2, args=[10.0])
    time.sleep(1)
    plane.send("ok", 40)
    wait(lambda: plane.told("celery_task_success_total", queue=BUSY) >= 302)
    targets.moment("started_late")

    plane.send("retried", 20)
    wait(lambda: plane.told("celery_task_failure_total", queue=BUSY) >= 20)
    targets.moment("retries")

    plane.send("fails", 60)
    wait(lambda: plane.exported("celery_dlq_arrivals_total", failure_class="permanent") >= 60)
    targets.moment("failures")

    plane.send("hard", 1, time_limit=1)
    plane.send("soft", 1, soft_time_limit=1)
    wait(lambda: plane.exported("celery_dlq_arrivals_total", failure_class="timeout") >= 2)
    targets.moment("time_limits")

    for _ in range(3):
        plane.send("killed")
        time.sleep(1)
    wait(lambda: plane.told("celery_task_worker_lost_total", queue=BUSY) >= 3)
    targets.moment("processes_lost")

    plane.sql("ALTER TABLE celery_task_failures RENAME TO away")
    plane.send("fails", 2)
    wait(lambda: plane.told("celery_worker_dlq_capture_errors_total") >= 1)
    wait(lambda: plane.exported("skeldir_exporter_collector_success", collector="dead_letters") == 0)
    targets.moment("no_dead_letters")
    plane.sql("ALTER TABLE away RENAME TO celery_task_failures")
    wait(lambda: plane.exported("skeldir_exporter_collector_success", collector="dead_letters") == 1)
    wait(lambda: plane.exported("celery_queue_messages", queue=BUSY) == 0)
    targets.moment("dead_letters_again")

    plane.stacks.pop(BUSY).close()  # stopped as by systemctl
    plane.send("ok", 10)
    subprocess.run(
        [sys.executable, "-c", f"import {MODULE}; from app.cli import main; main()", *REPLAY],
        env=environment(plane.database.dsn("app_rw")),
        cwd=ROOT,
        check=True,
        timeout=60,
    )
    wait(lambda: plane.exported("celery_queue_oldest_ready_age_seconds", queue=BUSY) > 32)
    targets.moment("stopped")
    plane.start_worker(BUSY)
    wait(lambda: plane.exported("celery_queue_messages", queue=BUSY) == 0)
    targets.moment("started_again")

    plane.send("freeze")
    time.sleep(65)
    targets.moment("loop_stands")
    time.sleep(8)
    wait(lambda: plane.told("celery_worker_ready", queue=BUSY) == 1)
    targets.moment("loop_moves")

    plane.send("slow", 2, args=[30.0])
    wait(lambda: plane.exported("celery_queue_messages", queue=BUSY, state="held") == 2)
    plane.kill(BUSY)
    for queue in IDLE:
        plane.kill(queue)
    wait(lambda: plane.exported("celery_broker_held_by_dead") >= 2)
    targets.moment("all_killed")
    plane.start_worker(BUSY)
    for queue in IDLE:
        plane.start_worker(queue)
    wait(lambda: plane.exported("celery_broker_held_by_dead") == 0)
    targets.moment("all_again")

    # The plane's own roles are limited, so it takes a guest.
    taken = plane.database.rows("SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend'")
    guests = [plane.database.connect("postgres") for _ in range(46 - int(str(taken[0][0])))]
    wait(lambda: plane.exported("celery_postgres_connections") >= 45)
    targets.moment("no_connections")
    for guest in guests:
        guest.close()
    wait(lambda: plane.exported("celery_postgres_connections", role="other") == 0)
    targets.moment("connections_again")

    began.autocommit = False
    began.set_session(isolation_level="REPEATABLE READ")
    began.cursor().execute("SELECT count(*) FROM kombu_queue")
    plane.sql(
        "ALTER TABLE kombu_message SET (autovacuum_enabled = off)",
        "INSERT INTO kombu_message (queue_id, payload, due_at) SELECT min(id), '{}', now() + interval '1 day'"
        " FROM kombu_queue, generate_series(1, 1100000) AS number GROUP BY number",
        "DELETE FROM kombu_message WHERE due_at > now() + interval '12 hours'",
        "DO $$ BEGIN FOR i IN 1..5100000 LOOP PERFORM pg_current_xact_id(); COMMIT; END LOOP; END $$",
    )
    wait(lambda: plane.exported("celery_postgres_oldest_xmin_age_transactions") > 5e6)
    wait(lambda: plane.exported("celery_table_dead_tuples", table="kombu_message") > 1e6)
    targets.moment("old_snapshot")
    began.rollback()
    plane.sql("ALTER TABLE kombu_message RESET (autovacuum_enabled)")
    wait(lambda: plane.exported("celery_table_dead_tuples", table="kombu_message") < 1e5)
    wait(lambda: plane.exported("celery_postgres_oldest_xmin_age_transactions") < 1e6)
    targets.moment("snapshot_gone")

    with suppress(OSError):  # as full as it gets
        (disk / "filler").write_bytes(b"x" * 2**25)
    targets.moment("disk_full")
    (disk / "filler").unlink()
    targets.moment("disk_free")

    plane.kill("exporter")
    targets.moment("exporter_killed")
    letters = "SELECT id FROM celery_task_failures"
    before = len(plane.database.rows(letters))
    plane.send("fails", 60)  # which no exporter counts
    wait(lambda: len(plane.database.rows(letters)) == before + 60)
    plane.start_exporter()
    targets.moment("exporter_again")

    plane.kill("beat")
    targets.moment("beat_killed")
    plane.start_beat()
    targets.moment("beat_again")
    plane.sql(
        "REVOKE UPDATE ON celery_schedule FROM app_user",
        "UPDATE celery_schedule SET last_due = last_due - interval '2 days'",
    )
    wait(lambda: plane.scheduled("skeldir_beat_errors_total") > 0)
    targets.moment("beat_refused")
    plane.sql("GRANT UPDATE ON celery_schedule TO app_user")
    wait(lambda: plane.scheduled("skeldir_beat_enqueued_total") > 0)
    targets.moment("beat_allowed")

    plane.certify(days=5)
    targets.moment("certificate_ending")
    plane.certify(days=365)
    targets.moment("certificate_renewed")

    cluster.stop()
    wait(lambda: plane.told("celery_worker_database_connected") == 0)
    wait(lambda: plane.exported("skeldir_exporter_database_up") == 0)
    targets.moment("postgres_stopped")
    cluster.start()
    wait(lambda: plane.told("celery_worker_ready") == len(SHEET.queues))
    wait(lambda: plane.exported("skeldir_exporter_database_up") == 1)
    wait(lambda: plane.scheduled("skeldir_beat_active") == 1)
    wait(lambda: plane.exported("celery_dlq_open") > 0)
    targets.moment("postgres_again")


def main() -> None:
    """Record, and put the result where it belongs."""
    cluster = Cluster(settings=SETTINGS)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="skeldir-record-")))
        made = folder / "troubles.txt"
        targets = Targets(made)
        provisioned = provisioned_cluster(cluster)
        stack.enter_context(contextmanager(lambda: provisioned)())
        plane = Plane(cluster, folder, targets)
        stack.callback(lambda: [each.close() for each in plane.stacks.values()])
        for queue in SHEET.queues:
            plane.start_worker(queue)
        plane.start_drained()
        plane.certify(days=365)
        plane.start_exporter()
        plane.start_beat()
        node_stack = stack.enter_context(ExitStack())
        disk = node_stack.enter_context(small_disk(folder, targets))
        stack.enter_context(troubled_monitoring(folder, targets))
        record(plane, disk)
        targets.ports["node", "db1:9100"] = 1  # nobody listens there
        targets.moment("node_away")
        recordings.FILE.parent.mkdir(parents=True, exist_ok=True)
        recordings.FILE.write_text(made.read_text())
    print(f"{recordings.FILE}: {recordings.FILE.stat().st_size // 1024} KB")


if __name__ == "__main__":
    main()
