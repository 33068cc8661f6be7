import dataclasses
import errno
import gc
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest

from nadaptor._files import check_writable
from nadaptor._files.card import FORMAT, DamagedError, fields_of, seal, unseal
from nadaptor.checkpoints import checkpoint
from nadaptor.checkpoints.checkpoint import digests, load_card, load_checkpoint, save_checkpoint
from nadaptor.conversion.origin import check_free
from nadaptor.errors import PassingError, RunError

ARRAYS = {
    "params": {
        "fc": {"kernel": np.arange(60, dtype=np.float32).reshape(6, 10) / 7},
        "act": {"quant_scale": np.asarray(0.3, np.float32)},
        "half": np.asarray([1.5, -2.0], ml_dtypes.bfloat16),
        "count": np.asarray([3], np.int32),
    },
}


CONFIG = {"config": {"name": "digits_na"}}
ROOT = Path(__file__).parents[2]
# A limit on the size of a file is as a disk that is full, and needs no other disk.
FULL_DISK = """
import resource
from typing import Any, NamedTuple
import numpy as np
from nadaptor.checkpoints.checkpoint import save_checkpoint
from nadaptor.checkpoints.snapshots import Snapshots

class State(NamedTuple):
    w: Any
    step: Any

def main(words):
    arrays = {str(i): np.random.default_rng(i).random((64, 64), np.float32) for i in range(60)}
    snapshots = Snapshots(Path(words[0], "snapshots"), 2, {"config": {}, "data": {}})
    for step in (1, 2, 3):
        snapshots.save(step, State(arrays, np.int32(step)), {})
    assert snapshots.last_on_disk() is None
    snapshots.close()
    save_checkpoint(Path(words[0], "checkpoint"), "ann", arrays, {"config": {}})

resource.setrlimit(resource.RLIMIT_FSIZE, (8192, resource.RLIM_INFINITY))
"""


def test_what_is_written_while_a_failed_save_is_removed_hides_no_cause(tmp_path, monkeypatch):
    def fail(folder, arrays, card):
        folder.mkdir()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def remove(path, **options):
        raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY))

    monkeypatch.setattr(checkpoint, "_write", fail)
    monkeypatch.setattr(os, "rmdir", remove)
    with pytest.raises(PassingError, match=r"was not saved: No space left on device$"):
        checkpoint.save_checkpoint(tmp_path / "ann", "ann", {}, {"config": {}})


