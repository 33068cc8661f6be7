"""Snapshots of a run under way: what it resumes from, exactly.

A snapshot is a step of an Orbax `CheckpointManager`: the state as one item, and a card as another
with the digest of every leaf, because a flipped byte restores silently otherwise. The card is under
a digest itself, and the best snapshot is chosen by what it says. Orbax writes in the background and
renames a finished snapshot into its place. The state is replicated: it is saved from host memory,
process 0 writes it, and all processes meet at Orbax's barriers.
"""

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from nadaptor._files import check_writable, read_small, uninterrupted
from nadaptor._files.card import DamagedError, brief, fields_of, first_difference, seal, unseal
from nadaptor.checkpoints.checkpoint import (
    FILE_BYTES,
    check_stored,
    digests,
    first_not_finite,
    shapes,
    versions,
)
from nadaptor.checkpoints.storage import cause_of, hushed
from nadaptor.configs.config import today
from nadaptor.errors import PassingError, RunError

METRIC = "validation_accuracy"


@dataclasses.dataclass(frozen=True)
class Card:
    """What a snapshot says of itself."""

    config: dict[str, Any]
    data: dict[str, Any]
    digests: dict[str, str]
    versions: dict[str, str]
    step: int | None = None  # cards of format 1 have none
    # What was measured at the end of each epoch, its step and accuracy among it.
    rows: list[dict[str, float | None]] | None = None


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

    Raises:
        ValueError: nothing can be written in the folder.
    """

    def __init__(self, folder: Path, keep: int, card: Mapping[str, Any]) -> None:
        """Opens the folder; unfinished snapshots of a killed run are cleaned away."""
        self._folder, self._keep = folder.resolve(), keep
        check_writable(self._folder)
        self._card = {**card, "versions": versions()}
        self._reported: tuple[str, list[int]] | None = None
        self._hushed = contextlib.ExitStack()
        self._hushed.enter_context(hushed())
        self._manager = self._open()

    def save(self, step: int, state: Any, card: Mapping[str, Any]) -> None:
        """Starts to save a snapshot, and returns when the state may be changed.

        A save that fails, on a full disk for example, is reported in a line and leaves the earlier
        snapshots as they are: the run goes on.

        Args:
            step: updates done, as the state's own `step` has it.
            state: pytree of arrays.
            card: what the run needs beside the state, as JSON; "rows", where it has them, decide
                which snapshot is the best.

        Raises:
            RunError: the state holds a value that is not finite.
        """
        import orbax.checkpoint as ocp

        # The next step takes the state as a donation, while this is still being written.
        host = jax.tree.map(np.asarray, jax.device_get(state))
        check_finite(host, step)
        # One that failed before it is told by `wait`; by now there may be room.
        self.wait()
        if step in self._manager.all_steps():
            return
        full = seal({**self._card, **card, "step": step, "digests": digests(host)})
        saved = ocp.args.PyTreeSave(_flat(host), ocdbt_target_data_file_size=FILE_BYTES)
        items = ocp.args.Composite(state=saved, card=ocp.args.JsonSave(full))
        try:
            # The loop chooses the steps, and not a policy of Orbax's.
            self._manager.save(step, args=items, force=True)
        except Exception as error:
            self._report(error)

    def last_on_disk(self) -> int | None:
        """Waits for the save under way; returns the step of the newest snapshot on the disk."""
        self.wait()
        return max(self._on_disk(), default=None)

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

        Damaged snapshots are moved aside, to the folder `damaged`, where an older one is good;
        otherwise they stay where they are, because the cause may pass.

        Args:
            like: a state of the same structure.

        Returns:
            The snapshot, leaves as NumPy arrays; None where there is none.

        Raises:
            ValueError: it is of a run with another config or data set; the message names the
                first field that differs.
            PassingError: there are snapshots, and none of them can be read.
        """
        damaged: dict[int, DamagedError] = {}
        for step in reversed(self._on_disk()):
            try:
                found = self._restore(step, like)
            except DamagedError as error:
                damaged[step] = error
                continue
            for skipped, error in damaged.items():
                print(f"snapshot {skipped} skipped and moved to {self._aside(skipped)}: {error}")
                self._move_aside(skipped)
            return found
        if damaged:
            newest = max(damaged)
            raise PassingError(
                f"none of the {len(damaged)} snapshots in {self._folder} can be read, and they "
                f"stay there; the newest, {newest}: {damaged[newest]}; remove the folder to start "
                "again"
            )
        return None

    def best(self, like: Any) -> Snapshot | None:
        """Restores the snapshot that was best on the validation images, the newest of equals.

        Raises:
            PassingError: it is damaged.
        """
        self.wait()
        step = self._best_step(self._on_disk())
        try:
            return None if step is None else self._restore(step, like)
        except DamagedError as error:
            raise PassingError(
                f"the best snapshot, of step {step}, is damaged: {error}; remove "
                f"{self._folder / str(step)} to hand on the best of the others"
            ) from error

    def close(self) -> None:
        """Waits for the save under way and ends the threads."""
        with self._hushed:
            self.wait()
            self._manager.close()

    def _open(self) -> Any:
        import orbax.checkpoint as ocp
        from orbax.checkpoint import checkpoint_managers as policies

        class Best(policies.PreservationPolicy):
            """Preserves the best on the validation images."""

            def should_preserve(self, checkpoints: Any, *, context: Any) -> list[bool]:
                best = best_step([info.step for info in checkpoints])
                return [info.step == best for info in checkpoints]

        best_step, latest = self._best_step, policies.LatestN(self._keep)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy([latest, Best()]),
            cleanup_tmp_directories=True,
            # A folder that cannot be made is then an error at once; made in the background, its
            # writers wait five minutes for it, and keep the program from ending.
            async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
        )
        for left in self._folder.glob("*/metrics"):
            # Of format 1. The rows of the cards say the same, and Orbax opens no folder in which
            # one of these is damaged.
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink(missing_ok=True)
        return ocp.CheckpointManager(self._folder, options=options)

    def _report(self, error: Exception) -> None:
        # One line until a snapshot is saved again: on a full disk all that follow fail alike.
        failure = cause_of(error), self._on_disk()
        if failure != self._reported:
            print(f"a snapshot was not saved, the earlier ones are kept: {failure[0]}")
        self._reported = failure
        # The manager would count the failed snapshot among its own.
        self._manager.close()
        self._manager = self._open()

    def _on_disk(self) -> list[int]:
        """The steps whose snapshots have got their names, and so are whole."""
        return sorted(int(path.name) for path in self._folder.iterdir() if path.name.isdigit())

    def _best_step(self, steps: list[int]) -> int | None:
        """The best of some steps, by the rows of all cards that can be read."""
        rows: dict[float | None, float] = {}
        for step in steps:
            try:
                measured = self._read_card(step).rows or []
            except DamagedError:
                continue  # what it measured stands in the cards after it, too
            rows |= {row.get("step"): row.get(METRIC) or 0.0 for row in measured}
        return max((s for s in steps if s in rows), key=lambda s: (rows[s], s), default=None)

    def _read_card(self, step: int) -> Card:
        return fields_of(Card, read_card(self._folder / str(step)))

    def _restore(self, step: int, like: Any) -> Snapshot:
        import orbax.checkpoint as ocp
        from etils import epath

        full = read_card(self._folder / str(step))
        card = fields_of(Card, full)
        _check_same(today(card.config), self._card.get("config", {}), self._folder)
        _check_same(card.data, self._card.get("data", {}), self._folder)
        try:
            files = self._folder / str(step) / "state"
            stored = ocp.PyTreeCheckpointHandler().metadata(epath.Path(files)).tree
            check_stored(stored, shapes(_flat(like)), files)
            items = ocp.args.Composite(state=ocp.args.PyTreeRestore())
            with uninterrupted():
                flat = self._manager.restore(step, args=items)["state"]
        # The storage layer raises anything, a bare Exception included.
        except Exception as error:
            raise DamagedError(_line(error)) from error
        state, wanted = _unflat(flat, like), card.digests
        found = digests(state)
        wrong = sorted(k for k in found.keys() | wanted if found.get(k) != wanted.get(k))
        if wrong:
            raise DamagedError(f"{wrong[0]} is not what was saved ({len(wrong)} arrays in all)")
        # A folder that was renamed is whole, and of another step.
        if step != int(state.step) or card.step not in (None, step):
            raise DamagedError(f"it is the snapshot of step {int(state.step)}")
        return Snapshot(step, state, full)

    def _aside(self, step: int) -> Path:
        return self._folder.parent / "damaged" / str(step)

    def _move_aside(self, step: int) -> None:
        if jax.process_index() == 0:
            aside = self._aside(step)
            shutil.rmtree(aside, ignore_errors=True)
            aside.parent.mkdir(exist_ok=True)
            (self._folder / str(step)).rename(aside)
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            # Until it is moved, no process looks on.
            multihost_utils.sync_global_devices(f"damaged {step}")
        self._manager.reload()


