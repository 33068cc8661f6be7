"""What a training run is asked for beside its config."""

import dataclasses
import time
from pathlib import Path

from nadaptor.errors import OutOfTimeError
from nadaptor.parallel import NumDevices


@dataclasses.dataclass(frozen=True)
class Options:
    """Where a run reads, runs and writes; its first weights, where they come from a file."""

    # Folder of data sets; by default the environment's NADAPTOR_DATA_DIR.
    data_dir: Path | None = None
    # File of torch-layout weights to start from, in place of the config's parent.
    init_from: Path | None = None
    # Start a new last layer: the file's is of other classes.
    new_head: bool = False
    # Train nothing: print the accuracy on the test set.
    evaluate_only: bool = False
    # Train nothing: compile a step, and print what it costs.
    dry_run: bool = False
    # Steps between snapshots; by default one at the end of each epoch, as there is in any case.
    snapshot_steps: int | None = None
    # Minutes after which to end at a snapshot, to go on elsewhere; by default no end. Compiling
    # counts; what is done between two steps, as a validation, is not cut.
    max_minutes: float | None = None
    # Latest snapshots to keep, beside the best.
    keep: int = 2
    # Have the training images on the devices, and all steps until the next snapshot run as one
    # program; by default on accelerators, where the images lie in memory and the host crops none.
    # On CPU the steps are slower so.
    resident: bool | None = None
    # Devices of this process; by default all accelerators. "auto": on a CPU as many of jax's
    # devices as divide the batch, or those on which the run began. It is what the commands choose,
    # with a CPU device per core, unless XLA_FLAGS say how many there are; otherwise one CPU.
    num_devices: NumDevices = None
    # HOST:PORT of process 0 of several, or "auto" on TPU pods and under SLURM.
    coordinator: str | None = None
    # Processes of the run.
    num_processes: int | None = None
    # Which of them this is, from 0.
    process_id: int | None = None
    # Write TensorBoard files, too; needs the package tensorboardX.
    tensorboard: bool = False


class Deadline:
    """When the minutes that a command was given are over, from the moment this is made."""

    def __init__(self, minutes: float | None) -> None:
        """Takes the minutes; None for no end.

        Raises:
            ValueError: they are not positive.
        """
        if minutes is not None and not 0 < minutes < float("inf"):
            raise ValueError(f"max_minutes must be positive, not {minutes!r}")
        # Not by the time of day, which may be set while a run goes on.
        self._end = None if minutes is None else time.monotonic() + 60 * minutes

    def minutes_left(self) -> float | None:
        """Returns what is left, above 0; None where there is no end.

        Raises:
            OutOfTimeError: nothing is.
        """
        if self._end is None:
            return None
        if self.over():
            raise OutOfTimeError("the minutes are over; the same command goes on")
        return (self._end - time.monotonic()) / 60

    def over(self) -> bool:
        """Whether nothing is left."""
        return self._end is not None and time.monotonic() >= self._end


DEFAULT = Options()
ENDLESS = Deadline(None)
