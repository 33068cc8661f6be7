"""How a converted network is run: its coding, and the corrections by name."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, get_args

from nadaptor import IntegrateAndFire, OffsetSpikes, SignedIntegrateAndFire, Srp, StBif
from nadaptor._checks import check_count
from nadaptor._execution.convolution import choose_way
from nadaptor.neurons import Coding, Neuron
from nadaptor.simulation import Correction
from nadaptor.transformation import Nonaffine

CorrectionName = Literal[
    "none", "negative-spikes", "offset-spikes", "offset-spikes-published", "srp"
]
# Those with a first stage. The authors' code of offset spikes starts a neuron that fired at every
# step about a thousand thresholds high; the other reading caps that at one.
TWO_STAGES: Mapping[str, Callable[[int], Any]] = {
    "offset-spikes": OffsetSpikes,
    "offset-spikes-published": functools.partial(OffsetSpikes, saturated="published"),
    "srp": Srp,
}
CORRECTIONS: tuple[CorrectionName, ...] = get_args(CorrectionName)


class Spikes(NamedTuple):
    """How the spikes of a network carry numbers; what its card keeps."""

    coding: Coding = "rate"
    nonaffine: Nonaffine = "refuse"

    def override(self, coding: Coding | None) -> "Spikes":
        """Returns these, or another coding in their place, which refuses what is not affine."""
        return self if coding in (None, self.coding) else Spikes(coding)


RATES = Spikes()


class Inference(NamedTuple):
    """What to simulate a network with."""

    neuron: Neuron
    correction: Correction | None
    nonaffine: Nonaffine = "refuse"  # what to do where an operation on rates is not affine
    fast_convolution: bool = False  # faster on a CPU, and a few spikes may flip
    events: bool = False  # the same, the more so the fewer the spikes

    @property
    def coding(self) -> Coding:
        """How spikes carry a number: what the neuron is made for."""
        return getattr(self.neuron, "coding", "rate")

    @property
    def options(self) -> dict[str, Any]:
        """The options of `nadaptor.simulate`, and of what takes the same, that change results."""
        return {
            "neuron": self.neuron,
            "coding": self.coding,
            "nonaffine": self.nonaffine,
            "correction": self.correction,
        }

    def total_steps(self, num_steps: int) -> int:
        """Returns the network steps that T counted steps take, the correction's included."""
        return num_steps + (self.correction.num_steps if self.correction else 0)


def get_inference(
    name: CorrectionName,
    num_steps: int = 4,
    coding: Coding = "rate",
    nonaffine: Nonaffine = "refuse",
    fast_convolution: bool = False,
    events: bool = False,
) -> Inference:
    """Returns what a correction's name stands for.

    Args:
        name: one of `CORRECTIONS`.
        num_steps: steps of the first stage: rho of offset spikes, tau of SRP. The others have none.
        coding: "rate", or "sum", which goes with "none" only.
        nonaffine: as for `nadaptor.spiking`.
        fast_convolution: as for `nadaptor.spiking`.
        events: as for `nadaptor.spiking`.

    Returns:
        What to simulate with.

    Raises:
        ValueError: the name is unknown, `num_steps` is not a positive int (which the message calls
            `correction_steps`, as commands do), there is a correction with sum coding, or
            `fast_convolution` and `events` are both set.

    Example:
        >>> get_inference("srp", 4).total_steps(32)
        36
    """
    if name not in CORRECTIONS:
        raise ValueError(f"unknown correction {name!r}; there are {', '.join(CORRECTIONS)}")
    # For what they raise.
    check_count(num_steps, "correction_steps")
    choose_way(fast_convolution, events)
    if coding == "sum":
        if name != "none":
            raise ValueError(
                f"{name} corrects rates, and sum coding ends at the quantized network without it; "
                "leave the correction out, or use rate coding"
            )
        return Inference(StBif(), None, nonaffine, fast_convolution, events)
    neuron = SignedIntegrateAndFire() if name == "negative-spikes" else IntegrateAndFire()
    correction = TWO_STAGES[name](num_steps) if name in TWO_STAGES else None
    return Inference(neuron, correction, nonaffine, fast_convolution, events)


PLAIN = get_inference("none")
