"""The C++ kernels of this package, compiled at their first use and kept in the user's cache folder.

A library is named by the digest of its content, in a folder named by all that it was made from: a
damaged one is known by its name and made anew, another jax or processor has a folder of its own,
and of two processes that compile at once each puts a whole file in place.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Literal, NamedTuple

import jax
import jaxlib

Name = Literal["events", "convolve"]
# Of each, its files in this folder, the first to compile, and what it defines for jax.
_FILES: Mapping[Name, tuple[str, ...]] = MappingProxyType(
    {"events": ("events.cc",), "convolve": ("convolve.cc", "convolve.h")}
)
_SYMBOLS: Mapping[Name, tuple[str, ...]] = MappingProxyType(
    {
        "events": ("NadaptorEvents",),
        "convolve": ("NadaptorConvolve", "NadaptorImageGradient", "NadaptorKernelGradient"),
    }
)
_COMPILERS = ("c++", "g++", "clang++")
# `-march=native` is why the key names the processor.
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-ffp-contract=fast", "-fPIC", "-shared", "-w")
_SECONDS = 300


class Kernel(NamedTuple):
    """Targets for `jax.ffi.ffi_call` by their symbols, or why there are none."""

    targets: Mapping[str, str] | None
    reason: str = ""


@functools.lru_cache
def load_kernel(name: Name) -> Kernel:
    """Compiles a kernel if need be, and registers it with jax; once a process.

    Returns:
        The kernel; without a compiler, or where it fails, one without targets and with a reason
        that continues a sentence.
    """
    compiler = _find_compiler()
    if compiler is None:
        return Kernel(None, "no C++ compiler is there: install one, or name it in CXX")
    try:
        key = _key(name, compiler)
        library = ctypes.CDLL(str(_library(name, compiler, key)))
        capsules = {s: jax.ffi.pycapsule(getattr(library, s)) for s in _SYMBOLS[name]}
    # No error of the user's: convolutions stay XLA's, and where events were asked for, a warning
    # says why.
    except (OSError, AttributeError, subprocess.SubprocessError) as error:
        return Kernel(None, f"{compiler} made no kernel: {_last_line(error)}")
    targets = {symbol: f"{symbol}_{key}" for symbol in capsules}
    for symbol, capsule in capsules.items():
        jax.ffi.register_ffi_target(targets[symbol], capsule, platform="cpu")
    return Kernel(MappingProxyType(targets))


def _find_compiler() -> str | None:
    """The user's compiler, or the first that is there."""
    asked = os.environ.get("CXX")
    # Where the user's CXX is not there, no other is tried in its place.
    names = (asked,) if asked else _COMPILERS
    return next(filter(None, map(shutil.which, names)), None)


def sources_of(name: Name) -> list[Path]:
    """The files that a kernel is made from, the one to compile first."""
    return [Path(__file__).with_name(file) for file in _FILES[name]]


def _key(name: Name, compiler: str) -> str:
    """Names all that a library depends on; a compiler may be replaced under its name."""
    version = _run([compiler, "--version"])
    sources = [path.read_text() for path in sources_of(name)]
    made_from = (sources, _FLAGS, jax.__version__, jaxlib.__version__, version)
    return _digest(repr((*made_from, sys.platform, platform.machine(), _processor())).encode())[:16]


def _processor() -> str:
    """What the processor can do: a home may be shared by machines of several kinds."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = ("flags", "Features", "model name", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(names)}))


def _library(name: Name, compiler: str, key: str) -> Path:
    """The compiled library, from the cache or made now."""
    folder = cache_folder() / f"{name}-{key}"
    try:
        for path in folder.glob("*.so"):
            if _digest(path.read_bytes()) == path.stem:
                return path
            path.unlink(missing_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        return _compile(name, compiler, folder)
    except OSError:
        # The cache cannot be written. This one is in use for as long as the process lives.
        return _compile(name, compiler, Path(tempfile.mkdtemp(prefix="nadaptor-")))


def cache_folder() -> Path:
    """The user's folder of what can be made again."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "nadaptor"


def _compile(name: Name, compiler: str, folder: Path) -> Path:
    # In the folder itself: within one file system a rename puts the whole file in place, or none.
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        made = Path(scratch) / f"{name}.so"
        include = ("-I", jax.ffi.include_dir())
        _run([compiler, *_FLAGS, *include, str(sources_of(name)[0]), "-o", str(made)])
        path = folder / f"{_digest(made.read_bytes())}.so"
        made.replace(path)
    return path


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=_SECONDS)
    return done.stdout


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _last_line(error: Exception) -> str:
    """The end of what a compiler said, or the error."""
    said = (getattr(error, "stderr", None) or "").strip().splitlines()
    return said[-1] if said else str(error)
