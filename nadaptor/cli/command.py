"""What the commands share: errors in one line, choices by name, local paths, every core."""

import functools
import io
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax

from nadaptor._checks import check_local, check_name
from nadaptor.cli.failures import end
from nadaptor.cli.pages import take_huge_pages
from nadaptor.cli.supervised import is_to_be_supervised, own_command, supervise
from nadaptor.parallel import NumDevices
from nadaptor.parallel.cores import use_every_core

T = TypeVar("T")


def run_command(main: Callable[[Sequence[str]], object]) -> None:
    """Runs a command, and ends the program with a code where it fails.

    Bad input, a run that failed, a machine that failed and a signal are one line on stderr and an
    exit code, as `nadaptor.cli.failures` says. Any other error is a defect and keeps its traceback.

    What jax compiles is kept for the next command in ~/.cache/nadaptor/xla, or where the user's
    JAX_COMPILATION_CACHE_DIR says; JAX_ENABLE_COMPILATION_CACHE=false turns that off. A command
    that trains starts once more with huge pages, where Linux has them for who asks.

    Args:
        main: the command; it is given the words after the program's name.
    """
    try:
        command = own_command(sys.argv[1:])
        if command is not None and is_to_be_supervised(sys.argv[1:]):
            sys.exit(supervise(command, Path(sys.argv[0]).name))
        take_huge_pages(sys.argv[1:])
        _keep_compiled()
        _refuse_urls(sys.argv[1:])
        main(sys.argv[1:])
        # None where the program was started with it closed.
        if sys.stdout:
            sys.stdout.flush()
    except Exception as error:
        # It returns where the error is a defect.
        end(error)
        raise
    except KeyboardInterrupt as error:
        end(error)


def spread_over_cores(num_devices: NumDevices) -> NumDevices:
    """Has a command train on every core; call it before jax is first used.

    Args:
        num_devices: what the user asked for.

    Returns:
        "auto" where the user asked for nothing, and jax has a CPU device for each core.
    """
    return "auto" if use_every_core() and num_devices is None else num_devices


def program(command: str) -> str:
    """Returns how the user called a command, for its help: `train.py`, or `nadaptor train`.

    Args:
        command: its name.
    """
    called = Path(sys.argv[0]).name
    return f"{called} {command}" if called == "nadaptor" else called


def refuse_idle(given: Mapping[str, object], why: str) -> None:
    """Refuses options that would do nothing beside the others.

    Args:
        given: values by the names of the options; None, or False, where one was not given.
        why: "without --calibrate", or "with --dry-run".

    Raises:
        ValueError: one was given; the message names it and the remedy.

    Example:
        >>> refuse_idle({"--percent": None}, "without --calibrate percentile")
        >>> refuse_idle({"--percent": 99.0}, "without --calibrate percentile")
        Traceback (most recent call last):
        ValueError: --percent does nothing without --calibrate percentile; add that or leave it out
    """
    remedy = "add that or leave it out" if why.startswith("without") else "leave it out"
    for option, value in given.items():
        if value is not None and value is not False:
            raise ValueError(f"{option} does nothing {why}; {remedy}")


def check_weights(file: Path | None) -> None:
    """Checks that the file of --init-from is there, before a data set is read.

    Raises:
        ValueError: it is not.
    """
    if file is not None and not file.is_file():
        raise ValueError(f"--init-from {file}: there is no such file")


def say(text: str) -> None:
    """Says on stderr what is begun, where the first sign of it would come minutes later."""
    print(text, file=sys.stderr, flush=True)


def changed(asked: Any, default: Any, fields: Iterable[str]) -> dict[str, Any]:
    """Returns the options that were given another value than the default, for `refuse_idle`.

    Args:
        asked: an object with the fields.
        default: another.
        fields: their names.

    Example:
        >>> from nadaptor.training.options import Options
        >>> changed(Options(keep=3), Options(), ("keep", "tensorboard"))
        {'--keep': 3, '--tensorboard': None}
    """
    return {
        f"--{name.replace('_', '-')}": value
        if (value := getattr(asked, name)) != getattr(default, name)
        else None
        for name in fields
    }


