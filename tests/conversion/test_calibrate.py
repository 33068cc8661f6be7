"""Full-precision ResNets as spiking networks without training, on digits."""

import functools
import json
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import nadaptor
from nadaptor.checkpoints.checkpoint import load_card, load_checkpoint, save_checkpoint
from nadaptor.cli import convert, simulate
from nadaptor.configs.build import build_model
from nadaptor.configs.config import replace, to_json
from nadaptor.configs.inference import TWO_STAGES, get_inference
from nadaptor.configs.named import get_config
from nadaptor.conversion.calibrate import (
    CalibrationOptions,
    calibrate_model,
    convert_calibrated,
)
from nadaptor.data import codec, image_folder
from nadaptor.data.loader import load_images
from nadaptor.data.registry import open_source, open_split
from nadaptor.evaluation.accuracy import ann_accuracy
from nadaptor.models import ClippedRelu, create, fold_batch_norm, is_scale
from nadaptor.training import load_snn, simulate_checkpoint
from nadaptor.training.finetuning import digits_na_finetuned, fine_tune

pytestmark = pytest.mark.usefixtures("optimized")


@pytest.fixture(scope="module")
def source(runs):
    return runs / "digits_relu" / "checkpoint"


def test_a_full_precision_network_converts_and_comes_near_its_accuracy(source, tmp_path):
    convert_calibrated(source, tmp_path / "snn", CalibrationOptions("max"))
    report = simulate_checkpoint(tmp_path / "snn", 64, "validation")
    variables, _ = load_checkpoint(source, "ann")
    config = load_snn(tmp_path / "snn")[2]
    relu = create(config.network.model, 10)
    images = open_source("digits", "validation", config.data.validation_size)
    ann = ann_accuracy(relu, variables, images)
    assert abs(report["accuracy"][-1] - ann) <= 0.03
    assert report["ann_noisy"] is None


@pytest.mark.parametrize("options", [CalibrationOptions("mmse", biases=True, num_steps=4)])
def test_thresholds_and_biases_are_written_where_the_network_reads_them(source, options):
    variables, _ = load_checkpoint(source, "ann")
    folded = fold_batch_norm(variables)
    model = create("digits_resnet8", 10, norm=None)
    images = load_images(open_source("digits", "train", 150)).images[:32]
    found = calibrate_model(model, folded, images, options)["params"]
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(found)]
    assert sum(map(is_scale, paths)) == 7
    block = {k: v for k, v in found["layer2_0"].items() if not k.startswith("act")}
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), folded["params"]["layer2_0"], block)
    assert moved["conv1"] == {"kernel": False, "bias": True}
    assert moved["downsample"] == {"kernel": False, "bias": False}


def test_calibrated_biases_help_a_network_of_few_steps(source):
    variables, _ = load_checkpoint(source, "ann")
    folded, model = fold_batch_norm(variables), create("digits_resnet8", 10, norm=None)
    images = load_images(open_source("digits", "train", 150)).images
    wanted = jax.jit(model.apply)(folded, images[64:128])
    clipped = model.clone(activation=ClippedRelu)

    def error(biases):
        options = CalibrationOptions("percentile", biases=biases, num_steps=4)
        found = calibrate_model(model, folded, images[:64], options)
        run = jax.jit(functools.partial(nadaptor.simulate, clipped.apply, num_steps=4))
        return float(jnp.abs(run(found, images[64:128]).outputs[-1] - wanted).mean())

    assert error(True) < error(False)


