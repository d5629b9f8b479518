"""Runs of `slq embed` that can be killed: each has processes of its own, all of which are known by a mark."""

import os
import signal
import subprocess
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil

from jobs.bench.chaos.invariants import BrokenInvariantError

_MARK = "SLQ_CHAOS_RUN"
_POLL_S = 0.05
_LEAVE_S = 120.0  # workers leave within two seconds; Ray's agents call their dead head node for a minute before
_SHOWN_LINES = 15


class Run:
    """A command with a Ray of its own, from its start to the end of its last process.

    Args:
        command: What to run.
        log: Where its output goes.
        environment: Added to this process' own.
    """

    def __init__(self, command: list[str], log: Path, environment: dict[str, str]) -> None:
        self._id = uuid.uuid4().hex
        self._log = log
        # RAY_ADDRESS would lead it to somebody's cluster, and what is killed here must be ours
        inherited = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                command,
                env={**inherited, **environment, _MARK: self._id},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._started = time.monotonic()

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_: object) -> None:
        self.kill(whole=True)

    @property
    def pid(self) -> int:
        """Of the driver."""
        return self._process.pid

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self._started

    def processes(self) -> list[psutil.Process]:
        """All live processes that this run led to, the driver first, whoever their parents are now.

        The mark stands in the environment, which Ray hands on to everything that it starts.
        """
        found = [one for one in psutil.process_iter() if self._owns(one)]
        return sorted(found, key=lambda one: one.pid != self.pid)

    def _owns(self, process: psutil.Process) -> bool:
        try:
            return bool(process.environ().get(_MARK) == self._id)
        except (psutil.Error, OSError):
            return False

    def workers(self, title: str) -> list[psutil.Process]:
        """Ray's workers that are at this step now; Ray shows it in the name of the process."""
        found = []
        for process in psutil.Process(self.pid).children(recursive=True):
            with suppress(psutil.Error):
                if title in " ".join(process.cmdline()):
                    found.append(process)
        return found

    def wait(self, timeout_s: float) -> int | None:
        """The driver's exit code; None if it is still at work by then."""
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None

    def wait_for(self, happened: Callable[[], object], timeout_s: float) -> bool:
        """Wait until something is true; False if the driver ended, or the time was over, before it was."""
        until = time.monotonic() + timeout_s
        while not happened():
            if self._process.poll() is not None or time.monotonic() > until:
                return bool(happened())
            time.sleep(_POLL_S)
        return True

    def kill(self, *, whole: bool) -> None:
        """SIGKILL the driver; with `whole` all processes of the run at once, as when its machine fails."""
        victims = self.processes() if whole else []
        with suppress(ProcessLookupError):  # it may just have ended
            self._process.kill()
        for victim in victims:
            with suppress(psutil.Error):
                victim.kill()
        self._process.wait()

    def require_success(self, code: int | None) -> None:
        """Check an exit code.

        Raises:
            BrokenInvariantError: It is none or not 0; the last lines of the run are in the message.
        """
        if code != 0:
            lines = self._log.read_text(errors="replace").splitlines()
            how = "did not end" if code is None else f"ended with {_named(code)}"
            raise BrokenInvariantError(
                f"the run {how} after {self.seconds:.0f} s; its last lines:\n"
                + "\n".join(lines[-_SHOWN_LINES:])
            )

    def require_gone(self) -> None:
        """Wait until no process of the run is left.

        Raises:
            BrokenInvariantError: Some are; they are named.
        """
        until = time.monotonic() + _LEAVE_S
        while left := self.processes():
            if time.monotonic() > until:
                names = ", ".join(f"{one.pid} {one.name()}" for one in left)
                raise BrokenInvariantError(
                    f"{_LEAVE_S:.0f} s after its driver ended the run still has processes: {names}"
                )
            time.sleep(_POLL_S)


def _named(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"
