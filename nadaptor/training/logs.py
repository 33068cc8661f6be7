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

    def step(self, step: int, loss: float, accuracy: float, rate: float, batch: int) -> None:
        """Shows one step: at once on a terminal, and every half minute as a line elsewhere."""
        # In seconds, without the validations still to come, which the rate leaves out as well.
        left = (self._total - step - 1) * batch / rate
        text = f"loss {loss:.4f}, accuracy {percent(accuracy)}, {rate:.1f} images/s"
        self._bar.set_postfix_str(text, refresh=False)
        self._bar.update()
        if self._silent or self._terminal or time.monotonic() - self._shown < LINE_SECONDS:
            return
        self._shown = time.monotonic()
        of = f"{self._label}: step {step + 1} of {self._total}"
        print(f"{of}, {text}, {left:.0f} s left", file=sys.stderr, flush=True)

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
