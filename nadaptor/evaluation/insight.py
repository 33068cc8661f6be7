"""The conversion report of a network: layers, energy and pictures, in one folder and one page."""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nadaptor import energy, record, spiking
from nadaptor._files import write_json
from nadaptor.analysis import LayerReport, conversion_report
from nadaptor.checkpoints.checkpoint import load_card
from nadaptor.configs.inference import Inference
from nadaptor.conversion.convert import load_snn
from nadaptor.data.loader import load_images
from nadaptor.data.registry import open_split
from nadaptor.operations import Energy
from nadaptor.reports import pictures
from nadaptor.reports.html import Table, html_page, write_page
from nadaptor.reports.plots import Curve
from nadaptor.reports.tables import percent

NUM_IMAGES, NUM_NEURONS = 16, 24


def write_insight(
    checkpoint: Path,
    measured: Mapping[str, Any],
    inference: Inference,
    out: Path,
    data_dir: Path | None = None,
    num_images: int = NUM_IMAGES,
) -> None:
    """Writes `report.html`, `conversion.json` and each picture as PNG and SVG, and prints where.

    Layers, energy and spike trains are those of the first images of the split.

    Args:
        checkpoint: folder that `convert` wrote.
        measured: what `simulate_checkpoint` returned for it.
        inference: the neuron and the correction that it was measured with.
        out: folder to write in.
        data_dir: folder of data sets; None for the environment's NADAPTOR_DATA_DIR.
        num_images: how many images to look at.

    Raises:
        ValueError: as `simulate_checkpoint`.
        MissingPackageError: Jinja2 or matplotlib is not installed.
    """
    model, variables, config = load_snn(checkpoint)
    known = load_card(checkpoint, "snn").get("data")
    source = open_split(config.data, measured["split"], data_dir, num_images, known)
    images = jnp.asarray(load_images(source).images)
    options: dict[str, Any] = inference.options
    steps = measured["num_steps"]
    run = jax.jit(functools.partial(conversion_report, model.apply, num_steps=steps, **options))
    layers = jax.device_get(run(variables, images))
    spent = energy(model.apply, variables, images, num_steps=steps, **options)
    thresholds = _thresholds(model, variables, images, inference)
    write_json(out / "conversion.json", _as_json(layers, spent, thresholds, len(images)))
    figures = _pictures(measured, layers, spent, len(images))
    figures |= _trains(model, variables, images, steps, options, thresholds)
    for name, (_, figure) in figures.items():
        pictures.save_figure(figure, out / name)
    page = html_page(
        f"{measured['config']['name']}: conversion report",
        _summary(measured, spent, len(images)),
        [Table("Layers", _rows(layers, spent, thresholds, len(images)))],
        dict(figures.values()),
    )
    write_page(out / "report.html", page)
    print(f"written: {out / 'report.html'}")


def _thresholds(
    model: Any, variables: Any, images: jax.Array, inference: Inference
) -> dict[str, int]:
    """By layer the threshold in units of its scale: the levels."""
    how: dict[str, Any] = dict(coding=inference.coding, nonaffine=inference.nonaffine)
    net = spiking(model.apply, variables, images, **how)
    return {layer.name: int(layer.threshold) for layer in net.layers}


def _summary(measured: Mapping[str, Any], spent: Energy, images: int) -> str:
    last, ratio = measured["accuracy"][-1], spent.total.energy[-1] / spent.total.ann_energy
    return (
        f"{measured['num_images']} {measured['split']} images, {measured['coding']} coding: "
        f"{percent(measured['ann_deterministic'])} as a quantized network, {percent(last)} as a "
        f"spiking one after {measured['num_steps']} steps, with {ratio:.2f} times the energy of "
        f"the ANN (45 nm, 32-bit, without memory). The layers are those of the first {images} "
        "images. Rates are spikes per neuron and step; noise is the number of spikes minus what "
        "the same current would give if it arrived evenly."
    )


