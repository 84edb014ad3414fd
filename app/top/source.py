"""What a Prometheus answers: `/api/v1/query` and `/api/v1/query_range`, nothing else."""

import json
from dataclasses import dataclass
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlencode, urlsplit
from urllib.request import urlopen

_PATIENCE = 10.0  # seconds


class PrometheusError(Exception):
    """Prometheus gave no answer; the message is a sentence that says why and what to do."""


@dataclass(frozen=True)
class Series:
    """Labels, and points of (seconds since 1970, value); one point when asked for a moment."""

    labels: dict[str, str]
    points: list[tuple[float, float]]

    @property
    def value(self) -> float:
        """The last value."""
        return self.points[-1][1]


class Source:
    """A Prometheus.

    Args:
        address: such as `http://monitor1:9090`; without a scheme, http is meant.

    Raises:
        PrometheusError: the address isn't one.
    """

    def __init__(self, address: str) -> None:
        self.address = (address if "://" in address else f"http://{address}").rstrip("/")
        try:
            parts = urlsplit(self.address)
            usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:  # of the port
            usable = False
        if not usable:
            raise PrometheusError(f"{address!r} is no address of a Prometheus such as http://monitor1:9090.")

    def at(self, query: str, moment: float) -> list[Series]:
        """Every series of a query at one moment."""
        found = self._ask("query", query=query, time=moment)
        return [Series(one["metric"], [_point(one["value"])]) for one in found]

    def over(self, query: str, begin: float, end: float, step: float) -> list[Series]:
        """Every series of a query over a time, a point each step."""
        found = self._ask("query_range", query=query, start=begin, end=end, step=step)
        return [Series(one["metric"], [_point(point) for point in one["values"]]) for one in found]

    def _ask(self, path: str, **parameters: Any) -> list[dict[str, Any]]:
        url = f"{self.address}/api/v1/{path}?{urlencode(parameters)}"
        try:
            with urlopen(url, timeout=_PATIENCE) as answer:  # noqa: S310 - http or https, see above
                return list(json.load(answer)["data"]["result"])
        except HTTPError as error:
            raise PrometheusError(f"{self.address} refused a query: {_reason(error)}.") from None
        except (OSError, URLError) as error:
            reason = getattr(error, "reason", error)
            said = getattr(reason, "strerror", None) or str(reason) or type(reason).__name__
            raise PrometheusError(
                f"Prometheus can't be reached at {self.address} ({said}): "
                "check that it runs there and name its address with --prometheus."
            ) from None
        except (ValueError, KeyError, TypeError):
            raise PrometheusError(
                f"What answers at {self.address} is no Prometheus: name the address of one with --prometheus."
            ) from None


def _point(point: list[Any]) -> tuple[float, float]:
    return float(point[0]), float(point[1])


def _reason(error: HTTPError) -> str:
    try:
        return str(json.load(error)["error"])
    except (ValueError, KeyError, TypeError):
        return f"HTTP status {error.code}"
