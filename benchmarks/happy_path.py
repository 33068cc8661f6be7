"""What checks cost where nothing goes wrong: this checkout against an earlier one.

    git worktree add BEFORE 6f594bb
    python -m benchmarks.happy_path BEFORE

counts operations that jax hands to the compiler and modules that are imported at the start, and
times the start of a command and the save of a checkpoint in pairs. Commit 6f594bb is the last one
before files, signals and numbers were trusted less.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.timing import median, ratio
from nadaptor._provenance import provenance
from nadaptor.reports.tables import markdown

ROOT = Path(__file__).parents[1]
# Programs for both checkouts: a name is taken from where either has it.
OPERATIONS = """
import json, re
import jax, jax.numpy as jnp
import nadaptor
from nadaptor.training import get_config
from nadaptor.training.options import Options
from nadaptor.training.run import open_run, state_shape
from nadaptor.training.step import build_step

def count(f, *shapes):
    text = jax.jit(f).lower(*shapes).as_text()
    found = re.findall(r"= \\"?stablehlo\\.([a-z_]+)", text)
    return {name: found.count(name) for name in found}

def network(x, w):
    return nadaptor.lsq(nadaptor.lsq(x @ w, 0.5, 2) @ w, 0.5, 2) @ w

def noisy(x, w, scale, key):
    return nadaptor.noise_adaptor(key, x @ w, scale, 2).sum()

run = open_run(get_config("digits_na"), Options(num_devices=1))
step = build_step(run.config, run.images.spec, run.total_steps)
images = jax.ShapeDtypeStruct((64, *run.images.spec.image_shape), jnp.uint8)
labels = jax.ShapeDtypeStruct((64,), jnp.int32)
x, w = jax.ShapeDtypeStruct((8, 16), jnp.float32), jax.ShapeDtypeStruct((16, 16), jnp.float32)
simulated = lambda x, w: nadaptor.simulate(network, x, w, num_steps=8).outputs
print(json.dumps({
    "a training step of digits_na": count(step, state_shape(run), images, labels, run.keys.steps),
    "the adaptor and its gradient": count(jax.grad(noisy, (1, 2)), x, w, 0.5, jax.random.key(0)),
    "a simulation of two layers": count(simulated, x, w),
}))
"""
SAVE = """
import pathlib, sys, tempfile, time
import numpy as np
try:
    from nadaptor.checkpoints.checkpoint import save_checkpoint
except ImportError:
    from nadaptor.training.checkpoints import save_checkpoint
arrays = {str(i): np.random.default_rng(i).random((512, 512), np.float32) for i in range(12)}
with tempfile.TemporaryDirectory() as folder:
    save_checkpoint(pathlib.Path(folder, "warm"), "ann", arrays, {"config": {}})
    began = time.process_time()
    save_checkpoint(pathlib.Path(folder, "timed"), "ann", arrays, {"config": {}})
    print(time.process_time() - began)
"""
IMPORTS = "import sys, nadaptor; print(*{m.partition('.')[0] for m in sys.modules})"
START = "import time, nadaptor; print(time.process_time())"
# All that a command imports before it works.
COMMAND = """
import runpy, sys, time
sys.argv = ["train.py", "digits_na", "--help"]
try:
    runpy.run_path("train.py", run_name="__main__")
finally:
    print(time.process_time())
"""
PROGRAMS = {"import nadaptor": START, "train.py --help": COMMAND, "save of 12.6 MB": SAVE}


def child(root: Path, program: str) -> str:
    """Returns the last line of a program that runs on the package of a checkout."""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    return done.stdout.splitlines()[-1]


def operations(before: Path) -> list[dict[str, str]]:
    """The rows of the table of operations."""
    earlier, now = (json.loads(child(root, OPERATIONS)) for root in (before, ROOT))
    rows = []
    for program, of_now in now.items():
        was = earlier[program]
        other = sorted(k for k in was | of_now if was.get(k, 0) != of_now.get(k, 0))
        changes = ", ".join(f"{k} {was.get(k, 0)} -> {of_now.get(k, 0)}" for k in other)
        totals = str(sum(was.values())), str(sum(of_now.values()))
        rows.append(dict(zip(("program", "before", "now"), (program, *totals), strict=True)))
        rows[-1]["changed"] = changes or "none"
    return rows


def timings(before: Path, pairs: int) -> list[dict[str, str]]:
    """The rows of the table of times: processor seconds, of pairs that ran in turn."""
    rows = []
    for what, program in PROGRAMS.items():
        seconds = times(before, program, pairs)
        medians = (f"{median(seconds[name]):.3f} s" for name in ("before", "now"))
        row = dict(zip(("what", "before", "now"), (what, *medians), strict=True))
        rows.append({**row, "ratio": f"{ratio(seconds['now'], seconds['before']):.3f}"})
    return rows


def times(before: Path, program: str, pairs: int) -> dict[str, list[float]]:
    """Seconds that a program prints of itself, in pairs: the order alternates."""
    found: dict[str, list[float]] = {"before": [], "now": []}
    for i in range(pairs + 1):
        for name, root in [("before", before), ("now", ROOT)][:: (1, -1)[i % 2]]:
            found[name].append(float(child(root, program)))
    # The first pair fills the caches.
    return {name: seconds[1:] for name, seconds in found.items()}


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("before", type=Path, help="a checkout of the earlier commit")
    parser.add_argument("--pairs", type=int, default=15)
    asked = parser.parse_args()
    earlier, now = (set(child(root, IMPORTS).split()) for root in (asked.before, ROOT))
    print(f"imported now and not before: {sorted(now - earlier) or 'nothing'}")
    print(f"imported before and not now: {sorted(earlier - now) or 'nothing'}")
    print(markdown(operations(asked.before)))
    print(markdown(timings(asked.before, asked.pairs)))
    made: dict[str, Any] = provenance()
    print(f"Seen on {made['date']} on a {made['machine']}, commit {made['commit']}.")


if __name__ == "__main__":
    main()
