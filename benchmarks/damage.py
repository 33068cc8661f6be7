"""Damages files and reads them: each gives the arrays that were written, or one line.

    python -m benchmarks.damage FILE COUNT SEED

mutates a file of weights so many times, under a limit on memory: four times its size and 256 MiB.
It prints how many were read and how many were refused, and fails where one was neither.
"""

import pickle
import random
import resource
import shutil
import struct
import sys
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

MIB = 2**20
# What a reader may raise: the errors that a command prints as one line.
_LONGEST, _SECONDS = 600, 5
HOW = ("flip", "cut", "empty", "zeros", "another", "remove", "folder", "longer")


def mutate(content: bytes, chosen: random.Random) -> bytes:
    """Returns some bytes changed in one to six places."""
    data = bytearray(content)
    for _ in range(chosen.randint(1, 6)):
        how, at = chosen.random(), chosen.randrange(max(len(data), 1))
        if how < 0.6:
            data[at : at + 1] = bytes([chosen.randrange(256)])
        elif how < 0.7:
            del data[at : at + chosen.randint(1, 9)]
        elif how < 0.8:
            data[at:at] = data[at : at + chosen.randint(1, 30)]
        else:
            data[at : at + 4] = chosen.choice([b"\xff" * 4, b"\0" * 4, b"\xff\xff\xff\x7f"])
    return bytes(data)


def read_mutations(path: Path, count: int, seed: int) -> Counter[str]:
    """Reads a file of weights, mutated so many times; returns how many were read and refused."""
    from nadaptor.interop import read_state_dict

    content, chosen, found = path.read_bytes(), random.Random(seed), Counter[str]()
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + 4 * len(content) + 256 * MIB,) * 2)
    for _ in range(count):
        path.write_bytes(mutate(content, chosen))
        started = time.perf_counter()
        try:
            found["read"] += bool(read_state_dict(path))
        except ValueError as error:
            found["refused"] += 1
            check_line(error, "cannot read")
        assert time.perf_counter() - started < _SECONDS
    path.write_bytes(content)
    return found


def write_weights(path: Path) -> None:
    """Writes a small file of weights, as torch or as safetensors does."""
    import numpy as np
    from safetensors.numpy import save

    if path.suffix == ".safetensors":
        arrays = {f"layer{i}.weight": np.arange(12, dtype=np.float32) + i for i in range(3)}
        path.write_bytes(save(arrays))
    else:
        write_torch(path, np.arange(3, dtype=np.float32))


def write_torch(path: Path, numbers: Any) -> None:
    """Writes one array as torch does, `x` of float32, without torch; a `.pt` as before 1.6."""
    storage = (
        b"(X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\0000X\3\0\0\0cpuK"
        + bytes([len(numbers)]) + b"tQ"
    )  # fmt: skip
    stream = (
        b"\x80\2}X\1\0\0\0xctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"K\0K"
        + bytes([len(numbers)]) + b"\x85K\1\x85\x89ccollections\nOrderedDict\n)RtRs."
    )  # fmt: skip
    if path.suffix == ".pt":
        parts = 0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}
        head = b"".join(pickle.dumps(part, protocol=2) for part in parts)
        held = struct.pack("<q", len(numbers)) + numbers.tobytes()
        path.write_bytes(head + stream + pickle.dumps(["0"], protocol=2) + held)
        return
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("net/data.pkl", stream)
        archive.writestr("net/data/0", numbers.tobytes())


def check_line(error: Exception, start: str = "") -> None:
    """Checks that an error is one short line that a terminal only shows."""
    text = str(error)
    assert text.startswith(start), text
    assert len(text) < _LONGEST, text
    assert text.isprintable(), text


