"""The errors of a run that was asked for correctly: each has its exit code at the doors."""


class RunError(RuntimeError):
    """A run cannot go on: its loss is not finite, or a converted network fails its own checks."""


class Interrupted(RuntimeError):
    """A run was told to end (SIGTERM), and has saved what it resumes from."""
