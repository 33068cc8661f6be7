"""Programs for accelerators, lowered on a CPU host at ImageNet shape; nothing is computed."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax import export

import nadaptor
from nadaptor.configs.build import build_model, build_optimizer
from nadaptor.conversion.convert import build_folded
from nadaptor.data.registry import get_spec
from nadaptor.parallel import choose_devices, place_step
from nadaptor.training import get_config
from nadaptor.training.state import init_state
from nadaptor.training.step import build_step

PLATFORMS = ("tpu", "cuda")
BATCH = 8
CONFIG = get_config("folder_resnet50_na")
SPEC = get_spec("imagenet2012")
IMAGES = jax.ShapeDtypeStruct((BATCH, *SPEC.image_shape), jnp.float32)
KEY = jax.eval_shape(lambda: jax.random.key(0))


def exported(program, *shapes):
    return export.export(program, platforms=PLATFORMS)(*shapes)


@pytest.mark.parametrize("num_devices", [1, 8])
def test_the_training_step_lowers_for_tpu_and_cuda(num_devices):
    model, optimizer = build_model(CONFIG, num_classes=SPEC.num_classes), build_optimizer(CONFIG, 9)
    state = jax.eval_shape(lambda x, k: init_state(model, optimizer, x, k), IMAGES, KEY)
    devices = choose_devices(num_devices)
    step = build_step(CONFIG, SPEC, 9, devices.axis_name)
    stored = jax.ShapeDtypeStruct(IMAGES.shape, jnp.uint8)
    labels = jax.ShapeDtypeStruct((BATCH,), jnp.int32)
    placed = place_step(step, devices, "shard_map")
    program = exported(placed.step, state, stored, labels, KEY)
    assert (program.platforms, program.nr_devices) == (PLATFORMS, num_devices)
    found = jax.tree.unflatten(program.out_tree, program.out_avals)[0]
    assert jax.tree.map(jnp.shape, found) == jax.tree.map(jnp.shape, state)


def test_the_simulator_lowers_for_tpu_and_cuda():
    folded = build_folded(CONFIG, SPEC.num_classes)
    variables = jax.eval_shape(folded.init, KEY, IMAGES)
    simulate = jax.jit(functools.partial(nadaptor.simulate, folded.apply, num_steps=8))
    program = exported(simulate, variables, IMAGES)
    assert program.platforms == PLATFORMS
    sim = jax.tree.unflatten(program.out_tree, program.out_avals)
    assert sim.outputs.shape == (8, BATCH, SPEC.num_classes)
    assert len(sim.spike_counts) == 49
