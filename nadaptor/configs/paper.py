"""The runs of the paper's tables, one named config a row.

None of them has been run by this project: no accelerator was at hand for as long as they take. The
paper's numbers stand beside each command as what it is to be compared with. Times are unknown;
`nadaptor train NAME --dry-run` measures a step on the machine at hand and says what the run takes.

From the paper: networks, p, epochs, SGD with a cosine from 0.1, weight decay 5e-4 (CIFAR-10) and
2.5e-5 (ImageNet), the start from pre-trained networks. Our choice, where it is silent: momentum 0.9
(the paper states none, for neither data set), batch sizes (128 and 256), augmentation (crop, flip,
AutoAugment and Cutout; random resized crop and flip), the validation images (5000 and 10000), which
choose the weights handed on, and the full-precision runs, which stand for the pre-trained networks
that the paper does not name. With `--init-from FILE` a file of weights takes their place.

The figures of QCFS and SlipReLU that the paper quotes are of 300 epochs from scratch, by the
defaults of their authors' code; our rows fine-tune them for 160. The paper's parents on ImageNet
have a max-pool, which it swaps for a mean; ours are trained with the mean.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType

from nadaptor.configs.config import Config, make_config, replace
from nadaptor.configs.inference import CorrectionName
from nadaptor.configs.tables import CIFAR10, CORRECTED, IMAGENET, Row

Maker = Callable[[], Config]


def cifar10_resnet18() -> Config:
    """Full-precision ResNet-18 on CIFAR-10, from which the quantized ones start.

    Stands for the pre-trained network of Table 1. Not run on any accelerator; time unknown.

    `nadaptor train cifar10_resnet18`
    """
    return make_config(
        name="cifar10_resnet18",
        activation="relu",
        parent=None,
        epochs=160,
        batch_size=128,
        learning_rate=0.1,
        warmup_steps=0,
        momentum=0.9,
        weight_decay=5e-4,
        levels=2,
        initial_threshold=8.0,
        noise_amplitude=0.5,
        gradient="paper",
        scale_init="lsq",
        scale_gradient=True,
        drawn_levels=(1, 2, 4),
        dataset="cifar10",
        validation_size=5000,
        image_size=None,
        model="cifar_resnet18",
        width=None,
        pool=None,
        seed=0,
        train_size=None,
        normalization="dataset",
        augmentation="autoaugment",
        label_smoothing=0.0,
        ema_decay=0.0,
        micro_batches=1,
        select="best",
        dtype="float32",
        parallel="pmap",
        prng="threefry2x32",
    )


def cifar10_resnet20() -> Config:
    """Full-precision ResNet-20 on CIFAR-10 with ImageNet's mean, as published weights have it.

    `nadaptor train cifar10_resnet20 --init-from FILE --evaluate-only` measures such weights. Not
    in the paper; training not run on any accelerator; time unknown.

    `nadaptor train cifar10_resnet20`
    """
    return replace(
        cifar10_resnet18(),
        name="cifar10_resnet20",
        model="cifar_resnet20",
        normalization="imagenet",
        augmentation="crop_flip",
        weight_decay=1e-4,
    )


def _published(depth: int) -> Maker:
    """The function that makes cifar10_resnet20's config for a deeper network."""

    def make() -> Config:
        name, model = f"cifar10_resnet{depth}", f"cifar_resnet{depth}"
        return replace(cifar10_resnet20(), name=name, model=model)

    make.__name__ = make.__qualname__ = f"cifar10_resnet{depth}"
    make.__doc__ = f"""Full-precision ResNet-{depth} on CIFAR-10, otherwise as cifar10_resnet20.

    `nadaptor train cifar10_resnet{depth} --init-from FILE --evaluate-only` measures published
    weights. Not in the paper; training not run on any accelerator; time unknown.

    `nadaptor train cifar10_resnet{depth}`
    """
    return make


def cifar10_resnet20_na() -> Config:
    """ResNet-20 on CIFAR-10 with p = 4 and the noise adaptor, fine-tuned for one epoch.

    Not in the paper: to run on a CPU, from published weights. So short a run needs a start of the
    scales that loses little, a warm-up, and scales that move, without LSQ's factor: RESULTS.md.

    `nadaptor train cifar10_resnet20_na --init-from FILE`
    """
    return replace(
        cifar10_resnet20(),
        name="cifar10_resnet20_na",
        parent="cifar10_resnet20",
        activation="noise_adaptor",
        levels=4,
        epochs=1,
        batch_size=64,
        learning_rate=0.01,
        warmup_steps=50,
        scale_init="mmse_relu",
        scale_gradient=False,
        select="last",
    )


