"""What runs without the library: a spiking network as one compiled-ahead artefact and its sidecar.

`export` lowers the whole simulation, weights included, to a `jax.export` artefact that maps a batch
of any size to the outputs at every time step, on a CPU, a GPU or a TPU. The sidecar, JSON under a
digest, says what goes in and what comes out. Whoever runs it needs jax and flatbuffers only.
"""

import hashlib
import importlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nadaptor._checks import check_count, check_data_argnum, extra
from nadaptor._execution.convolution import portable
from nadaptor._files import making, write_bytes, write_json
from nadaptor._files.card import DamagedError, seal, unseal
from nadaptor._version import __version__
from nadaptor.neurons import Coding, Neuron
from nadaptor.simulation import Correction, simulate
from nadaptor.transformation import Nonaffine, SpikingNetwork, spiking

PLATFORMS = ("cpu", "cuda", "tpu")
KIND = "nadaptor.export"


class Exported(NamedTuple):
    """A loaded artefact."""

    call: Callable[[Any], Any]  # the data, a batch of any size, to outputs [T, ...] at every t
    sidecar: dict[str, Any]


@making("path")
def export(
    path: str | Path,
    f: Callable[..., Any],
    *args: Any,
    num_steps: int,
    data_argnum: int = -1,
    neuron: Neuron | None = None,
    coding: Coding = "rate",
    nonaffine: Nonaffine = "refuse",
    correction: Correction | None = None,
    any_batch: bool = True,
    platforms: Sequence[str] = PLATFORMS,
    preprocessing: Mapping[str, Any] | None = None,
    class_names: Sequence[str] | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> Path:
    """Writes a spiking network as one artefact that needs neither `f` nor this library.

    The artefact maps the data to the `outputs` of `nadaptor.simulate`, [T, ...] at every t; all
    other arguments are constants inside it. Beside it lies its sidecar, `PATH.json`: the version of
    its format, digests of itself and of the artefact, the shapes that go in and come out,
    `preprocessing`, `class_names`, and which operations are analog, because no spikes leave them.

    Args:
        path: file to write, such as "net.jax"; one that is there is replaced.
        f: function whose activations are quantizers of `nadaptor`.
        *args: its arguments; of the data only shapes and dtypes count.
        num_steps: T.
        data_argnum: which argument is the data, a pytree of arrays with the examples along axis 0.
        neuron: as in `nadaptor.simulate`.
        coding: as in `nadaptor.simulate`.
        nonaffine: as in `nadaptor.simulate`.
        correction: as in `nadaptor.simulate`.
        any_batch: whether the number of examples stays open; otherwise it is that of the data.
        platforms: what to lower for; any machine can lower for all of them.
        preprocessing: what has to be done to the data before, or is done inside; for the sidecar.
        class_names: of the outputs; for the sidecar.
        metadata: what else the sidecar is to say.

    Returns:
        The path of the sidecar.

    Raises:
        ValueError: as `nadaptor.simulate`; there is no such argument; the data have no common axis
            0, or `f` works for the one batch size only; or the sidecar would hold what JSON cannot.
        MissingPackageError: flatbuffers is not installed.

    Example:
        >>> import nadaptor, tempfile
        >>> f = lambda w, x: nadaptor.lsq(x @ w, 0.5, levels=2)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     sidecar = nadaptor.export(
        ...         f"{folder}/net.jax", f, jnp.ones((3, 1)), jnp.ones((2, 3)), num_steps=4
        ...     )
        ...     load_exported(f"{folder}/net.jax").call(jnp.ones((5, 3))).shape
        (4, 5, 1)
    """
    _need_flatbuffers()
    from jax import export as jax_export

    path, steps = Path(path), check_count(num_steps, "num_steps")
    data = check_data_argnum(data_argnum, args)
    options: dict[str, Any] = dict(neuron=neuron, coding=coding, nonaffine=nonaffine)
    net = spiking(f, *args, **options)

    run = outputs_of_data(f, args, data, num_steps=steps, correction=correction, **options)
    shapes = _symbolic(args[data]) if any_batch else jax.eval_shape(lambda x: x, args[data])
    try:
        if any_batch:
            # An export would only be refused at the first batch of another size.
            jax.eval_shape(run, _one_more(args[data]))
        exported = jax_export.export(jax.jit(run), platforms=tuple(platforms))(shapes)
    except Exception as error:
        # A refusal of our own names its remedy already.
        ours = isinstance(error, ValueError) and str(error).startswith("cannot convert")
        if ours or not any_batch:
            raise
        raise _of_batch(error) from error
    artefact = bytes(exported.serialize())
    said = {
        **(metadata or {}),
        "kind": KIND,
        "artefact": path.name,
        "artefact_digest": hashlib.sha256(artefact).hexdigest(),
        "num_steps": steps,
        "correction": None if correction is None else str(correction),
        "preprocessing": dict(preprocessing or {}),
        "class_names": None if class_names is None else list(class_names),
        "platforms": list(exported.platforms),
    }
    # Before anything is written: a field that JSON cannot hold leaves what is there.
    sealed = seal_sidecar(said, net, exported.in_avals, exported.out_avals)
    write_bytes(path, artefact)
    write_json(sidecar_of(path), sealed)
    return sidecar_of(path)


def outputs_of_data(
    f: Callable[..., Any], args: tuple[Any, ...], data: int, **options: Any
) -> Callable[[Any], Any]:
    """Returns a simulation as a function of the data alone, with all other arguments inside.

    Args:
        f: function whose activations are quantizers of `nadaptor`.
        args: its arguments.
        data: which argument is the data.
        **options: of `nadaptor.simulate`.

    Returns:
        What maps the data to the outputs [T, ...] at every time step, in operations of JAX's own.
    """

    def run(x: Any) -> Any:
        with portable():
            return simulate(f, *args[:data], x, *args[data + 1 :], **options).outputs

    return run


def seal_sidecar(
    said: Mapping[str, Any], net: SpikingNetwork, inputs: Sequence[Any], outputs: Sequence[Any]
) -> dict[str, Any]:
    """Returns what an artefact says of itself, under a digest.

    Args:
        said: fields of the caller's.
        net: the network; its coding and its analog operations are said.
        inputs: with the shapes and dtypes that go in.
        outputs: with those that come out.

    Raises:
        ValueError: a field is none that JSON can hold.
    """
    card = {
        **said,
        "inputs": _describe(inputs),
        "outputs": _describe(outputs),
        "coding": net.coding,
        "analog": list(net.analog),
        "versions": {"nadaptor": __version__, "jax": jax.__version__},
    }
    try:
        return seal(card)
    except TypeError as error:
        raise ValueError(f"the sidecar is JSON: {error}; pass lists, dicts and numbers") from error


def load_exported(path: str | Path) -> Exported:
    """Reads an artefact and its sidecar, and verifies the digests of both.

    Args:
        path: of the artefact; the sidecar lies beside it.

    Returns:
        What to call, and the sidecar.

    Raises:
        ValueError: either is missing, damaged, or of another program or a later version.
        MissingPackageError: flatbuffers is not installed.
    """
    _need_flatbuffers()
    from jax import export as jax_export

    path = Path(path)
    card, artefact = read_sidecar(path), _read(path)
    if hashlib.sha256(artefact).hexdigest() != card["artefact_digest"]:
        raise ValueError(f"{path} is damaged: its digest is another; export the network again")
    try:
        exported = jax_export.deserialize(bytearray(artefact))
    except Exception as error:
        raise ValueError(
            f"{path} was written by jax {card.get('versions', {}).get('jax')}, and jax "
            f"{jax.__version__} cannot read it; export the network again"
        ) from error
    return Exported(jax.jit(exported.call), card)


def read_sidecar(path: Path) -> dict[str, Any]:
    """Reads the sidecar of an artefact.

    Args:
        path: of the artefact.

    Raises:
        ValueError: it is missing, damaged, or of another program.
    """
    file = sidecar_of(path)
    try:
        card = unseal(json.loads(_read(file)))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError, DamagedError) as error:
        why = f": {error}" if isinstance(error, DamagedError) else ""
        raise ValueError(f"{file} is damaged{why}; export the network again") from error
    # `unseal` believes old cards without a digest; sidecars have had one from the first.
    if card.get("kind") != KIND or "card_digest" not in card:
        raise ValueError(f"{file} is no sidecar of nadaptor.export; pass what that wrote")
    return card


