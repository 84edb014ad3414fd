"""Run all measures against all contenders in turns, print the table, write the figures as JSON."""

import json
import os
import platform
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import UTC, datetime
from importlib.metadata import version
from math import isinf
from pathlib import Path
from statistics import median
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from bench import measures, servers
from bench.measures import Contender
from tests.postgres import Cluster, Database

NAMES = ["stock", "rabbitmq", "redis", "ours"]
POOLS = {
    "solo": ["--pool", "solo"],
    "prefork -c 2": ["--pool", "prefork", "-c", "2"],
    "prefork -c 8": ["--pool", "prefork", "-c", "8"],
}
Samples = dict[str, dict[str, list[float]]]


def contenders(cluster: Cluster, rabbitmq: str | None, redis: str | None) -> Iterator[Contender]:
    """All that can take part, ours last."""
    stock, own = Database(cluster, "stock"), Database(cluster, "skeldir")
    # SQLAlchemy 2.1 means psycopg 3 by default.
    stock_url = stock.dsn("postgres").replace("postgresql:", "postgresql+psycopg2:", 1)
    yield Contender("stock", f"sqla+{stock_url}", f"db+{stock_url}", stock, slow=True)
    if rabbitmq:
        yield Contender("rabbitmq", rabbitmq, f"db+{stock_url}")
    if redis:
        yield Contender("redis", redis, redis)
    own_url = own.dsn("app_user")
    yield Contender("ours", f"sqla+{own_url}", f"db+{own_url}", own)


def plan(short: bool, prefetch: int) -> Iterator[tuple[str, Callable[[Contender, int], dict[str, float]]]]:
    """The measures, each as what it is called and what takes it of a contender in a round."""

    def many(contender: Contender, results: bool = False) -> int:
        count = 1000 if short else 5000
        # Celery's own results are slow behind any broker.
        slow = contender.slow or (results and contender.name == "rabbitmq")
        return count // 10 if slow else count

    def publish(batch: bool) -> Callable[[Contender, int], dict[str, float]]:
        name = "publish, many at once" if batch else "publish, one by one"
        return lambda c, _: {f"{name} /s": measures.publish(c, many(c), batch)}

    def drain(pool: str, results: bool) -> Callable[[Contender, int], dict[str, float]]:
        name = f"drain, {pool}{', results' if results else ''} /s"
        return lambda c, _: {name: measures.drain(c, many(c, results), POOLS[pool], results, prefetch)}

    def pickup(contender: Contender, _: int) -> dict[str, float]:
        p50, p99 = measures.pickup(contender, 20 if short else 100)
        return {"idle pick-up p50, ms": p50 * 1000, "idle pick-up p99, ms": p99 * 1000}

    def consumers(processes: int) -> Callable[[Contender, int], dict[str, float]]:
        # Four times as many: they pass so quickly.
        return lambda c, _: {f"raw channels, {processes} /s": measures.consumers(c, 4 * many(c), processes)}

    def recovery(contender: Contender, number: int) -> dict[str, float]:
        return {"kill -9 to run again, s": measures.recovery(contender, number)}

    def idle(contender: Contender, _: int) -> dict[str, float]:
        if contender.database is None:
            return {}
        return {"idle transactions /s": measures.idle_transactions(contender, 3 if short else 10)}

    yield "publish", publish(False)
    yield "publish", publish(True)
    for pool in ["solo", "prefork -c 2"] if short else POOLS:
        for results in (False, True):
            yield "drain", drain(pool, results)
    yield "pickup", pickup
    for processes in (1, 4, 16) if short else (1, 2, 4, 8, 16):
        yield "consumers", consumers(processes)
    yield "recovery", recovery
    yield "idle", idle


