"""The named studies: digits, the paper's CIFAR-10 experiment, that at a CPU's scale, its causes."""

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType

from nadaptor.studies.study import Study


def digits() -> Study:
    """All methods and corrections on the 8x8 digits, p = 1, 2 and 4, five seeds.

    Run on a 2-core CPU, with an 8-layer network in 49 minutes: see RESULTS.md.

    `python -m nadaptor.study digits`
    """
    return Study()


def cifar10() -> Study:
    """The paper's CIFAR-10 experiment: half of Table 1, the adaptor's rows of Table 3, Table 4.

    ResNet-18, p = 1 to 4 with and without the adaptor, all corrections, T = 256, three seeds; the
    full-precision network is trained first. Not run: it needs an accelerator.

    `python -m nadaptor.study cifar10 --data-dir DIR`
    """
    return Study(
        methods=("lsq", "noise_adaptor"),
        levels=(1, 2, 3, 4),
        seeds=3,
        config="cifar10_resnet18_lsq_p2",
        dtype="bfloat16",
        num_steps=256,
        split="test",
    )


def cifar10_cpu() -> Study:
    """ResNet-20 on CIFAR-10, fine-tuned for one epoch from published weights: p = 2 and 4.

    With and without the adaptor, two seeds, the first 5000 test images. For a 2-core CPU: see
    RESULTS.md.

    `python -m nadaptor.study cifar10_cpu --data-dir DIR --init-from FILE`
    """
    return Study(
        methods=("lsq", "noise_adaptor"),
        levels=(2, 4),
        seeds=2,
        corrections=("none",),
        config="cifar10_resnet20_lsq",
        num_steps=16,
        split="test",
        num_images=5000,
    )


def cifar10_cpu_variants() -> Study:
    """The noise adaptor's variants beside it: exact gradient, LSQ's gradient factor, any level.

    As cifar10_cpu, at p = 2, on validation images. In the same workdir, its networks are used.

    `python -m nadaptor.study cifar10_cpu_variants --data-dir DIR --init-from FILE`
    """
    return Study(
        methods=(
            "lsq",
            "noise_adaptor",
            "noise_adaptor_exact",
            "noise_adaptor_scaled",
            "any_level",
        ),
        levels=(2,),
        seeds=2,
        corrections=("none",),
        config="cifar10_resnet20_lsq",
        num_steps=16,
    )


def fit() -> Study:
    """The adaptor against LSQ at p = 2 over the number of epochs, until the training set is fitted.

    An 8-layer ResNet on 1,000 images of CIFAR-10 at 8 pixels, three seeds, for a CPU. The picture
    `differences.png` shows the difference at each T over training accuracy: see RESULTS.md.

    `python -m nadaptor.study fit --data-dir DIR`
    """
    return Study(
        methods=("lsq", "noise_adaptor"),
        levels=(2,),
        seeds=3,
        corrections=("none",),
        config="cifar10_8px_lsq",
        learning_rate=(0.1,),
        epochs=(2, 20, 100),
        num_steps=16,
        split="test",
        num_images=5000,
    )


def width() -> Study:
    """The adaptor against LSQ over the width, at two epochs of the study "fit": x1, x2 and x4.

    The noise of a layer's output is averaged over the fan-in of the next.

    `python -m nadaptor.study width --data-dir DIR`
    """
    return dataclasses.replace(fit(), width=(16, 32, 64), epochs=(2,))


def depth() -> Study:
    """The adaptor against LSQ over the depth, at two epochs of the study "fit": 8 and 20 layers.

    With 56 layers the full-precision network stays at guessing at the learning rate of the others.

    `python -m nadaptor.study depth --data-dir DIR`
    """
    models = ("cifar_resnet8", "cifar_resnet20")
    return dataclasses.replace(fit(), model=models, epochs=(2,))


def gradient() -> Study:
    """The adaptor's gradients, at two epochs of the study "fit": Eq. 10 or Eq. 7's, g or none.

    `python -m nadaptor.study gradient --data-dir DIR`
    """
    methods = (
        "lsq",
        "lsq_unscaled",
        "noise_adaptor",
        "noise_adaptor_exact",
        "noise_adaptor_unscaled",
    )
    return dataclasses.replace(fit(), methods=methods, epochs=(2,))


def recipe() -> Study:
    """What may do better than the adaptor at equal cost, at 20 epochs of the study "fit".

    No factor of LSQ on the scales' gradient, a start measured with ReLUs, both, half the noise, any
    level in each step; each with plain neurons and with negative spikes, which cost no steps.

    `python -m nadaptor.study recipe --data-dir DIR`
    """
    methods = (
        "lsq",
        "lsq_unscaled",
        "noise_adaptor",
        "noise_adaptor_unscaled",
        "noise_adaptor_relu_start",
        "noise_adaptor_relu_start_unscaled",
        "noise_adaptor_half",
        "any_level",
    )
    corrections = ("none", "negative-spikes")
    return dataclasses.replace(fit(), methods=methods, corrections=corrections, epochs=(20,))


STUDIES: Mapping[str, Callable[[], Study]] = MappingProxyType(
    {
        make.__name__: make
        for make in (
            digits,
            cifar10,
            cifar10_cpu,
            cifar10_cpu_variants,
            fit,
            width,
            depth,
            gradient,
            recipe,
        )
    }
)
