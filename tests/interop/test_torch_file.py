import collections
import io
import os
import pickle
import struct
import sys
import types
import zipfile

import chex
import ml_dtypes
import numpy as np
import pytest

from nadaptor.interop import read_torch_file

MAGIC = 0x1950A86A20F9469CFC6C
KINDS = {
    "f8": "DoubleStorage", "f4": "FloatStorage", "f2": "HalfStorage", "bfloat16": "BFloat16Storage",
    "i8": "LongStorage", "i4": "IntStorage", "i2": "ShortStorage", "i1": "CharStorage",
    "u1": "ByteStorage", "?": "BoolStorage",
}  # fmt: skip


class Storage:
    """Numbers that a pickle refers to by key, as torch's storages."""

    def __init__(self, key, array):
        self.key, self.array = key, array


class Call:
    """Pickles as a call of a global, whatever it does."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


@pytest.fixture
def torch(monkeypatch):
    """A stand-in with torch's names, so that pickles can be written without torch."""
    torch, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")
    for name in KINDS.values():
        setattr(torch, name, type(name, (), {"__module__": "torch"}))
    for name in ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_parameter"):
        function = types.FunctionType((lambda: None).__code__, {}, name)
        function.__module__, function.__qualname__ = "torch._utils", name
        setattr(utils, name, function)
    torch._utils = utils
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setitem(sys.modules, "torch._utils", utils)
    return torch


def kind(dtype):
    if dtype == ml_dtypes.bfloat16:
        return KINDS["bfloat16"]
    return KINDS[dtype.str.lstrip("<|").replace("b1", "?")]


def pickled(torch, state, *view):
    """The state as torch pickles it; `view` is what legacy files add to a storage's reference."""

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj):
            if not isinstance(obj, Storage):
                return None
            storage = getattr(torch, kind(obj.array.dtype))
            return ("storage", storage, obj.key, "cpu", obj.array.size, *view)

    stream = io.BytesIO()
    Pickler(stream, protocol=2).dump(state)
    return stream.getvalue()


def tensor(torch, storage, shape, strides, offset=0, version=2):
    if version == 1:
        return Call(torch._utils._rebuild_tensor, storage, offset, shape, strides)
    hooks = collections.OrderedDict()
    return Call(torch._utils._rebuild_tensor_v2, storage, offset, shape, strides, False, hooks)


def zip_file(path, torch, state, storages, byteorder=b"little"):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("net/data.pkl", pickled(torch, state))
        if byteorder:
            archive.writestr("net/byteorder", byteorder)
        for storage in storages:
            archive.writestr(f"net/data/{storage.key}", storage.array.tobytes())
        archive.writestr("net/version", b"3\n")
    return path


def legacy_file(path, torch, state, storages, little=True):
    header = [MAGIC, 1001, {"little_endian": little, "protocol_version": 1001}]
    with open(path, "wb") as file:
        for part in header:
            file.write(pickle.dumps(part, protocol=2))
        file.write(pickled(torch, state, None))
        file.write(pickle.dumps([storage.key for storage in storages], protocol=2))
        for storage in storages:
            file.write(struct.pack("<q", storage.array.size) + storage.array.tobytes())
    return path


@pytest.fixture(params=[zip_file, legacy_file], ids=["zip", "legacy"])
def write(request, torch, tmp_path):
    """Writes a file of either layout: write(state, storages) -> path."""
    return lambda state, storages, **options: request.param(
        tmp_path / "net.pth", torch, state, storages, **options
    )


def numbers(size, dtype="f4"):
    return np.arange(size).astype(dtype)


def test_names_shapes_and_values_come_back_in_order(write, torch):
    a, b = Storage("0", numbers(6)), Storage("1", numbers(4) / 3)
    state = collections.OrderedDict(
        [("b.weight", tensor(torch, b, (4,), (1,))), ("a.weight", tensor(torch, a, (2, 3), (3, 1)))]
    )
    got = read_torch_file(write(state, [a, b]))
    assert list(got) == ["b.weight", "a.weight"]
    chex.assert_trees_all_equal(
        got, {"a.weight": numbers(6).reshape(2, 3), "b.weight": numbers(4) / 3}
    )


