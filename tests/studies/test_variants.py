"""Variants of the methods: what each sets, and what it is compared with."""

import typing

import pytest

from nadaptor.configs.config import replace
from nadaptor.models.config import ACTIVATIONS
from nadaptor.studies.study import Study, cells_of, config_of
from nadaptor.studies.variants import METHODS, PAIRS, Method


def test_the_methods_are_the_activations_that_become_spikes_and_variants_of_them():
    spiking = {name for name, entry in ACTIVATIONS.items() if entry.converts_as}
    of_the_adaptor = ("exact", "scaled", "unscaled", "half", "relu_start", "relu_start_unscaled")
    variants = {"lsq_unscaled", "any_level_1_2", "any_level_1_2_scaled"}
    variants |= {f"noise_adaptor_{v}" for v in of_the_adaptor}
    assert set(typing.get_args(Method)) == spiking | variants
    assert {METHODS[name]["activation"] for name in variants} <= spiking


@pytest.mark.parametrize(
    "methods",
    [("noise_adaptor_unscaled", "any_level_1_2"), ("noise_adaptor_scaled", "any_level_1_2_scaled")],
)
def test_any_level_training_from_two_levels_has_the_gradient_of_the_adaptor(methods):
    study = Study(methods=methods, levels=(2,), seeds=1)
    adaptor, drawn = (config_of(c, study) for c in cells_of(study) if c.correction == "none")
    changed = {"name": drawn.name, "activation": "any_level", "drawn_levels": (1, 2)}
    assert replace(adaptor, **changed) == drawn


def test_a_variant_changes_its_own_field_alone():
    study = Study(methods=("noise_adaptor", "noise_adaptor_exact"), levels=(2,), seeds=1)
    plain, exact = (config_of(c, study) for c in cells_of(study) if c.correction == "none")
    assert replace(plain, name=exact.name, gradient="exact") == exact


def test_a_variant_of_two_settings_changes_what_each_alone_changes():
    start, factor = (METHODS[f"noise_adaptor_{name}"] for name in ("relu_start", "unscaled"))
    assert METHODS["noise_adaptor_relu_start_unscaled"] == start | factor
    assert PAIRS["noise_adaptor_relu_start_unscaled"] == PAIRS["noise_adaptor_unscaled"]
