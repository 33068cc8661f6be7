"""The examples run, and what they say is so."""

import importlib.util
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np

import nadaptor

FOLDER = Path(__file__).parents[1] / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_leaky_neuron_is_the_plain_one_without_a_leak_and_fires_less_with_one():
    example = load("leaky_neuron")
    found = example.main()

    def layer(v):
        return nadaptor.lsq(v, 0.25, levels=4)

    plain = nadaptor.simulate(layer, jnp.linspace(0, 1, 6), num_steps=example.NUM_STEPS)
    np.testing.assert_array_equal(found[1.0], plain.outputs[-1])
    assert (found[0.95] >= found[0.9]).all() and (found[1.0] >= found[0.95]).all()


def test_current_below_what_leaks_away_never_fires():
    example = load("leaky_neuron")
    # Threshold 1, leak 0.5: the potential tends to 2 * v, from the start at 0.5.
    assert example.outputs(0.5, jnp.array([0.49, 0.51]))[0] == 0
    assert example.outputs(0.5, jnp.array([0.49, 0.51]))[1] > 0


def test_training_loop_ends_at_a_spiking_network_that_reads_digits():
    accuracy = load("training_loop").main(num_steps=200)
    assert accuracy.shape == (16,)
    assert accuracy[0] > 0.75
    assert accuracy[-1] > 0.85


def test_cells_of_the_notebook_run_and_show_what_the_text_says():
    cells = json.loads((FOLDER / "looking_inside.ipynb").read_text())["cells"]
    names = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), "looking_inside.ipynb", "exec"), names)
            assert cell["outputs"] == []  # figures are made where it is run
    assert names["accuracy"][-1] > 0.85 and names["ann"] > 0.85
    first, second = (layer.noise for layer in names["report"].values())
    assert first[8] == first.sum() and second[8] < second.sum()
    assert len(cells) == 14
