"""The errors of a run that was asked for correctly: each has its exit code at the doors."""

import signal

# What ends a run, with what it has done saved.
ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class RunError(RuntimeError):
    """A run cannot go on: its loss is not finite, or a converted network fails its own checks."""


class PassingError(RunError):
    """A run cannot go on now, and may later: it is no result of its network."""


class HeldError(PassingError):
    """Another program is making what a run needs, and holds its lock."""


class OutOfTimeError(PassingError):
    """The minutes that a run was given are over; the message says what is saved."""


class Interrupted(RuntimeError):
    """A run was told to end by a signal; the message says what is saved.

    Args:
        message: what is saved.
        number: of the signal; the exit code is 128 and this.
    """

    def __init__(self, message: str, number: int = signal.SIGTERM) -> None:
        """Keeps the signal's number."""
        super().__init__(message)
        self.number = number


class MissingPackageError(ImportError):
    """A package that only a part of the project needs is not installed."""
