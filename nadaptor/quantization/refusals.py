"""What `quantize` says of a function in which it finds nothing to quantize."""

from collections.abc import Sequence

from nadaptor._jaxpr.found import NOT_SELECTED, Left

_SHOWN = 4


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
    seen = "; ".join(f"{e.kind} at {e.source} ({e.why})" for e in left[:_SHOWN])
    return ValueError(
        f"cannot quantize: no ReLU of the function depends on its data, argument {argnums}, by a "
        f"product with weights; name the data by argnums. Seen and left: {seen or 'nothing'}"
    )
