"""Convolutions by events against dense ones: on dyadic numbers, the same to the bit."""

import errno
import functools
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import nadaptor
from nadaptor._execution import events, kernel
from nadaptor._execution.kernel import Kernel, load_kernel
from nadaptor.configs.inference import get_inference
from nadaptor.early_exit import simulate_with_early_exit

NHWC, NCHW = ("NHWC", "HWIO", "NHWC"), ("NCHW", "OIHW", "NCHW")
FOUND = load_kernel("events")
pytestmark = pytest.mark.skipif(FOUND.targets is None, reason=FOUND.reason)
PADDINGS = st.tuples(*[st.tuples(st.integers(0, 3), st.integers(0, 3))] * 2)


def dense(x, w, padding, strides):
    return jax.lax.conv_general_dilated(x, w, strides, padding, dimension_numbers=NHWC)


def spikes(rng, shape, rate):
    """Values of several amplitudes and both signs, mostly zeros."""
    values = rng.choice([-2.0, -0.5, 0.5, 1.0, 3.0], shape)
    return jnp.asarray(np.where(rng.random(shape) < rate, values, 0), jnp.float32)


def weights(rng, shape):
    return jnp.asarray(rng.integers(-8, 9, shape) / 16, jnp.float32)


@given(
    st.sampled_from([1, 3]),
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    PADDINGS,
    st.tuples(st.integers(1, 9), st.integers(1, 9)),
    st.sampled_from([(8, 16), (9, 17), (12, 32), (16, 33), (24, 64)]),
    st.sampled_from([0, 0.1, 0.5, 1]),
)
def test_sums_by_events_are_those_of_the_dense_convolution(
    window, strides, padding, size, channels, rate
):
    if any(n + sum(edge) < window for n, edge in zip(size, padding, strict=True)):
        return
    rng = np.random.default_rng(size[0] * 10 + size[1])
    x = spikes(rng, (2, *size, channels[0]), rate)
    w = weights(rng, (window, window, *channels))
    found = events.convolve_events(x, w, padding, strides)
    np.testing.assert_array_equal(found, dense(x, w, padding, strides))


@pytest.mark.parametrize("strides", [(1, 1), (2, 2)])
@pytest.mark.parametrize("channels", [(16, 16), (40, 33)])
def test_no_bit_depends_on_the_way_or_on_the_other_images(strides, channels, monkeypatch):
    """Normal weights: sums are rounded, in one order."""
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.standard_normal((3, 3, *channels)), jnp.float32)
    x = jnp.concatenate([spikes(rng, (3, 6, 7, channels[0]), r) for r in (0.1, 0.9)])
    padding = ((1, 1), (1, 1))
    mixed = events.convolve_events(x, w, padding, strides)
    for most in (-1.0, 1.0):
        monkeypatch.setattr(events, "MOST_SPIKES", dict.fromkeys(events.MOST_SPIKES, most))
        np.testing.assert_array_equal(events.convolve_events(x, w, padding, strides), mixed)
    for i in (0, 5):
        alone = events.convolve_events(x[i : i + 1], w, padding, strides)
        np.testing.assert_array_equal(alone[0], mixed[i])
    np.testing.assert_allclose(mixed, dense(x, w, padding, strides), atol=1e-4)


def test_a_weight_that_is_no_number_is_not_lost_among_zeros():
    w = jnp.ones((3, 3, 8, 16)).at[1, 1, 3, 5].set(jnp.nan)
    out = events.convolve_events(jnp.zeros((1, 4, 4, 8)), w, ((1, 1), (1, 1)), (1, 1))
    assert jnp.isnan(out[..., 5]).all() and not jnp.isnan(jnp.delete(out, 5, axis=-1)).any()


def test_an_input_that_is_no_number_is_a_spike():
    x = jnp.zeros((1, 4, 4, 8)).at[0, 1, 1, 2].set(jnp.nan)
    out = events.convolve_events(x, jnp.ones((3, 3, 8, 16)), ((1, 1), (1, 1)), (1, 1))
    assert jnp.isnan(out[0, :3, :3]).all() and not jnp.isnan(out[0, 3]).any()