def run_program(main, folder):
    """Runs what a program defines as `main` as a command, on a folder."""
    head = "import sys; from pathlib import Path; from nadaptor.cli.command import run_command\n"
    program = f"{head}{main}\nsys.argv[0] = 'train.py'; run_command(main)"
    return subprocess.run(
        [sys.executable, "-c", program, folder], env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip


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
def python_takes_ctrl_c():
    """A shell has what it runs in the background ignore Ctrl-C, and the tests with it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def saved(tmp_path):
    save_checkpoint(tmp_path / "saved", "ann", ARRAYS, {"note": "mine", **CONFIG})
    return tmp_path / "saved"


def test_what_is_loaded_is_what_was_saved_in_value_shape_and_dtype(saved):
    arrays, card = load_checkpoint(saved, "ann")
    chex.assert_trees_all_equal_structs(arrays, ARRAYS)
    chex.assert_trees_all_equal_shapes_and_dtypes(arrays, ARRAYS)
    chex.assert_trees_all_equal(arrays, ARRAYS)
    assert card["note"] == "mine"
    assert {"jax", "flax", "nadaptor"} <= card["versions"].keys()


def test_jax_arrays_are_saved_as_what_they_hold(tmp_path):
    save_checkpoint(tmp_path / "a", "snn", {"x": jnp.arange(3.0)}, CONFIG)
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
    with pytest.raises(ValueError, match=r"damaged: params/count (is stored|and 0 other)"):
        load_checkpoint(saved, "ann")


def test_a_changed_card_is_refused(saved):
    card = json.loads((saved / "card.json").read_text())
    (saved / "card.json").write_text(json.dumps({**card, "note": "yours"}))
    with pytest.raises(ValueError, match=r"card.json is damaged: its digest is another; remove"):
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


def test_truncated_array_files_are_one_line_and_no_thread_prints_of_them(saved):
    for file in (saved / "arrays").rglob("d/*"):
        file.write_bytes(file.read_bytes()[:20])
    done = run_program(
        "from nadaptor.checkpoints.checkpoint import load_checkpoint\n"
        "main = lambda words: load_checkpoint(Path(words[0]), 'ann')",
        saved,
    )
    assert done.stderr.startswith(f"train.py: {saved}/arrays cannot be read, it is damaged")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)


@pytest.mark.parametrize("name", ["card.json", "arrays/manifest.ocdbt"])
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_a_pipe_and_a_device_are_refused_as_they_may_never_end(saved, name, kind):
    (saved / name).unlink()
    if kind == "pipe":
        os.mkfifo(saved / name)
    else:
        (saved / name).symlink_to("/dev/zero")
    with pytest.raises(ValueError, match="no regular file") as caught:
        load_checkpoint(saved, "ann")
    assert name.rpartition("/")[2] in str(caught.value)


def test_a_card_that_is_far_too_large_is_refused_unread(saved):
    os.truncate(saved / "card.json", 2**40)
    with pytest.raises(ValueError, match=r"cannot read .*card.json: File too large"):
        load_card(saved, "ann")


def test_a_path_that_is_not_utf_8_is_refused_before_the_storage_library_fails_on_it(tmp_path):
    odd = tmp_path / os.fsdecode(b"na\xff")
    with pytest.raises(ValueError, match="is not UTF-8"):
        check_writable(odd)
    with pytest.raises(ValueError, match="is not UTF-8"):
        load_checkpoint(odd, "ann")
    assert not list(tmp_path.iterdir())


def test_a_link_to_nowhere_is_in_the_way_of_a_checkpoint(tmp_path):
    (tmp_path / "a").symlink_to("nowhere")
    with pytest.raises(ValueError, match="exists already"):
        save_checkpoint(tmp_path / "a", "ann", ARRAYS, CONFIG)
    with pytest.raises(ValueError, match="exists already"):
        check_free(tmp_path / "a")


def test_a_missing_checkpoint_says_what_makes_one(tmp_path):
    with pytest.raises(ValueError, match=r"no checkpoint at .*/none; nadaptor train makes one"):
        load_checkpoint(tmp_path / "none", "ann")
    with pytest.raises(ValueError, match=r"nadaptor convert makes one"):
        load_checkpoint(tmp_path / "none", "snn")


def test_a_checkpoint_of_another_program_is_refused(tmp_path):
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "foreign", ARRAYS)
    with pytest.raises(ValueError, match=r"is not a checkpoint of nadaptor: it has no card.json"):
        load_checkpoint(tmp_path / "foreign", "ann")


def test_a_checkpoint_of_the_other_kind_is_refused(saved):
    with pytest.raises(
        ValueError, match=r"holds an 'ann', made by nadaptor train; this needs 'snn'"
    ):
        load_checkpoint(saved, "snn")


def test_nothing_is_overwritten(saved):
    with pytest.raises(ValueError, match="exists already"):
        save_checkpoint(saved, "ann", ARRAYS, {})


def test_a_save_that_fails_leaves_nothing_behind(tmp_path):
    with pytest.raises(TypeError):
        save_checkpoint(tmp_path / "new", "ann", ARRAYS, {"not JSON": object()})
    assert list(tmp_path.iterdir()) == []


def rewritten(saved, change):
    """Changes the card and seals it again, as an author of a hostile folder would."""
    card = json.loads((saved / "card.json").read_text())
    change(card)
    for field in ("card_digest", "format"):
        card.pop(field, None)
    (saved / "card.json").write_text(json.dumps(seal(card)))


def as_of_format_1(card):
    """The card as it was written before there was a format: no shapes, and a digest of the rest."""
    old = {k: v for k, v in card.items() if k not in ("format", "shapes", "card_digest")}
    text = json.dumps(old, sort_keys=True).encode()
    return {**old, "card_digest": hashlib.sha256(text).hexdigest()}


def test_a_checkpoint_of_format_1_is_read(saved):
    card = json.loads((saved / "card.json").read_text())
    (saved / "card.json").write_text(json.dumps(as_of_format_1(card), indent=1) + "\n")
    arrays, card = load_checkpoint(saved, "ann")
    chex.assert_trees_all_equal(arrays, ARRAYS)
    assert "format" not in card


def test_a_later_format_is_refused_with_the_remedy(saved):
    card = json.loads((saved / "card.json").read_text())
    (saved / "card.json").write_text(json.dumps({**card, "format": FORMAT + 1}))
    with pytest.raises(ValueError, match=f"format {FORMAT + 1}, and this version reads {FORMAT}"):
        load_card(saved, "ann")


FIELDS = ("kind", "config", "digests", "versions", "shapes")
RETYPED = (None, 3, "text", ["a"], {"a": [1]}, True)


@pytest.mark.parametrize("field", FIELDS)
def test_every_field_dropped_renamed_or_retyped_is_refused_in_one_line(saved, field):
    original = (saved / "card.json").read_text()
    changes = [lambda card: card.pop(field), lambda card: card.update(other=card.pop(field))]
    messages = []
    changes += [lambda card, value=value: card.update({field: value}) for value in RETYPED]
    for change in changes:
        (saved / "card.json").write_text(original)
        card = json.loads(original)
        change(card)
        # What is dropped but not needed leaves a card that is good; the arrays are compared then.
        (saved / "card.json").write_text(json.dumps(card))
        with pytest.raises(ValueError, match="is damaged: its digest is another"):
            load_checkpoint(saved, "ann")
        rewritten(saved, lambda _: None)
        try:
            load_checkpoint(saved, "ann")
        except ValueError as error:
            messages.append(str(error))
    assert messages
    assert all(str(saved) in text and len(text.splitlines()) == 1 for text in messages)


def test_a_field_of_another_type_is_named(saved):
    rewritten(saved, lambda card: card.update(config=[1]))
    with pytest.raises(ValueError, match=r"its config is \[1\], which is no dict"):
        load_card(saved, "ann")
    rewritten(saved, lambda card: card.pop("config"))
    with pytest.raises(ValueError, match="it lacks config"):
        load_card(saved, "ann")


def test_a_card_without_its_digest_is_refused():
    card = seal({"accuracy": 0.5})
    del card["card_digest"]
    with pytest.raises(DamagedError, match="it lacks card_digest"):
        unseal(card)


@dataclasses.dataclass
class Row:
    step: int
    losses: list[float]
    best: float | None = None


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"losses": []}, "it lacks step"),
        ({"step": True, "losses": []}, "its step is True, which is no int"),
        ({"step": 1, "losses": [1, "2"]}, r"its losses\[1\] is '2', which is no float"),
        ({"step": 1, "losses": [], "best": "x"}, "its best is 'x'"),
    ],
)
def test_a_record_names_the_field_that_is_missing_or_wrong(fields, word):
    assert fields_of(Row, {"step": 1, "losses": [1, 0.5], "more": 1}) == Row(1, [1, 0.5])
    with pytest.raises(DamagedError, match=word):
        fields_of(Row, fields)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_network_that_diverged_is_neither_saved_nor_loaded(saved, value, monkeypatch):
    arrays = {"params": {"w": np.float32([1, value])}}
    with pytest.raises(RunError, match="params/w is not finite; nothing is written"):
        save_checkpoint(saved.parent / "new", "ann", arrays, CONFIG)
    assert not (saved.parent / "new").exists()
    monkeypatch.setattr("nadaptor.checkpoints.checkpoint.first_not_finite", lambda _: None)
    save_checkpoint(saved.parent / "new", "ann", arrays, CONFIG)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="holds a network that diverged: params/w is not finite"):
        load_checkpoint(saved.parent / "new", "ann")


@pytest.mark.parametrize("old", [False, True])
def test_arrays_of_a_shape_that_the_card_has_not_are_refused_before_any_is_read(
    saved, monkeypatch, old
):
    """A few bytes of metadata may ask for more memory than there is."""
    if old:
        card = json.loads((saved / "card.json").read_text())
        (saved / "card.json").write_text(json.dumps(as_of_format_1(card)))
    shutil.rmtree(saved / "arrays")
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(saved / "arrays", ARRAYS, ocdbt_target_data_file_size=None)
    monkeypatch.setattr(
        ocp.PyTreeCheckpointer, "restore", lambda *_: pytest.fail("the arrays were read")
    )
    metadata = ocp.PyTreeCheckpointHandler.metadata

    def huge(self, path):
        found = metadata(self, path)
        leaf = found.tree["params"]["count"]
        leaf.shape = (4_000_000_000,)
        return found

    monkeypatch.setattr(ocp.PyTreeCheckpointHandler, "metadata", huge)
    word = "its arrays would take 1600000" if old else "params/count is stored as"
    with pytest.raises(ValueError, match=word):
        load_checkpoint(saved, "ann")


def test_what_a_killed_save_left_is_removed_by_the_next(tmp_path):
    left = tmp_path / ".a-x1y2z3_4"
    left.mkdir()
    (left / "arrays").write_bytes(b"half")
    (tmp_path / ".ab-x1y2z3_4").mkdir()
    save_checkpoint(tmp_path / "a", "ann", ARRAYS, CONFIG)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".ab-x1y2z3_4", "a"]


def test_a_save_that_is_interrupted_is_finished_first(tmp_path, monkeypatch, python_takes_ctrl_c):
    """Orbax's threads write on, and print pages of errors where their folder is gone."""
    save = ocp.Checkpointer.save

    def interrupted(*args, **kwargs):
        signal.raise_signal(signal.SIGINT)
        return save(*args, **kwargs)

    monkeypatch.setattr(ocp.Checkpointer, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path / "a", "ann", ARRAYS, CONFIG)
    chex.assert_trees_all_equal(load_checkpoint(tmp_path / "a", "ann")[0], ARRAYS)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_read_that_is_interrupted_is_finished_first(saved, monkeypatch, python_takes_ctrl_c):
    restore, ended = ocp.PyTreeCheckpointer.restore, []

    def interrupted(*args, **kwargs):
        signal.raise_signal(signal.SIGINT)
        ended.append(restore(*args, **kwargs))
        return ended[0]

    monkeypatch.setattr(ocp.PyTreeCheckpointer, "restore", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load_checkpoint(saved, "ann")
    chex.assert_trees_all_equal(ended[0], ARRAYS)


def test_a_full_disk_is_one_line_with_its_cause_at_every_save(tmp_path):
    """Orbax and tensorstore print two thousand of their own, from threads."""
    done = run_program(FULL_DISK, tmp_path)
    assert done.stderr == f"train.py: {tmp_path}/checkpoint was not saved: File too large\n"
    assert done.stdout == "a snapshot was not saved, the earlier ones are kept: File too large\n"
    assert done.returncode == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["snapshots"]
    assert not [path for path in (tmp_path / "snapshots").iterdir() if path.name.isdigit()]


def test_a_disk_without_room_is_no_result_of_a_network(tmp_path, monkeypatch):
    """A study keeps a RunError as what its cell came to, and tries a PassingError again."""

    def full(*_, **__):
        raise ValueError("RESOURCE_EXHAUSTED: writing: No space left on device [source ...]")

    monkeypatch.setattr(ocp.Checkpointer, "save", full)
    with pytest.raises(PassingError, match=r"a was not saved: No space left on device$"):
        save_checkpoint(tmp_path / "a", "ann", ARRAYS, CONFIG)
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_is_on_the_disk_before_it_counts(tmp_path, monkeypatch):
    """The file, then its folder, then the name of the whole."""
    synced, fsync = [], os.fsync

    def noted(descriptor):
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    save_checkpoint(tmp_path / "a", "ann", ARRAYS, CONFIG)
    scratch = next(p for p in synced if p.endswith(".card.json.part"))
    folder = scratch.rsplit("/", 1)[0]
    assert synced.index(scratch) < synced.index(folder) < synced.index(str(tmp_path))
    assert synced[-1] == str(tmp_path)


def test_arrays_are_not_called_damaged_where_jax_cannot_start(saved, monkeypatch):
    def nonsense():
        raise RuntimeError("Unable to initialize backend 'nonsense'")

    monkeypatch.setattr(jax, "devices", nonsense)
    with pytest.raises(RuntimeError, match="Unable to initialize backend"):
        load_checkpoint(saved, "ann")
