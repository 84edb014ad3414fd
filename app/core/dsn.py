"""PostgreSQL DSNs: one `DATABASE_URL` in, the forms that SQLAlchemy, the broker and the results need out.

No error of this module repeats a DSN, or any part of one.
"""

import re
from urllib.parse import parse_qsl, quote, unquote

from sqlalchemy.engine import URL, make_url

_DSN = re.compile(
    r"(?P<scheme>[a-z0-9]+(\+[a-z0-9]+)*)://"
    r"((?P<userinfo>[^/?#]*)@)?(?P<hosts>[^/?#@]*)(/(?P<database>[^?#]*))?(\?(?P<query>[^#]*))?"
)
_ROLES = ("sqla", "sqlalchemy", "db")  # what kombu and Celery put before a DSN
_DIALECTS = ("postgresql", "postgres")

# Options of async drivers that libpq refuses, and channel_binding, which libpq versions of pooled
# services disagree on.
_DROPPED = {"channel_binding", "prepared_statement_cache_size", "prepared_statement_name_func"}
_SSL_MODES = {"disable", "allow", "prefer", "require", "verify-ca", "verify-full"}


class DsnError(ValueError):
    """A DSN that can't be used; the message never holds any of it."""


def is_postgres(dsn: str) -> bool:
    """Whether a DSN, with or without kombu's or Celery's prefix, names PostgreSQL."""
    return any(word in _DIALECTS for word in dsn.partition("://")[0].split("+"))


def plain_dsn(dsn: str) -> str:
    """The DSN as `postgresql://…`: no driver, nothing that libpq refuses, everything percent-encoded again.

    Several hosts (`h1:5432,h2:5432`) become repeated `host` options, the form SQLAlchemy understands, and
    only one that accepts writes will do: after a failover that isn't the first one any more.

    Raises:
        DsnError: it isn't a PostgreSQL DSN.
    """
    match = _DSN.fullmatch(dsn.strip())
    if not match:
        raise DsnError("is not a DSN of the form postgresql://user:password@host:5432/database")
    words = match["scheme"].split("+")
    if words[0] in _ROLES:
        words = words[1:]
    if not words or words[0] not in _DIALECTS:
        raise DsnError("does not name PostgreSQL; it must start with postgresql://")
    options = _options(match["query"] or "")
    hosts = match["hosts"]
    if "," in hosts:
        options = [("host", host if ":" in host else f"{host}:5432") for host in hosts.split(",")] + options
        hosts = ""
    names = [value for key, value in options if key == "host"]
    if (len(names) > 1 or "," in "".join(names)) and "target_session_attrs" not in dict(options):
        options.append(("target_session_attrs", "read-write"))
    _check_port(hosts)
    query = "&".join(f"{quote(key, safe='')}={quote(value, safe='')}" for key, value in options)
    database = quote(unquote(match["database"] or ""), safe="")
    return f"postgresql://{_credentials(match['userinfo'])}{hosts}/{database}" + (
        f"?{query}" if query else ""
    )


def sqlalchemy_url(dsn: str) -> URL:
    """What `create_engine` takes: psycopg2 by name, because SQLAlchemy 2.1 means psycopg 3 by default."""
    return make_url(plain_dsn(dsn)).set(drivername="postgresql+psycopg2")


def broker_url(dsn: str) -> str:
    """The broker's form, `sqla+postgresql://…`."""
    return f"sqla+{plain_dsn(dsn)}"


def result_backend_url(dsn: str) -> str:
    """The result backend's form, `db+postgresql://…`."""
    return f"db+{plain_dsn(dsn)}"


def _options(query: str) -> list[tuple[str, str]]:
    kept = []
    for key, value in parse_qsl(query, keep_blank_values=True):
        if key in _DROPPED:
            continue
        if key == "ssl":  # asyncpg's word for sslmode
            mode = {"true": "require", "1": "require", "false": "disable", "0": "disable"}.get(value, value)
            if mode not in _SSL_MODES:
                raise DsnError(f"has an option ssl that is none of {', '.join(sorted(_SSL_MODES))}")
            kept.append(("sslmode", mode))
        else:
            kept.append((key, value))
    return kept


def _credentials(userinfo: str | None) -> str:
    if userinfo is None:
        return ""
    user, colon, password = userinfo.partition(":")
    # Encoded again in full: kombu cuts a URL at ';', and SQLAlchemy leaves that character as it is.
    return f"{quote(unquote(user), safe='')}{colon}{quote(unquote(password), safe='')}@"


def _check_port(host: str) -> None:
    port = host.rpartition("]")[2].partition(":")[2]
    if port and not (port.isdigit() and 0 < int(port) < 65536):
        raise DsnError("has a port that is not a number from 1 to 65535; encode special characters as %XX")
