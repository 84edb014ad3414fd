"""Scrapes of the real plane in trouble, and what rules and panels are shown of them.

A recording is one session on one plane: a moment for each trouble, with a scrape of every target. To be short
and to be read, a moment holds only what differs from the target's last scrape:

    # moment NAME SECONDS              seconds of the Unix clock
    # target JOB INSTANCE UP           0 when it did not answer
    celery_worker_ready{queue="llm"} 1
    -celery_dlq_open{queue="llm",…}    a series that is gone
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

FILE = Path(__file__).parents[1] / "tests/rules/scrapes/troubles.txt"

Series = dict[str, float]
"""Values by series, written as `name{label="value",…}`."""

EVENTS = (
    "celery_postgres_certificate_not_after_timestamp_seconds",
    "celery_table_last_autovacuum_timestamp_seconds",
    "skeldir_exporter_collector_last_success_timestamp_seconds",
)
"""Times of events, which don't move along with the clock as a sign of life does."""

COMPARED = ("celery_dlq_newest_failure_timestamp_seconds",)
"""Times that are only compared with each other, never with the clock, so they stay as they are."""

_SAMPLE = re.compile(r"^([a-zA-Z_:][\w:]*(?:\{.*\})?) (\S+)$")


@dataclass(frozen=True)
class Moment:
    """All targets at one time; series carry the labels `job` and `instance`, and `up` is among them."""

    name: str
    at: float
    series: Series


@dataclass
class _Target:
    up: bool = False
    series: Series = field(default_factory=dict)


def samples(text: str) -> Series:
    """The samples of a scrape in Prometheus's text format."""
    found = (_SAMPLE.match(line) for line in text.splitlines() if not line.startswith("#"))
    return {match[1]: float(match[2]) for match in found if match}


def read(path: Path = FILE) -> list[Moment]:
    """The moments of a recording, in order."""
    targets: dict[tuple[str, str], _Target] = {}
    moments: list[tuple[str, float]] = []
    found: list[Moment] = []
    target = _Target()
    for line in [*path.read_text().splitlines(), "# moment end 0"]:
        match line.split(" "):
            case ["#", "moment", name, at]:
                if moments:
                    found.append(Moment(*moments[-1], _all(targets)))
                moments.append((name, float(at)))
            case ["#", "target", job, instance, up]:
                target = targets.setdefault((job, instance), _Target())
                target.up = up == "1"
            case _ if line.startswith("-"):
                del target.series[line[1:]]
            case _ if line and not line.startswith("#"):
                series, _, value = line.rpartition(" ")
                target.series[series] = float(value)
    return found


def _all(targets: dict[tuple[str, str], _Target]) -> Series:
    seen: Series = {}
    for (job, instance), target in targets.items():
        here = {"instance": instance, "job": job}
        seen[_with("up", here)] = float(target.up)
        if target.up:
            seen |= {_with(series, here): value for series, value in target.series.items()}
    return seen


def _with(series: str, labels: dict[str, str]) -> str:
    name, _, rest = series.partition("{")
    words = [f'{label}="{value}"' for label, value in labels.items()]
    return f"{name}{{{','.join([*([rest[:-1]] if rest else []), *words])}}}"


class Writer:
    """Writes a recording, moment by moment.

    Args:
        path: the new file.
        head: lines of comment for whoever reads it.
    """

    def __init__(self, path: Path, head: str) -> None:
        self._path = path
        self._known: dict[tuple[str, str], Series] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"# {line}\n" for line in head.splitlines()))

    def moment(self, name: str, at: float, scrapes: dict[tuple[str, str], Series | None]) -> None:
        """Add one: scrapes by job and instance, None for a target that did not answer."""
        lines = [f"# moment {name} {at:.3f}"]
        for (job, instance), scrape in scrapes.items():
            known = self._known.get((job, instance), {})
            lines.append(f"# target {job} {instance} {0 if scrape is None else 1}")
            if scrape is not None:
                lines += [f"{key} {value!r}" for key, value in scrape.items() if known.get(key) != value]
                lines += [f"-{key}" for key in known if key not in scrape]
                self._known[job, instance] = scrape
        with self._path.open("a") as file:
            file.write("\n".join(lines) + "\n")


def name_of(series: str) -> str:
    """The metric's name."""
    return series.partition("{")[0]


def is_counter(series: str) -> bool:
    """Whether a series only grows, by the suffixes that Prometheus's naming rules prescribe."""
    return name_of(series).endswith(("_total", "_bucket", "_count", "_sum"))


def tells_the_time(series: str) -> bool:
    """Whether a series is a time that rules compare with the clock."""
    return name_of(series).endswith("_timestamp_seconds") and name_of(series) not in COMPARED


def held(moment: Moment, seconds: float, step: float, begins: float) -> Iterator[tuple[str, str]]:
    """Every series of a moment that lasts, in promtool's notation: values from `begins` on, every `step`.

    A sign of life keeps its distance from the clock, as the trouble lasts; the time of an event stays, and an
    age above 0 grows by the clock. Everything else stays as it was.
    """
    points = int(seconds // step)
    for series, value in moment.series.items():
        name = name_of(series)
        if name in EVENTS and value:
            yield series, f"{begins - (moment.at - value):.3f}x{points - 1}"
        elif tells_the_time(series) and value:
            yield series, f"{begins - (moment.at - value):.3f}+{step:g}x{points - 1}"
        elif name.endswith("_age_seconds") and value:
            yield series, f"{value:.3f}+{step:g}x{points - 1}"
        else:
            yield series, f"{value!r}x{points - 1}"
