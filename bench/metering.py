"""What metering costs: a metered worker and one that isn't, side by side, each with a database of its own.

    python -m bench.metering [--rounds 11] [--jobs 10000]

Metered is what every worker of the plane is: counters and histograms, the pulse of the loop, the probe of the
database, the HTTP server, and the header that says when a message was published. The promise: at most 3 % of
the throughput. Both share one core, the server has the others: what the machine does meanwhile befalls both
alike, while drains one after the other differ by more than what is looked for.
"""

import os
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import replace
from statistics import median, quantiles
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from bench import measures, servers
from bench.measures import Contender, Run, cpu_seconds
from bench.records import RECORD
from tests.postgres import Cluster, Database

LIMIT = 0.03
POOLS = {"solo": ["--pool", "solo"], "prefork -c 2": ["--pool", "prefork", "-c", "2"]}

Drain = tuple[float, float]
"""Jobs a second, and seconds of CPU a job, of a worker with its children."""


def main(
    *,
    rounds: Annotated[int, typer.Option(min=3, help="Pairs of drains a pool.")] = 11,
    jobs: Annotated[int, typer.Option(min=500, help="Messages a worker.")] = 10000,
    limit: Annotated[float, typer.Option(help="Share of the throughput it may cost.")] = LIMIT,
) -> None:
    """Drain in pairs, print medians, fail when metering costs more than it may."""
    with servers.postgres() as cluster:
        cluster.execute("CREATE DATABASE twin TEMPLATE skeldir")
        plain, metered = (contender(Database(cluster, name)) for name in ("skeldir", "twin"))
        metered = replace(metered, metered=True)
        give_the_server_cores_of_its_own(cluster)
        costs = {
            pool: show(
                pool,
                [
                    side_by_side(plain, metered, options, jobs, number)
                    for number in track(range(rounds), pool)
                ],
            )
            for pool, options in POOLS.items()
        }
    if too_much := [pool for pool, cost in costs.items() if cost > limit]:
        raise SystemExit(f"more than {limit:.0%} of the throughput: {', '.join(too_much)}")


def contender(database: Database) -> Contender:
    """Ours, on that database."""
    url = database.dsn("app_user")
    return Contender("ours", f"sqla+{url}", f"db+{url}", database)


def give_the_server_cores_of_its_own(cluster: Cluster) -> None:
    """To its later sessions; this process, and all it starts, get the one that is left."""
    one, *others = sorted(os.sched_getaffinity(0))
    if others and cluster.process:
        os.sched_setaffinity(cluster.process.pid, others)
        os.sched_setaffinity(0, {one})


def side_by_side(
    plain: Contender, metered: Contender, options: list[str], jobs: int, number: int
) -> tuple[Drain, Drain]:
    """What each did while both were at it, without a warm-up; in odd rounds the metered one starts first."""
    with ExitStack() as stack:
        runs = [stack.enter_context(measures.run(each)) for each in (plain, metered)]
        for run in runs:
            run.client("publish_many", jobs, False)
        step = 1 if number % 2 else -1
        at_it = [(run, stack.enter_context(run.worker(*options)).pid) for run in runs[::step]][::step]
        begin, before = _when(at_it, all, jobs // 10)
        end, after = _when(at_it, any, jobs * 9 // 10)
    if any(done == was for (done, _), (was, _) in zip(after, before, strict=True)):
        raise SystemExit(f"{jobs} jobs are too few: one worker was done before the other had begun")
    without, with_it = (
        ((done - was_done) / (end - begin), (cpu - was_cpu) / (done - was_done))
        for (done, cpu), (was_done, was_cpu) in zip(after, before, strict=True)
    )
    return without, with_it


def _when(
    at_it: list[tuple[Run, int]], how_many: Callable[[Iterable[bool]], bool], jobs: int
) -> tuple[float, list[tuple[int, float]]]:
    """The moment when all or any have begun so many jobs: how many each has begun, and its seconds of CPU."""
    deadline = time.monotonic() + 60 + jobs / 10
    while not how_many(run.log.exists() and run.log.stat().st_size >= jobs * RECORD.size for run, _ in at_it):
        if time.monotonic() > deadline:
            raise SystemExit(f"the workers did not begin {jobs} jobs in time")
        time.sleep(0.02)
    seen = [(run.log.stat().st_size // RECORD.size, cpu_seconds(pid)) for run, pid in at_it]
    return time.monotonic(), seen


def show(pool: str, pairs: list[tuple[Drain, Drain]]) -> float:
    """A table of the medians; returns the share of throughput that metering costs."""
    costs = [1 - with_it[0] / without[0] for without, with_it in pairs]
    table = Table("side by side on one core", "without", "metered", "costs", "half of the rounds lie between")
    table.add_row(
        f"{pool}, jobs /s",
        f"{median(without[0] for without, _ in pairs):,.0f}",
        f"{median(with_it[0] for _, with_it in pairs):,.0f}",
        *_spread([f"{cost:.1%}" for cost in quantiles(costs, n=4, method="inclusive")]),
    )
    more = [(with_it[1] - without[1]) * 1e6 for without, with_it in pairs]
    table.add_row(
        f"{pool}, CPU a job",
        f"{median(without[1] for without, _ in pairs) * 1e6:.1f} us",
        f"{median(with_it[1] for _, with_it in pairs) * 1e6:.1f} us",
        *_spread([f"{each:+.1f} us" for each in quantiles(more, n=4, method="inclusive")]),
    )
    Console(width=110).print(table)
    return median(costs)


def _spread(quarters: list[str]) -> tuple[str, str]:
    low, middle, high = quarters
    return middle, f"{low} and {high}"


if __name__ == "__main__":
    typer.run(main)
