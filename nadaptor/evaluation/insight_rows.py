"""The rows of a conversion report's tables: accuracies, layers, and energy over time."""

import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from nadaptor.analysis import LayerReport
from nadaptor.operations import Energy, EnergyTable, LayerEnergy
from nadaptor.reports.tables import percent


class Insight(NamedTuple):
    """What was found of a network on some images."""

    images: int
    layers: dict[str, LayerReport]
    spent: Energy  # by all images together, in pJ
    table: EnergyTable
    units: dict[str, float]  # by layer its threshold in units of the scale
    thresholds: dict[str, np.ndarray]  # by layer, in units of the activation; where it is known
    levels: int | None  # p; None for thresholds without levels, as a calibration makes them


def accuracy_rows(measured: Mapping[str, Any]) -> list[dict[str, str]]:
    """Returns the accuracies from the trained network to the spiking one, each with what it lost.

    Args:
        measured: what `simulate_checkpoint` returned, with `ann_trained` where that is known.

    Example:
        >>> measured = {"ann_deterministic": 0.5, "accuracy": [0.25], "num_steps": 1}
        >>> [row["lost"] for row in accuracy_rows({**measured, "ann_trained": 0.75})]
        ['', '25.00 %', '25.00 %']
    """
    named = [
        ("as it was trained", measured.get("ann_trained")),
        ("converted, with quantizers in place of neurons", measured["ann_deterministic"]),
        (f"spiking, after {measured['num_steps']} steps", measured["accuracy"][-1]),
    ]
    known = [(name, value) for name, value in named if value is not None]
    lost = ["", *(percent(a - b) for (_, a), (_, b) in itertools.pairwise(known))]
    return [
        {"network": name, "accuracy": percent(value), "lost": less}
        for (name, value), less in zip(known, lost, strict=True)
    ]


def layer_rows(found: Insight) -> list[dict[str, str]]:
    """Returns a row for each layer, one for the output, and one for all."""
    blank = dict.fromkeys(("threshold", "levels", "silent", "saturated", "rate"), "")
    blank |= dict.fromkeys(("error at T", "noisy"), "")
    rows = [
        {
            "layer": name,
            "threshold": _span(found.thresholds.get(name)),
            "levels": "none" if found.levels is None else str(found.levels),
            "silent": percent(float(layer.silent)),
            "saturated": percent(float(layer.saturated)),
            "rate": f"{layer.rate:.3f}",
            "error at T": f"{layer.error[-1]:.4f}",
            "noisy": percent(_noisy(layer.noise)),
            **_spent(found.spent.layers[name], found.images),
        }
        for name, layer in found.layers.items()
    ]
    rest = {"output": found.spent.layers["output"], "all": found.spent.total}
    return rows + [{"layer": n, **blank, **_spent(x, found.images)} for n, x in rest.items()]


def energy_over_time(found: Insight) -> list[dict[str, str]]:
    """Returns the energy of an image at t = 1, 2, 4 and so on, and at T."""
    total, images = found.spent.total, found.images
    steps = len(total.synops)
    powers = [2**k for k in range(steps.bit_length()) if 2**k < steps]
    return [
        {
            "t": str(t),
            "SynOps per image": short(total.synops[t - 1] / images),
            "energy, nJ": _nanojoules(total.energy[t - 1] / images),
            "analog layer at every step, nJ": _nanojoules(total.energy_every_step[t - 1] / images),
            "times the ANN": f"{total.energy[t - 1] / total.ann_energy:.3g}",
        }
        for t in [*powers, steps]
    ]


def energy_rows(found: Insight) -> list[dict[str, Any]]:
    """Returns for each t what each layer and all of them have spent per image, in pJ."""
    columns = {**found.spent.layers, "total": found.spent.total}
    return [
        {"t": t + 1, **{name: row.energy[t] / found.images for name, row in columns.items()}}
        for t in range(len(found.spent.total.energy))
    ]


def _spent(row: LayerEnergy, images: int) -> dict[str, str]:
    return {
        "SynOps per image": short(row.synops[-1] / images),
        "ANN MACs per image": short(row.ann_macs / images),
        "energy, nJ": _nanojoules(row.energy[-1] / images),
    }


def short(number: Any) -> str:
    """Returns a number of three digits, with k, M, G or T for thousands.

    Example:
        >>> short(999.6), short(1234567), short(0)
        ('1 k', '1.23 M', '0')
    """
    # Rounded first, so that 999.6 becomes 1 k and not 1000.
    value, unit = float(f"{float(number):.3g}"), ""
    for unit in ("", " k", " M", " G", " T"):
        if abs(value) < 1000 or unit == " T":
            break
        value /= 1000
    return f"{value:.3g}{unit}"


def _nanojoules(picojoules: Any) -> str:
    # As in `short`, rounded before its size decides.
    value = float(f"{float(picojoules) / 1e3:.3g}")
    return f"{value:,.0f}" if value >= 100 else f"{value:g}"


def _span(threshold: np.ndarray | None) -> str:
    """A threshold, or the smallest and the largest of a layer with one per channel."""
    if threshold is None:
        return ""
    low, high = float(np.min(threshold)), float(np.max(threshold))
    return f"{low:.3g}" if low == high else f"{low:.3g} to {high:.3g}"


def _noisy(noise: Any) -> float:
    """The fraction of the neurons that sent more or fewer spikes than expected."""
    # In the middle are those that sent as many as expected.
    return 1 - float(noise[len(noise) // 2]) / max(float(np.sum(noise)), 1.0)
