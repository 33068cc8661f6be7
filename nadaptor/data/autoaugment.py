"""AutoAugment's policy for CIFAR-10, in JAX on uint8 images: it runs inside a compiled step.

An operation is of one of three families, and each image goes through one program whichever it is:
a geometric one moves pixels by an affine map, an enhancement blends the image with a degenerate
one, and a tone curve looks pixels up in a table. The arithmetic is Pillow's.

Source: Cubuk et al., AutoAugment: learning augmentation policies from data, 2019, tables 6 and 7.
Where the paper is silent, the choices of the code that the published SNN papers train with:
magnitudes in ten even steps, nearest neighbours, grey where nothing was, translation in fractions
of ImageNet's 331 pixels. Rotations go both ways, as the paper's range has it.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import jax
import jax.numpy as jnp
import numpy as np

FILL = 128
# Each sub-policy: two of (operation, probability, magnitude 0 to 9).
POLICY = (
    (("invert", 0.1, 7), ("contrast", 0.2, 6)),
    (("rotate", 0.7, 2), ("translate_x", 0.3, 9)),
    (("sharpness", 0.8, 1), ("sharpness", 0.9, 3)),
    (("shear_y", 0.5, 8), ("translate_y", 0.7, 9)),
    (("auto_contrast", 0.5, 8), ("equalize", 0.9, 2)),
    (("shear_y", 0.2, 7), ("posterize", 0.3, 7)),
    (("color", 0.4, 3), ("brightness", 0.6, 7)),
    (("sharpness", 0.3, 9), ("brightness", 0.7, 9)),
    (("equalize", 0.6, 5), ("equalize", 0.5, 1)),
    (("contrast", 0.6, 7), ("sharpness", 0.6, 5)),
    (("color", 0.7, 7), ("translate_x", 0.5, 8)),
    (("equalize", 0.3, 7), ("auto_contrast", 0.4, 8)),
    (("translate_y", 0.4, 3), ("sharpness", 0.2, 6)),
    (("brightness", 0.9, 6), ("color", 0.2, 8)),
    (("solarize", 0.5, 2), ("invert", 0.0, 3)),
    (("equalize", 0.2, 0), ("auto_contrast", 0.6, 0)),
    (("equalize", 0.2, 8), ("equalize", 0.6, 4)),
    (("color", 0.9, 9), ("equalize", 0.6, 6)),
    (("auto_contrast", 0.8, 4), ("solarize", 0.2, 8)),
    (("brightness", 0.1, 3), ("color", 0.7, 0)),
    (("solarize", 0.4, 5), ("auto_contrast", 0.9, 3)),
    (("translate_y", 0.9, 9), ("translate_y", 0.7, 9)),
    (("auto_contrast", 0.9, 2), ("solarize", 0.8, 3)),
    (("equalize", 0.8, 8), ("invert", 0.1, 3)),
    (("translate_y", 0.7, 9), ("auto_contrast", 0.9, 1)),
)


def auto_augment(key: jax.Array, image: jax.Array) -> jax.Array:
    """Applies one of the 25 sub-policies, chosen uniformly.

    Each of its two operations happens with its probability; an amount that has a sign gets a random
    one.

    Args:
        key: typed PRNG key, consumed.
        image: [H, W, 3] uint8.

    Returns:
        [H, W, 3] uint8.

    Raises:
        ValueError: the image is not RGB.

    Example:
        >>> image = jnp.full((32, 32, 3), 7, jnp.uint8)
        >>> auto_augment(jax.random.key(0), image).shape
        (32, 32, 3)
    """
    if image.shape[-1] != 3:
        raise ValueError(
            f"AutoAugment's CIFAR-10 policy needs RGB images, not {image.shape[-1]} channels; "
            "choose augmentation crop_flip"
        )
    policy_key, happens_key, sign_key = jax.random.split(key, 3)
    chosen = jax.random.randint(policy_key, (), 0, len(POLICY))
    draws = jax.random.uniform(happens_key, (2,))
    signs = jax.random.rademacher(sign_key, (2,), jnp.float32)
    for i in range(2):
        operation, probability, centre, swing = (jnp.asarray(t)[chosen, i] for t in _tables())
        # Under vmap a condition would compute both of its branches, too.
        changed = apply_operation(image, operation, centre + signs[i] * swing)
        image = jnp.where(draws[i] < probability, changed, image)
    return image


def apply_operation(image: jax.Array, operation: jax.Array, amount: jax.Array) -> jax.Array:
    """Applies one operation.

    Args:
        image: [H, W, 3] uint8.
        operation: its place in `OPERATIONS`.
        amount: of a shear, its slope; of a translation, a fraction of the image; of a rotation,
            degrees; of an enhancement, a factor, 1 for the image itself; of "posterize", bits; of
            "solarize", a threshold; of the others, nothing.

    Returns:
        [H, W, 3] uint8.

    Example:
        >>> image = jnp.full((2, 2, 3), 100, jnp.uint8)
        >>> apply_operation(image, OPERATIONS.index("brightness"), 0.5)[0, 0].tolist()
        [50, 50, 50]
    """
    pixels, amount = jnp.asarray(image, jnp.int32), jnp.asarray(amount, jnp.float32)

    def choose(family: Mapping[str, _Part]) -> jax.Array:
        # lax.switch clamps the index: of a family that is not meant, any member will do.
        first = OPERATIONS.index(next(iter(family)))
        return jax.lax.switch(operation - first, list(family.values()), pixels, amount)

    # Under vmap a switch computes every branch. So a gather, a blend and a look-up stand outside of
    # it, and are done once each.
    results = (
        _move(pixels, choose(_MATRICES)),
        _blend(choose(_DEGENERATES), pixels, amount),
        _look_up(choose(_TABLES), pixels),
    )
    # OPERATIONS has the families one after another, and these are the first of theirs.
    enhances, looks_up = (operation >= OPERATIONS.index(name) for name in ("color", "invert"))
    family = jnp.int32(enhances) + jnp.int32(looks_up)
    return jax.lax.select_n(family, *results).astype(jnp.uint8)


def _move(pixels: jax.Array, matrix: jax.Array) -> jax.Array:
    """Takes each pixel from the one that holds `matrix @ (x, y, 1)` of its centre."""
    height, width, _ = pixels.shape
    # Pillow maps the centre of a pixel.
    x, y = jnp.arange(width) + 0.5, jnp.arange(height)[:, None] + 0.5
    column, row = (jnp.floor(a * x + b * y + c).astype(jnp.int32) for a, b, c in matrix)
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    moved = pixels[row.clip(0, height - 1), column.clip(0, width - 1)]
    return jnp.where(inside[..., None], moved, FILL)


def _blend(degenerate: jax.Array, pixels: jax.Array, factor: jax.Array) -> jax.Array:
    blended = degenerate + factor * (pixels - degenerate)
    # Pillow cuts off, and does not round.
    return jnp.floor(blended.clip(0, 255)).astype(jnp.int32)


def _look_up(table: jax.Array, pixels: jax.Array) -> jax.Array:
    return jnp.take_along_axis(table, pixels.reshape(-1, 3), axis=0).reshape(pixels.shape)


def _shear_x(pixels: jax.Array, slope: jax.Array) -> jax.Array:
    return jnp.array([[1, slope, 0], [0, 1, 0]])


def _shear_y(pixels: jax.Array, slope: jax.Array) -> jax.Array:
    return jnp.array([[1, 0, 0], [slope, 1, 0]])


def _translate_x(pixels: jax.Array, fraction: jax.Array) -> jax.Array:
    return jnp.array([[1, 0, fraction * pixels.shape[1]], [0, 1, 0]])


def _translate_y(pixels: jax.Array, fraction: jax.Array) -> jax.Array:
    return jnp.array([[1, 0, 0], [0, 1, fraction * pixels.shape[0]]])


def _rotate(pixels: jax.Array, degrees: jax.Array) -> jax.Array:
    """Counter-clockwise about the centre."""
    cos, sin = jnp.cos(jnp.deg2rad(degrees)), jnp.sin(jnp.deg2rad(degrees))
    x, y = pixels.shape[1] / 2, pixels.shape[0] / 2
    return jnp.array([[cos, -sin, x - cos * x + sin * y], [sin, cos, y - sin * x - cos * y]])


def _grey(pixels: jax.Array, _: jax.Array) -> jax.Array:
    """Luma of ITU-R 601, in Pillow's 16-bit fixed point."""
    luma = (pixels @ jnp.array([19595, 38470, 7471]) + 0x8000) >> 16
    return jnp.broadcast_to(luma[..., None], pixels.shape)


