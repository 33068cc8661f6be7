"""Pre-trained networks in torch's layout, as variables of ours.

Our names are torch's with three changes: `layer1.0` is `layer1_0`, the norm `bn1` of `conv1` is
`conv1_norm`, and `downsample.0` and `.1` are `downsample` and `downsample_norm`, as layers and
norms in any sequence. That covers torchvision's ResNets, VGGs and MobileNetV2, timm's vision
transformers, and with `shortcut` and `linear` for `downsample` and `fc` the CIFAR networks in
circulation. Batch norm is kept; max-pools are mean pools in our networks, unless they are built
with `pool="max"`.
"""

import hashlib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from nadaptor.interop.maps import in_order, over_maps, torch_axes, torch_shape
from nadaptor.interop.torch_file import read_torch_file
from nadaptor.interop.torch_pickle import shown
from nadaptor.models import is_scale
from nadaptor.models.registry import HEADS

_LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}
_ALIASES = {"linear": "fc", "shortcut": "downsample"}
_WRAPPERS = ("module.", "_orig_mod.")
# Wrapped so often, and with names so long, no network is.
_MAX_WRAPPED, _MAX_NAME = 4, 1000
# An underscore before a number: torch's modules by place in a list or a sequence.
_NUMBER = re.compile(r"_(\d+)")
# The last dense layer, whichever of these a network has.
_HEADS = tuple(f"{head.replace('_', '.')}." for head in HEADS)
_SHOWN = 8
_SAFETENSORS = (
    "F64",
    "F32",
    "F16",
    "BF16",
    "I64",
    "I32",
    "I16",
    "I8",
    "U64",
    "U32",
    "U16",
    "U8",
    "BOOL",
    "C64",
)
# About 200,000 arrays.
_MAX_HEADER = 2**24


class MisfitError(ValueError):
    """A file's arrays are not those of the network.

    Args:
        message: what differs.
        classes: those of the file and those of the network, where they alone differ.
    """

    def __init__(self, message: str, classes: tuple[int, int] | None = None) -> None:
        """Keeps the classes."""
        super().__init__(message)
        self.classes = classes


def load_pretrained(
    path: str | Path, variables: Mapping[str, Any], *, new_head: bool = False
) -> dict[str, Any]:
    """Loads a file of torch weights into the variables of a network of `nadaptor.models`.

    The same as `from_torch(read_state_dict(path), variables, new_head=new_head)`.

    Args:
        path: a `.safetensors` file, or a `.pth`, `.pt`, `.th` or `.bin` file of torch.
        variables: the network's variables, or their shapes from `jax.eval_shape(model.init, ...)`.
        new_head: keep the last dense layer of `variables` instead of the file's.

    Returns:
        The variables without activation scales; `nadaptor.models.start_scales` adds those.

    Raises:
        ValueError: the file cannot be read, or does not fit the network.

    Example:
        >>> load_pretrained("net.zip", {})
        Traceback (most recent call last):
        ValueError: cannot read net.zip: the name must end in .safetensors, .pth, .pt, .th or .bin
    """
    return from_torch(read_state_dict(path), variables, new_head=new_head)


def file_identity(path: str | Path) -> dict[str, str]:
    """Returns a file's name and SHA-256: what a card says of the weights that a network has.

    Args:
        path: a file that can be read.

    Example:
        >>> file_identity(__file__)["file"]
        'pretrained.py'
    """
    digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    return {"file": Path(path).name, "sha256": digest}


def read_state_dict(path: str | Path) -> dict[str, np.ndarray]:
    """Reads arrays by name from a `.safetensors` file or a torch file; runs nothing from it.

    Args:
        path: a `.safetensors` file, or a `.pth`, `.pt`, `.th` or `.bin` file of torch.

    Returns:
        Arrays by name, with the dtypes and axis order of the file.

    Raises:
        ValueError: another ending, or the file is missing, truncated, damaged or refused.

    Example:
        >>> read_state_dict("missing.safetensors")
        Traceback (most recent call last):
        ValueError: cannot read missing.safetensors: there is no such file
    """
    kind = Path(path).suffix
    if kind not in (".safetensors", ".pth", ".pt", ".th", ".bin"):
        raise ValueError(
            f"cannot read {path}: the name must end in .safetensors, .pth, .pt, .th or .bin"
        )
    if not Path(path).is_file():
        raise ValueError(f"cannot read {path}: there is no such file")
    return _read_safetensors(path) if kind == ".safetensors" else read_torch_file(path)


