import json

import pytest

from nadaptor._files import write_bytes, write_csv, write_json
from nadaptor.training.logs import write_metrics

ROWS = [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25}]


def test_csv_and_json_lines_hold_the_same_rows(tmp_path):
    write_metrics(tmp_path / "run", ROWS)
    assert (tmp_path / "run/metrics.csv").read_text() == "step,loss\n1,0.5\n2,0.25\n"
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == ROWS


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    write_json(tmp_path / "a.json", ROWS)
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", object())
    assert json.loads((tmp_path / "a.json").read_text()) == ROWS
    with pytest.raises(ValueError, match="fields not in"):
        write_csv(tmp_path / "b.csv", [{"a": 1}, {"b": 2}])
    write_bytes(tmp_path / "c" / "d", b"content")
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a.json", "c", "d"]
