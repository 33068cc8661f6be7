"""Pictures draw what they are given; the page holds them all and asks for nothing else."""

import base64
import re

import numpy as np

from nadaptor.reports import pictures
from nadaptor.reports.html import Table, html_page
from nadaptor.reports.plots import Curve

SPIKES = np.array([[1, 0], [0, 0], [0, -1]])
CURVES = [Curve("a", [0.5, 0.75], [0.0, 0.0]), Curve("b", [0.25, 1.0], [0.1, 0.1])]


def lines(figure):
    return {line.get_label(): line for line in figure.axes[0].get_lines()}


def test_accuracy_over_time_has_a_line_per_run_a_band_over_seeds_and_the_ann():
    figure = pictures.accuracy_over_time(CURVES, ann=0.9)
    np.testing.assert_array_equal(lines(figure)["a"].get_ydata(), [50, 75])
    np.testing.assert_array_equal(lines(figure)["ANN"].get_ydata(), [90, 90])
    assert len(figure.axes[0].collections) == 1  # one band: the other run has one seed
    assert "ANN" not in lines(pictures.accuracy_over_time(CURVES))


def test_accuracy_over_energy_is_in_nanojoules_with_the_ann_as_a_point():
    run = pictures.Run("snn", [0.5, 0.75], [1000.0, 2000.0])
    drawn = lines(pictures.accuracy_over_energy([run], ann=(0.9, 4000.0)))
    np.testing.assert_array_equal(drawn["snn"].get_xdata(), [1, 2])
    np.testing.assert_array_equal(drawn["ANN"].get_xydata(), [[4, 90]])


def test_error_map_has_a_row_per_layer_and_a_column_per_step():
    figure = pictures.error_map({"a": [0.5, 0.25, 0.0], "b": [1.0, 0.5, 0.25]})
    (image,) = figure.axes[0].get_images()
    np.testing.assert_array_equal(image.get_array(), [[0.5, 0.25, 0], [1, 0.5, 0.25]])
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["a", "b"]


def test_raster_has_a_mark_at_each_spike_and_a_trace_of_each_potential():
    figure = pictures.raster(SPIKES, np.array([[0.0, 1], [1, 2], [2, 1]]), threshold=2)
    positive, negative = figure.axes[0].collections
    np.testing.assert_array_equal(positive.get_offsets(), [[1, 0]])
    np.testing.assert_array_equal(negative.get_offsets(), [[3, 1]])
    np.testing.assert_array_equal(figure.axes[1].get_lines()[1].get_ydata(), [1, 2, 1])
    assert len(pictures.raster(SPIKES).axes) == 1


def test_noise_is_centred_on_the_expected_count():
    drawn = lines(pictures.noise_histogram({"a": [1, 6, 1]}))["a"]
    np.testing.assert_array_equal(drawn.get_xydata(), [[-1, 12.5], [0, 75], [1, 12.5]])


def test_exits_have_accuracy_and_steps_by_confidence():
    rows = [{"confidence": 0.5, "accuracy": 0.75, "mean_steps": 1.5}]
    figure = pictures.exit_steps(rows)
    np.testing.assert_array_equal(figure.axes[0].get_lines()[0].get_xydata(), [[0.5, 75]])
    np.testing.assert_array_equal(figure.axes[1].get_lines()[0].get_xydata(), [[0.5, 1.5]])


def test_a_picture_is_written_as_png_and_svg_with_the_same_bytes_each_time(tmp_path):
    for folder in ("a", "b"):
        pictures.save_figure(pictures.raster(SPIKES), tmp_path / folder / "x")
    for name in ("x.png", "x.svg"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert (tmp_path / "a/x.png").read_bytes().startswith(b"\x89PNG")


def test_the_page_holds_its_pictures_escapes_names_and_loads_nothing():
    figure = pictures.raster(SPIKES)
    page = html_page("<net>", "Summary.", [Table("Layers", [{"layer": "a&b"}])], {"Spikes": figure})
    assert "&lt;net&gt;" in page and "a&amp;b" in page and 'name="viewport"' in page
    (source,) = re.findall(r'src="([^"]*)"', page)
    assert source.startswith("data:image/svg+xml;base64,")
    assert base64.b64decode(source.partition(",")[2]) == pictures.svg_bytes(figure)
    assert not re.search(r'(href|src)="(https?:)?//', page)
