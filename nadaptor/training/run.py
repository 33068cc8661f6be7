"""A run as it is set up: its config, its devices, its images and its step, before any training.

It is built once; who trains, resumes or measures takes from it the placed step and the batches.
"""

import math
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from nadaptor._checks import check_count
from nadaptor._execution.once import jit_once
from nadaptor.configs.build import build_model, build_optimizer
from nadaptor.configs.config import Config, check_config, to_json
from nadaptor.conversion.origin import read_file, replaced_pools
from nadaptor.data.augmentation import augment_batch
from nadaptor.data.loader import Batch, batches, part_of, step_indices
from nadaptor.data.registry import open_split, steps_per_epoch
from nadaptor.data.source import Source, describe
from nadaptor.parallel import STEP, Devices, Placed, check_batch, choose_devices, place_step
from nadaptor.training.options import Options
from nadaptor.training.state import TrainState, init_state
from nadaptor.training.step import build_step


class Keys(NamedTuple):
    """The keys of a run, each for one consumer."""

    start: jax.Array  # random weights
    steps: jax.Array  # noise and augmentation of every step
    first_batch: jax.Array  # augmentation of the batch on which scales are measured


class Run(NamedTuple):
    """What a run needs, and what does not change in it."""

    config: Config
    options: Options
    devices: Devices
    images: Source  # to train on
    validation: Source
    resident: bool  # whether the training images lie on the devices: see nadaptor.training.feed
    epoch_steps: int
    model: nn.Module  # for one device
    optimizer: optax.GradientTransformation
    # (state, images as stored, labels, key) -> (state, metrics): pure, for this run's devices
    step: Callable[..., tuple[Any, Any]]
    placed: Placed  # the step on the devices

    @property
    def total_steps(self) -> int:
        """Updates in all."""
        return self.config.epochs * self.epoch_steps

    @property
    def keys(self) -> Keys:
        """The keys of the run, from its seed."""
        key = jax.random.key(self.config.seed, impl=self.config.step.prng)
        return Keys(*jax.random.split(key, 3))

    @property
    def part(self) -> slice:
        """Which images of a batch are this process's."""
        devices = self.devices
        return part_of(self.config.step.batch_size, devices.process_index, devices.process_count)

    def batches(self, start_step: int = 0) -> Generator[Batch, None, None]:
        """Yields this process's part of the batches from a step on; close it to end its threads."""
        devices = self.devices
        return batches(
            self.images,
            self.config.step.augmentation,
            self.config.seed,
            self.config.step.batch_size,
            start_step=start_step,
            process_index=devices.process_index,
            process_count=devices.process_count,
        )

    def indices(self, steps: range) -> np.ndarray:
        """Returns which images make this process's part of some batches, [len(steps), B]."""
        step = self.config.step
        return step_indices(self.images.size, self.config.seed, steps, step.batch_size)[
            :, self.part
        ]

    def place(self, program: Callable[..., tuple[Any, Any]], divided: Sequence[bool]) -> Placed:
        """Returns a program on the run's devices; see `nadaptor.parallel.place_step`."""
        return place_step(program, self.devices, self.config.step.parallel, divided)

    @property
    def card(self) -> dict[str, Any]:
        """What a checkpoint says of its run, and what a resumed run must agree with."""
        return {"config": to_json(self.config), "data": describe(self.images)}


