"""One interface to every data set: a split is a size and a function that reads example i.

A source never hands out another split's images: the test set is opened where an evaluation asks for
it and nowhere else.
"""

import itertools
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

SplitName = Literal["train", "validation", "test"]


class Split(NamedTuple):
    """Images and labels that lie in memory: of a small data set, or of one batch."""

    images: np.ndarray  # [N, H, W, C] uint8 as stored, or float32 normalised
    labels: np.ndarray  # [N] int32, 0 to num_classes - 1


class Spec(NamedTuple):
    """What a network must know of a data set, before any image is read."""

    num_classes: int
    image_shape: tuple[int, int, int]  # H, W, C of a training image
    mean: tuple[float, ...]  # of each channel, in units of the stored pixels
    std: tuple[float, ...]  # the same


class Example(NamedTuple):
    """One example as it is stored."""

    image: np.ndarray | bytes  # [H, W, C] uint8, or a whole image file
    label: int
    name: str  # where it lies, for messages


class Source(NamedTuple):
    """One split of a data set."""

    spec: Spec
    size: int  # examples
    read: Callable[[int], Example]  # 0 to size - 1; called from several threads at once
    # All that is stored of it as uint8, also beyond `size`, where it is small enough for memory.
    resident: Split | None
    identity: Mapping[str, Any]  # for the checkpoint: what JSON can hold, "class_names" among it


# Images to evaluate at once: so many, and of large ones so many that they have these pixels
# together, because the activations of a batch lie in memory.
TOGETHER, PIXELS = 128, 32 * 224 * 224
# Characters of a file's name in a message.
LONGEST_NAME = 240
# Of photographs, in units of a pixel of 0 to 255; torchvision's, and so of most weights.
PHOTOGRAPHS = tuple(
    tuple(255 * x for x in c) for c in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
)


def normalize(images: jax.Array, spec: Spec) -> jax.Array:
    """Returns `(images - mean) / std` in float32.

    Done on the device, so that a pixel crosses to it as one byte.

    Args:
        images: [..., C], pixels as stored.
        spec: of the data set.

    Example:
        >>> spec = Spec(2, (1, 1, 1), mean=(4.0,), std=(2.0,))
        >>> normalize(np.full((1, 1, 1), 6, np.uint8), spec).item()
        1.0
    """
    mean, std = (jnp.array(c, jnp.float32) for c in (spec.mean, spec.std))
    return (jnp.asarray(images).astype(jnp.float32) - mean) / std


def normalize_array(images: np.ndarray, spec: Spec) -> np.ndarray:
    """Returns what `normalize` does, in NumPy: for images that go on to the devices as floats.

    Example:
        >>> spec = Spec(2, (1, 1, 1), mean=(4.0,), std=(2.0,))
        >>> normalize_array(np.full((1, 1, 1), 6, np.uint8), spec).item()
        1.0
    """
    mean, std = (np.array(c, np.float32) for c in (spec.mean, spec.std))
    return (images.astype(np.float32) - mean) / std


def sized_spec(spec: Spec, shape: tuple[int, ...] | None, image_size: int | None) -> Spec:
    """Returns `spec` with square images of `image_size`.

    Args:
        spec: of the data set.
        shape: of its stored images, where all are alike: they can be averaged down only.
        image_size: pixels per side; None for the spec's own.

    Raises:
        ValueError: the stored images are smaller, or not square.
    """
    if image_size is None:
        return spec
    if shape and (shape[0] != shape[1] or image_size > shape[0]):
        raise ValueError(
            f"image_size {image_size} cannot be had from images of {shape[1]}x{shape[0]} pixels; "
            "choose less, of square images"
        )
    return spec._replace(image_shape=(image_size, image_size, spec.image_shape[-1]))


def printable(name: str) -> str:
    """Returns a name for a message: odd characters escaped, and cut in the middle where it is long.

    Example:
        >>> printable("cat\\x1b[2J.png")
        'cat\\\\x1b[2J.png'
    """
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)
    return shown if len(shown) <= LONGEST_NAME else f"{shown[:100]}...{shown[-100:]}"


