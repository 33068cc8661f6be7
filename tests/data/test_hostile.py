"""Files and folders that somebody else made: one line that names the file, and bounded memory."""

import io
import json
import os
import shutil
import struct
import zlib

import chex
import numpy as np
import pytest
from PIL import Image

from nadaptor.data import codec, crops
from nadaptor.data.config import DataConfig
from nadaptor.data.loader import load_images
from nadaptor.data.registry import get_spec, open_source, open_split
from nadaptor.data.source import Example, printable

RAMP = np.indices((40, 60)).sum(0)


def encoded(image, kind="PNG"):
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def png(width, height, depth=8):
    """A small file that states a size, and has too little for it."""

    def chunk(name, data):
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    head = struct.pack(">IIBBBBB", width, height, depth, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(b"\0" * 100))
        + chunk(b"IEND", b"")
    )


def jpeg(width, height):
    data = bytearray(encoded(Image.new("RGB", (16, 16)), "JPEG"))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", height, width)
    return bytes(data)


@pytest.fixture
def folder(tmp_path):
    """Three classes of square pictures, 8 px wide, each image of its own grey."""
    for split, count in (("train", 4), ("val", 2)):
        for label, name in enumerate(("ant", "bee", "cat")):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(count):
                image = Image.new("RGB", (8, 8), (60 * label + 9 * i,) * 3)
                image.save(tmp_path / split / name / f"{name}{i}.png")
    return tmp_path


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_of_16_bits_the_upper_8_are_taken(kind):
    wide = (RAMP * 600).astype(np.uint16)
    found = codec.decode(encoded(Image.fromarray(wide), kind), "x")
    chex.assert_trees_all_equal(found, np.repeat((wide >> 8).astype(np.uint8)[..., None], 3, -1))


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_pixels_without_a_known_range_are_refused(dtype):
    data = encoded(Image.fromarray(RAMP.astype(dtype)), "TIFF")
    with pytest.raises(ValueError, match=r"^a\.tif has pixels of mode [FI], .* 8 or 16 bits"):
        codec.decode(data, "a.tif")


def test_a_damaged_jpeg_that_decodes_all_the_same_is_told():
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    data = bytearray(encoded(Image.fromarray(noise), "JPEG"))
    data[1460] = 131
    with pytest.warns(UserWarning, match=r"^cat\.JPEG is damaged, and some of its pixels"):
        assert codec.decode(bytes(data), "cat.JPEG").shape == (64, 64, 3)


@pytest.mark.parametrize("data", [png(30000, 30000), png(9000, 9000), jpeg(65500, 65500)])
def test_an_image_too_large_is_refused_from_its_header(data):
    for read in (codec.read_size, codec.decode):
        with pytest.raises(ValueError, match=r"^x\.png .*(too large|more than the 67108864)"):
            read(data, "x.png")


def test_a_thin_image_is_refused_before_it_is_enlarged():
    data = encoded(Image.new("RGB", (5000, 1)))
    with pytest.raises(ValueError, match=r"^thin\.png has 5000x1 pixels, too thin"):
        crops.evaluation_image(Example(data, 0, "thin.png"), (224, 224, 3))
    draws = np.full(crops.NUM_DRAWS, 0.5)
    assert crops.training_image(Example(data, 0, "x"), 224, draws).shape == (224, 224, 3)


@pytest.mark.parametrize("make", [os.mkfifo, lambda p: os.symlink("/dev/zero", p), os.mkdir])
def test_what_is_no_file_is_refused_by_its_name(folder, make):
    make(folder / "train" / "ant" / "x.png")
    with pytest.raises(ValueError, match=r"ant/x\.png is not a regular file, nor a link to one"):
        open_source("folder", "train", 1, folder)
    with pytest.raises(ValueError, match=r"x\.png (is not a regular file|cannot be read)"):
        codec.read_file(str(folder / "train" / "ant" / "x.png"))


def test_a_file_too_long_for_an_image_is_not_read(tmp_path):
    with open(tmp_path / "long.png", "wb") as file:
        file.truncate(codec.MAX_BYTES + 1)
    with pytest.raises(ValueError, match=r"long\.png has 268435457 bytes, more than"):
        codec.read_file(str(tmp_path / "long.png"))


@pytest.mark.parametrize("name", [b"caf\xe9.png", b"a\x1b[31m.png", b"a\nb.png"])
def test_names_that_a_terminal_cannot_show_are_refused_and_escaped(folder, name):
    shutil.copy(
        folder / "train" / "ant" / "ant0.png", os.fsencode(folder / "train" / "ant") + b"/" + name
    )
    with pytest.raises(ValueError, match="control characters; rename it") as error:
        open_source("folder", "train", 1, folder)
    assert str(error.value).isprintable()
    train = os.fsencode(folder / "train")
    os.rename(train + b"/bee", train + b"/" + name[:-4])
    with pytest.raises(ValueError, match="control characters; rename it"):
        get_spec("folder", folder)


