"""Linen networks to train, their activation layers, and batch-norm folding."""

from nadaptor._checks import extra

with extra("train", "nadaptor.models"):
    from nadaptor.models.activations import AnyLevel, ClippedRelu, Lsq, NoiseAdaptor, Relu
    from nadaptor.models.folding import fold_batch_norm
    from nadaptor.models.layers import batch_norm, convolution
    from nadaptor.models.mobilenet import MobileNetV2
    from nadaptor.models.registry import MODELS, create
    from nadaptor.models.resnet import BasicBlock, Bottleneck, ResNet
    from nadaptor.models.scales import SCALE_FLOOR, is_scale, project_scales, start_scales
    from nadaptor.models.threshold_activations import Qcfs, SlipRelu, Ttrbr
    from nadaptor.models.vgg import Vgg
    from nadaptor.models.vit import Vit

__all__ = [
    "MODELS",
    "SCALE_FLOOR",
    "AnyLevel",
    "BasicBlock",
    "Bottleneck",
    "ClippedRelu",
    "Lsq",
    "MobileNetV2",
    "NoiseAdaptor",
    "Qcfs",
    "Relu",
    "ResNet",
    "SlipRelu",
    "Ttrbr",
    "Vgg",
    "Vit",
    "batch_norm",
    "convolution",
    "create",
    "fold_batch_norm",
    "is_scale",
    "project_scales",
    "start_scales",
]
