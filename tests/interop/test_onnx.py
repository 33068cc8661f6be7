"""ONNX models against the simulation, by onnx's reference evaluator and by onnxruntime."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nadaptor
from nadaptor.interop.onnx import read_onnx, to_onnx, write_onnx

W = jnp.array([[0.5, -0.25, 1.0], [0.25, 0.5, -0.5]])
X = jnp.array([[0.25, 1.0], [0.5, 0.0], [0.75, 0.5], [-1.0, 0.25]])
T = 8
WAYS = {
    "rate": dict(),
    "signed": dict(neuron=nadaptor.SignedIntegrateAndFire()),
    "corrected": dict(correction=nadaptor.OffsetSpikes(4)),
    "sum": dict(coding="sum"),
}


def f(w, x):
    return nadaptor.lsq(nadaptor.lsq(x, 0.5, levels=2) @ w, 0.25, levels=4) @ w.T


def convolutional(w, x):
    """A residual block, a stride, a pool and a matrix, with dyadic weights."""
    layout = dict(dimension_numbers=("NHWC", "HWIO", "NHWC"))
    x = nadaptor.lsq(nadaptor.conv_general_dilated(x, w, (1, 1), "SAME", **layout), 0.5, levels=2)
    y = nadaptor.conv_general_dilated(x, w, (1, 1), "SAME", **layout)
    x = nadaptor.lsq(x + y, 0.5, levels=4)
    x = jax.lax.reduce_window(x, 0.0, jax.lax.add, (1, 2, 2, 1), (1, 2, 2, 1), "VALID") / 4
    return nadaptor.lsq(x, 0.25, levels=2).reshape(len(x), -1) @ jnp.eye(8, 3)


def images():
    key = jax.random.key(1)
    w = jax.random.randint(key, (3, 3, 2, 2), -8, 9) / 8
    return w, jax.random.randint(jax.random.key(2), (2, 4, 4, 2), -8, 9) / 8


def live(g, w, x, **options):
    run = jax.jit(lambda w, x: nadaptor.simulate(g, w, x, num_steps=T, **options).outputs)
    return np.asarray(run(w, x))


def assert_equal_up_to_the_division(found, wanted):
    """Sums of spikes are equal; the mean divides by t, and programs round that differently."""
    powers = [t for t in range(T) if (t + 1) & t == 0]
    np.testing.assert_array_equal(found[powers], wanted[powers])
    np.testing.assert_allclose(found, wanted, rtol=3e-7, atol=1e-6)


@pytest.fixture
def onnx():
    pytest.importorskip("jax2onnx")
    return pytest.importorskip("onnx")


@pytest.mark.torch
@pytest.mark.parametrize("way", ["rate", "signed", "convolutional"])
def test_the_reference_evaluator_has_the_outputs_of_the_simulation(onnx, way, tmp_path):
    from onnx.reference import ReferenceEvaluator

    g, (w, x) = (convolutional, images()) if way == "convolutional" else (f, (W, X))
    options = WAYS.get(way, {})
    write_onnx(tmp_path / "net.onnx", to_onnx(g, w, x, num_steps=T, **options))
    model, card = read_onnx(tmp_path / "net.onnx")
    found = ReferenceEvaluator(model).run(None, {"input": np.asarray(x)})[0]
    wanted = live(g, w, x, **options)
    assert_equal_up_to_the_division(found, wanted)
    assert np.ptp(wanted) > 0
    assert (card["num_steps"], card["coding"], card["analog"]) == (T, "rate", [])
    assert card["outputs"] == [{"dtype": "float32", "shape": list(wanted.shape)}]


@pytest.mark.torch
@pytest.mark.parametrize("way", WAYS)
def test_onnxruntime_has_the_outputs_of_the_simulation_in_every_coding(onnx, way):
    import onnxruntime

    model = to_onnx(lambda x, w: f(w, x), X, W, num_steps=T, data_argnum=0, **WAYS[way])
    session = onnxruntime.InferenceSession(model.SerializeToString())
    found = session.run(None, {"input": np.asarray(X)})[0]
    assert_equal_up_to_the_division(found, live(f, W, X, **WAYS[way]))


@pytest.mark.torch
def test_what_no_model_can_be_made_of_is_refused(onnx):
    with pytest.raises(ValueError, match="returns 2 arrays"):
        to_onnx(lambda x: (f(W, x), f(W, x)), X, num_steps=T)
    with pytest.raises(ValueError, match="data_argnum=2, but there are 2"):
        to_onnx(f, W, X, num_steps=T, data_argnum=2)
    with pytest.raises(ValueError, match=r"cannot convert to spikes: .*softmax"):
        to_onnx(lambda x: jax.nn.softmax(nadaptor.lsq(x, 0.5, levels=2)) ** 2, X, num_steps=T)


@pytest.mark.torch
def test_a_model_that_computes_something_else_is_refused(onnx, monkeypatch):
    from nadaptor.interop import onnx as module

    run = module._run
    monkeypatch.setattr(module, "_run", lambda model, x: run(model, x) + 0.01)
    with pytest.raises(ValueError, match="wrongly"):
        to_onnx(f, W, X, num_steps=T)


@pytest.mark.torch
@pytest.mark.parametrize("place", [0.0, 0.2, 0.4, 0.6, 0.8, 0.99])
def test_a_damaged_model_is_refused(onnx, tmp_path, place):
    path = tmp_path / "net.onnx"
    write_onnx(path, to_onnx(f, W, X, num_steps=2))
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="is damaged"):
        read_onnx(path)


def test_without_jax2onnx_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "jax2onnx", None)
    with pytest.raises(ImportError, match=r'needs jax2onnx: pip install "nadaptor\[onnx\]"'):
        to_onnx(f, W, X, num_steps=T)
