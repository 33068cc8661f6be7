"""A spiking network as an ONNX model: the data to the outputs at every time step, in one graph.

The simulation is traced here, and `jax2onnx` turns its operations into nodes; the loop over time
is one ONNX `Loop`. What the network is stands in the model's metadata, under a digest.
"""

import hashlib
import importlib
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.extend
import numpy as np

from nadaptor._checks import check_count, check_data_argnum, extra
from nadaptor._files import making, write_bytes
from nadaptor._files.card import DamagedError, unseal
from nadaptor.neurons import Coding, Neuron
from nadaptor.simulation import Correction
from nadaptor.simulation.deployment import outputs_of_data, seal_sidecar
from nadaptor.transformation import Nonaffine, spiking

KEY = "nadaptor"
# Sums are added up in another order by another program, and a spike at a tie may flip.
_TOLERANCE = 1e-3


def to_onnx(
    f: Callable[..., Any],
    *args: Any,
    num_steps: int,
    data_argnum: int = -1,
    neuron: Neuron | None = None,
    coding: Coding = "rate",
    nonaffine: Nonaffine = "refuse",
    correction: Correction | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> Any:
    """Returns a spiking network as an ONNX model that needs neither `f` nor this library.

    The model maps the data, `input`, to the `outputs` of `nadaptor.simulate`, [T, ...] at every t;
    all other arguments are constants inside it. Before it is returned, onnxruntime runs it on the
    data, and its outputs are compared with those of the simulation.

    Args:
        f: function whose activations are quantizers of `nadaptor`, which returns one array.
        *args: its arguments, the data included: arrays, not shapes alone.
        num_steps: T.
        data_argnum: which argument is the data, one array. The model takes this batch size only.
        neuron: as in `nadaptor.simulate`.
        coding: as in `nadaptor.simulate`.
        nonaffine: as in `nadaptor.simulate`.
        correction: as in `nadaptor.simulate`.
        metadata: what else the model's metadata are to say, of values that JSON can hold.

    Returns:
        An `onnx.ModelProto`; `read_onnx` verifies the digest in its metadata.

    Raises:
        ValueError: as `nadaptor.simulate`; the data or the outputs are not one array; an operation
            has no node in ONNX, or the model computes something else than the simulation.
        MissingPackageError: jax2onnx is not installed.
    """
    jax2onnx = _package("jax2onnx")
    data, steps = check_data_argnum(data_argnum, args), check_count(num_steps, "num_steps")
    images = np.asarray(args[data])
    options: dict[str, Any] = dict(neuron=neuron, coding=coding, nonaffine=nonaffine)
    net = spiking(f, *args, **options)

    # Chunks of several steps are for speed here, and more nodes there.
    how = dict(num_steps=steps, steps_per_chunk=1, correction=correction)
    run = outputs_of_data(f, args, data, **how, **options)
    # Traced before jax2onnx sees it: while it traces, functions of jax and Flax are its own, and
    # the marks of neurons would get lost in them.
    shape = jax.ShapeDtypeStruct(images.shape, images.dtype)
    traced, outputs = jax.make_jaxpr(run, return_shape=True)(shape)
    leaves = jax.tree.leaves(outputs)
    if len(leaves) != 1:
        raise ValueError(f"f returns {len(leaves)} arrays, and the model has one output; pick one")
    plain = jax.extend.core.jaxpr_as_fun(traced)
    # It says of every intermediate value whose shape it does not write down that it does not.
    logging.getLogger("onnx_ir").setLevel(logging.ERROR)
    try:
        model = jax2onnx.to_onnx(plain, [shape], input_names=["input"], output_names=["output"])
        found = _run(model, images)
    # jax2onnx and onnxruntime raise anything on what they do not know.
    except Exception as error:
        line = " ".join(str(error).split())[:300]
        raise ValueError(f"cannot write to ONNX: {type(error).__name__}: {line}") from error
    _compare(found, np.asarray(jax.tree.leaves(jax.jit(run)(images))[0]))
    said = {
        **(metadata or {}),
        "kind": "nadaptor.onnx",
        "model_digest": _digest(model),
        "num_steps": steps,
        "correction": None if correction is None else str(correction),
    }
    card = seal_sidecar(said, net, [shape], leaves)
    entry = model.metadata_props.add()
    entry.key, entry.value = KEY, json.dumps(card)
    return model


@making("path")
def write_onnx(path: str | Path, model: Any) -> None:
    """Writes an ONNX model, whole or not at all.

    Args:
        path: file to write, such as "net.onnx".
        model: from `to_onnx`.
    """
    write_bytes(Path(path), model.SerializeToString())


def read_onnx(path: str | Path) -> tuple[Any, dict[str, Any]]:
    """Reads an ONNX model of `to_onnx`, and verifies its digest.

    Args:
        path: the file.

    Returns:
        The `onnx.ModelProto`, and what its metadata say of it.

    Raises:
        ValueError: there is no such file, or it is damaged or of another program.
        MissingPackageError: onnx is not installed.
    """
    onnx, path = _package("onnx"), Path(path)
    if not path.is_file():
        raise ValueError(f"no file at {path}; nadaptor export --form onnx writes one")
    try:
        model = onnx.ModelProto.FromString(path.read_bytes())
        told = [entry.value for entry in model.metadata_props if entry.key == KEY]
        if len(told) != 1:
            raise DamagedError("it has no metadata of nadaptor")
        card = unseal(json.loads(told[0]))
        if card.get("model_digest") != _digest(model):
            raise DamagedError("its digest is another")
    # protobuf has an error of its own for each of its implementations.
    except Exception as error:
        line = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} is damaged: {line}; export the network again") from error
    return model, card


def _package(name: str) -> Any:
    """A package of the extra, which is not in the lock."""
    with extra("onnx", "nadaptor.interop.onnx"):
        return importlib.import_module(name)


def _run(model: Any, images: np.ndarray) -> np.ndarray:
    """The outputs of a model by onnxruntime, without its remarks on the graph."""
    onnxruntime = _package("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    return np.asarray(session.run(["output"], {"input": images})[0])


def _compare(found: np.ndarray, wanted: np.ndarray) -> None:
    """Refuses a model whose mean outputs are others; single spikes may be."""
    largest = float(np.abs(wanted).max(initial=0)) or 1.0
    same = found.shape == wanted.shape
    error = float(np.abs(found - wanted).mean()) / largest if same else np.inf
    if not error < _TOLERANCE:
        raise ValueError(
            f"cannot write to ONNX: the model's outputs {list(found.shape)} are off those of the "
            f"simulation {list(wanted.shape)} by {error:.2g} of the largest: jax2onnx translates "
            "an operation of the function wrongly"
        )


def _digest(model: Any) -> str:
    """A SHA-256 over everything but the metadata."""
    bare = type(model)()
    bare.CopyFrom(model)
    # The digest stands there.
    del bare.metadata_props[:]
    return hashlib.sha256(bare.SerializeToString(deterministic=True)).hexdigest()
