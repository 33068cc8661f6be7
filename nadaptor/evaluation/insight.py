"""The conversion report of a network: layers, energy and pictures, in one folder and one page."""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nadaptor import energy, record, spiking
from nadaptor._files import write_csv, write_json
from nadaptor.analysis import conversion_report
from nadaptor.configs.build import build_model
from nadaptor.configs.config import replace
from nadaptor.configs.inference import Inference, get_inference
from nadaptor.conversion.convert import Converted, class_count, open_snn
from nadaptor.conversion.origin import Weights, open_origin
from nadaptor.conversion.weights import named_weights
from nadaptor.data.loader import load_images
from nadaptor.data.registry import open_split
from nadaptor.evaluation.accuracy import ann_accuracy
from nadaptor.evaluation.insight_rows import (
    Insight,
    accuracy_rows,
    energy_over_time,
    energy_rows,
    layer_rows,
)
from nadaptor.evaluation.report import measure
from nadaptor.operations import EnergyTable
from nadaptor.reports import pictures
from nadaptor.reports.html import Table, html_page, write_page
from nadaptor.reports.plots import Curve
from nadaptor.reports.tables import markdown, percent

NUM_IMAGES, NUM_NEURONS = 16, 24
# Validation images that the report of a conversion measures accuracy on: some minutes at most.
TO_CHECK = 512


def write_insight(
    snn: Converted,
    measured: Mapping[str, Any],
    inference: Inference,
    out: Path,
    data_dir: Path | None = None,
    num_images: int = NUM_IMAGES,
    table: EnergyTable | None = None,
) -> None:
    """Writes the conversion report, prints its table of layers, and where it is.

    Layers, energy and spike trains are those of the first images of the split. The files are
    `report.html`, `conversion.json`, `energy.csv` by layer and step, and each picture as PNG and
    SVG.

    Args:
        snn: the network.
        measured: what `simulate_checkpoint` returned for it; with `ann_trained`, the accuracy of
            the network before its conversion, the page says that, too.
        inference: the neuron and the correction that it was measured with.
        out: folder to write in.
        data_dir: folder of data sets; None for the environment's NADAPTOR_DATA_DIR.
        num_images: how many images to look at.
        table: energy per operation; None for that of 45 nm.

    Raises:
        ValueError: as `simulate_checkpoint`.
        MissingPackageError: Jinja2 or matplotlib is not installed.
    """
    model, variables, config, _, card = snn
    source = open_split(config.data, measured["split"], data_dir, num_images, card.get("data"))
    images = jnp.asarray(load_images(source).images)
    steps, options = measured["num_steps"], inference.options
    clipped = config.quantizer.activation == "clipped_relu"
    # Rounding to one level would be no activation of a calibrated network.
    how = dict(num_steps=steps, reference="clipped" if clipped else "rounded", **options)
    run = jax.jit(functools.partial(conversion_report, model.apply, **how))
    layers = jax.device_get(run(variables, images))
    table = EnergyTable() if table is None else table
    spent = energy(model.apply, variables, images, num_steps=steps, table=table, **options)
    quantizer = config.quantizer
    units, thresholds = _thresholds(model, variables, images, inference, quantizer.levels)
    # A clipped ReLU has one step, whose height is the threshold: no levels in the paper's sense.
    levels = quantizer.used_levels
    found = Insight(len(images), layers, spent, table, units, thresholds, levels)
    write_json(out / "conversion.json", _as_json(found))
    write_csv(out / "energy.csv", energy_rows(found))
    figures = _pictures(measured, found)
    figures |= _trains(model, variables, images, steps, options, units)
    for name, (_, figure) in figures.items():
        pictures.save_figure(figure, out / name)
    tables = [
        Table("Where accuracy goes", accuracy_rows(measured)),
        Table("Layers", layer_rows(found)),
        Table("Energy of an image over time", energy_over_time(found)),
    ]
    title = f"{measured['config']['name']}: conversion report"
    page = html_page(title, _summary(measured, found), tables, dict(figures.values()))
    write_page(out / "report.html", page)
    print(f"\nLayers, of {found.images} images\n\n{markdown(layer_rows(found))}")
    print(f"written: {out / 'report.html'}")


