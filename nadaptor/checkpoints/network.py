"""Networks of one's own on disk: the arguments of a function, and how it is run on spikes.

A network from a training loop of its own, in Linen, NNX, Equinox, Keras or plain JAX, is a function
and its arguments. `save_network` writes the arrays of all arguments but the data, by name and under
digests, with the layers that the function becomes; `load_network` puts them back into arguments of
the same structure, for a function that has the same layers.

    save_network(path, q, scales, params, images, coding="sum")
    saved = load_network(path, q, scales, params, images)
    sim = nadaptor.simulate(q, *saved.args, num_steps=16, **saved.options)
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import numpy as np

from nadaptor import IntegrateAndFire, OffsetSpikes, SignedIntegrateAndFire, Srp, StBif, spiking
from nadaptor._checks import check_data_argnum
from nadaptor._files.card import DamagedError, brief, fields_of
from nadaptor.calibration import Calibration
from nadaptor.checkpoints.checkpoint import leaf_name, load_checkpoint, save_checkpoint
from nadaptor.neurons import Coding, Neuron, rectangle, triangle
from nadaptor.quantization import Quantized
from nadaptor.simulation import Correction
from nadaptor.transformation import Nonaffine, SpikingNetwork

_KNOWN = {
    kind.__name__: kind
    for kind in (IntegrateAndFire, SignedIntegrateAndFire, StBif, OffsetSpikes, Srp)
}
_SURROGATES = {function.__name__: function for function in (triangle, rectangle)}
_CALIBRATION = "calibration"


@dataclasses.dataclass(frozen=True)
class _Settings:
    """What the card says beside the arrays."""

    layers: list[list[Any]]  # of each its name, its levels, then its shape
    data: list[list[Any]]  # of each array its dtype, then its shape
    argument: int
    keys: dict[str, str]  # typed keys among the arrays, with the kind of each
    coding: str
    nonaffine: str
    neuron: dict[str, Any] | None = None
    correction: dict[str, Any] | None = None


class SavedNetwork(NamedTuple):
    """What `load_network` returns."""

    args: tuple[Any, ...]  # of the function, the data as they were given
    neuron: Neuron | None  # None for the one of the coding
    coding: Coding
    nonaffine: Nonaffine
    correction: Correction | None
    calibration: Calibration | None  # to be put on the network that `nadaptor.spiking` makes

    @property
    def options(self) -> dict[str, Any]:
        """The options of `nadaptor.simulate`; the calibration is none of them."""
        return {
            name: getattr(self, name) for name in ("neuron", "coding", "nonaffine", "correction")
        }


def save_network(
    path: str | Path,
    f: Callable[..., Any],
    *args: Any,
    data_argnum: int = -1,
    neuron: Neuron | None = None,
    coding: Coding = "rate",
    nonaffine: Nonaffine = "refuse",
    correction: Correction | None = None,
    calibration: Calibration | None = None,
) -> None:
    """Writes the arrays of a function's arguments, and how it runs, whole or not at all.

    Args:
        path: folder to make; must not exist.
        f: function with quantized activations, as for `nadaptor.simulate`.
        *args: its arguments, pytrees of arrays; of the data only shapes and dtypes are kept.
        data_argnum: which argument is the data.
        neuron: as for `nadaptor.simulate`. Of one of your own the name is kept, and
            `load_network` is given the neuron itself.
        coding: as for `nadaptor.simulate`.
        nonaffine: as for `nadaptor.simulate`.
        correction: `OffsetSpikes`, `Srp` or None.
        calibration: thresholds, start potentials and biases of the layers; None for none.

    Raises:
        ValueError: `path` exists, `f` cannot be converted, there is no such argument, two arrays
            have one name, or a correction or a surrogate is none of the library's.
        RunError: an array holds a value that is not finite.

    Example:
        >>> import nadaptor, tempfile
        >>> f = lambda w, x: nadaptor.lsq(x @ w, 0.5, levels=2)
        >>> w, x = np.ones((3, 1), np.float32), np.ones((2, 3), np.float32)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_network(f"{folder}/net", f, w, x)
        ...     load_network(f"{folder}/net", f, w, x).args[0].ravel()
        Array([1., 1., 1.], dtype=float32)
    """
    data = check_data_argnum(data_argnum, args)
    net = spiking(f, *args, neuron=neuron, coding=coding, nonaffine=nonaffine)
    arrays = {name: _plain(leaf) for name, leaf in _named(args, data).items()}
    if calibration is not None:
        calibration.apply(net)
        arrays |= {name: np.asarray(leaf) for name, leaf in _named_parts(calibration).items()}
    settings = _Settings(
        layers=_layers(net),
        data=[[str(x.dtype), *x.shape] for x in _shapes(args[data])],
        argument=data,
        keys={name: impl for name, leaf in _named(args, data).items() if (impl := _impl(leaf))},
        coding=coding,
        nonaffine=nonaffine,
        neuron=_describe(neuron, own=True),
        correction=_describe(correction, own=False),
    )
    card = {"config": dataclasses.asdict(settings)}
    save_checkpoint(Path(path), "network", _nested(arrays), card)


def load_network(
    path: str | Path, f: Callable[..., Any], *args: Any, neuron: Neuron | None = None
) -> SavedNetwork:
    """Reads what `save_network` wrote into arguments of a function, and verifies every digest.

    Args:
        path: the folder.
        f: the function; names, levels and shapes of its layers are compared with those saved, and
            nothing else of it: another function between equal layers is not told from this one.
        *args: arguments of the same structure, arrays or their shapes; the data may be of another
            batch size. The scales of `nadaptor.quantize(f)` may be None: its layers have names.
        neuron: where the network was saved with a neuron of your own, that neuron.

    Returns:
        The arguments with the saved arrays, and the options for `nadaptor.simulate`.

    Raises:
        ValueError: there is no such folder, it is damaged or of another kind, or names, shapes,
            dtypes or layers are not those of `f` and `args`; the message names the first.
    """
    arrays, card = load_checkpoint(Path(path), "network")
    try:
        settings = fields_of(_Settings, card["config"])
        correction, own = _make(settings.correction), _own(settings.neuron)
        saved = None if own else _make(settings.neuron)
    except (DamagedError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {error}; save the network again") from error
    data = settings.argument
    if not 0 <= data < len(args):
        raise ValueError(f"{path} is of a function whose argument {data} is the data: pass it, too")
    stored = {leaf_name(p): leaf for p, leaf in jax.tree_util.tree_leaves_with_path(arrays)}
    parts = {name: stored.pop(name) for name in list(stored) if name.startswith(_CALIBRATION)}
    filled = _fill(path, _with_scales(f, args, stored), data, stored, settings.keys)
    _check_own(path, own, neuron)
    shapes = [jax.ShapeDtypeStruct(tuple(shape), dtype) for dtype, *shape in settings.data]
    if len(shapes) != len(_shapes(args[data])):
        raise ValueError(
            f"{path} was saved with {len(shapes)} arrays of data, not {len(_shapes(args[data]))}"
        )
    like = list(filled)
    # Traced on data as they were saved: the layers' shapes have the batch in them.
    like[data] = jax.tree.unflatten(jax.tree.structure(args[data]), shapes)
    found = SavedNetwork(
        args=filled,
        neuron=neuron if own else saved,
        coding=cast(Coding, settings.coding),
        nonaffine=cast(Nonaffine, settings.nonaffine),
        correction=correction,
        calibration=_calibration(parts, len(settings.layers)),
    )
    traced = {name: value for name, value in found.options.items() if name != "correction"}
    _check_layers(path, settings.layers, spiking(f, *like, **traced))
    return found


def _named(args: tuple[Any, ...], data: int) -> dict[str, Any]:
    """The arrays of all arguments but the data: "0/conv/kernel"."""
    others = [(leaf_name(p), x) for p, x in jax.tree_util.tree_leaves_with_path(args)]
    others = [(name, x) for name, x in others if name.split("/")[0] != str(data)]
    named = dict(others)
    if len(named) != len(others):
        names = [name for name, _ in others]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"two arrays have the name {twice!r}; rename one")
    return named


def _named_parts(calibration: Calibration) -> dict[str, jax.Array]:
    return {
        f"{_CALIBRATION}/{field}/{i}": array
        for field, arrays in calibration._asdict().items()
        for i, array in enumerate(arrays)
    }


def _calibration(parts: Mapping[str, np.ndarray], layers: int) -> Calibration | None:
    if not parts:
        return None
    fields = (
        tuple(jax.numpy.asarray(parts[f"{_CALIBRATION}/{field}/{i}"]) for i in range(layers))
        for field in Calibration._fields
    )
    return Calibration(*fields)


def _shapes(tree: Any) -> list[Any]:
    return jax.tree.leaves(jax.eval_shape(lambda x: x, tree))


def _impl(leaf: Any) -> str | None:
    """The kind of typed keys, as NNX keeps them beside its weights; None for numbers."""
    is_key = jax.dtypes.issubdtype(getattr(leaf, "dtype", np.float32), jax.dtypes.prng_key)
    return str(jax.random.key_impl(leaf)) if is_key else None


def _plain(leaf: Any) -> np.ndarray:
    return np.asarray(jax.random.key_data(leaf) if _impl(leaf) else leaf)


def _nested(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Named arrays as dicts in dicts: an array cannot have the name of a folder of others."""
    nested: dict[str, Any] = {}
    for name, array in arrays.items():
        *folders, last = name.split("/")
        at = nested
        for folder in folders:
            at = at.setdefault(folder, {})
            if not isinstance(at, dict):
                raise ValueError(f"{name!r} lies in {folder!r}, which is an array; rename one")
        if last in at:
            raise ValueError(f"the array {name!r} has the name of a group of others; rename it")
        at[last] = array
    return nested


