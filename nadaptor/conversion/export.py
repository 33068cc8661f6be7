"""A converted network as a file for what runs without this library."""

from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from nadaptor._checks import check_count
from nadaptor.configs.config import to_json
from nadaptor.configs.inference import PLAIN, Inference
from nadaptor.conversion.convert import open_snn
from nadaptor.conversion.weights import named_weights, save_weights
from nadaptor.data.config import DataConfig
from nadaptor.data.registry import get_spec
from nadaptor.data.source import PHOTOGRAPHS, Spec, normalize
from nadaptor.simulation.deployment import export

Form = Literal["jax", "onnx", "safetensors"]


def export_checkpoint(
    checkpoint: Path,
    out: Path,
    form: Form = "jax",
    num_steps: int = 32,
    inference: Inference = PLAIN,
    data_dir: Path | None = None,
    batch_size: int = 1,
) -> None:
    """Writes a converted network as one file, and prints where it is.

    Artefact and model take pixels as they are stored, uint8, and normalise them inside.

    Args:
        checkpoint: folder that `convert` wrote.
        out: file to write.
        form: "jax", an artefact of `nadaptor.export`; "onnx", a model; or "safetensors", weights by
            name.
        num_steps: T of the artefact or model.
        inference: the neuron and the correction of it.
        data_dir: folder of data sets, for an image folder; None for the environment's.
        batch_size: images that an ONNX model takes at once. An artefact takes any number.

    Raises:
        ValueError: there is no such checkpoint, it is damaged, `num_steps` is below 1, or the data
            set of its config is not known.
        MissingPackageError: flatbuffers, or jax2onnx, is not installed.
    """
    model, variables, config, _, card = open_snn(checkpoint)
    identity = card.get("data") or {}
    if form == "safetensors":
        quantizer = config.quantizer
        told = {
            "model": config.network.model,
            "levels": quantizer.used_levels,
            "source": card["card_digest"],
        }
        save_weights(out, named_weights(variables, quantizer.levels), told)
    else:
        spec = stored_spec(config.data, data_dir)

        def classify(variables: Any, images: jax.Array) -> Any:
            return model.apply(variables, normalize(images, spec))

        arrays = jax.tree.map(jnp.asarray, variables)
        said = {"config": to_json(config), "data": identity, "source": card["card_digest"]}
        about = {
            "preprocessing": _preprocessing(spec),
            "class_names": identity.get("class_names"),
        }
        # Ways to compute faster are none of these, and so in no file.
        how: dict[str, Any] = dict(num_steps=num_steps, **inference.options)
        if form == "onnx":
            from nadaptor.interop.onnx import to_onnx, write_onnx

            # Pixels of no picture: the model is compared with the simulation on them.
            shape = (check_count(batch_size, "batch_size"), *spec.image_shape)
            pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
            write_onnx(out, to_onnx(classify, arrays, pixels, metadata=said | about, **how))
        else:
            one = jax.ShapeDtypeStruct((1, *spec.image_shape), jnp.uint8)
            export(out, classify, arrays, one, metadata=said, **about, **how)
    print(f"written: {out}")


def stored_spec(data: DataConfig, data_dir: Path | None = None) -> Spec:
    """Returns what a config's data set is, from its name alone, normalised as the config says.

    Args:
        data: the config's data fields.
        data_dir: folder of data sets, for an image folder.
    """
    spec = get_spec(data.dataset, data_dir, image_size=data.image_size)
    if data.normalization == "imagenet":
        mean, std = PHOTOGRAPHS
        return spec._replace(mean=mean, std=std)
    return spec


def _preprocessing(spec: Spec) -> dict[str, Any]:
    height, width, channels = spec.image_shape
    return {
        "before": f"uint8 pixels, 0 to 255 or as stored, [batch, {height}, {width}, {channels}]",
        "inside": "(pixels - mean) / std",
        "mean": list(spec.mean),
        "std": list(spec.std),
    }
