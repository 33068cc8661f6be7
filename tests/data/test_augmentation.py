import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from nadaptor.data.augmentation import augment_batch, crop_and_flip, cutout
from nadaptor.data.autoaugment import (
    FILL,
    OPERATIONS,
    POLICY,
    apply_operation,
    auto_augment,
)
from nadaptor.data.source import Spec

SPEC = Spec(10, (32, 32, 3), (127.5, 120.0, 110.0), (60.0, 61.0, 62.0))
RNG = np.random.default_rng(0)
NOISE = RNG.integers(0, 256, (32, 32, 3), np.uint8)
DIM = RNG.integers(60, 130, (32, 32, 3), np.uint8)
RAMP = np.indices((32, 32)).sum(0)[..., None].astype(np.uint8) * np.array([1, 3, 4], np.uint8)
FLAT = np.full((32, 32, 3), 77, np.uint8)
_apply = jax.jit(jax.vmap(apply_operation))


def apply(images, operation, amounts):
    """One compiled program serves every operation and up to 20 images."""
    filled = [np.resize(x, (20, *x.shape[1:])) for x in (images, amounts)]
    place = np.full(20, OPERATIONS.index(operation))
    return np.asarray(_apply(filled[0], place, filled[1]))[: len(images)]


def affine(image, *matrix):
    return image.transform(image.size, Image.Transform.AFFINE, matrix, fillcolor=(FILL,) * 3)