def cifar10_resnet20_lsq() -> Config:
    """The same as cifar10_resnet20_na, without the noise adaptor.

    `nadaptor train cifar10_resnet20_lsq --init-from FILE`
    """
    return replace(cifar10_resnet20_na(), name="cifar10_resnet20_lsq", activation="lsq")


def imagenet_resnet50() -> Config:
    """Full-precision ResNet-50 on ImageNet, from which the quantized ones start.

    Stands for the pre-trained network of Table 1. Not run on any accelerator; time unknown.

    `nadaptor train imagenet_resnet50`
    """
    return replace(
        cifar10_resnet18(),
        name="imagenet_resnet50",
        epochs=90,
        batch_size=256,
        weight_decay=1e-4,
        levels=3,
        dataset="imagenet2012",
        validation_size=10000,
        model="resnet50",
        augmentation="random_resized_crop",
    )


def folder_resnet50_na() -> Config:
    """ResNet-50 at 224 pixels on an image folder, p = 3 with the noise adaptor: a short trial.

    Not in the paper: a few images a step, to try the whole path on a CPU.

    `nadaptor train folder_resnet50_na --data-dir DIR`, DIR with `train/CLASS` and `val/CLASS`
    """
    return replace(
        imagenet_resnet50(),
        name="folder_resnet50_na",
        activation="noise_adaptor",
        dataset="folder",
        validation_size=50,
        epochs=1,
        batch_size=8,
        learning_rate=0.01,
        select="last",
    )


def _full_precision(model: str, table: int) -> Maker:
    """The function that makes imagenet_resnet50's config for another network."""

    def make() -> Config:
        return replace(imagenet_resnet50(), name=f"imagenet_{model}", model=model)

    make.__name__ = make.__qualname__ = f"imagenet_{model}"
    make.__doc__ = f"""Full-precision {model} on ImageNet, from which Table {table}'s starts.

    Stands for the pre-trained network of Table {table}. Not run on any accelerator; time unknown.

    `nadaptor train imagenet_{model}`
    """
    return make


def _maker(row: Row, base: Maker, weight_decay: float) -> Maker:
    """The function that makes a row's config, with the docstring of one written by hand."""

    def make() -> Config:
        return replace(
            base(),
            name=row.name,
            parent=base().name,
            model=row.model,
            activation=row.activation,
            levels=row.levels,
            epochs=row.epochs,
            weight_decay=weight_decay,
        )

    # By its name a config is found, and its docstring is its help.
    make.__name__ = make.__qualname__ = row.name
    network = f"{row.model}, {row.activation}, p = {row.levels}, {row.epochs} epochs"
    make.__doc__ = f"""{row.where}: {network}.

    The paper, in %: {row.result}. Not run on any accelerator; time unknown.

    `nadaptor train {row.name}`
    """
    return make


_FULL_PRECISION: Mapping[str, Maker] = {
    "resnet50": imagenet_resnet50,
    **{model: _full_precision(model, 2) for model in ("resnet18", "resnet34", "resnet101")},
    "cifar_resnet34": _full_precision("cifar_resnet34", 3),
}
PAPER: Mapping[str, Maker] = MappingProxyType(
    {
        make.__name__: make
        for make in (
            cifar10_resnet18,
            cifar10_resnet20,
            *map(_published, (32, 44, 56)),
            cifar10_resnet20_na,
            cifar10_resnet20_lsq,
            folder_resnet50_na,
            *_FULL_PRECISION.values(),
            *(_maker(row, cifar10_resnet18, 5e-4) for row in CIFAR10),
            *(_maker(row, _FULL_PRECISION[row.model], 2.5e-5) for row in IMAGENET),
        )
    }
)


def published(config: Config, correction: CorrectionName) -> Row | None:
    """Returns what the paper states of a network and a correction, or None.

    A network is that of a row where its config is the row's but for the name, the seed and the type
    of the computation: of fewer images or a narrower network the paper states nothing.

    Example:
        >>> published(PAPER["cifar10_resnet18_na_p2"](), "none").snn[1]
        93.71
    """
    free = {"name": config.name, "seed": config.seed, "dtype": config.step.dtype}
    rows = (*CIFAR10, *IMAGENET)
    row = next((r for r in rows if replace(PAPER[r.name](), **free) == config), None)
    if row is None or correction == "none":
        return row
    # Which reading of offset spikes the paper's is, it does not say.
    name = "offset-spikes" if correction == "offset-spikes-published" else correction
    figures = CORRECTED.get(row.name, {}).get(name)
    return None if figures is None else row._replace(snn=figures)
