"""Kills runs at random moments, and checks that what they end with is the same to the bit.

    python benchmarks/drills.py --kills 200 --out drills

A drill trains a small network through `train.py`, kills it by a random signal after a random time,
starts the same command again, and so on until it finishes; then the digests of its checkpoint are
compared with those of a run that nobody killed. Every drill is one line in `OUT/drills.jsonl`: the
same command goes on where it was stopped. The table is written to `OUT/drills.md`.
"""

import argparse
import collections
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
SIZES = ["--model", "digits_resnet8", "--epochs", "3", "--snapshot-steps", "5"]
# Of a run that resumes: how it may end, by the signal that it was sent.
CODES = {signal.SIGKILL: {-9}, **{s: {128 + s, -s} for s in SIGNALS[1:]}}


def start(workdir: Path, devices: int) -> subprocess.Popen[str]:
    """Starts the run in a folder, on so many virtual devices."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    env = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "train.py", "digits_relu", *SIZES, "--num-devices", str(devices)]
    return subprocess.Popen(
        [*command, "--workdir", str(workdir)], cwd=ROOT, env=env, text=True, stdout=-1, stderr=-1
    )


def digests(workdir: Path) -> dict[str, str]:
    """The digests of the checkpoint that a run ended with."""
    return json.loads((workdir / "digits_relu/checkpoint/card.json").read_text())["digests"]


def whole(workdir: Path, devices: int) -> tuple[dict[str, str], float]:
    """The digests of the run that nobody kills, and the seconds that it takes."""
    started = time.monotonic()
    if not (workdir / "digits_relu/checkpoint").exists():
        process = start(workdir, devices)
        _, err = process.communicate()
        if process.returncode:
            raise SystemExit(err)
    return digests(workdir), max(time.monotonic() - started, 8.0)


def drill(workdir: Path, devices: int, longest: float, seed: int) -> dict[str, Any]:
    """Kills a run until it is finished; how often, by what, and what went wrong."""
    shutil.rmtree(workdir, ignore_errors=True)
    chosen, kills, wrong = random.Random(seed), collections.Counter[str](), []
    for _ in range(50):
        process = start(workdir, devices)
        sent = chosen.choice(SIGNALS)
        try:
            _, err = process.communicate(timeout=chosen.uniform(2, longest))
        except subprocess.TimeoutExpired:
            process.send_signal(sent)
            _, err = process.communicate(timeout=120)
            kills[sent.name] += process.returncode != 0
            if process.returncode not in {0, *CODES[sent]}:
                wrong.append(f"{sent.name}: code {process.returncode}")
        if "Traceback" in err:
            wrong.append(err.strip().splitlines()[-1])
        if process.returncode == 0:
            break
        # A run must get on however it is killed: the time until the next kill grows.
        longest *= 1.05
    return {"seed": seed, "devices": devices, "kills": dict(kills), "wrong": wrong}


def main() -> None:
    """Runs drills until there are as many kills as asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--out", type=Path, default=Path("drills"))
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    record = asked.out / "drills.jsonl"
    rows = [json.loads(x) for x in record.read_text().splitlines()] if record.exists() else []
    while sum(sum(row["kills"].values()) for row in rows) < asked.kills:
        seed = len(rows)
        devices = (1, 4)[seed % 2]
        wanted, seconds = whole(asked.out / f"whole-{devices}", devices)
        row = drill(asked.out / "killed", devices, seconds, seed)
        finished = (asked.out / "killed/digits_relu/checkpoint").exists()
        row["identical"] = finished and digests(asked.out / "killed") == wanted
        rows.append(row)
        with open(record, "a") as file:
            file.write(json.dumps(row) + "\n")
        print(row, flush=True)
        write_table(asked.out / "drills.md", rows)


def write_table(path: Path, rows: list[dict[str, Any]]) -> None:
    """Writes what was seen: kills, runs, and how many of them ended the same."""
    lines = [
        "| devices | kills | runs | identical to the bit | went wrong |",
        "|---|---|---|---|---|",
    ]
    for devices in sorted({row["devices"] for row in rows}):
        mine = [row for row in rows if row["devices"] == devices]
        kills = sum((collections.Counter(row["kills"]) for row in mine), collections.Counter())
        said = ", ".join(f"{count} {name}" for name, count in sorted(kills.items()))
        same, wrong = sum(row["identical"] for row in mine), sum(len(row["wrong"]) for row in mine)
        lines.append(f"| {devices} | {kills.total()} ({said}) | {len(mine)} | {same} | {wrong} |")
    where = f"{os.cpu_count()}-core {platform.machine()} CPU"
    path.write_text("\n".join([*lines, "", f"Seen on a {where}."]) + "\n")


if __name__ == "__main__":
    main()
