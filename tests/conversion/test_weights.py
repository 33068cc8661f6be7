"""From a file of weights to a spiking network in one command, with no training."""

import functools
import json

import chex
import jax
import jax.numpy as jnp
import pytest
from safetensors.numpy import save_file

import nadaptor
from nadaptor.checkpoints.checkpoint import load_card, load_checkpoint
from nadaptor.cli import convert, simulate
from nadaptor.configs.inference import Spikes
from nadaptor.conversion import convert as conversion
from nadaptor.conversion.calibrate import CalibrationOptions, calibrate_model
from nadaptor.conversion.convert import class_count, load_spikes
from nadaptor.data.loader import load_images
from nadaptor.data.registry import open_source
from nadaptor.evaluation.report import simulate_checkpoint
from nadaptor.models import create, fold_batch_norm
from nadaptor.training import load_snn

MODEL = {"width": 4}
OPTIONS = ("--model", "digits_resnet8", "--width", 4)


@functools.cache
def network():
    """A network with ReLUs and random weights, whose moments are those of the data."""
    images = jnp.asarray(load_images(open_source("digits", "train", 150)).images[:64])
    model = create("digits_resnet8", 10, **MODEL)
    variables = jax.jit(model.init)(jax.random.key(0), images)
    step = jax.jit(functools.partial(model.apply, train=True, mutable=["batch_stats"]))
    for _ in range(20):
        variables = {**variables, **step(variables, images)[1]}
    return model, jax.device_get(variables), images


@pytest.fixture(scope="module")
def file(tmp_path_factory, torch_layout):
    path = tmp_path_factory.mktemp("weights") / "net.safetensors"
    save_file(torch_layout(network()[1]), path)
    return path


def command(*arguments):
    convert.main([*map(str, arguments)])


def test_a_file_s_thresholds_are_those_of_the_library_on_the_config_s_images(file, tmp_path):
    options = (*OPTIONS, "--calibrate", "percentile", "--num-images", 64, "--out", tmp_path / "snn")
    command("digits_relu", "--init-from", file, *options)
    found, card = load_checkpoint(tmp_path / "snn", "snn")
    _, variables, images = network()
    model = create("digits_resnet8", 10, norm=None, **MODEL)
    rule = CalibrationOptions("percentile")
    wanted = calibrate_model(model, fold_batch_norm(variables), images, rule)
    chex.assert_trees_all_close(found, jax.device_get(wanted), rtol=1e-6)
    assert card["parent"]["file"] == "net.safetensors"
    assert (card["config"]["model"], card["config"]["width"]) == ("digits_resnet8", 4)
    report = simulate_checkpoint(tmp_path / "snn", 2, "test", num_images=20)
    assert report["num_images"] == 20


def test_a_file_is_quantized_with_the_config_s_levels_as_the_library_does_it(file, tmp_path):
    levels = 2
    options = (*OPTIONS, "--num-images", 64, "--out", tmp_path / "snn")
    command("digits_lsq", "--init-from", file, *options)
    model, variables, read = load_snn(tmp_path / "snn")
    relus, before, images = network()
    assert (read.quantizer.activation, read.quantizer.levels) == ("lsq", levels)
    q = nadaptor.quantize(relus.apply, levels)
    scales = jax.jit(q.init)(before, images)
    act = variables["params"]["layer2_0"]["act1"]["quant_scale"]
    assert act == pytest.approx(float(scales["ResNet/layer2_0/act1"]), rel=1e-5)
    wanted = jax.jit(q)(scales, before, images)
    found = jax.jit(model.apply)(variables, images)
    chex.assert_trees_all_close(found, wanted, rtol=1e-3, atol=1e-3)
    card = load_card(tmp_path / "snn", "snn")
    assert card["quantization"] == {"rule": "mmse_relu", "num_images": 64}
    assert all(check["holds"] for check in card["checks"])


@pytest.fixture(scope="module")
def photo(tmp_path_factory, torch_layout):
    """A file of a network with a pool in its stem."""
    path = tmp_path_factory.mktemp("pooled") / "net.safetensors"
    model, one = create("resnet18", 10, width=4), jnp.zeros((1, 8, 8, 1))
    save_file(torch_layout(jax.device_get(jax.jit(model.init)(jax.random.key(0), one))), path)
    return path


KEPT = ("--model", "resnet18", "--width", 4, "--pool", "max", "--num-images", 32)


@pytest.mark.parametrize(
    ("options", "spikes"),
    [
        (("--quantize", 2, "--nonaffine", "running_mean"), Spikes("rate", "running_mean")),
        (("--quantize", 2, "--coding", "sum"), Spikes("sum", "refuse")),
        (("--calibrate", "max", "--nonaffine", "running_mean"), Spikes("rate", "running_mean")),
    ],
)
def test_a_kept_pool_is_in_the_card_and_the_simulation_reads_it(
    photo, tmp_path, monkeypatch, capsys, options, spikes
):
    checked = []
    monkeypatch.setattr(conversion, "check_conversion", lambda *a: checked.append(a[-1]) or [])
    where = ("--init-from", photo, "--out", tmp_path / "snn")
    command("digits_relu", *where, *KEPT, *options)
    assert checked == ([spikes] if "--quantize" in options else [])
    assert load_spikes(tmp_path / "snn") == spikes
    means = spikes.nonaffine == "running_mean"
    assert ("analog, on running means: max_pool" in capsys.readouterr().out) == means
    analog = load_card(tmp_path / "snn", "snn")["analog"]
    assert [s.partition(" at ")[0] for s in analog[:1]] == (["max_pool"] if means else [])
    simulate.main([str(tmp_path / "snn"), "--num-steps", "2", "--num-images", "8"])
    name = "simulation-validation" + ("-sum" if spikes.coding == "sum" else "")
    report = json.loads((tmp_path / name / "report.json").read_text())
    assert (report["coding"], report["nonaffine"]) == spikes


