"""Tasks for the workers of test_results_workers.py; the results are Postgres's, the broker is a folder."""

import os
import time
from pathlib import Path
from uuid import uuid4

from celery import Celery
from kombu.transport import TRANSPORT_ALIASES, filesystem
from kombu.utils.json import dumps

from app import results

_FOLDER = os.environ["RESULTS_TEST_FOLDER"]


class Channel(filesystem.Channel):
    def _put(self, queue, payload, **_):
        """kombu's own can be read before it is written."""
        name = f"{time.monotonic_ns():020}-{uuid4()}.{queue}.msg"
        unfinished = Path(_FOLDER, "control", name)
        unfinished.write_text(dumps(payload))
        unfinished.rename(Path(_FOLDER, name))


class Transport(filesystem.Transport):
    Channel = Channel


TRANSPORT_ALIASES["folder"] = f"{__name__}:Transport"

app = Celery("results-test", broker="folder://", backend=f"db+{os.environ['RESULTS_TEST_DSN']}")
results.register(app)
app.conf.update(
    broker_transport_options={
        "data_folder_in": _FOLDER,
        "data_folder_out": _FOLDER,
        "control_folder": f"{_FOLDER}/control",
        "polling_interval": 0.02,
    },
    task_acks_late=True,
    task_track_started=True,
    worker_enable_remote_control=False,
    result_chord_retry_interval=0.2,
    database_engine_options={
        "connect_args": {"application_name": f"results-worker-{os.path.basename(_FOLDER)}"}
    },
)


@app.task
def add(a, b):
    return a + b


@app.task
def slow(value, seconds):
    time.sleep(seconds)
    return value


@app.task
def fail(message):
    raise KeyError(message)


@app.task
def total(values):
    return sum(values)


@app.task(ignore_result=True)
def silent():
    pass


@app.task(bind=True, max_retries=2, default_retry_delay=0)
def stubborn(self):
    if self.request.retries < 2:
        raise self.retry(countdown=0)
    return self.request.retries


@app.task(bind=True)
def progress(self):
    self.update_state(state="PROGRESS", meta={"half": True})
    time.sleep(0.5)
    return "whole"


@app.task
def publish_children(n):
    for i in range(n):
        add.delay(i, i)
    return n
