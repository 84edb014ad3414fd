"""One drill from the fault to the message that it is over, and many side by side."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass

from drills.faults import Drill, Fault
from drills.plane import Plane
from drills.watch import Labels, Look, Message, Stopped, Watch, has
from tests.rules.runbooks import front_matter
from tests.runbooks import RUNBOOKS, Reader, read_page

_RECEIVERS = {"critical": "page", "warning": "ticket"}
_UNDONE_AFTER = "20min"
_ARMED = """
cat >/run/{name}.sh <<'UNDO'
export SKELDIR_HOME={home}
{undo}
UNDO
systemctl stop {name}.timer 2>/dev/null || true
systemd-run --quiet --on-active={after} --unit={name} bash /run/{name}.sh
"""
# What a look must not change, beside the dead letters: which processes run.
_RUNNING = (
    "systemctl show --property=Id,InvocationID,ActiveState"
    " 'skeldir-worker@*' 'skeldir-exporter*' 'postgresql@*' 'prometheus*'"
)
_STORED = """runuser -u postgres -- psql -XAtq skeldir -c "
SELECT (SELECT count(*) FROM celery_task_failure_audit), (SELECT count(*) FROM celery_task_failure_replays)
UNION ALL SELECT sum(id), count(*) FROM celery_task_failures GROUP BY state ORDER BY 1, 2"
"""


@dataclass
class Outcome:
    """How a drill ended; seconds since the fault began, or None where it didn't come to it."""

    alert: str
    fired: float | None = None
    told: float | None = None
    by: str = ""
    mended: float | None = None
    over: float | None = None
    problem: str = ""


class Run:
    """Drills on one plane, side by side where one doesn't disturb another."""

    def __init__(self, plane: Plane, watch: Watch, say: Callable[[str], None]) -> None:
        self.plane = plane
        self.watch = watch
        self.say = say
        self._floor = _Floor()
        scale = float(plane.facts["time_scale"])
        self.patience = 90 + 2400 / scale
        """Seconds that an alert may take: no `for` and no window is longer than 40 minutes."""

    def together(self, drills: dict[str, Drill]) -> list[Outcome]:
        """Run them, each as soon as no other is in its way."""
        waiting = dict(drills)
        running: dict[Future[Outcome], Drill] = {}
        outcomes: list[Outcome] = []
        with ThreadPoolExecutor(max_workers=max(1, len(drills))) as pool:
            while waiting or running:
                for alert, drill in list(waiting.items()):
                    if not any(in_the_way(drill, other) for other in running.values()):
                        running[pool.submit(self.one, alert, waiting.pop(alert))] = drill
                done, _ = wait(running, timeout=1, return_when=FIRST_COMPLETED)
                for future in done:
                    running.pop(future)
                    outcomes.append(future.result())
        return sorted(outcomes, key=lambda outcome: list(drills).index(outcome.alert))

    def one(self, alert: str, drill: Drill) -> Outcome:
        """Run one; what went wrong is in its outcome."""
        outcome = Outcome(alert)
        try:
            self._drill(outcome, drill)
        except Stopped:
            outcome.problem = "stopped"
        except Exception as error:  # whatever it was, the others go on
            outcome.problem = f"{type(error).__name__}: {error}"
        end = outcome.problem or f"over after {outcome.over:.0f} s"
        self.say(f"{alert}: {end}")
        return outcome

    def _drill(self, outcome: Outcome, drill: Drill) -> None:
        alert, wanted = outcome.alert, {"alertname": outcome.alert} | drill.labels
        page = read_page(RUNBOOKS / f"{alert}.md")
        place = front_matter(page.path)["host"]
        reader = Reader(page, lambda script: self.plane.run(place, script))

        def firing(look: Look) -> list[Labels]:
            return [each for each in look.firing if has(each, wanted)]

        if firing(self.watch.now()):
            raise RuntimeError("it fires already; mend that first")
        heard = self._last_message()
        began = time.monotonic()

        def seconds() -> float:
            return time.monotonic() - began

        with self._faults(alert, drill.faults):
            self.say(f"{alert}: {drill.what}")
            with self._floor.acting():
                for fault in drill.faults:
                    self.plane.do(fault.place, fault.make)
            self.watch.wait(firing, self.patience, f"{alert} does not fire in Prometheus")
            outcome.fired = seconds()
            self.say(f"{alert}: fires in Prometheus after {outcome.fired:.0f} s")
            outcome.by = self.watch.wait(
                lambda look: _arrived(look, wanted, heard, drill.explained_by),
                self.patience,
                "nobody is told",
            )
            outcome.told = seconds()
            self.say(f"{alert}: {outcome.by} after {outcome.told:.0f} s; working through its page")
            with self._floor.looking():
                before = self._state(place)
                reader.paste("Diagnosis", **drill.answers)
                if (after := self._state(place)) != before:
                    raise AssertionError(f"Diagnosis changed something: {before!r} became {after!r}")
            with self._floor.acting():
                reader.paste("Mitigation", **drill.answers)
                if drill.outside:
                    self._undo(drill.faults)
                reader.paste("Verify recovered", **drill.answers)
                reader.assert_nothing_is_left()
            outcome.mended = seconds()
            self.say(f"{alert}: the page is worked through after {outcome.mended:.0f} s")
            self.watch.wait(lambda look: not firing(look), self.patience, f"{alert} still fires")
            if outcome.by in _RECEIVERS.values():
                self.watch.wait(
                    lambda look: _messages(look, wanted, heard, "resolved"),
                    self.patience,
                    "nobody is told that it is over",
                )
            outcome.over = seconds()

    @contextmanager
    def _faults(self, alert: str, faults: tuple[Fault, ...]) -> Iterator[None]:
        """Undo whatever was made, in any case; the host does so itself should this process vanish."""
        name = f"skeldir-drill-undo-{alert}"
        for place in {fault.place for fault in faults}:
            undo = "\n".join(fault.undo for fault in reversed(faults) if fault.place == place)
            self.plane.do(
                place, _ARMED.format(name=name, after=_UNDONE_AFTER, undo=undo, home=self.plane.facts["home"])
            )
        try:
            yield
        finally:
            with self._floor.acting():
                self._undo(faults)
                for place in {fault.place for fault in faults}:
                    self.plane.do(place, f"systemctl stop {name}.timer && rm -f /run/{name}.sh")

    def _undo(self, faults: tuple[Fault, ...]) -> None:
        for fault in reversed(faults):
            self.plane.do(fault.place, fault.undo)

    def _state(self, place: str) -> tuple[str, str]:
        return self.plane.run(place, _RUNNING)[1], self.plane.run("database", _STORED)[1]

    def _last_message(self) -> int:
        messages = self.watch.now().messages
        return messages[-1].number if messages else 0


