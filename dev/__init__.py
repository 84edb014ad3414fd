"""What a developer works with: a plane of one's own, and new queues and tasks. No host gets any of it."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
"""The checkout."""
