"""A command of several processes, watched: where it loses the others it ends in one line.

A process that loses the others inside a collective gets an error, and says so. Outside of one,
while it compiles or reads images, a thread of jax finds out, and ends it by SIGABRT and a page of
words. No handler can stop that; so the command runs as a child of one that only waits, hands
signals on, and says in one line what came of it.
"""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import IO

from nadaptor.errors import ENDING
from nadaptor.parallel.cores import end_with_parent

# In its environment, a child finds that it is one.
_CHILD = "NADAPTOR_SUPERVISED"
# What the words of a process say that aborts because it has lost the others.
_LOST = re.compile(rb"(?i)distributed service|gloo|coordination|rendezvous|collective|heartbeat")
# What comes before an abort: it is held back until it is clear how the process ends.
_WORDS = re.compile(rb"[EW]\d{4} .*(coordination_service|preemption_sync|client\.h)")
# After these it ends for certain, which on a busy machine takes long.
_FATAL = re.compile(rb"F\d{4} |terminate called|\*\*\* Check failure|Fatal Python error")
# What is no error: how many processes Gloo has found, and that a compilation takes minutes.
_IDLE = re.compile(rb"\[Gloo\] Rank|E\d{4} .*slow_operation_alarm|\*{32}$|\[Compiling module |\n")
# What a process outlives by so long did not end it, and is passed on.
_HELD_SECONDS = 10


def is_to_be_supervised(words: Sequence[str]) -> bool:
    """Says whether a command is one of several processes, and is not watched already."""
    asked = any(word.partition("=")[0] == "--coordinator" for word in words)
    return asked and _CHILD not in os.environ


def own_command(words: Sequence[str]) -> list[str] | None:
    """Returns what starts this program again, or None where another program calls a command.

    Args:
        words: what follows the command's name.
    """
    # That other program would be started again.
    if sys.orig_argv[len(sys.orig_argv) - len(words) :] != list(words):
        return None
    # Python's own options, such as -m, are in orig_argv alone.
    return [sys.executable, *sys.orig_argv[1:]]


def supervise(command: Sequence[str], name: str) -> int:
    """Runs a command as a child, and returns its exit code: 1 where it has lost the others.

    Args:
        command: the program and its words.
        name: how the user called it, for the line.
    """
    child = subprocess.Popen(
        command,
        # No warnings of XLA, as that a signal has come; errors are shown.
        env={"TF_CPP_MIN_LOG_LEVEL": "2", **os.environ, _CHILD: "1"},
        stderr=subprocess.PIPE,
        # So that Ctrl-C reaches it once, through this process.
        start_new_session=True,
        preexec_fn=end_with_parent if sys.platform == "linux" else None,
    )
    for number in ENDING:
        # One that is ignored, as SIGHUP is under nohup, is so in the child, too.
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda number, _: child.send_signal(number))
    assert child.stderr is not None
    with child:
        held = _pass_on(child.stderr)
        code = child.wait()
    if code == -signal.SIGABRT and any(map(_LOST.search, held)):
        why = "another process of the run has ended or cannot be reached; the same command resumes"
        print(f"{name}: {why}", file=sys.stderr, flush=True)
        return 1
    _write(held)
    # Of a child that a signal ended, code is minus its number; a shell adds that to 128.
    return code if code >= 0 else 128 - code


def _pass_on(stream: IO[bytes]) -> list[bytes]:
    """Writes each line to stderr as it comes; returns those of jax's last words."""
    held: list[bytes] = []
    since, doomed = 0.0, False
    for line in stream:
        if _IDLE.match(line):
            continue
        doomed = doomed or bool(_FATAL.match(line))
        if held and not doomed and time.monotonic() - since > _HELD_SECONDS:
            _write(held)  # it lives
            held = []
        if held or doomed or _WORDS.match(line):
            since = since if held else time.monotonic()
            held.append(line)
        else:
            _write([line])
    return held


def _write(lines: Sequence[bytes]) -> None:
    sys.stderr.buffer.writelines(lines)
    sys.stderr.flush()
