"""Accuracy on a split: of the trained network, noisy or not, and of the spiking one at every t.

Both read the split's evaluation batches as they are stored, and normalise on the devices: memory
does not grow with the number of images.
"""

import contextlib
import functools
from collections.abc import Generator, Iterator, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from nadaptor import simulate, spiking
from nadaptor._checks import check_count
from nadaptor.configs.inference import PLAIN, Inference
from nadaptor.data.loader import Batch, evaluation_batches
from nadaptor.data.source import Source, Spec, images_together, normalize
from nadaptor.early_exit import early_exit, simulate_with_early_exit
from nadaptor.parallel import AXIS, Devices


class SpikingAccuracy(NamedTuple):
    """What a simulation of T steps over a split gives."""

    accuracy: list[float]  # at index t - 1, the fraction that is right after t steps
    spikes_per_neuron: dict[str, float]  # a layer: mean over its neurons and the images, in T steps
    mean_spikes: float  # the mean over the neurons of all layers and the images, in T steps
    early_exit: list[dict[str, float]]  # a threshold each: `confidence`, `accuracy`, `mean_steps`
    settled: int | None  # with sum coding: the last step at which a neuron sent a spike


class ExitAccuracy(NamedTuple):
    """What a simulation gives that stops where it is sure."""

    confidence: float
    accuracy: float  # fraction of the images that is right where they stop
    mean_steps: float  # counted steps of an image, those of a correction not among them


def ann_accuracy(
    model: nn.Module,
    variables: Any,
    source: Source,
    noise_key: jax.Array | None = None,
    devices: Devices | None = None,
) -> float:
    """Returns the fraction of a split that the trained network classifies correctly.

    Every process reads its own part of each batch; all get the same answer.

    Args:
        model: the network for one device, with batch norm or folded.
        variables: its variables, on the host or anywhere.
        source: the split.
        noise_key: None for the deterministic network; a typed PRNG key, consumed, to have the noise
            on in the layers that have one.
        devices: where to run; None for the first of this process.

    Returns:
        A fraction, 0 to 1.

    Raises:
        ValueError: a file is damaged.
    """
    devices = devices or Devices(tuple(jax.local_devices()[:1]), 0, 1)
    # The compiler splits the program by where its batch lies: the network names no axis.
    mesh = Mesh(np.array(devices.local), (AXIS,))
    split, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((AXIS,), ()))
    # By way of the host, because they may lie on other devices.
    variables = jax.device_put(jax.device_get(variables), whole)
    right = 0
    for batch in _batches(source, devices.total, devices):
        key = None
        if noise_key is not None:
            step_key = jax.random.fold_in(noise_key, batch.step)
            # Each process counts its images from 0: the key tells their noise apart.
            key = jax.device_put(jax.random.fold_in(step_key, devices.process_index), whole)
        images, labels = (jax.device_put(x, split) for x in (batch.images, batch.labels))
        right += int(_count_right(model, source.spec, variables, images, labels, key))
    return _over_processes(right, devices) / source.size


def snn_accuracy(
    model: nn.Module,
    variables: Any,
    source: Source,
    num_steps: int,
    steps_per_chunk: int | None = None,
    inference: Inference = PLAIN,
    confidences: Sequence[float] = (),
) -> SpikingAccuracy:
    """Returns the accuracy of the spiking network at every t up to T, from one run.

    The images are simulated on all local devices, equal parts of a batch on each. On a terminal, a
    bar shows how far it is.

    Args:
        model: the folded network with quantized activations, which treats images independently.
        variables: its variables.
        source: the split.
        num_steps: T.
        steps_per_chunk: time steps folded into one evaluation; None for what suits the machine. See
            `nadaptor.simulate`.
        inference: the neuron and the correction.
        confidences: softmax confidences at which to stop an image early, one row of `early_exit`
            each; see `nadaptor.early_exit.early_exit`. Its `mean_steps` are counted steps.

    Returns:
        Accuracy at t = 1 to T, spikes for each layer, and the price and accuracy of early exit.

    Raises:
        ValueError: a count is not a positive int, the network cannot be converted, or a file is
            damaged.
    """
    num_steps = check_count(num_steps, "num_steps")
    spec, stops = source.spec, np.asarray(confidences, np.float32)
    one = jax.ShapeDtypeStruct((1, *spec.image_shape), jnp.float32)
    coding, nonaffine = inference.coding, inference.nonaffine
    # On one image, for the names and sizes of the layers.
    layers = spiking(model.apply, variables, one, coding=coding, nonaffine=nonaffine).layers
    variables = jax.device_put(variables)
    # In float64: from 2^24 on, a float32 does not count by ones.
    right, spikes = np.zeros(num_steps, np.int64), np.zeros(len(layers))
    exits, settled = np.zeros((2, len(stops)), np.int64), 0
    for batch in _batches(source, jax.local_device_count()):
        hits, counts, stopped, last = _simulate_batch(
            model,
            variables,
            batch.images,
            batch.labels,
            stops,
            spec=spec,
            num_steps=num_steps,
            steps_per_chunk=steps_per_chunk,
            inference=inference,
        )
        right, spikes = right + np.asarray(hits), spikes + np.asarray(counts, np.float64)
        exits = exits + np.asarray(stopped)
        # With rates there is no last step.
        settled = None if last is None or settled is None else max(settled, int(last))
    neurons = np.array([np.prod(layer.shape) for layer in layers])
    means = spikes / (neurons * source.size)
    named = {layer.name: float(mean) for layer, mean in zip(layers, means, strict=True)}
    rows = [
        {"confidence": float(c), "accuracy": float(a), "mean_steps": float(s)}
        for c, a, s in zip(confidences, *(exits / source.size), strict=True)
    ]
    mean = float(spikes.sum() / (neurons.sum() * source.size))
    return SpikingAccuracy((right / source.size).tolist(), named, mean, rows, settled)


