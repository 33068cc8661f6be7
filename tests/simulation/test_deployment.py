"""An exported network is the simulation; damage is refused; the reader needs jax alone."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nadaptor
from nadaptor._files.card import seal
from nadaptor.simulation.deployment import load_exported, sidecar_of

W = jnp.array([[0.5, -0.25, 1.0], [0.25, 0.5, -0.5]])
X = jnp.array([[0.25, 1.0], [0.5, 0.0], [0.75, 0.5], [-1.0, 0.25]])
T = 6
WAYS = {
    "rate": dict(),
    "signed": dict(neuron=nadaptor.SignedIntegrateAndFire()),
    "corrected": dict(correction=nadaptor.OffsetSpikes(4)),
    "sum": dict(coding="sum"),
}


def f(w, x):
    return {"logits": nadaptor.lsq(nadaptor.lsq(x, 0.5, levels=2) @ w, 0.25, levels=4) @ w.T}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    nadaptor.export(folder / "net.jax", f, W, X, num_steps=T)
    return folder


@pytest.fixture
def net(exported, tmp_path):
    """A copy of the one network, lowered once for the file, that a test may damage."""
    return shutil.copytree(exported, tmp_path, dirs_exist_ok=True) / "net.jax"


@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)
def test_exported_outputs_are_those_of_the_simulation_for_any_batch(tmp_path, options):
    nadaptor.export(tmp_path / "net", f, W, X[:1], num_steps=T, **options)
    call = load_exported(tmp_path / "net").call
    for batch in (X, X[:1]):
        live = jax.jit(lambda x: nadaptor.simulate(f, W, x, num_steps=T, **options).outputs)(batch)
        np.testing.assert_array_equal(call(batch)["logits"], live["logits"])


def test_a_network_is_lowered_for_every_platform_and_says_what_it_is(net):
    card = load_exported(net).sidecar
    assert card["platforms"] == ["cpu", "cuda", "tpu"]
    assert card["inputs"] == [{"dtype": "float32", "shape": ["batch", 2]}]
    assert card["outputs"] == [{"dtype": "float32", "shape": [T, "batch", 2]}]
    assert (card["num_steps"], card["coding"], card["analog"]) == (T, "rate", [])


def test_analog_operations_are_named_in_the_sidecar(tmp_path):
    def attends(x):
        return nadaptor.lsq(jax.nn.softmax(nadaptor.lsq(x, 0.5, levels=2)), 0.25, levels=4)

    nadaptor.export(tmp_path / "net", attends, X, num_steps=T, nonaffine="running_mean")
    analog = load_exported(tmp_path / "net").sidecar["analog"]
    assert analog[0].startswith(f"softmax (reduce_max) at {__file__}:")


def test_data_may_be_any_argument(tmp_path):
    nadaptor.export(tmp_path / "net", lambda x, w: f(w, x), X, W, num_steps=T, data_argnum=0)
    live = nadaptor.simulate(f, W, X, num_steps=T).outputs["logits"]
    np.testing.assert_array_equal(load_exported(tmp_path / "net").call(X)["logits"], live)


def test_a_function_for_one_batch_size_is_exported_for_that_size(tmp_path):
    def fixed(x):
        return nadaptor.lsq(x, 0.5, levels=2).reshape(2, 4) @ jnp.ones((4, 1))

    with pytest.raises(ValueError, match="any_batch=False"):
        nadaptor.export(tmp_path / "net", fixed, X, num_steps=T)
    assert not (tmp_path / "net").exists()
    nadaptor.export(tmp_path / "net", fixed, X, num_steps=T, any_batch=False)
    assert load_exported(tmp_path / "net").call(X).shape == (T, 2, 1)


def test_an_operation_that_spikes_cannot_pass_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"softmax .*at .*test_deployment"):
        nadaptor.export(
            tmp_path / "net",
            lambda x: jax.nn.softmax(nadaptor.lsq(x, 0.5, levels=2)) ** 2,
            X,
            num_steps=T,
        )


def test_an_error_of_the_export_is_no_cause_of_itself(tmp_path, monkeypatch):
    def fail(*args, **options):
        raise NotImplementedError("no lowering")

    monkeypatch.setattr("jax.export.export", fail)
    with pytest.raises(NotImplementedError, match="no lowering") as caught:
        nadaptor.export(tmp_path / "net", f, W, X, num_steps=T, any_batch=False)
    assert caught.value.__cause__ is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(data_argnum=2), "data_argnum=2, but there are 2"),
        (dict(num_steps=0), "num_steps"),
        (dict(metadata={"x": object()}), "the sidecar is JSON"),
    ],
)
def test_what_cannot_be_exported_is_refused_and_nothing_is_written(tmp_path, options, words):
    with pytest.raises(ValueError, match=words):
        nadaptor.export(tmp_path / "net", f, W, X, **{"num_steps": T, **options})
    assert not list(tmp_path.iterdir())


def flip(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("part", ["artefact", "sidecar"])
@pytest.mark.parametrize("place", [0.0, 0.3, 0.7, 1.0])
def test_a_flipped_bit_anywhere_is_refused(net, part, place):
    path = net if part == "artefact" else sidecar_of(net)
    flip(path, int(place * (path.stat().st_size - 2)))
    with pytest.raises(ValueError, match=re.escape(str(path))):
        load_exported(net)


def test_what_is_missing_cut_or_of_another_kind_is_refused(net):
    side = sidecar_of(net)
    whole = side.read_text()
    for text in ("", whole[: len(whole) // 2], "[]", "{}", json.dumps(seal({"kind": "snn"}))):
        side.write_text(text)
        with pytest.raises(ValueError, match=re.escape(str(side))):
            load_exported(net)
    side.unlink()
    with pytest.raises(ValueError, match=r"cannot read .*net\.jax\.json: No such file"):
        load_exported(net)


def test_an_artefact_beside_the_sidecar_of_another_is_refused(net, tmp_path):
    other = tmp_path / "other.jax"
    nadaptor.export(other, f, 2 * W, X, num_steps=T)
    sidecar_of(other).replace(sidecar_of(net))
    with pytest.raises(ValueError, match="its digest is another"):
        load_exported(net)


def test_the_reader_of_the_page_needs_neither_this_library_nor_flax(tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "deploy.md").read_text()
    (reader,) = [b for b in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "hashlib" in b]
    assert len(reader.split("\n\n")[-1].splitlines()) <= 10
    options = dict(num_steps=T, class_names=["a", "b"], platforms=["cpu"])
    nadaptor.export(tmp_path / "net.jax", lambda x: f(W, x)["logits"], X, **options)
    blocked = "import sys\nfor name in ('nadaptor', 'flax'):\n    sys.modules[name] = None\n"
    done = subprocess.run(
        [sys.executable, "-c", blocked + reader], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.stderr == ""
    assert done.stdout.startswith(f"({T}, 3, 2) ")
    flip(tmp_path / "net.jax", 100)
    done = subprocess.run(
        [sys.executable, "-c", blocked + reader], cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (1, "net.jax is damaged\n")


def test_without_flatbuffers_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "flatbuffers", None)
    with pytest.raises(ImportError, match=r'needs flatbuffers: pip install "nadaptor\[export\]"'):
        nadaptor.export(tmp_path / "net", f, W, X, num_steps=T)
