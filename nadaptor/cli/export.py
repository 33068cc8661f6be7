"""`nadaptor export CHECKPOINT`: writes a converted network for what runs without this library."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from nadaptor.cli.command import program, read_words, refuse_idle
from nadaptor.configs.inference import TWO_STAGES, CorrectionName, get_inference
from nadaptor.conversion.convert import load_spikes
from nadaptor.conversion.export import Form, export_checkpoint
from nadaptor.neurons import Coding


def main(arguments: Sequence[str]) -> None:
    """Reads the command line and exports.

    Args:
        arguments: the words after the command.

    Raises:
        ValueError: as `export_checkpoint`, or an option would do nothing.
    """
    read_words(export_command, prog=program("export"), args=list(arguments))


def export_command(
    checkpoint: Annotated[Path, tyro.conf.Positional],
    form: Form = "jax",
    num_steps: int | None = None,
    coding: Coding | None = None,
    correction: CorrectionName = "none",
    correction_steps: int | None = None,
    batch_size: int | None = None,
    data_dir: Path | None = None,
    out: Path | None = None,
) -> None:
    """Writes a spiking network as one file, from images to outputs at every time step.

    Args:
        checkpoint: The folder that nadaptor convert printed.
        form: What to write: the whole simulation as an artefact of jax.export for CPU, GPU and TPU,
            which nadaptor simulate reads; the same as an ONNX model; or weights, biases and
            thresholds by name as safetensors.
        num_steps: T, time steps in the artefact or model (32).
        coding: How spikes carry a number; by default as the network was converted.
        correction: How to counter occasional noise at inference.
        correction_steps: Steps of offset spikes (rho) or SRP (tau) before the T counted (4).
        batch_size: Images that an ONNX model takes at once (1); an artefact takes any number.
        data_dir: Folder of an image folder's images; by default NADAPTOR_DATA_DIR.
        out: File to write; by default "snn.jax", "snn.onnx" or "snn.safetensors" beside the
            checkpoint.
    """
    if form != "onnx":
        refuse_idle({"--batch-size": batch_size}, "without --form onnx")
    if form == "safetensors":
        # Weights are neither unrolled nor run.
        options = dict(num_steps=num_steps, coding=coding, correction=correction)
        given = {"num_steps": None, "coding": None, "correction": "none"}
        names = {f"--{n.replace('_', '-')}": v for n, v in options.items() if v != given[n]}
        refuse_idle(names, "without --form jax or onnx")
    if correction not in TWO_STAGES:
        refuse_idle({"--correction-steps": correction_steps}, f"with --correction {correction}")
    stage = 4 if correction_steps is None else correction_steps
    inference = get_inference(correction, stage, *load_spikes(checkpoint).override(coding))
    steps = 32 if num_steps is None else num_steps
    size = 1 if batch_size is None else batch_size
    out = checkpoint.parent / f"{checkpoint.name}.{form}" if out is None else out
    export_checkpoint(checkpoint, out, form, steps, inference, data_dir, size)
