"""The training loop: full precision first, then quantized from it, each run in its own folder."""

import contextlib
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from nadaptor._checks import check_local
from nadaptor._files import check_writable, hold
from nadaptor._files.card import first_difference
from nadaptor.checkpoints.checkpoint import load_checkpoint, save_checkpoint, versions
from nadaptor.checkpoints.snapshots import Snapshot, Snapshots, setting_of
from nadaptor.configs.config import Config, from_json, to_json
from nadaptor.configs.named import INHERITED, parent_of
from nadaptor.data.registry import open_split
from nadaptor.data.source import check_identity
from nadaptor.evaluation.accuracy import ann_accuracy
from nadaptor.parallel import agree, start_processes
from nadaptor.training.feed import open_feed
from nadaptor.training.logs import Log, Pace
from nadaptor.training.monitor import EMPTY, Tally, add_step, epoch_row, restore_tally, verdict
from nadaptor.training.options import DEFAULT, ENDLESS, Deadline, Options
from nadaptor.training.run import Run, first_state, open_run, read_weights, state_shape
from nadaptor.training.signals import told_to_end
from nadaptor.training.state import TrainState


class Evaluation(NamedTuple):
    """The accuracy of a trained network on test images, and what was measured."""

    accuracy: float  # fraction of the images, 0 to 1
    config: Config
    num_images: int
    weights: Path

    def __str__(self) -> str:
        """The measurement in words, but for its result."""
        network = f"{self.config.network.model} with {self.config.quantizer.activation}"
        data = f"{self.num_images} test images of {self.config.data.dataset}"
        return f"{network}, weights of {self.weights}, on {data}, noise off"


def train(config: Config, workdir: Path, options: Options = DEFAULT) -> Path:
    """Trains a network, after the full-precision network that it starts from.

    The run is the folder `workdir/config.name`, with `metrics.csv`, `metrics.jsonl`, `snapshots`
    and, once it is finished, `checkpoint`. A finished run is not repeated; as a parent it serves
    any number of runs. A run that was cut off goes on from its last good snapshot, and ends as if
    it had never been.

    Args:
        config: the run.
        workdir: folder of runs; of several processes, one that all of them see.
        options: where to read and run, and `init_from`.

    Returns:
        The folder of the run's checkpoint.

    Raises:
        ValueError: a name is unknown, a value or a file is bad, or the folder holds a run of
            another config or data set; the message names the field that differs.
        RunError: the loss is not finite, or diverges; the last good snapshot is kept.
        OutOfTimeError: the minutes of `options` are over; the message says what is saved.
        Interrupted: SIGTERM, SIGINT or SIGHUP came; the message says what is saved.
    """
    check_local(workdir, "workdir")
    # Before anything else uses jax: afterwards it cannot connect processes.
    start_processes(options.coordinator, options.num_processes, options.process_id)
    return _train(config, workdir, options, Deadline(options.max_minutes))


def evaluate(config: Config, workdir: Path, options: Options = DEFAULT) -> Evaluation:
    """Measures a network on the test set, noise off.

    Args:
        config: of the network.
        workdir: folder of runs; the finished run of that name is measured where `options` names no
            file of weights.
        options: where to read and run.

    Returns:
        The accuracy, and what was measured.

    Raises:
        ValueError: as `train`, or the run is not finished.
    """
    run, trained_on = open_run(config, options), None
    if options.init_from:
        origin, (weights, _) = options.init_from, read_weights(run, options.init_from)
        variables = first_state(run, weights).variables
    else:
        origin = workdir / config.name / "checkpoint"
        variables, card = load_checkpoint(origin, "ann")
        _check_config(origin, card, config, to_json(config))
        trained_on = card.get("data")
    test = open_split(config.data, "test", options.data_dir, known=trained_on)
    accuracy = ann_accuracy(run.model, variables, test, devices=run.devices)
    return Evaluation(accuracy, config, test.size, origin)


