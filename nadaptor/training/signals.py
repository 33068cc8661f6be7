"""How a run is told to end: by SIGTERM, by Ctrl-C, by a terminal that closes, by the time.

All of them end it at the next step, with a snapshot. Before the first step is done nothing is lost
by ending at once, and a compilation, which Python's handlers wait for, may last for minutes: a
thread ends the program then. Ctrl-C alone waits for that step, for the program may be a notebook;
a second one ends it at once.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from nadaptor.errors import ENDING, Interrupted, OutOfTimeError
from nadaptor.training.options import ENDLESS, Deadline

_NOTHING_LOST = "told to end before its first step was done; the same command resumes"


class Told:
    """Whether a run was told to end, and by what; to be asked at every step."""

    def __init__(
        self, agreed: Callable[[int], bool] | None = None, deadline: Deadline = ENDLESS
    ) -> None:
        """Takes how several processes agree on the step to end at, and when it is time."""
        # Of several processes jax handles SIGTERM itself, and `handle` does not hear of it.
        self.number: int = signal.SIGTERM
        self._came = self._began = self._signalled = False
        self._agreed, self._deadline = agreed, deadline

    def __call__(self, call: int) -> bool:
        """Returns whether to end after this step; to be called with 0, 1, 2, ..."""
        self._began = True
        if self._deadline.over() and not self._came:
            self._came = True
            if self._agreed:
                # As a signal, for jax to agree with the other processes on a step.
                os.kill(os.getpid(), signal.SIGTERM)
        return self._agreed(call) if self._agreed else self._came

    def error(self, saved: str) -> Exception:
        """Returns what to raise at the end: a signal counts before a time that is over, too.

        Args:
            saved: after how many steps, and what is saved.
        """
        if self._deadline.over() and not self._signalled:
            return OutOfTimeError(f"the minutes ran out {saved}")
        if self._agreed and not self._came:
            # jax does not say which: to all processes it is a step to end at.
            return Interrupted(f"this process or another was told to end {saved}", self.number)
        return Interrupted(f"told to end {saved}", self.number)

    def handle(self, number: int, _: Any = None) -> None:
        """Notes a signal, as its handler."""
        self.number, self._came, self._signalled = number, True, True
        if self._agreed and number != signal.SIGTERM:
            # jax's own handler of SIGTERM lets all processes end at one step.
            os.kill(os.getpid(), signal.SIGTERM)

    def watch(self, reads: int) -> None:
        """Reads the signals' numbers as they come, also while the main thread compiles."""
        came = 0
        while number := os.read(reads, 1):
            # Signals of other handlers in Python come through the pipe as well.
            came += number[0] in ENDING
            again = number[0] == signal.SIGINT and came > 1
            if again or (number[0] in ENDING and number[0] != signal.SIGINT and not self._began):
                what = "told to end twice" if again else _NOTHING_LOST
                print(f"{Path(sys.argv[0]).name}: {what}", file=sys.stderr, flush=True)
                # sys.exit would end this thread alone.
                os._exit(128 + number[0])


@contextlib.contextmanager
def told_to_end(process_count: int, deadline: Deadline = ENDLESS) -> Iterator[Told]:
    """Yields what says whether a signal has come, on all processes alike.

    Only the main thread may set handlers; in another one a run is never told.

    Args:
        process_count: of the run.
        deadline: of the run, as a signal that comes at its end: where the processes of a run
            disagree on the time, all end with the first.
    """
    told = Told(_agreement() if process_count > 1 else None, deadline)
    if threading.current_thread() is not threading.main_thread():
        yield told
        return
    # A signal that is ignored, as SIGHUP is under nohup, stays so.
    taken = [s for s in ENDING if signal.getsignal(s) is not signal.SIG_IGN]
    if process_count > 1:
        # jax has a handler of its own, by which the processes agree on a step.
        taken = [s for s in taken if s != signal.SIGTERM]
    before = {number: signal.signal(number, told.handle) for number in taken}
    reads, writes = os.pipe()
    # As set_wakeup_fd demands: what writes is the handler of a signal.
    os.set_blocking(writes, False)
    woken = signal.set_wakeup_fd(writes, warn_on_full_buffer=False)
    watcher = threading.Thread(target=told.watch, args=(reads,), daemon=True)
    watcher.start()
    try:
        yield told
    finally:
        signal.set_wakeup_fd(woken)
        for number, handler in before.items():
            signal.signal(number, handler)
        # Only now, when no signal writes there any more: the watcher reads the end, and returns.
        os.close(writes)
        watcher.join()
        os.close(reads)


def _agreement() -> Callable[[int], bool]:
    from jax.experimental import multihost_utils

    return multihost_utils.reached_preemption_sync_point
