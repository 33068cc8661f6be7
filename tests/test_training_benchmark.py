"""The benchmark of the training step: what torch does beside us is the same work."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import torch_process
from benchmarks.timing import in_turn, ratio
from benchmarks.torch_process import TorchProcess
from nadaptor import lsq
from nadaptor.models import create


def test_where_no_python_has_torch_the_reason_and_the_remedy_are_said(monkeypatch):
    monkeypatch.setattr(torch_process, "PYTHONS", ())
    with TorchProcess() as process:
        assert "make test-torch installs it" in process.missing
        assert process.processor_time() == 0


def test_a_ratio_is_that_within_a_round_on_any_clock():
    """Turns that take 1, 2, 4, ... seconds: the neighbours of a round differ by factors of two."""
    ticks = itertools.accumulate(itertools.chain.from_iterable((0, 2**k) for k in range(99)))
    seconds = in_turn({"a": int, "b": int}, rounds=4, warmup=0, clock=lambda: float(next(ticks)))
    assert seconds == {"a": [1, 8, 16, 128], "b": [2, 4, 32, 64]}
    assert ratio(seconds["b"], seconds["a"]) == (0.5 + 2) / 2


@pytest.mark.torch
def test_the_quantizer_in_torch_has_the_values_and_gradients_of_lsq():
    torch = pytest.importorskip("torch")
    from benchmarks.torch_training import Quantize

    v = np.arange(-8, 24, dtype=np.float32).reshape(4, 8) / 8
    g = np.arange(32, dtype=np.float32).reshape(4, 8) - 11
    y, gradients = jax.vjp(lambda v, s: lsq(v, s, 2, gradient_scale=0.25), v, jnp.float32(0.5))
    ours = [y, *gradients(jnp.asarray(g))]
    x, scale = (torch.tensor(a, requires_grad=True) for a in (v, np.float32(0.5)))
    out = Quantize.apply(x, scale, 2, 0.25)
    out.backward(torch.tensor(g))
    theirs = [out.detach(), x.grad, scale.grad]
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


@pytest.mark.torch
@pytest.mark.parametrize("name", ["cifar_resnet20", "cifar_resnet18"])
def test_the_networks_in_torch_have_the_parameters_of_ours(name):
    pytest.importorskip("torch")
    from torch import nn

    from benchmarks.torch_training import Network

    ours = jax.eval_shape(create(name, 10).init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    shapes = sorted(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(ours["params"]))
    theirs = sorted(p.numel() for p in Network(name, nn.ReLU).parameters())
    assert shapes == theirs
