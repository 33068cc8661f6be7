"""`nadaptor convert CHECKPOINT`: converts a trained network, or a file of weights, to spikes.

There are three ways: as it was trained (quantized), with measured thresholds (--calibrate), and
quantized with no training (--quantize).
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from nadaptor._files import check_place
from nadaptor.cli.command import changed, check_weights, program, read_words, refuse_idle
from nadaptor.configs.config import Config, replace
from nadaptor.configs.inference import Spikes
from nadaptor.configs.named import get_config
from nadaptor.conversion.calibrate import CalibrationOptions, RuleName, convert_calibrated
from nadaptor.conversion.convert import convert
from nadaptor.conversion.origin import Weights, check_free
from nadaptor.conversion.quantized import QuantizeOptions, convert_quantized
from nadaptor.data.config import Normalization
from nadaptor.evaluation.insight import report_conversion
from nadaptor.models.layers import Pool
from nadaptor.neurons import Coding
from nadaptor.parallel.cores import use_every_core
from nadaptor.transformation import Nonaffine


@dataclasses.dataclass(frozen=True)
class Changes:
    """Fields of the config to change, with --init-from."""

    # Network, with --init-from; by default the config's.
    model: str | None = None
    # Features of its first stage, with --init-from; by default the config's.
    width: int | None = None
    # Pools of the network, with --init-from; "max" keeps those of published weights.
    pool: Pool | None = None
    # Data set, with --init-from; by default the config's.
    dataset: str | None = None
    # Images held out of the training set, with --init-from; by default the config's.
    validation_size: int | None = None
    # Pixels per side of an image, with --init-from; by default the config's.
    image_size: int | None = None
    # Whose mean and deviation normalise pixels, with --init-from; by default the config's.
    normalization: Normalization | None = None


@dataclasses.dataclass(frozen=True)
class Calibrate:
    """How to measure thresholds."""

    # Measure thresholds of a full-precision network on training images, by this rule.
    calibrate: RuleName | None = None
    # Percentile of the nonzero activations, for --calibrate percentile (99.9).
    percent: float | None = None
    # Calibrate the biases, too.
    biases: bool = False
    # T to calibrate for, with --calibrate mmse or --biases (32).
    num_steps: int | None = None


DEFAULT, UNCHANGED = Calibrate(), Changes()


def main(arguments: Sequence[str]) -> None:
    """Reads the command line and converts.

    Args:
        arguments: the words after the command.

    Raises:
        ValueError: as `nadaptor.training.convert`, `convert_calibrated` or `convert_quantized`, or
            an option would do nothing.
        RunError: as `nadaptor.training.convert`.
    """
    use_every_core()
    read_words(
        convert_command,
        prog=program("convert"),
        args=list(arguments),
        config=(tyro.conf.OmitArgPrefixes,),
    )


def convert_command(
    checkpoint: Annotated[Path, tyro.conf.Positional],
    measured: Annotated[Calibrate, tyro.conf.arg(name="")] = DEFAULT,
    quantize: int | None = None,
    init_from: Path | None = None,
    changes: Annotated[Changes, tyro.conf.arg(name="")] = UNCHANGED,
    coding: Coding = "rate",
    nonaffine: Nonaffine = "refuse",
    num_images: int | None = None,
    data_dir: Path | None = None,
    report: Path | None = None,
    out: Path | None = None,
) -> None:
    """Folds batch norm, checks the result, and writes the spiking network with its card.

    A full-precision network is converted with no training by --calibrate or --quantize; with
    --init-from a file of weights takes the place of the checkpoint.

    Args:
        checkpoint: The folder that nadaptor train printed; with --init-from a config's name.
        measured: How to measure thresholds.
        quantize: Levels p to quantize a full-precision network with, its scales where p levels
            represent training images best.
        init_from: File of torch-layout weights; the config gives network, data set and split.
        changes: Fields of the config to change.
        coding: How spikes carry a number, kept for nadaptor simulate: by their rate, or by their
            sum, which ends exactly at the quantized network.
        nonaffine: What to do where an operation on rates is not affine, as a max-pool: refuse it,
            or let it act on running means.
        num_images: Validation images to check on (32); with --calibrate and --quantize, training
            images to measure on (128, and at 224 pixels 32).
        data_dir: Folder of data sets; by default the environment's NADAPTOR_DATA_DIR.
        report: Folder for a conversion report: a page with what the conversion and the dynamics
            lost at T = 32, on the first 512 validation images.
        out: Folder to make; by default "snn" beside the checkpoint, or in runs/CONFIG.
    """
    _refuse_idle(measured, changes, init_from)
    if report is not None:
        check_place(report)
    if measured.calibrate and quantize is not None:
        raise ValueError("--calibrate and --quantize are two ways to convert; choose one")
    spikes = Spikes(coding, nonaffine)
    if coding == "sum":
        given = nonaffine if nonaffine != "refuse" else None
        refuse_idle({"--nonaffine": given}, "with --coding sum, which takes any operation")
        if measured.calibrate:
            raise ValueError(
                "--calibrate measures thresholds for rates, and sums count levels; use --quantize P"
            )
    check_weights(init_from)
    if init_from is None:
        source, out = checkpoint, out or checkpoint.parent / "snn"
        _check_trained(source, out)
    else:
        given = {k: v for k, v in dataclasses.asdict(changes).items() if v is not None}
        source = Weights(init_from, replace(get_config(str(checkpoint)), **given))
        out = out or Path("runs") / source.config.name / "snn"
    check_free(out)
    # Each of the three ways has a number of its own by default.
    count = {} if num_images is None else {"num_images": num_images}
    if measured.calibrate:
        # None until here, so that an option that was given can be told from one that was not.
        options = CalibrationOptions(
            measured.calibrate,
            99.9 if measured.percent is None else measured.percent,
            32 if measured.num_steps is None else measured.num_steps,
            measured.biases,
            **count,
        )
        convert_calibrated(source, out, options, data_dir, nonaffine)
    elif quantize is not None or isinstance(source, Weights):
        _check_quantized(source, quantize)
        convert_quantized(source, out, QuantizeOptions(quantize, **count), data_dir, spikes)
    else:
        convert(source, out, **count, data_dir=data_dir, spikes=spikes)
    if report is not None:
        report_conversion(source, out, report, data_dir)


def _check_trained(source: Path, out: Path) -> None:
    """Says of a network that is converted already that it is: to be told to remove it harms."""
    if out.exists() and source.resolve() == out.resolve():
        raise ValueError(
            f"{source} is a spiking network already, which nadaptor simulate reads; what is "
            "converted is the checkpoint that nadaptor train printed"
        )


def _check_quantized(source: Path | Weights, levels: int | None) -> None:
    if isinstance(source, Weights) and levels is None and _is_full_precision(source.config):
        raise ValueError(
            f"{source.config.name} is of full precision, and nothing would spike; add --calibrate "
            "percentile, or --quantize P with P levels"
        )


def _is_full_precision(config: Config) -> bool:
    return config.quantizer.activation == "relu"


def _refuse_idle(measured: Calibrate, changes: Changes, init_from: Path | None) -> None:
    if init_from is None:
        names = [field.name for field in dataclasses.fields(Changes)]
        refuse_idle(changed(changes, UNCHANGED, names), "without --init-from")
    if measured.calibrate is None:
        refuse_idle({"--biases": measured.biases}, "without --calibrate")
    if measured.calibrate != "percentile":
        refuse_idle({"--percent": measured.percent}, "without --calibrate percentile")
    if measured.calibrate != "mmse" and not measured.biases:
        refuse_idle({"--num-steps": measured.num_steps}, "without --calibrate mmse or --biases")