PILLOW = {
    "shear_x": lambda x, a: affine(x, 1, a, 0, 0, 1, 0),
    "shear_y": lambda x, a: affine(x, 1, 0, 0, a, 1, 0),
    "translate_x": lambda x, a: affine(x, 1, 0, a * 32, 0, 1, 0),
    "translate_y": lambda x, a: affine(x, 1, 0, 0, 0, 1, a * 32),
    "rotate": lambda x, a: x.rotate(a, fillcolor=(FILL,) * 3),
    "color": lambda x, a: ImageEnhance.Color(x).enhance(a),
    "contrast": lambda x, a: ImageEnhance.Contrast(x).enhance(a),
    "brightness": lambda x, a: ImageEnhance.Brightness(x).enhance(a),
    "sharpness": lambda x, a: ImageEnhance.Sharpness(x).enhance(a),
    "invert": lambda x, a: ImageOps.invert(x),
    "posterize": lambda x, a: ImageOps.posterize(x, int(a)),
    "solarize": lambda x, a: ImageOps.solarize(x, a),
    "auto_contrast": lambda x, a: ImageOps.autocontrast(x),
    "equalize": lambda x, a: ImageOps.equalize(x),
}
AMOUNTS = {
    "shear_x": (-0.3, 0.1, 0.27),
    "shear_y": (-0.3, 0.1, 0.27),
    "translate_x": (-0.4532, 0.2, 0.4),
    "translate_y": (-0.4532, 0.2, 0.4),
    "rotate": (-30, 6.67, 25),
    **dict.fromkeys(("color", "contrast", "brightness", "sharpness"), (0.1, 0.7, 1, 1.3, 1.9)),
    "posterize": (4, 5, 8),
    "solarize": (0, 28.4, 113.8, 256),
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_operation_is_pillows(operation):
    cases = [(x, a) for x in (NOISE, DIM, RAMP, FLAT) for a in AMOUNTS.get(operation, (0,))]
    images, amounts = np.stack([x for x, _ in cases]), np.array([a for _, a in cases], np.float32)
    pillows = np.stack([PILLOW[operation](Image.fromarray(x), a) for x, a in cases])
    difference = np.abs(apply(images, operation, amounts).astype(int) - pillows)
    if operation in ("rotate", "shear_x", "shear_y"):
        # Pillow's fixed point takes another neighbour where a coordinate falls between two.
        assert (difference > 0).any(-1).mean() < 0.01
    else:
        assert difference.max() <= 1
        assert (difference > 0).mean() < 0.01


def test_smoothing_is_pillows_filter_to_the_bit():
    ours = apply(NOISE[None], "sharpness", np.zeros(1, np.float32))[0]
    pillows = np.asarray(Image.fromarray(NOISE).filter(ImageFilter.SMOOTH))
    chex.assert_trees_all_equal(ours, pillows)


def test_the_policy_is_the_papers_25_pairs_of_known_operations():
    assert len(POLICY) == 25
    parts = [part for pair in POLICY for part in pair]
    assert {name for name, _, _ in parts} <= set(OPERATIONS)
    assert all(0 <= p <= 1 and 0 <= m <= 9 for _, p, m in parts)
    counts = {name: sum(part[0] == name for part in parts) for name in OPERATIONS}
    assert (counts["equalize"], counts["auto_contrast"], counts["rotate"]) == (9, 7, 1)
    assert counts["shear_x"] == 0


def test_auto_augment_leaves_an_image_alone_as_often_as_the_policy_says():
    # On this image every operation changes something, save colour at magnitude 0.
    images = jax.jit(jax.vmap(auto_augment, (0, None)))(
        jax.random.split(jax.random.key(1), 1500), jnp.asarray(DIM)
    )
    unchanged = (images == DIM).all((1, 2, 3)).mean()
    parts = [[p * (n != "color" or m > 0) for n, p, m in pair] for pair in POLICY]
    wanted = np.mean([(1 - a) * (1 - b) for a, b in parts])
    assert abs(unchanged - wanted) < 4 * np.sqrt(wanted * (1 - wanted) / 1500) + 0.02


def test_a_crop_is_a_window_of_the_padded_image_and_all_places_occur():
    keys = jax.random.split(jax.random.key(2), 3000)
    crops = np.asarray(jax.jit(jax.vmap(crop_and_flip, (0, None)))(keys, NOISE))
    padded = np.pad(NOISE, ((4, 4), (4, 4), (0, 0)))
    places = {
        padded[i : i + 32, j : j + 32][:, ::flip].tobytes()
        for i in range(9)
        for j in range(9)
        for flip in (1, -1)
    }
    found = {crop.tobytes() for crop in crops}
    assert found == places


def test_cutout_clears_one_square_and_is_cut_at_the_border():
    keys = jax.random.split(jax.random.key(3), 2000)
    cleared = (
        np.asarray(jax.jit(jax.vmap(cutout, (0, None)))(keys, np.ones((32, 32, 3), np.float32)))
        == 0
    )
    rows, columns = cleared.any((2, 3)).sum(1), cleared.any((1, 3)).sum(1)
    chex.assert_trees_all_equal(cleared.sum((1, 2, 3)), 3 * rows * columns)
    assert set(rows) == set(columns) == set(range(8, 17))
    # A side is 16 for the 17 centres of 32 that leave room on both sides.
    assert abs((rows == 16).mean() - 17 / 32) < 0.05


@pytest.mark.parametrize("augmentation", ["crop_flip", "autoaugment"])
def test_an_example_is_augmented_by_its_place_in_the_whole_batch(augmentation):
    images = RNG.integers(0, 256, (8, 32, 32, 3), np.uint8)
    prepare = jax.jit(augment_batch, static_argnums=(2, 3))
    key = jax.random.key(4)
    whole = prepare(key, images, SPEC, augmentation)
    parts = [prepare(key, images[i : i + 4], SPEC, augmentation, i) for i in (0, 4)]
    chex.assert_trees_all_equal(whole, jnp.concatenate(parts))
    assert (np.asarray(whole[0]) != np.asarray(prepare(key, images[:1], SPEC, "none"))[0]).any()


def test_none_normalises_alone_whatever_the_key():
    images = RNG.integers(0, 256, (2, 32, 32, 3), np.uint8)
    wanted = (images - np.array(SPEC.mean)) / np.array(SPEC.std)
    for augmentation in ("none", "random_resized_crop"):
        found = augment_batch(jax.random.key(0), images, SPEC, augmentation)
        chex.assert_trees_all_close(found, wanted.astype(np.float32), atol=1e-6)


def test_bad_input_is_named():
    grey = np.zeros((1, 8, 8, 1), np.uint8)
    spec = Spec(10, (8, 8, 1), (0.0,), (1.0,))
    with pytest.raises(ValueError, match="needs RGB images, not 1 channels"):
        augment_batch(jax.random.key(0), grey, spec, "autoaugment")
    with pytest.raises(ValueError, match=r"augmentation must be one of none, .*, not 'flip'"):
        augment_batch(jax.random.key(0), grey, spec, "flip")
