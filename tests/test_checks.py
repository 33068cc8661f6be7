"""Each check names the value, and the remedy; what is traced has no value to check."""

import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nadaptor import _checks


class Layer(NamedTuple):
    name: str
    source: str = "net.py:3"
    turns: tuple[int, ...] = ()


@pytest.mark.parametrize("value", [1, 7, np.int32(3), np.uint8(255)])
def test_every_kind_of_integer_is_a_count(value):
    for found in (_checks.check_levels(value), _checks.check_count(value, "num_steps")):
        assert type(found) is int and found == value


@pytest.mark.parametrize("value", [0, -1, True, 2.0, "2", None, np.float32(2), np.zeros(2, int)])
def test_what_is_no_positive_integer_is_refused_with_its_value(value):
    shown = repr(value)
    with pytest.raises(ValueError, match="levels must be a positive int such as 2") as levels:
        _checks.check_levels(value)
    with pytest.raises(ValueError, match="num_steps must be a positive int") as count:
        _checks.check_count(value, "num_steps")
    assert str(levels.value).endswith(shown) and str(count.value).endswith(shown)


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.uint8, jnp.bool_, jnp.complex64])
def test_what_is_not_floating_point_is_refused_with_its_type(dtype):
    with pytest.raises(ValueError, match=f"v must be floating point, not {jnp.dtype(dtype)}; "):
        _checks.check_floating(jnp.ones(2, dtype), "v")


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_every_floating_point_type_stays_as_it_is(dtype):
    assert _checks.check_floating(jnp.ones(2, dtype), "v").dtype == dtype


def test_a_key_is_one_typed_key():
    key = jax.random.key(0)
    assert _checks.check_key(key) is key
    for legacy in (jax.random.PRNGKey(0), np.zeros(2, np.uint32)):
        with pytest.raises(ValueError, match=r"not uint32\[2\]; a legacy .*wrap_key_data"):
            _checks.check_key(legacy)
    with pytest.raises(ValueError, match="not 0; a legacy"):
        _checks.check_key(0)
    with pytest.raises(ValueError, match=r"keys of shape \(3,\); use jax.vmap"):
        _checks.check_key(jax.random.split(key, 3))


@pytest.mark.parametrize("shape", [(), (4,), (1, 4), (3, 1), (3, 4), (1, 1)])
def test_a_scale_that_broadcasts_to_the_activation_is_one_of_floats(shape):
    scale = _checks.check_scale(np.ones(shape, int), (3, 4), "scale")
    assert (scale.shape, scale.dtype) == (shape, jnp.float32)


@pytest.mark.parametrize("shape", [(3,), (5,), (2, 3, 4), (1, 3, 4), (4, 3)])
def test_a_scale_that_would_change_the_activations_shape_is_refused_with_both(shape):
    with pytest.raises(ValueError, match=r"does not broadcast .* \(3, 4\)") as caught:
        _checks.check_scale(np.ones(shape, np.float32), (3, 4), "scale")
    assert f"of shape {shape} does" in str(caught.value)


@pytest.mark.parametrize("value", [0.0, -0.5, np.nan, np.inf, [1.0, -2.0]])
def test_a_scale_that_is_not_positive_is_refused_where_it_has_a_value(value):
    with pytest.raises(ValueError, match="scale must be finite and positive, not"):
        _checks.check_positive(value, "scale")
    wrong = np.asarray(value, np.float32)
    traced = jax.eval_shape(lambda scale: _checks.check_positive(scale, "scale"), wrong)
    assert traced.shape == wrong.shape


def test_the_first_wrong_value_of_many_is_the_one_that_is_named():
    with pytest.raises(ValueError, match="not -3;"):
        _checks.check_positive([1.0, -3.0, 0.0], "scale")


def test_one_number_is_the_scale_of_every_layer_and_of_every_turn_of_a_scan():
    scales = _checks.check_scales(0.5, [Layer("a"), Layer("b", turns=(3, 2))])
    assert {name: scale.shape for name, scale in scales.items()} == {"a": (), "b": (3, 2)}
    assert all((scale == 0.5).all() for scale in scales.values())


def test_scales_of_another_network_are_refused_by_the_names_that_differ():
    layers = [Layer("a"), Layer("b", "net.py:8")]
    with pytest.raises(ValueError, match=r"no scale for 'b' \(net.py:8\), and no layer for 'c'"):
        _checks.check_scales({"a": 1.0, "c": 1.0}, layers)
    with pytest.raises(ValueError, match="no scale for no layer, and no layer for 'c', 'd'"):
        _checks.check_scales({"a": 1.0, "b": 1.0, "d": 1.0, "c": 1.0}, layers)


def test_a_layer_in_a_scan_has_a_scale_for_each_turn_whatever_follows():
    layers = [Layer("a", turns=(3,))]
    assert _checks.check_scales({"a": np.ones((3, 1, 5))}, layers)["a"].shape == (3, 1, 5)
    for shape in ((), (2,), (5, 3)):
        with pytest.raises(ValueError, match=r"stands in a scan of length \(3,\)"):
            _checks.check_scales({"a": np.ones(shape)}, layers)


def test_a_scale_of_a_layer_that_is_not_positive_is_refused_by_the_layer():
    with pytest.raises(ValueError, match=r"the scale of a \(net.py:3\) must be finite"):
        _checks.check_scales({"a": -1.0}, [Layer("a")])


@pytest.mark.parametrize("scales", [-0.5, {"a": -1.0}, {"a": np.float32(0)}])
def test_a_scale_that_jit_closes_over_has_a_value_to_refuse(scales):
    with pytest.raises(ValueError, match="must be finite and positive"):
        jax.eval_shape(lambda: _checks.check_scales(scales, [Layer("a")]))


@pytest.mark.parametrize("path", ["runs", "/tmp/runs", "a:b", "C:/runs", "./gs:", "x/gs://y"])
def test_folders_of_this_machine_are_local(path):
    _checks.check_local(path, "--out")


@pytest.mark.parametrize(
    ("path", "address"),
    [
        ("gs://bucket/runs", "gs://bucket/runs"),
        ("gs:/bucket/runs", "gs://bucket/runs"),  # as a Path shows it
        ("s3:///bucket", "s3://bucket"),
        ("file+x.y-z://host", "file+x.y-z://host"),
    ],
)
def test_an_address_is_refused_as_it_was_meant(path, address):
    with pytest.raises(ValueError, match=re.escape(f"not {address}; mount")):
        _checks.check_local(path, "--out")


def test_a_name_that_is_near_none_gets_the_list_in_order():
    known = {"b": 1, "a": 2}
    with pytest.raises(ValueError, match="unknown model 'xyz'; there are a, b"):
        _checks.check_name("xyz", known, "model")
    with pytest.raises(ValueError, match="unknown model ''; there are a, b"):
        _checks.check_name("", known, "model")
    assert _checks.check_name("a", known, "model") == "a"
