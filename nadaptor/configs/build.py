"""What a config stands for: its network and its optimizer; `data.registry` opens its images."""

import functools

import flax.linen as nn
import jax.numpy as jnp
import optax

from nadaptor.configs.config import Config, Dtype, OptimizerConfig
from nadaptor.data.registry import get_spec
from nadaptor.models import batch_norm, create
from nadaptor.models.config import NetworkConfig, QuantizerConfig, activation_slot


def build_model(
    config: Config,
    axis_name: str | None = None,
    *,
    folded: bool = False,
    num_classes: int | None = None,
) -> nn.Module:
    """Builds the network that a config trains.

    Args:
        config: the run.
        axis_name: mapped axis over which the batch is split, for the moments of batch norm, the
            start of the scales and the noise; None for one device.
        folded: whether batch norm is folded into the layers before it.
        num_classes: size of the last layer; None for the classes of the config's data set.

    Returns:
        The Linen module, without variables.

    Raises:
        ValueError: the model, data set or activation is unknown.
    """
    if num_classes is None:
        num_classes = get_spec(config.data.dataset).num_classes
    network = config.network, config.quantizer, config.step.dtype
    return _network(*network, num_classes, axis_name, folded)


def build_optimizer(config: Config, total_steps: int) -> optax.GradientTransformation:
    """Builds SGD with momentum, a cosine from the learning rate to 0, and decay of all parameters.

    With a warm-up, the rate rises from 0 along a line before, and the cosine has the other steps.

    Args:
        config: the run.
        total_steps: updates in it.

    Returns:
        The optimizer. The decay is added to the gradient before the momentum, as torch does.
    """
    return _sgd(config.optimizer, total_steps)


# Flax compares slots, and Optax its functions, by identity: without these caches each run would
# have a network and an optimizer of its own, and jit would compile the same step again.
@functools.cache
def _network(
    network: NetworkConfig,
    quantizer: QuantizerConfig,
    dtype: Dtype,
    num_classes: int,
    axis_name: str | None,
    folded: bool,
) -> nn.Module:
    norm = None if folded else functools.partial(batch_norm, axis_name=axis_name)
    chosen = {"width": network.width, "pool": network.pool}
    return create(
        network.model,
        num_classes,
        activation=activation_slot(quantizer, axis_name),
        norm=norm,
        dtype=jnp.dtype(dtype),
        **{name: value for name, value in chosen.items() if value is not None},
    )


@functools.cache
def _sgd(config: OptimizerConfig, total_steps: int) -> optax.GradientTransformation:
    rate, warmup = config.learning_rate, config.warmup_steps
    # Optax refuses a cosine of no steps, as a warm-up of the whole run leaves.
    schedule = optax.cosine_decay_schedule(rate, max(total_steps - warmup, 1))
    if warmup:
        rise = optax.linear_schedule(0, rate, warmup)
        schedule = optax.join_schedules([rise, schedule], [warmup])
    return optax.chain(
        optax.add_decayed_weights(config.weight_decay),
        optax.sgd(schedule, momentum=config.momentum),
    )
