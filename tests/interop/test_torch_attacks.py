"""Torch files from strangers: refused in one line, within the memory and the time of an honest one.

The budget of a file: four times its size in memory and 256 MiB, and five seconds.
"""

import io
import os
import pickle
import re
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from benchmarks.damage import write_weights
from nadaptor.interop import from_torch, read_state_dict, read_torch_file, torch_file
from nadaptor.interop.torch_pickle import MAX_INSTRUCTIONS, RefusedError, load_pickle, shown

ROOT = Path(__file__).parents[2]
MAGIC = 0x1950A86A20F9469CFC6C
HEAD = b"".join(pickle.dumps(x, protocol=2) for x in (MAGIC, 1001, {"little_endian": True}))
MIB = 2**20


def text(value):
    return b"X" + struct.pack("<I", len(value)) + value


def storage(key=b"0", size=b"K\x03", kind=b"FloatStorage"):
    """The instructions that put a storage on the stack."""
    return (
        b"(" + text(b"storage") + b"ctorch\n" + kind + b"\n" + text(key) + text(b"cpu")
        + size + b"NtQ"
    )  # fmt: skip


def tensor(of=None, offset=b"K\0", shape=b"K\x03\x85", strides=b"K\x01\x85"):
    rest = b"\x89ccollections\nOrderedDict\n)R"
    called = b"ctorch._utils\n_rebuild_tensor_v2\n("
    return called + (storage() if of is None else of) + offset + shape + strides + rest + b"tR"


def entry(value=None, name=b"x"):
    return text(name) + (tensor() if value is None else value) + b"s"


GOOD = b"\x80\x02}" + entry() + b"."
NUMBERS = np.float32([1, 2, 3])


def legacy(path, stream, keys=("0",), numbers=NUMBERS):
    held = [struct.pack("<q", numbers.size) + numbers.tobytes() for _ in keys]
    path.write_bytes(HEAD + stream + pickle.dumps(list(keys), protocol=2) + b"".join(held))
    return path


