"""The differences between with and without the adaptor, on numbers whose differences are exact."""

import csv
import dataclasses

import numpy as np
import pytest

from nadaptor.studies.differences import against, differences_of, write_against, write_differences
from nadaptor.studies.study import Study, cells_of

STUDY = Study(
    methods=("lsq", "noise_adaptor", "qcfs"),
    levels=(2,),
    seeds=3,
    corrections=("none",),
    epochs=(1, 8),
    num_steps=2,
)


def measured(cell):
    """An adaptor that gains (seed + 1) / 4 at T = 1 and loses 1/8 at T = 2 in every seed."""
    noisy = cell.network.method == "noise_adaptor"
    short = cell.network.values[0][1] < 8
    seed = cell.seed / 64  # as much in both: a paired difference does not see it
    return {
        "ann": 0.5 + seed,
        "training_accuracy": (0.75 if noisy else 1.0) - (0.5 if short else 0),
        "accuracy": [
            seed + (0.25 * (cell.seed + 1) if noisy else 0),
            0.5 + seed - (0.125 if noisy else 0),
        ],
    }


@pytest.fixture(scope="module")
def cells():
    return {cell: measured(cell) for cell in cells_of(STUDY)}


def test_differences_are_of_one_seed_each_and_their_std_is_over_seeds(cells):
    short, long = differences_of(STUDY, cells)
    assert short.network.values == (("epochs", 1),) and long.network.values == (("epochs", 8),)
    assert short.mean == {"ANN": 0, "T = 1": 50, "T = 2": -12.5}
    assert short.std == {"ANN": 0, "T = 1": 25, "T = 2": 0}
    assert short.training_accuracy == (50, 25) and long.training_accuracy == (100, 75)


def test_a_seed_that_failed_in_one_of_the_two_is_left_out_of_the_difference(cells):
    failed = {
        c: {"failed": "nan"} if c.seed == 2 and c.network.method == "lsq" else m
        for c, m in cells.items()
    }
    found = differences_of(STUDY, failed)[0]
    assert found.seeds == 2 and found.mean["T = 1"] == 37.5


def test_one_seed_has_no_std(cells):
    found = differences_of(dataclasses.replace(STUDY, seeds=1), cells)[0]
    assert found.seeds == 1 and np.isnan(found.std["T = 1"])


def test_a_study_without_both_methods_has_no_difference(tmp_path, cells):
    assert not write_differences(dataclasses.replace(STUDY, methods=("lsq",)), cells, tmp_path)
    assert not any(tmp_path.iterdir())


def test_the_files_say_what_the_differences_are(tmp_path, cells):
    assert write_differences(STUDY, cells, tmp_path)
    rows = list(csv.DictReader((tmp_path / "differences.csv").read_text().splitlines()))
    assert [row["T = 1"] for row in rows] == ["50.00", "50.00"]
    assert rows[0]["T = 1 deviation"] == "25.00"
    assert "+50.00±25.00" in (tmp_path / "differences.md").read_text()
    assert (tmp_path / "differences.png").read_bytes().startswith(b"\x89PNG")


def test_all_networks_are_held_against_one_of_their_own_axis_values(cells):
    found = against(STUDY, cells, "lsq_p2")
    names = [difference.network.name for difference in found]
    assert names == [f"{m}_p2-epochs{e}" for e in (1, 8) for m in ("noise_adaptor", "qcfs")]
    adaptor, qcfs = found[:2]
    assert adaptor == differences_of(STUDY, cells)[0]
    assert adaptor.ahead == {"ANN": 0, "T = 1": 3, "T = 2": 0}
    assert set(qcfs.mean.values()) == {0} and qcfs.training_accuracy == (50, 50)


def test_the_files_against_one_say_in_how_many_seeds_the_others_are_ahead(tmp_path, cells):
    assert write_against(STUDY, cells, "lsq_p2", tmp_path)
    rows = list(csv.DictReader((tmp_path / "against.csv").read_text().splitlines()))
    assert [row["T = 1 seeds ahead"] for row in rows] == ["3", "0", "3", "0"]
    table = (tmp_path / "against.md").read_text()
    assert "+50.00±25.00 (3/3)" in table and "training, lsq_p2" in table


def test_nothing_is_written_against_a_network_that_failed_in_every_seed(tmp_path, cells):
    failed = {c: {"failed": "nan"} if c.network.method == "lsq" else m for c, m in cells.items()}
    assert not write_against(STUDY, failed, "lsq_p2", tmp_path)
    assert not any(tmp_path.iterdir())


def test_a_network_that_a_study_lacks_is_refused_with_those_it_has(cells):
    with pytest.raises(ValueError, match="'lsq_p4' is no network of the study; those are lsq_p2"):
        against(STUDY, cells, "lsq_p4")
    with pytest.raises(ValueError, match="no network but 'lsq_p2'"):
        against(dataclasses.replace(STUDY, methods=("lsq",)), cells, "lsq_p2")
