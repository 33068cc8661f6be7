"""What the noise adaptor gains or costs against LSQ at each T, over how well training is fitted.

Both methods of one seed start from one parent and see the same images in the same order: the
difference is taken for each seed, and its standard deviation is that over seeds. In the same way
all networks of a study are held against a chosen one of them.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nadaptor._files import write_bytes, write_csv
from nadaptor.configs.inference import CorrectionName
from nadaptor.reports.plots import figure_bytes, new_figure
from nadaptor.reports.tables import markdown
from nadaptor.studies.study import Cell, Cells, Network, Study, networks_of
from nadaptor.studies.variants import PAIRS


class Difference(NamedTuple):
    """A network against another of the same axis values, as the noise adaptor's against LSQ's."""

    network: Network
    correction: CorrectionName
    seeds: int
    training_accuracy: tuple[float, float]  # the other's and the network's, noise off, mean in %
    mean: dict[str, float]  # "ANN" and "T = t" -> the network minus the other, in points
    std: dict[str, float]  # sample standard deviation of the paired differences; nan for one seed
    ahead: dict[str, int]  # in how many seeds the network is ahead


def differences_of(study: Study, cells: Cells) -> list[Difference]:
    """Returns the differences of a study, in the order of its networks.

    Args:
        study: with methods that `PAIRS` has; without a whole pair there is none.
        cells: from `run_study`. A seed of which one of the two networks failed is left out.
    """
    return list(_differences(study, cells, _plain))


def against(study: Study, cells: Cells, other: str) -> list[Difference]:
    """Returns the differences of all networks of a study from one, in the order of its networks.

    Args:
        study: what was compared.
        cells: from `run_study`. A seed of which one of the two networks failed is left out.
        other: which one, as `noise_adaptor_p2`; a network of other axis values is held against the
            one of the same values.

    Raises:
        ValueError: the study has no such network, or no other.
    """
    chosen = named_network(study, other)

    def other_of(network: Network) -> Network | None:
        found = chosen._replace(values=network.values)
        return None if found == network else found

    return list(_differences(study, cells, other_of))


def named_network(study: Study, name: str) -> Network:
    """Returns the network of a study that has a name when its axis values are left out.

    Raises:
        ValueError: there is none, or no other.

    Example:
        >>> named_network(Study(methods=("lsq", "qcfs"), levels=(2,)), "lsq_p2").method
        'lsq'
    """
    named = {network._replace(values=()).name: network for network in networks_of(study)}
    if name not in named:
        raise ValueError(f"{name!r} is no network of the study; those are {', '.join(named)}")
    if len(named) == 1:
        raise ValueError(f"the study has no network but {name!r} to hold against it; name more")
    return named[name]


def write_against(study: Study, cells: Cells, other: str, out: Path) -> bool:
    """Writes `against.csv` and `against.md`: all networks minus `other`, and in how many seeds.

    Args:
        study: what was compared.
        cells: from `run_study`.
        other: as for `against`.
        out: folder for the files.

    Returns:
        Whether there is any difference to write; none where all of its networks failed.

    Raises:
        ValueError: the study has no such network.
    """
    found = against(study, cells, other)
    if not found:
        return False
    rows = [_row(d, "other", "network") for d in found]
    lines = [_line(d, other, "network", count=True) for d in found]
    _write(out / "against", rows, lines, f"Minus {other}, in points, and the share of seeds ahead")
    return True


def write_differences(study: Study, cells: Cells, out: Path) -> bool:
    """Writes `differences.csv`, `differences.md` and `differences.png`.

    The picture has training accuracy along its horizontal axis and a line for each T.

    Args:
        study: what was compared.
        cells: from `run_study`.
        out: folder for the files.

    Returns:
        Whether there is any difference to write.
    """
    found = differences_of(study, cells)
    if not found:
        return False
    rows = [_row(d, "lsq", "adaptor") for d in found]
    lines = [_line(d, "LSQ", "adaptor") for d in found]
    _write(out / "differences", rows, lines, "The noise adaptor minus LSQ, in points")
    _plot(found, f"noise adaptor minus LSQ, {study.split} points", out / "differences.png")
    return True


def _plain(network: Network) -> Network | None:
    """The network without noise that a network with noise is compared with."""
    plain = PAIRS.get(network.method)
    return network._replace(method=plain) if plain else None


def _differences(
    study: Study, cells: Cells, other_of: Callable[[Network], Network | None]
) -> Iterator[Difference]:
    networks = networks_of(study)
    for network in networks:
        other = other_of(network)
        if other is None or other not in networks:
            continue
        for correction in study.corrections:
            pairs = [
                [cells[Cell(n, correction, seed)] for n in (other, network)]
                for seed in range(study.seeds)
            ]
            pairs = [pair for pair in pairs if not any("failed" in m for m in pair)]
            if pairs:
                yield _difference(study, network, correction, pairs)


def _difference(
    study: Study, network: Network, correction: CorrectionName, pairs: Sequence[Any]
) -> Difference:
    figures = [[_figures(study, m) for m in pair] for pair in pairs]
    of_seeds = {
        name: [100 * (own[name] - other[name]) for other, own in figures] for name in figures[0][0]
    }
    fitted = 100 * np.mean([[m["training_accuracy"] for m in pair] for pair in pairs], axis=0)
    return Difference(
        network,
        correction,
        len(pairs),
        (float(fitted[0]), float(fitted[1])),
        {name: float(np.mean(values)) for name, values in of_seeds.items()},
        {name: _std(values) for name, values in of_seeds.items()},
        {name: sum(value > 0 for value in values) for name, values in of_seeds.items()},
    )


def _figures(study: Study, measured: Any) -> dict[str, float]:
    spiking = {f"T = {t}": measured["accuracy"][t - 1] for t in study.reported_steps}
    return {"ANN": measured["ann"], **spiking}


def _std(values: Sequence[float]) -> float:
    return float(np.std(values, ddof=1)) if len(values) > 1 else float("nan")


def _write(
    stem: Path, rows: Sequence[dict[str, Any]], lines: Sequence[dict[str, str]], title: str
) -> None:
    """Writes the rows as a CSV file and the lines as a table, and prints the table."""
    write_csv(stem.with_suffix(".csv"), rows)
    table = markdown(lines)
    write_bytes(stem.with_suffix(".md"), f"{table}\n".encode())
    print(f"{title}\n\n{table}\n")


def _row(found: Difference, other: str, own: str) -> dict[str, Any]:
    return {
        "network": found.network.name,
        "correction": found.correction,
        "seeds": found.seeds,
        f"training_accuracy_{other}": f"{found.training_accuracy[0]:.2f}",
        f"training_accuracy_{own}": f"{found.training_accuracy[1]:.2f}",
        **{name: f"{value:.2f}" for name, value in found.mean.items()},
        **{f"{name} deviation": f"{value:.2f}" for name, value in found.std.items()},
        **{f"{name} seeds ahead": str(count) for name, count in found.ahead.items()},
    }


def _line(found: Difference, other: str, own: str, *, count: bool = False) -> dict[str, str]:
    def figure(name: str, value: float) -> str:
        deviation = "" if found.seeds == 1 else f"±{found.std[name]:.2f}"
        share = f" ({found.ahead[name]}/{found.seeds})" if count else ""
        return f"{value:+.2f}{deviation}{share}"

    return {
        "network": found.network.name,
        "correction": found.correction,
        "seeds": str(found.seeds),
        f"training, {other}": f"{found.training_accuracy[0]:.1f}",
        f"training, {own}": f"{found.training_accuracy[1]:.1f}",
        **{name: figure(name, value) for name, value in found.mean.items()},
    }


def _plot(found: Sequence[Difference], label: str, path: Path) -> None:
    figure = new_figure(8, 5)
    axes = figure.subplots()
    ordered = sorted(found, key=lambda d: d.training_accuracy[1])
    for name in ordered[0].mean:
        x = [d.training_accuracy[1] for d in ordered]
        # One seed has no deviation, and gets no bar.
        error = np.nan_to_num([d.std[name] for d in ordered])
        axes.errorbar(x, [d.mean[name] for d in ordered], error, marker="o", capsize=2, label=name)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set(xlabel="training accuracy of the adaptor's network, noise off, %", ylabel=label)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    write_bytes(path, figure_bytes(figure))
