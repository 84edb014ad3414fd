"""The result backend behind `db+postgresql://`: Celery's two tables, one connection a process."""

from celery import Celery

from app.results import store as store  # knows from the worker's start on which process is its main one


def register(app: Celery) -> None:
    """Put this backend behind the `db` alias of one app; other apps of the process keep Celery's own."""
    app.loader.override_backends = {
        **app.loader.override_backends,
        "db": "app.results.backend:PostgresBackend",
    }