def images_together(spec: Spec) -> int:
    """Returns how many images to evaluate at once: 128 up to 112 pixels per side, 32 at 224.

    Example:
        >>> images_together(Spec(10, (224, 224, 3), (0.0,), (1.0,)))
        32
    """
    height, width, _ = spec.image_shape
    return max(1, min(TOGETHER, PIXELS // (height * width)))


def describe(source: Source) -> dict[str, Any]:
    """Returns what a checkpoint's card says of the data of its network.

    Example:
        >>> from nadaptor.data.digits import open_digits
        >>> describe(open_digits("train", 150))["image_shape"]
        [8, 8, 1]
    """
    said = {**source.identity, **source.spec._asdict()}
    # As JSON gives it back: a tuple comes back as a list.
    return {k: list(v) if isinstance(v, tuple) else v for k, v in said.items()}


def check_identity(source: Source, known: Mapping[str, Any]) -> Source:
    """Returns `source`, if it is of the data that a network was trained on.

    Args:
        source: a split, as it is stored now.
        known: what a checkpoint's card says of its data: the `identity` of its training images.

    Raises:
        ValueError: the classes or the training files differ, so that a label may mean another
            class; the message says which.

    Example:
        >>> from nadaptor.data.digits import open_digits
        >>> source = open_digits("test", 150)
        >>> check_identity(source, source.identity).size
        450
    """
    found, name = source.identity, printable(str(source.identity["dataset"]))
    remedy = "use the data of its training, see --data-dir"
    for i, pair in enumerate(
        itertools.zip_longest(found["class_names"], known.get("class_names", ()), fillvalue=None)
    ):
        if "class_names" in known and pair[0] != pair[1]:
            here, trained = ("none" if c is None else repr(printable(c)) for c in pair)
            raise ValueError(
                f"class {i} of data set {name} is {here}, and was {trained} when the network was "
                f"trained; {remedy}"
            )
    for field, what in (("files_digest", "names of the training files"), ("version", "version")):
        if field in known and known[field] != found.get(field):
            raise ValueError(
                f"the {what} of data set {name} is not what the network was trained on "
                f"({str(found.get(field))[:12]}, and was {str(known[field])[:12]}); {remedy}"
            )
    return source


def resident_source(spec: Spec, split: Split, identity: Mapping[str, Any]) -> Source:
    """Returns the source of a split that lies in memory."""

    def read(index: int) -> Example:
        name = f"{identity['dataset']} {identity['split']} {index}"
        return Example(split.images[index], int(split.labels[index]), name)

    return Source(spec, len(split.labels), read, split, identity)


def hold_out(total: int, validation_size: int, split: SplitName) -> np.ndarray:
    """Returns the examples of the stored training set that belong to one split.

    The validation set is the same in every run, whatever its seed: weights that start from another
    run's have not seen it.

    Args:
        total: examples in the stored training set.
        validation_size: how many of them validate.
        split: "train", "validation", or "test" for a stored test set: all of it.

    Returns:
        Indices, int64, in a fixed order.

    Raises:
        ValueError: the validation set leaves nothing to train on, or the split is unknown.

    Example:
        >>> sorted([*hold_out(4, 1, "train"), *hold_out(4, 1, "validation")]) == [0, 1, 2, 3]
        True
    """
    if split == "test":
        return np.arange(total)
    if split not in ("train", "validation"):
        raise ValueError(f"split must be one of train, validation, test, not {split!r}")
    if not 0 < validation_size < total:
        raise ValueError(
            f"validation_size must be between 1 and {total - 1}, not {validation_size}: there are "
            f"{total} training images. A named config has the number of its own data set; for "
            "another one say --validation-size"
        )
    order = permutation(total, 0, 0)
    return order[:validation_size] if split == "validation" else order[validation_size:]


def permutation(size: int, seed: int, epoch: int) -> np.ndarray:
    """Returns a random order of `size` things, a pure function of seed and epoch."""
    # Sorted raw bits, because NumPy keeps them for ever, and a permutation's algorithm it does not.
    return np.argsort(np.random.Philox(key=[seed, epoch]).random_raw(size), kind="stable")