def _with_scales(
    f: Callable[..., Any], args: tuple[Any, ...], stored: Mapping[str, np.ndarray]
) -> tuple[Any, ...]:
    """The arguments, with the shapes of the stored scales where a quantized function has none."""
    if not isinstance(f, Quantized) or args[0] is not None:
        return args
    # A max-pool that becomes a mean is a layer without a scale.
    names = (layer.name for layer in f.layers(*args[1:]))
    found = {name: stored[f"0/{name}"] for name in names if f"0/{name}" in stored}
    shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in found.items()}
    return (shapes, *args[1:])


def _fill(
    path: str | Path,
    args: tuple[Any, ...],
    data: int,
    stored: Mapping[str, np.ndarray],
    impls: Mapping[str, str],
) -> tuple[Any, ...]:
    """Puts the stored arrays in the place of those of the arguments."""
    wanted = _named(args, data)
    if differing := sorted(wanted.keys() ^ stored.keys()):
        where = "the arguments have" if differing[0] in wanted else f"{path} holds"
        raise ValueError(
            f"{path} is of another network: only {where} {brief(differing[0])}, and "
            f"{len(differing) - 1} other names are on one side alone"
        )

    def put(key_path: Any, leaf: Any) -> Any:
        name = leaf_name(key_path)
        if name not in stored:
            return leaf
        array = jax.numpy.asarray(stored[name])
        array = jax.random.wrap_key_data(array, impl=impls[name]) if name in impls else array
        like = jax.eval_shape(lambda x: x, leaf)
        if (array.shape, array.dtype) != (like.shape, like.dtype):
            raise ValueError(
                f"{path} is of another network: {brief(name)} is {array.dtype}{list(array.shape)}, "
                f"and the argument's is {like.dtype}{list(like.shape)}"
            )
        return array

    return jax.tree_util.tree_map_with_path(put, args)


