"""Kills a command until it is finished, and compares what it ends with to what nobody killed.

A command is started by forking a server that has imported its packages, and is from then on a
process like any other. It is killed by a signal after a random share of the processor's time that
it takes, when its folder has changed a random number of times, or, where strace is to be had,
inside a system call that changes files.
"""

import contextlib
import dataclasses
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# How a process may end that was sent a signal: of itself, by the signal, or before it came.
CODES = {signal.SIGKILL: {0, -9}, **{s: {0, 128 + s, -s} for s in SIGNALS[1:]}}
CALLS = "rename,renameat,renameat2,fsync,mkdir,mkdirat,unlink,unlinkat"
PRELOADED = [
    "benchmarks.kills", "nadaptor.cli.train", "nadaptor.cli.convert", "nadaptor.cli.study",
    "nadaptor.cli.finetune", "flax.linen", "optax", "orbax.checkpoint", "sklearn.datasets",
]  # fmt: skip
# Two steps an epoch on a network of 4 features: what is drilled is what lies around them.
NETWORK = ["--model", "digits_resnet8", "--width", "4", "--train-size", "128"]
TRAIN = ["train", "digits_relu", *NETWORK, "--epochs", "4", "--snapshot-steps", "1"]
STUDY = [
    "study", "digits", "--methods", "lsq", "noise_adaptor", "--levels", "1", "--seeds", "1",
    "--corrections", "none", "offset-spikes", "--epochs", "2", "--model", "digits_resnet8",
    "--width", "4", "--train-size", "128", "--num-steps", "4", "--num-images", "32",
]  # fmt: skip
_CONTEXT = multiprocessing.get_context("forkserver")
# Until a command is taken to hang: what others leave a drill of the machine may be little.
PATIENCE = 3600
# What XLA says of itself on a machine that has much else to do.
_SLOW = re.compile(r"E\d{4} .*slow_operation_alarm.*\n+(?:E\d{4}.*\n+)*\*+\n.*\n\*+\n")


@dataclasses.dataclass(frozen=True)
class Door:
    """One way in: the commands that it starts, and what they are to end with."""

    commands: Callable[[Path], list[list[str]]]  # the words of each process, for a folder
    devices: int = 1


def two_processes(folder: Path) -> list[list[str]]:
    """The words of two processes of one run."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    one = [*TRAIN, "--workdir", str(folder), "--coordinator", f"127.0.0.1:{port}"]
    return [[*one, "--num-processes", "2", "--process-id", str(i)] for i in range(2)]


def doors(prepared: Path) -> Mapping[str, Door]:
    """All doors, by name; `prepared` holds a trained and a converted network for some of them."""
    trained, spiking = (str(prepared / "digits_na" / name) for name in ("checkpoint", "snn"))
    tuned = ["--epochs", "1", "--num-steps", "2", "--batch-size", "64"]
    return {
        "train, one device": Door(lambda to: [[*TRAIN, "--workdir", str(to)]]),
        "train, four devices": Door(
            lambda to: [[*TRAIN, "--num-devices", "4", "--workdir", str(to)]], devices=4
        ),
        "train, two processes": Door(two_processes),
        "convert": Door(lambda to: [["convert", trained, "--out", str(to / "snn")]]),
        "finetune": Door(lambda to: [["finetune", spiking, *tuned, "--out", str(to / "tuned")]]),
        "study": Door(lambda to: [[*STUDY, "--workdir", str(to)]]),
        "save": Door(lambda to: [["save", str(to)]]),
    }


def chain(folder: Path) -> list[str]:
    """The words that train a quantized network after its parent."""
    return ["train", "digits_na", *NETWORK, "--epochs", "2", "--workdir", str(folder)]


def run(words: Sequence[str], devices: int, log: Path, ready: Any = None) -> None:
    """Runs a command in this process, as the console script does, its output into a file."""
    import jax

    from nadaptor.cli.command import run_command
    from nadaptor.cli.main import run as run_words

    # Ignored by what a shell starts in the background.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    if ready is not None:
        ready.wait()
    jax.config.update("jax_platforms", "cpu")
    # A command makes as many as there are cores where nothing says how many.
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    import sys

    sys.argv = ["nadaptor", *words]
    run_command(_save if words[0] == "save" else run_words)


def _save(words: Sequence[str]) -> None:
    """Saves checkpoint after checkpoint, those that are not there yet."""
    import numpy as np

    from nadaptor.checkpoints.checkpoint import save_checkpoint

    for i in range(40):
        if not (path := Path(words[1], str(i))).exists():
            arrays = {"params": {"kernel": np.full((64, 64), i, np.float32)}}
            save_checkpoint(path, "ann", arrays, {"config": {"name": str(i)}})


def result(folder: Path) -> dict[str, Any]:
    """All that a folder holds and that no kill may change: digests of arrays, and figures."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*.json")):
        card = json.loads(path.read_bytes())
        name = str(path.relative_to(folder))
        if path.name == "card.json":
            found[name] = card["digests"]
        elif path.parent.parent.name == "cells":
            found[name] = {k: v for k, v in card.items() if k not in ("made", "card_digest")}
    for path in sorted(folder.rglob("metrics.jsonl")):
        rows = map(json.loads, path.read_text().splitlines())
        kept = [{k: v for k, v in row.items() if "second" not in k} for row in rows]
        found[str(path.relative_to(folder))] = kept
    return found


