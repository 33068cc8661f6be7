"""What a conversion begins with: a trained checkpoint, or a file of weights and its config."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nadaptor.checkpoints.checkpoint import load_checkpoint
from nadaptor.configs.build import build_model
from nadaptor.configs.config import Config, check_config, from_json, replace
from nadaptor.data.config import DataConfig
from nadaptor.data.registry import open_split
from nadaptor.data.source import Source, describe, images_together
from nadaptor.models.registry import has_pool


class Weights(NamedTuple):
    """A file of weights in torch's layout, and the config that says what it is of."""

    file: Path
    config: Config  # its network, and its images with their split and normalisation


class Origin(NamedTuple):
    """A network to convert, before anything is measured."""

    name: str  # of the checkpoint or the file, for messages
    variables: Any  # with batch norm; without scales where they come from a file
    config: Config
    parent: str | dict[str, str]  # digest of the checkpoint's card, or what the file is
    data: dict[str, Any] | None  # what the card of its training says of its data


def open_origin(source: Path | Weights, data_dir: Path | None = None) -> Origin:
    """Reads the network to convert.

    Args:
        source: folder of a trained network, as `train` returns it; or a file of weights.
        data_dir: folder of data sets; None for the environment's NADAPTOR_DATA_DIR. A file says
            nothing of its classes: they are those of the config's data set.

    Returns:
        The network.

    Raises:
        ValueError: there is no such checkpoint or file, it is damaged, it does not fit the config's
            network and classes, or the data set is not there.
    """
    if isinstance(source, Path):
        variables, card = load_checkpoint(source, "ann")
        config = from_json(card["config"])
        return Origin(str(source), variables, config, card["card_digest"], card.get("data"))
    from nadaptor.interop.pretrained import file_identity

    file, config = source.file, check_config(source.config)
    images = open_split(config.data, "train", data_dir)
    # A file holds neither scales nor thresholds; they are measured later.
    plain = replace(config, activation="relu", dtype="float32")
    model = build_model(plain, num_classes=images.spec.num_classes)
    one = jax.ShapeDtypeStruct((1, *images.spec.image_shape), jnp.float32)
    # Shapes do, because no head starts anew.
    shapes = jax.eval_shape(model.init, jax.random.key(0), one)
    variables = read_file(
        file,
        plain,
        shapes,
        "convert with images of the file's classes, or train a new last layer "
        "by nadaptor train with --init-from and --new-head",
    )
    if line := replaced_pools(config):
        print(line)
    return Origin(str(file), variables, config, file_identity(file), describe(images))


def read_file(
    file: Path, config: Config, variables: Any, classes_differ: str, *, new_head: bool = False
) -> dict[str, Any]:
    """Reads a file of weights for a config's network, and says in a command's words what is wrong.

    Args:
        file: see `nadaptor.interop.load_pretrained`.
        config: of the network.
        variables: of the network, or their shapes.
        classes_differ: what to do where the file is of another number of classes.
        new_head: as for `load_pretrained`.

    Raises:
        ValueError: the file cannot be read, or is of another network.
    """
    from nadaptor.interop.pretrained import MisfitError, load_pretrained

    try:
        return load_pretrained(file, variables, new_head=new_head)
    except MisfitError as error:
        model, data = config.network.model, config.data.dataset
        if error.classes is None:
            raise ValueError(f"{file} is not of {model}: {error}") from error
        has, wanted = error.classes
        raise ValueError(
            f"{file} is of {has} classes, and data set {data} has {wanted}: {classes_differ}"
        ) from error


def replaced_pools(config: Config) -> str | None:
    """Says that a network has means where published weights have max-pools; None where not."""
    if config.network.pool == "max" or not has_pool(config.network.model):
        return None
    return "a mean is in the place of each max-pool; --pool max keeps them as published"


def open_measured(
    data: DataConfig, count: int | None, data_dir: Path | None, known: Mapping[str, Any] | None
) -> Source:
    """Opens the training images to measure a network on.

    Args:
        data: which.
        count: how many; None for as many as are evaluated at once.
        data_dir: as for `open_origin`.
        known: what the card of the training says of its data.

    Raises:
        ValueError: as `open_split`.
    """
    source = open_split(data, "train", data_dir, count, known)
    if count is not None:
        return source
    return source._replace(size=min(source.size, images_together(source.spec)))


def check_free(out: Path) -> None:
    """Checks that there is nothing yet where a network is to be written.

    Raises:
        ValueError: there is.
    """
    # A link to nowhere is in the way as well.
    if out.exists() or out.is_symlink():
        raise ValueError(f"{out} exists already; choose another --out or remove it")
