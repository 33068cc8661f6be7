"""The figures of the paper's Tables 1 to 5, as data."""

from collections.abc import Mapping
from typing import NamedTuple

from nadaptor.configs.inference import CorrectionName
from nadaptor.models.config import Activation


class Row(NamedTuple):
    """A row of the paper's tables, and what it is trained with."""

    name: str
    where: str  # table and row
    model: str
    activation: Activation
    levels: int
    epochs: int
    ann: float  # accuracy of the quantized network, in %
    snn: Mapping[int, float]  # of the spiking network at each T, in %; 256 stands for T >= 256

    @property
    def result(self) -> str:
        """The figures in a line."""
        spiking = ", ".join(f"{accuracy} at T={t}" for t, accuracy in self.snn.items())
        return f"ANN {self.ann}; SNN {spiking}"


CIFAR10 = (
    Row("cifar10_resnet18_lsq_p2", "Table 1, row 1 of CIFAR-10 (without the adaptor)",
        "cifar_resnet18", "lsq", 2, 160,
        95.50, {1: 91.62, 2: 93.65, 4: 95.18, 8: 96.08, 16: 96.38}),
    Row("cifar10_resnet18_na_p1", "Table 3, CIFAR-10, NoiseAdaptor p=1",
        "cifar_resnet18", "noise_adaptor", 1, 160,
        93.65, {1: 94.38, 2: 94.96, 4: 95.35, 8: 95.57, 16: 95.69, 32: 95.69, 64: 95.68,
                128: 95.63, 256: 95.66}),
    Row("cifar10_resnet18_na_p2",
        "Table 1, row 2 of CIFAR-10 (with the adaptor); Table 3, p=2; Table 4, "
        "which adds corrections",
        "cifar_resnet18", "noise_adaptor", 2, 160,
        94.97, {1: 93.71, 2: 95.26, 4: 95.95, 8: 96.61, 16: 96.72, 32: 96.74, 64: 96.72,
                128: 96.69, 256: 96.68}),
    Row("cifar10_resnet18_na_p3", "Table 3, CIFAR-10, NoiseAdaptor p=3",
        "cifar_resnet18", "noise_adaptor", 3, 160,
        96.00, {1: 90.60, 2: 93.35, 4: 95.08, 8: 96.12, 16: 96.52, 32: 96.44, 64: 96.47,
                128: 96.46, 256: 96.44}),
    Row("cifar10_resnet18_na_p4", "Table 3, CIFAR-10, NoiseAdaptor p=4",
        "cifar_resnet18", "noise_adaptor", 4, 160,
        95.98, {1: 87.11, 2: 91.40, 4: 93.98, 8: 95.67, 16: 96.19, 32: 96.30, 64: 96.29,
                128: 96.25, 256: 96.24}),
    Row("cifar10_resnet18_qcfs_p4", "Table 3, CIFAR-10, QCFS",
        "cifar_resnet18", "qcfs", 4, 160,
        96.04, {2: 75.44, 4: 90.43, 8: 94.82, 16: 95.92, 32: 96.08, 64: 96.06, 256: 96.06}),
    Row("cifar10_resnet18_slip_relu_p1", "Table 3, CIFAR-10, SlipReLU p=1",
        "cifar_resnet18", "slip_relu", 1, 160,
        94.61, {1: 93.11, 2: 93.97, 4: 94.59, 8: 94.92, 16: 95.18, 32: 95.07, 64: 94.81,
                256: 94.67}),
    Row("cifar10_resnet18_slip_relu_p4", "Table 3, CIFAR-10, SlipReLU p=4",
        "cifar_resnet18", "slip_relu", 4, 160,
        96.15, {1: 86.52, 2: 90.78, 4: 93.84, 8: 95.48, 16: 96.10, 32: 96.12, 64: 96.22,
                256: 96.15}),
    Row("cifar10_resnet18_ttrbr_p32", "Table 3, CIFAR-10, TTRBR, by an approximation of it",
        "cifar_resnet18", "ttrbr", 32, 160,
        95.27, {16: 93.99, 32: 94.77, 64: 95.04, 128: 95.18}),
)
IMAGENET = (
    Row("imagenet_resnet50_lsq_p3", "Table 1, row 1 of ImageNet (without the adaptor)",
        "resnet50", "lsq", 3, 160, 74.73, {8: 21.19, 16: 48.59, 32: 67.47, 64: 73.47, 128: 74.64}),
    # T = 8 is 36.00 in Table 1, and 35.99 in Tables 3 and 5.
    Row("imagenet_resnet50_na_p3",
        "Table 1, row 2 of ImageNet (with the adaptor); Table 2, ResNet-50, 160 epochs; "
        "Table 3, p=3; Table 5, which adds corrections",
        "resnet50", "noise_adaptor", 3, 160,
        73.72, {1: 7.79, 2: 9.97, 4: 17.00, 8: 36.00, 16: 59.05, 32: 70.82, 64: 74.37, 128: 75.07,
                256: 75.24}),
    Row("imagenet_resnet50_na_p7", "Table 3, ImageNet, NoiseAdaptor p=7",
        "resnet50", "noise_adaptor", 7, 160,
        75.95, {1: 0.76, 2: 0.8, 4: 1.08, 8: 2.44, 16: 13.51, 32: 49.56, 64: 70.46, 128: 75.25,
                256: 76.48}),
    Row("imagenet_resnet50_na_p3_90", "Table 2, ResNet-50, 90 epochs",
        "resnet50", "noise_adaptor", 3, 90, 72.40, {128: 73.49}),
    Row("imagenet_resnet50_na_p3_40", "Table 2, ResNet-50, 40 epochs",
        "resnet50", "noise_adaptor", 3, 40, 70.72, {128: 71.97}),
    Row("imagenet_resnet18_na_p3_40", "Table 2, ResNet-18, 40 epochs",
        "resnet18", "noise_adaptor", 3, 40, 67.07, {128: 68.85}),
    Row("imagenet_resnet34_na_p3_40", "Table 2, ResNet-34, 40 epochs",
        "resnet34", "noise_adaptor", 3, 40, 69.72, {128: 71.35}),
    Row("imagenet_resnet101_na_p3_40", "Table 2, ResNet-101, 40 epochs",
        "resnet101", "noise_adaptor", 3, 40, 72.92, {128: 73.19}),
    # The authors of QCFS and SlipReLU run their ResNet-34 with the CIFAR stem.
    Row("imagenet_cifar_resnet34_qcfs_p8", "Table 3, ImageNet, QCFS",
        "cifar_resnet34", "qcfs", 8, 160,
        74.32, {16: 59.35, 32: 69.37, 64: 72.35, 128: 73.15, 256: 73.39}),
    Row("imagenet_cifar_resnet34_slip_relu_p8", "Table 3, ImageNet, SlipReLU",
        "cifar_resnet34", "slip_relu", 8, 160,
        75.08, {16: 43.76, 32: 66.61, 64: 72.71, 128: 74.01}),
    Row("imagenet_resnet34_ttrbr_p32", "Table 3, ImageNet, TTRBR ResNet-34, approximated",
        "resnet34", "ttrbr", 32, 160, 74.24, {256: 74.18}),
    Row("imagenet_resnet50_ttrbr_p32", "Table 3, ImageNet, TTRBR ResNet-50, approximated",
        "resnet50", "ttrbr", 32, 160, 76.02, {256: 75.04}),
    Row("imagenet_resnet101_ttrbr_p32", "Table 3, ImageNet, TTRBR ResNet-101, approximated",
        "resnet101", "ttrbr", 32, 160, 76.82, {256: 75.72}),
)
# Tables 4 and 5: the adaptor's networks with a correction, by the name of their row. The steps that
# "offset spikes (lightweight)" spends before T are not stated.
CORRECTED: Mapping[str, Mapping[CorrectionName, Mapping[int, float]]] = {
    "cifar10_resnet18_na_p2": {
        "negative-spikes": {1: 93.71, 2: 95.87, 4: 96.55, 8: 96.70, 16: 96.71, 256: 96.73},
        "offset-spikes": {1: 95.82, 2: 96.25, 4: 96.33, 8: 96.66, 16: 96.67, 256: 96.66},
    },
    "imagenet_resnet50_na_p3": {
        "negative-spikes": {1: 7.79, 2: 53.42, 4: 69.74, 8: 72.88, 16: 73.94, 256: 74.72},
        "offset-spikes": {1: 63.42, 2: 64.84, 4: 66.34, 8: 68.43, 16: 70.60, 256: 73.37},
    },
}
