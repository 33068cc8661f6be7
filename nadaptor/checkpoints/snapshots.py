"""Snapshots of a run under way: what it resumes from, exactly.

A snapshot is a step of an Orbax `CheckpointManager`: the state as one item, and a card as another
with the digest of every leaf, because a flipped byte restores silently otherwise. Orbax writes in
the background and renames a finished snapshot into its place. The state is replicated: it is saved
from host memory, process 0 writes it, and all processes meet at Orbax's barriers.
"""

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from nadaptor.checkpoints.checkpoint import FILE_BYTES, digests, versions
from nadaptor.errors import RunError

METRIC = "validation_accuracy"


class Snapshot(NamedTuple):
    """What was restored."""

    step: int
    state: Any
    card: dict[str, Any]


class Snapshots:
    """The snapshots in a folder: the latest ones, and the best on the validation images.

    Args:
        folder: of the snapshots.
        keep: how many of the latest to keep.
        card: what every snapshot says of its run: "config" and "data", which a resumed run must
            agree with, and what else JSON can hold.
    """

    def __init__(self, folder: Path, keep: int, card: Mapping[str, Any]) -> None:
        """Opens the folder; unfinished snapshots of a killed run are cleaned away."""
        self._folder, self._keep = folder.resolve(), keep
        self._card = {**card, "versions": versions()}
        self._manager = self._open()

    def save(
        self, step: int, state: Any, card: Mapping[str, Any], accuracy: float | None = None
    ) -> None:
        """Starts to save a snapshot, and returns when the state may be changed.

        A save that fails, on a full disk for example, is reported in a line and leaves the earlier
        snapshots as they are: the run goes on.

        Args:
            step: updates done.
            state: pytree of arrays.
            card: what the run needs beside the state, as JSON.
            accuracy: on the validation images, where it was measured at this step.

        Raises:
            RunError: the state holds a value that is not finite.
        """
        import orbax.checkpoint as ocp

        host = jax.tree.map(np.asarray, jax.device_get(state))
        check_finite(host, step)
        if not self.wait() or step in self._manager.all_steps():
            return
        full = {**self._card, **card, "digests": digests(host)}
        saved = ocp.args.PyTreeSave(_flat(host), ocdbt_target_data_file_size=FILE_BYTES)
        items = ocp.args.Composite(state=saved, card=ocp.args.JsonSave(full))
        metrics = None if accuracy is None else {METRIC: accuracy}
        try:
            self._manager.save(step, args=items, metrics=metrics, force=True)
        except Exception as error:
            self._report(error)

    def wait(self) -> bool:
        """Waits for the save under way; returns whether it is on disk, and reports if it is not."""
        try:
            self._manager.wait_until_finished()
        # The storage layer raises anything, a bare Exception included.
        except Exception as error:
            self._report(error)
            return False
        return True

    def latest(self, like: Any) -> Snapshot | None:
        """Restores the newest snapshot that is what was saved; a line for each one that is not.

        Damaged snapshots are moved aside, to the folder `damaged`.

        Args:
            like: a state of the same structure.

        Returns:
            The snapshot, leaves as NumPy arrays; None where there is none.

        Raises:
            ValueError: it is of a run with another config or data set; the message names the
                first field that differs.
            RunError: there are snapshots, and none of them can be read.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        for step in steps:
            try:
                return self._restore(step, like)
            except _Damaged as error:
                print(f"snapshot {step} skipped: {error}")
                self._move_aside(step)
        if steps:
            raise RunError(
                f"none of the {len(steps)} snapshots in {self._folder} can be read; remove the "
                "folder to start again"
            )
        return None

    def best(self, like: Any) -> Snapshot | None:
        """Restores the snapshot that was best on the validation images, the newest of equals.

        Raises:
            RunError: it is damaged.
        """
        self.wait()
        step = self._manager.best_step()
        try:
            return None if step is None else self._restore(step, like)
        except _Damaged as error:
            raise RunError(f"the best snapshot, of step {step}, is damaged: {error}") from error

    def close(self) -> None:
        """Waits for the save under way and ends the threads."""
        self.wait()
        self._manager.close()

    def _open(self) -> Any:
        import orbax.checkpoint as ocp
        from orbax.checkpoint import checkpoint_managers as policies

        logging.getLogger("absl").addFilter(_is_news)
        best = policies.BestN(
            get_metric_fn=lambda metrics: metrics[METRIC],
            n=1,
            keep_checkpoints_without_metrics=False,
        )
        latest = policies.LatestN(self._keep)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy([latest, best]),
            best_fn=lambda metrics: metrics[METRIC],
            cleanup_tmp_directories=True,
        )
        return ocp.CheckpointManager(self._folder, options=options)

    def _report(self, error: Exception) -> None:
        cause = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        print(f"a snapshot was not saved, the earlier ones are kept: {cause}")
        # The manager would count the failed snapshot among its own.
        self._manager.close()
        self._manager = self._open()

    def _restore(self, step: int, like: Any) -> Snapshot:
        import orbax.checkpoint as ocp

        items = ocp.args.Composite(state=ocp.args.PyTreeRestore(), card=ocp.args.JsonRestore())
        try:
            restored = self._manager.restore(step, args=items)
            card, flat = restored["card"], restored["state"]
            wanted = card["digests"]
        except Exception as error:
            raise _Damaged(" ".join(str(error).split())[:200] or type(error).__name__) from error
        for part in ("config", "data"):
            _check_same(card.get(part, {}), self._card.get(part, {}), self._folder)
        state = _unflat(flat, like)
        found = digests(state)
        wrong = sorted(k for k in found.keys() | wanted if found.get(k) != wanted.get(k))
        if wrong:
            raise _Damaged(f"{wrong[0]} is not what was saved ({len(wrong)} arrays in all)")
        return Snapshot(step, state, card)

    def _move_aside(self, step: int) -> None:
        if jax.process_index() == 0:
            aside = self._folder.parent / "damaged" / str(step)
            shutil.rmtree(aside, ignore_errors=True)
            aside.parent.mkdir(exist_ok=True)
            (self._folder / str(step)).rename(aside)
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            multihost_utils.sync_global_devices(f"damaged {step}")
        self._manager.reload()


def _is_news(record: logging.LogRecord) -> bool:
    """Not the warning at each snapshot between two measurements, which rightly has no accuracy."""
    return "did not provide metrics" not in record.getMessage()


class _Damaged(Exception):
    """A snapshot that cannot be used."""


def check_finite(state: Any, step: int) -> None:
    """Checks that every number of a state is finite.

    Raises:
        RunError: one is not; the message names its leaf.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        if not np.isfinite(np.asarray(leaf, np.float64) if leaf.dtype.kind == "V" else leaf).all():
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise RunError(f"{name} is not finite after {step} updates; lower the learning rate")


def _flat(state: Any) -> dict[str, np.ndarray]:
    """The leaves by position: names with "/" in them would become folders of their own."""
    return {f"{i:05}": leaf for i, leaf in enumerate(jax.tree.leaves(state))}


def _unflat(flat: Mapping[str, Any], like: Any) -> Any:
    structure = jax.tree.structure(like)
    if len(flat) != structure.num_leaves:
        raise _Damaged(f"it holds {len(flat)} arrays, not {structure.num_leaves}")
    return jax.tree.unflatten(structure, [np.asarray(flat[name]) for name in sorted(flat)])


def _check_same(saved: Mapping[str, Any], wanted: Mapping[str, Any], folder: Path) -> None:
    for field in sorted(saved.keys() | wanted.keys()):
        if saved.get(field) != wanted.get(field):
            raise ValueError(
                f"the run in {folder.parent} has {field}={_brief(saved.get(field))}, not "
                f"{_brief(wanted.get(field))}; resume it with its own, or choose another --workdir "
                "or --name"
            )


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
