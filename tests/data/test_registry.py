import io
import os
import time
from pathlib import Path

import chex
import numpy as np
import pytest
from PIL import Image

from nadaptor.data import codec, crops, synthetic
from nadaptor.data import tfds as prepared
from nadaptor.data.config import DataConfig
from nadaptor.data.loader import load_images
from nadaptor.data.registry import get_spec, open_source, open_split
from nadaptor.data.source import Example, hold_out

DATA = Path(os.environ.get("NADAPTOR_DATA_DIR", ""))
needs_cifar = pytest.mark.skipif(
    not prepared.find_prepared("cifar10", DATA), reason="NADAPTOR_DATA_DIR holds no CIFAR-10"
)
SMOOTH = np.indices((60, 90)).sum(0).astype(np.uint8)[..., None] + np.array([0, 60, 100], np.uint8)


def encoded(image, **options):
    file = io.BytesIO()
    image.save(file, **{"format": "JPEG", "quality": 90, **options})
    return file.getvalue()


@pytest.fixture
def folder(tmp_path):
    """Two classes, six training images each and two to test on; each image has its own grey."""
    for split, count in (("train", 6), ("val", 2)):
        for label, name in enumerate(("n02", "n10")):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(count):
                image = Image.new("RGB", (40, 30), (20 * i + 10 * label,) * 3)
                (tmp_path / split / name / f"{i}.JPEG").write_bytes(encoded(image))
    return tmp_path


@needs_cifar
def test_cifar10_is_read_whole_and_byte_for_byte():
    train, validation, test = (
        open_source("cifar10", split, 5000, DATA) for split in ("train", "validation", "test")
    )
    assert [s.size for s in (train, validation, test)] == [45000, 5000, 10000]
    counts = np.bincount(train.resident.labels) + np.bincount(validation.resident.labels)
    assert counts.tolist() == [5000] * 10
    total = sum(s.resident.images.sum((0, 1, 2), dtype=np.int64) for s in (train, validation))
    means = total / (50000 * 32 * 32)
    assert np.abs(means - train.spec.mean).max() < 0.02
    example = test.read(7)
    chex.assert_trees_all_equal(example.image, test.resident.images[7])
    assert (test.identity["version"], test.identity["num_stored"]) == ("3.0.2", 10000)


@needs_cifar
def test_the_validation_images_are_not_among_the_training_images():
    train, validation = (open_source("cifar10", s, 5000, DATA) for s in ("train", "validation"))
    seen = [{image.tobytes() for image in s.resident.images} for s in (train, validation)]
    assert not seen[0] & seen[1]


@needs_cifar
def test_a_split_loaded_whole_is_normalised():
    data = DataConfig("cifar10", 5000, None, None, "dataset")
    images, labels = load_images(open_split(data, "validation", DATA, limit=1000))
    chex.assert_shape((images, labels), ((1000, 32, 32, 3), (1000,)))
    assert images.dtype == np.float32
    assert np.abs(images.mean((0, 1, 2))).max() < 0.05


@pytest.mark.parametrize("dataset", ["cifar100", "imagenet2012", "food101", "a_set/of_mine:1.0.0"])
def test_a_data_set_that_is_not_prepared_is_refused_within_a_second(tmp_path, dataset):
    started = time.process_time()
    with pytest.raises(ValueError, match="prepare it with: tfds build") as error:
        open_source(dataset, "train", 10, tmp_path)
    assert time.process_time() - started < 1
    assert "\n" not in str(error.value)
    assert str(tmp_path / "tfds") in str(error.value)
    assert "--file_format array_record" in str(error.value)


def test_where_an_image_folder_lies_the_message_says_how_to_use_it(folder):
    with pytest.raises(ValueError, match="use --dataset folder"):
        open_source("imagenet2012", "train", 10, folder)


def test_a_prepared_set_in_another_format_is_refused_with_the_command(tmp_path):
    made = tmp_path / "tfds" / "cifar10" / "3.0.2"
    made.mkdir(parents=True)
    (made / "dataset_info.json").write_text('{"fileFormat": "tfrecord"}')
    with pytest.raises(ValueError, match=r"stored as tfrecord.*tfds convert_format"):
        open_source("cifar10", "train", 10, tmp_path)


