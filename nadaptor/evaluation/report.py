"""The report of a converted network: its accuracy at every t, as CSV, JSON and a plot."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax

from nadaptor._checks import check_count
from nadaptor._files import write_csv, write_json
from nadaptor.configs.build import build_model
from nadaptor.configs.config import Config, replace, to_json
from nadaptor.configs.inference import Inference, get_inference
from nadaptor.conversion.convert import Converted, check_coding, class_count, open_snn
from nadaptor.data.registry import open_split
from nadaptor.data.source import Source
from nadaptor.evaluation.accuracy import ann_accuracy, exit_accuracy, snn_accuracy
from nadaptor.models.config import ACTIVATIONS
from nadaptor.reports.plots import Curve, plot_accuracy
from nadaptor.reports.tables import markdown, percent

SplitToMeasure = Literal["validation", "test"]
CONFIDENCES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)


def simulate_checkpoint(
    checkpoint: Path,
    num_steps: int,
    split: SplitToMeasure,
    inference: Inference | None = None,
    data_dir: Path | None = None,
    num_images: int | None = None,
    confidence: float | None = None,
) -> dict[str, Any]:
    """Measures a converted network on a split: as an ANN, and as an SNN at every t up to T.

    Args:
        checkpoint: folder that `convert` wrote.
        num_steps: T.
        split: images to read; the test set is for final figures, not for choices.
        inference: the neuron, the correction and the coding; None for what the card says.
        data_dir: folder of data sets; None for the environment's NADAPTOR_DATA_DIR.
        num_images: the first images of the split to measure on; None for all.
        confidence: softmax probability at which an image stops, in a simulation of its own that
            does not run the steps left over; None for none.

    Returns:
        `ann_noisy` and `ann_deterministic`, accuracies of the quantized network with the noise on
        (amplitude of the config, also where it trained without; None for the activations that
        cannot have it) and off; `accuracy`, the spiking network's at t = 1 to T;
        `spikes_per_neuron` of each layer in T steps and `mean_spikes` of all; `settled`, with sum
        coding the last step with a spike; `coding` and `nonaffine`; `early_exit`, accuracy and mean
        number of steps where images stop once they are confident; `stopped`, the same of the
        simulation with `confidence`, or None; `config`, `split`, `num_images`,
        `num_steps` and `total_steps`, the correction's included. Accuracies are fractions, 0 to 1.

    Raises:
        ValueError: there is no such checkpoint, it is damaged, `num_steps` is below 1, or the data
            set's classes or files are not those that the network was trained on.
    """
    check_count(num_steps, "num_steps")
    return measure(
        open_snn(checkpoint), num_steps, split, inference, data_dir, num_images, confidence
    )


def measure(
    snn: Converted,
    num_steps: int,
    split: SplitToMeasure,
    inference: Inference | None = None,
    data_dir: Path | None = None,
    num_images: int | None = None,
    confidence: float | None = None,
) -> dict[str, Any]:
    """Does what `simulate_checkpoint` does, with a network that is loaded."""
    model, variables, config, spikes, _ = snn
    if inference is None:
        # The steps are those of a correction, of which there is none.
        inference = get_inference("none", 4, *spikes)
    check_coding(config, inference.coding)
    images = _images(snn, split, data_dir, num_images)
    stopped = None
    if confidence is not None:
        exits = exit_accuracy(model, variables, images, num_steps, confidence, inference)
        stopped = exits._asdict()
    result = snn_accuracy(
        model, variables, images, num_steps, inference=inference, confidences=CONFIDENCES
    )
    return {
        **_of_ann(snn, split, images),
        "num_steps": num_steps,
        "coding": inference.coding,
        "nonaffine": inference.nonaffine,
        "fast_convolution": inference.fast_convolution,
        "events": inference.events,
        "total_steps": inference.total_steps(num_steps),
        **result._asdict(),
        "stopped": stopped,
    }


def measure_ann(
    snn: Converted,
    split: SplitToMeasure,
    data_dir: Path | None = None,
    num_images: int | None = None,
) -> dict[str, Any]:
    """Measures a converted network with its quantizers in place of neurons: without dynamics.

    What it lacks to the trained network is lost by the conversion, and what the spiking network
    lacks to it by the dynamics.

    Args:
        snn: the network.
        split: images to read.
        data_dir: folder of data sets; None for the environment's NADAPTOR_DATA_DIR.
        num_images: the first images of the split to measure on; None for all.

    Returns:
        `ann_noisy` and `ann_deterministic`, as those of `simulate_checkpoint`; `config`, `split`
        and `num_images`.

    Raises:
        ValueError: the data set's classes or files are not those that it was trained on.
    """
    return _of_ann(snn, split, _images(snn, split, data_dir, num_images))


def _images(
    snn: Converted, split: SplitToMeasure, data_dir: Path | None, num_images: int | None
) -> Source:
    return open_split(snn.config.data, split, data_dir, num_images, snn.card.get("data"))


def _of_ann(snn: Converted, split: SplitToMeasure, images: Source) -> dict[str, Any]:
    return {
        "config": to_json(snn.config),
        "split": split,
        "num_images": images.size,
        "ann_noisy": noisy_accuracy(snn.config, snn.variables, images),
        "ann_deterministic": ann_accuracy(snn.model, snn.variables, images),
    }


def write_report(report: Mapping[str, Any], out: Path) -> None:
    """Prints a report of `simulate_checkpoint` and writes it.

    Args:
        report: what was measured.
        out: folder for `accuracy.csv` (t, accuracy), `report.json` and `accuracy.png`.
    """
    accuracy = report["accuracy"]
    _print_ann(report)
    print_accuracy(report)
    for layer, spikes in report["spikes_per_neuron"].items():
        print(f"{layer:>20} {spikes:.3f} spikes per neuron in {len(accuracy)} steps")
    print(f"{'all layers':>20} {report['mean_spikes']:.3f} spikes per neuron")
    print(f"{'coding':>20} {report['coding']}")
    print(f"{'network steps':>20} {report['total_steps']}, {len(accuracy)} of them counted")
    if report.get("settled") is not None:
        print(f"{'last spike':>20} at step {report['settled']}")
    print(f"\nEarly exit\n\n{markdown([_exit_row(row) for row in report['early_exit']])}")
    if stopped := report["stopped"]:
        print(
            f"stopped at confidence {stopped['confidence']:g}: accuracy "
            f"{percent(stopped['accuracy'])} after {stopped['mean_steps']:.2f} steps on average"
        )
    # What was measured stands on the screen, whatever becomes of the files.
    write_accuracy(report, report["config"]["name"], out)


def print_accuracy(report: Mapping[str, Any]) -> None:
    """Prints the accuracy at every t."""
    for t, fraction in enumerate(report["accuracy"], start=1):
        print(f"{f'T = {t}':>20} {percent(fraction)}")


def write_accuracy(report: Mapping[str, Any], name: str, out: Path) -> None:
    """Writes a report with the accuracy at every t.

    Args:
        report: with `accuracy` and `split`.
        name: of the curve.
        out: folder for `accuracy.csv` (t, accuracy), `report.json` and `accuracy.png`.
    """
    accuracy = report["accuracy"]
    rows = [{"t": t, "accuracy": a} for t, a in enumerate(accuracy, start=1)]
    write_csv(out / "accuracy.csv", rows)
    write_json(out / "report.json", report)
    curve = Curve(name, accuracy)
    plot_accuracy([curve], f"{report['split']} accuracy, %", out / "accuracy.png")
    print(f"written: {out}")


def write_ann(report: Mapping[str, Any], out: Path) -> None:
    """Prints what `measure_ann` measured, and writes it.

    Args:
        report: what was measured.
        out: folder for `report.json`.
    """
    _print_ann(report)
    write_json(out / "report.json", report)
    print(f"written: {out}")


def noisy_accuracy(config: Config, variables: Any, images: Source) -> float | None:
    """Accuracy with the noise on, where the network has step sizes for it."""
    if ACTIVATIONS[config.quantizer.activation].converts_as != "lsq":
        return None
    noisy = replace(config, activation="noise_adaptor", dtype="float32")
    # The converted weights fit: its layers and scales have the same names.
    noisy = build_model(noisy, folded=True, num_classes=class_count(variables))
    return ann_accuracy(noisy, variables, images, jax.random.key(config.seed))


def _print_ann(report: Mapping[str, Any]) -> None:
    for name in ("ann_noisy", "ann_deterministic"):
        if report[name] is not None:
            print(f"{name:>20} {percent(report[name])}")


def _exit_row(row: Mapping[str, float]) -> dict[str, str]:
    return {
        "stop at confidence": f"{row['confidence']:g}",
        "accuracy": percent(row["accuracy"]),
        "mean steps": f"{row['mean_steps']:.2f}",
    }
