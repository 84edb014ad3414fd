"""Several worker hosts under a steady load: drained, rolled forward and back, one killed; no job is lost.

The playbooks of docs/operating.md.
"""

import json
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from time import sleep

import pytest
from testinfra.host import Host

from tests.checkout import copy_tree
from tests.lab import (
    ROOT,
    SHEET,
    Ledger,
    container,
    invocations,
    lab_host,
    playbook,
    python,
    site,
    sql,
    unit,
    wait_until,
)

RATE = 200
RETENTION = "app.tasks.maintenance.enforce_data_retention"
TENANT = "6f1f3c2e-58a5-4a36-9a5a-0a4b6e7c0001"
LOCKS = """DO 'BEGIN
  FOR i IN 1..1000 LOOP LOCK TABLE events; PERFORM pg_sleep(1); COMMIT; PERFORM pg_sleep(1); END LOOP;
END'"""
LONGEST_GAP = 5.0
CONTRACT = '''"""What only the release before used is taken away."""

from alembic import op

revision = "contract_0001"
down_revision = None
branch_labels = ("contract",)
depends_on = "monitoring_0001"


def upgrade() -> None:
    op.execute("DROP TABLE IF EXISTS only_the_old_release_used_it")


def downgrade() -> None:
    pass
'''

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="session")
def worker2() -> Host:
    return lab_host("worker2")


def current(host: Host) -> str:
    return Path(host.check_output("readlink /opt/skeldir/current")).name


def ready(host: Host, queue: str) -> tuple[int, str]:
    """Status and body of `/health/ready`, asked where the example inventory lets it be asked."""
    address = host.check_output("hostname --ip-address").split()[0]
    answer = host.run(
        f"curl -s -m 5 -w '\\n%{{http_code}}' http://{address}:{SHEET.queues[queue].metrics_port}/health/ready"
    )
    body, _, status = answer.stdout.rpartition("\n")
    return int(status or 0), body.strip()


def killed(host: Host, since: str) -> str:
    """What systemd says of units that didn't end in their time, or not well."""
    found = host.run(
        f"journalctl --no-pager --output=cat --since='{since}' --unit='skeldir-worker@*' | grep -E"
        ' "timed out|Killing process|Failed with result|WorkerLostError"'
    )
    return found.stdout


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Callable[[str], None]:
    def said(text: str) -> None:
        with capsys.disabled():
            print(f"\n{text}")

    return said


@contextmanager
def locks(database: Host) -> Iterator[None]:
    """Let some jobs take a second, so that they are in the middle of it when units are stopped."""
    run = (
        "systemd-run --collect --unit=locks --uid=postgres --setenv=PGAPPNAME=locks psql skeldir --command=%s"
    )
    database.check_output(run, LOCKS)
    try:
        yield
    finally:  # the server would go on without its client
        end = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'locks'"
        sql(database, end)


def dead_letter(worker: Host, database: Host) -> str:
    """The group of a dead letter that the release of these days leaves, and whose cause is repaired."""
    sql(database, "REVOKE DELETE ON events FROM app_user")
    try:
        python(
            worker,
            "from app.celery_app import celery_app as app;"
            f"app.send_task('{RETENTION}', ['{TENANT}']); print(0)",
        )
        pending = "SELECT count(*) FROM celery_task_failures WHERE state = 'pending'"
        wait_until(lambda: sql(database, pending) == "1", 30)
    finally:
        sql(database, "GRANT DELETE ON events TO app_user")
    [group] = json.loads(worker.check_output("skeldir dlq groups --json"))
    return str(group["fingerprint"])


def replay(worker: Host, group: str) -> None:
    said = worker.check_output("skeldir dlq replay --group %s --reason repaired --wait", group)
    assert "1 succeeded" in said


def nothing_lost(ledger: Ledger) -> None:
    assert ledger.published > RATE
    assert (ledger.done, ledger.failed) == (ledger.published, 0), ledger


def kept(ledger: Ledger) -> None:
    nothing_lost(ledger)
    assert ledger.longest_gap
    assert max(ledger.longest_gap.values()) <= LONGEST_GAP, ledger


