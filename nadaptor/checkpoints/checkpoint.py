"""Checkpoints: arrays in Orbax's format beside a JSON card that says what they are.

A checkpoint is a folder with `arrays/` and `card.json`. The card holds a SHA-256 digest of every
array and of itself, because a flipped byte restores silently otherwise; and every array's shape and
dtype, against which the stored ones are compared before any memory is taken for them. The folder
appears whole, by one rename, once it is on the disk, or not at all.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import math
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from nadaptor._files import check_encodable, read_small, sync_folder, uninterrupted, write_json
from nadaptor._files.card import DamagedError, brief, fields_of, seal, unseal
from nadaptor._version import __version__
from nadaptor.checkpoints.storage import cause_of, hushed
from nadaptor.errors import PassingError, RunError

Kind = Literal["ann", "snn", "network"]
_MADE_BY: Mapping[str, str] = {
    "ann": "nadaptor train",
    "snn": "nadaptor convert",
    "network": "save_network",
}
# After so many bytes another file is begun, and no array is in larger pieces: so no file is above
# twice as many, 16 MiB, and a checkpoint can be carried in parts.
FILE_BYTES = 8 * 2**20
# A card of format 1 has no shapes: such arrays may take so many times what their files do.
_UNPACKED, _SMALL = 64, 2**28
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


@dataclasses.dataclass(frozen=True)
class Card:
    """What every checkpoint's card has, whatever else it says."""

    kind: str
    config: dict[str, Any]
    digests: dict[str, str]
    versions: dict[str, str]
    card_digest: str
    shapes: dict[str, list[Any]] | None = None  # of each array its dtype, then its shape
    data: dict[str, Any] | None = None
    metrics: dict[str, float | None] | None = None


def save_checkpoint(path: Path, kind: Kind, arrays: Any, card: Mapping[str, Any]) -> None:
    """Writes a checkpoint, whole or not at all.

    Args:
        path: folder to make; must not exist.
        kind: "ann", a trained network, "snn", a converted one, or "network", of `save_network`.
        arrays: pytree of dicts of arrays.
        card: what else to say of them, values that JSON can hold.

    Raises:
        ValueError: `path` exists.
        RunError: an array holds a value that is not finite.
        PassingError: it cannot be written, on a full disk for example.
        KeyboardInterrupt: Ctrl-C was pressed meanwhile; the checkpoint is whole.
    """
    # A link to nowhere does not exist, and is in the way as well.
    if path.exists() or path.is_symlink():
        raise ValueError(f"{path} exists already; choose another folder or remove it")
    arrays = jax.tree.map(np.asarray, jax.device_get(arrays))
    if broken := first_not_finite(arrays):
        raise RunError(f"{broken} is not finite; nothing is written")
    described = {"digests": digests(arrays), "shapes": shapes(arrays)}
    full = seal({**card, "kind": kind, "versions": versions(), **described})
    path.parent.mkdir(parents=True, exist_ok=True)
    # Those of a run that was killed while it saved; tempfile's names end in eight letters.
    for left in path.parent.glob(f".{path.name}-????????"):
        shutil.rmtree(left, ignore_errors=True)
    # Of a write that failed, threads may still write to the folder while it is removed: what is
    # left of it the next save removes.
    beside = tempfile.TemporaryDirectory(
        prefix=f".{path.name}-", dir=path.parent, ignore_cleanup_errors=True
    )
    with uninterrupted(), hushed(), beside as scratch:
        made = Path(scratch).resolve() / path.name
        try:
            _write(made, arrays, full)
            made.rename(path)
        # The storage layer raises anything, a bare Exception included.
        except Exception as error:
            raise PassingError(f"{path} was not saved: {cause_of(error)}") from error
    sync_folder(path.parent)


