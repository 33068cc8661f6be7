"""The conversion report: what it says is what the network holds and what was counted."""

import csv
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nadaptor.configs.config import replace
from nadaptor.configs.inference import PLAIN, RATES
from nadaptor.configs.named import get_config
from nadaptor.conversion.calibrate import CalibrationOptions, convert_calibrated
from nadaptor.conversion.convert import Converted, open_snn
from nadaptor.evaluation import insight
from nadaptor.evaluation.insight import report_conversion, write_insight
from nadaptor.evaluation.insight_rows import accuracy_rows
from nadaptor.evaluation.report import measure, measure_ann
from nadaptor.models.threshold_activations import Ttrbr

T = 3


@pytest.fixture(scope="module")
def reported(runs, tmp_path_factory):
    """A calibrated network, and the folder of its report."""
    folder = tmp_path_factory.mktemp("report")
    source = next(runs.glob("digits_relu*/checkpoint"))
    convert_calibrated(source, folder / "snn", CalibrationOptions("percentile", num_images=16))
    report_conversion(source, folder / "snn", folder / "out", num_steps=T, num_images=20)
    return open_snn(folder / "snn"), folder / "out"


def test_thresholds_of_a_calibrated_network_are_those_that_were_measured(reported):
    snn, out = reported
    layers = json.loads((out / "conversion.json").read_text())["layers"]
    params = snn.variables["params"]
    assert len(layers) == 7
    for name, layer in layers.items():
        place = params
        for part in name.split("/")[1:]:
            place = place[part]
        assert layer["threshold"] == pytest.approx(float(place["threshold"]), rel=1e-6)
        assert layer["levels"] is None


class OneLayer(nn.Module):
    levels: int

    @nn.compact
    def __call__(self, x):
        return nn.Dense(10)(Ttrbr(levels=self.levels, name="act1")(x).reshape(x.shape[0], -1))


def test_the_levels_of_a_report_are_those_of_the_network_also_where_studies_fix_them(
    tmp_path, monkeypatch
):
    for pictures in ("_pictures", "_trains"):  # which take longer than all the rest
        monkeypatch.setattr(insight, pictures, lambda *_: {})
    model = OneLayer(levels=2)
    variables = model.init(jax.random.key(0), jnp.ones((1, 8, 8, 1)))
    config = replace(get_config("digits_ttrbr"), levels=2)
    measured = {
        "config": {"name": "made_up"},
        "split": "validation",
        "num_images": 4,
        "num_steps": T,
        "coding": "rate",
        "accuracy": [0.5] * T,
        "ann_deterministic": 0.5,
        "early_exit": [],
    }
    snn = Converted(model, variables, config, RATES, {})
    write_insight(snn, measured, PLAIN, tmp_path, num_images=4)
    layers = json.loads((tmp_path / "conversion.json").read_text())["layers"]
    assert [layer["levels"] for layer in layers.values()] == [2]


def test_energy_of_the_layers_adds_up_at_every_step(reported):
    _, out = reported
    told = json.loads((out / "conversion.json").read_text())
    rows = list(csv.DictReader((out / "energy.csv").read_text().splitlines()))
    assert [row["t"] for row in rows] == ["1", "2", "3"]
    for t, row in enumerate(rows):
        spent = {name: float(value) for name, value in row.items() if name != "t"}
        total = spent.pop("total")
        assert total == pytest.approx(sum(spent.values()))
        assert total * told["num_images"] == pytest.approx(told["energy"]["total"]["energy"][t])
    assert told["pj_per_operation"] == {"mac": 4.6, "ac": 0.9}


def test_errors_of_a_calibrated_network_are_against_its_clipped_activations(reported):
    _, out = reported
    layers = json.loads((out / "conversion.json").read_text())["layers"]
    first = next(iter(layers.values()))
    # With a constant current and a start of half a threshold the count is off by half at most, and
    # a rounding to one level would be off by as much for activations in between.
    assert 0 < first["error"][-1] <= 0.5 / T
    assert first["error"][-1] < first["error"][0]


def test_the_page_parts_what_the_conversion_lost_from_what_the_dynamics_did(reported):
    page = (reported[1] / "report.html").read_text()
    for words in ("as it was trained", "converted, with quantizers", f"spiking, after {T} steps"):
        assert words in page
    assert "Energy of an image over time" in page


def test_each_accuracy_stands_with_what_was_lost_since_the_last():
    measured = {"ann_trained": 0.9, "ann_deterministic": 0.8, "accuracy": [0.1, 0.75]}
    rows = accuracy_rows({**measured, "num_steps": 2})
    assert [row["accuracy"] for row in rows] == ["90.00 %", "80.00 %", "75.00 %"]
    assert [row["lost"] for row in rows] == ["", "10.00 %", "5.00 %"]


def test_the_ann_mode_has_the_quantized_accuracy_of_the_simulation(runs):
    snn = open_snn(runs / "digits_na" / "snn")
    whole = measure(snn, 1, "validation", num_images=20)
    ann = measure_ann(snn, "validation", num_images=20)
    assert {name: whole[name] for name in ann} == ann
    assert np.isclose(ann["ann_deterministic"] * 20, round(ann["ann_deterministic"] * 20))
