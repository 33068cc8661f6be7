"""Training steps of torch, in a process of their own, for `benchmarks.training` to time.

Each line on stdin is a request in JSON, to build a step (`{"name": ..., "build": {...}}`) or to do
one (`{"step": ...}`), and a line on stdout answers it. A step is what ours is: normalisation,
forward, backward and SGD, on random images that are not augmented. torch is needed by this file and
`benchmarks.peers` alone.
"""

import json
import math
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

# Widths of the stages, blocks in each, and the kind of shortcut.
NETWORKS = {
    "cifar_resnet20": ((16, 32, 64), 3, "pad"),
    "cifar_resnet18": ((64, 128, 256, 512), 2, "conv"),
}
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Quantize(torch.autograd.Function):
    """LSQ (Eq. 3-5) as one function, its gradient straight-through: the least work for torch."""

    @staticmethod
    def forward(
        ctx: Any, v: torch.Tensor, scale: torch.Tensor, levels: int, factor: float
    ) -> torch.Tensor:
        x = v / scale
        quantized = torch.floor(x.clamp(0, levels) + 0.5)
        ctx.save_for_backward(x, quantized)
        ctx.levels, ctx.factor = levels, factor
        return quantized * scale

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        (grad,), (x, quantized) = grads, ctx.saved_tensors
        inside = (x > 0) & (x < ctx.levels)
        through = grad * inside
        of_scale = (grad * quantized).sum() - (through * x).sum()
        return through, ctx.factor * of_scale, None, None


class Lsq(nn.Module):
    """An activation with 2 levels and a learned scale."""

    levels = 2

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        factor = 1 / math.sqrt(x[0].numel() * self.levels)
        return Quantize.apply(x, self.scale, self.levels, factor)


class Block(nn.Module):
    """A basic block with batch norm."""

    def __init__(self, inputs: int, width: int, stride: int, kind: str, activation: Any) -> None:
        super().__init__()
        self.conv1, self.norm1 = conv(inputs, width, 3, stride), nn.BatchNorm2d(width)
        self.conv2, self.norm2 = conv(width, width, 3), nn.BatchNorm2d(width)
        self.act1, self.act2 = activation(), activation()
        self.stride, self.missing = stride, width - inputs
        self.kept = stride == 1 and not self.missing
        self.downsample = None
        if kind == "conv" and not self.kept:
            self.downsample = nn.Sequential(conv(inputs, width, 1, stride), nn.BatchNorm2d(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm2(self.conv2(self.act1(self.norm1(self.conv1(x)))))
        return self.act2(y + self.shortcut(x))

    def shortcut(self, x: torch.Tensor) -> torch.Tensor:
        if self.downsample is not None:
            return self.downsample(x)
        if self.kept:
            return x
        half = self.missing // 2
        pads = (0, 0, 0, 0, half, self.missing - half)
        return F.pad(x[:, :, :: self.stride, :: self.stride], pads)


class Network(nn.Module):
    """A residual network for 32x32 images as they are stored, with the stem for CIFAR."""

    def __init__(self, name: str, activation: Any) -> None:
        super().__init__()
        widths, count, kind = NETWORKS[name]
        self.conv1, self.norm1 = conv(3, widths[0], 3), nn.BatchNorm2d(widths[0])
        self.act1 = activation()
        inputs, blocks = widths[0], []
        for stage, width in enumerate(widths):
            for index in range(count):
                stride = 2 if stage > 0 and index == 0 else 1
                blocks.append(Block(inputs, width, stride, kind, activation))
                inputs = width
        self.blocks, self.fc = nn.Sequential(*blocks), nn.Linear(inputs, 10)
        for name, values in (("mean", MEAN), ("deviation", DEVIATION)):
            self.register_buffer(name, 255 * torch.tensor(values).view(1, 3, 1, 1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = (images.float() - self.mean) / self.deviation
        x = self.blocks(self.act1(self.norm1(self.conv1(x))))
        return self.fc(x.mean((2, 3)))


def conv(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Conv2d:
    """A convolution with torch's usual padding, without a bias."""
    return nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False)


def build(
    network: str, batch: int, activation: str, layout: str, compiled: bool
) -> tuple[Callable[[], float], int]:
    """Makes a step that keeps its own state; returns it, and the number of parameters."""
    torch.manual_seed(0)
    net = Network(network, nn.ReLU if activation == "relu" else Lsq)
    net = net.to(memory_format=LAYOUTS[layout])
    images = torch.randint(0, 256, (batch, 3, 32, 32), dtype=torch.uint8)
    images = images.to(memory_format=LAYOUTS[layout])
    labels = torch.arange(batch) % 10
    optimizer = torch.optim.SGD(net.parameters(), 0.01, momentum=0.9, weight_decay=5e-4)
    forward = torch.compile(net) if compiled else net

    def step() -> float:
        optimizer.zero_grad()
        loss = F.cross_entropy(forward(images), labels)
        loss.backward()
        optimizer.step()
        return loss.item()

    step()
    return step, sum(p.numel() for p in net.parameters())


def main() -> None:
    """Answers requests until there are no more."""
    steps: dict[str, Callable[[], float]] = {}
    # What libraries print must not be taken for answers.
    answers, sys.stdout = sys.stdout, sys.stderr
    print(json.dumps({"torch": torch.__version__}), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if "build" in request:
                name = request["name"]
                steps[name], parameters = build(**request["build"])
                answer = {"parameters": parameters}
            else:
                answer = {"loss": steps[request["step"]]()}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
