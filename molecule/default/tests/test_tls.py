"""Between workers and database: encrypted, the server verified, its certificate renewed under their eyes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from testinfra.host import Host

from tests.lab import INVENTORY, SCENARIO, invocations, python, site, sql

PING = "app.tasks.housekeeping.ping"
_PING = f"""
import json
from app.celery_app import celery_app as app
print(json.dumps([app.send_task("{PING}").get(timeout=30)["queue"] for _ in range(20)]))
"""
_DSN = "/etc/skeldir/operator/database_url"
_CONNECT = """
import json, psycopg2
from pathlib import Path
dsn = Path("{dsn}").read_text().strip().partition("?")[0]
try:
    psycopg2.connect(dsn + "?{options}", connect_timeout=5).close()
    print(json.dumps("connected"))
except psycopg2.OperationalError as error:
    print(json.dumps(str(error)))
"""
_SERIAL = "openssl x509 -noout -serial -in /etc/skeldir/tls/server.crt"


def connect(worker: Host, options: str) -> str:
    return str(python(worker, _CONNECT.format(dsn=_DSN, options=options)))


def test_every_connection_from_a_worker_host_is_encrypted_and_its_server_verified(
    worker: Host, database: Host
) -> None:
    python(worker, _PING)
    sessions = (
        "SELECT count(*), bool_and(ssl) FROM pg_stat_ssl JOIN pg_stat_activity USING (pid)"
        " WHERE usename LIKE 'app\\_%'"
    )
    count, encrypted = sql(database, sessions).split("|")
    assert int(count) > 5
    assert encrypted == "t"
    for credential in worker.check_output("find /etc/skeldir -name 'database_url'").split():
        assert "sslmode=verify-full" in worker.file(credential).content_string


def test_plain_text_and_a_server_that_somebody_else_vouches_for_are_refused(worker: Host) -> None:
    assert connect(worker, "sslmode=verify-full&sslrootcert=/etc/skeldir/ca.crt") == "connected"
    assert "no encryption" in connect(worker, "sslmode=disable")
    worker.check_output(
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -noenc -days 1 -subj /CN=other"
        " -keyout /tmp/other.key -out /tmp/other.crt"
    )
    assert "certificate verify failed" in connect(worker, "sslmode=verify-full&sslrootcert=/tmp/other.crt")
    worker.check_output("rm /tmp/other.key /tmp/other.crt")


def test_the_servers_key_is_for_its_eyes(worker: Host, database: Host) -> None:
    key = database.file("/etc/skeldir/tls/server.key")
    assert (key.user, key.group, oct(key.mode)) == ("root", "postgres", "0o640")
    assert not worker.file("/etc/skeldir/tls").exists


@pytest.mark.timeout(300)
def test_a_renewed_certificate_is_used_without_a_restart(worker: Host, database: Host) -> None:
    serial, units = database.check_output(_SERIAL), invocations(worker)
    started = sql(database, "SELECT pg_postmaster_start_time()")
    run = site("--tags=postgres", "--extra-vars=tls_renew_days=9999")
    assert run.status == 0, run.output
    assert database.check_output(_SERIAL) != serial
    presented = worker.check_output(
        "openssl s_client -starttls postgres -CAfile /etc/skeldir/ca.crt -verify_return_error"
        f" -connect {database.check_output('hostname -i').split()[0]}:5432 </dev/null 2>&1"
        " | openssl x509 -noout -serial"
    )
    assert presented == database.check_output(_SERIAL)
    assert python(worker, _PING) == ["housekeeping"] * 20
    assert invocations(worker) == units
    assert sql(database, "SELECT pg_postmaster_start_time()") == started
    again = site("--tags=postgres")
    assert (again.status, again.changed) == (0, 0), again.output


@pytest.mark.parametrize("tag", ["postgres", "tls"])
def test_another_controller_makes_no_second_authority(worker: Host, database: Host, tag: str) -> None:
    kept = INVENTORY / ".authority" / SCENARIO
    away = kept.rename(kept.with_name(f"{SCENARIO}-away"))
    trusted, serial = worker.file("/etc/skeldir/ca.crt").content_string, database.check_output(_SERIAL)
    try:
        run = site(f"--tags={tag}")
        assert not kept.exists()
    finally:
        away.rename(kept)
    assert (run.status != 0, run.changed) == (True, 0), run.output[-3000:]
    assert all("trusts an authority" in sentence for sentence in run.sentences), run.output[-3000:]
    assert worker.file("/etc/skeldir/ca.crt").content_string == trusted
    assert database.check_output(_SERIAL) == serial


def test_no_secret_is_taken_for_a_host() -> None:
    """Ansible reads all it sees in an inventory's folder, and a password makes a fine host name."""
    assert (INVENTORY / ".authority" / SCENARIO / "ca.key").exists()
    shown = subprocess.run(
        [Path(sys.executable).with_name("ansible-inventory"), f"--inventory={INVENTORY}", "--list"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "Unable to parse" not in shown.stderr
    assert set(json.loads(shown.stdout)["_meta"]["hostvars"]) == {"db1", "worker1"}