def test_the_latest_version_is_found_in_tfds_first_unless_one_is_named(tmp_path):
    for place in ("tfds/x/1.9.0", "tfds/x/1.10.0", "tfds/x/part", "x/2.0.0"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "dataset_info.json").touch()
    assert prepared.find_prepared("x", tmp_path) == tmp_path / "tfds/x/1.10.0"
    assert prepared.find_prepared("x:2.0.0", tmp_path) == tmp_path / "x/2.0.0"
    assert prepared.find_prepared("x:3.0.0", tmp_path) is None


def test_a_folder_is_read_in_the_order_of_its_sorted_classes(folder, monkeypatch):
    monkeypatch.setenv("NADAPTOR_DATA_DIR", str(folder))
    source = open_source("folder", "test", 2)
    assert source.identity["class_names"] == ["n02", "n10"]
    assert [source.read(i).label for i in range(4)] == [0, 0, 1, 1]
    assert source.read(3).name == str(folder / "val" / "n10" / "1.JPEG")
    assert get_spec("folder").image_shape == (224, 224, 3)
    sizes = [open_source("folder", split, 2).size for split in ("train", "validation")]
    assert sizes == [10, 2]


def test_the_splits_of_a_folder_share_no_file(folder):
    sources = [open_source(f"folder:{folder.name}", s, 4, folder.parent) for s in SPLITS]
    names = [{source.read(i).name for i in range(source.size)} for source in sources]
    assert [len(n) for n in names] == [8, 4, 4]
    assert len(set.union(*names)) == 16


SPLITS = ("train", "validation", "test")


def test_bad_folders_are_named(folder, monkeypatch):
    (folder / "train" / "n11").mkdir()
    with pytest.raises(ValueError, match=r"train/n11 holds no images; .* remove this class folder"):
        open_source("folder", "train", 2, folder)
    with pytest.raises(ValueError, match="the same class folders; 'n11' is in one alone"):
        open_source("folder", "test", 2, folder)
    with pytest.raises(ValueError, match=r"no image folder at .*nothing: it must hold train/CLASS"):
        open_source("folder:nothing", "train", 2, folder)
    monkeypatch.delenv("NADAPTOR_DATA_DIR", raising=False)
    with pytest.raises(ValueError, match="pass --data-dir or set NADAPTOR_DATA_DIR"):
        open_source("folder", "train", 2)


@pytest.mark.parametrize("cut", [0, 20, 400, -30])
def test_a_truncated_file_is_refused_by_its_name(cut):
    data = encoded(Image.fromarray(SMOOTH))[:cut]
    with pytest.raises(ValueError, match=r"cat\.JPEG is (damaged|not an image).*copy it again"):
        codec.decode(data, "cat.JPEG")


