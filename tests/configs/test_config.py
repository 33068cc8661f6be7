import dataclasses
import json

import pytest

from nadaptor._checks import check_name
from nadaptor.configs.build import build_model
from nadaptor.configs.config import (
    GROUPS,
    Config,
    check_config,
    fields_of,
    from_json,
    replace,
    to_json,
)
from nadaptor.configs.named import CONFIGS, INHERITED, get_config, parent_of


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_is_valid_and_says_what_it_is(name):
    config = check_config(get_config(name))
    assert config.name == name
    assert f"nadaptor train {name}" in CONFIGS[name].__doc__
    assert config.parent is None or config.parent in CONFIGS


def test_a_config_has_no_defaults_that_hide():
    for kind in (Config, *GROUPS.values()):
        assert all(f.default is dataclasses.MISSING for f in dataclasses.fields(kind))


def test_no_two_groups_have_a_field_of_one_name():
    names = [f.name for kind in (Config, *GROUPS.values()) for f in dataclasses.fields(kind)]
    assert len(names) == len(set(names))
    assert {f.name for f in dataclasses.fields(Config)} >= GROUPS.keys()


def test_a_change_reaches_its_group_and_no_other_field():
    before = get_config("digits_na")
    after = replace(before, levels=4, gradient="exact", batch_size=8, epochs=1)
    changed = {"levels": 4, "gradient": "exact", "batch_size": 8, "epochs": 1}
    assert fields_of(after) == {**fields_of(before), **changed}
    assert after.data is before.data and after.optimizer is before.optimizer
    with pytest.raises(TypeError, match="epoch"):
        replace(before, epoch=1)


def test_a_config_is_a_value():
    assert get_config("digits_na") == get_config("digits_na")
    with pytest.raises(dataclasses.FrozenInstanceError):
        get_config("digits_na").seed = 1


def test_the_adaptor_is_the_only_difference_between_the_two_quantized_configs():
    with_it, without = get_config("digits_na"), get_config("digits_lsq")
    same = replace(without, name=with_it.name, activation="noise_adaptor")
    assert same == with_it


def test_a_parent_shares_data_model_and_seed_and_keeps_its_own_recipe():
    child = replace(get_config("digits_na"), seed=7, model="digits_resnet8", epochs=1)
    parent = parent_of(child)
    of_parent, of_child = fields_of(parent), fields_of(child)
    assert [of_parent[f] for f in INHERITED] == [of_child[f] for f in INHERITED]
    assert (parent.data, parent.network) == (child.data, child.network)
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
        ("seed", 0.5),
        ("warmup_steps", 2.5),
        ("ema_decay", 1.0),
        ("train_size", 0),
        ("width", 0),
        ("image_size", -8),
        ("pool", "avg"),
        ("initial_threshold", 0.0),
    ],
)
def test_a_value_out_of_range_is_named(field, value):
    with pytest.raises(ValueError, match=f"{field} must be .*{value}"):
        check_config(replace(get_config("digits_na"), **{field: value}))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_comes_back_from_json_as_it_was(name):
    fields = to_json(get_config(name))
    assert json.loads(json.dumps(fields)) == fields
    assert from_json(fields) == get_config(name)
    hash(from_json(fields))


# The config of digits_na in a card of nadaptor 0.1.0 as of 25 November 2026, before format numbers.
OLD_CARD = """
{"name": "digits_na", "activation": "noise_adaptor", "parent": "digits_relu", "epochs": 20,
"batch_size": 64, "learning_rate": 0.1, "warmup_steps": 0, "momentum": 0.9, "weight_decay": 0.0005,
"levels": 2, "initial_threshold": 4.0, "noise_amplitude": 0.5, "gradient": "paper",
"scale_start": "lsq", "scale_gradient": true, "drawn_levels": [1, 2, 4], "dataset": "digits",
"validation_size": 150, "model": "digits_resnet20", "seed": 0, "train_size": null,
"normalization": "dataset", "augmentation": "none", "label_smoothing": 0.0, "average_decay": 0.25,
"micro_batches": 1, "select": "last", "dtype": "float32", "parallel": "pmap",
"prng": "threefry2x32"}
"""


def test_the_config_of_a_card_from_before_the_groups_is_read():
    read = from_json(json.loads(OLD_CARD))
    assert read == replace(get_config("digits_na"), ema_decay=0.25)
    assert (read.network.width, read.network.pool, read.data.image_size) == (None, None, None)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"teacher": "x"}, "does not know the config's teacher; read it with the newer version"),
        ({"epochs": ...}, "the config lacks epochs"),
    ],
)
def test_a_card_that_cannot_be_read_is_refused_in_one_line(changes, words):
    fields = {**to_json(get_config("digits_na")), **changes}
    with pytest.raises(ValueError, match=words) as error:
        from_json({name: value for name, value in fields.items() if value is not ...})
    assert "\n" not in str(error.value)


def test_bad_levels_to_draw_from_are_refused():
    with pytest.raises(ValueError, match="levels must be a positive int such as 2, not 0"):
        check_config(replace(get_config("digits_na"), drawn_levels=(1, 0)))


def test_an_unknown_name_gets_the_nearest_or_all():
    with pytest.raises(ValueError, match="did you mean 'digits_na'"):
        get_config("digits_n")
    with pytest.raises(ValueError, match="there are a, b"):
        check_name("something else", {"a": 1, "b": 2}, "letter")


def test_the_width_of_a_config_is_that_of_its_network():
    config = replace(get_config("digits_na"), width=24)
    assert build_model(config).width == 24
    assert build_model(config) is build_model(replace(config, epochs=1, batch_size=2))
    assert build_model(replace(config, width=None)).width == 16
