"""Every form of a DSN that people have ends as the one that psycopg2 is given."""

import pytest
from kombu import Connection

from app.celery_app import celery_app
from app.core import dsn
from app.core.dsn import DsnError

PASSWORD = "p@:/;%+ ?#x"  # every character that means something in a URL
ENCODED = "p%40%3A%2F%3B%25%2B%20%3F%23x"


@pytest.mark.parametrize(
    ("given", "connects_with"),
    [
        ("postgresql://u:pw@h/d", {"host": "h", "dbname": "d", "user": "u", "password": "pw"}),
        ("postgres://u@h/d", {"host": "h", "dbname": "d", "user": "u"}),
        ("postgresql+asyncpg://h:6432/d", {"host": "h", "port": 6432, "dbname": "d"}),
        ("postgresql+psycopg://h/d", {"host": "h", "dbname": "d"}),
        ("postgresql+psycopg2://h/d", {"host": "h", "dbname": "d"}),
        ("sqla+postgresql+asyncpg://h/d", {"host": "h", "dbname": "d"}),
        ("db+postgresql://h/d", {"host": "h", "dbname": "d"}),
        (f"postgresql://u:{ENCODED}@h/d", {"host": "h", "dbname": "d", "user": "u", "password": PASSWORD}),
        ("postgresql://us%40er:@h/d", {"host": "h", "dbname": "d", "user": "us@er"}),
        ("postgresql://h/d?channel_binding=require", {"host": "h", "dbname": "d"}),
        (
            "postgresql://h/d?channel_binding=require&sslmode=verify-full",
            {"host": "h", "dbname": "d", "sslmode": "verify-full"},
        ),
        ("postgresql+asyncpg://h/d?ssl=true", {"host": "h", "dbname": "d", "sslmode": "require"}),
        ("postgresql+asyncpg://h/d?prepared_statement_cache_size=0", {"host": "h", "dbname": "d"}),
        (
            "postgresql://h/d?options=-c%20statement_timeout%3D5s",
            {"host": "h", "dbname": "d", "options": "-c statement_timeout=5s"},
        ),
        (
            "postgresql://h1:5432,h2:5433/d?target_session_attrs=any",
            {"host": "h1,h2", "port": "5432,5433", "dbname": "d", "target_session_attrs": "any"},
        ),
        (
            "postgresql://h1,h2/d",
            {"host": "h1,h2", "port": "5432,5432", "dbname": "d", "target_session_attrs": "read-write"},
        ),
        ("postgresql://[::1]:5433/d", {"host": "::1", "port": 5433, "dbname": "d"}),
        ("postgresql:///d?host=%2Frun%2Fpostgresql", {"host": "/run/postgresql", "dbname": "d"}),
        ("postgresql://h/d%20b", {"host": "h", "dbname": "d b"}),
    ],
)
def test_what_psycopg2_is_given(given: str, connects_with: dict[str, object]) -> None:
    url = dsn.sqlalchemy_url(given)
    dialect = url.get_dialect()()
    assert dialect.driver == "psycopg2"
    assert dialect.create_connect_args(url)[1] == connects_with

    # What SQLAlchemy makes of a bare `postgresql://`, as kombu and Celery hand it over, is the same.
    for form in (dsn.broker_url(given), dsn.result_backend_url(given)):
        bare = dsn.make_url(form.partition("+")[2])
        assert bare.get_dialect()().driver == "psycopg2"
        assert bare.get_dialect()().create_connect_args(bare)[1] == connects_with


def test_kombu_takes_the_brokers_form_whole() -> None:
    url = dsn.broker_url(f"postgresql://u:{ENCODED}@h/d?sslmode=require")
    with Connection(url) as connection:
        assert connection.hostname == f"postgresql://u:{ENCODED}@h/d?sslmode=require"
        assert not connection.alt
        assert ENCODED not in connection.as_uri()


@pytest.mark.parametrize(
    "unusable",
    [
        "mysql://u:geheim@h/d",
        "u:geheim@h/d",
        "postgresql:u:geheim@h/d",
        "postgresql://u:geheim@h:port/d",
        "postgresql://u:geheim@h:99999/d",
        "postgresql://u:gehe/im@h/d",
        "postgresql+asyncpg://u:geheim@h/d?ssl=geheim",
        "",
    ],
)
def test_an_unusable_dsn_is_refused_without_being_repeated(unusable: str) -> None:
    with pytest.raises(DsnError) as refused:
        dsn.plain_dsn(unusable)
    assert "geh" not in str(refused.value)
    assert refused.value.__context__ is None


def test_the_application_uses_the_aliases_of_the_design() -> None:
    assert celery_app.conf.broker_url.startswith("sqla+postgresql://")
    assert celery_app.conf.result_backend.startswith("db+postgresql://")
