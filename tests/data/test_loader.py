import io
import itertools
import time

import chex
import jax
import numpy as np
import pytest
from PIL import Image

from nadaptor.data.augmentation import augment_batch
from nadaptor.data.loader import (
    batches,
    evaluation_batches,
    load_images,
    prefetch,
    step_indices,
)
from nadaptor.data.registry import open_source
from nadaptor.data.source import (
    PHOTOGRAPHS,
    Example,
    Source,
    Spec,
    Split,
    normalize,
    resident_source,
)

SPEC = Spec(4, (8, 8, 3), *PHOTOGRAPHS)


def take(items, count):
    found = list(itertools.islice(items, count))
    items.close()
    return found


def write_folder(path):
    """An image folder of one class, four images to train on and four to test on."""
    for split in ("train", "val"):
        (path / split / "cat").mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (40, 30), (i, 9, 9)).save(path / split / "cat" / f"{i}.JPEG")


@pytest.fixture(scope="module")
def photographs():
    """22 JPEGs of different sizes, read as files are."""
    rng, files = np.random.default_rng(0), []
    for i in range(22):
        image = Image.fromarray(rng.integers(0, 256, (3, 4, 3), np.uint8)).resize((24 + i, 40 - i))
        file = io.BytesIO()
        image.save(file, "JPEG")
        files.append(file.getvalue())

    def read(index):
        time.sleep(0.001 * (index % 3))  # so that threads finish out of order
        return Example(files[index], index % 4, f"{index}.JPEG")

    return Source(SPEC, len(files), read, None, {})


@pytest.fixture(scope="module")
def resident():
    rng = np.random.default_rng(1)
    images = rng.integers(0, 256, (22, 8, 8, 3), np.uint8)
    split = Split(images, np.arange(22, dtype=np.int32) % 4)
    return resident_source(SPEC, split, {"dataset": "x", "split": "train"})


@pytest.mark.parametrize("kind", ["photographs", "resident"])
@pytest.mark.parametrize("augmentation", ["none", "random_resized_crop"])
def test_a_batch_does_not_depend_on_threads_processes_or_where_it_starts(
    kind, augmentation, request
):
    source = request.getfixturevalue(kind)
    whole = take(batches(source, augmentation, 3, 8, num_threads=1), 5)
    chex.assert_trees_all_equal(whole, take(batches(source, augmentation, 3, 8, num_threads=5), 5))
    with pytest.raises(ValueError, match="num_threads must be a positive int, not 0"):
        next(batches(source, augmentation, 3, 8, num_threads=0))
    chex.assert_trees_all_equal(
        whole[3:], take(batches(source, augmentation, 3, 8, start_step=3), 2)
    )
    for count in (2, 4):
        parts = [
            take(batches(source, augmentation, 3, 8, process_index=i, process_count=count), 5)
            for i in range(count)
        ]
        for step, *pieces in zip(whole, *parts, strict=True):
            assert {piece.step for piece in pieces} == {step.step}
            chex.assert_trees_all_equal(step.images, np.concatenate([p.images for p in pieces]))
            chex.assert_trees_all_equal(step.labels, np.concatenate([p.labels for p in pieces]))


def test_crops_change_with_seed_and_step_and_place(photographs):
    one = Source(SPEC, 8, lambda _: photographs.read(0), None, {})
    first, second = take(batches(one, "random_resized_crop", 0, 8), 2)
    other = take(batches(one, "random_resized_crop", 1, 8), 1)[0]
    images = [image.tobytes() for batch in (first, second, other) for image in batch.images]
    assert len(set(images)) == 24


def test_an_epoch_reads_every_image_at_most_once(resident):
    labelled = resident._replace(
        resident=Split(resident.resident.images, np.arange(22, dtype=np.int32))
    )
    for epoch in (0, 1):
        seen = take(batches(labelled, "none", 0, 8, start_step=2 * epoch), 2)
        assert len(set(np.concatenate([batch.labels for batch in seen]))) == 16


