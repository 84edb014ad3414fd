"""A pytest plugin for their suites: our transport and our result backend behind their usual names."""

from celery.loaders.base import BaseLoader

import app.broker
import app.results.store

app.broker.register()
BaseLoader.override_backends = {"db": "app.results.backend:PostgresBackend"}
