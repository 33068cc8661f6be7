"""The learned scales and thresholds of all activation layers in a tree of variables."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
from flax import traverse_util

from nadaptor.models.activations import Relu
from nadaptor.quantization import quantize
from nadaptor.quantization.rules import SCALE_FLOOR, projection

# Not "scale", which is the gain of a batch norm and may be negative.
SCALE_NAMES = ("quant_scale", "threshold")


def start_scales(
    model: nn.Module, variables: Mapping[str, Any], batch: jax.Array, key: jax.Array, **kwargs: Any
) -> dict[str, Any]:
    """Creates the missing scales from the batch as it flows through the weights at hand.

    Each layer measures its input with the layers before it already quantized, noise off; with the
    `scale_init` "mmse_relu", with ReLUs in all slots, as `nadaptor.quantize(f).init` does. Existing
    leaves, statistics included, come back as they are.

    Args:
        model: a network with the layers of `activations` in its activation slots.
        variables: its variables, without some or all of the scales; typically pre-trained.
        batch: one batch of the model's input. With an `axis_name` in the layers, call this inside
            the map, on the local part of the batch.
        key: typed PRNG key, consumed; the activation layers draw nothing from it.
        **kwargs: passed on to the model. `train=True` measures with the moments of the batch in
            the batch norms, in place of the stored ones.

    Returns:
        The complete variables.

    Raises:
        ValueError: something else than scales is missing.

    Example:
        >>> import jax.numpy as jnp
        >>> from nadaptor.models import Lsq
        >>> full = start_scales(Lsq(2), {"params": {}}, jnp.ones((1, 4)), jax.random.key(0))
        >>> round(float(full["params"]["quant_scale"]), 4)
        1.4142

    Source: Esser et al., Learned step size quantization, 2019, for the rule.
    """
    slot = getattr(model, "activation", None)
    # Built outside of any network, for its options alone.
    if slot is not None and getattr(layer := slot(), "scale_init", None) == "mmse_relu":
        variables = _measured_with_relus(model, layer, variables, batch, kwargs)
    # With `train=True` the norms write averages, too, which are dropped below.
    mutable = list({"params", *variables})
    # No stream "noise": scales are measured without it.
    _, updated = model.apply(variables, batch, rngs={"params": key}, mutable=mutable, **kwargs)
    params = updated["params"]
    known = {path for path, _ in jax.tree_util.tree_leaves_with_path(variables.get("params", {}))}
    created = [path for path, _ in jax.tree_util.tree_leaves_with_path(params) if path not in known]
    missing = [jax.tree_util.keystr(path) for path in created if not is_scale(path)]
    if missing:
        raise ValueError(
            f"variables lack more than scales: {', '.join(missing)}; initialise the model first, "
            "or load weights for every layer"
        )
    return {**variables, "params": params}


def _measured_with_relus(
    model: Any, layer: Any, variables: Mapping[str, Any], batch: jax.Array, kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Adds the scales that are missing, measured on the model with ReLUs in its slots."""
    relus = model.clone(activation=Relu)
    mutable = [name for name in variables if name != "params"]

    def apply(variables: Any, batch: jax.Array) -> Any:
        return relus.apply(variables, batch, mutable=mutable, **kwargs)

    channel_axis = -1 if layer.per_channel else None
    quantized = quantize(apply, layer.levels, pools=True)
    found = quantized.init(variables, batch, channel_axis=channel_axis)
    flat = dict(traverse_util.flatten_dict(variables["params"]))
    for name, scale in found.items():
        path = (*name.split("/")[1:], "quant_scale")
        # A scale that was there already stays.
        flat.setdefault(path, scale.reshape((-1,) if layer.per_channel else ()))
    return {**variables, "params": traverse_util.unflatten_dict(flat)}


def project_scales(params: Any, floor: float = SCALE_FLOOR) -> Any:
    """Projects every scale and threshold to at least `floor`: `s <- max(s, floor)`.

    Weight decay and the gradient may push a scale through zero, where the quantizer has no meaning;
    the optimizer loop calls this after each update.

    Args:
        params: any pytree, such as Linen's dict, an NNX state or an Equinox module; leaves called
            `quant_scale` or `threshold` are projected.
        floor: the smallest scale, > 0.

    Returns:
        The same pytree, all other leaves untouched. NaN stays NaN, to be seen.

    Raises:
        ValueError: `floor` is not positive.

    Example:
        >>> import jax.numpy as jnp
        >>> params = {"act1": {"quant_scale": jnp.array(-0.5)}, "norm": {"scale": jnp.array(-0.5)}}
        >>> jax.tree.map(float, project_scales(params, floor=0.25))
        {'act1': {'quant_scale': 0.25}, 'norm': {'scale': -0.5}}
    """
    project = projection(floor)
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: project(leaf) if is_scale(path) else leaf, params
    )


def is_scale(path: tuple[Any, ...]) -> bool:
    """Returns whether a key path of `jax.tree_util` ends in a scale or threshold of a layer.

    Example:
        >>> tree = {"act1": {"quant_scale": 1.0}, "norm": {"scale": 1.0}}
        >>> [is_scale(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
        [True, False]
    """
    # An entry is of a dict, of a module's attribute, or of the variable that NNX wraps a leaf in.
    names = [getattr(entry, "key", getattr(entry, "name", None)) for entry in path]
    while names and names[-1] in ("value", "raw_value"):
        names.pop()
    return bool(names) and names[-1] in SCALE_NAMES
