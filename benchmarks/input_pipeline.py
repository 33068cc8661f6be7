"""The input pipeline beside a torch-style loop: 224-pixel training images a second from JPEG files.

`python -m benchmarks.input_pipeline --data-dir DIR` reads the image folder at DIR, as its files are
and enlarged to 500x375 pixels, ImageNet's usual size. The loop is what a torch DataLoader's worker
does: open with Pillow, random resized crop, flip, float in CHW order, normalise, stack. It runs in
one thread and in one a core; the pipeline decodes in one a core and normalises in JAX. All run once
a round, in turn, on the same files; a ratio is the median over rounds of the ratio within a round.
"""

import dataclasses
import io
import itertools
import os
import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from benchmarks.timing import in_turn, median, ratio
from nadaptor._files import write_csv, write_json
from nadaptor._provenance import machine
from nadaptor.data.crops import NUM_DRAWS, random_box
from nadaptor.data.loader import batches
from nadaptor.data.registry import open_source
from nadaptor.data.source import PHOTOGRAPHS, Source, normalize

RESULTS = Path(__file__).parent / "results"
ENLARGED = (500, 375)
MEAN, DEVIATION = (np.array(c, np.float32)[:, None, None] / 255 for c in PHOTOGRAPHS)


@dataclasses.dataclass(frozen=True)
class Options:
    """What to time."""

    # Folder that holds train/CLASS/*.JPEG.
    data_dir: Path
    # Images a batch.
    batch_size: int = 64
    # Batches a round.
    num_batches: int = 4
    # Rounds.
    rounds: int = 9
    # Folder of the results.
    out: Path = RESULTS


def run(options: Options) -> dict[str, Any]:
    """Times both sizes, writes input_pipeline.csv and .json, prints the ratios."""
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        enlarge(options.data_dir / "train", Path(scratch) / "train")
        for images, folder in (("as stored", options.data_dir), ("500x375", Path(scratch))):
            rows += time_folder(images, folder, options)
    report = {"machine": machine(), "jax": jax.__version__, "rounds": options.rounds, "rows": rows}
    write_csv(options.out / "input_pipeline.csv", [{"machine": machine(), **row} for row in rows])
    write_json(options.out / "input_pipeline.json", report)
    for row in rows:
        print(*(f"{key}={value}" for key, value in row.items()))
    return report


def time_folder(images: str, folder: Path, options: Options) -> list[dict[str, Any]]:
    """Times all competitors on one folder; returns a row for each."""
    source = open_source("folder", "train", 1, folder)
    calls: dict[str, Callable[[], object]] = {
        "pipeline": lambda: pipeline(source, options, lambda x: _normalize(x, source.spec)),
        "pipeline, not normalised": lambda: pipeline(source, options, jax.device_put),
        "loop, one thread": lambda: loop(source, options, 1),
        "loop, one thread a core": lambda: loop(source, options, os.cpu_count() or 1),
    }
    seconds = in_turn(calls, options.rounds)
    count = options.batch_size * options.num_batches
    return [
        {
            "images": images,
            "competitor": name,
            "images_per_second": round(count / median(times), 1),
            "pipeline_is_faster_by": round(ratio(times, seconds["pipeline"]), 2),
        }
        for name, times in seconds.items()
    ]


def pipeline(source: Source, options: Options, place: Callable[[np.ndarray], jax.Array]) -> None:
    """Reads the batches as training does, up to the images on the device."""
    for batch in batches(
        source, "random_resized_crop", 0, options.batch_size, stop_step=options.num_batches
    ):
        place(batch.images).block_until_ready()


def loop(source: Source, options: Options, num_threads: int) -> None:
    """Reads as many images as a torch data set of Pillow images does."""
    draws = np.random.default_rng(0).random((options.batch_size, NUM_DRAWS))
    with ThreadPoolExecutor(num_threads) as pool:
        for step in range(options.num_batches):
            places = step * options.batch_size + np.arange(options.batch_size)
            np.stack(list(pool.map(load, itertools.repeat(source), places % source.size, draws)))


def load(source: Source, index: int, draws: np.ndarray) -> np.ndarray:
    """One training image, as torchvision's transforms on Pillow images make it."""
    image = Image.open(io.BytesIO(bytes(source.read(index).image))).convert("RGB")
    top, left, height, width = random_box(image.height, image.width, draws)
    image = image.crop((left, top, left + width, top + height))
    image = image.resize((224, 224), Image.Resampling.BILINEAR)
    if draws[-1] < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    pixels = np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))
    return (pixels.astype(np.float32) / 255 - MEAN) / DEVIATION


def enlarge(source: Path, target: Path) -> None:
    """Copies an image folder with every image at ImageNet's usual size."""
    shutil.copytree(source, target, copy_function=_enlarge)


def _enlarge(source: str, target: str) -> None:
    image = Image.open(source).convert("RGB").resize(ENLARGED, Image.Resampling.BICUBIC)
    image.save(target, "JPEG", quality=90)


_normalize = jax.jit(normalize, static_argnums=1)

if __name__ == "__main__":
    import tyro

    run(tyro.cli(Options))
