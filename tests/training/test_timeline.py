"""Epochs to steps, with batches that span epochs."""

import pytest

from densenet_jax.training.timeline import Timeline


def timeline(**changes: float) -> Timeline:
    values: dict[str, float] = {
        "examples": 1437,
        "global_batch_size": 64,
        "epochs": 4,
        "eval_every_epochs": 1,
        "save_every_steps": 50,
        "report_every_steps": 20,
    }
    return Timeline(**{**values, **changes})


def test_length_counts_examples_not_whole_batches():
    assert timeline().steps_per_epoch == pytest.approx(22.453125)
    assert timeline().total_steps == 90  # ceil(4 * 1437 / 64)


def test_epoch_ends_where_its_last_example_was_seen():
    assert [timeline().steps_of(epoch) for epoch in range(5)] == [0, 23, 45, 68, 90]


def test_rounding_adds_no_step():
    line = timeline(examples=1000, global_batch_size=10)
    assert line.steps_of(0.1 + 0.2) == 30
    assert line.steps_of(0.29) == 29


def test_validation_is_due_once_an_epoch_and_at_the_end():
    line = timeline()
    assert [step for step in range(1, 91) if line.is_eval_step(step)] == [23, 45, 68, 90]


@pytest.mark.parametrize("every", [0.1, 0.3, 1, 2.5, 7])
@pytest.mark.parametrize("examples", [10, 97, 1437])
def test_validation_steps_equal_a_plain_count(every, examples):
    line = timeline(examples=examples, eval_every_epochs=every)
    expected, n = {line.total_steps}, 1
    while line.steps_of(n * every) <= line.total_steps:
        expected.add(line.steps_of(n * every))
        n += 1
    assert {step for step in range(1, line.total_steps + 1) if line.is_eval_step(step)} == expected - {0}


def test_saves_at_every_validation_besides():
    assert [step for step in range(1, 91) if timeline().is_save_step(step)] == [23, 45, 50, 68, 90]


@pytest.mark.parametrize(("examples", "reports"), [(17, 17), (400, 20), (39, 39), (5_000, 100)])
def test_short_runs_report_often_enough_for_a_curve(examples, reports):
    timeline = Timeline(examples, 1, 1.0, 1.0, 1000, report_every_steps=0)
    assert sum(map(timeline.is_report_step, range(1, timeline.total_steps + 1))) == reports