def parse_named(
    named: Mapping[str, Callable[[], T]],
    what: str,
    arguments: Sequence[str],
    *,
    command: str,
    description: str,
    more: str = "",
) -> T:
    """Reads a name and what overrides the value of that name from the command line.

    Args:
        named: what makes each value, a dataclass, with a docstring that says what it is.
        what: the kind of thing, for messages: "config".
        arguments: the words after the program's name.
        command: name of the command.
        description: first lines of --help, which lists the names. NAME --help has the options.
        more: last lines of --help.

    Returns:
        The value.

    Raises:
        ValueError: there is nothing of that name; the message suggests the nearest.
        SystemExit: --help was asked for, or an option is unknown (exit code 2).
    """
    import tyro

    name = arguments[0] if arguments else ""
    if name in ("-h", "--help"):
        width = max(map(len, named))
        lines = [f"  {n:{width}}  {_first_line(make)}" for n, make in named.items()]
        print(
            f"usage: {program(command)} NAME [OPTIONS]\n\n{description}\n\n"
            f"NAME is a {what}; its values and all options: {program(command)} NAME --help\n\n"
            + "\n".join(lines)
            + more
        )
        sys.exit(0)
    make = named[check_name(name, named, what)]
    value = make()
    return read_words(
        type(value),
        prog=f"{program(command)} {name}",
        description=make.__doc__,
        default=value,
        args=list(arguments[1:]),
        config=(tyro.conf.OmitArgPrefixes,),
    )


def read_words(target: Callable[..., T], **options: Any) -> T:
    """Calls `tyro.cli`, and says in one line what is wrong with the words, where it has a box.

    Args:
        target: the function to call with what was read, or the dataclass to make of it.
        **options: of `tyro.cli`.

    Raises:
        ValueError: an option is unknown, missing, or its value none of its type.
        SystemExit: --help was asked for.
    """
    import tyro

    printed, stderr = io.StringIO(), sys.stderr

    @functools.wraps(target)
    def run(*args: Any, **kwargs: Any) -> T:
        sys.stderr = stderr
        return target(*args, **kwargs)

    sys.stderr = printed
    try:
        # A dataclass is made from the words, and prints nothing.
        return tyro.cli(target if isinstance(target, type) else run, **options)
    except SystemExit as end:
        if not end.code or not printed.getvalue():
            raise
        # The lines of a box, and what tyro draws of dashes where it draws none.
        words = re.sub(r"[\u2500-\u257f]+|-{5,}", " ", printed.getvalue()).split()
        # It has a title, which its first line may say again.
        line = re.sub(r"^(\w+ \w+) (?=\1)", "", " ".join(words))
        raise ValueError(line) from None
    finally:
        # Kept back is what tyro prints while it reads, and nothing of the command itself.
        sys.stderr = stderr


def _first_line(make: Callable[[], Any]) -> str:
    return (make.__doc__ or "").partition("\n")[0]


def _refuse_urls(arguments: Sequence[str]) -> None:
    """A bucket's address would be taken for a local folder, and be missed when all is done."""
    option = ""
    for word in arguments:
        option = word.partition("=")[0] if word.startswith("-") else option
        if re.match(r"(--?[\w-]+=)?[A-Za-z][\w+.-]*://", word):
            value = word.partition("=")[2] if word.startswith("-") else word
            check_local(value, option or "the path")
    check_local(os.environ.get("NADAPTOR_DATA_DIR", ""), "NADAPTOR_DATA_DIR")


def _keep_compiled() -> None:
    caches = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    # A "~" that stays is that of a user without a home.
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ and caches.is_absolute():
        jax.config.update("jax_compilation_cache_dir", str(caches / "nadaptor" / "xla"))
        # Small networks are a hundred programs of less than a second, jax's own limit.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
