import math

import pytest

from nadaptor.errors import RunError
from nadaptor.training.monitor import (
    DIVERGED_STEPS,
    EMPTY,
    add_step,
    epoch_row,
    restore_tally,
    verdict,
)


def test_a_row_holds_the_means_of_its_epoch():
    tally = add_step(add_step(EMPTY, 0, 1.0, 0.25, 10), 1, 2.0, 0.75, 10)
    row = epoch_row(tally, 2, 100.0, 0.5)
    assert (row["loss"], row["accuracy"], row["validation_accuracy"]) == (1.5, 0.5, 0.5)


def test_the_step_at_which_a_loss_broke_is_named():
    with pytest.raises(RunError, match="the loss is inf at step 12;"):
        add_step(EMPTY, 12, math.inf, 0.1, 10)


def test_a_loss_that_stays_high_is_named_by_its_first_step():
    tally = add_step(EMPTY, 4, 1.0, 0.1, 10)
    for step in range(5, 5 + DIVERGED_STEPS - 1):
        tally = add_step(tally, step, 30.0, 0.1, 10)
    with pytest.raises(RunError, match="since step 5;"):
        add_step(tally, 5 + DIVERGED_STEPS - 1, 30.0, 0.1, 10)
    assert add_step(tally, 99, 1.0, 0.1, 10).high_since == -1


def test_a_tally_goes_through_json():
    tally = add_step(EMPTY, 0, 0.1, 0.3, 10)
    assert restore_tally({"tally": tally._asdict(), "rows": []}) == (tally, [])


def test_a_loss_that_comes_back_in_time_starts_the_count_anew():
    tally = EMPTY
    for step in range(5 * DIVERGED_STEPS):
        high = step % DIVERGED_STEPS < DIVERGED_STEPS - 1
        tally = add_step(tally, step, 30.0 if high else 1.0, 0.1, 10)
    assert tally.steps == 5 * DIVERGED_STEPS


@pytest.mark.parametrize(("classes", "limit"), [(10, 23.0), (1000, 69.0), (1, 6.9)])
def test_how_high_a_loss_is_goes_by_that_of_guessing(classes, limit):
    assert add_step(EMPTY, 3, limit, 0.1, classes).high_since == -1
    assert add_step(EMPTY, 3, limit + 0.1, 0.1, classes).high_since == 3


@pytest.mark.parametrize(
    ("card", "word"),
    [
        ({"tally": EMPTY._asdict()}, "rows"),
        ({"tally": {"steps": 1}, "rows": []}, r"has \['steps'\] as its fields"),
        ({"tally": 3, "rows": []}, "tally"),
    ],
)
def test_a_card_whose_progress_is_not_whole_is_refused_by_the_field(card, word):
    with pytest.raises(ValueError, match=word):
        restore_tally(card)


@pytest.mark.parametrize(
    ("right", "count", "classes", "chance"),
    [(50, 500, 10, True), (70, 500, 10, True), (71, 500, 10, False), (9, 9, 1, False)],
)
def test_an_accuracy_within_three_deviations_of_chance_is_said_to_be_chance(
    right, count, classes, chance
):
    # sqrt(500 * 0.1 * 0.9) = 6.7 images
    said = verdict(right / count, count, classes)
    assert said.endswith("; lower the learning rate") == chance
