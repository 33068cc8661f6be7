import ctypes
import gc
import importlib.metadata
import os
import pathlib

import pytest

# Before jax is first imported: pmap and shard_map are tested on virtual devices.
FLAG = "--xla_force_host_platform_device_count"
# Most of the tests' time is compilation, three quarters of which LLVM's optimizations take; XLA's
# own passes, which reorder sums and fuse, stay on. What trains or simulates for longer than it
# compiles asks for LLVM's first level, by the fixture `optimized`.
LEVEL = "--xla_backend_optimization_level"
# What fuses operations by MLIR takes half of the rest. Later versions have no other way, and end at
# a flag that they do not know.
EMITTERS = "--xla_cpu_use_fusion_emitters"
# Both cores are at work already: a program in pieces, for as many threads, is work on top.
PIECES = "--xla_cpu_parallel_codegen_split_count"
FLAGS = {FLAG: "8", LEVEL: "1", PIECES: "1"}
if importlib.metadata.version("jax").startswith("0.10."):
    FLAGS[EMITTERS] = "false"
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
for flag, value in FLAGS.items():
    if flag not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}={value}".strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# What a command that trains would start again for; see `nadaptor.cli.pages`.
os.environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
# What tests compile is kept for the next run, beside this file: most of their time is compilation.
CACHE = pathlib.Path(__file__).parent / ".cache" / "xla"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
# Where in the source an operation comes from takes a walk up the stack for each.
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")
# Threads of NumPy's that wait for work are busy while they do.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# A worker that holds more gives back what it has compiled, which is then read from the cache.
MOST_BYTES = 3 * 2**29
# Objects between two looks for cycles: tracing makes many that live long. Python's own are 700.
OBJECTS = 100_000


def pytest_configure():
    import jax

    jax.config.update("jax_debug_key_reuse", True)
    gc.set_threshold(OBJECTS, 20, 50)


def pytest_collection_finish():
    """What has been imported lives to the end: no search for cycles passes it again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _checked_keys(request):
    """Has jax refuse a second draw from one key, but where a test says that it wants that."""
    import jax

    with jax.debug_key_reuse(request.node.get_closest_marker("reuses_keys") is None):
        yield


@pytest.fixture(autouse=True, scope="module")
def _bounded_memory():
    """Keeps a worker small: what one file has compiled, the next has rarely a use for."""
    yield
    if resident_bytes() > MOST_BYTES:
        import jax

        jax.clear_caches()
        gc.collect()
        # Else what is freed stays the process's, and every later file would clear once more.
        if hasattr(ctypes.CDLL(None), "malloc_trim"):
            ctypes.CDLL(None).malloc_trim(0)


def resident_bytes():
    """What this process holds in memory; 0 where the system does not say."""
    pages = pathlib.Path("/proc/self/statm")
    return int(pages.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if pages.exists() else 0
