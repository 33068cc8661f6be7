import functools
import os

import chex
import jax
import numpy as np
import pytest

import nadaptor
from nadaptor.configs.build import build_model
from nadaptor.configs.inference import get_inference
from nadaptor.conversion.convert import build_folded
from nadaptor.data.loader import load_images
from nadaptor.data.registry import open_source
from nadaptor.data.source import TOGETHER
from nadaptor.evaluation import accuracy
from nadaptor.evaluation.accuracy import ann_accuracy, exit_accuracy, snn_accuracy
from nadaptor.reports.plots import Curve, plot_accuracy
from nadaptor.training import load_snn, simulate_checkpoint, write_report

pytestmark = pytest.mark.usefixtures("optimized")


@pytest.fixture(scope="module")
def snn(runs):
    return load_snn(runs / "digits_na" / "snn")


@pytest.fixture(scope="module")
def source():
    # One full batch, and one that is padded.
    return open_source("digits", "validation", 150)._replace(size=TOGETHER + 5)


@pytest.fixture(scope="module")
def split(source):
    return load_images(source)


def test_the_accuracy_is_the_fraction_of_right_predictions_padding_or_not(snn, source, split):
    model, variables, _ = snn
    predictions = jax.jit(model.apply)(variables, split.images).argmax(-1)
    right = np.asarray(predictions) == split.labels
    assert ann_accuracy(model, variables, source) == pytest.approx(right.mean())


def test_the_spiking_accuracy_is_that_of_a_direct_simulation_at_every_step(snn, source, split):
    model, variables, _ = snn
    report = snn_accuracy(model, variables, source, num_steps=3)
    sim = jax.jit(lambda v, x: nadaptor.simulate(model.apply, v, x, num_steps=3)[:2])(
        variables, split.images
    )
    direct = (sim[0].argmax(-1) == split.labels).mean(1)
    chex.assert_trees_all_close(np.array(report.accuracy), np.array(direct), atol=0.011)
    means = [float(counts.mean()) for counts in sim[1]]
    chex.assert_trees_all_close(list(report.spikes_per_neuron.values()), means, rtol=0.01)
    assert list(report.spikes_per_neuron)[:2] == ["ResNet/act1", "ResNet/layer1_0/act1"]


def test_more_steps_or_chunks_do_not_change_the_earlier_ones(snn, source):
    model, variables, _ = snn
    short = snn_accuracy(model, variables, source, num_steps=2).accuracy
    long = snn_accuracy(model, variables, source, num_steps=5, steps_per_chunk=2).accuracy
    chex.assert_trees_all_close(short, long[:2], atol=0.011)


def test_noise_is_on_where_a_key_is_given_and_the_layers_have_it(snn, source):
    model, variables, config = snn
    noisy = build_model(config, folded=True)
    quiet = ann_accuracy(model, variables, source)
    assert ann_accuracy(noisy, variables, source) == quiet
    assert ann_accuracy(build_folded(config), variables, source, jax.random.key(0)) == quiet
    draws = {ann_accuracy(noisy, variables, source, jax.random.key(i)) for i in range(4)}
    assert len(draws) > 1


