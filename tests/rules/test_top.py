"""`skeldir top` beside a real Prometheus that holds what was recorded of a plane in trouble."""

import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from app.core.topology import load_topology
from app.top.panels import PAGES
from monitoring import check, mixin, proofs, recordings

SKELDIR = Path(sys.prefix) / "bin" / "skeldir"
QUEUES = [*load_topology().queues]


@pytest.fixture(scope="module")
def prometheus() -> Iterator[check.Prometheus]:
    with check.prometheus(recordings.read(), proofs.sheet_of_the_recording()) as ask:
        yield ask


def top(prometheus: check.Prometheus, *arguments: str) -> str:
    done = subprocess.run(
        [SKELDIR, "top", "--prometheus", prometheus.address, "--hours", "0.5", *arguments],
        env={"PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_once_shows_the_plane(prometheus: check.Prometheus) -> None:
    instances = prometheus("label/instance/values", **{"match[]": 'up{job="celery-worker"}'})
    classes = prometheus("label/failure_class/values", **{"match[]": "celery_dlq_open"})
    alerts = prometheus("label/alertname/values", **{"match[]": 'ALERTS{alertstate="firing"}'})
    text = top(prometheus, "--once")  # asked last: an alert may begin meanwhile, and stays
    for word in (*QUEUES, *instances, *classes, *(set(alerts) - {"Watchdog"})):
        assert word in text, word
    assert max(map(len, text.splitlines())) <= 160


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.uid)
def test_every_panel_of_a_page_has_numbers(prometheus: check.Prometheus, page) -> None:
    shown = json.loads(top(prometheus, page.uid.removeprefix("skeldir-"), "--json"))
    panels = [panel for _, panels in page.rows for panel in panels]
    assert [panel["title"] for panel in shown["panels"]] == [panel.title for panel in panels]
    for panel, found in zip(panels, shown["panels"], strict=True):
        if panel.may_be_empty is None:
            assert found.get("values") or found.get("rows"), panel.title


def test_the_numbers_are_those_of_prometheus(prometheus: check.Prometheus) -> None:
    shown = {panel["title"]: panel for panel in json.loads(top(prometheus, "--json"))["panels"]}

    def asked(query: str, label: str) -> dict[str, float]:
        answer = prometheus("query", query=query)["result"]
        found = {series["metric"].get(label, ""): float(series["value"][1]) for series in answer}
        return {name: value for name, value in found.items() if value or name != "other"}

    assert {row["failure class"]: row["open"] for row in shown["Dead letters"]["rows"]} == asked(
        "sum by (failure_class) (celery_dlq_open)", "failure_class"
    )
    assert {row["queue"]: row["waiting"] for row in shown["Queues"]["rows"]} == asked(
        'sum by (queue) (celery_queue_messages{state="ready"})', "queue"
    )
    assert shown["Open dead letters"]["values"]["open"] == {
        "value": sum(asked("sum(celery_dlq_open)", "").values()),
        "state": shown["Open dead letters"]["values"]["open"]["state"],
    }


def test_the_page_needs_nothing_and_has_everything(prometheus: check.Prometheus, tmp_path: Path) -> None:
    file = tmp_path / "plane.html"
    assert top(prometheus, "--html", str(file)) == ""
    text = file.read_text()
    for page in PAGES:
        assert f"<section id={page.uid}>" in text
        for _, panels in page.rows:
            for panel in panels:
                assert f">{panel.title}</h3>" in text, panel.title
    assert not re.findall(r'(?:src|href)=(?!"#)\S+|@import|url\(|<script', text)
    charts = [
        ET.fromstring(chart)  # noqa: S314 - made here
        for chart in re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    ]
    lines = [line for chart in charts for line in chart.iter("polyline") if line.get("points")]
    assert len(charts) > 30
    assert len(lines) > len(charts)
    for line in lines:
        for point in line.get("points", "").split():
            x, y = map(float, point.split(","))
            assert 0 <= x <= 24 * 55
            assert 0 <= y <= 150


def test_live_it_is_shown_until_somebody_ends_it(prometheus: check.Prometheus) -> None:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 60, 160, 0, 0))
    # Whoever runs the tests in the background made them deaf to Ctrl-C, and their children with them.
    command = ["env", "--default-signal=INT", SKELDIR, "top"]
    command += ["--prometheus", prometheus.address, "--interval", "1"]
    env = {"PATH": os.environ["PATH"], "TERM": "xterm-256color"}
    process = subprocess.Popen(command, env=env, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    seen = b""
    moments: set[bytes] = set()
    deadline = time.monotonic() + 20
    while len(moments) < 3 and time.monotonic() < deadline:
        if select.select([ours], [], [], 0.5)[0]:
            seen += os.read(ours, 65536)
        moments = set(re.findall(rb"\d\d:\d\d:\d\d UTC", seen))
    process.send_signal(signal.SIGINT)
    while select.select([ours], [], [], 2)[0]:
        try:
            if not os.read(ours, 65536):
                break
        except OSError:  # the other end is closed
            break
    assert process.wait(10) == 0
    os.close(ours)
    assert len(moments) >= 3, "it is drawn anew"
    assert QUEUES[0].encode() in seen


def test_published_dashboards_find_their_metrics(prometheus: check.Prometheus) -> None:
    assert list(mixin.unanswered(prometheus)) == []
    for state in mixin.CANNOT:
        query = f'celery_task_{state}_total{{name=~".+"}}'
        assert prometheus("query", query=query)["result"] == [], "the docs say that it can't be had"