def two_layers(dims=NHWC, dtype=jnp.float32):
    """A network of two convolutions of spikes, one at stride 2, and its dyadic arguments."""
    rng = np.random.default_rng(1)
    order = [dims[1].index(c) for c in "HWIO"]
    back = np.argsort(order)
    kernels = [weights(rng, (3, 3, 8, 16)), weights(rng, (1, 1, 16, 40))]
    kernels = [w.transpose(back).astype(dtype) for w in kernels]
    images = jnp.asarray(rng.integers(-4, 9, (4, 6, 5, 8)) / 4, dtype)
    images = images.transpose([("NHWC".index(c)) for c in dims[0]])

    def f(kernels, x):
        conv = functools.partial(jax.lax.conv_general_dilated, dimension_numbers=dims)
        z = conv(nadaptor.lsq(x, 0.5, 2), kernels[0], (1, 1), "SAME")
        z = conv(nadaptor.lsq(z, 0.5, 2), kernels[1], (2, 2), "VALID")
        return nadaptor.lsq(z, 0.25, 2).mean((dims[2].index("H"), dims[2].index("W")))

    return f, kernels, images


def convolutions(net):
    return [op.primitive.name for op in net._plan.stepwise if "convolution" in op.primitive.name]


def assert_same(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("dims", [NHWC, NCHW])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"steps_per_chunk": 3},
        {"in_axes": (None, 0), "tile_size": 3, "steps_per_chunk": 2},
        {"coding": "sum"},
        {"coding": "sum", "in_axes": (None, 0)},
        {"correction": nadaptor.OffsetSpikes(3)},
        {"correction": nadaptor.Srp(2), "in_axes": (None, 0), "tile_size": 2},
        {"neuron": nadaptor.SignedIntegrateAndFire()},
    ],
    ids=lambda options: " ".join(options) or "plain",
)
def test_a_dyadic_network_has_the_spikes_of_the_direct_convolution(dims, options):
    f, kernels, x = two_layers(dims)
    net = nadaptor.spiking(f, kernels, x, events=True)
    assert convolutions(net) == ["event_convolution"] * 2
    run = functools.partial(nadaptor.simulate, f, kernels, num_steps=7, **options)
    assert_same(jax.jit(functools.partial(run, events=True))(x), jax.jit(run)(x))


def test_events_run_on_several_devices_and_in_early_exit():
    f, kernels, x = two_layers()
    options = {"num_steps": 5, "in_axes": (None, 0), "devices": jax.devices()[:2]}
    run = functools.partial(nadaptor.simulate, f, kernels, x, **options)
    assert_same(run(events=True), run())
    stop = functools.partial(simulate_with_early_exit, f, kernels, x, confidence=0.1, **options)
    assert_same(stop(events=True), stop())


def test_events_are_mapped_over_examples_and_over_kernels():
    f, kernels, x = two_layers()
    run = functools.partial(nadaptor.simulate, f, num_steps=3)
    several = [jnp.stack([w, 2 * w]) for w in kernels]
    for axes, args in (((None, 0), (kernels, x[:, None])), ((0, None), (several, x))):
        by_events = jax.jit(jax.vmap(functools.partial(run, events=True), axes))(*args)
        assert_same(by_events.outputs, jax.jit(jax.vmap(run, axes))(*args).outputs)


def test_gradients_go_through_dense_convolutions():
    f, kernels, x = two_layers()
    neuron = nadaptor.IntegrateAndFire(surrogate=nadaptor.neurons.triangle)

    def loss(kernels, x, **options):
        return nadaptor.simulate(f, kernels, x, num_steps=2, neuron=neuron, **options).outputs.sum()

    found = jax.jit(jax.grad(functools.partial(loss, events=True), (0, 1)))(kernels, x)
    direct = jax.jit(jax.grad(loss, (0, 1)))(kernels, x)
    # The gradient of the direct way may be the kernel's of training, with another order of sums.
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(direct), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    assert all(jnp.abs(leaf).max() > 0 for leaf in jax.tree.leaves(found))


def test_on_another_platform_the_convolution_is_that_of_lax():
    f, kernels, x = two_layers()
    net = nadaptor.spiking(f, kernels, x, events=True)
    step = jax.jit(net.step).trace(net.init(net.prepare(kernels, x)), net.prepare(kernels, x))
    for platform, called in (("tpu", False), ("cpu", True)):
        text = step.lower(lowering_platforms=(platform,)).as_text()
        assert ("NadaptorEvents" in text) is called
        assert ("stablehlo.convolution" in text) is not called


def test_what_depends_on_kernels_alone_is_done_once():
    f, kernels, x = two_layers()
    net = nadaptor.spiking(f, kernels, x, events=True)
    blocks = [p.shape for p in net.prepare(kernels, x) if p.ndim == 5]
    assert sorted(blocks) == [(1, 3, 3, 8, 16), (2, 1, 2, 16, 32)]


