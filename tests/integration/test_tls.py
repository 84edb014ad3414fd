"""Workers whose connections to Postgres are encrypted, and who know whom they talk to."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.postgres import Cluster, Standby, unprivileged
from tests.workers import publish, ready_worker, started_worker


def self_signed(directory: Path, name: str) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 and its key; who trusts the one trusts whoever has the other."""
    certificate, key = directory / f"{name}.crt", directory / f"{name}.key"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"),
            *("-noenc", "-keyout", key, "-out", certificate, "-days", "2", "-subj", f"/CN={name}"),
            *("-addext", "subjectAltName=IP:127.0.0.1"),
        ],
        capture_output=True,
        check=True,
    )
    return certificate, key


@pytest.fixture
def encrypted(postgres: Cluster, tmp_path: Path) -> Iterator[tuple[Standby, Path]]:
    """A copy of the server that takes nothing but TLS, and the certificate that vouches for it."""
    server = Standby(primary=postgres, settings={"ssl": "on"})
    try:
        certificate, key = self_signed(tmp_path, "server")
        for source in (certificate, key):
            target = server.data / source.name
            target.write_bytes(source.read_bytes())
            target.chmod(0o600)
            if who := unprivileged():
                os.chown(target, who["user"], who["group"])  # type: ignore[arg-type]
        server.start()
        server.promote()
        (server.data / "pg_hba.conf").write_text("hostssl all all 127.0.0.1/32 scram-sha-256\n")
        server.execute("SELECT pg_reload_conf()")
        yield server, certificate
    finally:
        server.destroy()


def test_jobs_run_over_tls_with_the_server_verified(encrypted: tuple[Standby, Path], tmp_path: Path) -> None:
    server, certificate = encrypted
    dsn = f"{server.dsn('app_user', 'skeldir')}?sslmode=verify-full&sslrootcert={certificate}"
    with ready_worker(dsn, "housekeeping", tmp_path):
        answer = publish(dsn, "answer = housekeeping.ping.delay().get(timeout=30)")
        assert answer["queue"] == "housekeeping"
        with server.connect(database="skeldir") as session, session.cursor() as cursor:
            cursor.execute(
                "SELECT count(*), bool_and(ssl) FROM pg_stat_ssl JOIN pg_stat_activity USING (pid)"
                " WHERE usename = 'app_user'"
            )
            connections, encrypted_all = cursor.fetchone()  # type: ignore[misc]
    assert connections >= 3  # the broker's two, and the health's or the results'
    assert encrypted_all


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        ("sslmode=verify-full&sslrootcert={other}", "certificate verify failed"),
        ("sslmode=disable", "no encryption"),
    ],
)
def test_who_is_not_the_right_server_and_who_speaks_plain_text_gets_no_worker_and_the_log_says_why(
    encrypted: tuple[Standby, Path], tmp_path: Path, option: str, reason: str
) -> None:
    server, _ = encrypted
    other, _ = self_signed(tmp_path, "other")
    dsn = f"{server.dsn('app_user', 'skeldir')}?{option.format(other=other)}"
    with started_worker(dsn, "housekeeping", tmp_path) as worker:
        worker.wait_for(lambda line: reason in line["message"])
        assert not any(line["message"].endswith(" ready.") for line in worker.lines())
