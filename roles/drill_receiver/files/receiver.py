"""A webhook for Alertmanager that remembers what it was told."""

import json
import sys
from collections import deque
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count

MESSAGES = deque(maxlen=10_000)
"""One an alert and message, oldest first, each with a number that grows by one."""
NUMBERS = count(1)


class Handler(BaseHTTPRequestHandler):
    """POST from Alertmanager; GET /N answers what came after message N."""

    def do_POST(self):
        """Remember."""
        said = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        for alert in said["alerts"]:
            heard = {"number": next(NUMBERS), "receiver": said["receiver"]}
            MESSAGES.append(heard | {"status": alert["status"], "labels": alert["labels"]})
        self._answer(b"")

    def do_GET(self):
        """Tell."""
        after = int(self.path.strip("/") or 0)
        self._answer(json.dumps([heard for heard in list(MESSAGES) if heard["number"] > after]).encode())

    def log_message(self, *_):
        """Alertmanager logs what it sends."""

    def _answer(self, body):
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