def test_other_types_stay_dense_and_say_so():
    f, kernels, x = two_layers(dtype=jnp.bfloat16)
    with pytest.warns(UserWarning, match="changes nothing: no convolution of spikes is 3x3 or"):
        net = nadaptor.spiking(f, kernels, x, events=True)
    assert convolutions(net) == []


@pytest.mark.parametrize(("inputs", "fit"), [(7, False), (8, True), (455, True), (456, False)])
def test_channels_are_enough_for_a_vector_and_few_enough_for_the_cache(inputs, fit):
    dims = jax.lax.conv_dimension_numbers((1, 4, 4, inputs), (3, 3, inputs, 16), NHWC)
    image = jax.ShapeDtypeStruct((1, 4, 4, inputs), jnp.float32)
    weights = jax.ShapeDtypeStruct((3, 3, inputs, 16), jnp.float32)
    assert events.is_fit(image, weights, dims) is fit


@pytest.mark.parametrize(
    "reason", ["no C++ compiler is there: install one, or name it in CXX", "c++ made no kernel: no"]
)
def test_without_a_kernel_the_network_is_dense_and_says_so(reason, monkeypatch):
    for module in ("events", "convolution"):
        name = f"nadaptor._execution.{module}.load_kernel"
        monkeypatch.setattr(name, lambda _: Kernel(None, reason))
    f, kernels, x = two_layers()
    said = re.escape(f"events=True changes nothing: {reason}")
    with pytest.warns(UserWarning, match=f"^{said}$"):
        sim = nadaptor.simulate(f, kernels, x, num_steps=3, events=True)
    assert_same(sim, nadaptor.simulate(f, kernels, x, num_steps=3))


def test_both_ways_at_once_are_refused():
    f, kernels, x = two_layers()
    both = {"fast_convolution": True, "events": True}
    for call in (
        lambda: nadaptor.spiking(f, kernels, x, **both),
        lambda: nadaptor.simulate(f, kernels, x, num_steps=2, **both),
        lambda: get_inference("none", **both),
    ):
        with pytest.raises(ValueError, match="set only one of them"):
            call()


SCRIPT = """
import jax.numpy as jnp
from nadaptor._execution.events import convolve_events
from nadaptor._execution.kernel import load_kernel
found = load_kernel("events")
print(found.reason or "made")
if found.targets:
    x, w = jnp.ones((1, 3, 3, 8)), jnp.ones((3, 3, 8, 16))
    print(convolve_events(x, w, [(1, 1)] * 2, (1, 1)).sum())
"""


def start(folder, **environment):
    """A process of its own with a cache folder of its own."""
    environment = {"XDG_CACHE_HOME": str(folder), "JAX_PLATFORMS": "cpu", **environment}
    kept = {k: v for k, v in kernel.os.environ.items() if k != "XLA_FLAGS"}
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT], env=kept | environment, stdout=-1, text=True
    )


def lines(process):
    return process.communicate(timeout=300)[0].splitlines()


@pytest.mark.slow
def test_a_library_is_kept_made_anew_where_damaged_and_made_by_two_at_once(tmp_path):
    expected = ["made", f"{8 * 16 * 49.0}"]
    assert [lines(p) for p in (start(tmp_path), start(tmp_path))] == [expected] * 2
    (library,) = tmp_path.rglob("*.so")
    first = library.stat().st_mtime_ns
    assert lines(start(tmp_path)) == expected and library.stat().st_mtime_ns == first
    library.write_bytes(library.read_bytes()[:1000])
    assert lines(start(tmp_path)) == expected
    assert [p.name for p in tmp_path.rglob("*.so")] == [library.name]
    assert len(list(library.parent.iterdir())) == 1


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_a_damaged_library_that_cannot_be_removed_is_made_elsewhere(number, tmp_path, monkeypatch):
    def refuse(path, **options):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(kernel, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(kernel, "_compile", lambda name, compiler, folder: folder)
    (tmp_path / "events-key").mkdir()
    (tmp_path / "events-key" / "damaged.so").touch()
    monkeypatch.setattr(kernel.Path, "unlink", refuse)
    monkeypatch.setattr(kernel.tempfile, "mkdtemp", lambda prefix: str(tmp_path / "other"))
    assert kernel._library("events", "c++", "key") == tmp_path / "other"


@pytest.mark.slow
def test_no_compiler_and_one_that_fails_are_named(tmp_path):
    said = lines(start(tmp_path, CXX="no-such-compiler"))
    assert said == ["no C++ compiler is there: install one, or name it in CXX"]
    assert "made no kernel: " in lines(start(tmp_path, CXX="false"))[0]
    assert list(tmp_path.rglob("*.so")) == []
