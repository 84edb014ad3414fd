"""What publishes, or consumes without Celery, in a process of its own: `python -m bench.client COMMAND N`."""

import json
import os
import random
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

from kombu import Consumer, Exchange, Queue

from app.broker import batch
from bench.app import celery_app, hold, noop, ours, record


def publish(count: int, with_results: bool = False) -> object:
    """Publish one by one; returns messages a second."""
    noop.apply_async((-1,), ignore_result=True)  # declares the queue
    start = time.monotonic()
    for number in range(count):
        noop.apply_async((number,), ignore_result=not with_results)
    return count / (time.monotonic() - start)


def publish_many(count: int, with_results: bool = False) -> object:
    """Publish many at once, by the best means each has; returns messages a second."""
    noop.apply_async((-1,), ignore_result=True)
    start = time.monotonic()
    with celery_app.producer_or_acquire() as producer, batch() if ours else nullcontext():
        for number in range(count):
            noop.apply_async((number,), ignore_result=not with_results, producer=producer)
    return count / (time.monotonic() - start)


def trickle(first: int, count: int) -> object:
    """Publish to an idle worker, at odd moments; returns when."""
    noop.apply_async((-1,), ignore_result=True)
    moments = []
    for number in range(first, first + count):
        time.sleep(random.uniform(0.1, 0.4))  # noqa: S311 - no secret
        moments.append(time.monotonic())
        noop.apply_async((number,), ignore_result=True)
    return moments


def holding(first: int, count: int, queue: str) -> object:
    """Publish jobs that keep a worker busy for half a minute."""
    for number in range(first, first + count):
        hold.apply_async((number, 30), queue=queue)
    return None


def consume(prefetch: int, start: str) -> object:
    """Take and acknowledge on a raw channel, until somebody ends this process.

    It connects, says so by a file beside `start`, and begins when there is a file `start`: what is measured
    is taking, not the start of Python.
    """

    def take(message: object) -> None:
        message.ack()
        record(0)

    with celery_app.connection_for_read() as connection:
        connection.default_channel  # noqa: B018 - connects
        Path(f"{start}.{os.getpid()}").touch()
        while not Path(start).exists():
            time.sleep(0.005)
        queue = Queue("bench", Exchange("bench"), routing_key="bench")
        with Consumer(connection, [queue], on_message=take, prefetch_count=prefetch):
            while True:
                try:
                    connection.drain_events(timeout=1)
                except TimeoutError:
                    continue


if __name__ == "__main__":
    commands: dict[str, Callable[..., object]] = {
        command.__name__: command for command in (publish, publish_many, trickle, holding, consume)
    }
    arguments = [json.loads(word) for word in sys.argv[2:]]
    print(json.dumps(commands[sys.argv[1]](*arguments)))
