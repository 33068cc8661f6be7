import chex
import numpy as np
import pytest
from sklearn.datasets import load_digits

from nadaptor.data.loader import load_images, step_indices
from nadaptor.data.registry import open_source, steps_per_epoch

NAMES = ("train", "validation", "test")


def order(size, seed, step, batch_size):
    return step_indices(size, seed, range(step, step + 1), batch_size)[0]


def test_the_splits_share_no_image_and_leave_none_out():
    parts = [load_images(open_source("digits", name, 200)).images for name in NAMES]
    assert [len(part) for part in parts] == [1147, 200, 450]
    pixels = np.rint(np.concatenate(parts) * 6.02 + 4.88).reshape(1797, -1)
    whole = load_digits().images.reshape(1797, -1)
    chex.assert_trees_all_equal(*(x[np.lexsort(x.T)] for x in (pixels, whole)))


def test_the_test_set_does_not_depend_on_the_size_of_the_validation_set():
    a, b = (load_images(open_source("digits", "test", size)) for size in (100, 300))
    chex.assert_trees_all_equal(a, b)


def test_images_are_normalised_floats_and_labels_are_ints():
    images, labels = load_images(open_source("digits", "train", 150))
    chex.assert_shape(images, (1197, 8, 8, 1))
    assert (images.dtype, labels.dtype) == (np.float32, np.int32)
    assert abs(images.mean()) < 0.02
    assert abs(images.std() - 1) < 0.02
    assert set(labels) == set(range(10))


@pytest.mark.parametrize("epoch", [0, 3])
def test_an_epoch_visits_no_image_twice(epoch):
    steps = steps_per_epoch(10, 3)
    seen = [order(10, 1, epoch * steps + i, 3) for i in range(steps)]
    assert len(set(np.concatenate(seen))) == 9


def test_a_batch_is_a_function_of_seed_and_step_alone():
    forwards = [order(100, 5, step, 8) for step in range(40)]
    backwards = [order(100, 5, step, 8) for step in reversed(range(40))]
    chex.assert_trees_all_equal(forwards, backwards[::-1])
    assert (forwards[0] != order(100, 6, 0, 8)).any()
    assert (forwards[0] != forwards[12]).any()


def test_the_order_is_the_same_on_every_version_of_numpy():
    assert order(8, 0, 0, 8).tolist() == [0, 2, 1, 5, 4, 3, 6, 7]


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="unknown dataset 'digit'; did you mean 'digits'"):
        open_source("digit", "train", 10)
    with pytest.raises(ValueError, match="split must be one of test, validation, train, not 'tst'"):
        open_source("digits", "tst", 10)
    with pytest.raises(ValueError, match="between 1 and 1346, not 1347"):
        open_source("digits", "train", 1347)
    with pytest.raises(ValueError, match="batch_size 9 is more than the 8 training images"):
        order(8, 0, 0, 9)
