import csv
import dataclasses
import itertools
import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import PIL.Image
import pytest

from nadaptor.cli import main as console
from nadaptor.cli.command import run_command, spread_over_cores
from nadaptor.cli.main import COMMANDS
from nadaptor.configs.named import CONFIGS
from nadaptor.conversion.weights import load_weights
from nadaptor.data import registry
from nadaptor.models.registry import MODELS
from nadaptor.studies import demo
from nadaptor.studies import study as grid

ROOT = Path(__file__).parents[2]


@pytest.fixture
def call(monkeypatch, capsys):
    """Runs a door as the shell does; returns its exit code, stdout and stderr."""

    def run(door, *args):
        monkeypatch.setattr("sys.argv", [door, *map(str, args)])
        code = 0
        try:
            runpy.run_path(str(ROOT / door), run_name="__main__")
        except SystemExit as end:
            code = end.code or 0
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


def refused(result, *words, code=2):
    """Whether a door ended with one readable line that holds these words."""
    found, _, err = result
    assert found == code, result
    assert len(err.splitlines()) == 1, err
    for word in words:
        assert word in err


def test_the_three_doors_do_the_whole_job(call, tiny, tmp_path):
    sizes = ["--model", tiny.network.model, "--epochs", 2, "--train-size", 320]
    sizes += ["--workdir", tmp_path]
    code, out, _ = call("train.py", "digits_relu", *sizes)
    assert code == 0
    code, out, _ = call("train.py", "digits_lsq", *sizes)
    assert (code, out.splitlines()[-1]) == (0, f"checkpoint: {tmp_path}/digits_lsq/checkpoint")
    code, out, _ = call("convert.py", tmp_path / "digits_lsq/checkpoint", "--num-images", 16)
    assert code == 0
    assert out.count("ok ") == 6
    assert "FAILED" not in out
    code, out, _ = call("simulate.py", tmp_path / "digits_lsq/snn", "--num-steps", 2)
    assert code == 0
    assert "T = 2" in out
    written = sorted(p.name for p in (tmp_path / "digits_lsq/simulation-validation").iterdir())
    assert written == ["accuracy.csv", "accuracy.png", "report.json"]


def test_an_exported_network_scores_what_the_spiking_one_does(call, nadaptor, runs, tmp_path):
    snn, net = runs / "digits_na/snn", tmp_path / "net.jax"
    code, out, err = nadaptor("export", snn, "--num-steps", 3, "--out", net)
    assert (code, out) == (0, f"written: {net}\n"), err
    sizes = ["--num-images", 40, "--out", tmp_path / "live"]
    assert call("simulate.py", snn, "--num-steps", 3, *sizes)[0] == 0
    assert call("simulate.py", net, "--num-images", 40, "--out", tmp_path / "exported")[0] == 0
    live, exported = ((tmp_path / n / "accuracy.csv").read_text() for n in ("live", "exported"))
    assert live == exported and len(live.splitlines()) == 4
    sizes = ["--num-images", 8, "--out", tmp_path / "again", "--report", tmp_path / "report"]
    code, out, err = call("simulate.py", snn, "--num-steps", 2, *sizes)
    assert code == 0 and out.splitlines()[-1] == f"written: {tmp_path}/report/report.html", err
    page = (tmp_path / "report" / "report.html").read_text().replace("<wbr>", "")
    told = json.loads((tmp_path / "report" / "conversion.json").read_text())
    assert all(layer in page for layer in told["layers"]) and page.count("data:image/svg") == 6
    assert {"accuracy_over_energy", "errors", "exits", "noise", "spikes"} < {
        p.stem for p in (tmp_path / "report").glob("*.png")
    }
    content = net.read_bytes()
    net.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    refused(call("simulate.py", net), "net.jax is damaged")
    net.with_name("net.jax.json").write_text("{}")
    refused(call("simulate.py", net), "net.jax.json")
    code, out, err = nadaptor("export", snn, "--form", "safetensors", "--out", tmp_path / "w")
    assert code == 0 and "layer1_0.act1.threshold" in load_weights(tmp_path / "w")[0]


