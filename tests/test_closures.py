"""What a function closes over: its weights of today, its training mode, its checked scales."""

import pathlib

import equinox as eqx
import flax.errors
import flax.linen as nn
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

import nadaptor
from nadaptor.calibration import calibrate_thresholds, maximum
from nadaptor.early_exit import simulate_with_early_exit
from nadaptor.models import Lsq, NoiseAdaptor, fold_batch_norm, project_scales

X = jnp.asarray(np.arange(-8, 8).reshape(4, 4) / 4, jnp.float32)
EYE = jnp.eye(4)
OPTIONS = {
    "spiking": lambda f: _step(f),
    "whole": lambda f: nadaptor.simulate(f, X, num_steps=2).outputs[-1],
    "tiles": lambda f: nadaptor.simulate(f, X, num_steps=2, in_axes=0, tile_size=2).outputs[-1],
    "shards": lambda f: nadaptor.simulate(
        f, X, num_steps=2, in_axes=0, devices=jax.devices()[:2]
    ).outputs[-1],
    "calibration": lambda f: calibrate_thresholds(f, X, rule=maximum()).thresholds[0],
    "early exit": lambda f: simulate_with_early_exit(f, X, num_steps=2, confidence=1.1).predictions,
}


def _step(f):
    net = nadaptor.spiking(f, X)
    prepared = net.prepare(X)
    return net.step(net.init(prepared), prepared)[1]


@pytest.mark.parametrize("run", OPTIONS.values(), ids=OPTIONS)
def test_a_closure_is_simulated_with_the_weights_that_it_has_now(run):
    held = {"w": EYE}

    def f(x):
        return nadaptor.lsq(x @ held["w"], 0.5, 2)

    run(f)
    held["w"] = 2 * EYE[::-1]
    fresh = run(lambda x: nadaptor.lsq(x @ (2 * EYE[::-1]), 0.5, 2))
    np.testing.assert_array_equal(run(f), fresh)


class Network(nnx.Module):
    def __init__(self):
        self.first = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
        self.norm = nnx.BatchNorm(4, use_running_average=True, rngs=nnx.Rngs(0))
        self.dropout = nnx.Dropout(0.5, deterministic=True, rngs=nnx.Rngs(0))
        self.quant_scale = nnx.Param(jnp.float32(0.5))

    def __call__(self, x):
        x = self.dropout(self.norm(self.first(x)))
        return nadaptor.lsq(x, self.quant_scale[...], 2)


def test_an_nnx_module_trained_between_two_calls_is_simulated_as_it_is():
    net = Network()
    before = nadaptor.simulate(net, X, num_steps=2).outputs[-1]
    net.first.kernel[...] = 2 * EYE
    after = nadaptor.simulate(net, X, num_steps=2).outputs[-1]
    assert not jnp.array_equal(before, after)
    np.testing.assert_array_equal(after, net(X))


def test_an_nnx_module_switched_to_training_is_refused():
    net = Network()
    nadaptor.spiking(net, X)
    net.dropout.deterministic = False
    # NNX itself refuses to draw from a generator that it keeps outside the trace.
    with pytest.raises(flax.errors.TraceContextError, match="Cannot mutate RngCount"):
        nadaptor.spiking(net, X)


