"""The runs of the paper's tables, one named config a row.

None of them has been run by this project: no accelerator was at hand for as long as they take. The
paper's numbers stand beside each command as what it is to be compared with. Times are unknown;
`python train.py NAME --dry-run` measures a step on the machine at hand and says what the run takes.

From the paper: networks, p, epochs, SGD with a cosine from 0.1, weight decay 5e-4 (CIFAR-10) and
2.5e-5 (ImageNet), the start from pre-trained networks. Our choice, where it is silent: momentum 0.9
on ImageNet, batch sizes (128 and 256), augmentation (crop, flip, AutoAugment and Cutout; random
resized crop and flip), the validation images (5000 and 10000), which choose the weights handed on,
and the full-precision runs, which stand for the pre-trained networks that the paper does not name.
With `--init-from FILE` a file of weights takes their place.
"""

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

from nadaptor.training.config import Activation, Config

Maker = Callable[[], Config]


class Row(NamedTuple):
    """A row of the paper's tables, and what it is trained with."""

    name: str
    where: str  # table and row
    model: str
    activation: Activation
    levels: int
    epochs: int
    result: str  # the paper's numbers


CIFAR10 = (
    Row("cifar10_resnet18_lsq_p2", "Table 1, row 1 of CIFAR-10 (without the adaptor)",
        "cifar_resnet18", "lsq", 2, 160,
        "ANN 95.50; SNN 91.62 at T=1, 95.18 at T=4, 96.38 at T=16"),
    Row("cifar10_resnet18_na_p1", "Table 3, CIFAR-10, NoiseAdaptor p=1",
        "cifar_resnet18", "noise_adaptor", 1, 160,
        "ANN 93.65; SNN 94.38 at T=1, 95.35 at T=4, 95.69 at T=16"),
    Row("cifar10_resnet18_na_p2",
        "Table 1, row 2 of CIFAR-10 (with the adaptor); Table 3, p=2; Table 4, "
        "which adds corrections",
        "cifar_resnet18", "noise_adaptor", 2, 160,
        "ANN 94.97; SNN 93.71 at T=1, 95.95 at T=4, 96.72 at T=16"),
    Row("cifar10_resnet18_na_p3", "Table 3, CIFAR-10, NoiseAdaptor p=3",
        "cifar_resnet18", "noise_adaptor", 3, 160,
        "ANN 96.00; SNN 90.60 at T=1, 95.08 at T=4, 96.52 at T=16"),
    Row("cifar10_resnet18_na_p4", "Table 3, CIFAR-10, NoiseAdaptor p=4",
        "cifar_resnet18", "noise_adaptor", 4, 160,
        "ANN 95.98; SNN 87.11 at T=1, 93.98 at T=4, 96.19 at T=16"),
    Row("cifar10_resnet18_qcfs_p4", "Table 3, CIFAR-10, QCFS",
        "cifar_resnet18", "qcfs", 4, 160,
        "ANN 96.04; SNN 75.44 at T=2, 90.43 at T=4, 95.92 at T=16"),
    Row("cifar10_resnet18_slip_relu_p1", "Table 3, CIFAR-10, SlipReLU p=1",
        "cifar_resnet18", "slip_relu", 1, 160,
        "ANN 94.61; SNN 93.11 at T=1, 94.59 at T=4, 95.18 at T=16"),
    Row("cifar10_resnet18_slip_relu_p4", "Table 3, CIFAR-10, SlipReLU p=4",
        "cifar_resnet18", "slip_relu", 4, 160,
        "ANN 96.15; SNN 86.52 at T=1, 93.84 at T=4, 96.10 at T=16"),
    Row("cifar10_resnet18_ttrbr_p32", "Table 3, CIFAR-10, TTRBR, by an approximation of it",
        "cifar_resnet18", "ttrbr", 32, 160,
        "ANN 95.27; SNN 93.99 at T=16, 95.04 at T=64, 95.18 at T=128"),
)
IMAGENET = (
    Row("imagenet_resnet50_lsq_p3", "Table 1, row 1 of ImageNet (without the adaptor)",
        "resnet50", "lsq", 3, 160, "ANN 74.73; SNN 21.19 at T=8, 67.47 at T=32, 74.64 at T=128"),
    Row("imagenet_resnet50_na_p3",
        "Table 1, row 2 of ImageNet (with the adaptor); Table 2, ResNet-50, 160 epochs; "
        "Table 3, p=3; Table 5, which adds corrections",
        "resnet50", "noise_adaptor", 3, 160,
        "ANN 73.72; SNN 36.00 at T=8, 70.82 at T=32, 75.07 at T=128"),
    Row("imagenet_resnet50_na_p7", "Table 3, ImageNet, NoiseAdaptor p=7",
        "resnet50", "noise_adaptor", 7, 160,
        "ANN 75.95; SNN 2.44 at T=8, 49.56 at T=32, 75.25 at T=128"),
    Row("imagenet_resnet50_na_p3_90", "Table 2, ResNet-50, 90 epochs",
        "resnet50", "noise_adaptor", 3, 90, "ANN 72.40; SNN 73.49 at T=128"),
    Row("imagenet_resnet50_na_p3_40", "Table 2, ResNet-50, 40 epochs",
        "resnet50", "noise_adaptor", 3, 40, "ANN 70.72; SNN 71.97 at T=128"),
    Row("imagenet_resnet18_na_p3_40", "Table 2, ResNet-18, 40 epochs",
        "resnet18", "noise_adaptor", 3, 40, "ANN 67.07; SNN 68.85 at T=128"),
    Row("imagenet_resnet34_na_p3_40", "Table 2, ResNet-34, 40 epochs",
        "resnet34", "noise_adaptor", 3, 40, "ANN 69.72; SNN 71.35 at T=128"),
    Row("imagenet_resnet101_na_p3_40", "Table 2, ResNet-101, 40 epochs",
        "resnet101", "noise_adaptor", 3, 40, "ANN 72.92; SNN 73.19 at T=128"),
    # The authors of QCFS and SlipReLU run their ResNet-34 with the CIFAR stem.
    Row("imagenet_cifar_resnet34_qcfs_p8", "Table 3, ImageNet, QCFS",
        "cifar_resnet34", "qcfs", 8, 160,
        "ANN 74.32; SNN 59.35 at T=16, 69.37 at T=32, 73.15 at T=128"),
    Row("imagenet_cifar_resnet34_slip_relu_p8", "Table 3, ImageNet, SlipReLU",
        "cifar_resnet34", "slip_relu", 8, 160,
        "ANN 75.08; SNN 43.76 at T=16, 66.61 at T=32, 74.01 at T=128"),
    Row("imagenet_resnet34_ttrbr_p32", "Table 3, ImageNet, TTRBR ResNet-34, approximated",
        "resnet34", "ttrbr", 32, 160, "ANN 74.24; SNN 74.18 at T>=256"),
    Row("imagenet_resnet50_ttrbr_p32", "Table 3, ImageNet, TTRBR ResNet-50, approximated",
        "resnet50", "ttrbr", 32, 160, "ANN 76.02; SNN 75.04 at T>=256"),
    Row("imagenet_resnet101_ttrbr_p32", "Table 3, ImageNet, TTRBR ResNet-101, approximated",
        "resnet101", "ttrbr", 32, 160, "ANN 76.82; SNN 75.72 at T>=256"),
)


