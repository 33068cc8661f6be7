"""`nadaptor simulate CHECKPOINT`: measures a converted network at every time step."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import tyro

from nadaptor._checks import check_count
from nadaptor._files import check_place
from nadaptor.cli.command import changed, program, read_words, refuse_idle, say
from nadaptor.configs.inference import TWO_STAGES, CorrectionName, get_inference
from nadaptor.conversion.convert import open_snn
from nadaptor.evaluation.exported import simulate_exported, write_exported
from nadaptor.evaluation.insight import write_insight
from nadaptor.evaluation.report import measure, measure_ann, write_ann, write_report
from nadaptor.neurons import Coding
from nadaptor.operations import EnergyTable
from nadaptor.parallel.cores import use_every_core

Mode = Literal["snn", "ann"]


@dataclasses.dataclass(frozen=True)
class Report:
    """The conversion report."""

    # Folder for a conversion report as well: a page with the layers' thresholds, rates, errors and
    # occasional noise, energy and pictures, of the first 16 images.
    report: Path | None = None
    # pJ per multiply-accumulate in the report (4.6, of 45 nm and 32 bits).
    mac_energy: float | None = None
    # pJ per synaptic operation in the report (0.9).
    ac_energy: float | None = None

    @property
    def table(self) -> EnergyTable:
        """What an operation takes."""
        given = {"mac": self.mac_energy, "ac": self.ac_energy}
        return EnergyTable(**{name: pj for name, pj in given.items() if pj is not None})


NO_REPORT = Report()


def main(arguments: Sequence[str]) -> None:
    """Reads the command line and simulates.

    Args:
        arguments: the words after the command.

    Raises:
        ValueError: as `nadaptor.training.simulate_checkpoint`, or an option would do nothing.
    """
    use_every_core()
    read_words(
        simulate_command,
        prog=program("simulate"),
        args=list(arguments),
        config=(tyro.conf.OmitArgPrefixes,),
    )


def simulate_command(
    checkpoint: Annotated[Path, tyro.conf.Positional],
    mode: Mode = "snn",
    num_steps: int | None = None,
    split: Literal["validation", "test"] = "validation",
    coding: Coding | None = None,
    correction: CorrectionName = "none",
    correction_steps: int | None = None,
    num_images: int | None = None,
    confidence: float | None = None,
    fast_convolution: bool = False,
    events: bool = False,
    data_dir: Path | None = None,
    dataset: str | None = None,
    insight: Annotated[Report, tyro.conf.arg(name="")] = NO_REPORT,
    out: Path | None = None,
) -> None:
    """Prints accuracy at every time step, spikes and early exit; saves CSV, JSON and a plot.

    Args:
        checkpoint: The folder that nadaptor convert printed, or an artefact of nadaptor export,
            which has its own T, coding and correction.
        mode: Run neurons, or (ann) the quantizers in their place: what that lacks to the trained
            network is lost by the conversion, and not by the dynamics.
        num_steps: T, time steps (32).
        split: Images to read; the test set is for final figures, not for choices.
        coding: How spikes carry a number: by their rate, or by their sum, which ends exactly at the
            quantized network and then falls silent. By default as it was converted.
        correction: How to counter occasional noise at inference.
        correction_steps: Steps of offset spikes (rho) or SRP (tau) before the T counted (4).
        num_images: First images of the split to measure on; by default all.
        confidence: Softmax probability at which an image stops; a second simulation skips the rest.
        fast_convolution: Use Winograd's convolutions: faster on a CPU, and a few spikes may flip.
        events: Multiply spikes alone, in a kernel of C++: faster on a CPU, a few spikes may flip.
        data_dir: Folder of data sets; by default the environment's NADAPTOR_DATA_DIR.
        dataset: Data set for an artefact of your own, whose sidecar names none.
        insight: The conversion report.
        out: Folder for the files; by default "simulation-SPLIT" beside the checkpoint, with "-sum",
            "-CORRECTION" or "-ann" at the end where it applies.
    """
    options: dict[str, object] = {
        "--num-steps": num_steps,
        "--coding": coding,
        "--correction": None if correction == "none" else correction,
        "--correction-steps": correction_steps,
        "--confidence": confidence,
        "--fast-convolution": fast_convolution,
        "--events": events,
        **changed(insight, NO_REPORT, ("report", "mac_energy", "ac_energy")),
    }
    # An artefact is a file, and a converted network a folder.
    if checkpoint.is_file():
        options["--mode"] = None if mode == "snn" else mode
        refuse_idle(options, "with an artefact, which has its own")
        out = _place(out, checkpoint, f"simulation-{split}-exported")
        measured = simulate_exported(checkpoint, split, dataset, data_dir, num_images)
        return write_exported(measured, out)
    refuse_idle({"--dataset": dataset}, "without an artefact of nadaptor export")
    if mode == "ann":
        refuse_idle(options, "with --mode ann, which has no time steps")
        out = _place(out, checkpoint, f"simulation-{split}-ann")
        say("compiling the network")
        return write_ann(measure_ann(open_snn(checkpoint), split, data_dir, num_images), out)
    if insight.report is None:
        refuse_idle(changed(insight, NO_REPORT, ("mac_energy", "ac_energy")), "without --report")
    if correction not in TWO_STAGES:
        refuse_idle({"--correction-steps": correction_steps}, f"with --correction {correction}")
    count = 32 if num_steps is None else check_count(num_steps, "num_steps")
    steps = 4 if correction_steps is None else correction_steps
    snn = open_snn(checkpoint)
    spikes = snn.spikes.override(coding)
    inference = get_inference(correction, steps, *spikes, fast_convolution, events)
    # With sums there is no correction.
    used = "sum" if spikes.coding == "sum" else correction
    ending = "" if used == "none" else f"-{used}"
    out = _place(out, checkpoint, f"simulation-{split}{ending}", insight.report)
    say(f"compiling the simulation of {inference.total_steps(count)} steps")
    measured = measure(snn, count, split, inference, data_dir, num_images, confidence)
    write_report(measured, out)
    if insight.report is not None:
        write_insight(snn, measured, inference, insight.report, data_dir, table=insight.table)


def _place(out: Path | None, checkpoint: Path, name: str, report: Path | None = None) -> Path:
    """The folder for the files, checked before all the work, and made with the first of them."""
    out = checkpoint.parent / name if out is None else out
    for folder in (out, report or out):
        check_place(folder)
    return out
