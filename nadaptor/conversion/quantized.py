"""Conversion without training to a quantized network: its scales start on training images."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp

from nadaptor._files import making
from nadaptor.configs.build import build_model
from nadaptor.configs.config import Config, check_config, replace
from nadaptor.configs.inference import RATES, Spikes
from nadaptor.conversion.convert import check_spikes, class_count, finish
from nadaptor.conversion.identities import Check
from nadaptor.conversion.origin import Origin, Weights, check_free, open_measured, open_origin
from nadaptor.data.loader import load_images
from nadaptor.models import start_scales
from nadaptor.models.config import ACTIVATIONS


@dataclasses.dataclass(frozen=True)
class QuantizeOptions:
    """How to quantize a full-precision network with no training."""

    # p; None for the levels of a config that is quantized.
    levels: int | None
    # Training images to measure on; None for 128, and for fewer of more than 112 pixels per side.
    num_images: int | None = None


@making("out")
def convert_quantized(
    source: Path | Weights,
    out: Path,
    options: QuantizeOptions,
    data_dir: Path | None = None,
    spikes: Spikes = RATES,
) -> list[Check]:
    """Quantizes a full-precision network with no training, and converts it.

    A scale is the one at which p levels represent the activations of its layer best, all measured
    on the network with ReLUs: the start `mmse_relu` of a training run, here on training images that
    are not augmented. From there the conversion is that of a trained quantized network.

    Args:
        source: folder of a network trained with "relu"; or a file of weights and its config, whose
            own levels count where the config is of a quantized network.
        out: folder to make; `load_snn` and `simulate_checkpoint` read it.
        options: the levels and the images.
        data_dir: folder of data sets; None for the environment's NADAPTOR_DATA_DIR.
        spikes: as for `convert`.

    Returns:
        The checks of the conversion, all of which hold.

    Raises:
        ValueError: as `convert`, the network has learned scales, there are no levels, or another
            quantizer is asked for than that of `lsq`.
        RunError: a check fails; nothing is written.
    """
    check_free(out)
    origin = open_origin(source, data_dir)
    config = _quantized(origin, options, isinstance(source, Weights))
    images = open_measured(config.data, options.num_images, data_dir, origin.data)
    classes = class_count(origin.variables)
    check_spikes(config, classes, images.spec.image_shape, spikes)
    model = build_model(config, num_classes=classes)
    # With the stored moments of batch norm, which are those of a trained network.
    start = jax.jit(lambda v, x, key: start_scales(model, v, x, key))
    variables = start(
        origin.variables, jnp.asarray(load_images(images).images), jax.random.key(config.seed)
    )
    measured = {"rule": "mmse_relu", "num_images": images.size}
    quantized = origin._replace(variables=variables, config=config)
    return finish(quantized, out, spikes, data_dir=data_dir, said={"quantization": measured})


def _quantized(origin: Origin, options: QuantizeOptions, from_file: bool) -> Config:
    """The config of the quantized network."""
    config, levels = origin.config, options.levels
    own = ACTIVATIONS[config.quantizer.activation].converts_as
    if own is not None and not from_file:
        raise ValueError(
            f"{origin.name} was trained with {config.quantizer.activation!r}, which has scales of "
            "its own; convert it without --quantize"
        )
    if own not in (None, "lsq"):
        raise ValueError(
            f"{config.name} quantizes with {config.quantizer.activation!r}, whose thresholds are "
            "learned; without training name a config of full precision, such as cifar10_resnet20"
        )
    if levels is None and own is None:
        raise ValueError(f"{config.name} is of full precision: say by --quantize how many levels")
    levels = config.quantizer.levels if levels is None else levels
    return check_config(
        replace(config, activation="lsq", levels=levels, scale_init="mmse_relu", dtype="float32")
    )
