"""Kernels in torch's order of axes, and dense weights on maps that torch flattens."""

import math
from collections.abc import Mapping

import numpy as np

from nadaptor.interop.torch_pickle import shown


def torch_axes(rank: int) -> tuple[int, ...]:
    """Returns torch's axes in our order: [out, in, h, w] -> [h, w, in, out].

    Example:
        >>> torch_axes(2)
        (1, 0)
    """
    return {4: (2, 3, 1, 0), 2: (1, 0)}.get(rank, tuple(range(rank)))


def torch_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the shape in torch of an array of ours.

    Example:
        >>> torch_shape((3, 3, 8, 16))
        (16, 8, 3, 3)
    """
    inverse = np.argsort(torch_axes(len(shape)))
    return tuple(shape[axis] for axis in inverse)


def over_maps(
    state: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, np.ndarray]:
    """Returns dense weights on a flattened map as a convolution's over it, where we have that.

    Args:
        state: arrays by torch's names.
        shapes: the shapes of the network's arrays, by torch's names and in our order of axes.

    Returns:
        The state, dense weights [out, C * H * W] as [out, C, H, W] for a kernel of [H, W, C, out].
    """

    def shaped(name: str, array: np.ndarray) -> np.ndarray:
        shape = torch_shape(shapes.get(name, ()))
        whole = array.ndim == 2 and len(shape) == 4
        whole = whole and array.shape == (shape[0], math.prod(shape[1:]))
        return array.reshape(shape) if whole else array

    return {name: shaped(name, array) for name, array in state.items()}


def in_order(
    state: Mapping[str, np.ndarray], flattened: Mapping[str, tuple[int, int, int] | None]
) -> dict[str, np.ndarray]:
    """Returns the state, dense weights on flattened maps with their columns in our order.

    Args:
        state: arrays by torch's names.
        flattened: of a layer that reads a flattened map, the map's shape (C, H, W) where the
            network flattens [B, H, W, C], and None where it has torch's order.

    Raises:
        ValueError: a layer has no dense weights, its map another size, or a layer that is not in
            `flattened` reads a count of values that no layer puts out.
    """
    ordered = dict(state)
    for layer, shape in flattened.items():
        array = state.get(f"{layer}.weight")
        if array is None or array.ndim != 2:
            raise ValueError(f"flattened names {layer!r}, which has no dense weights in the file")
        if shape is not None and math.prod(shape) != array.shape[1]:
            raise ValueError(f"{layer} reads {array.shape[1]} values, and not a map of {shape}")
        if shape is not None:
            # torch flattens [C, H, W], and the network [H, W, C].
            maps = array.reshape(len(array), *shape).transpose(0, 2, 3, 1)
            ordered[f"{layer}.weight"] = maps.reshape(array.shape)
    for name, array in state.items():
        layer = name.rpartition(".")[0]
        if array.ndim == 2 and layer not in flattened:
            _check_inputs(layer, array.shape[1], state)
    return ordered


def _check_inputs(layer: str, inputs: int, state: Mapping[str, np.ndarray]) -> None:
    """Refuses a dense layer that reads what no layer puts out but the pixels of a map."""
    others = {name: array for name, array in state.items() if name.rpartition(".")[0] != layer}
    outputs = {len(array) for array in others.values() if array.ndim}
    maps = {len(array) for array in others.values() if array.ndim == 4}
    # No more than a guess, and so it asks: a flattened map has a multiple of its channels.
    if inputs not in outputs and any(inputs % channels == 0 for channels in maps):
        raise ValueError(
            f"{shown(layer)} reads {inputs} values, as no layer puts out: a map, perhaps, which "
            "torch flattens as [C, H, W]. If your network flattens it as [H, W, C], pass "
            f"flattened={{'{shown(layer)}': (C, H, W)}} with the map's shape; if its order is "
            f"torch's, pass flattened={{'{shown(layer)}': None}}"
        )
