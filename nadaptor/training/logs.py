"""The record of a run: one row of figures an epoch, on the screen, as JSON lines and as CSV."""

import importlib
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nadaptor._files import write_bytes, write_csv
from nadaptor.reports.tables import percent

LINE_SECONDS = 30


def write_metrics(folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes all rows so far to `metrics.jsonl` and `metrics.csv`, each whole or not at all.

    Args:
        folder: the run's folder; made where it is missing.
        rows: at least one, all of the same columns.
    """
    # Anew each time, not appended: epochs that a resumed run does again would stand there twice.
    write_bytes(folder / "metrics.jsonl", "".join(json.dumps(r) + "\n" for r in rows).encode())
    write_csv(folder / "metrics.csv", rows)


class Pace:
    """Images a second since the last validation, without the time in which a run compiles.

    Args:
        batch_size: images of a step.
    """

    def __init__(self, batch_size: int) -> None:
        """Starts the clock."""
        self._batch_size = batch_size
        self.restart()

    def restart(self) -> None:
        """Starts it again, behind a validation."""
        self._began = self._counted_from = time.perf_counter()
        self._steps = self._left_out = 0

    def compiled(self, steps: int) -> None:
        """Leaves out what a first call has taken, and its steps: it returns once it is compiled."""
        self._counted_from, self._left_out = time.perf_counter(), steps

    def step(self) -> tuple[float, bool]:
        """Counts a step that is done; the rate, and whether it is without the compilation."""
        now, self._steps = time.perf_counter(), self._steps + 1
        if counted := max(0, self._steps - self._left_out):
            return counted * self._batch_size / (now - self._counted_from), True
        return self._steps * self._batch_size / (now - self._began), False


class Log:
    """The screen and the files of a run under way; silent on all processes but the first.

    Args:
        label: name of the run.
        total_steps: updates in all.
        folder: where the files go.
        step: updates done before.
        silent: neither shows nor writes anything.
        board: whether to write TensorBoard files, too.

    Raises:
        ValueError: `board` without the package tensorboardX.
    """

    def __init__(
        self, label: str, total_steps: int, folder: Path, step: int, *, silent: bool, board: bool
    ) -> None:
        """Starts the bar of progress, or its line where there is no terminal."""
        from tqdm import tqdm

        self._label, self._total, self._folder = label, total_steps, folder
        self._silent, self._terminal = silent, sys.stderr.isatty()
        self._shown = time.monotonic()
        bar = {"desc": label, "total": total_steps, "initial": step, "unit": "step"}
        self._bar = tqdm(**bar, disable=silent or not self._terminal, leave=False)
        self._board = _tensorboard(folder) if board and not silent else None

    def __enter__(self) -> "Log":
        """Returns itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Removes the bar, and closes the files."""
        self._bar.close()
        if self._board:
            self._board.close()

    def compiles(self) -> None:
        """Says that the step is compiled: on a CPU that of a large network takes minutes."""
        if not self._silent:
            self._bar.clear()
            print(f"{self._label}: compiling the step", file=sys.stderr, flush=True)

    def step(self, step: int, loss: float, accuracy: float, rate: float | None, batch: int) -> None:
        """Shows one step: at once on a terminal, and every half minute as a line elsewhere.

        Args:
            step: its number, from 0.
            loss: of its batch.
            accuracy: of its batch, a fraction.
            rate: images a second; None while that is not known.
            batch: images of a step.
        """
        text, left = f"loss {loss:.4f}, accuracy {percent(accuracy)}", ""
        if rate is not None:
            text += f", {rate:.1f} images/s"
            # Without the validations still to come, which the rate leaves out as well.
            left = f", {(self._total - step - 1) * batch / rate:.0f} s left"
        self._bar.set_postfix_str(text, refresh=False)
        self._bar.update()
        if self._silent or self._terminal or time.monotonic() - self._shown < LINE_SECONDS:
            return
        self._shown = time.monotonic()
        of = f"{self._label}: step {step + 1} of {self._total}"
        print(f"{of}, {text}{left}", file=sys.stderr, flush=True)

    def epoch(self, rows: Sequence[Mapping[str, float]]) -> None:
        """Writes the rows so far."""
        if self._silent:
            return
        write_metrics(self._folder, rows)
        if self._board is None:
            return
        for name, value in rows[-1].items():
            self._board.add_scalar(name, value, rows[-1]["step"])


def _tensorboard(folder: Path) -> Any:
    try:
        writer = importlib.import_module("tensorboardX").SummaryWriter
    except ImportError as error:
        raise ValueError("--tensorboard needs a package: pip install tensorboardX") from error
    return writer(str(folder / "tensorboard"))
