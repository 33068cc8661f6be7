"""What says how arrays are stored, crafted: compared with the card before memory is taken."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
MIB = 2**20
# In a process of its own, whose peak of memory is that of these files.
ATTACK = r"""
import json, resource, sys, time, warnings, zlib
from pathlib import Path
import numpy as np
import orbax.checkpoint as ocp
from nadaptor.checkpoints.checkpoint import load_checkpoint, save_checkpoint

warnings.simplefilter("ignore")
path, arrays = Path(sys.argv[1]), {"params": {"count": np.arange(3, dtype=np.int32)}}
save_checkpoint(path, "ann", arrays, {"config": {}})
with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False)) as checkpointer:
    checkpointer.save(path / "arrays", args=ocp.args.PyTreeSave(arrays), force=True)
file = path / "arrays/params.count/.zarray"
good, piece = json.loads(file.read_text()), file.with_name("0").read_bytes()
np.testing.assert_array_equal(load_checkpoint(path, "ann")[0]["params"]["count"], np.arange(3))
crafted = [
    *({"shape": s} for s in ([4_000_000_000], [2**62], [3, 2**40], [-1], [], [0], "x", None)),
    *({"chunks": c} for c in ([4_000_000_000], [2**62], [0], [-3], [], "x", None)),
    *({"shape": [n], "chunks": [n]} for n in (4_000_000_000, 2**40)),
    *({"dtype": d} for d in ("<i8", "|V4000000000", "|S4000000000", "<f4", "x", 3)),
    *({"compressor": c} for c in ({"id": "x"}, {"id": "zlib", "level": 1}, {}, 1)),
    {"filters": [{"id": "delta"}]}, {"order": "x"}, {"zarr_format": 9}, {"fill_value": 7},
    {"dimension_separator": "/"}, {"more": "x" * 10**6},
    *({name: ...} for name in good),
]
started, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
read = refused = 0


def attempt():
    global read, refused
    try:
        found = load_checkpoint(path, "ann")[0]["params"]["count"]
        np.testing.assert_array_equal(found, arrays["params"]["count"])
        read += 1
    except ValueError as error:
        refused += 1
        assert len(str(error)) < 600 and str(error).isprintable(), error


for change in crafted:
    file.write_text(json.dumps({k: v for k, v in (good | change).items() if v is not ...}))
    attempt()
file.write_text("[" * 100_000)
attempt()
# A gigabyte in a piece that is to be of twelve bytes.
file.write_text(json.dumps(good | {"compressor": {"id": "zlib", "level": 1}}))
stream = zlib.compressobj()
zeros = bytes(2**24)
bomb = b"".join(stream.compress(zeros) for _ in range(64)) + stream.flush()
file.with_name("0").write_bytes(bomb)
attempt()
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print(read, refused, 1024 * peak, len(bomb), (time.monotonic() - started) / len(crafted))
"""


def test_crafted_metadata_is_refused_in_a_line_within_the_budget_or_changes_nothing(tmp_path):
    command = [sys.executable, "-c", ATTACK, str(tmp_path / "saved")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    read, refused, peak, size, seconds = map(float, done.stdout.split())
    assert refused > 30 and read + refused > 40
    assert peak < 4 * size + 256 * MIB
    assert seconds < 5
