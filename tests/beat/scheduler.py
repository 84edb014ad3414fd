"""A scheduler to be killed: `python -m tests.beat.scheduler PORT SCHEDULE [SECONDS]`.

It is the real one, with another schedule and port. With SECONDS it dawdles that long inside of each
transaction, before and after it publishes; a file beside SCHEDULE is there while it has published and not
committed. TAKES_ITSELF_FOR_ACTIVE lets it go on without the lock.
"""

import os
import sys
import time
from datetime import datetime
from pathlib import Path

from app.beat.process import run
from app.beat.schedule import Entry, load_schedule
from app.beat.scheduler import Beat as Scheduler
from app.beat.scheduler import publish
from app.core.topology import Beat, load_topology


def _always(self: Scheduler, _session: object) -> bool:
    self._holds_lock = True
    return True


def main() -> None:
    port, schedule, dawdle = int(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])

    amid = schedule.with_suffix(f".{port}")

    def slowly(entry: Entry, due: datetime) -> str:
        time.sleep(dawdle)
        task_id = publish(entry, due)
        amid.touch()
        time.sleep(dawdle)
        amid.unlink()
        return task_id

    if "TAKES_ITSELF_FOR_ACTIVE" in os.environ:
        Scheduler._lock = _always  # type: ignore[method-assign]
    sheet = load_topology().model_copy(update={"beat": Beat(port=port)})
    run(sheet, load_schedule(sheet, schedule), slowly if dawdle else publish)


if __name__ == "__main__":
    main()
