import dataclasses
import json

import pytest

from nadaptor._checks import check_name
from nadaptor.configs.config import Config, check_config, from_json, to_json
from nadaptor.configs.named import CONFIGS, INHERITED, get_config, parent_of


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_is_valid_and_says_what_it_is(name):
    config = check_config(get_config(name))
    assert config.name == name
    assert f"python train.py {name}" in CONFIGS[name].__doc__
    assert config.parent is None or config.parent in CONFIGS


def test_a_config_has_no_defaults_that_hide():
    assert all(f.default is dataclasses.MISSING for f in dataclasses.fields(Config))


def test_a_config_is_a_value():
    assert get_config("digits_na") == get_config("digits_na")
    with pytest.raises(dataclasses.FrozenInstanceError):
        get_config("digits_na").seed = 1


def test_the_adaptor_is_the_only_difference_between_the_two_quantized_configs():
    with_it, without = get_config("digits_na"), get_config("digits_lsq")
    same = dataclasses.replace(without, name=with_it.name, activation=with_it.activation)
    assert same == with_it


def test_a_parent_shares_data_model_and_seed_and_keeps_its_own_recipe():
    child = dataclasses.replace(get_config("digits_na"), seed=7, model="digits_resnet8", epochs=1)
    parent = parent_of(child)
    assert [getattr(parent, f) for f in INHERITED] == [getattr(child, f) for f in INHERITED]
    assert parent.epochs == get_config("digits_relu").epochs
    assert parent_of(parent) is None


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("epochs", 0),
        ("epochs", 1.5),
        ("batch_size", -1),
        ("validation_size", 0),
        ("levels", 0),
        ("learning_rate", float("nan")),
        ("learning_rate", float("inf")),
        ("weight_decay", -1e-4),
        ("noise_amplitude", -0.5),
        ("seed", -1),
    ],
)
def test_a_value_out_of_range_is_named(field, value):
    with pytest.raises(ValueError, match=f"{field} must be .*{value}"):
        check_config(dataclasses.replace(get_config("digits_na"), **{field: value}))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_comes_back_from_json_as_it_was(name):
    fields = to_json(get_config(name))
    assert json.loads(json.dumps(fields)) == fields
    assert from_json(fields) == get_config(name)
    hash(from_json(fields))


def test_bad_levels_to_draw_from_are_refused():
    with pytest.raises(ValueError, match="levels must be a positive int such as 2, not 0"):
        check_config(dataclasses.replace(get_config("digits_na"), drawn_levels=(1, 0)))


def test_an_unknown_name_gets_the_nearest_or_all():
    with pytest.raises(ValueError, match="did you mean 'digits_na'"):
        get_config("digits_n")
    with pytest.raises(ValueError, match="there are a, b"):
        check_name("something else", {"a": 1, "b": 2}, "letter")