def test_an_unknown_config_gets_a_suggestion(call, tmp_path):
    result = call("train.py", "digits_n", "--workdir", tmp_path / "new")
    refused(result, "train.py: unknown config 'digits_n'; did you mean 'digits_na'?")
    refused(call("train.py", "mnist"), "'mnist'; there are ", "digits_na")
    refused(call("train.py"), "unknown config ''; there are ")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("option", "value", "word"),
    [
        ("--epochs", "0", "epochs must be a positive int, not 0"),
        ("--levels", "-1", "levels must be a positive int"),
        ("--learning-rate", "nan", "learning_rate must be a number >= 0, not nan"),
        ("--model", "digits_resnet21", "did you mean 'digits_resnet20'"),
        ("--model", "resnet56", "did you mean 'cifar_resnet56'"),
        ("--dataset", "digit", "did you mean 'digits'"),
        ("--parent", "digits_rel", "did you mean 'digits_relu'"),
    ],
)
def test_a_bad_override_is_named_and_nothing_is_written(call, tmp_path, option, value, word):
    refused(call("train.py", "digits_na", option, value, "--workdir", tmp_path / "new"), word)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("command", "option", "why"),
    [
        ("convert.py x --percent 99", "--percent", "without --calibrate percentile"),
        ("convert.py x --calibrate max --percent 99.9", "--percent", "--calibrate percentile"),
        ("convert.py x --biases", "--biases", "without --calibrate"),
        ("convert.py x --num-steps 8", "--num-steps", "without --calibrate mmse or --biases"),
        ("convert.py x --calibrate max --num-steps 8", "--num-steps", "mmse or --biases"),
        ("convert.py x --model resnet18", "--model", "without --init-from"),
        ("convert.py x --coding sum --nonaffine running_mean", "--nonaffine", "any operation"),
        ("simulate.py x --correction-steps 4", "--correction-steps", "with --correction none"),
        ("simulate.py x --mode ann --num-steps 4", "--num-steps", "with --mode ann"),
        ("simulate.py x --mode ann --report r", "--report", "with --mode ann"),
        ("simulate.py x --mac-energy 1.0", "--mac-energy", "without --report"),
        ("simulate.py x --dataset digits", "--dataset", "without an artefact"),
        ("export x --form safetensors --num-steps 4", "--num-steps", "without --form jax"),
        ("export x --batch-size 4", "--batch-size", "without --form onnx"),
        ("export x --correction-steps 4", "--correction-steps", "with --correction none"),
        ("train.py digits_na --new-head", "--new-head", "without --init-from"),
        ("train.py digits_na --evaluate-only --keep 3", "--keep", "with --evaluate-only"),
        (
            "train.py digits_na --evaluate-only --num-processes 2",
            "--num-processes",
            "with --evaluate-only",
        ),
        ("train.py digits_relu --levels 4", "--levels", "with --activation relu"),
        ("train.py digits_lsq --gradient exact", "--gradient", "with --activation lsq"),
        ("study digits --dry-run", "--dry-run", "in a study"),
        ("study digits --process-id 0", "--process-id", "share the cells in one workdir"),
        ("study digits --new-head", "--new-head", "without --init-from"),
        ("study fit --correction-steps 8", "--correction-steps", "--corrections offset-spikes or"),
        ("study digits --methods ttrbr --levels 3", "--levels", "with ttrbr alone"),
    ],
)
def test_an_option_that_would_do_nothing_is_refused_with_the_remedy(
    call, nadaptor, monkeypatch, tmp_path, command, option, why
):
    monkeypatch.chdir(tmp_path)
    name, *words = command.split()
    result = call(name, *words) if name.endswith(".py") else nadaptor(name, *words)
    refused(result, f": {option} does nothing ", why, "leave it out")
    assert not list(tmp_path.iterdir())


def test_an_evaluation_and_a_dry_run_are_not_done_at_once(call):
    refused(call("train.py", "digits_na", "--evaluate-only", "--dry-run"), "choose one")


@pytest.fixture
def nadaptor(monkeypatch, capsys):
    """Runs the console script; returns its exit code, stdout and stderr."""

    def run(*args):
        monkeypatch.setattr("sys.argv", ["/usr/bin/nadaptor", *map(str, args)])
        code = 0
        try:
            console.main()
        except SystemExit as end:
            code = end.code or 0
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


def test_the_console_script_lists_its_commands_and_suggests(nadaptor):
    code, out, _ = nadaptor("--help")
    assert code == 0
    assert all(f"  {name} " in out for name in COMMANDS)
    assert nadaptor() == (code, out, "")
    refused(nadaptor("simulat"), "nadaptor: unknown command 'simulat'; did you mean 'simulate'?")
    assert nadaptor("--version")[1].startswith("nadaptor ")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_of_its_own(nadaptor, command):
    code, out, _ = nadaptor(command, "--help")
    assert code == 0
    assert f"nadaptor {command}" in out
    assert len(out.splitlines()) < 100


