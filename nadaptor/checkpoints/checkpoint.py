"""Checkpoints: arrays in Orbax's format beside a JSON card that says what they are.

A checkpoint is a folder with `arrays/` and `card.json`. The card holds a SHA-256 digest of every
array and of itself, because a flipped byte restores silently otherwise. The folder appears whole,
by one rename, or not at all.
"""

import hashlib
import importlib.metadata
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from nadaptor._files import write_json
from nadaptor._version import __version__

Kind = Literal["ann", "snn"]
_MADE_BY: Mapping[str, str] = {"ann": "train.py", "snn": "convert.py"}
# After so many bytes another file is begun, and no array is in larger pieces: so no file is above
# twice as many, 16 MiB, and a checkpoint can be carried in parts.
FILE_BYTES = 8 * 2**20
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def save_checkpoint(path: Path, kind: Kind, arrays: Any, card: Mapping[str, Any]) -> None:
    """Writes a checkpoint, whole or not at all.

    Args:
        path: folder to make; must not exist.
        kind: "ann", a trained network, or "snn", a converted one.
        arrays: pytree of dicts of arrays.
        card: what else to say of them, values that JSON can hold.

    Raises:
        ValueError: `path` exists.
    """
    import orbax.checkpoint as ocp

    if path.exists():
        raise ValueError(f"{path} exists already; choose another folder or remove it")
    arrays = jax.tree.map(np.asarray, jax.device_get(arrays))
    full = {**card, "kind": kind, "versions": versions(), "digests": digests(arrays)}
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as scratch:
        made = Path(scratch).resolve() / path.name
        made.mkdir()
        with _lone_checkpointer() as checkpointer:
            saved = ocp.args.PyTreeSave(arrays, ocdbt_target_data_file_size=FILE_BYTES)
            checkpointer.save(made / "arrays", args=saved)
        write_json(made / "card.json", {**full, "card_digest": _card_digest(full)})
        made.rename(path)


def _lone_checkpointer() -> Any:
    """A checkpointer for this process alone: Orbax's own waits for all processes of a run."""
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
            contents are not what was written.
    """
    card = load_card(path, kind)
    arrays = _read_arrays(path / "arrays")
    found, wanted = digests(arrays), card["digests"]
    wrong = sorted(leaf for leaf in found.keys() | wanted if found.get(leaf) != wanted.get(leaf))
    if wrong:
        raise ValueError(
            f"{path} is damaged: {wrong[0]} and {len(wrong) - 1} other arrays are not what was "
            f"saved; {_remedy(path, kind)}"
        )
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
    if not path.is_dir():
        raise ValueError(f"no checkpoint at {path}; {_MADE_BY[kind]} makes one")
    try:
        card = json.loads((path / "card.json").read_text())
        unread = {key: value for key, value in card.items() if key != "card_digest"}
        own, stated = card["kind"], card["card_digest"]
    except FileNotFoundError as error:
        raise ValueError(
            f"{path} is not a checkpoint of nadaptor: it has no card.json; pass the folder that "
            f"{_MADE_BY[kind]} printed"
        ) from error
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{path / 'card.json'} is damaged; {_remedy(path, kind)}") from error
    if stated != _card_digest(unread):
        raise ValueError(f"{path / 'card.json'} is damaged; {_remedy(path, kind)}")
    if own != kind:
        raise ValueError(f"{path} holds an {own!r}, made by {_MADE_BY[own]}; this needs {kind!r}")
    return card


def digests(arrays: Any) -> dict[str, str]:
    """Returns a SHA-256 digest for each leaf, over its dtype, shape and bytes.

    Example:
        >>> list(digests({"fc": {"bias": np.zeros(2)}}))
        ['fc/bias']
    """
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): _digest(np.asarray(leaf))
        for path, leaf in jax.tree_util.tree_leaves_with_path(arrays)
    }


def versions() -> dict[str, str]:
    """Returns the versions of nadaptor and of the packages that its results depend on."""
    others = {name: importlib.metadata.version(name) for name in _PACKAGES}
    return {"nadaptor": __version__, **others}


def _digest(leaf: np.ndarray) -> str:
    head = f"{leaf.dtype.name} {list(leaf.shape)} ".encode()
    return hashlib.sha256(head + np.ascontiguousarray(leaf).tobytes()).hexdigest()


def _card_digest(card: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(card, sort_keys=True).encode()).hexdigest()


def _read_arrays(path: Path) -> Any:
    import orbax.checkpoint as ocp

    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            return jax.tree.map(np.asarray, checkpointer.restore(path.resolve()))
    # A truncated file comes out of the storage layer as any exception, a bare one included.
    except Exception as error:
        raise ValueError(
            f"{path} cannot be read, it is damaged or of another program; make it again"
        ) from error


def _remedy(path: Path, kind: Kind) -> str:
    return f"remove {path} and make it again with {_MADE_BY[kind]}"