def fit(
    run: Run, folder: Path, snapshots: Snapshots, start: Snapshot, deadline: Deadline = ENDLESS
) -> tuple[Any, dict[str, float]]:
    """Runs the epochs of one config that are still to run.

    Args:
        run: the run.
        folder: where the metrics go.
        snapshots: of the run.
        start: the state to go on from, and what was measured until then.
        deadline: when to end at a snapshot.

    Returns:
        The variables to hand on, on the host, and the row of metrics of the epoch they are from.

    Raises:
        RunError: the loss is not finite, or diverges.
        Interrupted: a signal came; the message says what is saved.
        OutOfTimeError: so does its message.
    """
    config, devices = run.config, run.devices
    tally, rows = restore_tally(start.card)
    waiting, rate, pace = deque(), 0.0, Pace(config.step.batch_size)
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(_log(run, folder, start.step))
        told = stack.enter_context(told_to_end(devices.process_count, deadline))
        feed = stack.enter_context(open_feed(run, start.step))
        state = feed.replicate(start.state)
        log.compiles()
        for call, span in enumerate(feed.spans):
            state, metrics = feed.advance(state, span)
            waiting.append((span, metrics))
            if call == 0:
                pace.compiled(len(span))
            done, ended = span.stop, told(call)
            epoch_ends = done % run.epoch_steps == 0
            # Without snapshot_steps the remainder, by done + 1, is never 0.
            snapshot = epoch_ends or ended or done % (run.options.snapshot_steps or done + 1) == 0
            # Metrics are fetched some steps late, and all of them for a snapshot's tally.
            while len(waiting) >= (1 if snapshot else devices.in_flight):
                for step, loss, accuracy in _fetch(*waiting.popleft()):
                    tally = add_step(tally, step, loss, accuracy, run.images.spec.num_classes)
                    rate, known = pace.step()
                    shown = rate if known else None
                    log.step(step, loss, accuracy, shown, config.step.batch_size)
            if epoch_ends:
                variables = jax.device_get(state.variables)
                accuracy = ann_accuracy(run.model, variables, run.validation, devices=devices)
                rows.append(epoch_row(tally, done, rate, accuracy))
                log.epoch(rows)
                # A loss that diverges is counted over the ends of epochs.
                tally = EMPTY._replace(high_since=tally.high_since)
                pace.restart()
            # While the loss is far above guessing, the last good snapshot stays the newest.
            if snapshot and tally.high_since < 0:
                snapshots.save(done, state, _progress(tally, rows, start.card.get("parent")))
            # A run that is told to end at its very last step is finished.
            if ended and done < run.total_steps:
                raise told.error(_what_is_saved(done, snapshots.last_on_disk()))
        return _result(run, snapshots, state, rows)


def _train(config: Config, workdir: Path, options: Options, deadline: Deadline) -> Path:
    # Bad input shows before the parent is trained and a folder is made.
    folder = workdir / config.name
    run = open_run(config, options, before=_devices_before(folder))
    parent_of(config)
    agree(_asked(run))
    with contextlib.ExitStack() as held:
        # The processes of a run share the lock of the first.
        if run.devices.process_index == 0:
            check_writable(workdir)
            held.enter_context(hold(folder))
        if (folder / "checkpoint").exists():
            return _finished(folder / "checkpoint", run, config, to_json(config))
        return _go_on(run, workdir, folder, deadline)


def _go_on(run: Run, workdir: Path, folder: Path, deadline: Deadline) -> Path:
    """Trains what is still to be trained, from the last snapshot, the parent or the beginning."""
    config, options, checkpoint = run.config, run.options, folder / "checkpoint"
    # The folder is made once the parent is trained, and is empty where the run was killed soon: the
    # parent may be another one by now.
    begun = any((folder / "snapshots").glob("[0-9]*"))
    parent = None if begun else parent_of(config)
    if parent and not options.init_from:
        _train_parent(run, parent, workdir, deadline)
    said = {**run.card, "setting": _setting(run)}
    with contextlib.closing(Snapshots(folder / "snapshots", options.keep, said)) as snapshots:
        start = snapshots.latest(state_shape(run)) or _begin(run, workdir)
        agree({"the step to go on from": start.step})
        if run.devices.process_index == 0:
            print(f"{config.name}: {_where_it_starts(run, start, said)}")
        variables, metrics = fit(run, folder, snapshots, start, deadline)
    if run.devices.process_index == 0:
        card = {**said, "parent": start.card.get("parent"), "metrics": metrics}
        save_checkpoint(checkpoint, "ann", variables, card)
        measured, spec = metrics["validation_accuracy"], run.images.spec
        print(f"{config.name}: {verdict(measured, run.validation.size, spec.num_classes)}")
    return checkpoint


def _setting(run: Run) -> dict[str, Any]:
    """What the last bits of a run depend on beside its config and its images."""
    return {
        "platform": run.devices.local[0].platform,
        "devices": run.devices.total,
        "processes": run.devices.process_count,
        "resident": run.resident,
        "x64": jax.dtypes.canonicalize_dtype(float) == np.float64,
        **{name: version for name, version in versions().items() if name.startswith("jax")},
    }


def _devices_before(folder: Path) -> int | None:
    """The CPU devices of one process on which a run began; None where there is no such run."""
    setting = setting_of(folder / "snapshots")
    one_cpu = (setting.get("platform"), setting.get("processes")) == ("cpu", 1)
    count = setting.get("devices") if one_cpu else None
    return count if isinstance(count, int) and count > 0 else None