def test_the_console_script_and_the_door_do_the_same(nadaptor, call, tmp_path):
    bad = ("digits_na", "--epochs", "0", "--workdir", tmp_path / "new")
    (code, _, err), (of_door, _, door) = nadaptor("train", *bad), call("train.py", *bad)
    assert code == of_door == 2
    assert err.removeprefix("nadaptor") == door.removeprefix("train.py")


def test_the_list_of_commands_imports_none_of_them():
    script = (
        "import sys; sys.argv = ['nadaptor', '--help'];"
        "from nadaptor.cli.main import main; main();"
        "print(sorted(m for m in sys.modules if m.startswith(('nadaptor.cli.', 'flax', 'tyro'))))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, check=True, text=True
    )
    names = ("command", "failures", "main", "pages", "supervised")
    shared = [f"nadaptor.cli.{name}" for name in names]
    assert done.stdout.splitlines()[-1] == str(shared)


def test_the_help_has_a_line_for_each_config_and_the_networks(call):
    code, out, _ = call("train.py", "--help")
    assert code == 0
    lines = out.splitlines()
    assert sum(line.split()[:1] == [name] for name in CONFIGS for line in lines) == len(CONFIGS)
    assert len(lines) <= len(CONFIGS) + 15
    assert lines[-1].endswith(", ".join(MODELS))
    code, out, _ = call("train.py", "digits_na", "--help")
    assert code == 0
    assert "--ema-decay" in out and "--workdir" in out
    # Each group of options has a sentence of its own.
    assert out.count("Weights that a finished run hands on") == 1
    assert "Which images." in out and "Its activations." in out
    assert "run options" in out and "options options" not in out


@pytest.mark.parametrize(
    ("door", "arguments", "option"),
    [
        ("train.py", ["digits_na", "--workdir", "gs://bucket/runs"], "--workdir"),
        ("train.py", ["digits_na", "--workdir=s3://bucket/runs"], "--workdir"),
        ("train.py", ["digits_na", "--data-dir", "https://host/data"], "--data-dir"),
        ("convert.py", ["runs/x/checkpoint", "--out", "gs://bucket/out"], "--out"),
        ("simulate.py", ["gs://bucket/snn"], "the path"),
    ],
)
def test_an_address_in_place_of_a_folder_is_refused_with_the_remedy(
    call, monkeypatch, tmp_path, door, arguments, option
):
    monkeypatch.chdir(tmp_path)
    address = arguments[-1].rpartition("=")[2]
    words = f"{option} must be a local folder, not {address}; mount the bucket, as gcsfuse does"
    refused(call(door, *arguments), words)
    assert not list(tmp_path.iterdir())


def test_an_address_in_the_environment_is_refused(call, monkeypatch):
    monkeypatch.setenv("NADAPTOR_DATA_DIR", "gs://bucket/data")
    refused(call("train.py", "digits_na"), "NADAPTOR_DATA_DIR must be a local folder")


def test_an_evaluation_of_nothing_says_what_to_do(call, tmp_path):
    result = call("train.py", "digits_na", "--evaluate-only", "--workdir", tmp_path)
    refused(result, "train it first, without --evaluate-only, or", "with --init-from")


def test_an_evaluation_says_what_it_measured(call, runs):
    sizes = ["--model", "digits_resnet8", "--epochs", 2, "--workdir", runs]
    code, out, err = call("train.py", "digits_na", "--evaluate-only", *sizes)
    assert (code, err) == (0, "reading the network, and compiling it\n")
    words, last = out.splitlines()[-2:]
    assert words == (
        f"digits_resnet8 with noise_adaptor, weights of {runs}/digits_na/checkpoint, "
        "on 450 test images of digits, noise off"
    )
    assert 90 < float(last.removeprefix("accuracy ")) <= 100


@pytest.mark.parametrize("option", ["--epoch-s", "--sead"])
def test_an_unknown_option_is_one_line_and_exit_code_2(call, option):
    refused(call("train.py", "digits_na", option, "1"), f"train.py: Unrecognized options: {option}")


@pytest.mark.parametrize(
    ("words", "wrong"),
    [
        (["train.py", "digits_na", "--epochs", "many"], "--epochs"),
        (["convert.py"], "Missing from convert.py: PATH"),
        (["convert.py", "x", "--calibrate", "median"], "median"),
        (["simulate.py", "x", "--num-step", "4"], "Unrecognized options: --num-step, 4"),
    ],
)
def test_what_no_option_takes_is_one_line_and_exit_code_2(call, words, wrong):
    code, _, err = call(*words)
    assert (code, len(err.splitlines())) == (2, 1), err
    assert wrong in err


