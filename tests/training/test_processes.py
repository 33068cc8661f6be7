"""Two processes over loopback, two devices each, against one device."""

import os
import socket
import subprocess
import sys
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


def run(folder, parallel, rank, port):
    flag = "--xla_force_host_platform_device_count=2"
    env = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": flag, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", PROGRAM, str(folder), parallel, str(rank), str(port)]
    return subprocess.Popen(command, env=env, stdout=-1, stderr=-1, text=True)


@pytest.mark.parametrize("parallel", ["pmap", "shard_map"])
def test_two_processes_with_two_devices_train_as_one_device(tmp_path, parallel):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = [run(tmp_path / "two", parallel, rank, port) for rank in (0, 1)]
    started.append(run(tmp_path / "one", parallel, "alone", 0))
    for process in started:
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err[-3000:]
    (one, of_one), (two, of_two) = (
        load_checkpoint(tmp_path / which / "digits_lsq" / "checkpoint", "ann")
        for which in ("one", "two")
    )
    assert of_two["metrics"]["loss"] == pytest.approx(of_one["metrics"]["loss"], rel=1e-3)
    kernels = [tree["params"]["conv1"]["kernel"] for tree in (one, two)]
    np.testing.assert_allclose(*kernels, rtol=1e-2, atol=1e-4)