def _mean_grey(pixels: jax.Array, factor: jax.Array) -> jax.Array:
    luma = _grey(pixels, factor)[..., 0]
    # Pillow's int(mean + 0.5), in whole numbers.
    return jnp.full_like(pixels, (2 * luma.sum() + luma.size) // (2 * luma.size))


def _black(pixels: jax.Array, _: jax.Array) -> jax.Array:
    return jnp.zeros_like(pixels)


def _smooth(pixels: jax.Array, _: jax.Array) -> jax.Array:
    """Mean of 3x3 pixels, the middle one five times; the border stays as it is."""
    height, width, _channels = pixels.shape
    rows = pixels[:-2] + pixels[1:-1] + pixels[2:]
    sums = rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:] + 4 * pixels[1:-1, 1:-1]
    # A thirteenth of the sum, rounded.
    return pixels.at[1 : height - 1, 1 : width - 1].set((2 * sums + 13) // 26)


def _invert(pixels: jax.Array, _: jax.Array) -> jax.Array:
    return 255 - _tones()


def _posterize(pixels: jax.Array, bits: jax.Array) -> jax.Array:
    lost = 8 - bits.astype(jnp.int32)
    return (_tones() >> lost) << lost


def _solarize(pixels: jax.Array, threshold: jax.Array) -> jax.Array:
    return jnp.where(_tones() < threshold, _tones(), 255 - _tones())


def _auto_contrast(pixels: jax.Array, _: jax.Array) -> jax.Array:
    low, high = pixels.min((0, 1)), pixels.max((0, 1))
    stretched = (_tones() - low) * 255 // jnp.maximum(high - low, 1)
    return jnp.where(high > low, stretched.clip(0, 255), _tones())


def _equalize(pixels: jax.Array, _: jax.Array) -> jax.Array:
    flat = pixels.reshape(-1, 3)
    counts = jnp.zeros((256, 3), jnp.int32).at[flat, jnp.arange(3)].add(1)
    below = jnp.cumsum(counts, 0) - counts
    # All but the pixels of the brightest tone, in 255 steps.
    step = jnp.take_along_axis(below, flat.max(0)[None], 0)[0] // 255
    even = (step // 2 + below) // jnp.maximum(step, 1)
    # Pillow leaves an image as it is where the step is 0.
    return jnp.where(step > 0, even.clip(0, 255), _tones())


def _tones() -> jax.Array:
    return jnp.broadcast_to(jnp.arange(256)[:, None], (256, 3))


_Part = Callable[[jax.Array, jax.Array], jax.Array]
_MATRICES: Mapping[str, _Part] = MappingProxyType(
    {
        "shear_x": _shear_x,
        "shear_y": _shear_y,
        "translate_x": _translate_x,
        "translate_y": _translate_y,
        "rotate": _rotate,
    }
)
_DEGENERATES: Mapping[str, _Part] = MappingProxyType(
    {"color": _grey, "contrast": _mean_grey, "brightness": _black, "sharpness": _smooth}
)
_TABLES: Mapping[str, _Part] = MappingProxyType(
    {
        "invert": _invert,
        "posterize": _posterize,
        "solarize": _solarize,
        "auto_contrast": _auto_contrast,
        "equalize": _equalize,
    }
)
OPERATIONS = (*_MATRICES, *_DEGENERATES, *_TABLES)
# Amounts at magnitude 0, and what is added to them, with either sign, at magnitude 9.
_SIGNED: Mapping[str, tuple[float, float]] = MappingProxyType(
    {
        **dict.fromkeys(("shear_x", "shear_y"), (0, 0.3)),
        **dict.fromkeys(("translate_x", "translate_y"), (0, 150 / 331)),
        "rotate": (0, 30),
        **dict.fromkeys(_DEGENERATES, (1, 0.9)),
    }
)


def _amount(operation: str, magnitude: int) -> tuple[float, float]:
    """The amount of an operation as (centre, swing), the swing with a random sign."""
    if operation in _SIGNED:
        centre, most = _SIGNED[operation]
        return centre, most * magnitude / 9
    # Bits that stay, from 8 to 4; and the tone from which on to invert, from 256, none, to 0, all.
    unsigned = {"posterize": round(8 - 4 * magnitude / 9), "solarize": 256 - 256 * magnitude / 9}
    return unsigned.get(operation, 0), 0


@functools.cache
def _tables() -> tuple[np.ndarray, ...]:
    """The policy as arrays [25, 2]: operations, probabilities, centres and swings."""
    parts: Sequence = [part for sub_policy in POLICY for part in sub_policy]
    columns = (
        np.array([OPERATIONS.index(name) for name, _, _ in parts], np.int32),
        np.array([probability for _, probability, _ in parts], np.float32),
        *np.array([_amount(name, m) for name, _, m in parts], np.float32).T,
    )
    return tuple(column.reshape(-1, 2) for column in columns)
