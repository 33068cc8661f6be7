"""The accuracy on a split as it is stored, on all devices: for the loop and --evaluate-only."""

import functools
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from nadaptor.data.loader import evaluation_batches
from nadaptor.data.source import Source, Spec, normalize
from nadaptor.parallel import AXIS, Devices

# Images a device and batch.
BATCH_SIZE = 128


def source_accuracy(model: nn.Module, variables: Any, source: Source, devices: Devices) -> float:
    """Returns the share of a split that the deterministic network classifies correctly.

    Every process reads its own part of each batch; all get the same answer.

    Args:
        model: the network, for one device.
        variables: its variables, on the host or anywhere.
        source: the split.
        devices: where to run.

    Returns:
        A share, 0 to 1.
    """
    mesh = Mesh(np.array(devices.local), (AXIS,))
    split, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((AXIS,), ()))
    variables = jax.device_put(jax.device_get(variables), whole)
    right = 0
    for batch in evaluation_batches(
        source,
        BATCH_SIZE * devices.total,
        process_index=devices.process_index,
        process_count=devices.process_count,
    ):
        images, labels = (jax.device_put(x, split) for x in (batch.images, batch.labels))
        right += int(_count_right(model, source.spec, variables, images, labels))
    return _over_processes(right, devices) / source.size


def _over_processes(count: int, devices: Devices) -> int:
    if devices.process_count == 1:
        return count
    from jax.experimental import multihost_utils

    return int(multihost_utils.process_allgather(np.array(count)).sum())


@functools.partial(jax.jit, static_argnums=(0, 1))
def _count_right(
    model: nn.Module, spec: Spec, variables: Any, images: jax.Array, labels: jax.Array
) -> jax.Array:
    logits: Any = model.apply(variables, normalize(images, spec))
    return (logits.argmax(-1) == labels).sum()
