"""A torch module, through torchax, as any other network with ReLUs."""

import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nadaptor

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch


@pytest.fixture(scope="module")
def torchax():
    """torchax 0.0.13, which names overloads that torch 2.13 has dropped."""
    packet = type(torch.ops.aten.prod)
    plain = packet.__getattr__

    def lenient(self, key):
        try:
            return plain(self, key)
        except AttributeError:
            if key.startswith("_"):
                raise
            return f"{self}.{key}"

    packet.__getattr__ = lenient
    try:
        module = pytest.importorskip("torchax")
        module.default_env()
    finally:
        packet.__getattr__ = plain
    return module


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = torch.nn.Conv2d(1, 4, 3, padding=1)
        self.norm = torch.nn.BatchNorm2d(4)
        self.relu = torch.nn.ReLU(inplace=True)
        self.pool = torch.nn.MaxPool2d(2)
        self.conv2 = torch.nn.Conv2d(4, 6, 3, padding=1)
        self.conv3 = torch.nn.Conv2d(6, 6, 3)
        self.relu6 = torch.nn.ReLU6()
        self.fc = torch.nn.Linear(6, 3)

    def forward(self, x):
        x = self.pool(self.relu(self.norm(self.conv1(x))))
        x = torch.nn.functional.relu(self.conv2(x))
        return self.fc(self.relu6(self.conv3(x)).mean((2, 3)))


@pytest.fixture(scope="module")
def network(torchax):
    torch.manual_seed(0)
    module = Net().eval()
    params, f = torchax.extract_jax(module)
    images = jax.random.normal(jax.random.key(0), (4, 1, 8, 8))
    return lambda params, x: f(params, (x,)), params, images, module


def test_the_function_is_the_module(network):
    f, params, images, module = network
    with torch.no_grad():
        expected = module(torch.tensor(np.asarray(images))).numpy()
    np.testing.assert_allclose(f(params, images), expected, rtol=1e-4, atol=1e-5)


def test_relus_and_the_max_pool_of_a_torch_module_are_found(network):
    f, params, images, _ = network
    kinds = [layer.kind for layer in nadaptor.quantize(f).layers(params, images)]
    assert kinds == ["relu", "max_pool", "relu", "bounded_relu"]


def test_torch_module_becomes_a_spiking_network_in_both_codings(network):
    f, params, images, _ = network
    one = nadaptor.quantize(f, levels=1, pools=True)
    scales = one.init(params, images)
    rate = nadaptor.simulate(one, scales, params, images, num_steps=1)
    np.testing.assert_allclose(rate.outputs[-1], one(scales, params, images), rtol=1e-4, atol=1e-5)
    two = nadaptor.quantize(f, levels=2, pools=True)
    total = nadaptor.simulate(two, scales, params, images, num_steps=16, coding="sum")
    np.testing.assert_allclose(total.outputs[-1], two(scales, params, images), rtol=1e-4, atol=1e-5)
    assert all(count.sum() > 0 for count in total.spike_counts)


def test_noisy_training_lowers_the_loss_and_the_next_call_sees_it(network):
    f, params, images, _ = network
    q = nadaptor.quantize(f, levels=2, pools=True)
    scales, labels = q.init(params, images), jnp.arange(4) % 3

    def loss(params, key):
        scores = jax.nn.log_softmax(q(scales, params, images, key=key))
        return -jnp.take_along_axis(scores, labels[:, None], 1).mean()

    @jax.jit
    def step(params, key):
        trained = {name: w for name, w in params.items() if jnp.issubdtype(w.dtype, jnp.floating)}
        grads = jax.grad(lambda trained: loss({**params, **trained}, key))(trained)
        return {**params, **{name: w - 0.1 * grads[name] for name, w in trained.items()}}

    before, tuned = loss(params, None), params
    for key in jax.random.split(jax.random.key(1), 20):
        tuned = step(tuned, key)
    assert loss(tuned, None) < before


def test_lines_of_the_page_make_a_function_that_converts(torchax):
    page = (Path(__file__).parents[1] / "docs" / "your_network.md").read_text()
    section = page.split("## PyTorch")[1].split("\n## ")[0]
    names = {"nadaptor": nadaptor}
    lines = [line for line in section.splitlines() if line.startswith("    ")]
    exec(compile(textwrap.dedent("\n".join(lines)), "your_network.md", "exec"), names)
    q, params, x = names["q"], names["params"], jnp.ones((4, 8))
    sim = nadaptor.simulate(q, q.init(params, x), params, x, num_steps=4)
    assert sim.outputs.shape == (4, 4, 3)
