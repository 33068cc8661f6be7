"""Small files, written whole or not at all: to a scratch file, to the disk, and then renamed.

What is renamed before it is on the disk may be an empty file after a power cut. So the file is
synchronised before the rename that makes it count, and its folder after it.
"""

import contextlib
import csv
import datetime
import errno
import fcntl
import functools
import inspect
import io
import json
import os
import signal
import stat
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from nadaptor.errors import HeldError

P = ParamSpec("P")
R = TypeVar("R")
# The card of a network of a million arrays is below it.
_MOST_BYTES = 2**28


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file, whole or not at all; makes its folder.

    Raises:
        OSError: it cannot be written, on a full disk for example; the error has its name.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Beside it, because a rename is one step within one file system only.
    scratch = path.with_name(f".{path.name}.part")
    try:
        with open(scratch, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        scratch.rename(path)
    except OSError as error:
        scratch.unlink(missing_ok=True)
        # What a full disk raises names no file.
        raise OSError(error.errno, error.strerror, str(path)) from error
    sync_folder(path.parent)


def read_small(path: Path) -> bytes:
    """Reads a card or another small file, which may come from a stranger.

    Raises:
        OSError: it cannot be read, is a pipe or a device, which may never end, or far too large.
    """
    found = path.stat()
    # A folder goes on to an error of its own, when it is read.
    if not (stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)):
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    if found.st_size > _MOST_BYTES:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), str(path))
    return path.read_bytes()


def sync_folder(path: Path) -> None:
    """Puts the names in a folder on the disk."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def check_writable(folder: Path) -> None:
    """Checks that a file can be written in a folder, which is made where it is missing.

    Raises:
        ValueError: none can; the message has the cause.
    """
    check_encodable(folder)
    # Several processes may check one folder at once.
    probe = folder / f".write-{os.getpid()}.part"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise ValueError(
            f"cannot write in {folder}: {error.strerror or error}; choose another folder"
        ) from error


def check_encodable(path: Path) -> None:
    """Checks that a path is UTF-8, as the storage library needs it.

    Raises:
        ValueError: it is not.
    """
    try:
        str(path.absolute()).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{path} is not UTF-8; rename the folder, or choose another") from error


def check_place(folder: Path) -> None:
    """Checks that a folder can be made, or written in where it is there; makes none.

    Raises:
        ValueError: it cannot; the message has the cause.
    """
    check_writable(next(place for place in (folder, *folder.parents) if place.exists()))


@contextlib.contextmanager
def hold(path: Path) -> Iterator[None]:
    """Holds the lock of what is made at a path, so that no other program makes it meanwhile.

    The lock is that of an open file beside it, `.NAME.lock`: it ends with its holder, however that
    ends.

    Args:
        path: of a file or folder that is there or not.

    Raises:
        HeldError: another program holds it; the message says which, since when.
    """
    lock = path.with_name(f".{path.name}.lock")
    lock.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        # Not "w", which would empty the line in which a holder says who it is.
        file = stack.enter_context(open(lock, "a+"))
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read(200).strip() or "another program"
            raise HeldError(f"{path} is being made by {holder}; wait for it, or end it") from None
        # A holder that has just ended removes the file, and another may have made it anew.
        if not lock.exists() or os.fstat(file.fileno()).st_ino != lock.stat().st_ino:
            stack.enter_context(hold(path))
            yield
            return
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        file.truncate(0)
        file.write(f"process {os.getpid()}, since {now}\n")
        file.flush()
        try:
            yield
        finally:
            # While it is held: whoever has opened it by then finds that it is gone, see above.
            lock.unlink(missing_ok=True)


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Has Ctrl-C wait until a block has ended; a second one ends the program at once.

    Orbax writes in threads of its own. An interrupt ends only the one that waits for them: they go
    on in a folder that is removed meanwhile, and print a page of errors.

    Raises:
        KeyboardInterrupt: it came, and the block has ended.
    """
    before, came = signal.getsignal(signal.SIGINT), []
    # Only the main thread gets signals, and only a handler in Python can be put off.
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return

    def put_off(number: int, _: Any) -> None:
        came.append(number)
        signal.signal(number, signal.SIG_DFL)

    signal.signal(signal.SIGINT, put_off)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if came:
            # To the handler of before, which may be a run's.
            signal.raise_signal(signal.SIGINT)


def making(argument: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorates a function that makes what one of its arguments is the path of.

    Before it works, the folder around that is checked to be writable, and its lock is taken.

    Args:
        argument: name of the argument.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def made(*args: P.args, **kwargs: P.kwargs) -> R:
            path = Path(signature.bind(*args, **kwargs).arguments[argument])
            check_writable(path.parent)
            with hold(path):
                return function(*args, **kwargs)

        return made

    return decorate


def write_json(path: Path, value: Any) -> None:
    """Writes a value as readable JSON."""
    write_bytes(path, (json.dumps(value, indent=1) + "\n").encode())


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes rows of equal columns as CSV, with a header."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_bytes(path, text.getvalue().encode())