@pytest.mark.parametrize("door", ["convert.py", "simulate.py"])
def test_a_missing_or_foreign_checkpoint_is_refused(call, tmp_path, door):
    (tmp_path / "foreign").mkdir()
    refused(call(door, tmp_path / "none"), f"no checkpoint at {tmp_path}/none")
    refused(call(door, tmp_path / "foreign"), "is not a checkpoint of nadaptor")
    assert [p.name for p in tmp_path.iterdir()] == ["foreign"]


def test_a_checkpoint_of_the_wrong_kind_is_refused(call, runs):
    refused(call("simulate.py", runs / "digits_na/checkpoint"), "this needs 'snn'")
    refused(call("convert.py", runs / "digits_relu/checkpoint"), "full-precision network")
    refused(call("convert.py", runs / "digits_na/checkpoint"), "exists already")
    refused(call("convert.py", runs / "digits_na/snn"), "snn is a spiking network already")


def test_a_file_that_is_not_there_is_missed_before_images_are_read(call, monkeypatch, tmp_path):
    monkeypatch.setattr(registry, "open_source", lambda *_: pytest.fail("images were read"))
    for words in (
        ["train.py", "digits_na"],
        ["train.py", "digits_na", "--evaluate-only"],
        ["convert.py", "digits_lsq"],
    ):
        result = call(*words, "--init-from", tmp_path / "no.pt")
        refused(result, f"--init-from {tmp_path}/no.pt: there is no such file")
    (tmp_path / "net.pt").write_text("")
    sizes = ["--init-from", tmp_path / "net.pt", "--out", tmp_path]
    refused(call("convert.py", "digits_lsq", *sizes), f"{tmp_path} exists already")


def test_a_config_s_validation_images_are_too_many_for_a_small_folder(call, tmp_path):
    for split, name, number in itertools.product(("train", "val"), "ab", range(3)):
        (tmp_path / split / name).mkdir(parents=True, exist_ok=True)
        picture = PIL.Image.new("L", (8, 8), number)
        picture.save(tmp_path / split / name / f"{number}.png")
    (tmp_path / "net.pt").write_text("")
    result = call(
        "convert.py", "imagenet_resnet50", "--init-from", tmp_path / "net.pt",
        "--dataset", "folder", "--data-dir", tmp_path, "--quantize", 2, "--out", tmp_path / "snn",
    )  # fmt: skip
    refused(result, "between 1 and 5, not 10000: there are 6 training", "say --validation-size")


def test_no_time_steps_are_refused(call, runs):
    refused(call("simulate.py", runs / "digits_na/snn", "--num-steps", 0), "not 0")
    stage = ("--correction", "srp", "--correction-steps", 0)
    refused(call("simulate.py", runs / "digits_na/snn", *stage), "correction_steps must be a pos")


