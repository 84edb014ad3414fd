"""The log of a run: when which job started. One small write a job, alike for every contender."""

import struct
from pathlib import Path

RECORD = struct.Struct("<dq")
"""The machine's monotonic clock in seconds, and the job's number; -1 for jobs that only warm up."""


def records(log: Path) -> list[tuple[float, int]]:
    """The jobs that have started, in the order they were noted."""
    content = log.read_bytes() if log.exists() else b""
    whole = content[: len(content) // RECORD.size * RECORD.size]
    return [(moment, number) for moment, number in RECORD.iter_unpack(whole) if number >= 0]