def test_images_are_read_a_batch_at_a_time(snn, source):
    """Never more than a few batches ahead: memory is flat in the number of images."""
    model, variables, _ = snn
    read, most, done = 0, 0, 0

    def note(index):
        nonlocal read, most
        read += 1
        most = max(most, read - done)
        return source.read(index % source.size)

    def simulated(*args, **kwargs):
        nonlocal done
        done += len(args[2])
        return np.ones(1), np.ones(7), np.ones((2, 0)), None

    endless = source._replace(size=20 * TOGETHER, read=note, resident=None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(accuracy, "_simulate_batch", simulated)
        patch.setattr(os, "cpu_count", lambda: 2)
        patch.setattr(jax, "local_device_count", lambda: 1)
        assert snn_accuracy(model, variables, endless, 1).accuracy == [20 / endless.size]
    assert read == endless.size
    # The batch in use, and two per thread.
    assert most <= 6 * TOGETHER


def test_the_report_is_what_its_files_hold(runs, tmp_path, capsys):
    report = simulate_checkpoint(runs / "digits_na" / "snn", 3, "validation")
    write_report(report, tmp_path / "out")
    rows = (tmp_path / "out" / "accuracy.csv").read_text().splitlines()
    assert rows == ["t,accuracy", *(f"{t + 1},{a}" for t, a in enumerate(report["accuracy"]))]
    assert (tmp_path / "out" / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "out" / "report.json").exists()
    printed = capsys.readouterr().out
    assert f"T = 3 {100 * report['accuracy'][2]:.2f} %" in printed
    assert report["num_images"] == 150
    assert report["split"] == "validation"


@pytest.mark.parametrize("num_steps", [0, -1, 1.5])
def test_a_number_of_steps_below_one_is_refused(runs, num_steps):
    with pytest.raises(ValueError, match=f"num_steps must be a positive int, not {num_steps}"):
        simulate_checkpoint(runs / "digits_na" / "snn", num_steps, "validation")


def test_the_same_curves_draw_the_same_file(tmp_path):
    curves = [Curve("a", [0.5, 0.75], [0.0, 0.1])]
    for name in ("a.png", "b.png"):
        plot_accuracy(curves, "accuracy, %", tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_with_sum_coding_a_settled_network_has_the_accuracy_of_the_quantized_one(snn, source):
    model, variables, _ = snn
    inference = get_inference("none", coding="sum")
    report = snn_accuracy(model, variables, source, num_steps=24, inference=inference)
    assert report.settled is not None and report.settled < 24
    assert report.accuracy[-1] == pytest.approx(ann_accuracy(model, variables, source))


def test_images_that_stop_have_the_accuracy_and_steps_of_the_whole_simulation(snn, source):
    model, variables, _ = snn
    (row,) = snn_accuracy(model, variables, source, 8, confidences=(0.9,)).early_exit
    found = exit_accuracy(model, variables, source, 8, 0.9)
    assert found.accuracy == pytest.approx(row["accuracy"], abs=0.011)
    assert found.mean_steps == pytest.approx(row["mean_steps"], abs=0.05)
    assert 1 < found.mean_steps < 8
    with pytest.raises(ValueError, match="confidence must be above 0 and at most 1, not 90"):
        exit_accuracy(model, variables, source, 8, 90)


@pytest.mark.parametrize("evaluate", [snn_accuracy, functools.partial(exit_accuracy, confidence=1)])
def test_a_simulation_is_run_as_its_inference_says(snn, source, monkeypatch, evaluate):
    model, variables, _ = snn
    asked = []

    def simulated(f, variables, images, **options):
        asked.append(options)
        raise InterruptedError

    for name in ("simulate", "simulate_with_early_exit"):
        monkeypatch.setattr(accuracy, name, simulated)
    inference = get_inference("srp", 3, fast_convolution=True)._replace(events=True)
    with pytest.raises(InterruptedError):
        evaluate(model, variables, source, num_steps=2, inference=inference)
    assert asked[0]["fast_convolution"] is True and asked[0]["events"] is True
    assert asked[0]["correction"] == nadaptor.Srp(3)
    assert len(asked[0]["devices"]) == jax.local_device_count()


@pytest.mark.parametrize(
    ("side", "images"), [(8, 128), (32, 128), (112, 128), (160, 62), (224, 32), (4000, 1)]
)
def test_a_batch_of_large_images_has_fewer_of_them(source, monkeypatch, side, images):
    spec = source.spec._replace(image_shape=(side, side, 3))
    large = source._replace(spec=spec, size=100_000, read=None, resident=None)
    asked = []

    def batches(source, size, **options):
        asked.append(size)
        raise InterruptedError

    monkeypatch.setattr(accuracy, "evaluation_batches", batches)
    with pytest.raises(InterruptedError):
        ann_accuracy(None, {}, large)
    assert asked == [images]


def test_corrections_of_rates_are_refused_with_sum_coding():
    with pytest.raises(ValueError, match="srp corrects rates"):
        get_inference("srp", coding="sum")
