"""Conversion without training: a full-precision network, its thresholds measured on images."""

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
from nadaptor._provenance import free_bytes
from nadaptor.calibration import (
    Calibration,
    Rule,
    calibrate_biases,
    calibrate_thresholds,
    maximum,
    mmse,
    percentile,
)
from nadaptor.checkpoints.checkpoint import save_checkpoint
from nadaptor.configs.config import replace, to_json
from nadaptor.configs.inference import Spikes
from nadaptor.conversion.convert import build_folded, check_spikes, class_count, show_analog
from nadaptor.conversion.origin import Weights, check_free, open_measured, open_origin
from nadaptor.data.loader import load_images
from nadaptor.models import Relu, fold_batch_norm
from nadaptor.transformation import Nonaffine

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
    # Training images to measure on; None for 128, and for fewer of more than 112 pixels per side.
    num_images: int | None = None


@making("out")
def convert_calibrated(
    source: Path | Weights,
    out: Path,
    options: CalibrationOptions,
    data_dir: Path | None = None,
    nonaffine: Nonaffine = "refuse",
) -> None:
    """Converts a trained full-precision network with no further training.

    Args:
        source: folder of a network trained with "relu", or a file of weights and its config.
        out: folder to make; `load_snn` and `simulate_checkpoint` read it.
        options: how to calibrate.
        data_dir: folder of data sets; None for the environment's NADAPTOR_DATA_DIR.
        nonaffine: what to do where an operation between neurons is not affine, as a max-pool; kept
            in the card. A calibration is for rates.

    Raises:
        ValueError: there is no such checkpoint or file, it is damaged or not of full precision,
            `out` exists, the data set's classes or files are not those of its training, or an
            operation is not affine and `nonaffine` is "refuse".
    """
    check_free(out)
    origin = open_origin(source, data_dir)
    config, activation = origin.config, origin.config.quantizer.activation
    if activation != "relu":
        which = origin.name if isinstance(source, Path) else config.name
        raise ValueError(
            f"{which} is trained with {activation!r}, which has thresholds of its own; convert it "
            "without --calibrate"
        )
    images = open_measured(config.data, options.num_images, data_dir, origin.data)
    # The card's config, by which the network is built again when it is loaded.
    clipped = replace(config, activation="clipped_relu")
    classes = class_count(origin.variables)
    spikes = Spikes("rate", nonaffine)
    ways = check_spikes(clipped, classes, images.spec.image_shape, spikes)
    show_analog(ways)
    model = build_folded(clipped, classes)
    folded = fold_batch_norm(origin.variables)
    batch = jnp.asarray(load_images(images).images)
    calibrated = calibrate_model(model, folded, batch, options, nonaffine)
    card = {
        **ways,
        "config": to_json(clipped),
        "parent": origin.parent,
        "calibration": {**dataclasses.asdict(options), "num_images": images.size},
        "data": origin.data,
    }
    save_checkpoint(out, "snn", calibrated, card)
    print(f"spiking network: {out}")


def calibrate_model(
    model: nn.Module,
    variables: Mapping[str, Any],
    images: jax.Array,
    options: CalibrationOptions,
    nonaffine: Nonaffine = "refuse",
) -> dict[str, Any]:
    """Measures the thresholds of a folded network, and of a ResNet its biases where asked.

    Args:
        model: a network of `nadaptor.models` with `norm=None`; its activations are replaced.
        variables: its folded variables, without thresholds.
        images: [B, H, W, C], of the training set.
        options: how to calibrate.
        nonaffine: as for `nadaptor.spiking`.

    Returns:
        The variables of the model with `ClippedRelu` activations: a `threshold` for each layer, and
        biases to which what was missing is added.

    Raises:
        ValueError: an option is out of its range, or the network cannot be converted.
    """
    relus = model.clone(activation=Relu)
    found = _calibrate(relus, variables, images, options, nonaffine)
    quantized = quantize(relus.apply, activation="clipped_relu")
    # One image will do for their names. A max-pool is a layer there, and has no threshold.
    layers = [
        layer for layer in quantized.layers(variables, images[:1]) if layer.kind != "max_pool"
    ]
    flat: dict[Any, Any] = dict(traverse_util.flatten_dict(variables["params"]))
    for layer, threshold, bias in zip(layers, found.thresholds, found.biases, strict=True):
        # A layer's name begins with that of the module, and so does none of the variables.
        *block, activation = layer.name.split("/")[1:]
        threshold = threshold.reshape(())
        # A ReLU6 gives out no more than its bound, and nor may its neuron.
        threshold = threshold if layer.bound is None else jnp.minimum(threshold, layer.bound)
        flat[(*block, activation, "threshold")] = threshold
        if not options.biases:
            continue
        # actN follows convN; a shortcut's bias enters the same sum.
        feeding = (*block, activation.replace("act", "conv"), "bias")
        if feeding not in flat:
            raise ValueError(
                f"of {type(model).__name__} it is not known which bias feeds {layer.name}, as it "
                "is of a ResNet; calibrate without --biases"
            )
        flat[feeding] = flat[feeding] + bias.reshape(-1)
    return {**variables, "params": traverse_util.unflatten_dict(flat)}


def _calibrate(
    model: nn.Module,
    variables: Any,
    images: jax.Array,
    options: CalibrationOptions,
    nonaffine: Nonaffine,
) -> Calibration:
    rule = _rule(options)

    def run(variables: Any, images: jax.Array) -> Calibration:
        found = calibrate_thresholds(model.apply, variables, images, rule=rule, nonaffine=nonaffine)
        if not options.biases:
            return found
        return calibrate_biases(
            model.apply,
            variables,
            images,
            calibration=found,
            num_steps=options.num_steps,
            nonaffine=nonaffine,
        )

    compiled = jax.jit(run).lower(variables, images).compile()
    _check_memory(compiled.memory_analysis(), len(images))
    return compiled(variables, images)


def _check_memory(needed: Any, count: int) -> None:
    """Refuses what a CPU has no room for: the program would be killed, or end with a traceback."""
    if needed is None or jax.default_backend() != "cpu":
        return
    wanted, free = needed.temp_size_in_bytes + needed.output_size_in_bytes, free_bytes()
    if wanted > free:
        raise ValueError(
            f"to calibrate on {count} images takes {wanted / 1e9:.1f} GB of memory, of which "
            f"{free / 1e9:.1f} GB are free; take fewer images, with --num-images"
        )


def _rule(options: CalibrationOptions) -> Rule:
    if options.rule == "percentile":
        return percentile(options.percent)
    return mmse(options.num_steps) if options.rule == "mmse" else maximum()
