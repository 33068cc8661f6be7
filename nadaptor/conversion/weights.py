"""A converted network's weights as safetensors: folded weights, biases and thresholds by name.

Names are those of the modules, "layer1_0.conv1.kernel", and each activation has its threshold,
"layer1_0.act1.threshold", in units of the activation. The header's metadata holds a card with the
digest of every array and what a reader of another system has to know.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from nadaptor._files import making, write_bytes
from nadaptor._files.card import DamagedError, seal, unseal
from nadaptor.checkpoints.checkpoint import digests

_CARD = "nadaptor"
_LAYOUT = (
    "kernels of convolutions are [height, width, in, out], those of dense layers [in, out]; a "
    "neuron starts at threshold / 2, fires where its potential reaches the threshold, gives out "
    "the threshold and is reset by subtracting it"
)


def named_weights(variables: Mapping[str, Any], levels: int) -> dict[str, np.ndarray]:
    """Returns the arrays of a folded network by name, and the threshold of each activation.

    Args:
        variables: of the folded network.
        levels: p, by which a quantizer's scale becomes a threshold, th = p*s.

    Returns:
        Arrays by name, in float32.

    Example:
        >>> named_weights({"params": {"act1": {"quant_scale": np.float32(0.5)}}}, levels=2)
        {'act1.quant_scale': array(0.5, dtype=float32), 'act1.threshold': array(1., dtype=float32)}
    """
    arrays: dict[str, np.ndarray] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables["params"]):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        arrays[name] = np.asarray(leaf)
        # Activations without a scale have their threshold among the parameters.
        if name.endswith("quant_scale"):
            threshold = name.removesuffix("quant_scale") + "threshold"
            arrays[threshold] = np.asarray(leaf * np.float32(levels))
    return arrays


@making("path")
def save_weights(path: Path, arrays: Mapping[str, np.ndarray], card: Mapping[str, Any]) -> None:
    """Writes named arrays as safetensors.

    Args:
        path: file to write.
        arrays: from `named_weights`.
        card: what else to say of them, values that JSON can hold.
    """
    from safetensors.numpy import save

    told = seal({**card, "layout": _LAYOUT, "digests": digests(dict(arrays))})
    # Not ascontiguousarray, which makes a vector of a scalar.
    kept = {name: np.asarray(x, order="C") for name, x in arrays.items()}
    write_bytes(path, save(kept, {_CARD: json.dumps(told)}))


def load_weights(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Reads what `save_weights` wrote, and verifies the digest of every array.

    Args:
        path: the file.

    Returns:
        The arrays by name, and the card.

    Raises:
        ValueError: there is no such file, or it is damaged or of another program.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise ValueError(f"no file at {path}; nadaptor export --form safetensors writes one")
    try:
        with safe_open(path, "numpy") as file:
            told = (file.metadata() or {}).get(_CARD)
            arrays = {name: file.get_tensor(name) for name in list(file.keys())}
        if told is None:
            raise DamagedError("it has no card of nadaptor")
        card = unseal(json.loads(told))
        if digests(arrays) != card.get("digests"):
            raise DamagedError("its arrays are not what was saved")
    except (SafetensorError, DamagedError, json.JSONDecodeError, OSError) as error:
        line = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} is damaged: {line}; export the network again") from error
    return arrays, card