def _layers(net: SpikingNetwork) -> list[list[Any]]:
    return [[layer.name, layer.threshold, *layer.shape] for layer in net.layers]


def _check_layers(path: str | Path, saved: list[list[Any]], net: SpikingNetwork) -> None:
    found = _layers(net)
    for ours, its in zip(saved, found, strict=False):
        if ours != its:
            raise ValueError(
                f"{path} is of another network: its layer {brief(ours[0])} has {ours[1]} levels "
                f"and the shape {ours[2:]}, and the function's {brief(its[0])} has {its[1]} and "
                f"{its[2:]}"
            )
    if len(saved) != len(found):
        raise ValueError(
            f"{path} is of another network: of {len(saved)} layers, and the function has "
            f"{len(found)}"
        )


def _describe(value: Any, own: bool) -> dict[str, Any] | None:
    """A neuron or correction as JSON; of the user's own, where they may be, the name alone."""
    if value is None:
        return None
    kind = type(value)
    if _KNOWN.get(kind.__name__) is not kind:
        if own:
            return {"own": f"{kind.__module__}.{kind.__qualname__}"}
        raise ValueError(f"{brief(value)} is no correction that can be saved; pass None")
    fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if callable(surrogate := fields.get("surrogate")):
        if surrogate not in _SURROGATES.values():
            raise ValueError(
                f"a surrogate of your own, {brief(surrogate)}, cannot be saved, and nothing but a "
                "gradient needs it: save the network with surrogate=None"
            )
        fields["surrogate"] = getattr(surrogate, "__name__", None)
    return {"type": kind.__name__, "fields": fields}


def _make(described: Mapping[str, Any] | None) -> Any:
    if described is None:
        return None
    fields = dict(described["fields"])
    if fields.get("surrogate") is not None:
        fields["surrogate"] = _SURROGATES[fields["surrogate"]]
    return _KNOWN[described["type"]](**fields)


def _own(described: Mapping[str, Any] | None) -> str | None:
    """The name of the user's own neuron, where the network was saved with one."""
    return None if described is None else described.get("own")


def _check_own(path: str | Path, own: str | None, given: Neuron | None) -> None:
    kind = type(given)
    if own is None and given is not None:
        raise ValueError(f"{path} says its neuron itself; leave the argument neuron out")
    if own is not None and f"{kind.__module__}.{kind.__qualname__}" != own:
        raise ValueError(f"{path} was saved with a neuron of your own, {own}; pass it as neuron=")
