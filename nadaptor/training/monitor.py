"""What a run has measured so far, and when it must stop: values, carried by the loop."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple, cast

from nadaptor._files.card import fields_of
from nadaptor.errors import RunError
from nadaptor.reports.tables import percent

# A loss that stays for so many steps above so many times that of guessing does not come back.
DIVERGED_FACTOR, DIVERGED_STEPS = 10.0, 20


class Tally(NamedTuple):
    """Sums over the steps of the epoch under way."""

    steps: int
    loss: float
    accuracy: float
    high_since: int  # first of the last steps, all with a loss far above guessing; -1 for none


EMPTY = Tally(0, 0.0, 0.0, -1)


def add_step(tally: Tally, step: int, loss: float, accuracy: float, num_classes: int) -> Tally:
    """Returns the sums with one step more.

    Args:
        tally: the sums so far.
        step: number of the step, from 0.
        loss: its mean loss.
        accuracy: its fraction of right images.
        num_classes: log(num_classes) is the loss of guessing.

    Raises:
        RunError: the loss is not finite, or has been far above guessing for many steps; the
            message says since when.

    Example:
        >>> add_step(EMPTY, 7, float("nan"), 0.1, 10)
        Traceback (most recent call last):
        nadaptor.errors.RunError: the loss is nan at step 7; lower the learning rate
    """
    if not math.isfinite(loss):
        raise RunError(f"the loss is {loss} at step {step}; lower the learning rate")
    # With one class the loss of guessing is 0, and every loss would be above it.
    limit = DIVERGED_FACTOR * math.log(max(num_classes, 2))
    since = -1 if loss <= limit else step if tally.high_since < 0 else tally.high_since
    if since >= 0 and step - since + 1 >= DIVERGED_STEPS:
        raise RunError(
            f"the loss has been above {limit:.1f}, {DIVERGED_FACTOR:g} times that of guessing, "
            f"since step {since}; lower the learning rate"
        )
    return Tally(tally.steps + 1, tally.loss + loss, tally.accuracy + accuracy, since)


def epoch_row(tally: Tally, step: int, rate: float, accuracy: float) -> dict[str, float]:
    """Returns the row of metrics of an epoch.

    Args:
        tally: its sums.
        step: updates done.
        rate: images a second.
        accuracy: on the validation images.
    """
    return {
        "step": step,
        "loss": tally.loss / tally.steps,
        "accuracy": tally.accuracy / tally.steps,
        "images_per_second": rate,
        "validation_accuracy": accuracy,
    }


def verdict(accuracy: float, count: int, num_classes: int) -> str:
    """Returns what to say of a trained network's accuracy, with a remedy where it is chance.

    Args:
        accuracy: fraction of right validation images.
        count: how many images those are.
        num_classes: of which one is guessed.

    Example:
        >>> verdict(0.875, 500, 10)
        'validation accuracy 87.50 %'
        >>> verdict(0.128, 500, 10)
        'validation accuracy 12.80 %, hardly better than guessing; lower the learning rate'
    """
    said, chance = f"validation accuracy {percent(accuracy)}", 1 / num_classes
    deviation = math.sqrt(chance * (1 - chance) / count)
    if num_classes < 2 or accuracy > chance + 3 * deviation:
        return said
    return f"{said}, hardly better than guessing; lower the learning rate"


@dataclasses.dataclass(frozen=True)
class Progress:
    """What a snapshot's card says of the run so far."""

    tally: dict[str, int | float]
    rows: list[dict[str, float]]


def restore_tally(card: Mapping[str, Any]) -> tuple[Tally, list[dict[str, float]]]:
    """Returns the sums and rows that a snapshot's card holds.

    Raises:
        ValueError: a field is missing or of another type; the message names it.
    """
    progress = fields_of(Progress, card)
    if progress.tally.keys() != set(Tally._fields):
        raise ValueError(f"the tally of a snapshot has {sorted(progress.tally)} as its fields")
    return Tally(**cast(Any, progress.tally)), list(progress.rows)
