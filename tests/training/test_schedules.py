"""Every schedule against its closed form at every step, warmup included."""

import bisect
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from densenet_jax.errors import UserError
from densenet_jax.training.schedules import SCHEDULES, make_schedule


def drawn(schedule, steps):
    rates = jax.jit(jax.vmap(schedule))(jnp.arange(steps))
    assert rates.dtype == jnp.float32
    return np.asarray(rates, np.float64)


def check(schedule, closed_form, steps):
    expected = np.array([closed_form(step) for step in range(steps)])
    np.testing.assert_allclose(drawn(schedule, steps), expected, rtol=2e-6, atol=2e-8)


def half_cosine(peak, floor, fraction):
    return floor + 0.5 * (peak - floor) * (1 + math.cos(math.pi * fraction))


def test_multistep_with_rates_in_the_course_form():
    # 100 steps an epoch, drops at epochs 3 and 5, the last milestone being the end.
    schedule = make_schedule(
        "multistep",
        learning_rate=0.1,
        total_steps=800,
        milestone_steps=(300, 500, 800),
        milestone_rates=(0.1, 0.01, 0.001),
    )
    check(schedule, lambda s: 0.1 if s < 300 else 0.01 if s < 500 else 0.001, 900)


def test_multistep_with_a_rate_more_than_milestones():
    schedule = make_schedule(
        "multistep", learning_rate=0.4, total_steps=90, milestone_steps=(30, 60), milestone_rates=(0.4, 0.1, 0.03)
    )
    check(schedule, lambda s: (0.4, 0.1, 0.03)[(s >= 30) + (s >= 60)], 100)


def test_multistep_with_a_factor_counts_milestones_from_step_0_with_warmup_in_front():
    schedule = make_schedule(
        "multistep", learning_rate=0.8, total_steps=90, warmup_steps=10, milestone_steps=(30, 60), decay_factor=0.2
    )
    check(schedule, lambda s: 0.8 * s / 10 if s < 10 else 0.8 * 0.2 ** ((s >= 30) + (s >= 60)), 100)


def test_cosine_spans_what_the_warmup_leaves():
    schedule = make_schedule(
        "cosine",
        learning_rate=0.1,
        total_steps=500,
        warmup_steps=50,
        warmup_learning_rate=0.01,
        end_learning_rate=0.002,
    )

    def closed_form(step):
        if step < 50:
            return 0.01 + (0.1 - 0.01) * step / 50
        return half_cosine(0.1, 0.002, min(step - 50, 450) / 450)

    check(schedule, closed_form, 520)
    assert float(schedule(500)) == pytest.approx(0.002)
    assert float(schedule(50)) == pytest.approx(0.1)


def test_exponential_smooth_and_in_stairs():
    def make(staircase):
        return make_schedule(
            "exponential",
            learning_rate=0.5,
            total_steps=200,
            warmup_steps=20,
            decay_factor=0.7,
            decay_steps=30,
            staircase=staircase,
            end_learning_rate=0.1,
        )

    def closed_form(step, staircase):
        if step < 20:
            return 0.5 * step / 20
        falls = (step - 20) / 30
        return max(0.5 * 0.7 ** (math.floor(falls) if staircase else falls), 0.1)

    check(make(False), lambda s: closed_form(s, False), 220)
    check(make(True), lambda s: closed_form(s, True), 220)


def test_cosine_with_restarts_longer_and_lower_each_time():
    schedule = make_schedule(
        "cosine_restarts",
        learning_rate=1.0,
        total_steps=145,
        warmup_steps=5,
        cycle_steps=20,
        cycle_multiplier=2.0,
        cycle_decay=0.5,
        end_learning_rate=0.01,
    )
    starts = [0, 20, 60, 140]  # 20 + 40 + 80 after the warmup

    def closed_form(step):
        if step < 5:
            return step / 5
        position = min(step - 5, 140)
        cycle = min(bisect.bisect_right(starts, position) - 1, 2)
        length = starts[cycle + 1] - starts[cycle]
        return half_cosine(0.5**cycle, 0.01, (position - starts[cycle]) / length)

    check(schedule, closed_form, 160)
    assert float(schedule(25)) == pytest.approx(0.5)
    assert float(schedule(24)) < 0.02


def test_equal_cycles():
    schedule = make_schedule("cosine_restarts", learning_rate=1.0, total_steps=90, cycle_steps=30)
    check(schedule, lambda s: half_cosine(1.0, 0.0, (s % 30) / 30), 90)


def test_one_cycle_is_torchs():
    schedule = make_schedule("one_cycle", learning_rate=0.2, total_steps=200)
    top = 0.3 * 200 - 1

    def closed_form(step):
        position = min(step, 199)
        if position <= top:
            return half_cosine(0.2 / 25, 0.2, position / top)
        return half_cosine(0.2, 0.2 / 25 / 1e4, (position - top) / (199 - top))

    check(schedule, closed_form, 210)
    # torch.optim.lr_scheduler.OneCycleLR(max_lr=0.2, total_steps=200), read off at these steps.
    for step, rate in {0: 0.008, 30: 0.10655557, 59: 0.2, 60: 0.19997482, 130: 0.09775660, 199: 8.0e-07}.items():
        assert float(schedule(step)) == pytest.approx(rate, rel=2e-5)


@pytest.mark.parametrize("name", SCHEDULES)
def test_warmup_meets_every_schedule_where_it_starts(name):
    schedule = make_schedule(
        name,
        learning_rate=0.3,
        total_steps=100,
        warmup_steps=10,
        milestone_steps=(40,),
        decay_steps=20,
        cycle_steps=30,
    )
    start = float(schedule(10))
    assert start == pytest.approx(0.3 / 25 if name == "one_cycle" else 0.3)
    np.testing.assert_allclose(drawn(schedule, 11), start * np.arange(11) / 10, rtol=1e-6)
    assert float(schedule(10_000)) == float(schedule(jnp.asarray(20_000)))


@pytest.mark.parametrize(
    ("key", "name", "settings"),
    [
        ("config.optim.schedule", "cosin", {}),
        ("config.optim.warmup_epochs or warmup_steps", "cosine", {"warmup_steps": 100}),
        ("config.optim.end_learning_rate", "cosine", {"end_learning_rate": 0.2}),
        ("config.optim.milestone_steps", "multistep", {"milestone_steps": (60, 30)}),
        ("config.optim.milestone_steps", "multistep", {"milestone_steps": (5, 30), "warmup_steps": 10}),
        ("config.optim.milestone_rates", "multistep", {"milestone_steps": (30, 60), "milestone_rates": (0.1,)}),
        ("config.optim.learning_rate", "multistep", {"milestone_steps": (30,), "milestone_rates": (0.2, 0.1)}),
        ("config.optim.decay_steps", "exponential", {}),
        ("config.optim.decay_factor", "exponential", {"decay_steps": 10, "decay_factor": 1.5}),
        ("config.optim.cycle_steps", "cosine_restarts", {}),
    ],
)
def test_contradictions_name_their_key(key, name, settings):
    with pytest.raises(UserError, match=key):
        make_schedule(name, **{"learning_rate": 0.1, "total_steps": 100, **settings})