def setting_of(folder: Path) -> dict[str, Any]:
    """Returns what the newest snapshot says of where its run ran; empty where none says it.

    Args:
        folder: of the snapshots, which need not be there.
    """
    # By number: 100 comes after 20.
    for path in sorted(folder.glob("[0-9]*"), key=lambda p: (len(p.name), p.name), reverse=True):
        with contextlib.suppress(DamagedError):
            setting = read_card(path).get("setting")
            return setting if isinstance(setting, dict) else {}
    return {}


def read_card(snapshot: Path) -> dict[str, Any]:
    """Reads a snapshot's card, as JSON gives it.

    Raises:
        DamagedError: it is not there, or not what was written.
    """
    try:
        return unseal(json.loads(read_small(snapshot / "card/metadata")))
    except (OSError, RecursionError, ValueError) as error:
        raise DamagedError(f"its card cannot be read: {_line(error)}") from error


def check_finite(state: Any, step: int) -> None:
    """Checks that every number of a state is finite.

    Raises:
        RunError: one is not; the message names its leaf.
    """
    if name := first_not_finite(state):
        raise RunError(f"{name} is not finite after {step} updates; lower the learning rate")


def _flat(state: Any) -> dict[str, np.ndarray]:
    """The leaves by position: names with "/" in them would become folders of their own."""
    return {f"{i:05}": leaf for i, leaf in enumerate(jax.tree.leaves(state))}


def _unflat(flat: Mapping[str, Any], like: Any) -> Any:
    structure = jax.tree.structure(like)
    if len(flat) != structure.num_leaves:
        raise DamagedError(f"it holds {len(flat)} arrays, not {structure.num_leaves}")
    return jax.tree.unflatten(structure, [np.asarray(flat[name]) for name in sorted(flat)])


def _check_same(saved: Mapping[str, Any], wanted: Mapping[str, Any], folder: Path) -> None:
    if field := first_difference(saved, wanted):
        raise ValueError(
            f"the run in {folder.parent} has {field}={brief(saved.get(field))}, not "
            f"{brief(wanted.get(field))}; resume it with its own, or choose another --workdir "
            "or --name"
        )


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
