"""What `skeldir top` makes of numbers, and what it says when there is no Prometheus."""

import math
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from app.top.page import _pieces, _round_up
from app.top.view import state_of, written
from tests.postgres import free_port

SKELDIR = Path(sys.prefix) / "bin" / "skeldir"


def top(address: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [SKELDIR, "top", "--once", "--prometheus", address, *arguments],
        env={"PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@contextmanager
def server(status: int, body: bytes) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http.server_address[1]}"
        http.shutdown()


@pytest.mark.parametrize("form", [(), ("--json",), ("--html", "/dev/null")])
def test_where_nothing_listens_it_says_so_in_a_sentence(form: tuple[str, ...]) -> None:
    address = f"127.0.0.1:{free_port()}"
    done = top(address, *form)
    assert (done.returncode, done.stdout) == (1, "")
    assert address in done.stderr
    assert "--prometheus" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (200, b"<html>hello</html>"),
        (200, b'{"data": 3}'),
        (200, b"[]"),
        (404, b"<html>no</html>"),
        (503, b'{"error": "starting"}'),
    ],
)
def test_what_answers_but_is_no_prometheus_is_named(status: int, body: bytes) -> None:
    with server(status, body) as address:
        done = top(address)
    assert (done.returncode, done.stdout) == (1, "")
    assert address in done.stderr
    assert len(done.stderr.splitlines()) == 1
    if body.startswith(b'{"error'):
        assert "starting" in done.stderr


@pytest.mark.parametrize("address", ["file:///etc/passwd", "http://", "http://h:port", "http://h:99999"])
def test_what_is_no_address_is_refused(address: str) -> None:
    done = top(address)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (1, "", 1)
    assert "passwd" not in done.stderr.replace(address, "")


def test_a_page_that_does_not_exist_is_refused() -> None:
    done = top("127.0.0.1:1", "nope")
    assert done.returncode == 2
    assert "oncall" in done.stderr


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (None, "s", "-"),
        (0, "s", "0 s"),
        (0.0042, "s", "4.2 ms"),
        (0.25, "s", "250 ms"),
        (59, "s", "59 s"),
        (90, "s", "90 s"),
        (600, "s", "10 min"),
        (7200, "s", "2 h"),
        (200_000, "s", "2.3 d"),
        (0.9876, "percentunit", "98.8 %"),
        (1, "percentunit", "100 %"),
        (3.14, "ops", "3.1/s"),
        (0, "ops", "0/s"),
        (9999, "short", "9999"),
        (1_234_567, "short", "1.2 M"),
        (12_345, "short", "12.3 k"),
        (512, "bytes", "512 B"),
        (3 * 2**20, "bytes", "3 MiB"),
        (math.inf, "s", "∞"),
    ],
)
def test_numbers_are_written_short(value: float | None, unit: str, text: str) -> None:
    assert written(value, unit) == text


@pytest.mark.parametrize(
    ("value", "bounds", "low", "state"),
    [
        (0, (1, 5), False, "good"),
        (1, (1, 5), False, "warn"),
        (5, (1, 5), False, "bad"),
        (1, (1, 1), True, "good"),
        (0, (1, 1), True, "bad"),
        (0.95, (0.99, 0.9), True, "warn"),
        (0.5, (0.99, 0.9), True, "bad"),
        (math.nan, (1, 5), False, ""),
        (7, None, False, ""),
    ],
)
def test_bounds_say_what_is_bad(
    value: float, bounds: tuple[float, float] | None, low: bool, state: str
) -> None:
    assert state_of(value, bounds, low) == state


def test_a_line_is_broken_where_nothing_is_known() -> None:
    points = [(0.0, 1.0), (15.0, 2.0), (30.0, math.nan), (45.0, 3.0), (500.0, 4.0)]
    assert [piece for piece in _pieces(points, 60) if piece] == [
        [(0.0, 1.0), (15.0, 2.0)],
        [(45.0, 3.0)],
        [(500.0, 4.0)],
    ]


@pytest.mark.parametrize(("highest", "top"), [(0, 1), (0.03, 0.05), (1, 1), (1.1, 2), (7, 10), (430, 500)])
def test_a_chart_ends_at_a_round_number(highest: float, top: float) -> None:
    assert _round_up(highest) == pytest.approx(top)