def test_more_images_than_the_memory_holds_are_refused_before_they_are_computed(monkeypatch):
    model = create("digits_resnet8", 10, norm=None)
    images = np.zeros((4, 8, 8, 1), np.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    variables = jax.tree.map(lambda x: jnp.ones(x.shape), variables)
    free = "nadaptor.conversion.calibrate.free_bytes"
    monkeypatch.setattr(free, lambda: 1000)
    with pytest.raises(ValueError, match=r"on 4 images takes .* fewer images, with --num-images"):
        calibrate_model(model, variables, images, CalibrationOptions("max"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A checkpoint of random weights, whose config has every data field that can differ."""
    made = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for path in (made / "images" / split / name for split in ("train", "val") for name in "ab"):
        path.mkdir(parents=True)
        for i in range(20):
            Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(path / f"{i}.png")
    config = replace(
        get_config("digits_relu"),
        dataset="folder",
        validation_size=4,
        train_size=30,
        image_size=8,
        model="digits_resnet8",
        width=4,
    )
    model = build_model(config, num_classes=2)
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
    data = open_split(config.data, "train", made / "images").identity
    save_checkpoint(
        made / "relu", "ann", variables, {"config": to_json(config), "data": dict(data)}
    )
    return made, config, variables


def command(main, *arguments):
    """Runs a command's main function, as its line does."""
    main([*map(str, arguments)])


def test_the_command_s_thresholds_are_the_library_s_on_the_config_s_own_images(
    pictures, tmp_path, monkeypatch
):
    made, config, variables = pictures
    decoded = []
    monkeypatch.setattr(
        image_folder, "decode", lambda data, name: decoded.append(name) or codec.decode(data, name)
    )
    monkeypatch.delenv("NADAPTOR_DATA_DIR", raising=False)
    options = ("--calibrate", "percentile", "--num-images", "24", "--data-dir", made / "images")
    command(convert.main, made / "relu", *options, "--out", tmp_path / "snn")
    assert len(decoded) == 24
    found, card = load_checkpoint(tmp_path / "snn", "snn")
    images = load_images(open_split(config.data, "train", made / "images", limit=24)).images
    assert images.shape == (24, 8, 8, 3)
    model = build_model(config, num_classes=2, folded=True)
    rule = CalibrationOptions("percentile")
    wanted = calibrate_model(model, fold_batch_norm(variables), images, rule)
    chex.assert_trees_all_close(found, jax.device_get(wanted), rtol=1e-6)
    assert card["calibration"]["num_images"] == 24
    command(
        convert.main,
        made / "relu",
        "--calibrate",
        "max",
        "--num-images",
        "1000",
        "--data-dir",
        made / "images",
        "--out",
        tmp_path / "all",
    )
    assert load_card(tmp_path / "all", "snn")["calibration"]["num_images"] == 30


@pytest.mark.parametrize("correction", ["none", "negative-spikes", "offset-spikes", "srp"])
def test_simulate_runs_each_correction_and_counts_its_steps(source, tmp_path, correction):
    convert_calibrated(source, tmp_path / "snn", CalibrationOptions("max"))
    options = ("--num-steps", 3, "--num-images", 20, "--correction", correction)
    steps = ("--correction-steps", 2) if correction in TWO_STAGES else ()
    command(simulate.main, tmp_path / "snn", *options, *steps)
    name = "simulation-validation" + ("" if correction == "none" else f"-{correction}")
    report = json.loads((tmp_path / name / "report.json").read_text())
    assert report["total_steps"] == 3 + (2 if correction in ("offset-spikes", "srp") else 0)
    assert (len(report["accuracy"]), report["num_images"]) == (3, 20)
    model, variables, config = load_snn(tmp_path / "snn")
    images, labels = load_images(open_split(config.data, "validation", limit=20))
    inference = get_inference(correction, 2)
    run = functools.partial(
        nadaptor.simulate,
        model.apply,
        num_steps=3,
        neuron=inference.neuron,
        correction=inference.correction,
    )
    right = jax.jit(lambda v, x: run(v, x).outputs)(variables, images).argmax(-1) == labels
    assert report["accuracy"] == pytest.approx(np.asarray(right).mean(1), abs=0.051)


def test_a_network_is_not_simulated_on_other_classes_than_its_own(pictures, tmp_path):
    made, _, _ = pictures
    shutil.copytree(made / "images", tmp_path / "images")
    convert_calibrated(made / "relu", tmp_path / "snn", CalibrationOptions("max"), made / "images")
    simulate_checkpoint(tmp_path / "snn", 1, "test", data_dir=tmp_path / "images")
    for split in ("train", "val"):
        (tmp_path / "images" / split / "a").rename(tmp_path / "images" / split / "c")
    for call in (
        lambda data: simulate_checkpoint(tmp_path / "snn", 1, "test", data_dir=data),
        lambda data: fine_tune(tmp_path / "snn", tmp_path / "x", digits_na_finetuned(), data),
        lambda data: convert_calibrated(
            made / "relu", tmp_path / "x", CalibrationOptions("max"), data
        ),
    ):
        with pytest.raises(ValueError, match="class 0 of data set folder is 'b', and was 'a' when"):
            call(tmp_path / "images")


def test_a_quantized_network_is_refused(runs, tmp_path):
    quantized = runs / "digits_na" / "checkpoint"
    with pytest.raises(ValueError, match="without --calibrate"):
        convert_calibrated(quantized, tmp_path / "snn", CalibrationOptions("max"))
