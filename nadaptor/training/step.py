"""One training step as a pure function, and what it needs: the network and its optimizer."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from nadaptor.configs.build import build_model, build_optimizer
from nadaptor.configs.config import Config, StepConfig
from nadaptor.data.augmentation import augment_batch
from nadaptor.data.source import Spec
from nadaptor.models import project_scales
from nadaptor.training.state import TrainState


class Metrics(NamedTuple):
    """What one step measures on its batch, before the update; means over the images."""

    loss: jax.Array
    accuracy: jax.Array  # 0 to 1


# (key, images, place of the first of them in the whole) -> the images as the network takes them
Prepare = Callable[[jax.Array, jax.Array, jax.Array | int], jax.Array]


def build_step(
    config: Config, spec: Spec, total_steps: int, axis_name: str | None = None
) -> Callable[..., tuple[TrainState, Metrics]]:
    """Builds the whole step of a run, from images as they are stored.

    Args:
        config: the run.
        spec: of its data set.
        total_steps: updates in it.
        axis_name: mapped axis over which the batch is split.

    Returns:
        `step(state, images, labels, key)`, a pure function: `augment_batch`, then `train_step`. The
        same arguments give the same function, for jit to know it again.
    """
    model = build_model(config, axis_name, num_classes=spec.num_classes)
    optimizer = build_optimizer(config, total_steps)
    return _step(model, optimizer, config.step, axis_name, spec)


def train_step(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    images: jax.Array,
    labels: jax.Array,
    key: jax.Array,
    *,
    config: StepConfig,
    axis_name: str | None = None,
    prepare: Prepare | None = None,
) -> tuple[TrainState, Metrics]:
    """Does one update: a pure function, to be jitted or mapped with the state donated.

    With several micro-batches, every A-th image makes one, so that neither its images nor its
    noise depend on how many devices share the batch; they run one after another, batch norm's
    averages are handed on, and the gradients are averaged. With an average of the parameters,
    `a <- d * a + (1 - d) * params` after the update.

    Args:
        model: the network; built with the same `axis_name`.
        optimizer: its optimizer.
        state: the state before.
        images: [B, H, W, C]; this device's part.
        labels: [B], int.
        key: typed PRNG key of the run, the same at every step and on every device: what a step
            draws comes from `fold_in(key, step)`, the micro-batch, and an example's place in it.
        config: label smoothing, micro-batches and the average of the parameters.
        axis_name: mapped axis over which gradients and metrics are averaged.
        prepare: what augments and normalises the images; None where they come ready.

    Returns:
        The new state, scales at their positive floor or above, and the metrics of the batch.
    """
    step_key = jax.random.fold_in(key, state.step)
    # The devices hold the batch in its order, and of each micro-batch a part in the same order.
    first = 0 if axis_name is None else jax.lax.axis_index(axis_name)
    first = first * (len(labels) // config.micro_batches)

    def one(batch_stats: Any, part: tuple[jax.Array, ...]) -> tuple[Any, tuple[Any, Metrics]]:
        images, labels, index = part
        noise_key, augmentation_key = jax.random.split(jax.random.fold_in(step_key, index))
        if prepare is not None:
            images = prepare(augmentation_key, images, first)
        grads, batch_stats, metrics = _gradients(
            model, state.params, batch_stats, images, labels, noise_key, config.label_smoothing
        )
        return batch_stats, (grads, metrics)

    parts = config.micro_batches
    batch_stats, (grads, metrics) = _in_parts(one, state.batch_stats, images, labels, parts)
    if axis_name is not None:
        # The statistics need no mean: batch norm averages its moments over the axis itself.
        grads, metrics = jax.lax.pmean((grads, metrics), axis_name)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = project_scales(optax.apply_updates(state.params, updates))
    average = state.average
    if average is not None:
        # Optax takes the fraction of the new value.
        average = optax.incremental_update(params, average, 1 - config.ema_decay)
    return TrainState(state.step + jnp.int32(1), params, batch_stats, opt_state, average), metrics


def _gradients(
    model: nn.Module,
    params: Any,
    batch_stats: Any,
    images: jax.Array,
    labels: jax.Array,
    noise_key: jax.Array,
    smoothing: float,
) -> tuple[Any, Any, Metrics]:
    """Gradients of the mean loss of some images, batch norm's new averages, and the metrics."""

    def loss_of(params: Any) -> tuple[jax.Array, tuple[jax.Array, Any]]:
        logits, updated = model.apply(
            {"params": params, "batch_stats": batch_stats},
            images,
            train=True,
            rngs={"noise": noise_key},
            mutable=["batch_stats"],
        )
        if smoothing:
            targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), smoothing)
            losses = optax.softmax_cross_entropy(logits, targets)
        else:
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        # A network without batch norm has no statistics.
        return losses.mean(), (logits, updated.get("batch_stats", {}))

    (loss, (logits, updated)), grads = jax.value_and_grad(loss_of, has_aux=True)(params)
    return grads, updated, Metrics(loss, (logits.argmax(-1) == labels).mean())


def _in_parts(
    one: Callable[[Any, tuple[jax.Array, ...]], tuple[Any, Any]],
    batch_stats: Any,
    images: jax.Array,
    labels: jax.Array,
    count: int,
) -> tuple[Any, Any]:
    """Runs `one` on each micro-batch in turn; returns the last statistics, and means."""
    if count == 1:
        return one(batch_stats, (images, labels, jnp.int32(0)))
    # [B, ...] -> [A, B / A, ...]: part i is images i, i + A, i + 2A and so on.
    parts = [
        x.reshape(len(x) // count, count, *x.shape[1:]).swapaxes(0, 1) for x in (images, labels)
    ]
    # The sums are carried, and not stacked: micro-batches are there to save memory.
    shapes = jax.eval_shape(one, batch_stats, (parts[0][0], parts[1][0], jnp.int32(0)))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes[1])

    def body(carry: tuple[Any, Any], part: tuple[jax.Array, ...]) -> tuple[Any, None]:
        stats, measured = one(carry[0], part)
        return (stats, jax.tree.map(lambda sum, x: sum + x / count, carry[1], measured)), None

    carry, _ = jax.lax.scan(body, (batch_stats, zeros), (*parts, jnp.arange(count)))
    return carry


@functools.cache
def _step(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    config: StepConfig,
    axis_name: str | None,
    spec: Spec,
) -> Callable[..., tuple[TrainState, Metrics]]:
    def prepare(key: jax.Array, images: jax.Array, first: jax.Array | int) -> jax.Array:
        return augment_batch(key, images, spec, config.augmentation, first)

    return functools.partial(
        train_step, model, optimizer, config=config, axis_name=axis_name, prepare=prepare
    )