def zipped(path, stream, records=(("0", NUMBERS),), method=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("net/data.pkl", stream)
        for key, numbers in records:
            archive.writestr(f"net/data/{key}", numbers.tobytes())
    return path


@pytest.fixture(params=[legacy, zipped])
def write(request, tmp_path):
    return lambda stream: request.param(tmp_path / "net.pth", stream)


def doubled(times):
    """A tuple of itself twice, so many times: 2^times parts."""
    return b"K\x01" + b"q\x01h\x01\x86" * times


ATTACKS = {
    "a key nested deep": b"\x80\x02}" + b"K\x01" + b"\x85" * 200_000 + b"K\x01s.",
    "a value nested deep": b"\x80\x02}" + text(b"a") + b"K\x01" + b"\x85" * 200_000 + b"s.",
    "lists nested deep": b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b".",
    "a text longer than the file": b"\x80\x02}X\xff\xff\xff\x7fx.",
    "a number longer than the file": b"\x80\x02}\x8b\xff\xff\xff\x7fx.",
    "a key doubled": b"\x80\x02}" + doubled(40) + b"K\x01s.",
    "a kind doubled": b"\x80\x02}" + text(b"x") + b"(" + text(b"storage") + doubled(40)
    + text(b"0") + text(b"cpu") + b"K\x03NtQs.",
    "a storage's key doubled": b"\x80\x02}" + text(b"x") + b"(" + text(b"storage")
    + b"ctorch\nFloatStorage\n" + doubled(40) + text(b"cpu") + b"K\x03NtQs.",
    "a size doubled": b"\x80\x02}" + entry(tensor(storage(size=doubled(40)))) + b".",
    "an offset doubled": b"\x80\x02}" + entry(tensor(offset=doubled(40))) + b".",
    "a shape doubled": b"\x80\x02}" + entry(tensor(shape=doubled(40), strides=doubled(40))) + b".",
    "pairs doubled": b"\x80\x02ccollections\nOrderedDict\n" + doubled(40) + b"\x85R.",
    "an endless pickle": b"\x80\x02" + b"}0" * MAX_INSTRUCTIONS,
    "an endless list of mappings": b"\x80\x02" + b"}" * (4 * MAX_INSTRUCTIONS),
    "two descriptions of a storage": b"\x80\x02}" + entry()
    + entry(tensor(storage(kind=b"LongStorage")), b"y") + b".",
    "axes without end": b"\x80\x02}"
    + entry(tensor(shape=b"(" + b"K\0" * 99 + b"t", strides=b"(" + b"K\0" * 99 + b"t")) + b".",
    "an empty tensor of huge axes": b"\x80\x02}" + entry(tensor(
        shape=b"K\0\x8a\x08\xff\xff\xff\xff\xff\xff\xff\x7f\x86",
        strides=b"K\x01K\x01\x86")) + b".",
    "an instruction of other programs": b"\x80\x02\x81.",
    "an empty stack": b"\x80\x02\x87.",
    "a mark that is not there": b"\x80\x02t.",
    "a memo that is not there": b"\x80\x02h\x07.",
    "a text of bytes": b"\x80\x02}U\x02\xff\xfeK\x01s.",
}  # fmt: skip


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_is_refused_in_a_short_line_of_printable_text(write, name):
    with pytest.raises(ValueError, match="cannot read") as caught:
        read_torch_file(write(ATTACKS[name]))
    message = str(caught.value).replace(str(Path(caught.value.args[0].split(":")[0])), "")
    assert len(message) < 400
    assert message.isprintable()


def test_the_good_file_of_these_tests_is_read(write):
    """Else the test above could not fail."""
    np.testing.assert_array_equal(read_torch_file(write(GOOD))["x"], NUMBERS)


def test_an_index_of_the_memo_costs_nothing(write):
    stream = b"\x80\x02}r\0\0\0\x08" + entry() + b"."
    assert read_torch_file(write(stream)).keys() == {"x"}


@pytest.mark.parametrize("name", [b"a\x1b[31mb", b"n" * 100_000, "\u202ered".encode()])
def test_names_in_messages_are_escaped_and_cut(name):
    with pytest.raises(RefusedError) as caught:
        load_pickle(b"\x80\x02c" + name + b"\nevil\n.")
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 300
    assert shown(name.decode()).isascii()
    state = {name.decode(): NUMBERS}
    with pytest.raises(ValueError, match=r"do not fit|letters") as caught:
        from_torch(state, {"params": {"fc": {"bias": NUMBERS}}})
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 300


def test_many_names_of_one_storage_cost_it_once(tmp_path):
    stream = b"\x80\x02}" + b"".join(entry(name=b"%d" % i) for i in range(3)) + b"."
    arrays = read_torch_file(zipped(tmp_path / "net.pth", stream))
    assert np.shares_memory(arrays["0"], arrays["2"])
    assert not arrays["0"].flags.writeable


def test_a_thousand_names_of_a_large_storage_are_refused(tmp_path):
    numbers = np.zeros(2**18, np.float32)
    size = b"J" + struct.pack("<i", numbers.size)
    one = tensor(storage(size=size), shape=size + b"\x85")
    stream = b"\x80\x02}" + b"".join(entry(one, b"%d" % i) for i in range(1000)) + b"."
    with pytest.raises(ValueError, match=r"would take 1048576000 bytes, and it has \d{7}$"):
        read_torch_file(zipped(tmp_path / "net.pth", stream, [("0", numbers)]))


@pytest.mark.parametrize("record", ["net/data.pkl", "net/data/0"])
def test_a_compressed_record_is_refused_before_it_is_unpacked(tmp_path, record):
    path = tmp_path / "net.pth"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in (("net/data.pkl", GOOD), ("net/data/0", NUMBERS.tobytes())):
            archive.writestr(name, content, zipfile.ZIP_DEFLATED if name == record else None)
    with pytest.raises(ValueError, match=f"its record {record} is compressed"):
        read_torch_file(path)


def test_records_that_lie_on_each_other_are_refused(tmp_path):
    """A thousand records of one place would be read a thousand times."""
    one = [entry(tensor(storage(b"%d" % i)), b"%d" % i) for i in range(40)]
    records = [(str(i), np.zeros(3, np.float32)) for i in range(40)]
    path = zipped(tmp_path / "net.pth", b"\x80\x02}" + b"".join(one) + b".", records)
    assert len(read_torch_file(path)) == 40
    data = bytearray(path.read_bytes())
    places = [m.start() for m in re.finditer(b"PK\1\2", data)]
    first = data[places[1] + 42 : places[1] + 46]
    for place in places[1:]:
        data[place + 42 : place + 46] = first
    size = struct.pack("<II", len(data) // 30, len(data) // 30)
    for place in places[1:]:
        data[place + 20 : place + 28] = size
    path.write_bytes(data)
    with pytest.raises(ValueError, match="cannot read"):
        read_torch_file(path)


def test_the_sizes_of_records_are_added_up_once(tmp_path, monkeypatch):
    """For each record a sum over all before it would take minutes for some MiB of them."""
    added = []
    monkeypatch.setattr(torch_file, "sum", lambda values: added.extend(values) or 0, raising=False)
    records = [(str(i), NUMBERS) for i in range(9)]
    names = [entry(tensor(storage(b"%d" % i)), b"%d" % i) for i in range(9)]
    path = zipped(tmp_path / "net.pth", b"\x80\x02}" + b"".join(names) + b".", records)
    assert len(read_torch_file(path)) == 9 and len(added) <= 2 * 9


def test_an_archive_of_64_bits_is_read(tmp_path):
    """As torch writes one of more than 4 GiB: places and sizes stand in the extra fields."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, content in (("net/data.pkl", GOOD), ("net/data/0", NUMBERS.tobytes())):
            with archive.open(name, "w", force_zip64=True) as record:
                record.write(content)
    data = bytearray(stream.getvalue())
    end = data.rindex(b"PK\5\6")
    count, size, place = struct.unpack_from("<HII", data, end + 10)
    record = struct.pack("<4sQHHIIQQQQ", b"PK\6\6", 44, 45, 45, 0, 0, count, count, size, place)
    locator = struct.pack("<4sIQI", b"PK\6\7", 0, end, 1)
    data[end + 8 : end + 20] = b"\xff" * 12
    (tmp_path / "net.pth").write_bytes(data[:end] + record + locator + data[end:])
    np.testing.assert_array_equal(read_torch_file(tmp_path / "net.pth")["x"], NUMBERS)


def test_a_directory_of_many_records_is_refused_by_its_count(tmp_path):
    end = struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, 65535, 65535, 0, 0, 0)
    record = struct.pack("<4sQHHIIQQQQ", b"PK\6\6", 44, 45, 45, 0, 0, 2**40, 2**40, 0, 0)
    locator = struct.pack("<4sIQI", b"PK\6\7", 0, 4, 1)
    (tmp_path / "net.pth").write_bytes(b"PK\3\4" + record + locator + end)
    with pytest.raises(ValueError, match=r"it has 1099511627776 records"):
        read_torch_file(tmp_path / "net.pth")


def test_what_is_no_regular_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "net.pth")
    with pytest.raises(ValueError, match="no regular file"):
        read_torch_file(tmp_path / "net.pth")
    (tmp_path / "zero.pth").symlink_to("/dev/zero")
    with pytest.raises(ValueError, match="no regular file"):
        read_torch_file(tmp_path / "zero.pth")


def safetensors(path, header, data=b""):
    content = header if isinstance(header, bytes) else repr(header).replace("'", '"').encode()
    path.write_bytes(struct.pack("<Q", len(content)) + content + data)
    return path


@pytest.mark.parametrize(("kind", "size"), [("F8_E4M3", 4), ("F8_E5M2", 4), ("F4", 2)])
def test_safetensors_of_eight_bits_are_refused_by_name_and_kind(tmp_path, kind, size):
    header = {"x.weight": {"dtype": kind, "shape": [4], "data_offsets": [0, size]}}
    path = safetensors(tmp_path / "net.safetensors", header, bytes(size))
    with pytest.raises(ValueError, match=rf"x.weight is of {kind}, which NumPy has not"):
        read_state_dict(path)


def test_a_header_of_safetensors_that_describes_no_network_is_refused(tmp_path):
    path = safetensors(tmp_path / "net.safetensors", b"{" + b" " * 2**24 + b"}")
    with pytest.raises(ValueError, match="describes no network"):
        read_state_dict(path)


@pytest.mark.parametrize(
    ("name", "array", "word"),
    [
        ("fc.weight", np.float32([[1, np.nan]]), "not finite"),
        ("fc.weight", np.float32([[np.inf, 1]]), "not finite"),
        ("fc.weight", np.float64([[1e300, 1]]), "not finite in float32"),
        ("fc.weight", np.complex64([[1, 2]]), "is of complex64"),
        ("fc.weight", np.uint8([[1, 2]]), "is of uint8"),
        ("fc.weight", np.array([[True, False]]), "is of bool"),
        ("bn1.running_var", np.float32([1, -1]), "a variance of -1.0, which is negative"),
    ],
)
def test_weights_that_no_network_has_are_refused_by_name(name, array, word):
    variables = {
        "params": {"fc": {"kernel": np.zeros((2, 1), np.float32)}},
        "batch_stats": {"conv1_norm": {"var": np.zeros(2, np.float32)}},
    }
    state = {"fc.weight": np.zeros((1, 2), np.float32), "bn1.running_var": np.ones(2, np.float32)}
    from_torch(state, variables)
    with pytest.raises(ValueError, match=f"{name} .*{word}"):
        from_torch({**state, name: array}, variables)


@pytest.mark.parametrize("ending", [".pth", ".pt", ".safetensors"])
def test_mutated_files_stay_within_the_budget_and_are_refused_in_one_line(tmp_path, ending):
    """Unless the byte that was changed says nothing; `make drills` has the long version."""
    path = tmp_path / f"net{ending}"
    write_weights(path)
    assert read_state_dict(path)
    command = [sys.executable, "-m", "benchmarks.damage", str(path), "300", "7"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    read, refused = map(int, done.stdout.split())
    assert read + refused == 300
    assert refused > 150


PEAK = """
import resource, sys
from nadaptor.interop import read_torch_file
for path in sys.argv[1:]:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        read_torch_file(path)
    except ValueError:
        pass
    print(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))
"""


def test_a_file_of_many_small_values_takes_four_times_its_size_and_256_mib_at_most(tmp_path):
    size, paths = 16 * MIB, []
    for i, part in enumerate((b"}", b"]", b"X\0\0\0\0", b"(K\x01K\x01t")):
        stream = b"\x80\x02" + part * (size // len(part)) + b"."
        paths.append(legacy(tmp_path / f"{i}.pth", stream))
    command = [sys.executable, "-c", PEAK, *map(str, paths)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    assert max(map(int, done.stdout.split())) < 4 * size + 256 * MIB
