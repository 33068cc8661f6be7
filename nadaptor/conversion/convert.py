"""The conversion of a trained checkpoint: folds batch norm, checks itself, writes the SNN."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from nadaptor import spiking
from nadaptor._checks import check_count
from nadaptor._files import making
from nadaptor.checkpoints.checkpoint import load_card, load_checkpoint, save_checkpoint
from nadaptor.configs.build import build_model
from nadaptor.configs.config import Config, from_json, replace, to_json
from nadaptor.configs.inference import RATES, Spikes
from nadaptor.conversion.identities import Check, check_conversion
from nadaptor.conversion.origin import Origin, check_free, open_origin
from nadaptor.data.loader import load_images
from nadaptor.data.registry import open_split
from nadaptor.errors import RunError
from nadaptor.models import fold_batch_norm
from nadaptor.models.config import ACTIVATIONS
from nadaptor.models.registry import HEADS
from nadaptor.neurons import Coding
from nadaptor.transformation import Nonaffine

# Images to check on, at least.
FEWEST = 16


@making("out")
def convert(
    checkpoint: Path,
    out: Path,
    num_images: int = 32,
    data_dir: Path | None = None,
    spikes: Spikes = RATES,
) -> list[Check]:
    """Converts a trained network and writes the spiking network's checkpoint.

    The weights are those of the trained network with its batch norms folded in, and the threshold
    of a layer is `th = p*s`. The result is checked on validation images before it is written.

    Args:
        checkpoint: folder of a trained network, as `train` returns it.
        out: folder to make.
        num_images: validation images to check on, at least 16.
        data_dir: folder of data sets; None for the environment's NADAPTOR_DATA_DIR.
        spikes: how the spikes carry numbers; kept in the card, and read by the simulation.

    Returns:
        The checks, all of which hold.

    Raises:
        ValueError: there is no such checkpoint, it is damaged or of a full-precision network,
            `out` exists, or an operation between neurons is not affine and `spikes` does not say
            what to do with it.
        RunError: a check fails; nothing is written.
    """
    check_free(out)
    if check_count(num_images, "num_images") < FEWEST:
        raise ValueError(
            f"num_images must be at least {FEWEST}, not {num_images}: among fewer, one flipped "
            "spike can look like a wrong weight"
        )
    origin = open_origin(checkpoint)
    if ACTIVATIONS[origin.config.quantizer.activation].converts_as is None:
        raise ValueError(
            f"{checkpoint} is a full-precision network, in which nothing would spike; add "
            "--calibrate percentile or --quantize P, or train a quantized one from it, such as "
            "digits_na"
        )
    return finish(origin, out, spikes, num_images, data_dir)


def finish(
    origin: Origin,
    out: Path,
    spikes: Spikes = RATES,
    num_images: int = 32,
    data_dir: Path | None = None,
    said: Mapping[str, Any] = MappingProxyType({}),
) -> list[Check]:
    """Folds a quantized network, checks it, and writes the spiking network's checkpoint.

    Args:
        origin: the network, with its scales.
        out: folder to make.
        spikes: as for `convert`.
        num_images: validation images to check on.
        data_dir: as for `convert`.
        said: what else the card says.

    Returns:
        The checks, all of which hold.

    Raises:
        ValueError: the images are not there, or not those of the training.
        RunError: a check fails; nothing is written.
    """
    config, variables = origin.config, origin.variables
    folded = fold_batch_norm(variables)
    source = open_split(config.data, "validation", data_dir, num_images, origin.data)
    num_classes = class_count(folded)
    # In float32 also after training in bfloat16: the checks compare float against float.
    full = replace(config, dtype="float32")
    model = build_model(full, num_classes=num_classes)
    spiking_model = build_folded(config, num_classes)
    ways = check_spikes(config, num_classes, source.spec.image_shape, spikes)
    show_analog(ways)
    images = jnp.asarray(load_images(source).images)
    print(f"checking the conversion on {len(images)} validation images", flush=True)
    checks = check_conversion(
        model, variables, spiking_model, folded, config.quantizer.levels, images, spikes
    )
    for check in checks:
        print(check)
    if failed := [check for check in checks if not check.holds]:
        raise RunError(f"{len(failed)} checks failed, nothing written; the first: {failed[0]}")
    save_checkpoint(out, "snn", folded, {**_card(origin, folded, checks), **ways, **said})
    print(f"spiking network: {out}")
    return checks


def check_spikes(
    config: Config, num_classes: int, image_shape: tuple[int, int, int], spikes: Spikes
) -> dict[str, Any]:
    """Checks that spikes can go through a network, before anything is measured.

    Args:
        config: of the network.
        num_classes: size of its last layer.
        image_shape: H, W, C.
        spikes: how they carry numbers.

    Returns:
        What the card says of it: `coding`, `nonaffine`, and the operations that are `analog`, from
        which no spikes come on hardware.

    Raises:
        ValueError: an operation between neurons is not affine and `spikes` does not say what to do
            with it, or says so where all are affine, or sums would have no levels to count.
    """
    check_coding(config, spikes.coding)
    model = build_folded(config, num_classes)
    one = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    # Of shapes alone, so that what is refused shows before an image is read.
    shapes = jax.eval_shape(model.init, jax.random.key(0), one)
    net = spiking(model.apply, shapes, one, **spikes._asdict())
    if spikes.nonaffine == "running_mean" and not net.analog:
        raise ValueError(
            "nonaffine 'running_mean' does nothing: all operations between neurons are affine; "
            "leave it out"
        )
    return {**spikes._asdict(), "analog": list(net.analog)}


def check_coding(config: Config, coding: Coding) -> None:
    """Checks that a network's activations have levels to count, where spikes carry sums.

    Raises:
        ValueError: they are clipped ReLUs, as a calibration makes them.
    """
    if coding == "sum" and config.quantizer.activation == "clipped_relu":
        raise ValueError(
            "sum coding counts the levels of a quantizer, and clipped ReLUs have none: quantize "
            "the network, as --quantize 8 does without training, or use rate coding"
        )


def show_analog(said: Mapping[str, Any]) -> None:
    """Prints which operations of a network work on running means, as `check_spikes` found them."""
    for operation in said["analog"]:
        print(f"analog, on running means: {operation}")


def load_spikes(checkpoint: Path) -> Spikes:
    """Returns how the spikes of a converted network carry numbers.

    Args:
        checkpoint: folder that `convert` wrote; one of an older version is of rates.

    Raises:
        ValueError: there is no such checkpoint, or its card is damaged.
    """
    return _spikes(checkpoint, load_card(checkpoint, "snn"))


def _spikes(checkpoint: Path, card: Mapping[str, Any]) -> Spikes:
    found = Spikes(card.get("coding", "rate"), card.get("nonaffine", "refuse"))
    if found.coding not in get_args(Coding) or found.nonaffine not in get_args(Nonaffine):
        raise ValueError(f"{checkpoint} is damaged: it says {found}; convert the network again")
    return found


class Converted(NamedTuple):
    """A converted network, all that its folder holds."""

    model: nn.Module  # folded
    variables: Any
    config: Config  # that it was trained with
    spikes: Spikes
    card: dict[str, Any]


def open_snn(checkpoint: Path) -> Converted:
    """Loads a converted network with its card, which is read once.

    Args:
        checkpoint: folder that `convert` wrote.

    Raises:
        ValueError: there is no such checkpoint, or it is damaged.
    """
    variables, card = load_checkpoint(checkpoint, "snn")
    config = from_json(card["config"])
    model = build_folded(config, class_count(variables))
    return Converted(model, variables, config, _spikes(checkpoint, card), card)


def load_snn(checkpoint: Path) -> tuple[nn.Module, Any, Config]:
    """Loads a converted network.

    Args:
        checkpoint: folder that `convert` wrote.

    Returns:
        The folded Linen module, its variables, and the config that it was trained with. Simulate
        it with `nadaptor.simulate(model.apply, variables, images, num_steps=T)`, and with the
        options of `load_spikes` where it was converted with others than rates.

    Raises:
        ValueError: there is no such checkpoint, or it is damaged.
    """
    return open_snn(checkpoint)[:3]


def build_folded(config: Config, num_classes: int | None = None) -> nn.Module:
    """Builds the network to simulate: without batch norm, and with no noise to switch on."""
    kept = ACTIVATIONS[config.quantizer.activation].converts_as or config.quantizer.activation
    quiet = replace(config, activation=kept, dtype="float32")
    return build_model(quiet, folded=True, num_classes=num_classes)


def class_count(variables: Any) -> int:
    """Returns the size of a network's last layer: an image folder's classes need no folder."""
    params = variables["params"]
    return len(next(params[head]["bias"] for head in HEADS if head in params))


def _card(origin: Origin, variables: Any, checks: list[Check]) -> dict[str, Any]:
    config = origin.config
    scales = {
        # Without the collection before it and the parameter's name behind.
        "/".join(path[1:-1]): np.asarray(leaf)
        for path, leaf in traverse_util.flatten_dict(variables).items()
        if path[-1] == "quant_scale"
    }
    return {
        "model": config.network.model,
        "levels": config.quantizer.used_levels,
        "thresholds": {name: (s * config.quantizer.levels).tolist() for name, s in scales.items()},
        "config": to_json(config),
        "source": origin.parent,
        "data": origin.data,
        "checks": [{**check._asdict(), "holds": check.holds} for check in checks],
    }