def _write(folder: Path, arrays: Any, card: Mapping[str, Any]) -> None:
    """Writes arrays and their card, and waits until they are on the disk."""
    import orbax.checkpoint as ocp

    folder.mkdir()
    saved = ocp.args.PyTreeSave(arrays, ocdbt_target_data_file_size=FILE_BYTES)
    with _lone_checkpointer() as checkpointer:
        checkpointer.save(folder / "arrays", args=saved)
    write_json(folder / "card.json", card)
    # A folder holds the names of its files, which are on the disk when it is.
    for inner in (p for p in folder.rglob("*") if p.is_dir()):
        sync_folder(inner)
    sync_folder(folder)


def _lone_checkpointer() -> Any:
    """A checkpointer for this process alone: Orbax's own waits for all of a run."""
    import orbax.checkpoint as ocp

    me = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"alone{me}"
    )
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=alone)
    return ocp.Checkpointer(handler, multiprocessing_options=alone)


def load_checkpoint(path: Path, kind: Kind) -> tuple[Any, dict[str, Any]]:
    """Reads a checkpoint and verifies every digest.

    Args:
        path: its folder.
        kind: what it must hold.

    Returns:
        The arrays, as NumPy arrays in nested dicts, and the card.

    Raises:
        ValueError: there is none, it was made by another program or is of the other kind, or its
            contents are not what was written, or not finite.
    """
    card = load_card(path, kind)
    arrays = _read_arrays(path / "arrays", card.get("shapes"))
    found, wanted = digests(arrays), card["digests"]
    wrong = sorted(leaf for leaf in found.keys() | wanted if found.get(leaf) != wanted.get(leaf))
    if wrong:
        raise ValueError(
            f"{path} is damaged: {wrong[0]} and {len(wrong) - 1} other arrays are not what was "
            f"saved; {_remedy(path, kind)}"
        )
    if broken := first_not_finite(arrays):
        raise ValueError(f"{path} holds a network that diverged: {broken} is not finite")
    return arrays, card