def _asked(run: Run) -> dict[str, Any]:
    """What all processes of a run must be asked for alike."""
    options = {
        "init_from": str(run.options.init_from),
        "new_head": run.options.new_head,
        "snapshot_steps": run.options.snapshot_steps,
        "keep": run.options.keep,
    }
    return {**to_json(run.config), **run.card["data"], **options, **_setting(run), **versions()}


def _where_it_starts(run: Run, start: Snapshot, said: Mapping[str, Any]) -> str:
    """From which step a run goes on, and what there differs from the place it comes from."""
    if not start.step:
        where = f"step 0 of {run.total_steps} on {run.devices}"
        return f"starts at {where}, because there is no snapshot"
    before, now = start.card.get("setting", {}), said["setting"]
    other = [f"{k} {before[k]}, not {now.get(k)}" for k in before if before[k] != now.get(k)]
    line = f"resumed at step {start.step} of {run.total_steps} on {run.devices}"
    if other:
        line += f"; it was with {', '.join(other)}: the last bits of the result may be others"
    return line


def _train_parent(run: Run, parent: Config, workdir: Path, deadline: Deadline) -> None:
    """Trains the full-precision network that a run starts from, unless that is done."""
    checkpoint = workdir / parent.name / "checkpoint"
    if checkpoint.exists():
        _finished(checkpoint, run, parent, INHERITED)
    else:
        _train(parent, workdir, run.options, deadline)
        # Process 0 alone writes the parent's checkpoint, which all are about to read.
        _meet(parent.name)


def _begin(run: Run, workdir: Path) -> Snapshot:
    """The start of a run, from a file, its parent or random weights."""
    weights, origin = None, None
    if run.options.init_from:
        weights, origin = read_weights(run, run.options.init_from)
    elif parent := parent_of(run.config):
        weights, card = load_checkpoint(workdir / parent.name / "checkpoint", "ann")
        origin = card["card_digest"]
    return Snapshot(0, first_state(run, weights), _progress(EMPTY, [], origin))


def _what_is_saved(done: int, on_disk: int | None) -> str:
    """What is true of a run that ends before its last step."""
    steps, all_of_them = (f"{done} steps", "which are") if done != 1 else ("1 step", "which is")
    if on_disk == done:
        return f"after {steps}, {all_of_them} saved; the same command resumes"
    if on_disk is None:
        return f"after {steps}, and none is saved; the same command starts again"
    return (
        f"after {steps}; the last that is saved is {on_disk}, from which the same command resumes"
    )


def _fetch(span: range, metrics: Any) -> Iterator[tuple[int, float, float]]:
    """Waits for the steps of a span; number, loss and accuracy of each."""
    losses, accuracies = (np.atleast_1d(x).tolist() for x in jax.device_get(metrics))
    # Of a program for several steps, the metrics may be longer than the span.
    return zip(span, losses, accuracies, strict=False)


def _log(run: Run, folder: Path, step: int) -> Log:
    silent = run.devices.process_index > 0
    board = run.options.tensorboard
    return Log(run.config.name, run.total_steps, folder, step, silent=silent, board=board)


def _progress(tally: Tally, rows: list[dict[str, float]], origin: Any) -> dict[str, Any]:
    """What a snapshot's card says beside the run's own: see `restore_tally`."""
    return {"tally": tally._asdict(), "rows": rows, "parent": origin}


def _result(
    run: Run, snapshots: Snapshots, state: TrainState, rows: list[dict[str, float]]
) -> tuple[Any, dict[str, float]]:
    """The variables that the run hands on, and their row of metrics."""
    if run.config.select == "best" and (best := snapshots.best(state_shape(run))):
        return best.state.variables, best.card["rows"][-1]
    return jax.device_get(state.variables), rows[-1]


def _meet(name: str) -> None:
    """Waits until every process is here."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def _finished(checkpoint: Path, run: Run, config: Config, fields: Iterable[str]) -> Path:
    """Returns the checkpoint of a finished run, if its images and these fields are those asked for.

    Args:
        checkpoint: of the run itself, or of its parent.
        run: what was asked for.
        config: of the checkpoint.
        fields: of the config.
    """
    # The arrays, too: a damaged network is not trained.
    _, card = load_checkpoint(checkpoint, "ann")
    _check_config(checkpoint, card, config, fields)
    check_identity(run.images, card.get("data") or {})
    print(f"{config.name}: already trained, at {checkpoint}")
    return checkpoint


def _check_config(
    checkpoint: Path, card: Mapping[str, Any], config: Config, fields: Iterable[str]
) -> None:
    # By way of a config: the card may be of a version that had other names.
    trained, wanted = to_json(from_json(card["config"])), to_json(config)
    if field := first_difference(*({k: c[k] for k in fields} for c in (trained, wanted))):
        raise ValueError(
            f"{checkpoint} was trained with {field}={trained[field]!r}, not {wanted[field]!r}; "
            "choose another --workdir, or another --name"
        )
