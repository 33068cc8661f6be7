"""Fine-tuning in time: a few epochs through the spiking network itself, after its conversion.

`nadaptor.simulate` is a differentiable function once its neurons have a surrogate derivative. The
converted network is trained on what it does in its first T steps, spikes and all; the folded
weights, the biases and the thresholds learn.
"""

import contextlib
import dataclasses
import functools
import math
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from nadaptor import IntegrateAndFire, simulate
from nadaptor._checks import check_count
from nadaptor._files import making
from nadaptor.checkpoints.checkpoint import load_card, save_checkpoint
from nadaptor.configs.config import to_json
from nadaptor.configs.inference import RATES
from nadaptor.conversion.convert import load_snn, load_spikes
from nadaptor.conversion.origin import check_free
from nadaptor.data.loader import batches
from nadaptor.data.registry import open_split, steps_per_epoch
from nadaptor.data.source import Spec, normalize
from nadaptor.errors import RunError
from nadaptor.models import project_scales
from nadaptor.neurons import rectangle
from nadaptor.parallel import NumDevices, check_batch, choose_devices, place_step

NEURON = IntegrateAndFire(surrogate=rectangle)


@dataclasses.dataclass(frozen=True)
class FineTuning:
    """A run of fine-tuning; see `digits_na_finetuned` for what it costs and gives."""

    # T, time steps to unroll; memory grows with it.
    num_steps: int
    # Passes over the training images.
    epochs: int
    # Images a step.
    batch_size: int
    # Step size of the first update; a cosine takes it to 0 at the last.
    learning_rate: float
    # Share of the last update that is kept in the next.
    momentum: float
    # Seed of the order of the images.
    seed: int


def digits_na_finetuned() -> FineTuning:
    """Three epochs through the first 2 steps, for `digits_na` after `nadaptor convert`.

    `nadaptor finetune runs/digits_na/snn`
    """
    return FineTuning(
        num_steps=2, epochs=3, batch_size=64, learning_rate=0.01, momentum=0.9, seed=0
    )


@making("out")
def fine_tune(
    source: Path,
    out: Path,
    tuning: FineTuning,
    data_dir: Path | None = None,
    num_devices: NumDevices = None,
) -> list[float]:
    """Trains a converted network through its first T time steps, and writes the result.

    Args:
        source: folder that `convert` wrote.
        out: folder to make; `load_snn` and `simulate_checkpoint` read it.
        tuning: the run.
        data_dir: folder of data sets; None for the environment's NADAPTOR_DATA_DIR.
        num_devices: to train on; see `nadaptor.parallel.choose_devices`.

    Returns:
        The mean loss of each epoch.

    Raises:
        ValueError: there is no such checkpoint, it is not of rates, a count is not a positive int,
            the batch does not divide among the devices, `out` exists, or the data set's classes or
            files are not those of the training.
        RunError: the loss is not finite; nothing is written.
    """
    check_free(out)
    model, variables, config = load_snn(source)
    if (spikes := load_spikes(source)) != RATES:
        raise ValueError(
            f"{source} was converted with coding {spikes.coding!r} and nonaffine "
            f"{spikes.nonaffine!r}; fine-tuning in time is for rates and affine operations"
        )
    parent = load_card(source, "snn")
    images = open_split(config.data, "train", data_dir, known=parent.get("data"))
    size = check_count(tuning.batch_size, "batch_size")
    num_steps = check_count(tuning.num_steps, "num_steps")
    # Each step of time passes all of them.
    pixels = num_steps * size * math.prod(images.spec.image_shape[:2])
    devices = choose_devices(num_devices, size, pixels=pixels)
    check_batch(size, 1, devices)
    epoch_steps = steps_per_epoch(images.size, size)
    total = check_count(tuning.epochs, "epochs") * epoch_steps
    schedule = optax.cosine_decay_schedule(tuning.learning_rate, total)
    optimizer = optax.sgd(schedule, momentum=tuning.momentum)
    params = jax.tree.map(jnp.asarray, variables["params"])
    update = functools.partial(_update, model, optimizer, num_steps, images.spec, devices.axis_name)
    # Of (state, images, labels); there is no key, because nothing in a step is drawn.
    placed = place_step(update, devices, "pmap", (False, True, True))
    state, losses = placed.replicate((params, jax.jit(optimizer.init)(params))), []
    print(f"fine-tunes in {total} steps on {devices}")
    stream = batches(images, "none", tuning.seed, size, stop_step=total)
    with contextlib.closing(stream):
        for batch in stream:
            state, loss = placed.step(state, placed.put(batch.images), placed.put(batch.labels))
            # Waits for the step: on a CPU, collectives that run ahead may deadlock.
            losses.append(float(loss))
            if not jnp.isfinite(loss):
                raise RunError(f"the loss is {loss} at step {batch.step}; lower the learning rate")
    means = [sum(losses[i : i + epoch_steps]) / epoch_steps for i in range(0, total, epoch_steps)]
    card = {
        "config": to_json(config),
        "parent": parent["card_digest"],
        "data": parent.get("data"),
        "fine_tuning": dataclasses.asdict(tuning),
        "devices": devices.total,
        "losses": means,
    }
    save_checkpoint(out, "snn", {"params": jax.device_get(state[0])}, card)
    print(f"loss {means[0]:.4f} in the first epoch, {means[-1]:.4f} in the last")
    print(f"spiking network: {out}")
    return means


def time_loss(
    model: nn.Module, params: Any, images: jax.Array, labels: jax.Array, num_steps: int
) -> jax.Array:
    """Returns the cross-entropy of a spiking network, averaged over t = 1 to T.

    At every t it is that of the mean of the outputs so far, by which the network decides at t.

    Args:
        model: the folded network.
        params: its parameters; the loss is differentiable in them.
        images: [B, H, W, C].
        labels: [B], int.
        num_steps: T.

    Returns:
        A scalar.

    Raises:
        ValueError: as `nadaptor.simulate`.
    """
    # All T steps in one chunk: on CPU a backward convolution inside a scan is several times slower.
    sim = simulate(
        model.apply,
        {"params": params},
        images,
        num_steps=num_steps,
        neuron=NEURON,
        steps_per_chunk=num_steps,
    )
    # [T, B]: the outputs are the running means at every t, [T, B, classes].
    targets = jnp.broadcast_to(labels, sim.outputs.shape[:-1])
    return optax.softmax_cross_entropy_with_integer_labels(sim.outputs, targets).mean()


def _update(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    num_steps: int,
    spec: Spec,
    axis_name: str | None,
    state: tuple[Any, Any],
    images: jax.Array,
    labels: jax.Array,
) -> tuple[tuple[Any, Any], jax.Array]:
    """One update of (parameters, the optimizer's state), and the loss before it."""
    params, opt_state = state
    loss, grads = jax.value_and_grad(
        lambda params: time_loss(model, params, normalize(images, spec), labels, num_steps)
    )(params)
    if axis_name is not None:
        loss, grads = jax.lax.pmean((loss, grads), axis_name)
    updates, opt_state = optimizer.update(grads, opt_state, params)
    return (project_scales(optax.apply_updates(params, updates)), opt_state), loss