@pytest.fixture(scope="session")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project before its application's last change; in a clone without a history, as it is now."""
    tree = tmp_path_factory.mktemp("old")
    archive = tree.with_suffix(".tar")
    last = ["git", "log", "-1", "--format=%H^", "--", "app", "alembic", "requirements/app.txt"]
    commit = subprocess.run(last, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    export = ["git", "archive", f"--output={archive}", commit]
    if subprocess.run(export, cwd=ROOT, capture_output=True, check=False).returncode != 0:
        return copy_tree(tree)
    with tarfile.open(archive) as tar:
        tar.extractall(tree, filter="data")
    return tree


@pytest.fixture(scope="session")
def new(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """This checkout with other code for every queue, and a migration that the old one doesn't survive."""
    tree = copy_tree(tmp_path_factory.mktemp("new"))
    with (tree / "app/__init__.py").open("a") as module:
        module.write("# a later release\n")
    (tree / "alembic/versions/contract_0001_nothing_old.py").write_text(CONTRACT)
    return tree


def test_four_bare_hosts_become_a_plane(
    old: Path, worker: Host, worker2: Host, say: Callable[[str], None]
) -> None:
    run = site(tree=old)
    assert run.status == 0, run.output[-4000:]
    assert {ready(host, queue)[0] for host in (worker, worker2) for queue in SHEET.queues} == {200}
    say(f"the release of before, {current(worker)}, was deployed in {run.seconds:.0f} s")


def test_a_release_rolls_forward_and_back(
    worker: Host,
    worker2: Host,
    database: Host,
    load: Callable[[int], AbstractContextManager[Ledger]],
    new: Path,
    say: Callable[[str], None],
) -> None:
    """From the release of before to this one and back; each does what the other left."""
    hosts = (worker, worker2)
    old = current(worker)
    since = worker2.check_output("date '+%Y-%m-%d %H:%M:%S'")
    with load(RATE) as ledger, locks(database):
        group = dead_letter(worker, database)
        forward = playbook("playbooks/deploy.yml", tree=new)
        assert forward.status == 0, forward.output[-4000:]
        later = current(worker)
        assert later != old
        assert current(worker2) == later
        assert "contract_0001" not in sql(database, "SELECT * FROM alembic_version")
        replay(worker, group)
    kept(ledger)
    say(f"forward in {forward.seconds:.0f} s, {ledger}")
    with load(RATE) as ledger, locks(database):
        group = dead_letter(worker, database)
        back = playbook("playbooks/rollback.yml")
        assert back.status == 0, back.output[-4000:]
        assert {current(host) for host in hosts} == {old}
        replay(worker, group)
    kept(ledger)
    say(f"back in {back.seconds:.0f} s, {ledger}")
    assert [killed(host, since) for host in hosts] == ["", ""]


def test_there_is_no_way_back_from_a_contract_migration(
    worker: Host, worker2: Host, database: Host, new: Path
) -> None:
    """Once what the old release uses is taken away, there is no way back to it, and that is said first."""
    old = current(worker)
    [later] = set(worker.check_output("ls /opt/skeldir/releases").split()) - {old}
    by_name = (f"--extra-vars=release={later}", "--extra-vars=contract=true")
    narrowed = playbook("playbooks/deploy.yml", *by_name, tree=new)
    assert narrowed.status == 0, narrowed.output[-4000:]
    assert "contract_0001" in sql(database, "SELECT * FROM alembic_version")
    started = invocations(worker)
    refused = playbook("playbooks/rollback.yml")
    assert refused.status != 0
    assert any("contract_0001" in sentence and old in sentence for sentence in refused.sentences), (
        refused.output[-3000:]
    )
    assert {current(host) for host in (worker, worker2)} == {later}
    assert invocations(worker) == started


def test_a_second_run_changes_nothing(new: Path, say: Callable[[str], None]) -> None:
    run = site(tree=new)
    assert (run.status, run.changed) == (0, 0), run.recap
    say(f"the second site.yml of four hosts took {run.seconds:.0f} s")


def test_a_drained_host_takes_nothing_and_says_so(
    worker: Host,
    worker2: Host,
    load: Callable[[int], AbstractContextManager[Ledger]],
    say: Callable[[str], None],
) -> None:
    since = worker2.check_output("date '+%Y-%m-%d %H:%M:%S'")
    with load(RATE) as ledger:
        run = playbook("playbooks/drain.yml", "--limit=worker2.example.net", "--extra-vars=reason=kernel")
        assert run.status == 0, run.output[-3000:]
        for queue in SHEET.queues:
            assert ready(worker2, queue) == (503, "not ready: drained: kernel")
            assert ready(worker, queue)[0] == 200
            worker2.check_output(f"systemctl restart {unit(queue)}")  # it stays drained
            assert ready(worker2, queue)[0] == 503
        last = playbook("playbooks/drain.yml", "--limit=worker1.example.net")
        assert last.status != 0
        assert any("nobody else takes" in sentence for sentence in last.sentences), last.output[-3000:]
        back = playbook("playbooks/undrain.yml", "--limit=worker2.example.net")
        assert back.status == 0, back.output[-3000:]
        assert {ready(worker2, queue)[0] for queue in SHEET.queues} == {200}
        two = "--extra-vars=queue='llm, maintenance'"
        worker.check_output(f"systemctl stop {unit('llm')}")  # it takes nothing, whatever the inventory says
        last = playbook("playbooks/drain.yml", "--limit=worker2.example.net", two)
        assert any("nobody else takes jobs of llm," in sentence for sentence in last.sentences), last.output[
            -3000:
        ]
        worker.check_output(f"systemctl start {unit('llm')}")
        some = playbook("playbooks/drain.yml", "--limit=worker2.example.net", two)
        assert some.status == 0, some.output[-3000:]
        assert {queue for queue in SHEET.queues if ready(worker2, queue)[0] != 200} == {"llm", "maintenance"}
        idle = next(queue for queue in SHEET.queues if queue not in {"llm", "maintenance"})
        worker2.check_output(f"systemctl stop {unit(idle)}")
        assert playbook("playbooks/undrain.yml", "--limit=worker2.example.net", two).status == 0
        assert {queue for queue in SHEET.queues if ready(worker2, queue)[0] != 200} == {idle}  # not asked for
        assert playbook("playbooks/undrain.yml", "--limit=worker2.example.net").status == 0
        assert ready(worker2, idle)[0] == 200
    nothing_lost(ledger)
    assert killed(worker2, since) == ""
    say(f"drained in {run.seconds:.0f} s, back in {back.seconds:.0f} s, {ledger}")


def test_a_release_that_does_no_job_stops_at_the_first_host(
    worker: Host, worker2: Host, new: Path, say: Callable[[str], None]
) -> None:
    sound = current(worker2)
    task = new / "app/celery_app.py"
    task.write_text(
        task.read_text()
        + "\n\n@signals.worker_ready.connect\ndef _broken(**_: Any) -> None:\n    raise SystemExit(1)\n"
    )
    run = playbook("playbooks/deploy.yml", tree=new)
    assert run.status != 0
    assert len(run.sentences) >= 1
    assert all(word in run.sentences[-1] for word in ("worker1", "worker2", "rollback.yml")), run.sentences
    assert (current(worker2), current(worker) != sound) == (sound, True)
    assert {ready(worker2, queue)[0] for queue in SHEET.queues} == {200}
    back = playbook("playbooks/rollback.yml")
    assert back.status == 0, back.output[-4000:]
    assert {ready(worker, queue)[0] for queue in SHEET.queues} == {200}
    say(f"stopped after {run.seconds:.0f} s: {run.sentences[-1]}")


def test_the_way_back_leads_past_a_release_whose_roll_failed(
    worker: Host, worker2: Host, new: Path, say: Callable[[str], None]
) -> None:
    """Also when another one was deployed on top of it, as what mends the trouble."""
    sound = current(worker2)
    [mark] = worker.check_output("ls /opt/skeldir/releases/*/.unproved").split()
    worker.check_output(
        f"ln -sfn {Path(mark).parent.relative_to('/opt/skeldir')} /opt/skeldir/current"
    )  # as it was
    task = new / "app/celery_app.py"
    task.write_text((ROOT / "app/celery_app.py").read_text() + "# mended\n")
    mended = playbook("playbooks/deploy.yml", tree=new)
    assert mended.status == 0, mended.output[-4000:]
    assert sound != current(worker) == current(worker2)
    back = playbook("playbooks/rollback.yml")
    assert back.status == 0, back.output[-4000:]
    assert [current(host) for host in (worker, worker2)] == [sound, sound]
    say(f"mended in {mended.seconds:.0f} s, back in {back.seconds:.0f} s")


def test_a_killed_host_leaves_every_queue_served(
    worker: Host,
    worker2: Host,
    load: Callable[[int], AbstractContextManager[Ledger]],
    say: Callable[[str], None],
) -> None:
    name = container("worker2")
    with load(RATE) as ledger:
        sleep(3)
        subprocess.run(["docker", "kill", name], check=True, capture_output=True)
        answers = json.loads(worker.check_output("skeldir ping --json"))
        assert {answer["queue"]: answer["result"] for answer in answers} == dict.fromkeys(SHEET.queues, "ok")
        sleep(20)
    nothing_lost(ledger)
    subprocess.run(["docker", "start", name], check=True, capture_output=True)
    wait_until(lambda: {ready(worker2, queue)[0] for queue in SHEET.queues} == {200}, 60)
    say(f"a host was killed: {ledger}")
