"""A child process with a budget: whatever it does, this process goes on, in time and with what it printed."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

_TAIL = 4000  # characters of what a child printed that are worth keeping
_POLL = 0.05
_PR_SET_PDEATHSIG = 1  # from <linux/prctl.h>


def _own_group_that_dies_with_us() -> None:
    """Between fork and exec: a group to be killed whole, and an end with the parent's, even if that is SIGKILL."""
    os.setpgid(0, 0)
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


class Child:
    """A running command.

    Args:
        command: program and arguments.
        log: where its output goes, both streams; appended to.
        cwd: its working directory.
        environment: variables set for it beside this process's own.
    """

    def __init__(
        self, command: Sequence[str], log: Path, cwd: Path, environment: Mapping[str, str] | None = None
    ) -> None:
        self.began = time.monotonic()
        self._late: float | None = None
        self._log = log
        self._log_start = log.stat().st_size if log.exists() else 0
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                list(command),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=cwd,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **(environment or {})},
                preexec_fn=_own_group_that_dies_with_us,
            )

    def status(self) -> int | None:
        """The exit status, negative for a signal; None while it runs."""
        return self._process.poll()

    def seconds(self) -> float:
        return time.monotonic() - self.began

    def kill(self) -> None:
        """Ends it and whatever it started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            # A process in an uninterruptible call into the driver may stay; it must not hold this one up.
            self._process.wait(timeout=5)

    def wait(self, budget: float) -> bool:
        """Until it ends, or is killed because its budget is spent; whether it ended by itself."""
        try:
            while self.status() is None:
                if self.seconds() > budget:
                    self._late = self.seconds()
                    self.kill()
                    return False
                time.sleep(_POLL)
            return True
        except BaseException:
            self.kill()
            raise

    def how_it_ended(self) -> str:
        """For a reader: its exit status, its signal, or the budget that it overran."""
        return how_it_ended(self.status()) if self._late is None else f"not done within {self._late:.0f} s"

    def output(self) -> str:
        """What this command printed so far."""
        with self._log.open("rb") as log:
            log.seek(self._log_start)
            return log.read().decode(errors="replace")

    def tail(self) -> str:
        return self.output()[-_TAIL:].strip()

    def last_line(self) -> str:
        """Where a Python that failed says of what."""
        return (self.tail().splitlines() or ["it printed nothing"])[-1][:300]


def how_it_ended(status: int | None) -> str:
    if status is None:
        return "does not end even when killed"
    if status < 0:
        try:
            return f"killed by {signal.Signals(-status).name}"
        except ValueError:
            return f"killed by signal {-status}"
    return f"exit status {status}"
