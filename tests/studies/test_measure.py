"""The chain of one config: a network is converted once, and never taken for another."""

import contextlib

import numpy as np
import pytest

from nadaptor.checkpoints.checkpoint import load_card, save_checkpoint
from nadaptor.studies import measure


@pytest.fixture
def checkpoint(tmp_path):
    """A checkpoint, of which only the card is looked at."""
    path = tmp_path / "digits_na" / "checkpoint"
    save_checkpoint(path, "ann", {"w": np.zeros(1)}, {"config": {}})
    return path


def save_snn(checkpoint, source):
    card = {"config": {}, "source": source}
    save_checkpoint(checkpoint.parent / "snn", "snn", {"w": np.zeros(1)}, card)


def test_a_spiking_network_of_another_checkpoint_is_not_measured(checkpoint):
    save_snn(checkpoint, "of the checkpoint that was here before")
    with pytest.raises(ValueError, match=r"/snn was not converted from .*/checkpoint; remove .*"):
        measure.convert_once(checkpoint)


def test_a_network_that_another_process_has_just_converted_is_not_converted_again(
    checkpoint, monkeypatch
):
    @contextlib.contextmanager
    def hold(path):
        assert path == checkpoint.parent
        # Until now the other process had the lock.
        save_snn(checkpoint, load_card(checkpoint, "ann")["card_digest"])
        yield

    monkeypatch.setattr(measure, "hold", hold)
    monkeypatch.setattr(measure, "convert", lambda *_, **__: pytest.fail("it is converted again"))
    assert measure.convert_once(checkpoint) == checkpoint.parent / "snn"
