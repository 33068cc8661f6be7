"""What `quantize` says of a function with nothing to quantize, and of scales that are none."""

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from nadaptor._jaxpr.found import NO_NEURON, NOT_SELECTED, PART_OF, Found, Left

_SHOWN = 4
FIRST = (
    "the first argument of a quantized function is the scales, as q.init(*args) returns them, and "
    "those of the function follow: q(scales, *args), nadaptor.simulate(q, scales, *args, ...)"
)


def nothing_to_quantize(left: Sequence[Left], argnums: tuple[int, ...] | None) -> ValueError:
    """The error that names what was seen, and the remedy.

    Args:
        left: what is left of the function.
        argnums: which arguments are data; None for all.
    """
    rejected = [e for e in left if e.why == NOT_SELECTED and e.kind != "max_pool"]
    if rejected:
        names = ", ".join(f"{e.name!r} ({e.source})" for e in rejected[:_SHOWN])
        more = len(rejected) - _SHOWN
        rest = f" and {more} more" if more > 0 else ""
        return ValueError(
            f"cannot quantize: select rejects each of the {len(rejected)} layers that could be "
            f"quantized: {names}{rest}; let it return True for those to be quantized"
        )
    if left and all(e.why == NO_NEURON or e.why.startswith(PART_OF) for e in left):
        named = [(e.kind if e.why == NO_NEURON else e.why.removeprefix(PART_OF), e) for e in left]
        others = dict.fromkeys(f"{name} at {e.source}" for name, e in named)
        shown = "; ".join(list(others)[:_SHOWN])
        return ValueError(
            f"cannot quantize: the function has no ReLU, but {shown}: replace it by a ReLU, and "
            "train with it"
        )
    seen = "; ".join(f"{e.kind} at {e.source} ({e.why})" for e in left[:_SHOWN])
    return ValueError(
        f"cannot quantize: no ReLU of the function depends on its data, {_in_words(argnums)}, by a "
        f"product with weights; name the data by argnums. Seen and left: {seen or 'nothing'}"
    )


def _in_words(argnums: tuple[int, ...] | None) -> str:
    if argnums is None:
        return "all arguments"
    names = ["the last argument" if n == -1 else f"argument {n}" for n in argnums]
    return " and ".join(names)


def check_first(scales: Any) -> None:
    """Raises a ValueError where an argument is neither a number nor arrays by name."""
    if isinstance(scales, Mapping):
        nested = Mapping | list | tuple
        flat = all(isinstance(k, str) and not isinstance(x, nested) for k, x in scales.items())
    else:
        flat = isinstance(scales, int | float) or hasattr(scales, "shape")
    if not flat:
        raise ValueError(FIRST)


def swapped(f: Callable[..., Any], scales: Any, args: tuple[Any, ...]) -> bool:
    """Of a function that fails: whether its scales seem to be forgotten, or further behind."""
    if any(_are_numbers(x) for x in args) and not _are_numbers(scales):
        return True
    try:
        signature = inspect.signature(f)
    except (TypeError, ValueError):
        return False
    return not _takes(signature, args) and _takes(signature, (scales, *args))


def _are_numbers(x: Any) -> bool:
    return isinstance(x, Mapping) and bool(x) and all(_is_number(v) for v in x.values())


def _is_number(x: Any) -> bool:
    return isinstance(x, int | float) or getattr(x, "shape", None) == ()


def _takes(signature: inspect.Signature, args: tuple[Any, ...]) -> bool:
    try:
        signature.bind(*args)
    except TypeError:
        return False
    return True


def warn_of_means(found: Found) -> None:
    """Warns where max-pools become means and the user has not asked for it."""
    layers = [plan.layer for plan in found.plans.values() if plan.layer is not None]
    pools = [layer for layer in layers if layer.kind == "max_pool"]
    if pools:
        warnings.warn(
            f"quantize puts a mean in the place of each of {len(pools)} max-pools, the first at "
            f"{pools[0].source}: until it is trained with the means that is another network; keep "
            "the maxima by pools=False, with coding='sum' in the simulation, or say pools=True and "
            "train with the means",
            stacklevel=3,
        )
