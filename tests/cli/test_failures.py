"""What a command prints when the machine, the user or the input ends it: one line, and a code."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nadaptor import simulate
from nadaptor.cli.command import run_command
from nadaptor.cli.failures import failure
from nadaptor.configs.config import check_config, fields_of, make_config
from nadaptor.configs.named import get_config
from nadaptor.models import Lsq, create

ROOT = Path(__file__).parents[2]


@pytest.fixture
def ended(capsys, monkeypatch):
    """Runs a command that raises; returns its exit code and the lines of stderr."""
    monkeypatch.setattr("sys.argv", ["train.py"])

    def run(main):
        with pytest.raises(SystemExit) as end:
            run_command(lambda _: main())
        return end.value.code, capsys.readouterr().err.splitlines()

    return run


def test_a_file_where_a_folder_is_needed_is_one_line(ended, tmp_path):
    (tmp_path / "file").write_text("")
    code, lines = ended(lambda: (tmp_path / "file" / "runs").mkdir())
    assert (code, lines) == (1, [f"train.py: {tmp_path}/file/runs: Not a directory"])


def test_a_link_loop_and_a_folder_in_the_place_of_a_file_are_one_line(ended, tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    assert ended(lambda: (tmp_path / "loop").read_text())[0] == 1
    assert ended(lambda: tmp_path.read_text())[1][0].endswith("Is a directory")


def test_a_full_disk_is_one_line(ended):
    def fill():
        with open("/dev/full", "w") as full:
            full.write("x")

    assert ended(fill) == (1, ["train.py: No space left on device"])


def test_a_platform_that_is_none_is_one_line_and_nothing_is_written(tmp_path):
    done = subprocess.run(
        [sys.executable, "train.py", "digits_relu", "--workdir", tmp_path / "runs"],
        cwd=ROOT, env={**os.environ, "JAX_PLATFORMS": "nonsense"}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("train.py: Unable to initialize backend 'nonsense': ")
    assert done.stderr.endswith("see JAX_PLATFORMS\n") and done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_no_memory_is_one_line(ended):
    """NumPy is told at once that 8 PiB are not there."""
    code, lines = ended(lambda: np.empty(2**50))
    assert code == 1
    assert lines[0].startswith("train.py: out of memory, ask for less at once: Unable to allocate")
    assert len(lines) == 1


def test_a_program_without_a_stdout_ends_as_with_one(monkeypatch):
    monkeypatch.setattr("sys.stdout", None)
    run_command(lambda _: None)


def test_ctrl_c_is_one_line(ended):
    def interrupted():
        raise KeyboardInterrupt

    code, lines = ended(interrupted)
    assert (code, len(lines)) == (130, 1)


def test_ctrl_c_before_a_command_has_begun_is_one_line(ended, monkeypatch):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr("nadaptor.cli.command._keep_compiled", interrupted)
    assert ended(lambda: None) == (130, ["train.py: told to end; what was saved before stays"])


def test_a_reader_that_has_seen_enough_is_no_failure():
    program = (
        "from nadaptor.cli.command import run_command\n"
        "run_command(lambda _: [print('line', i, flush=True) for i in range(100000)])"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program]
    process = subprocess.Popen(command, env=env, stdout=-1, stderr=-1)
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 141
    process.stderr.close()


def test_a_refused_operation_of_a_network_of_ours_is_told_in_options():
    model = create(
        "cifar_vgg11", 10, width=1, pool="max", activation=functools.partial(Lsq, levels=2)
    )
    x = jnp.zeros((1, 32, 32, 3))
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    with pytest.raises(ValueError, match="cannot convert to spikes") as caught:
        jax.eval_shape(lambda v: simulate(model.apply, v, x, num_steps=1).outputs, variables)
    assert "layers.py" in str(caught.value)
    code, line = failure(caught.value)[::-1]
    assert code == 2 and "--nonaffine running_mean" in line and "--coding sum" in line
    assert ".py" not in line and "coding=" not in line


@pytest.mark.parametrize(
    "name", ["", "../../x", "/tmp/x", "a/b", "a\nb", ".", "..", "a\x1b[31m", " "]
)
def test_a_name_that_is_none_of_a_folder_is_refused(name):
    fields = {**fields_of(get_config("digits_na")), "name": name}
    with pytest.raises(ValueError, match="name must be letters") as caught:
        check_config(make_config(**fields))
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("field", "value"), [("seed", 2**63), ("levels", 2**24), ("levels", 2**31), ("width", 2**16)]
)
def test_numbers_that_jax_cannot_hold_are_refused_by_their_field(field, value):
    fields = {**fields_of(get_config("digits_na")), field: value}
    with pytest.raises(ValueError, match=f"{field} must be below"):
        check_config(make_config(**fields))
