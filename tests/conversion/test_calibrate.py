"""Full-precision ResNets as spiking networks without training, on digits."""

import functools

import jax
import jax.numpy as jnp
import pytest

import nadaptor
from nadaptor.checkpoints.checkpoint import load_checkpoint
from nadaptor.conversion.calibrate import (
    CalibrationOptions,
    calibrate_resnet,
    convert_calibrated,
)
from nadaptor.data.registry import load_split
from nadaptor.evaluation.accuracy import ann_accuracy
from nadaptor.models import ClippedRelu, create, fold_batch_norm, is_scale
from nadaptor.training import load_snn, simulate_checkpoint

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(scope="module")
def source(runs):
    return runs / "digits_relu" / "checkpoint"


def test_a_full_precision_network_converts_and_comes_near_its_accuracy(source, tmp_path):
    convert_calibrated(source, tmp_path / "snn", CalibrationOptions("max"))
    report = simulate_checkpoint(tmp_path / "snn", 64, "validation")
    variables, _ = load_checkpoint(source, "ann")
    config = load_snn(tmp_path / "snn")[2]
    relu = create(config.network.model, 10)
    images = load_split("digits", "validation", config.data.validation_size)
    ann = ann_accuracy(relu, variables, images)
    assert abs(report["accuracy"][-1] - ann) <= 0.03
    assert report["ann_noisy"] is None


@pytest.mark.parametrize("options", [CalibrationOptions("mmse", biases=True, num_steps=4)])
def test_thresholds_and_biases_are_written_where_the_network_reads_them(source, options):
    variables, _ = load_checkpoint(source, "ann")
    folded = fold_batch_norm(variables)
    model = create("digits_resnet8", 10, norm=None)
    images = load_split("digits", "train", 150).images[:32]
    found = calibrate_resnet(model, folded, images, options)["params"]
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(found)]
    assert sum(map(is_scale, paths)) == 7
    block = {k: v for k, v in found["layer2_0"].items() if not k.startswith("act")}
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), folded["params"]["layer2_0"], block)
    assert moved["conv1"] == {"kernel": False, "bias": True}
    assert moved["downsample"] == {"kernel": False, "bias": False}


def test_calibrated_biases_help_a_network_of_few_steps(source):
    variables, _ = load_checkpoint(source, "ann")
    folded, model = fold_batch_norm(variables), create("digits_resnet8", 10, norm=None)
    images = load_split("digits", "train", 150).images
    wanted = model.apply(folded, images[64:128])
    clipped = model.clone(activation=ClippedRelu)

    def error(biases):
        options = CalibrationOptions("percentile", biases=biases, num_steps=4)
        found = calibrate_resnet(model, folded, images[:64], options)
        run = jax.jit(functools.partial(nadaptor.simulate, clipped.apply, num_steps=4))
        return float(jnp.abs(run(found, images[64:128]).outputs[-1] - wanted).mean())

    assert error(True) < error(False)


def test_a_quantized_network_is_refused(runs, tmp_path):
    quantized = runs / "digits_na" / "checkpoint"
    with pytest.raises(ValueError, match="without --calibrate"):
        convert_calibrated(quantized, tmp_path / "snn", CalibrationOptions("max"))
