"""The whole chain for one config: trained, converted and simulated, where it is not there yet."""

from pathlib import Path
from typing import Any

from nadaptor._files import hold
from nadaptor.checkpoints.checkpoint import load_card
from nadaptor.configs.config import Config
from nadaptor.configs.inference import PLAIN, Inference
from nadaptor.conversion.convert import convert, load_snn
from nadaptor.data.registry import open_split
from nadaptor.evaluation.accuracy import ann_accuracy
from nadaptor.evaluation.report import SplitToMeasure, simulate_checkpoint
from nadaptor.training.loop import train
from nadaptor.training.options import DEFAULT, Options

# More training images than a small set has; of a large one, enough to see whether it is fitted.
TRAINING_IMAGES = 5000


def measure(
    config: Config,
    workdir: Path,
    options: Options = DEFAULT,
    *,
    num_steps: int,
    split: SplitToMeasure = "validation",
    inference: Inference = PLAIN,
    num_images: int | None = None,
) -> dict[str, Any]:
    """Trains and converts a network where that is still to be done, and simulates it.

    Args:
        config: the run.
        workdir: folder of runs; the trained network is `NAME/checkpoint` in it, and the spiking
            one `NAME/snn`.
        options: where to read and run, and the file of weights to start from.
        num_steps: T.
        split: images to measure on; the test set is for final figures, not for choices.
        inference: the neuron and the correction.
        num_images: the first images of the split to measure on; None for all.

    Returns:
        The report of `nadaptor.training.simulate_checkpoint`, and `training_accuracy`, a fraction
        of the first 5,000 training images as they are stored, noise off: whether the training set
        is fitted.

    Raises:
        ValueError: as `train`, `convert_once` and `simulate_checkpoint`.
        RunError: training or the conversion failed.
    """
    checkpoint = train(config, workdir, options)
    snn = convert_once(checkpoint, options.data_dir)
    report = simulate_checkpoint(
        snn, num_steps, split, inference, data_dir=options.data_dir, num_images=num_images
    )
    model, variables, trained = load_snn(snn)
    images = open_split(trained.data, "train", options.data_dir, TRAINING_IMAGES)
    return {**report, "training_accuracy": ann_accuracy(model, variables, images)}


def convert_once(checkpoint: Path, data_dir: Path | None = None) -> Path:
    """Converts a trained network where that is still to be done.

    Args:
        checkpoint: folder of the trained network.
        data_dir: folder of data sets; None for the environment's NADAPTOR_DATA_DIR.

    Returns:
        The folder of the spiking network, `snn` beside the checkpoint.

    Raises:
        ValueError: as `convert`, or what is there was converted from another checkpoint.
        RunError: a check of the conversion fails, or another program is at the same run.
    """
    snn = checkpoint.parent / "snn"
    # Asked under the lock of the run: another process may have just converted it.
    with hold(checkpoint.parent):
        if not snn.exists():
            convert(checkpoint, snn, data_dir=data_dir)
    # A network that was trained anew has figures of its own.
    if load_card(snn, "snn").get("source") != load_card(checkpoint, "ann")["card_digest"]:
        raise ValueError(f"{snn} was not converted from {checkpoint}; remove {snn}")
    return snn
