"""Pictures of what a spiking network does, each a figure of matplotlib.

`save_figure` writes one as PNG and SVG, and `nadaptor.reports.html` puts them into one page.
"""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nadaptor._files import write_bytes
from nadaptor.reports.plots import Curve, draw_curves, figure_bytes, new_figure


class Run(NamedTuple):
    """Accuracy and energy of a run at every t."""

    label: str
    accuracy: Sequence[float]  # at t = 1 to T, fractions
    energy: Any  # [T], per image up to t, in pJ


def accuracy_over_time(curves: Sequence[Curve], ann: float | None = None) -> Any:
    """Draws accuracy over T, a band of one standard deviation over seeds, and the ANN as a line.

    Args:
        curves: one for each run.
        ann: accuracy of the network without spikes, a fraction; None for no line.
    """
    figure = new_figure(6, 4)
    axes = figure.subplots()
    draw_curves(axes, curves)
    if ann is not None:
        axes.axhline(100 * ann, color="gray", linestyle="--", label="ANN")
    return _labelled(figure, axes, "time steps T", "accuracy, %", legend=True)


def accuracy_over_energy(runs: Sequence[Run], ann: tuple[float, float] | None = None) -> Any:
    """Draws accuracy over the energy of an image, one point for each t.

    Args:
        runs: one line each.
        ann: accuracy and energy in pJ of the network without spikes; None for no point.
    """
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    figure = new_figure(6, 4)
    axes = figure.subplots()
    for run in runs:
        axes.plot(
            np.asarray(run.energy) / 1e3,
            100 * np.asarray(run.accuracy),
            marker=".",
            label=run.label,
        )
    if ann is not None:
        axes.plot(ann[1] / 1e3, 100 * ann[0], "*", color="gray", markersize=12, label="ANN")
    axes.set_xscale("log")
    # Numbers at powers of ten alone would be one or none here, and all of them overlap.
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())
    return _labelled(figure, axes, "energy per image, nJ", "accuracy, %", legend=True)


def error_map(errors: Mapping[str, Any]) -> Any:
    """Draws the error of each layer at each t as a heat map.

    Args:
        errors: by layer, at t = 1 to T, fractions of the threshold.
    """
    values = np.array([np.asarray(row) for row in errors.values()])
    # In inches: a line of small print for each layer.
    figure = new_figure(6, 1.6 + 0.26 * len(values))
    axes = figure.subplots()
    image = axes.imshow(
        values,
        aspect="auto",
        cmap="viridis",
        interpolation="nearest",
        vmin=0,
        # Cells are centred on t = 1 to T, and the first layer is on top.
        extent=(0.5, values.shape[1] + 0.5, len(values) - 0.5, -0.5),
    )
    axes.set_yticks(range(len(values)), list(errors), fontsize="small")
    figure.colorbar(image, ax=axes, label="mean |rate - activation|")
    axes.set_xlabel("time steps t")
    return figure


def raster(spikes: np.ndarray, potentials: np.ndarray | None = None, threshold: float = 1) -> Any:
    """Draws spikes of some neurons over time, and the potentials of up to three of them.

    Args:
        spikes: [T, ...], 1, 0 or -1; of images choose some, as in `spikes[:, 0]`.
        potentials: [T, ...] after each step, in units of the scale; None for none.
        threshold: in the same units, a dashed line: p for a quantizer of p levels.
    """
    steps = len(spikes)
    spikes = np.reshape(spikes, (steps, -1))
    neurons = spikes.shape[1]
    potentials = None if potentials is None else np.reshape(potentials, (steps, -1))
    figure = new_figure(6, 2.6 if potentials is None else 4.6)
    rows = figure.subplots(1 if potentials is None else 2, sharex=True, squeeze=False)[:, 0]
    t = np.arange(1, steps + 1)
    for value, color, label in ((1, "black", "spike"), (-1, "tab:red", "negative spike")):
        times, which = np.nonzero(spikes == value)
        rows[0].scatter(times + 1, which, marker="|", color=color, label=label, s=24)
    rows[0].set(ylabel="neuron", ylim=(-0.5, neurons - 0.5))
    if potentials is not None:
        for i in range(min(3, neurons)):
            rows[1].plot(t, potentials[:, i], drawstyle="steps-mid", label=f"neuron {i}")
        rows[1].axhline(threshold, color="gray", linestyle="--", label="threshold")
        rows[1].set_ylabel("potential / scale")
        rows[1].legend(fontsize="small")
    rows[-1].set_xlabel("time step")
    rows[-1].set_xlim(0.5, steps + 0.5)
    return figure


def noise_histogram(noise: Mapping[str, Any]) -> Any:
    """Draws how many neurons sent how many spikes too many, a line for each layer.

    Args:
        noise: by layer, neurons with -k to k spikes more than expected.
    """
    figure = new_figure(6, 4)
    axes = figure.subplots()
    colors = _colors(len(noise))
    for (name, counts), color in zip(noise.items(), colors, strict=True):
        counts = np.asarray(counts, float)
        k = len(counts) // 2
        axes.plot(
            np.arange(-k, k + 1),
            100 * counts / max(counts.sum(), 1),
            marker=".",
            label=name,
            color=color,
        )
    # Most neurons have no surplus: a linear axis would show those alone, and a logarithmic one has
    # no place for a count of 0.
    axes.set_yscale("symlog", linthresh=0.01)
    axes.set_ylim(bottom=0)
    figure = _labelled(figure, axes, "count minus expected count, spikes", "neurons, %")
    # Beside the axes, because it is as long as the network is deep.
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", fontsize="x-small")
    return figure


def exit_steps(rows: Sequence[Mapping[str, float]]) -> Any:
    """Draws accuracy and mean steps of early exit over the confidence that is asked for.

    Args:
        rows: each with `confidence`, `accuracy`, a fraction, and `mean_steps`.
    """
    figure = new_figure(6, 4)
    axes = figure.subplots()
    confidence = [row["confidence"] for row in rows]
    axes.plot(confidence, [100 * row["accuracy"] for row in rows], marker="o", label="accuracy")
    other = axes.twinx()
    other.plot(confidence, [row["mean_steps"] for row in rows], marker="s", color="tab:orange")
    other.set_ylabel("mean steps", color="tab:orange")
    return _labelled(figure, axes, "confidence at which an image stops", "accuracy, %")


def svg_bytes(figure: Any) -> bytes:
    """Returns a figure as an SVG without a date, the same for the same figure."""
    import matplotlib as mpl

    image = io.BytesIO()
    # Without it the ids inside would be random.
    with mpl.rc_context({"svg.hashsalt": "nadaptor"}):
        figure.savefig(image, format="svg", metadata={"Date": None, "Creator": None})
    return image.getvalue()


def save_figure(figure: Any, path: Path) -> None:
    """Writes a figure as PNG and as SVG.

    Args:
        figure: of matplotlib.
        path: without the ending.
    """
    write_bytes(path.with_name(f"{path.name}.png"), figure_bytes(figure))
    write_bytes(path.with_name(f"{path.name}.svg"), svg_bytes(figure))


def _labelled(figure: Any, axes: Any, x: str, y: str, legend: bool = False) -> Any:
    axes.set(xlabel=x, ylabel=y)
    axes.grid(alpha=0.3)
    if legend:
        axes.legend(fontsize="small")
    return figure


def _colors(number: int) -> Any:
    import matplotlib as mpl

    return mpl.colormaps["viridis"](np.linspace(0, 0.9, max(number, 1)))