def from_torch(
    state: Mapping[str, np.ndarray],
    variables: Mapping[str, Any],
    *,
    new_head: bool = False,
    flattened: Mapping[str, tuple[int, int, int] | None] | None = None,
) -> dict[str, Any]:
    """Puts a torch state dict into the variables of any Linen network with torch's names.

    That is a network of `nadaptor.models`, or one of your own in which torch's layer `a.0.conv1` is
    `a_0/conv1` (an underscore before a number), and the batch norm of layer `X` is `X_norm`: torch
    calls it `bn1` after `conv1`, and in a sequence the next number after X.

    Convolutions go from [out, in, h, w] to [h, w, in, out] and dense weights from [out, in] to
    [in, out]; everything becomes float32. `num_batches_tracked` is ignored, and so is a prefix that
    wrapping adds to every name (`module.`, `_orig_mod.`).

    Args:
        state: arrays by torch's names.
        variables: the network's variables, or their shapes from `jax.eval_shape(model.init, ...)`.
        new_head: keep the last dense layer of `variables`, whatever the file's; for another set of
            classes. `variables` then holds arrays.
        flattened: for each dense layer that reads a flattened map, by torch's name, the map's
            shape (C, H, W) where the network flattens [B, H, W, C], and None where it has torch's
            order. Networks of `nadaptor.models` need none.

    Returns:
        The variables, each array from the file. Activation scales are left out, because those of
        `variables` were measured with other weights; `nadaptor.models.start_scales` adds them.

    Raises:
        ValueError: names are missing or unexpected, shapes differ, a dense layer may read a map
            that torch flattens and `flattened` has no word of it, or the head has another class
            count and `new_head` is False; the message lists them. Or an array holds integers,
            complex numbers, a value that is not finite or a negative variance.

    Example:
        >>> variables = {"params": {"fc": {"kernel": jnp.zeros((3, 2)), "bias": jnp.zeros(2)}}}
        >>> state = {"module.fc.weight": np.ones((2, 3)), "module.fc.bias": np.ones(2)}
        >>> from_torch(state, variables)["params"]["fc"]["kernel"].shape
        (3, 2)

    Source: the state dicts of torchvision.models.resnet, timm and akamaster/pytorch_resnet_cifar10.
    """
    state = _canonical(state)
    leaves = {
        tuple(key.key for key in path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(variables)
        if not is_scale(path)
    }
    names = {path: _torch_name(path) for path in leaves}
    head = next((head for head in _HEADS if any(n.startswith(head) for n in names.values())), "fc.")
    kept = {path for path in leaves if new_head and names[path].startswith(head)}
    _check_kept(leaves[path] for path in kept)
    if new_head:
        state = {name: array for name, array in state.items() if not name.startswith(head)}
    shapes = {names[path]: leaves[path].shape for path in leaves.keys() - kept}
    state = over_maps(state, shapes)
    # First: of a file of another network nothing else is worth a word.
    _check_fit(shapes, state, head)
    state = in_order(state, flattened or {})
    loaded = {
        path: leaf if path in kept else jnp.asarray(_ours(_numbers(names[path], state)))
        for path, leaf in leaves.items()
    }
    return traverse_util.unflatten_dict(loaded)


def _read_safetensors(path: str | Path) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError, safe_open

    try:
        with open(path, "rb") as file:
            header = int.from_bytes(file.read(8), "little")
        # A header longer than the file is refused by safetensors itself.
        if _MAX_HEADER < header < Path(path).stat().st_size:
            raise ValueError(
                f"cannot read {path}: its header of {header} bytes describes no network"
            )
        with safe_open(path, "np") as file:
            names = list(file.keys())
            for name in names:
                # Asked first, as get_tensor fails on other kinds without a name.
                if (dtype := file.get_slice(name).get_dtype()) not in _SAFETENSORS:
                    raise ValueError(
                        f"cannot read {path}: {shown(name)} is of {shown(dtype)}, which NumPy has "
                        "not; convert it to float32 first"
                    )
            return {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError, KeyError) as error:
        reason = shown(" ".join(str(error).split()))
        raise ValueError(f"cannot read {path}: truncated or damaged ({reason})") from error


def _canonical(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The state dict under torchvision's names, without what has no place in a network of ours."""
    if long := [name for name in state if len(name) > _MAX_NAME]:
        raise ValueError(f"the name {shown(long[0])} has {len(long[0])} letters")
    canonical: dict[str, np.ndarray] = {}
    for name, array in _unwrapped(state).items():
        parts = [_ALIASES.get(part, part) for part in name.split(".")]
        if parts[-1] == "num_batches_tracked":
            continue
        if ".".join(parts) in canonical:
            twice = shown(".".join(parts))
            raise ValueError(f"the state dict has two arrays for {twice}; one is {shown(name)}")
        canonical[".".join(parts)] = array
    return canonical


def _unwrapped(state: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
    # They may stand in each other, in any order.
    for wrapper in _WRAPPERS * _MAX_WRAPPED:
        if state and all(name.startswith(wrapper) for name in state):
            state = {name.removeprefix(wrapper): a for name, a in state.items()}
    return state


def _torch_name(path: tuple[str, ...]) -> str:
    """("params", "layer1_0", "conv2_norm", "scale") -> "layer1.0.bn2.weight"."""
    *blocks, layer = (_NUMBER.sub(r".\1", name) for name in path[1:-1] or ("",))
    plain = layer.removesuffix("_norm")
    numbered = f"{plain}.0" if plain == "downsample" else plain
    if layer != plain and numbered != (stem := numbered.rstrip("0123456789")) and stem[-1:] == ".":
        # In a sequence of torch's, the norm of a layer is the next one.
        numbered = f"{stem}{int(numbered.removeprefix(stem)) + 1}"
    elif layer != plain:
        numbered = numbered.replace("conv", "bn")
    return ".".join(filter(None, [*blocks, numbered, _LEAVES.get(path[-1], path[-1])]))


def _numbers(name: str, state: Mapping[str, np.ndarray]) -> np.ndarray:
    """An array in float32, its numbers such as a network can have."""
    array = state[name]
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise ValueError(f"{name} is of {array.dtype}, and weights are floating point numbers")
    # What overflows is refused below, by name.
    with np.errstate(over="ignore"):
        numbers = np.asarray(array, np.float32)
    if not np.isfinite(numbers).all():
        raise ValueError(f"{name} holds a value that is not finite in float32")
    if name.endswith("running_var") and (numbers < 0).any():
        raise ValueError(f"{name} holds a variance of {numbers.min()}, which is negative")
    return numbers


def _ours(array: np.ndarray) -> np.ndarray:
    return array.transpose(torch_axes(array.ndim))


def _check_kept(head: Iterable[Any]) -> None:
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in head):
        raise ValueError(
            "new_head=True keeps the head of variables, which are shapes without values; pass the "
            "result of model.init"
        )


def _check_fit(
    expected: Mapping[str, tuple[int, ...]], state: Mapping[str, np.ndarray], head: str
) -> None:
    """Raises one error with everything that does not fit."""
    wrong = {
        name: f"{shown(name)} {state[name].shape} instead of {shape}"
        for name, shape in ((name, torch_shape(shape)) for name, shape in expected.items())
        if name in state and state[name].shape != shape
    }
    missing, unexpected = expected.keys() - state.keys(), state.keys() - expected.keys()
    lists = [
        _listed("missing", missing),
        _listed("unexpected", unexpected),
        _listed("of another shape", wrong.values()),
    ]
    only_head = all(name.startswith(head) for name in missing | unexpected | wrong.keys())
    remedy = ". Pass new_head=True to start a new head" if only_head else ""
    if any(lists):
        found = "; ".join(filter(None, lists))
        bias = f"{head}bias"
        classes = (len(state[bias]), expected[bias][0]) if only_head and bias in wrong else None
        raise MisfitError(f"the weights do not fit the network: {found}{remedy}", classes)


def _listed(what: str, names: Iterable[str]) -> str:
    ordered = sorted(names)
    more = f" and {len(ordered) - _SHOWN} more" if len(ordered) > _SHOWN else ""
    return f"{what}: {', '.join(map(shown, ordered[:_SHOWN]))}{more}" if ordered else ""