class _Floor:
    """Any number may act at once, or one look: what it sees must be its own doing.

    Who acts next waits for those that want to look, or they would wait until nobody is left.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._acting = 0
        self._want_to_look = 0

    @contextmanager
    def acting(self) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: self._want_to_look == 0)
            self._acting += 1
        try:
            yield
        finally:
            with self._changed:
                self._acting -= 1
                self._changed.notify_all()

    @contextmanager
    def looking(self) -> Iterator[None]:
        with self._changed:
            self._want_to_look += 1
            try:
                self._changed.wait_for(lambda: self._acting == 0)
                yield
            finally:
                self._want_to_look -= 1
                self._changed.notify_all()


def in_the_way(one: Drill, other: Drill) -> bool:
    """Whether two drills would disturb each other."""
    return bool(one.breaks & (other.breaks | other.needs) or other.breaks & one.needs)


def _messages(look: Look, wanted: Labels, after: int, status: str) -> list[Message]:
    return [
        message
        for message in look.messages
        if message.number > after
        and message.status == status
        and has(message.labels, wanted)
        and message.receiver == _RECEIVERS.get(message.labels["severity"])
    ]


def _arrived(look: Look, wanted: Labels, after: int, explained_by: str) -> str:
    """The receiver that was told of it, or of the alert that explains it; empty as long as none was."""
    if told := _messages(look, wanted, after, "firing"):
        return told[0].receiver
    for labels, by in look.inhibited:
        for explains in by:
            known = explains["alertname"] == explained_by
            if known and has(labels, wanted) and _messages(look, explains, after, "firing"):
                return f"inhibited by {explained_by}"
    return ""
