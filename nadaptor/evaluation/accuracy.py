"""Accuracy on a split: of the trained network, noisy and not, and of the spiking one at every t."""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from nadaptor import simulate, spiking
from nadaptor._checks import check_count
from nadaptor.configs.inference import PLAIN, Inference
from nadaptor.data.registry import Split
from nadaptor.early_exit import early_exit

BATCH_SIZE = 128


class SpikingAccuracy(NamedTuple):
    """What a simulation of T steps over a split gives."""

    accuracy: list[float]  # at index t - 1, the share that is right after t steps
    spikes_per_neuron: dict[str, float]  # a layer: mean over its neurons and the images, in T steps
    early_exit: list[dict[str, float]]  # a threshold each: `confidence`, `accuracy`, `mean_steps`


def ann_accuracy(
    model: nn.Module, variables: Any, split: Split, noise_key: jax.Array | None = None
) -> float:
    """Returns the share of a split that the trained network classifies correctly.

    Args:
        model: the network, with batch norm or folded.
        variables: its variables.
        split: images and labels.
        noise_key: None for the deterministic network; a typed PRNG key, consumed, to have the noise
            on in the layers that have one.

    Returns:
        A share, 0 to 1.
    """
    right = 0
    for i, (images, labels) in enumerate(_batches(split)):
        key = None if noise_key is None else jax.random.fold_in(noise_key, i)
        right += int(_count_right(model, variables, images, labels, key))
    return right / len(split.labels)


def snn_accuracy(
    model: nn.Module,
    variables: Any,
    split: Split,
    num_steps: int,
    steps_per_chunk: int | None = None,
    inference: Inference = PLAIN,
    confidences: Sequence[float] = (),
) -> SpikingAccuracy:
    """Returns the accuracy of the spiking network at every t up to T, from one run.

    The images are simulated on all local devices, equal parts of a batch on each.

    Args:
        model: the folded network with quantized activations, which treats images independently.
        variables: its variables.
        split: images and labels.
        num_steps: T.
        steps_per_chunk: time steps folded into one evaluation; None for what suits the machine. See
            `nadaptor.simulate`.
        inference: the neuron and the correction.
        confidences: softmax confidences at which to stop an image early, one row of `early_exit`
            each; see `nadaptor.early_exit.early_exit`. Its `mean_steps` are counted steps.

    Returns:
        Accuracy at t = 1 to T, spikes for each layer, and the price and accuracy of early exit.

    Raises:
        ValueError: a count is not a positive int, or the network cannot be converted.
    """
    num_steps = check_count(num_steps, "num_steps")
    right, spikes = np.zeros(num_steps, np.int64), 0.0
    stops = np.asarray(confidences, np.float32)
    exits = np.zeros((2, len(stops)), np.int64)
    for images, labels in _batches(split, jax.local_device_count()):
        hits, counts, stopped = _simulate_batch(
            model,
            variables,
            images,
            labels,
            stops,
            num_steps=num_steps,
            steps_per_chunk=steps_per_chunk,
            inference=inference,
        )
        right, spikes = right + np.asarray(hits), spikes + np.asarray(counts, np.float64)
        exits = exits + np.asarray(stopped)
    one = jax.ShapeDtypeStruct((1, *split.images.shape[1:]), jnp.float32)
    layers = spiking(model.apply, variables, one).layers
    neurons = np.array([np.prod(layer.shape) for layer in layers])
    means = spikes / (neurons * len(split.labels))
    named = {layer.name: float(mean) for layer, mean in zip(layers, means, strict=True)}
    rows = [
        {"confidence": float(c), "accuracy": float(a), "mean_steps": float(s)}
        for c, a, s in zip(confidences, *(exits / len(split.labels)), strict=True)
    ]
    return SpikingAccuracy((right / len(split.labels)).tolist(), named, rows)


def _batches(split: Split, parts: int = 1) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Batches of one size, so that one compiled program serves all; a label of -1 is padding.

    They divide into equal parts.
    """
    size = parts * -(-min(BATCH_SIZE, len(split.labels)) // parts)
    for start in range(0, len(split.labels), size):
        images, labels = (x[start : start + size] for x in split)
        missing = size - len(labels)
        padding = [(0, missing)] + [(0, 0)] * (images.ndim - 1)
        yield np.pad(images, padding), np.pad(labels, (0, missing), constant_values=-1)


@functools.partial(jax.jit, static_argnums=0)
def _count_right(
    model: nn.Module, variables: Any, images: jax.Array, labels: jax.Array, key: jax.Array | None
) -> jax.Array:
    logits: Any = model.apply(variables, images, rngs=None if key is None else {"noise": key})
    return (logits.argmax(-1) == labels).sum()


@functools.partial(
    jax.jit, static_argnums=0, static_argnames=("num_steps", "steps_per_chunk", "inference")
)
def _simulate_batch(
    model: nn.Module,
    variables: Any,
    images: jax.Array,
    labels: jax.Array,
    confidences: jax.Array,
    *,
    num_steps: int,
    steps_per_chunk: int | None,
    inference: Inference,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Sums over the images with a label: right at every t, spikes, right and steps at each exit."""
    sim = simulate(
        model.apply,
        variables,
        images,
        num_steps=num_steps,
        steps_per_chunk=steps_per_chunk,
        neuron=inference.neuron,
        correction=inference.correction,
        in_axes=(None, 0),
        devices=None if jax.local_device_count() == 1 else jax.local_devices(),
    )
    real = labels >= 0
    spikes = [jnp.einsum("b...,b->", n.astype(jnp.float32), real) for n in sim.spike_counts]
    exits = early_exit(sim.outputs, confidences)
    stopped = jnp.stack([(exits.predictions == labels).sum(1), (exits.steps * real).sum(1)])
    return (sim.outputs.argmax(-1) == labels).sum(1), jnp.stack(spikes), stopped