def test_a_long_name_is_cut():
    assert len(printable("x" * 5000)) < 250


def test_pictures_that_are_all_alike_are_read_at_their_own_size(folder):
    source = open_source("folder", "test", 3, folder)
    assert source.spec.image_shape == (8, 8, 3) == get_spec("folder", folder).image_shape
    assert source.read(3).image.tolist() == np.full((8, 8, 3), 69).tolist()
    Image.new("RGB", (9, 8)).save(folder / "val" / "ant" / "ant1.png")
    with pytest.raises(ValueError, match=r"ant1\.png has 9x8 pixels, where the others have 8x8"):
        load_images(open_source("folder", "test", 3, folder))


def test_photographs_are_cropped_to_224_or_to_the_image_size(folder):
    for i in range(4):
        Image.new("RGB", (40 + i, 30)).save(folder / "train" / "ant" / f"ant{i}.png")
    assert get_spec("folder", folder).image_shape == (224, 224, 3)
    data = DataConfig("folder", 1, None, 16, "dataset")
    assert load_images(open_split(data, "train", folder)).images.shape == (11, 16, 16, 3)


def test_pictures_are_averaged_down_to_the_image_size_and_never_enlarged(folder):
    half = open_split(DataConfig("folder", 1, None, 4, "dataset"), "test", folder)
    assert half.read(0).image.shape == (4, 4, 3)
    with pytest.raises(ValueError, match="image_size 9 is more than the 8 pixels"):
        open_source("folder", "test", 1, folder, 9)
    whole, small = (open_source("digits", "test", 150, None, size) for size in (None, 4))
    blocks = whole.resident.images.reshape(450, 4, 2, 4, 2, 1).mean((2, 4))
    assert np.abs(small.resident.images - blocks).max() <= 0.5
    assert get_spec("digits", None, 4) == small.spec
    with pytest.raises(ValueError, match="image_size 16 cannot be had from images of 8x8"):
        open_source("digits", "test", 150, None, 16)


def test_another_class_list_than_at_training_is_refused(folder):
    data = DataConfig("folder", 3, None, None, "dataset")
    known = dict(open_split(data, "train", folder).identity)
    assert open_split(data, "test", folder, known=known).size == 6
    for split in ("train", "val"):
        (folder / split / "ant").rename(folder / split / "dog")
    with pytest.raises(ValueError, match="class 0 of data set folder is 'bee', and was 'ant' when"):
        open_split(data, "test", folder, known=known)
    for split in ("train", "val"):
        (folder / split / "dog").rename(folder / split / "ant")
    assert open_split(data, "test", folder, known=known).size == 6
    (folder / "train" / "ant").rename(folder / "train" / "x")
    (folder / "train" / "bee").rename(folder / "train" / "ant")
    (folder / "train" / "x").rename(folder / "train" / "bee")
    with pytest.raises(ValueError, match="names of the training files of data set folder"):
        open_split(data, "test", folder, known=known)


def test_a_config_s_training_size_normalisation_and_limit_are_in_its_source():
    data = DataConfig("synthetic", 24, 64, None, "imagenet")
    train = open_split(data, "train")
    assert (train.size, open_split(data, "test").size) == (64, 256)
    assert train.spec.mean == pytest.approx([255 * c for c in (0.485, 0.456, 0.406)])
    assert [open_split(data, "train", limit=n).size for n in (10, 10**9)] == [10, 64]
    with pytest.raises(ValueError, match="train_size 1001 is more than the 1000"):
        open_split(DataConfig("synthetic", 24, 1001, None, "dataset"), "train")
    with pytest.raises(ValueError, match="num_images must be a positive int, not 0"):
        open_split(data, "train", limit=0)
    with pytest.raises(ValueError, match="of three channels, and digits has 1; choose 'dataset'"):
        open_split(DataConfig("digits", 150, None, None, "imagenet"), "train")


@pytest.mark.parametrize(
    "features",
    [
        {"pythonClassName": "evilmod.X"},
        {"featuresDict": {"features": {"image": {"pythonClassName": "evilmod.X"}}}},
        {"jsonFeature": {"json": json.dumps({"type": "evilmod.X"})}},
    ],
)
def test_no_module_is_imported_because_a_data_set_names_it(tmp_path, features, monkeypatch):
    (tmp_path / "evilmod.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    made = tmp_path / "tfds" / "x" / "1.0.0"
    made.mkdir(parents=True)
    (made / "dataset_info.json").write_text('{"fileFormat": "array_record"}')
    (made / "features.json").write_text(json.dumps(features))
    with pytest.raises(ValueError, match=r"features\.json names the feature class evilmod\.X"):
        open_source("x", "train", 1, tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "\udcff"])
def test_a_damaged_info_is_refused_in_one_line(tmp_path, text):
    made = tmp_path / "tfds" / "x" / "1.0.0"
    made.mkdir(parents=True)
    (made / "dataset_info.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=r"dataset_info\.json is damaged: .*again$"):
        open_source("x", "train", 1, tmp_path)
