import chex
import numpy as np
import pytest
from sklearn.datasets import load_digits

from nadaptor.data.registry import Split, batch_at, load_split, steps_per_epoch

NAMES = ("train", "validation", "test")


def numbered(size):
    return Split(np.zeros((size, 1, 1, 1), np.float32), np.arange(size, dtype=np.int32))


def test_the_splits_share_no_image_and_leave_none_out():

    parts = [load_split("digits", name, 200).images for name in NAMES]
    assert [len(part) for part in parts] == [1147, 200, 450]
    pixels = np.rint(np.concatenate(parts) * 6.02 + 4.88).reshape(1797, -1)
    whole = load_digits().images.reshape(1797, -1)
    chex.assert_trees_all_equal(*(x[np.lexsort(x.T)] for x in (pixels, whole)))


def test_the_test_set_does_not_depend_on_the_size_of_the_validation_set():
    a, b = (load_split("digits", "test", size) for size in (100, 300))
    chex.assert_trees_all_equal(a, b)


def test_images_are_normalised_floats_and_labels_are_ints():
    images, labels = load_split("digits", "train", 150)
    chex.assert_shape(images, (1197, 8, 8, 1))
    assert (images.dtype, labels.dtype) == (np.float32, np.int32)
    assert abs(images.mean()) < 0.02
    assert abs(images.std() - 1) < 0.02
    assert set(labels) == set(range(10))


@pytest.mark.parametrize("epoch", [0, 3])
def test_an_epoch_visits_no_image_twice(epoch):
    steps = steps_per_epoch(10, 3)
    seen = [batch_at(numbered(10), 1, epoch * steps + i, 3).labels for i in range(steps)]
    assert len(set(np.concatenate(seen))) == 9


def test_a_batch_is_a_function_of_seed_and_step_alone():
    split = numbered(100)
    forwards = [batch_at(split, 5, step, 8).labels for step in range(40)]
    backwards = [batch_at(split, 5, step, 8).labels for step in reversed(range(40))]
    chex.assert_trees_all_equal(forwards, backwards[::-1])
    assert (forwards[0] != batch_at(split, 6, 0, 8).labels).any()
    assert (forwards[0] != forwards[12]).any()


def test_the_order_is_the_same_on_every_version_of_numpy():
    assert batch_at(numbered(8), 0, 0, 8).labels.tolist() == [0, 2, 1, 5, 4, 3, 6, 7]


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="unknown dataset 'digit'; did you mean 'digits'"):
        load_split("digit", "train", 10)
    with pytest.raises(ValueError, match="split must be one of test, validation, train, not 'tst'"):
        load_split("digits", "tst", 10)
    with pytest.raises(ValueError, match="between 1 and 1346, not 1347"):
        load_split("digits", "train", 1347)
    with pytest.raises(ValueError, match="batch_size 9 is more than the 8 training images"):
        batch_at(numbered(8), 0, 0, 9)
