"""What metering costs: one worker drains the same messages with and without it, in turns.

    python -m bench.metering [--rounds 9] [--jobs 10000]

Metered is what every worker of the plane is: counters and histograms, the pulse of the loop, the probe of the
database, the HTTP server, and the header that says when a message was published. The promise: at most 3 % of
the throughput. The machine must be quiet; how much the rounds differ among themselves is printed beside.
The CPU time of a job, of the worker and its children, differs less than the rate does.
The server has a core of its own: where it and the worker take turns on one, a drain's rate is chance.
"""

import os
from dataclasses import replace
from statistics import median, quantiles
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from bench import measures, servers
from bench.measures import Contender
from tests.postgres import Cluster, Database

LIMIT = 0.03
POOLS = {"solo": ["--pool", "solo"], "prefork -c 2": ["--pool", "prefork", "-c", "2"]}


def main(
    *,
    rounds: Annotated[int, typer.Option(min=3, help="Pairs of drains a pool.")] = 9,
    jobs: Annotated[int, typer.Option(min=500, help="Messages a drain.")] = 10000,
    limit: Annotated[float, typer.Option(help="Share of the throughput it may cost.")] = LIMIT,
) -> None:
    """Drain in pairs, print medians, fail when metering costs more than it may."""
    with servers.postgres() as cluster:
        _give_a_core_of_its_own(cluster)
        url = (database := Database(cluster, "skeldir")).dsn("app_user")
        plain = Contender("ours", f"sqla+{url}", f"db+{url}", database)
        costs = {pool: measure(plain, options, rounds, jobs, pool) for pool, options in POOLS.items()}
    if too_much := [pool for pool, cost in costs.items() if cost > limit]:
        raise SystemExit(f"more than {limit:.0%} of the throughput: {', '.join(too_much)}")


def measure(plain: Contender, options: list[str], rounds: int, jobs: int, pool: str) -> float:
    """The share of throughput that metering costs one pool: the median of all pairs."""
    metered = replace(plain, metered=True)
    pairs: list[tuple[tuple[float, float], tuple[float, float]]] = []
    for number in range(rounds):
        # Who comes second finds warmer caches and a fuller table.
        order = (plain, metered) if number % 2 else (metered, plain)
        seen = {contender.metered: measures.drain_and_cpu(contender, jobs, options) for contender in order}
        pairs.append((seen[False], seen[True]))
    costs = [1 - with_it[0] / without[0] for without, with_it in pairs]
    table = Table("drain", "without", "metered", "costs", "half of the pairs lie between")
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


def _give_a_core_of_its_own(cluster: Cluster) -> None:
    """To the server's later sessions; this process, and all it starts, get the other cores."""
    own, *others = sorted(os.sched_getaffinity(0))
    if others and cluster.process:
        os.sched_setaffinity(cluster.process.pid, {own})
        os.sched_setaffinity(0, others)


def _spread(quarters: list[str]) -> tuple[str, str]:
    low, middle, high = quarters
    return middle, f"{low} and {high}"


if __name__ == "__main__":
    typer.run(main)