def litter(folder: Path) -> list[str]:
    """Names of what a killed process has left in a folder for good."""
    wrong = re.compile(r"\..*(\.part|-[a-z0-9_]{8}|\.lock)|.*orbax-checkpoint-tmp.*")
    return [str(p.relative_to(folder)) for p in folder.rglob("*") if wrong.fullmatch(p.name)]


def start(door: Door, folder: Path, held: bool = False) -> list[tuple[Any, Path, Any]]:
    """Starts the processes of a door; each with its log, and what lets it go where it is held."""
    started = []
    for i, words in enumerate(door.commands(folder)):
        ready = _CONTEXT.Event() if held else None
        log = folder.with_name(f"{folder.name}-{i}.log")
        process = _CONTEXT.Process(target=run, args=(words, door.devices, log, ready))
        process.start()
        started.append((process, log, ready))
    return started


def finish(door: Door, folder: Path) -> float:
    """Runs a door that nobody kills; returns the processor's seconds of its first process."""
    folder.mkdir(parents=True, exist_ok=True)
    started, seconds = start(door, folder), 0.0
    while started[0][0].is_alive():
        time.sleep(0.02)
        seconds = max(seconds, _cpu_seconds(started[0][0]))
    for process, log, _ in started:
        process.join()
        if process.exitcode:
            raise SystemExit(f"{log}: {log.read_text()}")
    return seconds


def _cpu_seconds(process: Any) -> float:
    """What a process has taken of the processor; 0 where it has ended."""
    try:
        fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def drill(door: Door, folder: Path, seconds: float, seed: int) -> dict[str, Any]:
    """Kills a door until it is finished: how often, by what, when, and what went wrong.

    Args:
        door: what to start.
        folder: for its work; what is in it is removed.
        seconds: of the processor, that it takes when nobody kills it.
        seed: of the kills.
    """
    began = time.monotonic()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    chosen, kills, moments, wrong = random.Random(seed), [], [], []
    moments_known = ["time", "change", *["call"] * bool(shutil.which("strace"))]
    wanted = chosen.randint(2, 10)
    for attempt in range(60):
        # A command that does not resume would never end: so in the end it is killed no more.
        late = len(kills) >= wanted or attempt >= 2 * wanted
        moment = "never" if late else chosen.choice(moments_known)
        sent = signal.SIGKILL if moment == "call" else chosen.choice(SIGNALS)
        started = start(door, folder, held=moment == "call")
        victims = _victims(started, moment, chosen)
        with _killer(moment, folder, started, victims, chosen, seconds) as wait:
            wait()
            for process in victims:
                if moment in ("time", "change") and process.is_alive():
                    os.kill(process.pid, sent)
            codes = [_code(process, wrong) for process, _, _ in started]
        for process, log, _ in started:
            killed = process in victims
            # To the processes that are not killed jax passes the word on as SIGTERM.
            allowed = CODES[sent] if killed else {0, 1, 143, *CODES[sent]}
            allowed = {*allowed, 2} if _is_made(log) else allowed
            wrong += _what_is_wrong(process.exitcode, allowed, log, folder)
            if killed and process.exitcode in CODES[sent] - {0}:
                kills.append(sent.name)
                moments.append(moment)
        if not any(codes) or _is_made(started[0][1]):
            break
    else:
        wrong.append("it never ended")
    taken = round(time.monotonic() - began, 1)
    return {"seed": seed, "kills": kills, "moments": moments, "wrong": wrong, "seconds": taken}