def report_conversion(
    source: Path | Weights,
    snn: Path,
    out: Path,
    data_dir: Path | None = None,
    num_steps: int = 32,
    num_images: int = TO_CHECK,
) -> None:
    """Writes the conversion report of a network that was just converted.

    Args:
        source: what it was converted from, as for `convert`.
        snn: folder that `convert` wrote.
        out: folder to write in.
        data_dir: folder of data sets; None for the environment's NADAPTOR_DATA_DIR.
        num_steps: T.
        num_images: validation images, the first ones, to measure accuracy on.

    Raises:
        ValueError: as `simulate_checkpoint`.
    """
    loaded = open_snn(snn)
    inference = get_inference("none", 4, *loaded.spikes)
    measured = measure(loaded, num_steps, "validation", inference, data_dir, num_images)
    trained = _trained_accuracy(source, data_dir, num_images)
    write_insight(loaded, {**measured, "ann_trained": trained}, inference, out, data_dir)


def _trained_accuracy(source: Path | Weights, data_dir: Path | None, num_images: int) -> float:
    """Accuracy of a network before its conversion, without noise."""
    origin = open_origin(source, data_dir)
    # As the conversion is checked, whatever the network was trained in.
    config = replace(origin.config, dtype="float32")
    if isinstance(source, Weights):
        # A file has no scales, whatever the config says.
        config = replace(config, activation="relu")
    model = build_model(config, num_classes=class_count(origin.variables))
    images = open_split(config.data, "validation", data_dir, num_images, origin.data)
    return ann_accuracy(model, origin.variables, images)


def _thresholds(
    model: Any, variables: Any, images: jax.Array, inference: Inference, levels: int
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """By layer the threshold in units of its scale, and in those of the activation."""
    how: dict[str, Any] = dict(coding=inference.coding, nonaffine=inference.nonaffine)
    net = spiking(model.apply, variables, images, **how)
    named = named_weights(variables, levels)
    # A layer's name begins with that of the module, and so does none of the variables.
    places = {layer.name: layer.name.split("/")[1:] for layer in net.layers}
    known = {name: ".".join((*place, "threshold")) for name, place in places.items()}
    return (
        {layer.name: float(layer.threshold) for layer in net.layers},
        {name: named[key] for name, key in known.items() if key in named},
    )


def _summary(measured: Mapping[str, Any], found: Insight) -> str:
    last, total = measured["accuracy"][-1], found.spent.total
    return (
        f"{measured['num_images']} {measured['split']} images, {measured['coding']} coding: "
        f"{percent(measured['ann_deterministic'])} as a quantized network, {percent(last)} as a "
        f"spiking one after {measured['num_steps']} steps, with "
        f"{total.energy[-1] / total.ann_energy:.2f} times the energy of the ANN. Energy is "
        f"{found.table.mac:g} pJ per MAC and {found.table.ac:g} pJ per synaptic operation, without "
        f"memory (unless changed 45 nm, 32-bit: Horowitz, 2014). The layers are those of the first "
        f"{found.images} images. Thresholds are in units of the activation. Rates are spikes per "
        "neuron and step; noise is the number of spikes minus what the same current would give if "
        "it arrived evenly."
    )


def _pictures(measured: Mapping[str, Any], found: Insight) -> dict[str, tuple[str, Any]]:
    """A caption and a figure by the name of the file."""
    name, accuracy, ann = (
        measured["config"]["name"],
        measured["accuracy"],
        measured["ann_deterministic"],
    )
    layers, spent, images = found.layers, found.spent, found.images
    curve = Curve(name, accuracy)
    # Accuracy is of the whole split, and energy of the first images alone.
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
    threshold: Mapping[str, float],
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
    # With sums a neuron fires for each level, with rates for all p of them.
    one_spike = 1.0 if options["coding"] == "sum" else threshold[name]
    figure = pictures.raster(spikes[:, picked], potentials[:, picked], one_spike)
    return {"spikes": (f"Spikes and potentials of {len(picked)} neurons of {name}", figure)}


def _as_json(found: Insight) -> dict[str, Any]:
    rows = {**found.spent.layers, "total": found.spent.total}
    return {
        "num_images": found.images,
        "pj_per_operation": found.table._asdict(),
        "layers": {
            name: {
                "levels": found.levels,
                "threshold": np.asarray(found.thresholds[name]).tolist()
                if name in found.thresholds
                else None,
                **{field: np.asarray(value).tolist() for field, value in layer._asdict().items()},
            }
            for name, layer in found.layers.items()
        },
        "energy": {
            name: {k: np.asarray(v).tolist() for k, v in row._asdict().items()}
            for name, row in rows.items()
        },
    }
