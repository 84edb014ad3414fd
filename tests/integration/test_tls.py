"""Workers whose connections to Postgres are encrypted, and who know whom they talk to."""

import ssl
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg2
import pytest

from app.core.topology import load_topology
from app.exporter.collectors import Certificates
from tests.postgres import Cluster, Standby, self_signed
from tests.workers import publish, ready_worker, started_worker


@pytest.fixture
def encrypted(postgres: Cluster, tmp_path: Path) -> Iterator[tuple[Standby, Path]]:
    """A copy of the server that takes nothing but TLS, and the certificate that vouches for it."""
    server = Standby(primary=postgres, settings={"ssl": "on"})
    try:
        certificate, key = self_signed(tmp_path, "server")
        server.certify(certificate, key)
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


def ends(dsn: str) -> dict[str, float]:
    """Seconds until each certificate ends, as the exporter finds them."""
    session = psycopg2.connect(dsn)
    try:
        (family,) = Certificates(load_topology()).collect(session.cursor())
    finally:
        session.close()
    now = time.time()
    return {sample.labels["certificate"]: sample.value and sample.value - now for sample in family.samples}


def test_the_exporter_knows_when_certificates_end_also_once_they_have(
    encrypted: tuple[Standby, Path], tmp_path: Path
) -> None:
    server, certificate = encrypted
    day = 86400
    verified = f"{server.dsn('app_ro', 'skeldir')}?sslmode=verify-full&sslrootcert={certificate}"
    assert ends(verified) == pytest.approx({"server": 2 * day, "authority": 2 * day}, abs=60)
    # Both are trusted while one authority takes the other's place.
    other, _ = self_signed(tmp_path, "other", days=9)
    certificate.write_text(certificate.read_text() + other.read_text())
    assert ends(verified) == pytest.approx({"server": 2 * day, "authority": 9 * day}, abs=60)
    session = psycopg2.connect(verified)
    ended, key = self_signed(tmp_path, "ended", days=-1)
    server.certify(ended, key)
    server.execute("SELECT pg_reload_conf()")
    certificate.write_text(ended.read_text())
    # A session that stands goes on.
    collector = Certificates(load_topology())
    deadline = time.monotonic() + 10
    while True:
        try:
            (family,) = collector.collect(session.cursor())
            break
        except ssl.SSLError:  # it presents the one before
            assert time.monotonic() < deadline
            time.sleep(0.1)
    session.close()
    assert {sample.value - time.time() < 0 for sample in family.samples} == {True}


def test_who_verifies_nobody_is_told_no_end(encrypted: tuple[Standby, Path], postgres: Cluster) -> None:
    server, _ = encrypted
    for dsn in (f"{server.dsn('app_ro', 'skeldir')}?sslmode=require", postgres.dsn("app_ro", "skeldir")):
        assert ends(dsn) == {"server": 0, "authority": 0}