def exit_accuracy(
    model: nn.Module,
    variables: Any,
    source: Source,
    num_steps: int,
    confidence: float,
    inference: Inference = PLAIN,
) -> ExitAccuracy:
    """Returns the accuracy of the spiking network where each image stops once it is sure.

    The steps that no image of a tile needs any more are not run, as in
    `nadaptor.early_exit.simulate_with_early_exit`; the result is the row of `early_exit` in
    `snn_accuracy` for the same confidence, up to the rounding of sums.

    Args:
        model: as for `snn_accuracy`.
        variables: its variables.
        source: the split.
        num_steps: T, the most steps of an image.
        confidence: the largest softmax probability at which an image stops, above 0.
        inference: as for `snn_accuracy`.

    Returns:
        The accuracy, and the mean of the steps that were counted.

    Raises:
        ValueError: as `snn_accuracy`, or the confidence is not between 0 and 1.
    """
    if not 0 < confidence <= 1:
        raise ValueError(f"confidence must be above 0 and at most 1, not {confidence!r}")
    num_steps, variables = check_count(num_steps, "num_steps"), jax.device_put(variables)
    totals = np.zeros(2, np.int64)
    for batch in _batches(source, jax.local_device_count()):
        totals = totals + np.asarray(
            _stop_batch(
                model,
                variables,
                batch.images,
                batch.labels,
                confidence,
                spec=source.spec,
                num_steps=num_steps,
                inference=inference,
            )
        )
    right, steps = (totals / source.size).tolist()
    return ExitAccuracy(confidence, right, steps)


def _batches(source: Source, parts: int, devices: Devices | None = None) -> Iterator[Batch]:
    """Evaluation batches of one size, so that one program serves all, which divides into parts."""
    # A small split is one batch, with no more padding than its parts need.
    size = parts * min(images_together(source.spec), -(-source.size // parts))
    index, count = (devices.process_index, devices.process_count) if devices else (0, 1)
    stream = evaluation_batches(source, size, process_index=index, process_count=count)
    return _shown(stream, -(-source.size // size), hidden=index > 0)


def _shown(stream: Generator[Batch], total: int, hidden: bool) -> Generator[Batch, None, None]:
    """The batches, with a bar on a terminal from the second on."""
    from tqdm import tqdm

    with contextlib.closing(stream):
        # None hides the bar where there is no terminal.
        hide = True if hidden or total < 2 else None
        yield from tqdm(stream, total=total, unit="batch", leave=False, disable=hide)


def _over_processes(count: int, devices: Devices) -> int:
    if devices.process_count == 1:
        return count
    from jax.experimental import multihost_utils

    return int(multihost_utils.process_allgather(np.array(count)).sum())


@functools.partial(jax.jit, static_argnums=(0, 1))
def _count_right(
    model: nn.Module,
    spec: Spec,
    variables: Any,
    images: jax.Array,
    labels: jax.Array,
    key: jax.Array | None,
) -> jax.Array:
    # Without that stream the network is deterministic.
    rngs = None if key is None else {"noise": key}
    logits: Any = model.apply(variables, normalize(images, spec), rngs=rngs)
    return (logits.argmax(-1) == labels).sum()


@functools.partial(
    jax.jit, static_argnums=0, static_argnames=("spec", "num_steps", "steps_per_chunk", "inference")
)
def _simulate_batch(
    model: nn.Module,
    variables: Any,
    images: jax.Array,
    labels: jax.Array,
    confidences: jax.Array,
    *,
    spec: Spec,
    num_steps: int,
    steps_per_chunk: int | None,
    inference: Inference,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """Sums over the images with a label: right at every t, spikes, right and steps at each exit.

    Last comes the step at which all have settled, those that fill the batch included.
    """
    sim = simulate(
        model.apply,
        variables,
        normalize(images, spec),
        num_steps=num_steps,
        steps_per_chunk=steps_per_chunk,
        **_how(inference),
    )
    # What fills the last batch has the label -1, which no prediction equals.
    real = labels >= 0
    spikes = [jnp.einsum("b...,b->", n.astype(jnp.float32), real) for n in sim.spike_counts]
    exits = early_exit(sim.outputs, confidences)
    stopped = jnp.stack([(exits.predictions == labels).sum(1), (exits.steps * real).sum(1)])
    right = (sim.outputs.argmax(-1) == labels).sum(1)
    return right, jnp.stack(spikes), stopped, sim.settled


# The confidence is traced: another one needs no other program.
@functools.partial(jax.jit, static_argnums=0, static_argnames=("spec", "num_steps", "inference"))
def _stop_batch(
    model: nn.Module,
    variables: Any,
    images: jax.Array,
    labels: jax.Array,
    confidence: float,
    *,
    spec: Spec,
    num_steps: int,
    inference: Inference,
) -> jax.Array:
    """Sums over the images with a label: right where they stop, and the steps until then."""
    exits = simulate_with_early_exit(
        model.apply,
        variables,
        normalize(images, spec),
        num_steps=num_steps,
        confidence=confidence,
        **_how(inference),
    )
    return jnp.stack([(exits.predictions[0] == labels).sum(), exits.steps[0] @ (labels >= 0)])


def _how(inference: Inference) -> dict[str, Any]:
    """The options of a simulation of images that are independent, on all local devices."""
    return {
        **inference.options,
        "fast_convolution": inference.fast_convolution,
        "events": inference.events,
        "in_axes": (None, 0),
        "devices": None if jax.local_device_count() == 1 else jax.local_devices(),
    }
