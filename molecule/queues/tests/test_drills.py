"""Every drill on the deployed plane, as an operator starts them, side by side."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from testinfra.host import Host

from drills.faults import DRILLS, MODELS
from tests.lab import INVENTORY, ROOT, unit

# All of them together are one fixture.
pytestmark = pytest.mark.timeout(900)
COMMAND = [sys.executable, "-u", "-m", "drills", f"--inventory={INVENTORY}"]
ENVIRONMENT = os.environ | {"ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "NO_COLOR": "1"}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    made: Path = tmp_path_factory.mktemp("drills") / "outcomes.json"
    command = [*COMMAND, "--all", f"--json={made}"]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, text=True, stdout=subprocess.PIPE, check=False)
    print(done.stdout)
    if (evidence := os.environ.get("EVIDENCE")) and Path(evidence).is_dir():
        (Path(evidence) / "drills.txt").write_text(done.stdout)
    return {each["alert"]: each for each in json.loads(made.read_text())}


@pytest.mark.parametrize("alert", DRILLS)
def test_the_alert_fires_arrives_is_mended_by_its_page_and_ends(
    alert: str, outcomes: dict[str, dict[str, Any]]
) -> None:
    outcome = outcomes[alert]
    assert outcome["problem"] == ""
    assert outcome["fired"] <= outcome["told"] <= outcome["mended"] <= outcome["over"]


def test_what_a_drill_broke_is_whole_again_when_somebody_stops_it(
    worker: Host, outcomes: dict[str, dict[str, Any]]
) -> None:
    # Whoever runs the tests in the background made them deaf to Ctrl-C, and their children with them.
    command = ["env", "--default-signal=INT", *COMMAND, "CeleryQueueNoConsumer"]
    process = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, text=True, stdout=subprocess.PIPE)
    try:
        assert process.stdout
        seen = next((line for line in process.stdout if "fires in Prometheus" in line), "")
        assert seen
        assert not worker.service(unit(MODELS)).is_running
        process.send_signal(signal.SIGINT)
        said = process.stdout.read()
    finally:
        process.terminate()  # undoes it, too
        status = process.wait(60)
    assert status == 1
    assert re.search(r"^CeleryQueueNoConsumer .*stopped$", said, re.MULTILINE)
    assert worker.service(unit(MODELS)).is_running
    assert "skeldir-drill-undo" not in worker.check_output("systemctl list-timers --all --no-legend --plain")