def readers(prepared: Path) -> Mapping[str, tuple[Path, Callable[[Path], list[dict[str, str]]]]]:
    """What can be damaged: a folder of each kind, and what reads it to digests of its arrays."""
    from nadaptor.checkpoints.checkpoint import digests, load_checkpoint
    from nadaptor.conversion.convert import load_snn

    def trained(path: Path) -> list[dict[str, str]]:
        return [digests(load_checkpoint(path, "ann")[0])]

    def spiking(path: Path) -> list[dict[str, str]]:
        return [digests(load_snn(path)[1])]

    run = prepared / "digits_na"
    return {
        "checkpoint": (run / "checkpoint", trained),
        "spiking network": (run / "snn", spiking),
        "snapshots": (run / "snapshots", _snapshots_of(run)),
    }


def _snapshots_of(run: Path) -> Callable[[Path], list[dict[str, str]]]:
    """What restores the latest good snapshot of a run, as training does."""
    import jax
    import numpy as np

    from nadaptor.checkpoints.checkpoint import digests, load_card
    from nadaptor.checkpoints.snapshots import Snapshots
    from nadaptor.configs.config import from_json
    from nadaptor.training.options import DEFAULT
    from nadaptor.training.run import open_run, state_shape

    card = load_card(run / "checkpoint", "ann")
    known = {name: card[name] for name in ("config", "data")}
    like = state_shape(open_run(from_json(card["config"]), DEFAULT))

    def read(path: Path) -> list[dict[str, str]]:
        snapshots = Snapshots(path, 2, known)
        try:
            found = snapshots.latest(like)
        finally:
            snapshots.close()
        if found is None:
            return []
        host = jax.tree.map(np.asarray, found.state)
        return [{"step": str(found.step), **digests(host)}]

    return read


def damage(folder: Path, chosen: random.Random) -> str:
    """Damages one file in a folder; returns how."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    path, how = chosen.choice(files), chosen.choice(HOW)
    content = path.read_bytes()
    path.unlink()
    at = chosen.randrange(max(len(content), 1))
    if how == "folder":
        path.mkdir()
    elif how != "remove":
        flipped = bytes([content[at] ^ 1 << chosen.randrange(8)]) if content else b"\0"
        path.write_bytes({
            "flip": content[:at] + flipped + content[at + 1 :],
            "cut": content[:at],
            "empty": b"",
            "zeros": b"\0" * len(content),
            "another": chosen.choice([f for f in files if f != path]).read_bytes(),
            "longer": content + chosen.randbytes(100),
        }[how])  # fmt: skip
    return how


def read_damaged(kind: str, prepared: Path, scratch: Path, count: int, seed: int) -> dict[str, Any]:
    """Damages a folder so many times; how often it was read whole, and refused, and what was wrong.

    Args:
        kind: of `readers`.
        prepared: folder of a run that is as it was written.
        scratch: folder for copies.
        count: of damaged files.
        seed: of the damage.
    """
    from nadaptor.errors import RunError

    source, read = readers(prepared)[kind]
    chosen, found, wrong = random.Random(seed), Counter[str](), []
    whole = _whole(kind, source, read, scratch)
    for _ in range(count):
        copy = _copied(source, scratch)
        how = damage(copy, chosen)
        try:
            if all(arrays in whole for arrays in read(copy)):
                found["read"] += 1
            else:
                wrong.append(f"{how}: other arrays")
        except (ValueError, RunError) as error:
            found["refused"] += 1
            check_line(error)
        except Exception as error:
            wrong.append(f"{how}: {type(error).__name__}: {str(error)[:200]}")
    return {"seed": seed, "read": found["read"], "refused": found["refused"], "wrong": wrong}


def _whole(kind: str, source: Path, read: Any, scratch: Path) -> list[dict[str, str]]:
    """What may be read: of snapshots, those that are older as well."""
    copy, whole = _copied(source, scratch), []
    steps = sorted(copy.iterdir(), key=lambda p: -int(p.name)) if kind == "snapshots" else [None]
    for newest in steps:
        whole += read(copy)
        if newest:
            shutil.rmtree(newest)
    return whole


def _copied(source: Path, scratch: Path) -> Path:
    copy = scratch / source.name
    shutil.rmtree(scratch, ignore_errors=True)
    shutil.copytree(source, copy)
    return copy


if __name__ == "__main__":
    seen = read_mutations(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
    print(seen["read"], seen["refused"])
