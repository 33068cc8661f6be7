"""What an artefact is measured on: one array of images, of the data set that is named once."""

import jax.numpy as jnp
import pytest

import nadaptor
from nadaptor.configs.config import to_json
from nadaptor.configs.named import get_config
from nadaptor.evaluation.exported import simulate_exported

IMAGES = jnp.ones((1, 8, 8, 1))


def exported(path, f, data, **metadata):
    nadaptor.export(path, f, data, num_steps=1, platforms=["cpu"], metadata=metadata)
    return path


def test_an_artefact_of_two_inputs_is_refused_with_their_shapes(tmp_path):
    def both(x):
        return nadaptor.lsq(x["a"] + x["b"], 0.5, levels=2)

    net = exported(tmp_path / "net", both, {"a": IMAGES, "b": IMAGES})
    with pytest.raises(
        ValueError, match=r"takes arrays of the shapes \[.*\], .*; export a function of"
    ):
        simulate_exported(net, "test", "digits")


def test_a_data_set_beside_a_sidecar_that_names_its_own_is_refused(tmp_path):
    config = to_json(get_config("digits_na"))
    net = exported(
        tmp_path / "net", lambda x: nadaptor.lsq(x, 0.5, levels=2), IMAGES, config=config
    )
    with pytest.raises(ValueError, match="names its data set, 'digits'; leave out --dataset mnist"):
        simulate_exported(net, "test", "mnist")