def test_an_evaluation_reads_every_image_once_in_order(photographs):
    whole = list(evaluation_batches(photographs, 8))
    labels = np.concatenate([batch.labels for batch in whole])
    assert labels.tolist() == [i % 4 for i in range(22)] + [-1, -1]
    parts = [
        list(evaluation_batches(photographs, 8, process_index=i, process_count=2)) for i in (0, 1)
    ]
    for step, *pieces in zip(whole, *parts, strict=True):
        chex.assert_trees_all_equal(step.images, np.concatenate([p.images for p in pieces]))
        chex.assert_trees_all_equal(step.labels, np.concatenate([p.labels for p in pieces]))


def test_the_indices_of_some_steps_are_those_that_the_batches_read(resident):
    images = resident.resident.images[step_indices(22, 3, range(1, 3), 8)]
    fed = take(batches(resident, "none", 3, 8, start_step=1), 2)
    chex.assert_trees_all_equal(images, np.stack([batch.images for batch in fed]))


@pytest.mark.parametrize("kind", ["photographs", "resident"])
def test_a_calibration_batch_is_the_evaluation_batches_normalised(kind, request):
    source = request.getfixturevalue(kind)._replace(size=21)
    images, labels = load_images(source)
    whole = list(evaluation_batches(source, 8))
    pixels = np.concatenate([batch.images for batch in whole])[:21]
    chex.assert_trees_all_close(images, np.asarray(normalize(pixels, SPEC)), rtol=1e-6)
    chex.assert_trees_all_equal(labels, np.concatenate([batch.labels for batch in whole])[:21])


def test_prefetch_keeps_the_order_and_a_bounded_number_under_way():
    put, most = [], 0
    for done, item in enumerate(prefetch(iter(range(10)), lambda x: put.append(x) or x, depth=3)):
        assert item == done
        most = max(most, len(put) - done)
    assert most == 4
    assert put == list(range(10))


def test_reading_ahead_is_bounded_and_ends_when_the_iterator_is_closed():
    read = []

    def note(index):
        read.append(index)
        return Example(np.zeros((8, 8, 3), np.uint8), 0, "x")

    items = batches(Source(SPEC, 100, note, None, {}), "none", 0, 5, num_threads=2)
    next(items)
    # The batch in use, one buffered per thread and the one whose place it took.
    time.sleep(0.05)
    assert len(read) <= 5 * 4
    items.close()
    done = len(read)
    time.sleep(0.05)
    assert len(read) == done


def test_worker_processes_give_the_batches_that_threads_give(tmp_path):
    write_folder(tmp_path)
    source = open_source("folder", "train", 1, tmp_path)
    threads = take(batches(source, "random_resized_crop", 5, 2, start_step=1), 3)
    workers = take(batches(source, "random_resized_crop", 5, 2, start_step=1, num_workers=2), 3)
    chex.assert_trees_all_equal(threads, workers)


def test_a_damaged_file_stops_the_run_by_its_name(tmp_path):
    write_folder(tmp_path)
    bad = tmp_path / "train" / "cat" / "2.JPEG"
    bad.write_bytes(bad.read_bytes()[:-20])
    source = open_source("folder", "train", 1, tmp_path)
    with pytest.raises(ValueError, match=r"cat/2\.JPEG is damaged: .*; copy it again"):
        take(batches(source, "random_resized_crop", 0, 3), 1)


def test_bad_input_is_named_before_anything_is_read(resident):
    with pytest.raises(ValueError, match="batch_size 7 does not divide among 2 processes"):
        batches(resident, "none", 0, 7, process_count=2)
    with pytest.raises(ValueError, match="batch_size 23 is more than the 22 training images"):
        batches(resident, "none", 0, 23)


def test_digits_go_the_same_way_as_photographs():
    source = open_source("digits", "train", 150)
    batch = take(batches(source, "none", 0, 64), 1)[0]
    images = augment_batch(jax.random.key(0), batch.images, source.spec, "none")
    assert abs(float(images.mean())) < 0.1
    assert images.shape == (64, 8, 8, 1)