@pytest.mark.parametrize("tree", [lambda net: nnx.state(net), lambda net: net])
def test_the_scales_of_an_nnx_network_are_projected(tree):
    net = Network()
    net.quant_scale[...] = jnp.float32(-1)
    scales = [
        float(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(project_scales(tree(net), 0.25))
        if "quant_scale" in jax.tree_util.keystr(path)
    ]
    assert scales == [0.25]


def test_the_scales_of_an_equinox_module_are_projected():
    class Module(eqx.Module):
        threshold: jax.Array
        scale: jax.Array

    found = project_scales(Module(jnp.float32(-1), jnp.float32(-1)), 0.25)
    assert (found.threshold, found.scale) == (0.25, -1)


def test_folding_an_nnx_state_names_what_to_pass():
    net = nnx.Dict(fc=nnx.Linear(4, 4, rngs=nnx.Rngs(0)), fc_norm=Network().norm)
    net.fc_norm.mean[...] = jnp.ones(4)
    with pytest.raises(ValueError, match=r"nnx.to_pure_dict\(nnx.state\(module, nnx.Param\)\)"):
        fold_batch_norm(nnx.state(net))
    params, stats = (nnx.to_pure_dict(nnx.state(net, kind)) for kind in (nnx.Param, nnx.BatchStat))
    folded = fold_batch_norm({"params": params, "batch_stats": stats})["params"]["fc"]
    expected = net.fc_norm(net.fc(X), use_running_average=True)
    np.testing.assert_allclose(X @ folded["kernel"] + folded["bias"], expected, atol=1e-6)


QUANTIZERS = {
    "lsq": lambda v, s: nadaptor.lsq(v, s, 2),
    "noise_adaptor": lambda v, s: nadaptor.noise_adaptor(jax.random.key(0), v, s, 2, amplitude=0.0),
    "clipped_relu": nadaptor.clipped_relu,
    "qcfs": lambda v, s: nadaptor.qcfs(v, s, 2),
    "slip_relu": lambda v, s: nadaptor.slip_relu(v, s, 2),
}


@pytest.mark.parametrize("quantizer", QUANTIZERS.values(), ids=QUANTIZERS)
def test_a_bad_scale_of_a_closure_is_refused_under_jit(quantizer):
    for scale in (-1.0, np.float32("nan"), jnp.float32(0)):
        with pytest.raises(ValueError, match="must be finite and positive"):
            jax.jit(lambda v, scale=scale: quantizer(v, scale))(X)


@pytest.mark.parametrize("split", ["activation", "scale"])
@pytest.mark.parametrize("quantizer", QUANTIZERS.values(), ids=QUANTIZERS)
def test_gradients_in_shard_map_are_those_outside(quantizer, split):
    """With check_vma on: the replicated argument's gradient is summed over the devices."""
    split_v = split == "activation"
    v = X if split_v else X[0]
    scale = jnp.float32(0.5) if split_v else jnp.float32([0.5, 0.25]).repeat(2)

    def loss(v, s):
        return (quantizer(v, s) ** 2).sum()

    over, whole = PartitionSpec("batch"), PartitionSpec()
    specs = (over, whole) if split_v else (whole, over)

    def inside(v, s):
        def split(v, s):
            return jax.lax.psum(loss(v, s) if split_v else loss(v[:2], s), "batch")

        return jax.grad(split, (0, 1))(v, s)

    mesh = Mesh(np.array(jax.devices()[:2]), ("batch",))
    # Without jit, each operation would be a program of its own for the two devices.
    found = jax.jit(jax.shard_map(inside, mesh=mesh, in_specs=specs, out_specs=specs))(v, scale)
    outside = loss if split_v else (lambda v, s: loss(v[:2], s[:2]) + loss(v[:2], s[2:]))
    for ours, theirs in zip(found, jax.jit(jax.grad(outside, (0, 1)))(v, scale), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)


@pytest.mark.parametrize("kind", [Lsq, NoiseAdaptor])
def test_a_layer_is_exported_with_a_symbolic_batch(kind):
    layer = kind(levels=2)
    variables = layer.init(jax.random.key(0), X)
    shape = jax.export.symbolic_shape("batch, 4")
    apply = jax.jit(lambda x: nadaptor.simulate(layer.apply, variables, x, num_steps=2).outputs)
    exported = jax.export.export(apply)(jax.ShapeDtypeStruct(shape, jnp.float32))
    np.testing.assert_array_equal(exported.call(X)[-1], apply(X)[-1])


def test_the_file_that_is_type_checked_is_the_code_of_the_readme():
    file = pathlib.Path(__file__).with_name("typed_readme.py")
    assert f"```python\n{file.read_text()}```" in (file.parents[1] / "README.md").read_text()


class WithLayers(nn.Module):
    @nn.compact
    def __call__(self, x):
        for i in range(2):
            x = NoiseAdaptor(levels=2, name=f"act{i}")(x)
        return x


def test_a_layer_is_named_once_and_found_in_the_line_of_the_user():
    net = WithLayers()
    variables = net.init(jax.random.key(0), X)
    layers = nadaptor.spiking(net.apply, variables, X).layers
    noisy = nadaptor.spiking(
        lambda x: net.apply(variables, x, rngs={"noise": jax.random.key(1)}), X
    ).layers
    line = WithLayers.__call__.__wrapped__.__code__.co_firstlineno + 3
    for found in (layers, noisy):
        assert [layer.name.rpartition("/")[2] for layer in found] == ["act0", "act1"]
        assert {layer.source for layer in found} == {f"{__file__}:{line}"}
