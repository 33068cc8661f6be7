"""The paper's figures are found for the networks of its tables, and for no other."""

import pytest

from nadaptor.configs.config import replace
from nadaptor.configs.inference import CorrectionName
from nadaptor.configs.named import get_config
from nadaptor.configs.paper import published
from nadaptor.configs.tables import CIFAR10, IMAGENET

NAME = "cifar10_resnet18_na_p2"


def stated(name: str, correction: CorrectionName):
    return published(get_config(name), correction)


def test_the_tables_of_corrections_are_of_two_networks():
    found = stated(NAME, "offset-spikes")
    assert found is not None and found.snn[1] == 95.82
    found = stated("imagenet_resnet50_na_p3", "negative-spikes")
    assert found is not None and found.ann == 73.72 and found.snn[2] == 53.42
    assert stated("cifar10_resnet18_lsq_p2", "offset-spikes") is None
    assert stated("imagenet_resnet50_na_p7", "offset-spikes") is None


def test_a_row_is_that_of_its_config_whatever_the_seed_and_the_type():
    for row in (*CIFAR10, *IMAGENET):
        config = replace(get_config(row.name), name="other", seed=3, dtype="bfloat16")
        assert published(config, "none") == row


@pytest.mark.parametrize(
    "changed",
    [
        {"train_size": 1000},
        {"width": 16},
        {"image_size": 16},
        {"learning_rate": 0.01},
        {"epochs": 10},
        {"model": "cifar_resnet20"},
        {"levels": 8},
        {"gradient": "exact"},
        {"dataset": "cifar100"},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_of_a_network_that_is_trained_otherwise_the_paper_states_nothing(changed):
    assert published(replace(get_config(NAME), **changed), "none") is None
