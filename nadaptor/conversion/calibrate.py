"""Conversion without training: a full-precision ResNet, its thresholds measured on images."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util

from nadaptor import quantize
from nadaptor._files import making
from nadaptor.calibration import (
    Calibration,
    Rule,
    calibrate_biases,
    calibrate_thresholds,
    maximum,
    mmse,
    percentile,
)
from nadaptor.checkpoints.checkpoint import load_checkpoint, save_checkpoint
from nadaptor.configs.config import from_json, replace, to_json
from nadaptor.conversion.convert import build_folded, class_count
from nadaptor.data.loader import load_images
from nadaptor.data.registry import open_split
from nadaptor.models import Relu, fold_batch_norm

RuleName = Literal["percentile", "max", "mmse"]


@dataclasses.dataclass(frozen=True)
class CalibrationOptions:
    """How to calibrate a full-precision network."""

    # Rule of the thresholds.
    rule: RuleName
    # Percentile of the nonzero activations, for the rule "percentile".
    percent: float = 99.9
    # T to calibrate for: the rule "mmse" and the biases depend on it.
    num_steps: int = 32
    # Whether to calibrate the biases, too.
    biases: bool = False
    # Training images to measure on.
    num_images: int = 128


@making("out")
def convert_calibrated(
    checkpoint: Path, out: Path, options: CalibrationOptions, data_dir: Path | None = None
) -> None:
    """Converts a trained full-precision network with no further training.

    Args:
        checkpoint: folder of a network trained with "relu".
        out: folder to make; `load_snn` and `simulate_checkpoint` read it.
        options: how to calibrate.
        data_dir: folder of data sets; None for the environment's NADAPTOR_DATA_DIR.

    Raises:
        ValueError: there is no such checkpoint, it is damaged or not of full precision, `out`
            exists, or the data set's classes or files are not those of its training.
    """
    if out.exists():
        raise ValueError(f"{out} exists already; choose another --out or remove it")
    variables, card = load_checkpoint(checkpoint, "ann")
    config = from_json(card["config"])
    activation = config.quantizer.activation
    if activation != "relu":
        raise ValueError(
            f"{checkpoint} was trained with {activation!r}, which has thresholds of its "
            "own; convert it without --calibrate"
        )
    source = open_split(config.data, "train", data_dir, options.num_images, card.get("data"))
    images = jnp.asarray(load_images(source).images)
    clipped = replace(config, activation="clipped_relu")
    model = build_folded(clipped, class_count(variables))
    calibrated = calibrate_resnet(model, fold_batch_norm(variables), images, options)
    card = {
        "config": to_json(clipped),
        "parent": card["card_digest"],
        "calibration": {**dataclasses.asdict(options), "num_images": source.size},
        "data": card.get("data"),
    }
    save_checkpoint(out, "snn", calibrated, card)
    print(f"spiking network: {out}")


def calibrate_resnet(
    model: nn.Module, variables: Mapping[str, Any], images: jax.Array, options: CalibrationOptions
) -> dict[str, Any]:
    """Measures the thresholds of a folded ResNet, and its biases where asked.

    Args:
        model: a `nadaptor.models.ResNet` with `norm=None`; its activations are replaced.
        variables: its folded variables, without thresholds.
        images: [B, H, W, C], of the training set.
        options: how to calibrate.

    Returns:
        The variables of the model with `ClippedRelu` activations: a `threshold` for each layer, and
        biases to which what was missing is added.

    Raises:
        ValueError: an option is out of its range, or the network cannot be converted.
    """
    relus = model.clone(activation=Relu)
    found = _calibrate(relus, variables, images, options)
    quantized = quantize(relus.apply, activation="clipped_relu")
    layers = [
        layer for layer in quantized.layers(variables, images[:1]) if layer.kind != "max_pool"
    ]
    flat: dict[Any, Any] = dict(traverse_util.flatten_dict(variables["params"]))
    for layer, threshold, bias in zip(layers, found.thresholds, found.biases, strict=True):
        *block, activation = layer.name.split("/")[1:]
        flat[(*block, activation, "threshold")] = threshold.reshape(())
        # actN follows convN; a shortcut's bias enters the same sum.
        feeding = (*block, activation.replace("act", "conv"), "bias")
        flat[feeding] = flat[feeding] + bias.reshape(-1)
    return {**variables, "params": traverse_util.unflatten_dict(flat)}


def _calibrate(
    model: nn.Module, variables: Any, images: jax.Array, options: CalibrationOptions
) -> Calibration:
    rule = _rule(options)

    def run(variables: Any, images: jax.Array) -> Calibration:
        found = calibrate_thresholds(model.apply, variables, images, rule=rule)
        if not options.biases:
            return found
        return calibrate_biases(
            model.apply, variables, images, calibration=found, num_steps=options.num_steps
        )

    return jax.jit(run)(variables, jnp.asarray(images))


def _rule(options: CalibrationOptions) -> Rule:
    if options.rule == "percentile":
        return percentile(options.percent)
    return mmse(options.num_steps) if options.rule == "mmse" else maximum()