def test_grey_and_cmyk_and_png_and_16_bit_images_become_rgb():
    image = Image.fromarray(SMOOTH)
    expected = np.asarray(image, int)
    for mode in ("L", "CMYK", "RGB"):
        found = codec.decode(encoded(image.convert(mode), quality=95), mode).astype(int)
        wanted = np.asarray(image.convert(mode).convert("RGB"), int)
        assert np.abs(found - wanted).mean() < 3
    for mode in ("P", "RGBA", "RGB"):
        found = codec.decode(encoded(image.convert(mode), format="PNG"), mode)
        assert found.shape == expected.shape
    assert codec.decode(encoded(image.convert("1"), format="PNG"), "1").shape == expected.shape


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("reduction", [1, 2, 4, 8])
def test_both_decoders_give_the_same_pixels(mode, reduction, monkeypatch):
    noise = np.random.default_rng(0).integers(0, 256, (61, 91, 3), np.uint8)
    data = encoded(Image.fromarray(noise).convert(mode))
    fast = codec.decode(data, "x", reduction)
    monkeypatch.setattr(codec, "_decode_turbo", _not_installed)
    chex.assert_trees_all_equal(fast, codec.decode(data, "x", reduction))
    assert fast.shape == (-(-61 // reduction), -(-91 // reduction), 3)


def _not_installed(*_):
    raise ImportError


def test_stray_bytes_that_do_no_harm_are_read_over():
    data = encoded(Image.fromarray(SMOOTH))
    stray = data[:20] + b"\x00\x00\x00" + data[20:]
    with pytest.raises(ValueError, match="extraneous"):
        codec._decode_turbo(stray, "x", 1)
    chex.assert_trees_all_equal(codec.decode(stray, "x"), codec.decode(data, "x"))


def test_evaluation_takes_the_centre_of_the_image_at_8_7ths():
    example = Example(encoded(Image.fromarray(SMOOTH), format="PNG"), 0, "x")
    found = crops.evaluation_image(example, (28, 28, 3))
    resized = Image.fromarray(SMOOTH).resize((48, 32), Image.Resampling.BILINEAR)
    chex.assert_trees_all_equal(found, np.asarray(resized.crop((10, 2, 38, 30))))


def test_the_training_crop_is_pillows_crop_resized_within_rounding():
    draws = np.random.default_rng(1).random((20, crops.NUM_DRAWS))
    example = Example(encoded(Image.fromarray(SMOOTH), format="PNG"), 0, "x")
    for row in draws:
        top, left, height, width = crops.random_box(60, 90, row)
        box = (left, top, left + width, top + height)
        wanted = Image.fromarray(SMOOTH).crop(box).resize((64, 64), Image.Resampling.BILINEAR)
        wanted = np.asarray(wanted)[:, :: -1 if row[-1] < 0.5 else 1].astype(int)
        assert np.abs(crops.training_image(example, 64, row) - wanted).max() <= 1


def test_a_grey_array_keeps_its_channel_axis():
    example = Example(SMOOTH[..., :1], 0, "x")
    assert crops.training_image(example, 32, np.full(crops.NUM_DRAWS, 0.4)).shape == (32, 32, 1)


def test_a_crop_decoded_at_a_fraction_shows_the_same_place():
    ramp = np.indices((600, 900)).astype(np.float32).transpose(1, 2, 0) / (3, 4)
    image = np.concatenate([ramp, np.zeros((600, 900, 1))], 2).astype(np.uint8)
    data = encoded(Image.fromarray(image), quality=98, subsampling=0)
    png = encoded(Image.fromarray(image), format="PNG")
    for row in np.random.default_rng(2).random((10, crops.NUM_DRAWS)):
        reduced, full = (
            crops.training_image(Example(d, 0, "x"), 32, row).astype(int) for d in (data, png)
        )
        assert np.abs(reduced - full).max() < 8


def test_random_boxes_fit_and_cover_the_stated_shares_and_aspects():
    draws = np.random.default_rng(3).random((2000, crops.NUM_DRAWS))
    boxes = np.array([crops.random_box(375, 500, row) for row in draws])
    tops, lefts, heights, widths = boxes.T
    assert (tops >= 0).all()
    assert (lefts >= 0).all()
    assert (tops + heights <= 375).all()
    assert (lefts + widths <= 500).all()
    shares, aspects = heights * widths / (375 * 500), widths / heights
    assert 0.075 < shares.min() < 0.1
    assert 0.74 < aspects.min() < 0.77
    assert 1.30 < aspects.max() < 1.35
    # A long image has no room for any of ten crops: the central one of an allowed aspect.
    assert crops.random_box(10, 1000, np.full(41, 0.999)) == (0, 493, 10, 13)


def test_the_held_out_images_do_not_move_with_the_split_or_seed():
    parts = [hold_out(1000, 100, split) for split in ("train", "validation")]
    assert sorted(np.concatenate(parts)) == list(range(1000))
    assert set(hold_out(1000, 50, "validation")) < set(parts[1])
    with pytest.raises(ValueError, match="between 1 and 999, not 1000"):
        hold_out(1000, 1000, "train")
    with pytest.raises(ValueError, match="split must be one of"):
        hold_out(1000, 1, "tst")


def test_synthetic_images_are_the_same_each_time():
    # Not through the registry, which keeps what it has opened.
    a, b = (synthetic.open_synthetic("test", 24).resident for _ in range(2))
    assert a.images is not b.images
    chex.assert_trees_all_equal(a, b)
    assert a.images.shape == (256, 224, 224, 3)
    assert abs(a.images.mean() - 127.5) < 0.1
