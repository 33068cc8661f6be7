"""Kills commands, damages files and mutates weights, and writes what came of it as a table.

    python -m benchmarks.drills --kills 200 --damaged 1000 --mutated 50000

Each piece is one line of OUT/drills.jsonl: the same command goes on where it was stopped, and a
larger number adds to what is there. What is checked is said in docs/drills.md, which the table is
written to.
"""

import argparse
import collections
import functools
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import damage, kills
from nadaptor._provenance import revision

ROOT = Path(__file__).parents[1]
DAMAGED = ("checkpoint", "spiking network", "snapshots")
LAYOUTS = (".pth", ".pt", ".safetensors")
PIECE = {"damaged": 50, "mutated": 2500}
Row = dict[str, Any]
START, END = "<!-- table -->\n", "<!-- end of table -->\n"


class Record:
    """What was seen so far, a line a piece."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[Row] = []
        if path.exists():
            self.rows = [json.loads(line) for line in path.read_text().splitlines()]

    def of(self, kind: str) -> list[Row]:
        """The pieces of one kind."""
        return [row for row in self.rows if row["kind"] == kind]

    def add(self, row: Row) -> None:
        """Keeps a piece, with the commit that it is of: a later one may go on."""
        row |= {"commit": revision()}
        self.rows.append(row)
        with open(self.path, "a") as file:
            file.write(json.dumps(row) + "\n")
        print(row, flush=True)


def prepare(out: Path) -> Path:
    """Makes a trained and a converted network, which some drills start from."""
    prepared = out / "prepared"
    for i, words in enumerate(
        (kills.chain(prepared), ["convert", str(prepared / "digits_na/checkpoint")])
    ):
        made = prepared / "digits_na" / ("checkpoint", "snn")[i]
        if not made.exists():
            kills.finish(kills.Door(lambda _, words=words: [words]), out / f"prepare-{i}")
    return prepared


def drill_kills(asked: argparse.Namespace, record: Record) -> None:
    """Kills door after door, the one with the fewest kills next, until there are enough."""
    doors = kills.doors(prepare(asked.out))
    names, past = asked.doors or doors, record.of("kill")
    done = {name: [row for row in past if row["what"] == name] for name in names}
    while _kills(record.of("kill")) < asked.kills:
        seed = len(record.of("kill"))
        name = min(done, key=lambda name: (_kills(done[name]), len(done[name])))
        whole, seconds = _whole(asked.out, name, doors[name])
        folder = asked.out / "killed"
        row = kills.drill(doors[name], folder, seconds, seed)
        row |= {
            "identical": kills.result(folder) == kills.result(whole),
            "litter": kills.litter(folder),
        }
        record.add({"kind": "kill", "what": name, **row})
        done[name].append(row)
        write_table(asked.table, record)


def _kills(rows: Sequence[Row]) -> int:
    return sum(len(row["kills"]) for row in rows)


def _whole(out: Path, name: str, door: kills.Door) -> tuple[Path, float]:
    """What a door ends with that nobody kills, and the seconds that it takes of the processor."""
    whole = out / "whole" / name.replace(" ", "-").replace(",", "")
    if not whole.exists():
        # Twice: the first one compiles, for all that come after it.
        for _ in range(2):
            shutil.rmtree(whole.with_suffix(".part"), ignore_errors=True)
            seconds = kills.finish(door, whole.with_suffix(".part"))
        whole.with_suffix(".seconds").write_text(str(seconds))
        whole.with_suffix(".part").rename(whole)
    return whole, float(whole.with_suffix(".seconds").read_text())


def drill_damage(asked: argparse.Namespace, record: Record) -> None:
    """Damages files, until there are as many as asked for; each piece in a process of its own."""
    prepared = prepare(asked.out)
    while (done := _damaged(record.of("damaged"))) < asked.damaged:
        seed = len(record.of("damaged"))
        kind, count = DAMAGED[seed % len(DAMAGED)], min(PIECE["damaged"], asked.damaged - done)
        words = [str(x) for x in (kind, prepared, asked.out / "damaged", count, seed)]
        code = (
            "import json, sys; from pathlib import Path; from benchmarks.damage import *\n"
            "kind, *paths, count, seed = sys.argv[1:]\n"
            "print(json.dumps(read_damaged(kind, *map(Path, paths), int(count), int(seed))))"
        )
        lines = _python(["-c", code, *words]).splitlines()
        record.add({"kind": "damaged", "what": kind, **json.loads(lines[-1])})
        write_table(asked.table, record)


def drill_mutations(asked: argparse.Namespace, record: Record) -> None:
    """Mutates files of weights, until there are as many as asked for."""
    while _damaged(record.of("mutated")) < asked.mutated:
        seed = len(record.of("mutated"))
        layout = LAYOUTS[seed % len(LAYOUTS)]
        path = asked.out / f"weights{layout}"
        damage.write_weights(path)
        words = ["-m", "benchmarks.damage", str(path), str(PIECE["mutated"]), str(seed)]
        read, refused = map(int, _python(words).split())
        row = {"seed": seed, "read": read, "refused": refused, "wrong": []}
        record.add({"kind": "mutated", "what": layout, **row})
        write_table(asked.table, record)


def _python(words: Sequence[str]) -> str:
    done = subprocess.run(
        [sys.executable, *words], cwd=ROOT, capture_output=True, text=True, check=False,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{words[:3]} ended with {done.returncode}: {done.stderr[-2000:]}")
    return done.stdout


def _damaged(rows: Sequence[Row]) -> int:
    return sum(row["read"] + row["refused"] + len(row["wrong"]) for row in rows)


def write_table(path: Path, record: Record) -> None:
    """Puts what was seen in the place of the table in a page."""
    lines = [
        "| command | kills | by | runs | identical to the bit | went wrong |",
        "|---|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(row["what"] for row in record.of("kill")):
        lines.append(_kill_line(name, [r for r in record.of("kill") if r["what"] == name]))
    lines.append(_kill_line("all", record.of("kill")))
    lines += ["", "| file | damaged | read whole | refused | went wrong |", "|---|---|---|---|---|"]
    for kind in ("damaged", "mutated"):
        for name in dict.fromkeys(row["what"] for row in record.of(kind)):
            lines.append(_damage_line(name, [r for r in record.of(kind) if r["what"] == name]))
    before, rest = path.read_text().split(START)
    after = rest.split(END)[1]
    commits = " and ".join(dict.fromkeys(str(row["commit"]) for row in record.rows))
    seen = f"Seen on {_day_and_machine()}, commit {commits}."
    path.write_text(f"{before}{START}\n" + "\n".join(lines) + f"\n\n{seen}\n\n{END}{after}")


def _kill_line(name: str, rows: Sequence[Row]) -> str:
    signals = collections.Counter(k for row in rows for k in row["kills"])
    moments = collections.Counter(m for row in rows for m in row["moments"])
    said = ", ".join(f"{count} {k}" for k, count in sorted(signals.items()))
    same = sum(row["identical"] for row in rows)
    where = f"; {moments['call']} in a system call" if moments["call"] else ""
    return f"| {name} | {signals.total()} | {said}{where} | {len(rows)} | {same} | {_wrong(rows)} |"


def _damage_line(name: str, rows: Sequence[Row]) -> str:
    read, refused = (sum(row[k] for row in rows) for k in ("read", "refused"))
    return f"| {name} | {_damaged(rows)} | {read} | {refused} | {_wrong(rows)} |"


def _wrong(rows: Sequence[Row]) -> int:
    return sum(len(row["wrong"]) + len(row.get("litter", ())) for row in rows)


@functools.cache
def _day_and_machine() -> str:
    # In a process of its own: this one forks, and must not have started jax.
    made = json.loads(_python(["-c", "import json; from nadaptor._provenance import provenance\n"
                               "print(json.dumps(provenance()))"]))  # fmt: skip
    return f"{made['date']} on a {made['machine']}"


def main() -> None:
    """Runs what is still to be run of each kind."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=200, help="in all")
    parser.add_argument("--damaged", type=int, default=1000, help="files, in all")
    parser.add_argument("--mutated", type=int, default=50_000, help="files of weights, in all")
    parser.add_argument("--doors", nargs="*", help="to kill only these")
    parser.add_argument("--out", type=Path, default=Path("drills"), help="folder for its work")
    parser.add_argument("--table", type=Path, default=ROOT / "docs" / "drills.md")
    asked = parser.parse_args()
    asked.out = asked.out.resolve()
    asked.out.mkdir(parents=True, exist_ok=True)
    # What is compiled serves all that are killed.
    os.environ["XDG_CACHE_HOME"] = str(asked.out / "cache")
    os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)
    record = Record(asked.out / "drills.jsonl")
    multiprocessing.get_context("forkserver").set_forkserver_preload(kills.PRELOADED)
    drill_mutations(asked, record)
    drill_damage(asked, record)
    drill_kills(asked, record)
    write_table(asked.table, Record(record.path))


if __name__ == "__main__":
    main()
