"""What metering costs: one worker drains the same messages with and without it, in turns.

    python -m bench.metering [--rounds 9] [--jobs 5000]

Metered is what every worker of the plane is: counters and histograms, the pulse of the loop, the probe of the
database, the HTTP server, and the header that says when a message was published. The promise: at most 3 % of
the throughput. The machine must be quiet; how much the rounds differ among themselves is printed beside.
"""

from dataclasses import replace
from statistics import median, quantiles
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from bench import measures, servers
from bench.measures import Contender
from tests.postgres import Database

LIMIT = 0.03
POOLS = {"solo": ["--pool", "solo"], "prefork -c 2": ["--pool", "prefork", "-c", "2"]}


def main(
    *,
    rounds: Annotated[int, typer.Option(min=3, help="Pairs of drains a pool.")] = 9,
    jobs: Annotated[int, typer.Option(min=500, help="Messages a drain.")] = 5000,
    limit: Annotated[float, typer.Option(help="Share of the throughput it may cost.")] = LIMIT,
) -> None:
    """Drain in pairs, print medians, fail when metering costs more than it may."""
    with servers.postgres() as cluster:
        url = (database := Database(cluster, "skeldir")).dsn("app_user")
        plain = Contender("ours", f"sqla+{url}", f"db+{url}", database)
        costs = {pool: measure(plain, options, rounds, jobs, pool) for pool, options in POOLS.items()}
    if too_much := [pool for pool, cost in costs.items() if cost > limit]:
        raise SystemExit(f"more than {limit:.0%} of the throughput: {', '.join(too_much)}")


def measure(plain: Contender, options: list[str], rounds: int, jobs: int, pool: str) -> float:
    """The share of throughput that metering costs one pool: the median of all pairs."""
    metered = replace(plain, metered=True)
    pairs: list[tuple[float, float]] = []
    for number in range(rounds):
        # Who comes second finds warmer caches and a fuller table.
        order = (plain, metered) if number % 2 else (metered, plain)
        rates = {contender.metered: measures.drain(contender, jobs, options) for contender in order}
        pairs.append((rates[False], rates[True]))
    costs = [1 - with_it / without for without, with_it in pairs]
    low, middle, high = quantiles(costs, n=4, method="inclusive")
    table = Table("drain", "plain /s", "metered /s", "costs", "half of the pairs lie between")
    table.add_row(
        pool,
        f"{median(without for without, _ in pairs):,.0f}",
        f"{median(with_it for _, with_it in pairs):,.0f}",
        f"{middle:.1%}",
        f"{low:.1%} and {high:.1%}",
    )
    Console(width=100).print(table)
    return middle


if __name__ == "__main__":
    typer.run(main)