def _victims(started: Sequence[Any], moment: str, chosen: random.Random) -> list[Any]:
    """The processes to kill: of several, mostly all, as where a machine room is preempted."""
    processes = [process for process, _, _ in started]
    every = moment != "call" and chosen.random() < 0.7
    return processes if every else [chosen.choice(processes)]


def _code(process: Any, wrong: list[str]) -> int | None:
    process.join(PATIENCE)
    if process.is_alive():
        wrong.append(f"still there after {PATIENCE} s")
        process.kill()
        process.join()
    return process.exitcode


def _is_made(log: Path) -> bool:
    """Whether a command has found that it was killed after its work was in its place."""
    return "exists already" in log.read_text(errors="replace")


def _what_is_wrong(code: int | None, allowed: set[int], log: Path, folder: Path) -> list[str]:
    """What a process did that it must not: its code, what it printed, and whether that is true."""
    text = _SLOW.sub("", log.read_text(errors="replace"))
    wrong = [] if code in allowed else [f"code {code}: {text[-200:]}"]
    # A command that has done its work may say what came of it.
    much = code != 0 and len(text.splitlines()) > 12 + text.count("\nlsq_p") * 9
    if "Traceback" in text or much:
        wrong.append(f"printed {len(text.splitlines())} lines: {text[-200:]}")
    for step in re.findall(r"told to end after (\d+) steps?, which (?:are|is) saved", text):
        if not list(folder.rglob(f"snapshots/{step}")):
            wrong.append(f"step {step} is said to be saved")
    return wrong


@contextlib.contextmanager
def _killer(
    moment: str,
    folder: Path,
    started: Sequence[Any],
    victims: Sequence[Any],
    chosen: random.Random,
    seconds: float,
) -> Iterator[Callable[[], None]]:
    """Yields what waits for the moment of a kill, or until all have ended."""
    if moment == "call":
        number = chosen.randint(1, 4)
        inject = [f"-einject={CALLS}:signal=SIGKILL:when={number}", f"-etrace={CALLS}"]
        command = ["strace", "-f", "-p", str(victims[0].pid), "-o", os.devnull, *inject]
        tracer = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert tracer.stderr is not None
        tracer.stderr.readline()  # that it is attached
        for _, _, held in started:
            held.set()
        yield lambda: None
        tracer.communicate()
        return
    share = chosen.uniform(0, seconds) if moment == "time" else 0.0
    changes = chosen.randint(1, 6) if moment == "change" else 0
    yield lambda: _wait(folder, started, changes, share if moment != "never" else float("inf"))


def _wait(folder: Path, started: Sequence[Any], changes: int, seconds: float) -> None:
    """Waits for so many changes of the files in a folder, and so many seconds of the processor."""
    seen = _names(folder)
    while any(process.is_alive() for process, _, _ in started):
        if changes and (now := _names(folder)) != seen:
            seen, changes = now, changes - 1
        if not changes and _cpu_seconds(started[0][0]) >= seconds:
            return
        time.sleep(0.004)


def _names(folder: Path) -> set[str]:
    return {f"{where}/{name}" for where, _, files in os.walk(folder) for name in files}