def machine(cluster: Cluster) -> dict[str, str]:
    """What the figures depend on."""
    cpu = re.search(r"^model name\s*: (.*)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    [[server]] = Database(cluster, "postgres").rows("SHOW server_version")
    return {
        "hardware": f"{len(os.sched_getaffinity(0))} x {cpu[1] if cpu else '?'}, {memory:.0f} GiB,"
        f" a commit in {servers.milliseconds_to_disk(cluster):.2f} ms, Linux {platform.release()}",
        "software": f"Python {platform.python_version()}, Celery {version('celery')},"
        f" kombu {version('kombu')}, PostgreSQL {server}",
    }


def table(samples: Samples, names: list[str]) -> Table:
    """Medians, and how many times better ours is than each rival."""
    rivals = [name for name in names if name != "ours" and "ours" in names]
    result = Table("measure", *names, *(f"ours : {rival}" for rival in rivals))
    for measure, by_name in samples.items():
        medians = {name: median(values) for name, values in by_name.items()}
        lower_is_better = not measure.endswith("/s") or measure.startswith("idle")
        cells = [_figure(medians.get(name)) for name in names]
        for rival in rivals:
            pair = medians.get(rival), medians.get("ours")
            if None in pair or not all(pair):
                cells.append("")
            else:
                better, worse = reversed(pair) if lower_is_better else pair
                cells.append(f"{worse / better:.1f}x" if not isinf(worse / better) else "∞")
        result.add_row(measure, *cells)
    return result


def _figure(value: float | None) -> str:
    if value is None:
        return ""
    return "never" if isinf(value) else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def main(
    *,
    short: Annotated[
        bool, typer.Option(help="One round of fewer jobs: a look, no figures to quote.")
    ] = False,
    rounds: Annotated[
        int | None, typer.Option(help="How often each measure is taken; 3, or 1 when short.")
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option(help="A contender: stock, rabbitmq, redis or ours.")
    ] = None,
    measure: Annotated[
        list[str] | None,
        typer.Option(help="A measure: publish, drain, pickup, consumers, recovery or idle."),
    ] = None,
    prefetch: Annotated[int, typer.Option(help="Celery's prefetch multiplier when draining.")] = 4,
    json_file: Annotated[Path | None, typer.Option("--json", help="Where to write all figures.")] = None,
) -> None:
    """Measure stock kombu and Celery on Postgres, RabbitMQ, Redis and ours, in turns, on this machine."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the servers are ended, too
    console = Console(width=None if sys.stdout.isatty() else 160)
    absent = servers.missing()
    for name, command in absent.items():
        if not only or name in only:
            console.print(f"{name} is left out; to have it take part: {command}")
    wanted = [name for name in NAMES if name not in absent and (not only or name in only)]
    samples: Samples = {}
    with ExitStack() as stack:
        cluster = stack.enter_context(servers.postgres())
        rabbitmq = stack.enter_context(servers.rabbitmq()) if "rabbitmq" in wanted else None
        redis = stack.enter_context(servers.redis()) if "redis" in wanted else None
        taking_part = [c for c in contenders(cluster, rabbitmq, redis) if c.name in wanted]
        about = machine(cluster)
        console.print(*about.values(), sep="\n")
        for number in range(rounds or (1 if short else 3)):
            for kind, take in plan(short, prefetch):
                if measure and kind not in measure:
                    continue
                for contender in taking_part:
                    for name, value in take(contender, number).items():
                        samples.setdefault(name, {}).setdefault(contender.name, []).append(value)
                        console.print(
                            f"round {number + 1}  {contender.name:9} {name}: {_figure(value)}", style="dim"
                        )
                taking_part.append(taking_part.pop(0))  # nobody is always the first
    console.print(table(samples, wanted))
    if json_file:
        report = {
            "at": datetime.now(UTC).isoformat(),
            "short": short,
            "prefetch": prefetch,
            **about,
            "samples": samples,
        }
        json_file.write_text(json.dumps(report, indent=1).replace("Infinity", '"never"') + "\n")


if __name__ == "__main__":
    app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)
    app.command()(main)
    app()
