"""The study: its cells, its resumption, and figures that are those of the runs."""

import csv
import dataclasses
import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from nadaptor.cli import study as command
from nadaptor.configs.config import check_config
from nadaptor.configs.inference import CORRECTIONS, get_inference
from nadaptor.configs.named import parent_of
from nadaptor.data.registry import open_source, open_split
from nadaptor.errors import OutOfTimeError, PassingError, RunError
from nadaptor.evaluation.accuracy import ann_accuracy, snn_accuracy
from nadaptor.studies import study as grid
from nadaptor.studies.named import STUDIES
from nadaptor.studies.study import Study, cells_of, config_of, run_study
from nadaptor.studies.table import write_study
from nadaptor.training import load_snn, options
from nadaptor.training.options import Options

pytestmark = pytest.mark.usefixtures("optimized")

STUDY = Study(
    methods=("lsq",),
    levels=(2,),
    seeds=1,
    corrections=("none", "srp"),
    model=("digits_resnet8",),
    epochs=(1,),
    num_steps=5,
    correction_steps=3,
)

NAME = "lsq_p2-digits_resnet8-epochs1"


@pytest.fixture(scope="module")
def done(runs, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("study")
    shutil.copytree(runs / "digits_relu", workdir / "seed0-digits_resnet8" / "digits_relu")
    return workdir, run_study(STUDY, workdir)


def test_a_study_has_a_cell_for_every_combination_and_one_network_where_p_is_fixed():
    cells = list(cells_of(Study(seeds=2)))
    assert len(cells) == len(set(cells)) == (4 * 3 + 2) * 4 * 2


def test_each_cell_is_a_simulation_of_its_network(done):
    workdir, cells = done
    cell = next(c for c in cells if c.correction == "srp")
    snn = load_snn(workdir / cell.folder / cell.network.name / "snn")
    images = open_source("digits", "validation", 150)
    expected = snn_accuracy(*snn[:2], images, 5, inference=get_inference("srp", 3))
    assert cells[cell]["accuracy"] == expected.accuracy
    assert cells[cell]["total_steps"] == 8


def test_the_command_measures_the_cells_that_are_missing_and_writes_the_grid(tmp_path, monkeypatch):
    figures, measured = made_up(STUDY), []

    def measure(cell, study, folder, options):
        assert study == STUDY
        measured.append(cell)
        return {name: value for name, value in figures[cell].items() if name != "made"}

    monkeypatch.setattr(grid, "_measure", measure)
    words = "--methods lsq --levels 2 --seeds 1 --corrections none srp --model digits_resnet8"
    sizes = "--epochs 1 --num-steps 5 --correction-steps 3"
    folders = ["--workdir", str(tmp_path), "--out", str(tmp_path / "out")]
    for _ in range(2):
        command.main(["digits", *words.split(), *sizes.split(), *folders])
    assert measured == list(cells_of(STUDY))
    rows = list(csv.DictReader((tmp_path / "out" / "grid.csv").read_text().splitlines()))
    found = {(row["correction"], int(row["t"])): float(row["accuracy"]) for row in rows}
    wanted = {(c.correction, t): 0.1 * t for c in figures for t in STUDY.reported_steps}
    assert found == pytest.approx(wanted)


def test_a_study_resumes_with_the_cells_that_are_missing(done, monkeypatch):
    workdir, cells = done
    measured = []

    def measure(cell, study, folder, options):
        measured.append(cell)
        return {key: value for key, value in cells[cell].items() if key not in ("settings", "made")}

    monkeypatch.setattr(grid, "_measure", measure)
    removed = workdir / "cells" / "validation" / f"{NAME}-none-seed0.json"
    removed.unlink()
    assert run_study(STUDY, workdir) == cells
    assert [(c.network.name, c.correction, c.seed) for c in measured] == [(NAME, "none", 0)]


def test_cells_of_other_settings_are_refused(done):
    with pytest.raises(ValueError, match="another correction_steps; choose another workdir"):
        run_study(dataclasses.replace(STUDY, correction_steps=4), done[0])
    with pytest.raises(ValueError, match="another num_images"):
        run_study(dataclasses.replace(STUDY, num_images=7), done[0])


WORKER = """
import sys
from pathlib import Path
from nadaptor.studies import study as grid
from nadaptor.studies.study import Study

def measure(cell, *_):
    print(cell.seed, flush=True)
    sys.stdin.read()  # until it is killed

grid._measure = measure
grid.run_study(Study(methods=("lsq",), levels=(2,), seeds=4, corrections=("none",)), Path("s"))
"""


def test_workers_share_a_study_and_the_cell_of_one_that_is_killed_is_another_workers(
    tmp_path, monkeypatch
):
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    environment = {**os.environ, "PYTHONPATH": str(Path(grid.__file__).parents[2])}
    command = [sys.executable, "-c", WORKER]
    worker = subprocess.Popen(command, cwd=tmp_path, env=environment, **pipes)
    try:
        worker.stdout.readline()  # which cell it begins
        taken = int(worker.stdout.readline())
        measured = []

        def measure(cell, *_):
            measured.append(cell.seed)
            if len(measured) == 3:
                assert taken not in measured  # the other process holds it
                worker.kill()
                worker.wait()
            return {"failed": "made up"}

        monkeypatch.setattr(grid, "_measure", measure)
        study = Study(methods=("lsq",), levels=(2,), seeds=4, corrections=("none",))
        cells = run_study(study, tmp_path / "s")
    finally:
        worker.kill()
        worker.communicate()
    assert len(cells) == 4 and sorted(measured) == [0, 1, 2, 3] and measured[-1] == taken


def test_a_study_whose_minutes_are_over_begins_no_cell(tmp_path, monkeypatch):
    clock = itertools.count(step=30.0)
    monkeypatch.setattr(options.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(grid, "_measure", lambda *_: {"failed": "made up"})
    with pytest.raises(OutOfTimeError, match="the same command goes on"):
        run_study(STUDY, tmp_path, Options(max_minutes=1.5))
    assert len(list((tmp_path / "cells" / "validation").glob("*.json"))) == 1
    assert len(run_study(STUDY, tmp_path)) == 2


def made_up(study):
    """Cells of a study with accuracies that rise with t and differ between seeds."""
    return {
        cell: {
            "ann": 0.9,
            "ann_noisy": 0.8,
            "training_accuracy": 0.95,
            "made": {"date": "2026-01-02", "machine": "abacus", "commit": "c0ffee"},
            "accuracy": [0.1 * (t + 1) + 0.01 * cell.seed for t in range(study.num_steps)],
            "total_steps": study.num_steps + (3 if cell.correction == "srp" else 0),
        }
        for cell in cells_of(study)
    }


def test_the_files_hold_the_means_of_the_cells(tmp_path, capsys):
    study = dataclasses.replace(STUDY, methods=("lsq", "ttrbr"), seeds=2)
    cells = made_up(study)
    write_study(study, cells, tmp_path)
    rows = list(csv.DictReader((tmp_path / "grid.csv").read_text().splitlines()))
    assert len(rows) == len(cells) * 4  # t = 1, 2, 4 and 5
    assert {int(r["network_steps"]) - int(r["t"]) for r in rows if r["correction"] == "srp"} == {3}
    assert {r["machine"] for r in rows} == {"abacus"}
    assert {r["epochs"] for r in rows} == {"1"}
    assert {r["levels"] for r in rows if r["method"] == "ttrbr"} == {"32"}
    table = (tmp_path / "table.md").read_text()
    line = next(line for line in table.splitlines() if "lsq_p2" in line)
    assert [cell.strip() for cell in line.split("|")][3:-1] == [
        "0",
        "2",
        "80.00±0.00",
        "90.00±0.00",
        "10.50±0.71",
        "20.50±0.71",
        "40.50±0.71",
        "50.50±0.71",
    ]
    assert table in capsys.readouterr().out
    for name in ("accuracy.png", "total_steps.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_a_network_that_fails_is_a_cell_that_says_so(tmp_path, monkeypatch):
    def fail(config, workdir, options, **settings):
        raise RunError("the loss is nan at step 1; lower the learning rate")

    monkeypatch.setattr(grid, "measure", fail)
    study = dataclasses.replace(STUDY, methods=("lsq",), seeds=1)
    cells = run_study(study, tmp_path)
    assert all(m["failed"].startswith("the loss is nan") for m in cells.values())
    write_study(study, cells, tmp_path / "out")
    assert "failed" in (tmp_path / "out" / "table.md").read_text()
    cell = tmp_path / "cells" / "validation" / f"{NAME}-none-seed0.json"
    assert json.loads(cell.read_text())["settings"]


def test_a_changed_figure_is_measured_again_and_a_passing_error_is_no_result(
    tmp_path, monkeypatch, capsys
):
    study = dataclasses.replace(STUDY, methods=("lsq",), corrections=("none",), seeds=1)
    errors = [RunError("the loss is nan"), RunError("the loss is inf"), PassingError("held")]

    def fail(config, workdir, options, **settings):
        raise errors.pop(0)

    monkeypatch.setattr(grid, "measure", fail)
    (first,) = [m["failed"] for m in run_study(study, tmp_path).values()]
    (cell,) = (tmp_path / "cells").rglob("*.json")
    assert [m["failed"] for m in run_study(study, tmp_path).values()] == [first]
    cell.write_text(cell.read_text().replace("nan", "bad"))
    assert [m["failed"] for m in run_study(study, tmp_path).values()] == ["the loss is inf"]
    assert "it is measured again" in capsys.readouterr().out
    cell.write_text(cell.read_text()[:40])
    with pytest.raises(PassingError, match="held"):
        run_study(study, tmp_path)
    assert len(cell.read_text()) == 40


def test_a_field_with_several_values_is_an_axis_of_the_grid():
    study = Study(
        methods=("lsq", "noise_adaptor"),
        levels=(2,),
        seeds=2,
        corrections=("none",),
        width=(4, 8),
        epochs=(3, 30),
    )
    configs = [(config_of(c, study), c) for c in cells_of(study)]
    wanted = {(w, e, s) for w in (4, 8) for e in (3, 30) for s in (0, 1)}
    assert {(c.network.width, c.epochs, c.seed) for c, _ in configs} == wanted
    assert len({(cell.folder, c.name) for c, cell in configs}) == 2 * len(wanted)


def test_networks_that_start_from_one_parent_and_only_those_share_a_folder():
    study = Study(methods=("lsq", "noise_adaptor"), seeds=2, width=(4, 8), epochs=(3, 30))
    folders = {}
    for cell in cells_of(study):
        folders.setdefault(parent_of(config_of(cell, study)), set()).add(cell.folder)
    assert all(len(names) == 1 for names in folders.values())
    assert len(set().union(*folders.values())) == len(folders) == 4


def test_a_study_that_is_extended_keeps_the_cells_it_has(done, monkeypatch):
    workdir, cells = done
    measured = []

    def measure(cell, study, folder, options):
        measured.append(cell.network.name)
        return {"failed": "not asked for"}

    monkeypatch.setattr(grid, "_measure", measure)
    longer = dataclasses.replace(STUDY, epochs=(1, 2), corrections=("none",))
    kept = run_study(longer, workdir)
    assert measured == ["lsq_p2-digits_resnet8-epochs2"]
    assert {c: m for c, m in cells.items() if c in kept} == {
        c: m for c, m in kept.items() if c in cells
    }


def test_training_accuracy_is_of_the_images_that_were_trained_on_alone(done):
    workdir, cells = done
    cell = next(iter(cells))
    model, variables, config = load_snn(workdir / cell.folder / cell.network.name / "snn")
    source = open_split(config.data, "train")
    assert cells[cell]["training_accuracy"] == ann_accuracy(model, variables, source)


@pytest.mark.parametrize("name", STUDIES)
def test_every_named_study_is_valid_and_says_how_it_is_run(name):
    assert f"python -m nadaptor.study {name}" in STUDIES[name].__doc__
    configs = [check_config(config_of(cell, STUDIES[name]())) for cell in cells_of(STUDIES[name]())]
    assert len({(c.name, c.seed) for c in configs}) == len(set(configs))


def test_the_papers_figures_stand_below_a_network_of_its_tables(tmp_path):
    study = dataclasses.replace(
        STUDIES["cifar10"](), seeds=1, levels=(2,), num_steps=4, corrections=("none", "srp")
    )
    write_study(study, made_up(study), tmp_path)
    lines = (tmp_path / "table.md").read_text().splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    below = {row[0]: cells[i + 1] for i, row in enumerate(cells) if row[1] == "none"}
    assert below["lsq_p2"][4:] == ["", "95.50", "91.62", "93.65", "95.18"]
    assert below["noise_adaptor_p2"][4:] == ["", "94.97", "93.71", "95.26", "95.95"]
    assert sum(row[0] == "the paper" for row in cells) == 2  # it has no figures with SRP


@pytest.mark.parametrize("field", ["seeds", "num_steps"])
def test_counts_below_one_are_refused(tmp_path, field):
    with pytest.raises(ValueError, match=field):
        run_study(dataclasses.replace(STUDY, **{field: 0}), tmp_path)


@pytest.mark.parametrize("name", CORRECTIONS)
def test_only_the_two_stage_corrections_spend_steps(name):
    spent = get_inference(name, 6).total_steps(10) - 10
    assert spent == (0 if name in ("none", "negative-spikes") else 6)


def test_an_unknown_correction_is_refused():
    with pytest.raises(ValueError, match="there are none, negative-spikes"):
        get_inference("other")


def test_an_unknown_network_to_hold_against_is_refused_before_anything_is_trained(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(command, "share_study", lambda *_: pytest.fail("a study was begun"))
    with pytest.raises(ValueError, match="'noise_adaptor_p3' is no network of the study"):
        command.main(["fit", "--workdir", str(tmp_path), "--against", "noise_adaptor_p3"])
