"""The dashboards in a real Grafana, where `GRAFANA_HOME` names one (with bin/, conf/ and public/)."""

import base64
import json
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import Request, urlopen

import jinja2
import pytest
import yaml

from app.top.panels import PAGES, filled_in
from monitoring import check, dashboards, proofs, recordings
from tests.postgres import ROOT, free_port

HOME = os.environ.get("GRAFANA_HOME", "")
TEMPLATES = ROOT / "roles/grafana/templates"
PASSWORD = "of a test"


def provisioning(name: str, **variables: object) -> dict[str, Any]:
    """A file of the role `grafana` as a host gets it."""
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, autoescape=False)  # noqa: S701 - YAML
    environment.filters["comment"] = lambda text: f"# {text}"
    text = environment.from_string((TEMPLATES / f"{name}.yml.j2").read_text()).render(
        ansible_managed="", **variables
    )
    return dict(yaml.safe_load(text))


def test_the_provisioning_is_of_a_form_that_grafana_reads() -> None:
    source = provisioning("datasource", grafana_prometheus_url="http://127.0.0.1:1")
    assert source["apiVersion"] == 1
    assert [(one["type"], one["access"]) for one in source["datasources"]] == [("prometheus", "proxy")]
    folders = provisioning("dashboards")
    assert folders["apiVersion"] == 1
    assert [provider["type"] for provider in folders["providers"]] == ["file"]


class Grafana:
    def __init__(self, port: int) -> None:
        self.address = f"http://127.0.0.1:{port}"
        self.authorization = "Basic " + base64.b64encode(f"admin:{PASSWORD}".encode()).decode()

    def ask(self, path: str, body: object = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        headers = {"Authorization": self.authorization, "Content-Type": "application/json"}
        with urlopen(Request(self.address + path, data, headers), timeout=30) as answer:
            return json.load(answer)


@pytest.fixture(scope="module")
def grafana(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Grafana]:
    if not HOME:
        pytest.skip("GRAFANA_HOME names no Grafana, so the dashboards were not seen in a real one")
    home, port = tmp_path_factory.mktemp("grafana"), free_port()
    with check.prometheus(recordings.read(), proofs.sheet_of_the_recording()) as ask:
        files = {
            "datasources/skeldir.yml": provisioning("datasource", grafana_prometheus_url=ask.address),
            "dashboards/skeldir.yml": provisioning("dashboards"),
        }
        files["dashboards/skeldir.yml"]["providers"][0]["options"]["path"] = str(dashboards.FOLDER)
        for name, content in files.items():
            path = home / "provisioning" / name
            path.parent.mkdir(parents=True)
            path.write_text(yaml.safe_dump(content))
        environment = {
            **{"PATH": os.environ["PATH"], "GF_PATHS_DATA": str(home), "GF_PATHS_LOGS": str(home)},
            **{"GF_PATHS_PROVISIONING": f"{home}/provisioning", "GF_PATHS_PLUGINS": f"{home}/plugins"},
            **{"GF_SERVER_HTTP_ADDR": "127.0.0.1", "GF_SERVER_HTTP_PORT": str(port)},
            **{"GF_SECURITY_ADMIN_PASSWORD": PASSWORD, "GF_ANALYTICS_REPORTING_ENABLED": "false"},
            **{"GF_ANALYTICS_CHECK_FOR_UPDATES": "false", "GF_ANALYTICS_CHECK_FOR_PLUGIN_UPDATES": "false"},
        }
        program = Path(HOME, "bin/grafana")
        command = [program, "server", "--homepath", HOME]
        with (home / "output").open("wb") as output:
            process = subprocess.Popen(command, cwd=HOME, env=environment, stdout=output, stderr=output)
        server = Grafana(port)
        try:
            deadline = time.monotonic() + 90
            while True:
                with suppress(URLError, OSError, KeyError):
                    if len(server.ask("/api/search?type=dash-db&limit=100")) >= len(PAGES):
                        break
                assert process.poll() is None, (home / "output").read_text()[-3000:]
                assert time.monotonic() < deadline, (home / "output").read_text()[-3000:]
                time.sleep(0.5)
            yield server
        finally:
            process.terminate()
            process.wait(30)


@pytest.mark.timeout(240)
def test_every_dashboard_is_there(grafana: Grafana) -> None:
    found = {entry["uid"]: entry for entry in grafana.ask("/api/search?type=dash-db&limit=100")}
    assert found.keys() == {page.uid for page in PAGES}
    assert {entry["folderTitle"] for entry in found.values()} == {"Skeldir"}
    for page in PAGES:
        board = grafana.ask(f"/api/dashboards/uid/{page.uid}")["dashboard"]
        titles = [panel["title"] for panel in board["panels"] if panel["type"] != "row"]
        assert titles == [panel.title for _, panels in page.rows for panel in panels]


@pytest.mark.timeout(240)
def test_every_panel_gets_data_through_grafana(grafana: Grafana) -> None:
    empty = []
    for page in PAGES:
        for panel in (panel for _, panels in page.rows for panel in panels):
            for expression in panel.expressions:
                query = {
                    "refId": "A",
                    "datasource": {"uid": "skeldir", "type": "prometheus"},
                    "expr": filled_in(expression, "5m"),
                    "range": True,
                    "intervalMs": 30_000,
                    "maxDataPoints": 200,
                }
                asked = {"queries": [query], "from": "now-1h", "to": "now"}
                result = grafana.ask("/api/ds/query", asked)["results"]["A"]
                assert "error" not in result, (page.uid, panel.title, result)
                if not result["frames"] and panel.may_be_empty is None:
                    empty.append((page.uid, panel.title, expression))
    assert empty == []
