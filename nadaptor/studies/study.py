"""The study: methods, levels, seeds, corrections and fields of the config as a grid of cells.

A cell is one trained network simulated with one correction, and one small file. Each is written
whole or not at all, so that a study that was stopped goes on where it was, and one that is extended
keeps what it has; the table, the CSV file and the plots are made from the cells.
"""

import dataclasses
import itertools
import json
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from nadaptor._checks import check_count
from nadaptor._files import check_writable, hold, read_small, write_json
from nadaptor._files.card import DamagedError, fields_of, seal, unseal
from nadaptor._provenance import provenance
from nadaptor.configs.config import Config, Dtype, replace, to_json, today
from nadaptor.configs.inference import CorrectionName, get_inference
from nadaptor.configs.named import INHERITED, get_config
from nadaptor.errors import HeldError, PassingError, RunError
from nadaptor.evaluation.report import SplitToMeasure
from nadaptor.studies.measure import measure
from nadaptor.studies.variants import FIXED_LEVELS, METHODS, Method
from nadaptor.training.options import DEFAULT, Deadline, Options

# Fields of a study that a cell's figures depend on, beside its config.
SETTINGS = ("num_steps", "correction_steps", "split", "num_images")
# Fields of a study that are put in place of its config's, and those that are axes of its grid.
CHANGED = ("image_size", "dtype")
AXES = ("model", "width", "train_size", "learning_rate", "epochs")
# Between two looks at a cell that another process holds.
POLL_SECONDS = 1.0
Cells = Mapping["Cell", Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Study:
    """What to compare."""

    # What to train with: activations, and variants of them.
    methods: tuple[Method, ...] = (
        "lsq",
        "noise_adaptor",
        "qcfs",
        "slip_relu",
        "ttrbr",
        "clipped_relu",
    )
    # p; ttrbr and clipped_relu have theirs fixed.
    levels: tuple[int, ...] = (1, 2, 4)
    # How many seeds: 0, 1, ...
    seeds: int = 5
    # Corrections at inference; one simulation each.
    corrections: tuple[CorrectionName, ...] = ("none", "negative-spikes", "offset-spikes", "srp")
    # Named config that all runs share but for activation, levels and seed.
    config: str = "digits_lsq"
    # Networks, where it is not the config's; one or more, as of the next four.
    model: tuple[str, ...] = ()
    # Features of its first stage, where they are not the config's.
    width: tuple[int, ...] = ()
    # Passes over the training images, where they are not the config's; the parent's stay.
    epochs: tuple[int, ...] = ()
    # Learning rate of the first update, where it is not the config's.
    learning_rate: tuple[float, ...] = ()
    # Training images, where they are not the config's.
    train_size: tuple[int, ...] = ()
    # Pixels per side of an image, where they are not the config's.
    image_size: int | None = None
    # Type of the computation, where it is not the config's; parents keep theirs.
    dtype: Dtype | None = None
    # T, time steps of each simulation.
    num_steps: int = 32
    # Steps that offset spikes (rho) and SRP (tau) spend before the T that count.
    correction_steps: int = 4
    # Images to measure on; the test set is for final figures, not for choices.
    split: SplitToMeasure = "validation"
    # First images of the split to measure on; None for all.
    num_images: int | None = None

    @property
    def reported_steps(self) -> list[int]:
        """The time steps of its tables: powers of 2, and the last."""
        powers = {2**k for k in range(self.num_steps.bit_length())}
        return sorted(powers | {self.num_steps})


class Network(NamedTuple):
    """One network to train, for each seed."""

    method: Method
    levels: int
    values: tuple[tuple[str, Any], ...] = ()  # of the study's axes, by their names

    @property
    def name(self) -> str:
        """Its name in tables and folders."""
        known = self.method in FIXED_LEVELS
        quantizer = self.method if known else f"{self.method}_p{self.levels}"
        return f"{quantizer}{_suffix(self.values)}"


class Cell(NamedTuple):
    """One measurement of the study."""

    network: Network
    correction: CorrectionName
    seed: int

    @property
    def folder(self) -> str:
        """Folder of its run: networks in one start from one parent."""
        return f"seed{self.seed}{_suffix(v for v in self.network.values if v[0] in INHERITED)}"


def _suffix(values: Iterable[tuple[str, Any]]) -> str:
    # The name of a model says what it is, and a bare number does not.
    return "".join(f"-{v if isinstance(v, str) else f'{name}{v}'}" for name, v in values)


def run_study(study: Study, workdir: Path, options: Options = DEFAULT, first: float = 0.0) -> Cells:
    """Trains, converts and simulates all of a study that is not there yet.

    Any number of processes that see one folder share a study: each takes a cell that no other
    holds, and whichever is killed, its cell is free again. All return once all cells are there.

    Args:
        study: what to compare.
        workdir: folder of the runs, `seedN/NETWORK`, and of `cells`; N has the model, width and
            number of training images behind it where they are axes.
        options: where each run reads and runs, and the file of weights it starts from.
        first: which of the cells to begin with, as a fraction of all: workers that begin together
            with one network would all compile the same programs.

    Returns:
        Each cell's measurement: `ann` and `ann_noisy`, accuracy of the quantized network with the
        noise off and on (None where it cannot have any); `accuracy`, the spiking
        network's at t = 1 to T; `training_accuracy`, of the network without noise on training
        images; `total_steps`, with those of the correction; `num_images`; or
        `failed`, why there is none; and `made`, as `provenance` gives it. Accuracies are fractions,
        0 to 1.

    Raises:
        ValueError: a name or count is out of range, or `workdir` holds cells of other settings.
        OutOfTimeError: the minutes of `options` are over; the same command goes on.
    """
    check_writable(workdir)
    for count, name in ((study.seeds, "seeds"), (study.num_steps, "num_steps")):
        check_count(count, name)
    deadline = Deadline(options.max_minutes)
    cells, said = list(cells_of(study)), set[Cell]()
    begin = int(first * len(cells))
    waiting = cells[begin:] + cells[:begin]
    while waiting := [c for c in waiting if not _make(c, study, workdir, options, deadline, said)]:
        # Others hold these, or a network or parent of theirs.
        time.sleep(POLL_SECONDS)
    # From their files, because another process may have measured them.
    return {cell: _read(_path(workdir, study.split, cell), cell, study) for cell in cells}


def _make(
    cell: Cell,
    study: Study,
    workdir: Path,
    options: Options,
    deadline: Deadline,
    said: set[Cell],
) -> bool:
    """Measures a cell unless it is there; False where another process is at it.

    `said` is of the cells that were named: one whose parent another process trains comes again.
    """
    path = _path(workdir, study.split, cell)
    try:
        with hold(path):
            # Asked under the lock: another process may have just measured it.
            if not _is_measured(path, cell, study):
                if cell not in said:
                    print(f"{cell.network.name}, {cell.correction}, seed {cell.seed}")
                    said.add(cell)
                settings = _settings(cell, study)
                # Raises where none are left, before a run is begun.
                left = dataclasses.replace(options, max_minutes=deadline.minutes_left())
                measured = _measure(cell, study, workdir, left)
                write_json(path, seal({"settings": settings, "made": provenance(), **measured}))
    except HeldError:
        return False
    return True


def cells_of(study: Study) -> Iterator[Cell]:
    """Yields the cells of a study, seed by seed.

    Example:
        >>> cells = cells_of(Study(methods=("lsq", "ttrbr"), levels=(1, 2), seeds=1))
        >>> sorted({cell.network.name for cell in cells})
        ['lsq_p1', 'lsq_p2', 'ttrbr']
    """
    for seed in range(study.seeds):
        yield from (Cell(network, correction, seed) for network, correction in lines_of(study))


def networks_of(study: Study) -> list[Network]:
    """Returns the networks to train for each seed.

    Example:
        >>> study = Study(methods=("lsq", "noise_adaptor"), levels=(2,), epochs=(3, 30))
        >>> [network.name for network in networks_of(study)][:3]
        ['lsq_p2-epochs3', 'noise_adaptor_p2-epochs3', 'lsq_p2-epochs30']
    """
    axes = [[(axis, v) for v in values] for axis in AXES if (values := getattr(study, axis))]
    return [
        Network(method, levels, values)
        for values in itertools.product(*axes)
        for method in study.methods
        for levels in ([FIXED_LEVELS[method]] if method in FIXED_LEVELS else study.levels)
    ]


def lines_of(study: Study) -> list[tuple[Network, CorrectionName]]:
    """Returns the lines of the table: each has a cell for every seed."""
    return list(itertools.product(networks_of(study), study.corrections))


def _measure(cell: Cell, study: Study, workdir: Path, options: Options) -> dict[str, Any]:
    """Trains and converts where that is still to be done, and simulates."""
    inference = get_inference(cell.correction, study.correction_steps)
    try:
        report = measure(
            config_of(cell, study),
            workdir / cell.folder,
            options,
            num_steps=study.num_steps,
            split=study.split,
            inference=inference,
            num_images=study.num_images,
        )
    # A full disk or a held lock is no result of a network: the cell is to be tried again.
    except PassingError:
        raise
    except RunError as error:
        return {"failed": str(error)}
    kept = ("ann_noisy", "training_accuracy", "accuracy", "total_steps", "num_images")
    return {"ann": report["ann_deterministic"], **{name: report[name] for name in kept}}


def config_of(cell: Cell, study: Study) -> Config:
    """Returns the config that a cell's network is trained with."""
    config = get_config(study.config)
    return replace(
        config,
        name=cell.network.name,
        # A variant names its activation itself.
        **{"activation": cell.network.method, **METHODS.get(cell.network.method, {})},
        levels=cell.network.levels,
        seed=cell.seed,
        **{name: value for name in CHANGED if (value := getattr(study, name)) is not None},
        **dict(cell.network.values),
    )


def _path(workdir: Path, split: str, cell: Cell) -> Path:
    return workdir / "cells" / split / f"{cell.network.name}-{cell.correction}-seed{cell.seed}.json"


def _settings(cell: Cell, study: Study) -> dict[str, Any]:
    """All that a cell's figures depend on."""
    of_study = {name: getattr(study, name) for name in SETTINGS}
    return {**of_study, "config": to_json(config_of(cell, study))}


@dataclasses.dataclass(frozen=True)
class _Measured:
    """What a cell holds; the figures are missing where the run failed."""

    settings: dict[str, Any]
    made: dict[str, str]
    failed: str | None = None
    ann: float | None = None
    ann_noisy: float | None = None
    training_accuracy: float | None = None
    accuracy: list[float] | None = None
    total_steps: int | None = None
    num_images: int | None = None


def _is_measured(path: Path, cell: Cell, study: Study) -> bool:
    """Whether a cell is there and what was written; a damaged one is measured again."""
    if not path.exists():
        return False
    try:
        _read(path, cell, study)
    except DamagedError as error:
        print(f"{error}; it is measured again")
        return False
    return True


def _read(path: Path, cell: Cell, study: Study) -> dict[str, Any]:
    try:
        found = unseal(json.loads(read_small(path)))
        fields_of(_Measured, found)
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedError(f"{path} is damaged: {' '.join(str(error).split())}") from error
    wanted, settings = _settings(cell, study), found["settings"]
    # A cell of an older version may have other names of fields.
    settings = {**settings, "config": today(settings.get("config", {}))}
    if settings != wanted:
        names = [name for name, value in wanted.items() if settings.get(name) != value]
        raise ValueError(
            f"{path} was measured with another {', '.join(names)}; choose another workdir"
        )
    return found