def _rows(
    layers: Mapping[str, LayerReport], spent: Energy, thresholds: Mapping[str, int], images: int
) -> list[dict[str, str]]:
    return [
        {
            "layer": name,
            "levels": str(thresholds[name]),
            "silent": percent(float(layer.silent)),
            "saturated": percent(float(layer.saturated)),
            "rate": f"{layer.rate:.3f}",
            "error at T": f"{layer.error[-1]:.4f}",
            "noisy": percent(_noisy(layer.noise)),
            "SynOps per image": f"{spent.layers[name].synops[-1] / images:.3g}",
            "ANN MACs per image": f"{spent.layers[name].ann_macs / images:.3g}",
        }
        for name, layer in layers.items()
    ]


def _noisy(noise: Any) -> float:
    """The fraction of the neurons that sent more or fewer spikes than expected."""
    return 1 - float(noise[len(noise) // 2]) / max(float(np.sum(noise)), 1.0)


def _pictures(
    measured: Mapping[str, Any], layers: Mapping[str, LayerReport], spent: Energy, images: int
) -> dict[str, tuple[str, Any]]:
    """A caption and a figure by the name of the file."""
    name, accuracy, ann = (
        measured["config"]["name"],
        measured["accuracy"],
        measured["ann_deterministic"],
    )
    curve = Curve(name, accuracy, [0.0] * len(accuracy))
    run = pictures.Run(name, accuracy, spent.total.energy / images)
    drawn = {
        "accuracy_over_time": (
            "Accuracy over time steps",
            pictures.accuracy_over_time([curve], ann),
        ),
        "accuracy_over_energy": (
            "Accuracy over the energy of an image",
            pictures.accuracy_over_energy([run], (ann, spent.total.ann_energy / images)),
        ),
        "errors": (
            "Error of each layer over time, as a fraction of its threshold",
            pictures.error_map({name: layer.error for name, layer in layers.items()}),
        ),
        "noise": (
            "Occasional noise by layer",
            pictures.noise_histogram({name: layer.noise for name, layer in layers.items()}),
        ),
    }
    if measured["early_exit"]:
        drawn["exits"] = "Early exit", pictures.exit_steps(measured["early_exit"])
    return drawn


def _trains(
    model: Any,
    variables: Any,
    images: jax.Array,
    steps: int,
    options: Mapping[str, Any],
    threshold: Mapping[str, int],
) -> dict[str, tuple[str, Any]]:
    """Spike trains and potentials of some neurons of the middle layer, for the first image."""
    name = list(threshold)[len(threshold) // 2]
    one = images[:1]
    found = record(
        model.apply,
        variables,
        one,
        num_steps=steps,
        layers=[name],
        quantities=("spikes", "potentials"),
        **options,
    )[name]
    spikes, potentials = (np.asarray(x).reshape(steps, -1) for x in found[:2])
    # The neurons that do something, evenly from all of them.
    busy = np.flatnonzero(np.abs(spikes).sum(0))
    busy = busy if busy.size else np.arange(spikes.shape[1])
    picked = busy[np.linspace(0, busy.size - 1, min(NUM_NEURONS, busy.size)).astype(int)]
    one_spike = 1.0 if options["coding"] == "sum" else float(threshold[name])
    figure = pictures.raster(spikes[:, picked], potentials[:, picked], one_spike)
    return {"spikes": (f"Spikes and potentials of {len(picked)} neurons of {name}", figure)}


def _as_json(
    layers: Mapping[str, LayerReport], spent: Energy, thresholds: Mapping[str, int], images: int
) -> dict[str, Any]:
    return {
        "num_images": images,
        "layers": {
            name: {
                "levels": thresholds[name],
                **{field: np.asarray(value).tolist() for field, value in layer._asdict().items()},
            }
            for name, layer in layers.items()
        },
        "energy": {
            name: {k: np.asarray(v).tolist() for k, v in row._asdict().items()}
            for name, row in {**spent.layers, "total": spent.total}.items()
        },
    }
