"""The demo: what it says where a network of its table failed."""

import dataclasses

import pytest

from nadaptor.errors import RunError
from nadaptor.studies import demo
from nadaptor.studies import study as grid


def test_a_demo_of_which_a_network_failed_says_which_and_why(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise RunError("the loss is nan")

    monkeypatch.setattr(grid, "measure", fail)
    study = dataclasses.replace(demo.STUDY, seeds=2)
    with pytest.raises(RunError, match=r"lsq_p2, seed 0: the loss is nan; .*another --workdir"):
        demo.run_demo(study, tmp_path, tmp_path / "results")
    assert not (tmp_path / "results").exists()
