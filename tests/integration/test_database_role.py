"""The Ansible role `database`, run against a real server over the network."""

import json

import pytest

from tests.postgres import PASSWORDS, Cluster, Database, run_database_role


def databases(cluster: Cluster) -> list[tuple[object, ...]]:
    return Database(cluster, "postgres").rows("SELECT datname, datacl::text FROM pg_database ORDER BY 1")


@pytest.mark.parametrize("arguments", [(), ("--check", "--diff")], ids=["run", "check"])
def test_a_second_run_changes_nothing_and_shows_no_password(
    postgres: Cluster, arguments: tuple[str, ...]
) -> None:
    done = run_database_role(postgres, "skeldir", "-v", *arguments)
    assert done.returncode == 0, done.stdout
    assert " changed=0 " in done.stdout
    assert not [role for role, password in PASSWORDS.items() if password in done.stdout + done.stderr]


@pytest.mark.parametrize(
    "damage",
    [
        "PASSWORD 'another one, and long enough'",
        "PASSWORD NULL",
        "CREATEDB",
        "BYPASSRLS",
        "NOLOGIN",
        "CONNECTION LIMIT 99",
        "SET statement_timeout = '1h'",
        "RESET lock_timeout",
    ],
)
def test_what_a_role_became_is_put_right(postgres: Cluster, damage: str) -> None:
    shown = (
        "SELECT rolcanlogin, rolcreatedb, rolbypassrls, rolconnlimit, array_agg(setting ORDER BY setting)"
        " FROM pg_roles, unnest(rolconfig) AS setting WHERE rolname = 'app_ro' GROUP BY 1, 2, 3, 4"
    )
    maintenance = Database(postgres, "postgres")
    before = maintenance.rows(shown)
    postgres.execute(f"ALTER ROLE app_ro {damage}")
    done = run_database_role(postgres, "skeldir")
    assert done.returncode == 0, done.stdout
    assert " changed=1 " in done.stdout
    assert maintenance.rows(shown) == before
    assert Database(postgres, "skeldir").rows("SELECT current_user", user="app_ro")


def test_a_dry_run_makes_nothing(postgres: Cluster) -> None:
    before = databases(postgres)
    done = run_database_role(postgres, "elsewhere", "--check", "--diff")
    assert done.returncode == 0, done.stdout
    assert databases(postgres) == before


@pytest.mark.parametrize("password", ["", "CHANGE-ME-please-soon", "short"])
def test_a_password_that_is_none_is_refused_before_anything_is_made(postgres: Cluster, password: str) -> None:
    before = databases(postgres)
    passwords = json.dumps({"database_passwords": PASSWORDS | {"app_rw": password}})
    done = run_database_role(postgres, "elsewhere", "--extra-vars", passwords)
    assert done.returncode != 0
    assert "database_passwords.app_rw" in done.stdout + done.stderr
    assert databases(postgres) == before


def test_an_administrator_without_superuser_can_run_it(postgres: Cluster) -> None:
    postgres.execute(f"CREATE ROLE administrator LOGIN CREATEDB CREATEROLE PASSWORD '{postgres.password}'")
    # The roles exist already. Who made them may grant them; before PostgreSQL 16, CREATEROLE was enough.
    postgres.execute("GRANT app_owner, app_user, app_rw, app_ro TO administrator WITH ADMIN OPTION")
    login = ("--extra-vars", "database_login_user=administrator")
    try:
        first = run_database_role(postgres, "managed", *login)
        assert first.returncode == 0, first.stdout
        second = run_database_role(postgres, "managed", *login)
        assert " changed=0 " in second.stdout
        assert Database(postgres, "managed").rows("SELECT current_user", user="app_user")
    finally:
        postgres.drop_database("managed")
        postgres.execute("DROP OWNED BY administrator; DROP ROLE administrator")
