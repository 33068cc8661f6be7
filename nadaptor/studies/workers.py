"""A study by several processes of one machine, each on cores of its own.

Small networks leave cores idle, and two trainings side by side are faster than one after the other
on twice the cores. The processes share the cells as those of several machines do, so that whatever
ends one of them costs nothing: its cells are free again, and what is left at the end this process
does itself. So, too, an error that a worker has met is met here again, and is raised.
"""

import contextlib
import dataclasses
import io
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import jax

from nadaptor._checks import check_count
from nadaptor.errors import ENDING, Interrupted, OutOfTimeError
from nadaptor.parallel.cores import cores, end_with_parent, use_cores, use_every_core
from nadaptor.studies.study import Cells, Study, run_study
from nadaptor.training.options import DEFAULT, Deadline, Options


class Part(NamedTuple):
    """What makes one worker another than the others."""

    number: int
    workers: int
    cores: list[int]
    settings: dict[str, Any]  # jax's


def share_study(study: Study, workdir: Path, options: Options = DEFAULT, workers: int = 1) -> Cells:
    """Does what `run_study` does, by several processes of this machine.

    They are started anew, as `multiprocessing` says: a script that calls this does so below
    `if __name__ == "__main__"`. What one prints has its number ahead of each line.

    Args:
        study: what to compare.
        workdir: folder of the runs and cells.
        options: as for `run_study`; the devices are those of each worker.
        workers: how many, each with its part of the cores; with 1 all is done in this process.

    Returns:
        As `run_study`.

    Raises:
        ValueError: as `run_study`, there are fewer cores than workers or than their devices, or
            accelerators.
        Interrupted: a signal came; the workers have said what is saved.
        OutOfTimeError: as `run_study`.
    """
    if check_count(workers, "workers") == 1:
        return run_study(study, workdir, options)
    if workers > len(cores()):
        raise ValueError(f"workers must be at most {len(cores())}, one per core, not {workers}")
    if (platform := jax.default_backend()) != "cpu":
        raise ValueError(
            f"workers share the cores of a CPU, and here is a {platform}: start the command several"
            " times, each with a device of its own"
        )
    devices, least = options.num_devices, len(cores()) // workers
    if isinstance(devices, int) and devices > least:
        raise ValueError(
            f"num_devices must be at most {least}, a worker's cores, with {workers} workers, not "
            f"{devices}"
        )
    deadline, of_all = Deadline(options.max_minutes), (study, workdir, options)
    _run([Part(n, workers, cores()[n::workers], _settings()) for n in range(workers)], of_all)
    options = dataclasses.replace(options, max_minutes=deadline.minutes_left())
    return run_study(study, workdir, options)


def _settings() -> dict[str, Any]:
    """jax's settings, as the folder of what it compiles: a process that is started has none."""
    plain = (bool, int, float, str, type(None))
    return {name: value for name, value in jax.config.values.items() if isinstance(value, plain)}


def _run(parts: Sequence[Part], of_all: tuple[Study, Path, Options]) -> None:
    """Starts a process for each part, hands signals on to them, and waits for their ends."""
    # Not by fork, which would copy a jax that is started, and not its threads.
    context, processes = multiprocessing.get_context("spawn"), list[BaseProcess]()
    with _handed_on(processes) as came:
        for part in parts:
            process = context.Process(target=_work, args=(part, *of_all))
            if not came:
                process.start()
                processes.append(process)
        for process in processes:
            process.join()
    for part, process in zip(parts, processes, strict=False):
        if process.exitcode and not came:
            print(f"worker {part.number + 1} ended with exit code {process.exitcode}")
    if came:
        raise Interrupted("told to end, and so were the workers, which say what is saved", came[0])


@contextlib.contextmanager
def _handed_on(processes: Sequence[BaseProcess]) -> Iterator[list[int]]:
    """Has signals sent to this process reach the others; yields those that came.

    Only the main thread may set handlers; in another one no signal comes.
    """
    came: list[int] = []

    def hand_on(number: int, _: object) -> None:
        came.append(number)
        for process in processes:
            if process.is_alive() and process.pid:
                os.kill(process.pid, number)

    in_main = threading.current_thread() is threading.main_thread()
    taken = [s for s in ENDING if in_main and signal.getsignal(s) is not signal.SIG_IGN]
    before = {number: signal.signal(number, hand_on) for number in taken}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _work(part: Part, study: Study, workdir: Path, options: Options) -> None:
    """What a worker does: a study, as any process that shares it."""
    # So that Ctrl-C reaches it once, through the parent.
    os.setsid()
    if sys.platform == "linux":
        end_with_parent()
    # Before jax starts its threads.
    use_cores(part.cores)
    for name, value in part.settings.items():
        if jax.config.values.get(name) != value:
            jax.config.update(name, value)
    use_every_core()
    mark = f"[{part.number + 1}] "
    with (
        contextlib.redirect_stdout(_Marked(sys.stdout, mark)),
        contextlib.redirect_stderr(_Marked(sys.stderr, mark)),
    ):
        try:
            run_study(study, workdir, options, part.number / part.workers)
        except (Interrupted, OutOfTimeError) as told:
            print(told)
        except KeyboardInterrupt:
            print("told to end; what was saved before stays")
        # Whatever it was, the parent meets it again, and says it.
        except Exception as error:
            print(f"ended by an error: {' '.join(str(error).split())}")


class _Marked(io.TextIOBase):
    """A stream whose lines begin with a mark."""

    def __init__(self, stream: TextIO, mark: str) -> None:
        self._stream, self._mark, self._line = stream, mark, ""

    def write(self, text: str) -> int:
        *lines, self._line = (self._line + text).split("\n")
        # At once, because lines of several processes meet in one place.
        self._stream.write("".join(f"{self._mark}{line}\n" for line in lines))
        self._stream.flush()
        return len(text)
