"""What the storage library prints of a failure, kept back, and the cause of it in a few words.

A write that fails is raised where it is waited for. Before that, each of Orbax's threads logs it
with its traceback, and the writes that tensorstore has under way report to an event loop that is
closed, or fail with nobody left to ask: two thousand lines for a full disk.
"""

import asyncio.base_events
import contextlib
import errno
import logging
import os
import sys
import traceback
from collections.abc import Iterator
from typing import Any

# What a disk or missing rights may answer; the library quotes the system's words for it.
_CAUSES = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO)
_LOOP = asyncio.base_events.__file__


@contextlib.contextmanager
def hushed() -> Iterator[None]:
    """Keeps back what Orbax logs of errors, which are raised as well."""
    # The logger is of a class of absl's own, which has to be there first.
    from absl import logging as of_orbax

    _hush_closed_loops()
    # For good as well, and once for the whole program: a logger takes the same filter only once.
    logging.getLogger("asyncio").addFilter(_UNASKED)
    logger, own = of_orbax.get_absl_logger(), _NoErrors()
    logger.addFilter(own)
    try:
        yield
    finally:
        logger.removeFilter(own)


def cause_of(error: Exception) -> str:
    """Returns why something could not be written or read, in a line.

    Args:
        error: of the storage library, whose words hold those of the system among many others.

    Example:
        >>> cause_of(ValueError("Error writing 'a': No space left on device [tensorstore ...]"))
        'No space left on device'
    """
    text = " ".join(str(error).split())
    system = (os.strerror(number) for number in _CAUSES)
    return next(
        (words for words in system if words in text), f"{type(error).__name__}: {text[:300]}"
    )


class _NoErrors(logging.Filter):
    """One for each block: of blocks that lie in each other the inner one must leave the outer's."""

    def filter(self, record: logging.LogRecord) -> bool:
        # That it waits for a save before is no news: a run goes on meanwhile.
        waits = record.getMessage().startswith("Waiting for previous save")
        return "orbax" not in record.pathname or not (waits or record.levelno >= logging.ERROR)


class _NoUnasked(logging.Filter):
    """For what other reads or writes of a call that failed came to, told by the collector."""

    def filter(self, record: logging.LogRecord) -> bool:
        # A task names the file of its function, and a future of tensorstore's the array's place.
        text = record.getMessage()
        ours = "orbax" in text or "tensorstore" in text
        return not (ours and "exception was never retrieved" in text)


_UNASKED = _NoUnasked()


def _hush_closed_loops() -> None:
    """Has what tensorstore's threads cannot report go nowhere, for good: it may come late."""
    # Once for the whole program: each further hook would call the one before it.
    if getattr(sys.unraisablehook, "__module__", "") == __name__:
        return
    before = sys.unraisablehook

    def hook(raised: Any) -> None:
        # Of no object, and called by no line of Python: nothing waits for it.
        frames = traceback.extract_tb(raised.exc_traceback)
        alone = raised.object is None and all(frame.filename == _LOOP for frame in frames)
        if not alone or str(raised.exc_value) != "Event loop is closed":
            before(raised)

    sys.unraisablehook = hook