@pytest.mark.parametrize("way", [("--quantize", 2), ("--calibrate", "max")])
def test_a_kept_pool_is_refused_with_both_options_before_anything_is_measured(
    photo, tmp_path, monkeypatch, way
):
    monkeypatch.setattr("nadaptor.conversion.quantized.load_images", None)
    monkeypatch.setattr("nadaptor.conversion.calibrate.load_images", None)
    where = ("--init-from", photo, "--out", tmp_path / "snn")
    with pytest.raises(ValueError, match=r"max_pool.*nonaffine='running_mean'.*coding='sum'"):
        command("digits_relu", *where, *KEPT, *way)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--quantize", 2, "--nonaffine", "running_mean"), "'running_mean' does nothing: all"),
        (("--calibrate", "max", "--coding", "sum"), "sums count levels; use --quantize P"),
        (("--quantize", 2, "--pool", "max"), "digits_resnet8 has no pool"),
    ],
)
def test_a_coding_that_does_not_fit_is_refused(file, tmp_path, arguments, words):
    where = ("--init-from", file, "--out", tmp_path / "snn")
    with pytest.raises(ValueError, match=words):
        command("digits_relu", *where, *OPTIONS, *arguments)


def test_sums_are_refused_where_there_are_no_levels(runs, tmp_path):
    command(runs / "digits_relu" / "checkpoint", "--calibrate", "max", "--out", tmp_path / "snn")
    with pytest.raises(ValueError, match="clipped ReLUs have none: quantize the network"):
        simulate.main([str(tmp_path / "snn"), "--coding", "sum"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("digits_relu",), "digits_relu is of full precision, and nothing would spike; add"),
        (("digits_lsq", "--calibrate", "max"), "digits_lsq is trained with 'lsq'"),
        (("digits_relu", "--calibrate", "max", "--quantize", 2), "two ways to convert; choose one"),
        (("digits_qcfs", "--quantize", 2), "digits_qcfs quantizes with 'qcfs', whose thresholds"),
        (("digits_relu", "--quantize", 0), "levels must be a positive int such as 2, not 0"),
        (("digits_rel", "--quantize", 2), "unknown config 'digits_rel'; did you mean"),
    ],
)
def test_what_a_file_cannot_become_is_refused(file, tmp_path, arguments, words):
    with pytest.raises(ValueError, match=words):
        command(*arguments, "--init-from", file, *OPTIONS, "--out", tmp_path / "snn")
    assert not list(tmp_path.iterdir())


def test_a_file_of_another_network_is_refused(file, tmp_path):
    with pytest.raises(ValueError, match="the weights do not fit the network"):
        command("digits_relu", "--init-from", file, "--quantize", 2, "--out", tmp_path / "snn")
    assert not list(tmp_path.iterdir())


def test_a_file_of_other_classes_is_refused_with_what_a_command_can_do(tmp_path, torch_layout):
    arrays = torch_layout(network()[1])
    arrays |= {name: x[:7] for name, x in arrays.items() if name.startswith("fc")}
    save_file(arrays, tmp_path / "net.safetensors")
    with pytest.raises(ValueError, match="of 7 classes, and data set digits has 10: convert with"):
        command("digits_relu", "--init-from", tmp_path / "net.safetensors", *OPTIONS,
                "--quantize", 2, "--out", tmp_path / "snn")  # fmt: skip


def test_a_trained_network_is_quantized_and_a_quantized_one_is_not(runs, tmp_path):
    source = runs / "digits_relu" / "checkpoint"
    command(source, "--quantize", 4, "--out", tmp_path / "snn")
    card = load_card(tmp_path / "snn", "snn")
    assert card["source"] == json.loads((source / "card.json").read_text())["card_digest"]
    report = simulate_checkpoint(tmp_path / "snn", 8, "validation")
    assert report["ann_deterministic"] > 0.9
    with pytest.raises(ValueError, match="scales of its own; convert it without --quantize"):
        command(runs / "digits_na" / "checkpoint", "--quantize", 4, "--out", tmp_path / "x")


@pytest.mark.parametrize(
    "name", ["resnet18", "vgg11_bn", "cifar_vgg11", "mobilenet_v2", "cifar_vit"]
)
def test_the_classes_of_every_network_are_read_from_its_last_layer(name):
    model = create(name, 7, **({"hidden": 8} if "vgg" in name else {}))
    one = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), one)
    sizes = jax.tree.map(lambda x: range(x.shape[0]), shapes)
    assert class_count(sizes) == 7
