"""What the noise adaptor gains or costs against LSQ at each T, over how well training is fitted.

Both methods of one seed start from one parent and see the same images in the same order: the
difference is taken for each seed, and its standard deviation is that over seeds.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nadaptor._files import write_bytes, write_csv
from nadaptor.configs.inference import CorrectionName
from nadaptor.reports.plots import figure_bytes, new_figure
from nadaptor.reports.tables import markdown
from nadaptor.studies.study import Cell, Cells, Method, Network, Study, networks_of

# Each method with noise, and what it is compared with: LSQ with its factor on the scales' gradient
# or, where the method goes without, without. "any_level" is held against plain LSQ.
PAIRS: Mapping[Method, Method] = {
    "noise_adaptor": "lsq",
    "noise_adaptor_exact": "lsq",
    "noise_adaptor_unscaled": "lsq_unscaled",
    "noise_adaptor_half": "lsq",
    "noise_adaptor_relu_start": "lsq",
    "noise_adaptor_relu_start_unscaled": "lsq_unscaled",
    "any_level": "lsq",
    "any_level_1_2": "lsq_unscaled",
}


class Difference(NamedTuple):
    """The noise adaptor's network against LSQ's of the same levels and axis values, in points."""

    network: Network  # with the adaptor
    correction: CorrectionName
    seeds: int
    training_accuracy: tuple[float, float]  # LSQ's and the adaptor's, noise off, mean in %
    mean: dict[str, float]  # "ANN" and "T = t" -> adaptor minus LSQ
    std: dict[str, float]  # sample standard deviation of the paired differences; nan for one seed


def differences_of(study: Study, cells: Cells) -> list[Difference]:
    """Returns the differences of a study, in the order of its networks.

    Args:
        study: with methods that `PAIRS` has; without a whole pair there is none.
        cells: from `run_study`. A seed of which one of the two networks failed is left out.
    """
    return list(_differences(study, cells))


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
    write_csv(out / "differences.csv", [_row(d) for d in found])
    table = markdown([_line(d) for d in found])
    write_bytes(out / "differences.md", f"{table}\n".encode())
    print(f"The noise adaptor minus LSQ, in points\n\n{table}\n")
    _plot(found, f"noise adaptor minus LSQ, {study.split} points", out / "differences.png")
    return True


def _differences(study: Study, cells: Cells) -> Iterator[Difference]:
    networks = networks_of(study)
    for network in networks:
        if network.method not in PAIRS:
            continue
        plain = network._replace(method=PAIRS[network.method])
        if plain not in networks:
            continue
        for correction in study.corrections:
            pairs = [
                [cells[Cell(n, correction, seed)] for n in (plain, network)]
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
        name: [100 * (noisy[name] - plain[name]) for plain, noisy in figures]
        for name in figures[0][0]
    }
    fitted = 100 * np.mean([[m["training_accuracy"] for m in pair] for pair in pairs], axis=0)
    return Difference(
        network,
        correction,
        len(pairs),
        (float(fitted[0]), float(fitted[1])),
        {name: float(np.mean(values)) for name, values in of_seeds.items()},
        {name: _std(values) for name, values in of_seeds.items()},
    )


def _figures(study: Study, measured: Any) -> dict[str, float]:
    spiking = {f"T = {t}": measured["accuracy"][t - 1] for t in study.reported_steps}
    return {"ANN": measured["ann"], **spiking}


def _std(values: Sequence[float]) -> float:
    return float(np.std(values, ddof=1)) if len(values) > 1 else float("nan")


def _row(found: Difference) -> dict[str, Any]:
    return {
        "network": found.network.name,
        "correction": found.correction,
        "seeds": found.seeds,
        "training_accuracy_lsq": f"{found.training_accuracy[0]:.2f}",
        "training_accuracy_adaptor": f"{found.training_accuracy[1]:.2f}",
        **{name: f"{value:.2f}" for name, value in found.mean.items()},
        **{f"{name} deviation": f"{value:.2f}" for name, value in found.std.items()},
    }


def _line(found: Difference) -> dict[str, str]:
    return {
        "network": found.network.name,
        "correction": found.correction,
        "seeds": str(found.seeds),
        "training, LSQ": f"{found.training_accuracy[0]:.1f}",
        "training, adaptor": f"{found.training_accuracy[1]:.1f}",
        **{
            name: f"{value:+.2f}" + ("" if found.seeds == 1 else f"±{found.std[name]:.2f}")
            for name, value in found.mean.items()
        },
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
