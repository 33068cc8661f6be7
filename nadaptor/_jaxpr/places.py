"""Where an operation was written: the user's file and line, for error messages and layer names."""

import functools
import importlib.util
import os
import re
from typing import Any, NamedTuple

_LIBRARIES = ("jax", "flax", "equinox", "haiku", "keras", "optax", "torch", "torchax", "nadaptor")
# What is typed at a prompt is the user's, though its file's name begins as that of generated code.
_INTERACTIVE = ("<stdin>", "<ipython-input", "<python-input")
# Frames between a library function and the tracer, which are no name for what the user called.
_PLUMBING = {"current", "custom_jvp", "custom_vjp", "ufunc", "bind", "wrapper"}
_PLUMBING |= {"scope_fn", "run_interceptors"}
# The modules of the libraries that measure a batch, in training alone.
_BATCH_NORMS = {"BatchNorm", "BatchNormalization"}
_MODELS = os.path.join(os.path.dirname(os.path.dirname(__file__)), "models") + os.sep


class Location(NamedTuple):
    """Where an operation comes from."""

    source: str  # "file.py:12", or "" where it is not known
    call: str  # the outermost library function around it ("softmax"), or ""
    scope: str  # named scopes around it ("ResNet/act1"), or ""
    in_batch_norm: bool = False  # whether it is a part of a library's batch norm


NOWHERE = Location("", "", "")


def locate(eqn: Any, outer: Location) -> Location:
    """The location of an equation; inside a library call, that where the user called it.

    A library function is traced once and its trace reused, so the traceback of an equation inside
    it may be that of another call.
    """
    # A name stack is written "vmap(Net)/act1": only the names are of use.
    names = re.sub(r"\w+\(|\)", "", str(eqn.source_info.name_stack)).split("/")
    scope = "/".join(filter(None, (outer.scope, *names)))
    if outer.call:
        return outer._replace(scope=scope)
    source, call, in_batch_norm = _user_frame(eqn.source_info.traceback)
    return Location(source or outer.source, call, scope, in_batch_norm)


def enter(function: Any, here: Location) -> Location:
    """The location inside a call of a closed jaxpr: its name, if a library's; else each line."""
    name, _, path = (function.jaxpr.debug_info.func_src_info or "").partition(" at ")
    if path and not in_library(path.rpartition(":")[0]):
        return here._replace(call="")
    return here if here.call or not path else here._replace(call=name.rpartition(".")[2])


def layer_name(scope: str) -> str:
    """The named scopes without those that Flax adds for a method: "act1/act1.quantize" is act1."""
    kept: list[str] = []
    for part in scope.split("/"):
        if not (kept and part.startswith(f"{kept[-1]}.")):
            kept.append(part)
    return "/".join(kept)


def _user_frame(traceback: Any) -> tuple[str, str, bool]:
    """The innermost line outside the libraries, "file.py:12", and the library function it calls.

    And whether a batch norm of a library stands between the two.
    """
    calls: list[str] = []
    in_batch_norm = False
    for frame in traceback.frames if traceback is not None else ():
        if not in_library(frame.file_name):
            source = f"{frame.file_name}:{frame.line_num}"
            return source, calls[-1] if calls else "", in_batch_norm
        in_batch_norm |= frame.function_name.partition(".")[0] in _BATCH_NORMS
        name = frame.function_name.removesuffix(".__call__")
        # "<lambda>" and what begins with an underscore is no name that a user has called.
        if name.isidentifier() and not name.startswith("_") and name not in _PLUMBING:
            calls.append(name)
    return "", "", in_batch_norm


@functools.cache
def _library_folders() -> tuple[str, ...]:
    specs = filter(None, map(importlib.util.find_spec, _LIBRARIES))
    return tuple(os.path.dirname(spec.origin) + os.sep for spec in specs if spec.origin)


@functools.cache
def in_library(path: str) -> bool:
    """Says whether a file is of a library and not of its user."""
    # The models are a user of the library, as the line to name is the one in the model; the
    # activation layers are not.
    activation = path.startswith(_MODELS) and path.endswith("activations.py")
    user = path.startswith((_MODELS, *_INTERACTIVE)) and not activation
    return path.startswith(("<", *_library_folders())) and not user
