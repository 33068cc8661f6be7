"""The page of the paper's tables: operations are the network's, rows the paper's and ours."""

import json

import pytest

from benchmarks import paper_page
from benchmarks.paper_page import Line, lines, main, multiply_adds, read_report
from nadaptor.configs.config import to_json
from nadaptor.configs.named import get_config
from nadaptor.configs.tables import CIFAR10, CORRECTED, IMAGENET


@pytest.mark.parametrize(
    ("model", "shape", "classes", "published"),
    [
        ("resnet50", (224, 224, 3), 1000, 4.09e9),  # torchvision's page of its weights
        ("resnet18", (224, 224, 3), 1000, 1.81e9),
        ("cifar_resnet20", (32, 32, 3), 10, 40.8e6),  # He et al. and its many copies
    ],
)
def test_the_operations_counted_are_those_published(model, shape, classes, published):
    assert multiply_adds(model, shape, classes) == pytest.approx(published, rel=0.01)


def test_every_row_of_the_tables_has_a_line_and_those_of_tables_4_and_5_two_more():
    found = [line.name for line in (*lines(CIFAR10), *lines(IMAGENET))]
    assert len(found) == len(set(found)) == len(CIFAR10) + len(IMAGENET) + 2 * len(CORRECTED)


@pytest.fixture
def report():
    config = to_json(get_config("cifar10_resnet18_na_p2"))
    return {
        "config": config,
        "split": "test",
        "num_images": 10_000,
        "num_steps": 2,
        "ann_deterministic": 0.875,
        "accuracy": [0.25, 0.5],
    }


def write(tmp_path, report):
    path = tmp_path / "results" / "cifar10_resnet18_na_p2" / "report.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(report))
    return tmp_path / "results"


def test_a_report_stands_below_its_row_and_every_other_says_what_it_needs(
    tmp_path, report, monkeypatch
):
    monkeypatch.setattr(paper_page, "minutes", lambda config: 150.0)  # quicker than to trace them
    main(write(tmp_path, report), tmp_path / "page.md")
    page = (tmp_path / "page.md").read_text().splitlines()
    cells = [[cell.strip() for cell in line.split("|")] for line in page]
    at = next(i for i, row in enumerate(cells) if row[1:2] == ["cifar10_resnet18_na_p2"])
    assert cells[at][3:7] == ["94.97", "93.71", "95.26", "95.95"]
    assert cells[at + 1][2:7] == ["ours", "87.50", "25.00", "50.00", ""]
    assert sum("not run: needs about 2 hours of an H100" in line for line in page) == 21
    assert sum("not run: needs" in line for line in page) == len(CIFAR10) + len(IMAGENET) + 3


@pytest.mark.parametrize(
    ("field", "value"),
    [("split", "validation"), ("num_images", 5000), ("levels", 4), ("epochs", 3), ("model", "x")],
)
def test_a_report_of_something_else_is_refused(tmp_path, report, field, value):
    inside = report if field in report else report["config"]
    inside[field] = value
    line = Line(next(r for r in CIFAR10 if r.name == "cifar10_resnet18_na_p2"), "none", {})
    with pytest.raises(ValueError, match=f"is of another {field}"):
        read_report(line, write(tmp_path, report))
