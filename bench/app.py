"""The Celery application that every contender runs; the environment says which one this process is."""

import os
import time

from celery import Celery

from bench.records import RECORD

ours = os.environ["BENCH_CONTENDER"] == "ours"
celery_app = Celery("bench", broker=os.environ["BENCH_BROKER"], backend=os.environ["BENCH_RESULTS"])
if ours:
    from app import broker, results

    broker.register()
    results.register(celery_app)
celery_app.conf.update(
    task_default_queue="bench",
    task_acks_late=True,
    worker_prefetch_multiplier=int(os.environ["BENCH_PREFETCH"]),
    broker_connection_retry_on_startup=True,
)
if os.environ.get("BENCH_METERED"):
    from app.core.topology import Topology
    from app.observability import worker_monitoring

    entry = {
        **{"exchange": "bench", "routing_key": "bench", "tasks": ["bench.app.noop", "bench.app.hold"]},
        **{"metrics_port": 9999, "concurrency": 2, "prefetch": 4, "delivery_limit": 3},
        **{"soft_time_limit": 100, "time_limit": 110},
        "retry": {"max_retries": 1, "backoff": 1, "backoff_max": 1},
    }
    sheet = Topology.model_validate({"queues": {"bench": entry}})
    worker_monitoring.install(celery_app, lambda: sheet)
if os.environ["BENCH_CONTENDER"] == "rabbitmq":
    # As safe as the others: a publisher knows that its message is stored.
    celery_app.conf.broker_transport_options = {"confirm_publish": True}

_log = os.open(os.environ["BENCH_LOG"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)


def record(number: int) -> None:
    """Note in the log that a job has started; one small write, alike for every contender."""
    os.write(_log, RECORD.pack(time.monotonic(), number))


@celery_app.task
def noop(number: int) -> int:
    """Do nothing but say so."""
    record(number)
    return number


@celery_app.task(ignore_result=True)
def hold(number: int, seconds: float) -> None:
    """Be busy."""
    record(number)
    time.sleep(seconds)