def sidecar_of(path: Path) -> Path:
    """Returns where the sidecar of an artefact lies.

    Example:
        >>> sidecar_of(Path("net.jax")).name
        'net.jax.json'
    """
    return path.with_name(f"{path.name}.json")


def _need_flatbuffers() -> None:
    """`jax.export` reads and writes with it, and does not depend on it."""
    with extra("export", "nadaptor.export"):
        importlib.import_module("flatbuffers")


def _symbolic(data: Any) -> Any:
    """The shapes of the data, with an open number of examples."""
    from jax import export as jax_export

    shapes = jax.eval_shape(lambda x: x, data)
    sizes = {x.shape[:1] for x in jax.tree.leaves(shapes)}
    if len(sizes) != 1 or () in sizes:
        raise ValueError(
            f"the data need one number of examples along axis 0, and have {sorted(sizes)}; pass "
            "any_batch=False to keep their shapes as they are"
        )
    (batch,) = jax_export.symbolic_shape("batch")
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype), shapes)


def _one_more(data: Any) -> Any:
    """The shapes of the data, with one example more."""
    shapes = jax.eval_shape(lambda x: x, data)
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((x.shape[0] + 1, *x.shape[1:]), x.dtype), shapes
    )


def _of_batch(error: Exception) -> ValueError:
    """Says what to do where a function does not work for an open number of examples."""
    line = " ".join(str(error).split())[:300]
    return ValueError(
        f"cannot export for a batch of any size ({type(error).__name__}: {line}); pass "
        "any_batch=False, or write the batch's size in f as x.shape[0]"
    )


def _describe(avals: Sequence[Any]) -> list[dict[str, Any]]:
    def size(n: Any) -> int | str:
        return n if isinstance(n, int) else str(n)

    return [{"dtype": str(x.dtype), "shape": [size(n) for n in x.shape]} for x in avals]


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(
            f"cannot read {path}: {error.strerror or error}; nadaptor.export writes an artefact "
            "and a sidecar, which belong side by side"
        ) from error


def output_of(outputs: Any) -> jax.Array:
    """Returns the one array of logits [T, B, classes] among the outputs of an artefact.

    Args:
        outputs: what the artefact returned.

    Raises:
        ValueError: there is not one array of three axes.

    Example:
        >>> output_of({"logits": jnp.zeros((4, 2, 10))}).shape
        (4, 2, 10)
    """
    leaves = jax.tree.leaves(outputs)
    if len(leaves) != 1 or leaves[0].ndim != 3:
        shapes = [list(jnp.shape(x)) for x in leaves]
        raise ValueError(
            f"the artefact returns arrays of the shapes {shapes}, and accuracy needs one of "
            "[steps, images, classes]"
        )
    return leaves[0]