def cifar10_resnet18() -> Config:
    """Full-precision ResNet-18 on CIFAR-10, from which the quantized ones start.

    Stands for the pre-trained network of Table 1. Not run on any accelerator; time unknown.

    `python train.py cifar10_resnet18`
    """
    return Config(
        name="cifar10_resnet18",
        activation="relu",
        parent=None,
        epochs=160,
        batch_size=128,
        learning_rate=0.1,
        momentum=0.9,
        weight_decay=5e-4,
        levels=2,
        initial_threshold=8.0,
        noise_amplitude=0.5,
        gradient="paper",
        dataset="cifar10",
        validation_size=5000,
        model="cifar_resnet18",
        seed=0,
        train_size=None,
        normalization="dataset",
        augmentation="autoaugment",
        label_smoothing=0.0,
        average_decay=0.0,
        micro_batches=1,
        select="best",
        dtype="float32",
        parallel="pmap",
        prng="threefry2x32",
    )


def cifar10_resnet20() -> Config:
    """Full-precision ResNet-20 on CIFAR-10 with ImageNet's mean, as published weights have it.

    `python train.py cifar10_resnet20 --init-from FILE --evaluate-only` measures such weights. Not
    in the paper; training not run on any accelerator; time unknown.

    `python train.py cifar10_resnet20`
    """
    return dataclasses.replace(
        cifar10_resnet18(),
        name="cifar10_resnet20",
        model="cifar_resnet20",
        normalization="imagenet",
        augmentation="crop_flip",
        weight_decay=1e-4,
    )


