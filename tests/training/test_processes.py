"""Two processes over loopback, two devices each, against one device."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from nadaptor.checkpoints.checkpoint import load_checkpoint

ROOT = Path(__file__).parents[2]
PROGRAM = """
import dataclasses, sys
from pathlib import Path
from nadaptor.configs.config import replace
from nadaptor.training import get_config, train
from nadaptor.training.options import DEFAULT
workdir, parallel, rank, port = sys.argv[1:]
several = rank != "alone"
options = dataclasses.replace(
    DEFAULT,
    num_devices=2 if several else 1,
    coordinator=f"127.0.0.1:{port}" if several else None,
    num_processes=2 if several else None,
    process_id=int(rank) if several else None,
)
config = replace(
    get_config("digits_lsq"), model="digits_resnet8", parent=None, epochs=1, train_size=192,
    validation_size=150, parallel=parallel, learning_rate=0.01, activation="relu",
)
train(config, Path(workdir), options)
"""
# On a busy machine a device may be minutes behind another, which by default ends the process.
FLAGS = {
    "--xla_force_host_platform_device_count": 2,
    "--xla_cpu_collective_call_terminate_timeout_seconds": 3600,
    "--xla_cpu_collective_timeout_seconds": 3600,
}


def run(folder, parallel, rank, port):
    # The last of one name holds: what else the tests compile with is kept.
    flags = [os.environ.get("XLA_FLAGS", ""), *(f"{flag}={value}" for flag, value in FLAGS.items())]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": " ".join(flags)}
    env["JAX_PLATFORMS"] = "cpu"
    command = [sys.executable, "-c", PROGRAM, str(folder), parallel, str(rank), str(port)]
    with (log := folder.with_name(f"{folder.name}-{rank}.log")).open("w") as out:
        return subprocess.Popen(command, env=env, stdout=out, stderr=out), log


def wait_for(started):
    """Waits for all, however busy the machine; one that fails ends those that wait for it."""
    running = dict(started)
    try:
        while running:
            for process in [process for process in running if process.poll() is not None]:
                assert process.returncode == 0, running[process].read_text()[-3000:]
                del running[process]
            time.sleep(0.1)
    finally:
        for process in running:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one device trains, for which it does not matter how several would be used."""
    folder = tmp_path_factory.mktemp("alone") / "one"
    wait_for([run(folder, "pmap", "alone", 0)])
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["pmap", "shard_map"])
def test_two_processes_with_two_devices_train_as_one_device(alone, tmp_path, parallel):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    wait_for([run(tmp_path / "two", parallel, rank, port) for rank in (0, 1)])
    (one, of_one), (two, of_two) = (
        load_checkpoint(folder / "digits_lsq" / "checkpoint", "ann")
        for folder in (alone, tmp_path / "two")
    )
    assert of_two["metrics"]["loss"] == pytest.approx(of_one["metrics"]["loss"], rel=1e-3)
    kernels = [tree["params"]["conv1"]["kernel"] for tree in (one, two)]
    np.testing.assert_allclose(*kernels, rtol=1e-2, atol=1e-4)
