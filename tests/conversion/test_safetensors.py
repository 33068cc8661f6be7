import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from nadaptor.configs.inference import RATES
from nadaptor.configs.named import get_config
from nadaptor.conversion import export
from nadaptor.conversion.convert import Converted
from nadaptor.conversion.weights import load_weights, named_weights, save_weights

VARIABLES = {
    "params": {
        "conv1": {"kernel": np.arange(8, dtype=np.float32).reshape(2, 4), "bias": np.ones(4)},
        "block": {"act1": {"quant_scale": np.float32(0.3)}},
        "act2": {"threshold": np.float32(0.7)},
    }
}


def test_weights_are_named_by_module_and_a_threshold_is_levels_times_scale():
    arrays = named_weights(VARIABLES, levels=3)
    assert sorted(arrays) == [
        "act2.threshold",
        "block.act1.quant_scale",
        "block.act1.threshold",
        "conv1.bias",
        "conv1.kernel",
    ]
    assert arrays["block.act1.threshold"] == np.float32(0.3) * np.float32(3)
    assert arrays["act2.threshold"] == np.float32(0.7)


def test_weights_come_back_to_the_bit_and_any_reader_finds_them(tmp_path):
    arrays = named_weights(VARIABLES, levels=3)
    save_weights(tmp_path / "w", arrays, {"levels": 3})
    found, card = load_weights(tmp_path / "w")
    assert card["levels"] == 3 and "reset by subtracting" in card["layout"]
    for other in (found, load_file(tmp_path / "w")):
        assert other.keys() == arrays.keys()
        for name, array in arrays.items():
            np.testing.assert_array_equal(other[name], array)
            assert other[name].dtype == array.dtype


@pytest.mark.parametrize(("name", "levels"), [("digits_lsq", 2), ("digits_clipped_relu", None)])
def test_the_card_has_the_levels_of_the_network_and_none_of_clipped_relus(
    tmp_path, monkeypatch, name, levels
):
    snn = Converted(None, VARIABLES, get_config(name), RATES, {"card_digest": "0"})
    monkeypatch.setattr(export, "open_snn", lambda _: snn)
    export.export_checkpoint(tmp_path / "snn", tmp_path / "w", "safetensors")
    assert load_weights(tmp_path / "w")[1]["levels"] == levels


@pytest.mark.parametrize("place", [0, 9, 0.2, 0.5, 0.9, -1])
def test_a_flipped_bit_is_refused(tmp_path, place):
    save_weights(tmp_path / "w", named_weights(VARIABLES, levels=3), {"levels": 3})
    content = bytearray((tmp_path / "w").read_bytes())
    content[int(place * len(content)) if isinstance(place, float) else place] ^= 1
    (tmp_path / "w").write_bytes(content)
    with pytest.raises(ValueError, match="damaged"):
        load_weights(tmp_path / "w")


def test_a_file_of_another_program_is_refused(tmp_path):
    save_file({"a": np.zeros(2)}, tmp_path / "w", {"x": json.dumps(1)})
    with pytest.raises(ValueError, match="no card of nadaptor"):
        load_weights(tmp_path / "w")
    with pytest.raises(ValueError, match="no file at"):
        load_weights(tmp_path / "none")
