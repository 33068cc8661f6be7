import contextlib

import jax
import pytest


@contextlib.contextmanager
def quick_compilation():
    """Compiles several times faster, to slower programs: right where most time is compilation."""
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def quick():
    """Has everything in the module compiled quickly."""
    with quick_compilation():
        yield


@pytest.fixture(scope="session")
def tiny():
    """The config of a quantized network that trains in seconds."""
    from nadaptor.configs.config import replace
    from nadaptor.training import get_config

    return replace(get_config("digits_na"), model="digits_resnet8", epochs=2)


@pytest.fixture(scope="session")
def runs(tiny, tmp_path_factory):
    """A folder with a trained full-precision network, a quantized one and its conversion."""
    from nadaptor.training import convert, train

    workdir = tmp_path_factory.mktemp("runs")
    with quick_compilation():
        train(tiny, workdir)
        convert(workdir / "digits_na" / "checkpoint", workdir / "digits_na" / "snn")
    return workdir
