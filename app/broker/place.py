"""Where a taker goes on in a queue's index.

What was taken leaves dead entries at the index's front until it is vacuumed, and while some session holds
back the xmin horizon (a backup, a long report) it can't be vacuumed: a taker that starts at the front wades
through all of them each time. So it goes on where it was a moment ago, and starts at the front only now and
then, or when it is told that something came back (a requeue, a rescue, an ETA that is due).
"""

import time
from collections.abc import Sequence
from typing import Any

_LAG = 1.0  # seconds a place stays behind: transactions don't commit in the order of their ids
_RARELY = 50  # a search from the front may cost a fiftieth of the time


class _Mark:
    def __init__(self) -> None:
        self.start = 0
        self.seen = 0
        self.since = time.monotonic()

    def passed(self, id_: int, now: float) -> None:
        if now - self.since > _LAG:
            self.start, self.since = self.seen, now
        self.seen = max(self.seen, id_)


class Places:
    """The places of one taker, by queue and priority."""

    def __init__(self) -> None:
        self.asleep = 0
        """The connection (its generation) in which these queues' sleepers' locks are held; 0 when awake."""
        self._marks: dict[int, dict[int, _Mark]] = {}
        self._front_at = 0.0
        self._from_front = True

    def __bool__(self) -> bool:
        """Whether there is a queue to take from."""
        return bool(self._marks)

    @property
    def queue_ids(self) -> list[int]:
        """The queues."""
        return list(self._marks)

    def add(self, queue_id: int) -> None:
        """Begin with a queue."""
        self._marks.setdefault(queue_id, {})
        self._front_at = 0.0

    def remove(self, queue_id: int) -> None:
        """Forget a queue."""
        self._marks.pop(queue_id, None)

    def start_over(self) -> None:
        """Search from the front next time."""
        self._front_at = 0.0

    def segments(self) -> tuple[list[int], list[int], list[int], list[int]]:
        """What to search, in order: queue, lowest and highest priority, and the id to go on behind."""
        self._from_front = time.monotonic() >= self._front_at
        found = []
        queue_ids = list(self._marks)
        for queue_id in queue_ids:
            above = 9
            for priority, mark in sorted(self._marks[queue_id].items(), reverse=True):
                if priority < above:
                    found.append((queue_id, priority + 1, above, 0))
                found.append((queue_id, priority, priority, 0 if self._from_front else mark.start))
                above = priority - 1
            if above >= 0:
                found.append((queue_id, 0, above, 0))
        if queue_ids:  # another queue's turn to be first
            self._marks[queue_ids[0]] = self._marks.pop(queue_ids[0])
        queues, low, high, start = (list(column) for column in zip(*found, strict=True))
        return queues, low, high, start

    def went_on(self, rows: Sequence[tuple[Any, ...]], want: int, seconds: float) -> None:
        """Note what a search found (id, queue, priority, …) and how long it took."""
        now = time.monotonic()
        came_back = False
        for id_, queue_id, priority, *_ in rows:
            mark = self._marks[queue_id].setdefault(priority, _Mark())
            came_back = came_back or id_ <= mark.start
            mark.passed(id_, now)
        if self._from_front and not (came_back and len(rows) == want):
            self._front_at = now + max(_LAG, _RARELY * seconds)
