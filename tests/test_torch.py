"""QCFS, SlipReLU and the neuron against torch code that was written for this test alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nadaptor

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

# Multiples of 1/64 on a threshold of 4: exact in both libraries, with ties and both edges.
V = np.arange(-192, 448, dtype=np.float32) / 64
THRESHOLD = 4.0
WEIGHTS = np.cos(np.arange(V.size)).astype(np.float32)


def floor(x):
    """Rounds down with the gradient of the identity."""
    return x + (torch.floor(x) - x).detach()


def torch_qcfs(v, th, levels, clip):
    if clip == "last":
        return th * torch.clamp(floor(levels * v / th + 0.5) / levels, 0, 1)
    return th * floor(levels * torch.clamp(v / th, 0, 1) + 0.5) / levels


def torch_slip_relu(v, th, levels, slope, shift, floor_shift):
    linear = torch.clamp(v / th + shift / levels, 0, 1)
    floored = torch.clamp(floor(v * levels / th + floor_shift) / levels, 0, 1)
    return slope * th * linear + (1 - slope) * th * floored


def both(ours, theirs):
    """Values and gradients for v and the threshold, of our function and of torch's."""
    value, pull = jax.vjp(ours, jnp.asarray(V), jnp.float32(THRESHOLD))
    v = torch.tensor(V, requires_grad=True)
    th = torch.tensor(THRESHOLD, requires_grad=True)
    y = theirs(v, th)
    (y * torch.tensor(WEIGHTS)).sum().backward()
    return (value, *pull(jnp.asarray(WEIGHTS))), (y.detach(), v.grad, th.grad)


@pytest.mark.parametrize("clip", ["last", "first"])
@pytest.mark.parametrize("levels", [1, 2, 4, 8])
def test_qcfs_is_torchs_in_value_and_gradient(clip, levels):
    ours, theirs = both(
        lambda v, th: nadaptor.qcfs(v, th, levels, clip=clip),
        lambda v, th: torch_qcfs(v, th, levels, clip),
    )
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b.numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [(0.5, 0.0, 0.5), (0.0, 0.0, 0.5), (0.25, 0.5, 0.25)])
@pytest.mark.parametrize("levels", [1, 4])
def test_slip_relu_is_torchs_in_value_and_gradient(options, levels):
    slope, shift, floor_shift = options
    ours, theirs = both(
        lambda v, th: nadaptor.slip_relu(
            v, th, levels, slope=slope, shift=shift, floor_shift=floor_shift
        ),
        lambda v, th: torch_slip_relu(v, th, levels, *options),
    )
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b.numpy(), rtol=1e-4, atol=1e-5)


class TorchNeuron(torch.nn.Module):
    """Integrate-and-fire in units of the input, as the authors of QCFS write it."""

    def __init__(self, threshold):
        super().__init__()
        self.threshold, self.u = threshold, None

    def forward(self, v):
        if self.u is None:
            self.u = torch.full_like(v, self.threshold / 2)
        self.u = self.u + v
        spikes = (self.u >= self.threshold).to(v.dtype)
        self.u = self.u - spikes * self.threshold
        return spikes * self.threshold


def test_the_spiking_network_is_that_of_a_stateful_torch_network():
    """Dyadic weights and thresholds: every sum is exact, and so no spike may differ."""
    rng = np.random.default_rng(0)
    weights = (rng.integers(-8, 9, (3, 16, 16)) / 16).astype(np.float32)
    x = (rng.integers(-16, 17, (12, 16)) / 8).astype(np.float32)

    def f(weights, x):
        for w, th in zip(weights[:2], (1.0, 2.0), strict=True):
            x = nadaptor.qcfs(x @ w, th, 4)
        return x @ weights[2]

    sim = nadaptor.simulate(f, jnp.asarray(weights), jnp.asarray(x), num_steps=16)
    neurons = [TorchNeuron(1.0), TorchNeuron(2.0)]
    total = torch.zeros(12, 16)
    for t in range(16):
        spikes = torch.tensor(x)
        for w, neuron in zip(weights[:2], neurons, strict=True):
            spikes = neuron(spikes @ torch.tensor(w))
        total += spikes @ torch.tensor(weights[2])
        np.testing.assert_allclose(sim.outputs[t], total.numpy() / (t + 1), rtol=1e-6)