def load_card(path: Path, kind: Kind) -> dict[str, Any]:
    """Reads a checkpoint's card alone.

    Args:
        path: the checkpoint's folder.
        kind: what it must hold.

    Returns:
        The card.

    Raises:
        ValueError: as `load_checkpoint`.
    """
    check_encodable(path)
    if not path.is_dir():
        raise ValueError(f"no checkpoint at {path}; {_MADE_BY[kind]} makes one")
    file = path / "card.json"
    if not file.exists():
        raise ValueError(
            f"{path} is not a checkpoint of nadaptor: it has no card.json; pass the folder that "
            f"{_MADE_BY[kind]} printed"
        )
    try:
        card = unseal(json.loads(read_small(file)))
        own = fields_of(Card, card).kind
    except OSError as error:
        raise ValueError(f"cannot read {file}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        why = f": {error}" if isinstance(error, DamagedError) else ""
        raise ValueError(f"{file} is damaged{why}; {_remedy(path, kind)}") from error
    if own != kind:
        made_by = _MADE_BY.get(own, "another program")
        raise ValueError(f"{path} holds an {own!r}, made by {made_by}; this needs {kind!r}")
    return card


def leaf_name(path: Any) -> str:
    """Returns the name of a leaf at a path of JAX, as cards have it.

    Example:
        >>> [leaf_name(path) for path, _ in jax.tree_util.tree_leaves_with_path({"fc": [0]})]
        ['fc/0']
    """
    return jax.tree_util.keystr(path, simple=True, separator="/")


def digests(arrays: Any) -> dict[str, str]:
    """Returns a SHA-256 digest for each leaf, over its dtype, shape and bytes.

    Example:
        >>> list(digests({"fc": {"bias": np.zeros(2)}}))
        ['fc/bias']
    """
    return {
        leaf_name(path): _digest(np.asarray(leaf))
        for path, leaf in jax.tree_util.tree_leaves_with_path(arrays)
    }


def shapes(arrays: Any) -> dict[str, list[Any]]:
    """Returns for each leaf its dtype, then its shape.

    Example:
        >>> shapes({"fc": {"bias": np.zeros(2, np.float32)}})
        {'fc/bias': ['float32', 2]}
    """
    return {
        leaf_name(path): [str(leaf.dtype), *leaf.shape]
        for path, leaf in jax.tree_util.tree_leaves_with_path(arrays)
    }


def first_not_finite(arrays: Any) -> str | None:
    """Returns the name of the first leaf with a value that is not finite; None where all are.

    Example:
        >>> first_not_finite({"a": np.zeros(2), "b": np.array([np.nan])})
        'b'
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(arrays):
        # NumPy knows no bfloat16: such a leaf is widened.
        leaf = np.asarray(leaf, np.float64) if leaf.dtype.kind == "V" else leaf
        if not np.isfinite(leaf).all():
            return leaf_name(path)
    return None


def check_stored(stored: Any, wanted: Mapping[str, list[Any]] | None, files: Path) -> None:
    """Compares what is stored of arrays with what their card says, before they are read.

    Args:
        stored: the metadata of each leaf, as Orbax has it.
        wanted: as `shapes` gives it; None where the card is too old to say.
        files: folder of the arrays.

    Raises:
        ValueError: a leaf is missing, of another shape or dtype, or stored in pieces larger than
            itself; or of an old card, all together are far larger than their files.
    """
    leaves = {leaf_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(stored)}
    found = {name: [str(leaf.dtype), *leaf.shape] for name, leaf in leaves.items()}
    if wanted is not None and found != {k: list(v) for k, v in wanted.items()}:
        names = [k for k in sorted(found.keys() | wanted) if found.get(k) != wanted.get(k)]
        raise ValueError(
            f"{files} is damaged: {names[0]} is stored as {found.get(names[0])}, and its card has "
            f"{wanted.get(names[0])}"
        )
    for name, leaf in leaves.items():
        # Memory is taken by the piece: a huge one would end the program, however small the array.
        pieces = leaf.storage.chunk_shape or () if leaf.storage else ()
        if any(piece > max(size, 1) for piece, size in zip(pieces, leaf.shape, strict=False)):
            raise ValueError(f"{files} is damaged: {name} is stored in pieces of {list(pieces)}")
    total = sum(math.prod(x.shape) * np.dtype(x.dtype).itemsize for x in leaves.values())
    size = sum(p.stat().st_size for p in files.rglob("*") if p.is_file())
    if wanted is None and total > _UNPACKED * size + _SMALL:
        raise ValueError(f"{files} is damaged: its arrays would take {total} bytes of {size}")


def versions() -> dict[str, str]:
    """Returns the versions of nadaptor and of the packages that its results depend on."""
    others = {name: importlib.metadata.version(name) for name in _PACKAGES}
    return {"nadaptor": __version__, **others}


def _digest(leaf: np.ndarray) -> str:
    # Of another dtype or shape, the same bytes are another array.
    head = f"{leaf.dtype.name} {list(leaf.shape)} ".encode()
    return hashlib.sha256(head + np.ascontiguousarray(leaf).tobytes()).hexdigest()


def _read_arrays(path: Path, wanted: Mapping[str, list[Any]] | None) -> Any:
    import orbax.checkpoint as ocp
    from etils import epath

    # The storage layer starts jax, and where that fails the arrays are none the worse.
    jax.devices()
    # A pipe would have the reader wait for ever.
    strange = [p.name for p in path.rglob("*") if not (p.is_file() or p.is_dir())]
    if strange:
        raise ValueError(f"{path} is damaged: {brief(strange[0])} is no regular file")
    try:
        with uninterrupted(), hushed(), ocp.PyTreeCheckpointer() as checkpointer:
            stored = ocp.PyTreeCheckpointHandler().metadata(epath.Path(path.resolve())).tree
            check_stored(stored, wanted, path)
            return jax.tree.map(np.asarray, checkpointer.restore(path.resolve()))
    # A truncated file comes out of the storage layer as any exception, a bare one included.
    except Exception as error:
        # The refusals of `check_stored`, which begin with the folder.
        if str(error).startswith(str(path)):
            raise
        raise ValueError(
            f"{path} cannot be read, it is damaged or of another program; make it again"
        ) from error


def _remedy(path: Path, kind: Kind) -> str:
    return f"remove {path} and make it again with {_MADE_BY[kind]}"
