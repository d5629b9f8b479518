"""Named points at which a run can be made to die, for tests and `slq bench chaos`.

`SLQ_FAILPOINT=commit_after` kills the first process that gets there, `commit_after:3` when it does for the third time.
Ray starts a new worker where one died, and it inherits the environment: with `SLQ_FAILPOINT_MARK=FILE` only the process
that creates the file dies, so one of all does, once.
"""

import difflib
import os
import signal
import threading
from collections import Counter

from slq.errors import ConfigError

VARIABLE = "SLQ_FAILPOINT"
MARK = "SLQ_FAILPOINT_MARK"
FAILPOINTS = (
    "plan_written",
    "piece_before_write",
    "piece_after_write",
    "shard_before_write",
    "shard_after_write",
    "commit_before",
    "commit_after",
    "publish_before",
    "publish_after",
    "sweep",
    "manifest_before",
    "manifest_after",
)
"""In the order of a run. `publish_*` come once per file of a shard, `sweep` before each file that is removed."""
IN_WORKERS = frozenset(
    {"piece_before_write", "piece_after_write", "shard_before_write", "shard_after_write"}
)
"""Those that tasks get to; the others are the driver's."""

_reached: Counter[str] = Counter()
_counting = threading.Lock()


def reach(name: str) -> None:
    """Die by SIGKILL if this is the point that the environment names; else do nothing.

    Args:
        name: One of `FAILPOINTS`.

    Raises:
        ConfigError: The environment names a point that does not exist, or counts from less than one.
    """
    text = os.environ.get(VARIABLE)
    if not text:
        return
    wanted, count = _parse(text)
    with _counting:
        _reached[name] += 1
        if name == wanted and _reached[name] == count and _is_first():
            os.kill(os.getpid(), signal.SIGKILL)


def _is_first() -> bool:
    """Whether no process that shares the mark has died before."""
    path = os.environ.get(MARK)
    if not path:
        return True
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except FileExistsError:
        return False
    return True


def _parse(text: str) -> tuple[str, int]:
    name, separator, count = text.partition(":")
    if name not in FAILPOINTS:
        near = difflib.get_close_matches(name, FAILPOINTS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(FAILPOINTS)}"
        raise ConfigError(f"{VARIABLE}: {name!r} is unknown; {hint}")
    if separator and not (count.isdecimal() and int(count) > 0):
        raise ConfigError(
            f"{VARIABLE}: {text!r} counts wrongly; write {name}:N to die when it is reached for the N-th time, N >= 1"
        )
    return name, int(count or 1)
