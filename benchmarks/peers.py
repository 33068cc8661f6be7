"""The peers on the same weights: a torch ANN, SpikingJelly, and a step loop as in QCFS's code.

All three take the folded variables of one of our residual networks. torch and SpikingJelly are
needed by this file alone.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

Variables = Mapping[str, Any]


class Relu(nn.Module):
    """The ANN's activation; its clip at the threshold would cost next to nothing more."""

    def __init__(self, threshold: float) -> None:
        super().__init__()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(x)


class StepLoop(nn.Module):
    """A layer of neurons as QCFS's code runs it: T in the batch, a Python loop over T inside."""

    steps = 1

    def __init__(self, threshold: float) -> None:
        super().__init__()
        self.threshold = threshold

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.view(self.steps, -1, *x.shape[1:])
        membrane, spikes = 0.5 * self.threshold, []
        for t in range(self.steps):
            membrane = membrane + x[t]
            spike = (membrane >= self.threshold).float() * self.threshold
            membrane = membrane - spike
            spikes.append(spike)
        return torch.stack(spikes).flatten(0, 1)


def spikingjelly_neuron(mode: str) -> Callable[[float], nn.Module]:
    """SpikingJelly's IFNode with soft reset and half a threshold of start; mode "s" or "m"."""
    from spikingjelly.activation_based import neuron

    class Scaled(nn.Module):
        def __init__(self, threshold: float) -> None:
            super().__init__()
            self.threshold = threshold
            self.node = neuron.IFNode(threshold, v_reset=None, step_mode=mode)

        def restart(self) -> None:
            self.node.reset()
            self.node.v = 0.5 * self.threshold

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.node(x) * self.threshold

    return Scaled


class Block(nn.Module):
    """A basic block with batch norm folded away."""

    def __init__(self, weights: Variables, stride: int, neuron: Callable, apply: Callable) -> None:
        super().__init__()
        self.conv1, self.conv2 = conv(weights["conv1"], stride), conv(weights["conv2"], 1)
        self.act1, self.act2 = (neuron(threshold(weights[name])) for name in ("act1", "act2"))
        self.downsample = conv(weights["downsample"], stride) if "downsample" in weights else None
        self.stride, self.missing = stride, len(weights["conv2"]["bias"])
        self.over = apply

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.over(self.conv2, self.act1(self.over(self.conv1, x)))
        return self.act2(y + self.over(self.shortcut, x))

    def shortcut(self, x: torch.Tensor) -> torch.Tensor:
        if self.downsample is not None:
            return self.downsample(x)
        missing = self.missing - x.shape[1]
        if not missing and self.stride == 1:
            return x
        x = x[:, :, :: self.stride, :: self.stride]
        return F.pad(x, (0, 0, 0, 0, missing // 2, missing - missing // 2))


class Network(nn.Module):
    """A residual network for 32x32 images from folded variables, with any neuron in it.

    `over` applies a layer to its input: as it is, or to [T, N, ...] by way of the batch.
    """

    def __init__(
        self, variables: Variables, neuron: Callable, over: Callable | None = None
    ) -> None:
        super().__init__()
        weights = variables["params"]
        self.over = over or (lambda layer, x: layer(x))
        self.conv1, self.act1 = conv(weights["conv1"], 1), neuron(threshold(weights["act1"]))
        names = sorted(name for name in weights if name.startswith("layer"))
        strides = [2 if name.endswith("_0") and name[5] != "1" else 1 for name in names]
        self.blocks = nn.Sequential(
            *(Block(weights[n], s, neuron, self.over) for n, s in zip(names, strides, strict=True))
        )
        self.fc = nn.Linear(*np.shape(weights["fc"]["kernel"]))
        self.fc.weight.data = tensor(weights["fc"]["kernel"]).T.contiguous()
        self.fc.bias.data = tensor(weights["fc"]["bias"])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.blocks(self.act1(self.over(self.conv1, x)))
        return self.over(self.fc, x.mean((-2, -1)))


def ann(variables: Variables) -> nn.Module:
    """The network with ReLUs: what one forward pass costs."""
    return Network(variables, Relu)


class QcfsLoop(nn.Module):
    """The step loop: images repeated T times into the batch. Returns running means [T, N, C]."""

    def __init__(self, variables: Variables, steps: int) -> None:
        super().__init__()
        self.steps, self.network = steps, Network(variables, StepLoop)
        for module in self.network.modules():
            if isinstance(module, StepLoop):
                module.steps = steps

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        out = self.network(images.repeat(self.steps, 1, 1, 1))
        return running_mean(out.view(self.steps, len(images), -1))


class SingleStep(nn.Module):
    """SpikingJelly step by step: a Python loop over the whole network."""

    def __init__(self, variables: Variables, steps: int) -> None:
        super().__init__()
        self.steps, self.network = steps, Network(variables, spikingjelly_neuron("s"))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        restart(self.network)
        return running_mean(torch.stack([self.network(images) for _ in range(self.steps)]))


class MultiStep(nn.Module):
    """SpikingJelly layer by layer: T in the batch for the stateless layers."""

    def __init__(self, variables: Variables, steps: int) -> None:
        super().__init__()
        self.steps = steps
        self.network = Network(variables, spikingjelly_neuron("m"), _over_time)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        restart(self.network)
        return running_mean(self.network(images.unsqueeze(0).repeat(self.steps, 1, 1, 1, 1)))


def _over_time(layer: Callable, x: torch.Tensor) -> torch.Tensor:
    from spikingjelly.activation_based.functional import seq_to_ann_forward

    return seq_to_ann_forward(x, layer)


def restart(network: nn.Module) -> None:
    """Sets every SpikingJelly neuron back to half its threshold."""
    for module in network.modules():
        if hasattr(module, "restart"):
            module.restart()


def running_mean(out: torch.Tensor) -> torch.Tensor:
    """Means of [T, N, C] over the steps so far."""
    return out.cumsum(0) / torch.arange(1, len(out) + 1).view(-1, 1, 1)


def conv(weights: Variables, stride: int) -> nn.Conv2d:
    """A torch convolution with the weights of a folded one of ours."""
    kernel = tensor(weights["kernel"]).permute(3, 2, 0, 1).contiguous()
    layer = nn.Conv2d(*kernel.shape[1::-1], kernel.shape[2:], stride, kernel.shape[2] // 2)
    layer.weight.data, layer.bias.data = kernel, tensor(weights["bias"])
    return layer


def threshold(weights: Variables) -> float:
    """The threshold of a `ClippedRelu` layer."""
    return float(np.asarray(weights["threshold"]))


def tensor(x: Any) -> torch.Tensor:
    """A float32 copy as a torch tensor."""
    return torch.from_numpy(np.array(x, np.float32))