@pytest.mark.parametrize("dtype", KINDS)
def test_every_dtype_is_kept(write, torch, dtype):
    array = numbers(5, ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    storage = Storage("0", array)
    got = read_torch_file(write({"x": tensor(torch, storage, (5,), (1,))}, [storage]))["x"]
    assert got.dtype == array.dtype
    np.testing.assert_array_equal(got, array)


@pytest.mark.parametrize("version", [1, 2])
def test_views_are_strided_from_their_offset(write, torch, version):
    storage = Storage("0", numbers(24))
    turned = tensor(torch, storage, (3, 2), (1, 4), offset=5, version=version)
    got = read_torch_file(write({"x": turned, "y": tensor(torch, storage, (24,), (1,))}, [storage]))
    np.testing.assert_array_equal(got["x"], [[5, 9], [6, 10], [7, 11]])
    assert got["y"].size == 24


def test_scalars_and_empty_tensors_are_read(write, torch):
    one, none = Storage("0", numbers(1)), Storage("1", numbers(0))
    state = {"one": tensor(torch, one, (), ()), "none": tensor(torch, none, (0, 3), (3, 1))}
    got = read_torch_file(write(state, [one, none]))
    assert got["one"].shape == ()
    assert got["none"].shape == (0, 3)


def test_parameters_are_their_tensors(write, torch):
    storage = Storage("0", numbers(3))
    inner = tensor(torch, storage, (3,), (1,))
    parameter = Call(torch._utils._rebuild_parameter, inner, True, collections.OrderedDict())
    got = read_torch_file(write({"x": parameter}, [storage]))
    np.testing.assert_array_equal(got["x"], numbers(3))


@pytest.mark.parametrize("container", ["state_dict", "model_state_dict", "model", "net"])
def test_the_state_dict_is_found_in_its_container(write, torch, container):
    storage, momentum = Storage("0", numbers(3)), Storage("1", numbers(2))
    state = {
        "epoch": 3,
        container: collections.OrderedDict(x=tensor(torch, storage, (3,), (1,))),
        "optimizer": {"state": [tensor(torch, momentum, (2,), (1,))], "lr": 0.1},
    }
    assert read_torch_file(write(state, [momentum, storage])).keys() == {"x"}


def test_bfloat16_keeps_its_values(write, torch):
    storage = Storage("0", np.array([1.0, -2.5, 3e38], ml_dtypes.bfloat16))
    got = read_torch_file(write({"x": tensor(torch, storage, (3,), (1,))}, [storage]))
    np.testing.assert_array_equal(got["x"].astype("f4"), storage.array.astype("f4"))


ATTACKS = {
    "system": lambda trace: Call(os.system, f"touch {trace}"),
    "eval": lambda trace: Call(eval, f"open({str(trace)!r}, 'w')"),
    "open": lambda trace: Call(open, str(trace), "w"),
    "getattr": lambda trace: Call(getattr, "", "upper"),
    "loads": lambda trace: Call(pickle.loads, pickle.dumps(Call(open, str(trace), "w"))),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_a_pickle_that_would_run_something_is_refused_and_runs_nothing(
    write, torch, tmp_path, name
):
    trace, storage = tmp_path / "executed", Storage("0", numbers(3))
    attack = ATTACKS[name](trace)
    path = write({"x": tensor(torch, storage, (3,), (1,)), "evil": attack}, [storage])
    with pytest.raises(ValueError, match=rf"it asks for \w+\.{name}, and only tensors"):
        read_torch_file(path)
    assert not trace.exists()


def test_the_attack_works_on_the_ordinary_unpickler(tmp_path):
    """Else the test above could not fail."""
    trace = tmp_path / "executed"
    pickle.loads(pickle.dumps(ATTACKS["open"](trace))).close()
    assert trace.exists()


@pytest.mark.parametrize("name", ["_rebuild_tensor_v2", "_rebuild_parameter"])
def test_a_pickle_cannot_leave_anything_behind_in_the_reader(write, torch, name):
    """BUILD sets attributes of what a global gives; here it takes a mapping alone."""
    stream = b"\x80\x02ctorch._utils\n" + name.encode() + b"\n}X\x06\x00\x00\x00poison\x88sb."
    path = write({}, [])
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("net/data.pkl", stream)
    else:
        header = [MAGIC, 1001, {"little_endian": True}]
        path.write_bytes(b"".join(pickle.dumps(part, protocol=2) for part in header) + stream)
    with pytest.raises(ValueError, match=r"where torch writes dict|no torch"):
        read_torch_file(path)


@pytest.mark.parametrize(
    ("shape", "strides", "offset"),
    [
        ((7,), (1,), 0),
        ((6,), (1,), 1),
        ((2, 3), (4, 1), 0),
        ((1000, 6), (0, 1), 0),
        ((1,), (1,), 6),
    ],
)
def test_a_view_outside_its_storage_is_refused(write, torch, shape, strides, offset):
    storage = Storage("0", numbers(6))
    path = write({"x": tensor(torch, storage, shape, strides, offset)}, [storage])
    with pytest.raises(
        ValueError, match=r"leaves or repeats its storage of 6 values|would take \d+ bytes"
    ):
        read_torch_file(path)


@pytest.mark.parametrize(
    ("shape", "strides", "offset", "message"),
    [
        ((-1,), (1,), 0, "no count: -1"),
        ((2,), (-1,), 1, "no count: -1"),
        ((2,), (1,), -1, "no count: -1"),
        ((2.0,), (1,), 0, "no count: 2.0"),
        ((2,), (1, 1), 0, "too few strides"),
    ],
)
def test_sizes_that_are_no_counts_are_refused(write, torch, shape, strides, offset, message):
    storage = Storage("0", numbers(6))
    path = write({"x": tensor(torch, storage, shape, strides, offset)}, [storage])
    with pytest.raises(ValueError, match=message):
        read_torch_file(path)


def test_a_truncated_file_is_refused_wherever_it_ends(write, torch):
    storage = Storage("0", numbers(40))
    path = write({"x": tensor(torch, storage, (40,), (1,))}, [storage])
    whole = path.read_bytes()
    for end in range(0, len(whole), 7):
        path.write_bytes(whole[:end])
        with pytest.raises(ValueError, match=r"cannot read .*(truncated|no torch)"):
            read_torch_file(path)


def test_a_flipped_bit_in_a_zip_is_detected(torch, tmp_path):
    storage = Storage("0", numbers(40))
    state = {"x": tensor(torch, storage, (40,), (1,))}
    path = zip_file(tmp_path / "net.pth", torch, state, [storage])
    whole = bytearray(path.read_bytes())
    whole[whole.index(storage.array.tobytes()) + 9] ^= 1
    path.write_bytes(whole)
    with pytest.raises(ValueError, match="its CRC-32 is another"):
        read_torch_file(path)


def test_a_storage_of_another_size_than_claimed_is_refused(write, torch):
    claimed, stored = Storage("0", numbers(6)), Storage("0", numbers(5))
    path = write({"x": tensor(torch, claimed, (6,), (1,))}, [stored])
    with pytest.raises(ValueError, match=r"has 5 values, not 6|is not of 6 FloatStorage values"):
        read_torch_file(path)


def test_a_file_without_tensors_is_refused(write):
    with pytest.raises(ValueError, match="it holds no state dict"):
        read_torch_file(write({"epoch": 3}, []))


def test_big_endian_files_are_refused(torch, tmp_path):
    storage = Storage("0", numbers(3))
    state = {"x": tensor(torch, storage, (3,), (1,))}
    for path in (
        zip_file(tmp_path / "a.pth", torch, state, [storage], byteorder=b"big"),
        legacy_file(tmp_path / "b.pth", torch, state, [storage], little=False),
    ):
        with pytest.raises(ValueError, match="big-endian"):
            read_torch_file(path)


@pytest.mark.parametrize("content", [b"", b"<html>Not found</html>", pickle.dumps(3), b"\x00" * 64])
def test_other_files_are_refused(tmp_path, content):
    path = tmp_path / "net.pth"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"cannot read .*net\.pth"):
        read_torch_file(path)


def test_a_zip_that_is_no_checkpoint_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "net.pth", "w") as archive:
        archive.writestr("readme.txt", b"hello")
    with pytest.raises(ValueError, match="no torch checkpoint"):
        read_torch_file(tmp_path / "net.pth")


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="Is a directory"):
        read_torch_file(tmp_path)