def cifar10_resnet20_na() -> Config:
    """ResNet-20 on CIFAR-10 with p = 4 and the noise adaptor, a short fine-tuning on few images.

    Not in the paper: 5000 images, 4 epochs, made to run on a CPU. Not run yet.

    `python train.py cifar10_resnet20_na --init-from FILE`
    """
    return dataclasses.replace(
        cifar10_resnet20(),
        name="cifar10_resnet20_na",
        parent="cifar10_resnet20",
        activation="noise_adaptor",
        levels=4,
        epochs=4,
        learning_rate=0.01,
        train_size=5000,
        validation_size=1000,
        select="last",
    )


def cifar10_resnet20_lsq() -> Config:
    """The same as cifar10_resnet20_na, without the noise adaptor.

    `python train.py cifar10_resnet20_lsq --init-from FILE`
    """
    return dataclasses.replace(
        cifar10_resnet20_na(), name="cifar10_resnet20_lsq", activation="lsq"
    )


def imagenet_resnet50() -> Config:
    """Full-precision ResNet-50 on ImageNet, from which the quantized ones start.

    Stands for the pre-trained network of Table 1. Not run on any accelerator; time unknown.

    `python train.py imagenet_resnet50`
    """
    return dataclasses.replace(
        cifar10_resnet18(),
        name="imagenet_resnet50",
        epochs=90,
        batch_size=256,
        weight_decay=1e-4,
        levels=3,
        dataset="imagenet2012",
        validation_size=10000,
        model="resnet50",
        augmentation="random_resized_crop",
    )


def folder_resnet50_na() -> Config:
    """ResNet-50 at 224 pixels on an image folder, p = 3 with the noise adaptor: a short trial.

    Not in the paper: a few images a step, to try the whole path on a CPU.

    `python train.py folder_resnet50_na --data-dir DIR`, DIR with `train/CLASS` and `val/CLASS`
    """
    return dataclasses.replace(
        imagenet_resnet50(),
        name="folder_resnet50_na",
        activation="noise_adaptor",
        dataset="folder",
        validation_size=50,
        epochs=1,
        batch_size=8,
        learning_rate=0.01,
        select="last",
    )


def _full_precision(model: str, table: int) -> Maker:
    """The function that makes imagenet_resnet50's config for another network."""

    def make() -> Config:
        return dataclasses.replace(imagenet_resnet50(), name=f"imagenet_{model}", model=model)

    make.__name__ = make.__qualname__ = f"imagenet_{model}"
    make.__doc__ = f"""Full-precision {model} on ImageNet, from which Table {table}'s starts.

    Stands for the pre-trained network of Table {table}. Not run on any accelerator; time unknown.

    `python train.py imagenet_{model}`
    """
    return make


def _maker(row: Row, base: Maker, weight_decay: float) -> Maker:
    """The function that makes a row's config, with the docstring of one written by hand."""

    def make() -> Config:
        return dataclasses.replace(
            base(),
            name=row.name,
            parent=base().name,
            model=row.model,
            activation=row.activation,
            levels=row.levels,
            epochs=row.epochs,
            weight_decay=weight_decay,
        )

    make.__name__ = make.__qualname__ = row.name
    network = f"{row.model}, {row.activation}, p = {row.levels}, {row.epochs} epochs"
    make.__doc__ = f"""{row.where}: {network}.

    The paper, in %: {row.result}. Not run on any accelerator; time unknown.

    `python train.py {row.name}`
    """
    return make


_FULL_PRECISION: Mapping[str, Maker] = {
    "resnet50": imagenet_resnet50,
    **{model: _full_precision(model, 2) for model in ("resnet18", "resnet34", "resnet101")},
    "cifar_resnet34": _full_precision("cifar_resnet34", 3),
}
PAPER: Mapping[str, Maker] = MappingProxyType(
    {
        make.__name__: make
        for make in (
            cifar10_resnet18,
            cifar10_resnet20,
            cifar10_resnet20_na,
            cifar10_resnet20_lsq,
            folder_resnet50_na,
            *_FULL_PRECISION.values(),
            *(_maker(row, cifar10_resnet18, 5e-4) for row in CIFAR10),
            *(_maker(row, _FULL_PRECISION[row.model], 2.5e-5) for row in IMAGENET),
        )
    }
)