def test_a_flipped_byte_is_refused_and_nothing_written(call, runs, tmp_path):
    shutil.copytree(runs / "digits_na/checkpoint", tmp_path / "checkpoint")
    files = [p for p in (tmp_path / "checkpoint/arrays").rglob("*") if p.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    refused(call("convert.py", tmp_path / "checkpoint"), "damaged")
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint"]


def test_a_run_that_fails_ends_with_exit_code_1(call, runs, tmp_path):
    shutil.copytree(runs / "digits_relu", tmp_path / "digits_relu")
    small = ["--model", "digits_resnet8", "--epochs", 1, "--workdir", tmp_path]
    code, out, err = call("train.py", "digits_na", "--learning-rate", "1e20", *small)
    # Where a step takes seconds, a line of progress comes first.
    refused((code, out, err.splitlines()[-1]), "the loss is nan at step", code=1)


def test_a_defect_keeps_its_traceback():
    with pytest.raises(ValueError, match="invalid literal"):
        run_command(lambda arguments: int("x"))


@pytest.mark.parametrize(
    ("variable", "asked", "found"),
    [
        (None, None, "auto"),
        (None, 1, 1),
        ("XLA_FLAGS", None, None),
        ("JAX_NUM_CPU_DEVICES", None, None),
    ],
)
def test_a_command_trains_on_every_core_unless_the_user_says_how_many_devices_there_are(
    variable, asked, found, monkeypatch
):
    for name in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    if variable is not None:
        monkeypatch.setenv(variable, "--xla_force_host_platform_device_count=8")
    made = {}
    monkeypatch.setattr(jax.config, "update", made.__setitem__)
    assert spread_over_cores(asked) == found
    cores = len(os.sched_getaffinity(0))
    assert made == ({} if variable else {"jax_num_cpu_devices": cores})


def test_the_demo_makes_its_table_and_files(tmp_path, capsys, monkeypatch):
    """Of made-up figures: the runs of a study are tested with the studies."""

    def measured(config, workdir, options, **settings):
        noisy = config.quantizer.activation == "noise_adaptor"
        assert settings["num_steps"] == 3 and settings["split"] == "test"
        base = 0.5 + 0.25 * noisy + 0.02 * config.seed
        return {
            "ann_deterministic": base,
            "ann_noisy": base - 0.1,
            "training_accuracy": 1.0,
            "accuracy": [base - 0.3, base - 0.2, base - 0.1],
            "total_steps": 3,
            "num_images": 450,
        }

    monkeypatch.setattr(grid, "measure", measured)
    study = dataclasses.replace(demo.STUDY, num_steps=3, seeds=2)
    demo.run_demo(study, tmp_path, tmp_path / "results")
    names = sorted(path.name for path in (tmp_path / "results").iterdir())
    assert names == ["accuracy.png", "report.json", "table.csv"]
    rows = list(csv.reader((tmp_path / "results" / "table.csv").read_text().splitlines()))
    steps = ["T = 1", "T = 2", "T = 3"]
    assert rows[0] == ["noise adaptor", "ANN noisy", "ANN deterministic", *steps]
    assert rows[1] == ["without", "41.0±1.4", "51.0±1.4", "21.0±1.4", "31.0±1.4", "41.0±1.4"]
    assert rows[2] == ["with", "66.0±1.4", "76.0±1.4", "46.0±1.4", "56.0±1.4", "66.0±1.4"]
    assert "test accuracy in %, 450 images" in capsys.readouterr().out.lower()


def test_the_demo_needs_seeds_for_a_deviation(tmp_path):
    with pytest.raises(ValueError, match="seeds must be at least 2"):
        demo.run_demo(dataclasses.replace(demo.STUDY, seeds=1), tmp_path, tmp_path / "results")


@pytest.mark.parametrize("users", [None, "/the/users/own"])
def test_a_door_keeps_what_it_compiles_where_the_user_says(users, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    if users:
        monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", users)
    limit, folder = "jax_persistent_cache_min_compile_time_secs", "jax_compilation_cache_dir"
    before = {name: jax.config.values[name] for name in (limit, folder)}
    jax.config.update(folder, users)  # jax reads the variable at its import
    try:
        run_command(lambda arguments: None)
        expected = users or str(tmp_path / "nadaptor" / "xla")
        assert jax.config.values[folder] == expected
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


def test_simulating_uses_every_core_or_what_the_user_says():
    script = (
        "from nadaptor.parallel.cores import use_every_core; use_every_core();"
        "import jax, os; print(len(jax.devices()), len(os.sched_getaffinity(0)))"
    )

    def devices(**environment):
        kept = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
        done = subprocess.run(
            [sys.executable, "-c", script],
            env={**kept, **environment},
            cwd=ROOT,
            capture_output=True,
            check=True,
            text=True,
        )
        return [int(number) for number in done.stdout.split()]

    used, cores = devices()
    assert used == cores
    assert devices(XLA_FLAGS="--xla_force_host_platform_device_count=3")[0] == 3


@pytest.mark.parametrize(
    "words",
    [
        ["simulate.py", "digits_na/snn", "--num-steps", "1", "--out", "file"],
        ["simulate.py", "digits_na/snn", "--out", "new", "--report", "file"],
        ["convert.py", "digits_na/checkpoint", "--out", "file/sub"],
        ["train.py", "digits_relu", "--workdir", "file"],
    ],
)
def test_where_nothing_can_be_written_is_said_before_any_work(
    call, runs, tmp_path, monkeypatch, words
):
    (tmp_path / "file").write_text("")
    (tmp_path / "digits_na").symlink_to(runs / "digits_na")
    monkeypatch.chdir(tmp_path)
    if words[0] != "train.py":  # which compiles nothing yet, but has its step made
        monkeypatch.setattr(jax, "jit", lambda *_, **__: pytest.fail("work was begun"))
    code, out, err = call(*words)
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert "file: File exists" in err
