import io
import json
import shutil
import socket

import chex
import numpy as np
import pytest
from PIL import Image

from nadaptor.data.loader import evaluation_batches
from nadaptor.data.registry import get_spec, open_source

COUNT = 12


def encoded(index, size, file_format):
    file = io.BytesIO()
    Image.new("RGB", size, (20 * index,) * 3).save(file, file_format)
    file.seek(0)
    return file


def prepare(tfds, name, data_dir, splits, features, examples):
    """Prepares a data set as TFDS does, with no TensorFlow."""

    def info(self):
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features(tfds.features))
        )

    def generators(self, _):
        return {split: self._generate_examples() for split in splits}

    body = {
        "VERSION": tfds.core.Version("1.0.0"),
        "pkg_dir_path": data_dir,
        "_info": info,
        "_split_generators": generators,
        "_generate_examples": lambda self: ((i, examples(i)) for i in range(COUNT)),
    }
    maker = type(name, (tfds.core.GeneratorBasedBuilder,), body)
    maker(data_dir=data_dir / "tfds", file_format="array_record").download_and_prepare()


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """Four sets of 12 images a split, each image of its own grey and labelled in turn."""
    import tensorflow_datasets as tfds

    tfds.disable_progress_bar()
    made = tmp_path_factory.mktemp("data")

    def labelled(f, shape, kind):
        image = f.Image(shape=shape, encoding_format=kind)
        return {"image": image, "label": f.ClassLabel(names=["a", "b", "c"])}

    def photograph(i):
        return {"image": encoded(i, (300 + 9 * i, 280 - 3 * i), "JPEG"), "label": i % 3}

    def icon(i):
        return {"image": encoded(i, (8, 8), "PNG"), "label": i % 3}

    prepare(
        tfds,
        "Photographs",
        made,
        ("train", "validation"),
        lambda f: labelled(f, (None, None, 3), "jpeg"),
        photograph,
    )
    icons = {
        "Icons": (("train", "test", "validation"), icon),
        "Unlabelled": (("train", "test"), lambda i: {**icon(i), "label": -1}),
        "Halves": (("train",), icon),
    }
    for name, (splits, examples) in icons.items():
        prepare(tfds, name, made, splits, lambda f: labelled(f, (8, 8, 3), "png"), examples)
    prepare(
        tfds, "Numbers", made, ("train",), lambda f: {"x": f.Scalar(np.int64)}, lambda i: {"x": i}
    )
    return made


def test_small_images_of_one_shape_lie_in_memory_in_the_order_of_their_split(data_dir):
    splits = ("train", "validation", "test")
    train, validation, test = (open_source("icons", s, 4, data_dir) for s in splits)
    greys = [source.resident.images[:, 0, 0, 0] // 20 for source in (train, validation)]
    assert sorted(np.concatenate(greys)) == list(range(COUNT))
    for source, grey in zip((train, validation), greys, strict=True):
        chex.assert_trees_all_equal(source.resident.labels, (grey % 3).astype(np.int32))
    assert [source.size for source in (train, validation, test)] == [8, 4, 12]
    assert test.identity == {
        "dataset": "icons",
        "split": "test",
        "class_names": ["a", "b", "c"],
        "version": "1.0.0",
        "num_stored": COUNT,
    }
    assert get_spec("icons", data_dir) == test.spec
    assert test.spec.image_shape == (8, 8, 3)


def test_photographs_of_different_shapes_are_decoded_in_threads(data_dir):
    source = open_source("photographs", "test", 4, data_dir)
    assert (source.resident, source.spec.image_shape) == (None, (224, 224, 3))
    (batch,) = evaluation_batches(source, COUNT, num_threads=4)
    greys = batch.images.astype(int).mean((1, 2, 3)) / 20
    chex.assert_trees_all_equal(np.round(greys).astype(int) % 3, batch.labels)
    assert sorted(np.round(greys)) == list(range(COUNT))


def test_bad_sets_are_named(data_dir):
    with pytest.raises(ValueError, match="numbers is not a data set of images with one label each"):
        open_source("numbers", "train", 4, data_dir)
    with pytest.raises(ValueError, match="no split test or validation; it has train"):
        open_source("halves", "test", 4, data_dir)
    with pytest.raises(ValueError, match="has no label; evaluate on another split"):
        open_source("unlabelled", "test", 4, data_dir)


def test_the_network_is_never_asked(data_dir, monkeypatch):
    def connect(*_):
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket, "getaddrinfo", connect)
    assert open_source("icons", "train", 5, data_dir).size == 7
    with pytest.raises(ValueError, match="prepare it with"):
        open_source("cifar10", "train", 5, data_dir)


def test_files_of_another_split_in_its_place_are_refused_by_their_count(data_dir, tmp_path):
    shutil.copytree(data_dir / "tfds" / "icons", tmp_path / "tfds" / "icons")
    (made,) = (tmp_path / "tfds" / "icons").glob("1.0.0")
    info = json.loads((made / "dataset_info.json").read_text())
    for split in info["splits"]:
        split["shardLengths"] = ["10"] if split["name"] == "test" else split["shardLengths"]
    (made / "dataset_info.json").write_text(json.dumps(info))
    with pytest.raises(ValueError, match="icons test holds 12 records, where its info says 10"):
        open_source("icons", "test", 4, tmp_path)


def test_icons_are_averaged_down_and_photographs_cropped_to_an_image_size(data_dir):
    icons = open_source("icons", "test", 4, data_dir, 4)
    assert icons.resident.images.shape == (12, 4, 4, 3) == (12, *get_spec("icons", data_dir, 4)[1])
    photographs = open_source("photographs", "test", 4, data_dir, 32)
    batch = next(evaluation_batches(photographs, 12))
    assert batch.images.shape == (12, 32, 32, 3)
    assert np.abs(np.sort(batch.images.mean((1, 2, 3))) - 20 * np.arange(12)).max() < 2