def open_run(
    config: Config, options: Options, images: Source | None = None, before: int | None = None
) -> Run:
    """Checks a config, opens what its run reads, and builds what it computes.

    Args:
        config: the run.
        options: where to read and run.
        images: to train and validate on; None for the config's.
        before: CPU devices on which the run began; see `nadaptor.parallel.choose_devices`.

    Raises:
        ValueError: a value is out of its range, a name unknown, the data set not there, the batch
            does not divide among the devices, or the images cannot lie on the devices as asked.
    """
    check_config(config)
    check_count(options.keep, "keep")
    if options.snapshot_steps is not None:
        check_count(options.snapshot_steps, "snapshot_steps")
    size, parts = config.step.batch_size, config.step.micro_batches
    validation = images
    if images is None or validation is None:
        images, validation = (
            open_split(config.data, split, options.data_dir) for split in ("train", "validation")
        )
    # What devices share is a micro-batch; `check_batch` refuses one of no images.
    shared = max(1, size // parts)
    pixels = shared * math.prod(images.spec.image_shape[:2])
    devices = choose_devices(options.num_devices, shared, before, pixels)
    check_batch(size, parts, devices)
    epoch_steps = steps_per_epoch(images.size, size)
    total_steps = config.epochs * epoch_steps
    step = build_step(config, images.spec, total_steps, devices.axis_name)
    return Run(
        config,
        options,
        devices,
        images,
        validation,
        _is_resident(options.resident, config, images, devices),
        epoch_steps,
        build_model(config, num_classes=images.spec.num_classes),
        build_optimizer(config, total_steps),
        step,
        place_step(step, devices, config.step.parallel, STEP),
    )


def first_state(run: Run, pretrained: Any | None) -> TrainState:
    """Makes the state before the first step, on one device, from the whole first batch.

    Every process does so for itself, from the same images: the start does not depend on devices.

    Args:
        run: the run.
        pretrained: variables to start from; None for random weights.
    """
    config, keys = run.config, run.keys
    stream = batches(run.images, config.step.augmentation, config.seed, config.step.batch_size)
    first = next(stream)
    # Ends the threads, which are making the next batches already.
    stream.close()
    spec = run.images.spec
    images = jit_once(lambda k, x: augment_batch(k, x, spec, config.step.augmentation))(
        keys.first_batch, first.images
    )
    return init_state(
        run.model,
        run.optimizer,
        images,
        keys.start,
        pretrained,
        averaged=config.step.ema_decay > 0,
    )


def state_shape(run: Run) -> TrainState:
    """Returns the structure and shapes of the run's state; computes nothing."""
    # Pre-trained weights change values, and no shape: they are left out.
    shape = (run.config.step.batch_size, *run.images.spec.image_shape)
    images = jax.ShapeDtypeStruct(shape, jnp.float32)
    averaged = run.config.step.ema_decay > 0
    return jax.eval_shape(
        lambda x, k: init_state(run.model, run.optimizer, x, k, averaged=averaged),
        images,
        run.keys.start,
    )


def read_weights(run: Run, path: Path) -> tuple[Any, dict[str, str]]:
    """Reads the file that a run starts from.

    Args:
        run: the run; `options.new_head` says whether the last layer starts anew.
        path: the file; see `nadaptor.interop.load_pretrained`.

    Returns:
        The variables without scales, and the file's name and SHA-256 for the checkpoint.

    Raises:
        ValueError: the file cannot be read, or does not fit the network.
    """
    from nadaptor.interop.pretrained import file_identity

    one = jnp.zeros((1, *run.images.spec.image_shape), jnp.float32)
    # The values serve a new head alone; for everything else the file has its own.
    random = jit_once(run.model.init)(run.keys.start, one)
    variables = read_file(
        path,
        run.config,
        random,
        "--new-head starts the last layer anew",
        new_head=run.options.new_head,
    )
    if run.devices.process_index == 0 and (line := replaced_pools(run.config)):
        print(line)
    return variables, file_identity(path)


def _is_resident(wanted: bool | None, config: Config, images: Source, devices: Devices) -> bool:
    """Whether to have the images on the devices: where it is wanted, or by default faster."""
    on_host = config.step.augmentation == "random_resized_crop"
    if wanted and (on_host or images.resident is None):
        doing, dataset = config.step.augmentation, config.data.dataset
        why = f"{doing} is done" if on_host else f"{dataset} is read"
        raise ValueError(f"resident must not be True: {why} on the host; leave --resident out")
    if wanted is not None:
        return wanted
    accelerated = devices.local[0].platform != "cpu"
    return accelerated and not on_host and images.resident is not None
