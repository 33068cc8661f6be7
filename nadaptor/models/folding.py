"""Batch-norm folding: the same function with one affine operation fewer a layer."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

NORM_SUFFIX = "_norm"
Path = tuple[str, ...]
Tree = dict[Path, jax.Array]


def fold_batch_norm(
    variables: Mapping[str, Any], *, epsilon: float = 1e-5, pairs: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Folds every batch norm into the convolution or dense layer before it.

    With gain g, offset beta, mean m and variance w of the norm and r = g / sqrt(w + epsilon), a
    channel of kernel W and bias b becomes `W' = W * r`, `b' = (b - m) * r + beta`: the norm of the
    layer's output is the output of the folded layer.

    The convention: a batch norm called `X_norm` follows its sibling `X`, a layer whose kernel has
    its output channels last (Flax's `Conv` and `Dense`). The result belongs to the same model built
    with `norm=None`, where the layers carry biases and all other names are equal.

    Args:
        variables: Linen variables with the collections `params` and `batch_stats`.
        epsilon: the norm's epsilon.
        pairs: for other conventions, from the path of a norm to the path of its layer, such as
            `{"stem/bn": "stem/conv"}`; it comes before the convention.

    Returns:
        Variables with no `batch_stats`; folded leaves are float32, all others are untouched.

    Raises:
        ValueError: `variables` are not of that form, a norm has no layer, no statistics, or shares
            its layer with another norm, the channel counts differ, or `pairs` names no norm; the
            message names the path.

    Example:
        >>> layer, norm = {"kernel": jnp.ones((1, 1))}, {"scale": jnp.array([3.0])}
        >>> stats = {"fc_norm": {"mean": jnp.array([1.0]), "var": jnp.array([4.0])}}
        >>> variables = {"params": {"fc": layer, "fc_norm": norm}, "batch_stats": stats}
        >>> folded = fold_batch_norm(variables, epsilon=0.0)
        >>> jax.tree.map(jnp.ravel, folded["params"]["fc"])
        {'bias': Array([-1.5], dtype=float32), 'kernel': Array([1.5], dtype=float32)}

    Source: Rueckauer et al., Conversion of continuous-valued deep networks to efficient
    event-driven networks for image classification, 2017.
    """
    if not isinstance(variables, Mapping) or "params" not in variables:
        raise ValueError(
            "fold_batch_norm takes {'params': ..., 'batch_stats': ...} as Linen has them; of an "
            "NNX module, nnx.to_pure_dict(nnx.state(module, nnx.Param)) and that of nnx.BatchStat"
        )
    params, stats = _flat(variables["params"]), _flat(variables.get("batch_stats", {}))
    _check_statistics(params, stats)
    # By their statistics, because a norm may have no parameters.
    norms = sorted({path[:-1] for path in stats})
    layers = _partners(norms, params, pairs or {})
    for norm, layer in layers.items():
        params = _fold(params, stats, norm, layer, epsilon)
    others = {name: tree for name, tree in variables.items() if name != "batch_stats"}
    return {**others, "params": traverse_util.unflatten_dict(params)}


def _flat(tree: Any) -> Tree:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {tuple(key.key for key in path): leaf for path, leaf in leaves}


def _partners(norms: list[Path], params: Tree, pairs: Mapping[str, str]) -> dict[Path, Path]:
    """The layer of each norm, by `pairs` or by name."""
    layers: dict[Path, Path] = {}
    unknown = sorted(pairs.keys() - {"/".join(norm) for norm in norms})
    if unknown:
        raise ValueError(f"pairs names {unknown[0]}, which is no batch norm of these variables")
    for norm in norms:
        named = pairs.get("/".join(norm))
        layer = tuple(named.split("/")) if named else _sibling(norm)
        if layer is None or (*layer, "kernel") not in params:
            raise ValueError(
                f"batch norm {'/'.join(norm)} has no layer to fold into: looked for a kernel at "
                f"{'/'.join(layer or ('?',))}; call it X{NORM_SUFFIX} beside the layer X, or name "
                "its layer in pairs"
            )
        if layer in layers.values():
            raise ValueError(f"two batch norms claim {'/'.join(layer)}; one is {'/'.join(norm)}")
        layers[norm] = layer
    return layers


def _sibling(norm: Path) -> Path | None:
    *parents, name = norm or ("",)
    stem = name.removesuffix(NORM_SUFFIX)
    return (*parents, stem) if stem != name else None


def _fold(params: Tree, stats: Tree, norm: Path, layer: Path, epsilon: float) -> Tree:
    kernel = jnp.asarray(params[(*layer, "kernel")], jnp.float32)
    mean, variance = (jnp.asarray(stats[(*norm, name)], jnp.float32) for name in ("mean", "var"))
    if mean.shape != kernel.shape[-1:]:
        raise ValueError(
            f"batch norm {'/'.join(norm)} has {mean.size} channels and the kernel of "
            f"{'/'.join(layer)} has shape {kernel.shape}, output channels last"
        )
    # A norm may have been built without a gain or an offset.
    ratio = params.get((*norm, "scale"), 1.0) / jnp.sqrt(variance + epsilon)
    bias = (params.get((*layer, "bias"), 0.0) - mean) * ratio + params.get((*norm, "bias"), 0.0)
    kept = {path: leaf for path, leaf in params.items() if path[:-1] != norm}
    return {
        **kept,
        (*layer, "kernel"): kernel * ratio,
        (*layer, "bias"): bias.astype(jnp.float32),
    }


def _check_statistics(params: Tree, stats: Tree) -> None:
    """Refuses what is called a norm but has no running mean and variance to fold."""
    norms = {path[:-1] for path in params if path[:-1] and path[-2].endswith(NORM_SUFFIX)}
    for norm in sorted(norms | {path[:-1] for path in stats}):
        if (*norm, "mean") not in stats or (*norm, "var") not in stats:
            raise ValueError(
                f"norm {'/'.join(norm)} has no running mean and var in batch_stats; only batch "
                "norm can be folded"
            )
