import contextlib
import fcntl
import os
import shutil

import pytest
from hypothesis import HealthCheck, Phase, settings

# By processor time, longest first: started last, one of these would keep a worker after the others.
# The second has no trained network, for which its worker would wait while the first trains it.
LONGEST = (
    "test_resume.py",
    "test_seams.py",
    "test_finetuning.py",
    "test_processes.py",
    "test_command.py",
    "test_study.py",
    "test_calibrate.py",
    "test_loop.py",
    "test_methods.py",
    "test_accuracy.py",
    "simulation/test_scan.py",
    "test_calls.py",
)


def pytest_collection_modifyitems(items):
    """Orders the files for the workers, and marks as slow whatever needs a trained network."""
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(LONGEST)))
    for item in items:
        if "runs" in getattr(item, "fixturenames", ()):
            item.add_marker("slow")


# What is drawn at random: a few cases, always the same, or with HYPOTHESIS_PROFILE=long many new.
_UNHEALTHY = list(HealthCheck)
_COMMON = dict(deadline=None, suppress_health_check=_UNHEALTHY, database=None)
# A case that fails is shrunk in the long profile alone: that may take minutes.
_QUICK = dict(derandomize=True, phases=[Phase.explicit, Phase.generate], **_COMMON)
settings.register_profile("quick", max_examples=6, **_QUICK)
settings.register_profile("long", max_examples=1000, **_COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))


@pytest.fixture(scope="module")
def optimized():
    """Has the module's programs, and those of its processes, compiled with some optimizations.

    They run three times faster, and small ones take a third longer to compile.
    """
    with optimizing():
        yield


@contextlib.contextmanager
def optimizing():
    """Compiles with LLVM's first level: for what runs longer than it compiles."""
    import jax

    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "0")
        try:
            yield
        finally:
            jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="session")
def tiny():
    """The config of a quantized network that trains in seconds."""
    from nadaptor.configs.config import replace
    from nadaptor.training import get_config

    return replace(get_config("digits_na"), model="digits_resnet8", epochs=2)


@pytest.fixture(scope="session")
def runs(tiny, tmp_path_factory):
    """A folder with a trained full-precision network, a quantized one and its conversion.

    The workers of one run share what is trained, and each has a copy.
    """
    own = tmp_path_factory.mktemp("runs")
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return make_runs(tiny, own)
    shared = tmp_path_factory.getbasetemp().parent / "runs"
    with shared.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (shared / "digits_na" / "snn").exists():
            make_runs(tiny, shared)
    return shutil.copytree(shared, own, dirs_exist_ok=True)


def make_runs(tiny, workdir):
    """Trains and converts; returns the folder."""
    from nadaptor.configs.config import replace
    from nadaptor.configs.named import parent_of
    from nadaptor.training import convert, train

    with optimizing():
        # 0.98 of the validation images are right after 4 of the parent's 15 epochs.
        train(replace(parent_of(tiny), epochs=4), workdir)
        train(tiny, workdir)
        convert(workdir / "digits_na" / "checkpoint", workdir / "digits_na" / "snn")
    return workdir


@pytest.fixture(scope="session")
def torch_layout():
    """Weights by torch's names, the inverse of what the reader does."""
    import numpy as np
    from flax import traverse_util

    def layout(variables):
        running = {"mean": "running_mean", "var": "running_var"}
        leaves = {"scale": "weight", "kernel": "weight", **running}
        state = {}
        for path, leaf in traverse_util.flatten_dict(variables).items():
            *place, name = path[1:]
            module = ".".join(place).replace("_norm", "").replace("_", ".")
            if place[-1].endswith("_norm"):
                downsample = "downsample" in module
                module = f"{module}.1" if downsample else module.replace("conv", "bn")
            elif "downsample" in module:
                module = f"{module}.0"
            axes = {4: (3, 2, 0, 1), 2: (1, 0)}.get(np.ndim(leaf))
            array = np.transpose(leaf, axes) if axes else leaf
            state[f"{module}.{leaves.get(name, name)}"] = np.ascontiguousarray(array)
        return state

    return layout
