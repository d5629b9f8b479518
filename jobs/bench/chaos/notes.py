"""Notes of what workers did, which outlive them."""

import os
from collections import Counter
from pathlib import Path

NOTES = "SLQ_CHAOS_NOTES"
"""The environment variable that names the file."""
PREPARED, ENCODED = "prepared", "encoded"


def counted(notes: Path) -> Counter[str]:
    """How many items were prepared and encoded, each as often as it was."""
    found: Counter[str] = Counter()
    for line in notes.read_text().splitlines():
        what, count = line.split()
        found[what] += int(count)
    return found


def note(what: str, count: int) -> None:
    """Add a line; short ones that are appended with one call never mix."""
    handle = os.open(os.environ[NOTES], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(handle, f"{what} {count}\n".encode())
    finally:
        os.close(handle)
