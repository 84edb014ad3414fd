"""Run in a container: send jobs to every queue for a while, then say what became of the accepted ones."""

import json
import sys
import time

from sqlalchemy.exc import OperationalError

from app.celery_app import celery_app
from app.core.topology import load_topology
from app.tasks.housekeeping import ping

seconds, queues = float(sys.argv[1]), list(load_topology().queues)
accepted = []
refused = 0
until = time.monotonic() + seconds
print("sending", flush=True)
while time.monotonic() < until:
    for queue in queues:
        try:
            accepted.append(ping.apply_async(queue=queue).id)
        except Exception:  # the database is away: nothing was promised
            refused += 1
    time.sleep(0.05)

done: set[str] = set()
until = time.monotonic() + 90
while len(done) < len(accepted) and time.monotonic() < until:
    for job in accepted:
        try:
            if job not in done and celery_app.AsyncResult(job).successful():
                done.add(job)
        except OperationalError:
            time.sleep(0.5)
    time.sleep(0.5)
print(json.dumps({"accepted": len(accepted), "refused": refused, "lost": len(accepted) - len(done)}))
