"""What a training run is asked for beside its config."""

import dataclasses
from pathlib import Path


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
    # Latest snapshots to keep, beside the best.
    keep: int = 2
    # Have the training images on the devices, and all steps until the next snapshot run as one
    # program; by default on accelerators, where the images lie in memory and the host crops none.
    # On CPU the steps are slower so.
    resident: bool | None = None
    # Devices of this process; by default all accelerators, or one CPU.
    num_devices: int | None = None
    # HOST:PORT of process 0 of several, or "auto" on TPU pods and under SLURM.
    coordinator: str | None = None
    # Processes of the run.
    num_processes: int | None = None
    # Which of them this is, from 0.
    process_id: int | None = None
    # Write TensorBoard files, too; needs the package tensorboardX.
    tensorboard: bool = False


DEFAULT = Options()
