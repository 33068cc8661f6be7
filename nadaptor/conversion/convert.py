"""The conversion of a trained checkpoint: folds batch norm, checks itself, writes the SNN."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from nadaptor._checks import check_count
from nadaptor._files import making
from nadaptor.checkpoints.checkpoint import load_checkpoint, save_checkpoint
from nadaptor.configs.build import build_model
from nadaptor.configs.config import Config, from_json, replace, to_json
from nadaptor.conversion.identities import Check, check_conversion
from nadaptor.data.loader import load_images
from nadaptor.data.registry import open_split
from nadaptor.errors import RunError
from nadaptor.models import fold_batch_norm
from nadaptor.models.config import ACTIVATIONS

# Images to check on, at least.
FEWEST = 16


@making("out")
def convert(
    checkpoint: Path, out: Path, num_images: int = 32, data_dir: Path | None = None
) -> list[Check]:
    """Converts a trained network and writes the spiking network's checkpoint.

    The weights are those of the trained network with its batch norms folded in, and the threshold
    of a layer is `th = p*s`. The result is checked on validation images before it is written.

    Args:
        checkpoint: folder of a trained network, as `train` returns it.
        out: folder to make.
        num_images: validation images to check on, at least 16.
        data_dir: folder of data sets; None for the environment's NADAPTOR_DATA_DIR.

    Returns:
        The checks, all of which hold.

    Raises:
        ValueError: there is no such checkpoint, it is damaged or of a full-precision network, or
            `out` exists.
        RunError: a check fails; nothing is written.
    """
    if out.exists():
        raise ValueError(f"{out} exists already; choose another --out or remove it")
    if check_count(num_images, "num_images") < FEWEST:
        raise ValueError(
            f"num_images must be at least {FEWEST}, not {num_images}: among fewer, one flipped "
            "spike can look like a wrong weight"
        )
    variables, card = load_checkpoint(checkpoint, "ann")
    config = from_json(card["config"])
    if ACTIVATIONS[config.quantizer.activation].converts_as is None:
        raise ValueError(
            f"{checkpoint} is a full-precision network, in which nothing would spike; train a "
            "quantized one from it, such as digits_na"
        )
    folded = fold_batch_norm(variables)
    source = open_split(config.data, "validation", data_dir, num_images, card.get("data"))
    images = load_images(source).images
    num_classes = class_count(folded)
    # In float32 also after training in bfloat16: the checks compare float against float.
    full = replace(config, dtype="float32")
    model = build_model(full, num_classes=num_classes)
    spiking_model = build_folded(config, num_classes)
    checks = check_conversion(
        model, variables, spiking_model, folded, config.quantizer.levels, jnp.asarray(images)
    )
    for check in checks:
        print(check)
    if failed := [check for check in checks if not check.holds]:
        raise RunError(f"{len(failed)} checks failed, nothing written; the first: {failed[0]}")
    save_checkpoint(out, "snn", folded, _card(config, folded, checks, card))
    print(f"spiking network: {out}")
    return checks


def load_snn(checkpoint: Path) -> tuple[nn.Module, Any, Config]:
    """Loads a converted network.

    Args:
        checkpoint: folder that `convert` wrote.

    Returns:
        The folded Linen module, its variables, and the config that it was trained with. Simulate
        it with `nadaptor.simulate(model.apply, variables, images, num_steps=T)`.

    Raises:
        ValueError: there is no such checkpoint, or it is damaged.
    """
    variables, card = load_checkpoint(checkpoint, "snn")
    config = from_json(card["config"])
    return build_folded(config, class_count(variables)), variables, config


def build_folded(config: Config, num_classes: int | None = None) -> nn.Module:
    """Builds the network to simulate: without batch norm, and with no noise to switch on."""
    kept = ACTIVATIONS[config.quantizer.activation].converts_as or config.quantizer.activation
    quiet = replace(config, activation=kept, dtype="float32")
    return build_model(quiet, folded=True, num_classes=num_classes)


def class_count(variables: Any) -> int:
    """Returns the size of a network's last layer: an image folder's classes need no folder."""
    return len(variables["params"]["fc"]["bias"])


def _card(
    config: Config, variables: Any, checks: list[Check], parent: Mapping[str, Any]
) -> dict[str, Any]:
    scales = {
        "/".join(path[1:-1]): np.asarray(leaf)
        for path, leaf in traverse_util.flatten_dict(variables).items()
        if path[-1] == "quant_scale"
    }
    return {
        "model": config.network.model,
        "levels": config.quantizer.levels,
        "thresholds": {name: (s * config.quantizer.levels).tolist() for name, s in scales.items()},
        "config": to_json(config),
        "source": parent["card_digest"],
        "data": parent.get("data"),
        "checks": [{**check._asdict(), "holds": check.holds} for check in checks],
    }
