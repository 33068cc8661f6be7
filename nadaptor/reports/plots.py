"""Plots of accuracy over time steps."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nadaptor._files import write_bytes


class Curve(NamedTuple):
    """One line of a plot of accuracy over time steps: `Curve("mine", [0.5, 0.75])`."""

    label: str
    mean: Sequence[float]  # accuracy at t = 1 to T, fractions of 1
    std: Sequence[float] = ()  # over seeds; empty for one
    spent: int = 0  # steps that a correction took before t = 1


def plot_accuracy(curves: Sequence[Curve], label: str, path: Path) -> None:
    """Plots accuracy over time steps as a PNG.

    Args:
        curves: one line each, with a band of one standard deviation.
        label: of the vertical axis.
        path: file to write.
    """
    plot_panels({"": curves}, label, path)


def plot_panels(
    panels: Mapping[str, Sequence[Curve]], label: str, path: Path, *, total: bool = False
) -> None:
    """Plots groups of curves side by side, three in a row, on the same axes, as a PNG.

    Args:
        panels: curves by the panel's title.
        label: of the vertical axis.
        path: file to write.
        total: whether the horizontal axis counts the steps that corrections spent, too.
    """
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = new_figure(2 + 4 * columns, 3.6 * rows)
    grid = figure.subplots(rows, columns, sharey=True, squeeze=False)
    for axes, (title, curves) in zip(grid.flat, panels.items(), strict=False):
        draw_curves(axes, curves, total)
        axes.set(title=title, xlabel="network steps in all" if total else "time steps T")
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    for axes in grid[:, 0]:
        axes.set_ylabel(label)
    write_bytes(path, figure_bytes(figure))


def new_figure(width: float, height: float) -> Any:
    """Returns an empty figure of matplotlib, in inches, that needs no screen."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Not by pyplot, which keeps each figure until it is closed.
    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def figure_bytes(figure: Any) -> bytes:
    """Returns a figure as a PNG: the same figures give the same bytes."""
    image = io.BytesIO()
    # Without the version of matplotlib inside.
    figure.savefig(image, format="png", metadata={"Software": None})
    return image.getvalue()


def draw_curves(axes: Any, curves: Sequence[Curve], total: bool = False) -> None:
    """Draws curves over time steps, with a band of one standard deviation where there are seeds.

    Args:
        axes: of matplotlib.
        curves: one line each.
        total: whether steps that corrections spent are counted, too.
    """
    last = 1
    for curve in curves:
        steps = np.arange(1, len(curve.mean) + 1) + (curve.spent if total else 0)
        mean, std = 100 * np.asarray(curve.mean), 100 * np.asarray(curve.std or 0.0)
        axes.plot(steps, mean, marker=".", label=curve.label)
        if std.any():
            axes.fill_between(steps, mean - std, mean + std, alpha=0.2)
        last = max(last, steps[-1])
    axes.set_xscale("log")
    ticks = [2**k for k in range(int(last).bit_length())]
    axes.set_xticks(ticks, [str(t) for t in ticks])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
