"""Tables and plots: what stands in a cell, and where a curve's points lie."""

import io

import numpy as np
import pytest
from PIL import Image

from nadaptor.reports import plots
from nadaptor.reports.plots import Curve, figure_bytes, new_figure, plot_accuracy, plot_panels
from nadaptor.reports.tables import markdown, percent


def test_a_table_has_its_columns_aligned_and_every_row():
    rows = [{"network": "a", "T = 1": "9.00±0.10"}, {"network": "longer", "T = 1": ""}]
    lines = markdown(rows).splitlines()
    assert lines == [
        "| network | T = 1     |",
        "| ------- | --------- |",
        "| a       | 9.00±0.10 |",
        "| longer  |           |",
    ]


def test_a_row_with_a_column_less_is_refused():
    with pytest.raises(ValueError, match="zip"):
        markdown([{"a": "1", "b": "2"}, {"a": "1"}])


@pytest.mark.parametrize(
    ("fraction", "text"), [(0, "0.00 %"), (1, "100.00 %"), (0.123456, "12.35 %")]
)
def test_a_fraction_is_printed_in_percent_of_two_places(fraction, text):
    assert percent(fraction) == text


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are drawn, in place of their files' pictures."""
    figures = []

    def keep(figure):
        figures.append(figure)
        return figure_bytes(figure)

    monkeypatch.setattr(plots, "figure_bytes", keep)
    return figures


def lines(axes):
    return [(line.get_xdata().tolist(), line.get_ydata().tolist()) for line in axes.get_lines()]


def test_points_of_a_curve_lie_at_t_and_the_accuracy_in_percent(tmp_path, drawn):
    plot_accuracy([Curve("a", [0.5, 0.75], [0.125, 0.0])], "accuracy, %", tmp_path / "a.png")
    (axes,) = drawn[0].axes
    assert lines(axes) == [([1, 2], [50.0, 75.0])]
    assert axes.get_ylabel() == "accuracy, %"
    (band,) = axes.collections
    edges = {tuple(point) for point in band.get_paths()[0].vertices}
    assert {(1, 37.5), (1, 62.5), (2, 75.0)} <= edges


def test_with_steps_in_all_a_curve_is_moved_by_what_its_correction_spent(tmp_path, drawn):
    curves = [Curve("plain", [0.5, 0.5], [0, 0]), Curve("after 3", [0.5, 0.5], [0, 0], spent=3)]
    for total in (False, True):
        plot_panels({"p": curves}, "accuracy, %", tmp_path / f"{total}.png", total=total)
    (counted,), (all_of_them,) = (figure.axes for figure in drawn)
    assert [x for x, _ in lines(counted)] == [[1, 2], [1, 2]]
    assert [x for x, _ in lines(all_of_them)] == [[1, 2], [4, 5]]
    assert all_of_them.get_xlabel() == "network steps in all"
    assert [tick.get_text() for tick in all_of_them.get_xticklabels()] == ["1", "2", "4"]


def test_each_group_has_a_panel_three_in_a_row_and_the_rest_is_empty(tmp_path, drawn):
    panels = {name: [Curve(name, [0.25], [0.0])] for name in "abcd"}
    plot_panels(panels, "accuracy, %", tmp_path / "four.png")
    axes = drawn[0].axes
    assert [a.get_title() for a in axes[:4]] == list("abcd")
    assert len(axes) == 6 and not any(a.axison for a in axes[4:])
    assert [a.get_ylabel() for a in axes] == ["accuracy, %", "", "", "accuracy, %", "", ""]


def test_a_picture_has_the_size_that_was_asked_for():
    picture = np.asarray(Image.open(io.BytesIO(figure_bytes(new_figure(2, 1)))))
    assert picture.shape[:2] == (120, 240)
