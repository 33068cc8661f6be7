"""What the storage library says of a failure beside the error it raises."""

import asyncio
import gc
import logging

import absl.logging
import pytest

from nadaptor.checkpoints.storage import hushed


def test_what_orbax_logs_is_kept_back_until_the_last_block_ends():
    """A run reads its parent while its snapshots are open."""
    logger = absl.logging.get_absl_logger()

    def passes(path, level=logging.ERROR, words="m"):
        return bool(logger.filter(logging.LogRecord("absl", level, path, 1, words, (), None)))

    with hushed():
        with hushed():
            pass
        assert not passes("site-packages/orbax/checkpoint/futures.py")
        assert passes("site-packages/orbax/checkpoint/futures.py", logging.WARNING)
        waits = "Waiting for previous save to complete took 3 seconds."
        assert not passes("site-packages/orbax/manager.py", logging.WARNING, waits)
        assert passes("mine.py")
    assert passes("site-packages/orbax/checkpoint/futures.py")


def leave_failed(words, file):
    """Leaves a task of a file and a future, both failed, to the collector."""
    made = {}
    exec(compile(f"async def work(): raise ValueError({words!r})", file, "exec"), made)
    loop = asyncio.new_event_loop()
    task, future = loop.create_task(made["work"]()), loop.create_future()
    future.set_exception(ValueError(words))
    loop.run_until_complete(asyncio.wait([task]))
    loop.close()
    del task, future
    gc.collect()


@pytest.mark.parametrize(
    ("words", "file", "count"),
    [
        ("Failed writing [tensorstore_spec='{}']", "site-packages/orbax/handlers.py", 0),
        ("Failed writing", "mine.py", 2),
    ],
)
def test_what_failed_beside_the_error_that_is_raised_says_nothing(words, file, count, caplog):
    """The collector comes after the block has ended."""
    with hushed():
        pass
    leave_failed(words, file)
    assert [record.name for record in caplog.records] == ["asyncio"] * count
