import gc
import json

import chex
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest

from nadaptor.checkpoints.checkpoint import digests, load_card, load_checkpoint, save_checkpoint

ARRAYS = {
    "params": {
        "fc": {"kernel": np.arange(60, dtype=np.float32).reshape(6, 10) / 7},
        "act": {"quant_scale": np.asarray(0.3, np.float32)},
        "half": np.asarray([1.5, -2.0], ml_dtypes.bfloat16),
        "count": np.asarray([3], np.int32),
    },
}


def unreadable(test):
    """Marks a test in which the storage layer fails to read, and leaves tasks unfinished."""
    ignored = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
    return ignored(pytest.mark.usefixtures("collected")(test))


@pytest.fixture
def collected():
    """Ends what the test left unfinished, so that no later test is blamed for it."""
    yield
    gc.collect()


@pytest.fixture
def saved(tmp_path):
    save_checkpoint(tmp_path / "saved", "ann", ARRAYS, {"note": "mine"})
    return tmp_path / "saved"


def test_what_is_loaded_is_what_was_saved_in_value_shape_and_dtype(saved):
    arrays, card = load_checkpoint(saved, "ann")
    chex.assert_trees_all_equal_structs(arrays, ARRAYS)
    chex.assert_trees_all_equal_shapes_and_dtypes(arrays, ARRAYS)
    chex.assert_trees_all_equal(arrays, ARRAYS)
    assert card["note"] == "mine"
    assert {"jax", "flax", "nadaptor"} <= card["versions"].keys()


def test_jax_arrays_are_saved_as_what_they_hold(tmp_path):
    save_checkpoint(tmp_path / "a", "snn", {"x": jnp.arange(3.0)}, {})
    chex.assert_trees_all_equal(load_checkpoint(tmp_path / "a", "snn")[0], {"x": np.arange(3.0)})


def test_a_digest_depends_on_bytes_dtype_and_shape():
    a = np.zeros((2, 3), np.float32)
    others = [a + 1, a.T, a.astype(np.int32), a.reshape(6)]
    assert len({digests({"x": x})["x"] for x in [a, *others]}) == 5
    assert digests({"x": a}) == digests({"x": a.copy(order="F")})


@unreadable
def test_a_flipped_byte_anywhere_is_refused_or_changes_nothing(saved):
    messages = []
    for file in sorted(path for path in saved.rglob("*") if path.is_file()):
        content = file.read_bytes()
        for position in {0, len(content) // 2, len(content) - 1}:
            file.write_bytes(_flipped(content, position))
            try:
                chex.assert_trees_all_equal(load_checkpoint(saved, "ann")[0], ARRAYS)
            except ValueError as error:
                messages.append(str(error))
        file.write_bytes(content)
    assert len(messages) > 5
    assert all(str(saved) in text and len(text.splitlines()) == 1 for text in messages)


def _flipped(content, position):
    changed = bytearray(content)
    changed[position] ^= 0x20
    return bytes(changed)


def test_a_changed_array_is_named(saved):
    with ocp.PyTreeCheckpointer() as checkpointer:
        changed = {"params": {**ARRAYS["params"], "count": np.asarray([4], np.int32)}}
        checkpointer.save(saved / "arrays", changed, force=True)
    with pytest.raises(ValueError, match="damaged: params/count and 0 other arrays"):
        load_checkpoint(saved, "ann")


def test_a_changed_card_is_refused(saved):
    card = json.loads((saved / "card.json").read_text())
    (saved / "card.json").write_text(json.dumps({**card, "note": "yours"}))
    with pytest.raises(ValueError, match=r"card.json is damaged; remove"):
        load_card(saved, "ann")


@pytest.mark.parametrize("content", ["", "[]", "{}", "\x00", '{"kind": "ann"}'])
def test_a_card_that_is_none_is_refused(saved, content):
    (saved / "card.json").write_text(content)
    with pytest.raises(ValueError, match=r"card.json is damaged"):
        load_checkpoint(saved, "ann")


@unreadable
def test_a_truncated_array_file_is_refused(saved):
    largest = max((p for p in saved.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    for file in (saved / "arrays").rglob("*"):
        if file.is_file() and file != largest:
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"cannot be read, it is damaged"):
        load_checkpoint(saved, "ann")


def test_a_missing_checkpoint_says_what_makes_one(tmp_path):
    with pytest.raises(ValueError, match=r"no checkpoint at .*/none; train.py makes one"):
        load_checkpoint(tmp_path / "none", "ann")
    with pytest.raises(ValueError, match=r"convert.py makes one"):
        load_checkpoint(tmp_path / "none", "snn")


def test_a_checkpoint_of_another_program_is_refused(tmp_path):
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "foreign", ARRAYS)
    with pytest.raises(ValueError, match=r"is not a checkpoint of nadaptor: it has no card.json"):
        load_checkpoint(tmp_path / "foreign", "ann")


def test_a_checkpoint_of_the_other_kind_is_refused(saved):
    with pytest.raises(ValueError, match=r"holds an 'ann', made by train.py; this needs 'snn'"):
        load_checkpoint(saved, "snn")


def test_nothing_is_overwritten(saved):
    with pytest.raises(ValueError, match="exists already"):
        save_checkpoint(saved, "ann", ARRAYS, {})


def test_a_save_that_fails_leaves_nothing_behind(tmp_path):
    with pytest.raises(TypeError):
        save_checkpoint(tmp_path / "new", "ann", ARRAYS, {"not JSON": object()})
    assert list(tmp_path.iterdir()) == []
