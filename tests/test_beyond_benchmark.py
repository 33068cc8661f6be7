"""The benchmark of networks beyond the paper's: what it trains, and its table's differences."""

import pytest

from benchmarks.beyond import NETWORKS, cells_of, config_of, spikes_of, table
from nadaptor.configs.config import check_config
from nadaptor.conversion.convert import check_spikes

CELLS = cells_of(list(NETWORKS), seeds=3)


def test_each_cell_has_a_valid_config_and_both_methods_train_on_the_same_images():
    configs = {cell: check_config(config_of(cell)) for cell in CELLS}
    for cell, config in configs.items():
        other = configs[cell._replace(method="lsq", coding="rate")]
        assert (config.data, config.network, config.seed) == (other.data, other.network, cell.seed)


@pytest.mark.parametrize("cell", [c for c in CELLS if c.method == "lsq" and c.seed == 0], ids=str)
def test_spikes_go_through_each_network_in_both_codings(cell):
    config = config_of(cell)
    side = config.data.image_size
    card = check_spikes(config, 10, (side, side, 3), spikes_of(cell))
    assert card["coding"] == cell.coding
    assert bool(card["analog"]) == (card["nonaffine"] == "running_mean")


def test_a_difference_is_taken_within_a_seed_and_its_deviation_is_over_seeds():
    def report(cell):
        gain = 0.01 * (cell.seed + 1) if cell.method == "noise_adaptor" else 0.0
        accuracy = [0.25 * cell.seed + gain] * 16
        return {"accuracy": accuracy, "ann_deterministic": 0.5, "training_accuracy": 1.0}

    rows = table({cell: report(cell) for cell in CELLS})
    assert len(rows) == len(NETWORKS) * 2 * 3
    assert [row["T = 4"] for row in rows[:3]] == ["25.0±25.0", "27.0±26.0", "2.0±1.0"]
    assert rows[2]["quantized"] == "0.0±0.0"
