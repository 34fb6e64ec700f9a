"""The search for the largest batch that fits, against compilers whose limit is known."""

import itertools
import random

import pytest

from densenet_jax.plan.fitting import RESOLUTION, Attempt, largest_that_fits

CAPACITY = 16 * 2**30


class Compiler:
    """Stands in for one: `memory_of` tells what a number of units takes; what is above the capacity does not fit.

    `tells_what_fails` and `tells` are whether the memory is reported with a size that does not fit, and at all.
    """

    def __init__(self, memory_of, tells=True, tells_what_fails=True):
        self.memory_of, self.tells, self.tells_what_fails = memory_of, tells, tells_what_fails
        self.tried = []

    def attempt(self, units):
        memory = self.memory_of(units)
        fits = memory <= CAPACITY
        is_reported = self.tells and (fits or self.tells_what_fails)
        return Attempt(units, fits, round(memory) if is_reported else None, CAPACITY)

    def find(self, too_large):
        def attempt(units):
            assert 0 < units < too_large
            assert units not in self.tried, "tried twice"
            self.tried.append(units)
            return self.attempt(units)

        first = self.attempt(too_large)
        assert not first.fits
        return largest_that_fits(attempt, first)

    def check(self, bounds, too_large):
        """Both ends were seen, and they are as near to each other as is promised."""
        assert bounds.fitting in {0, *self.tried}
        assert bounds.failing in {too_large, *self.tried}
        assert bounds.failing - bounds.fitting <= max(1, RESOLUTION * bounds.failing)
        assert bounds.fitting == 0 or self.attempt(bounds.fitting).fits
        assert not self.attempt(bounds.failing).fits


def affine(limit, fixed=0.1):
    """Memory that `limit` units just fill; the part `fixed` is there without any."""
    return lambda units: CAPACITY * (fixed + (1 - fixed) * units / (limit + 0.5))


@pytest.mark.parametrize("fixed", [0, 0.01, 0.3, 0.9])
@pytest.mark.parametrize("limit", [1, 2, 3, 50, 99, 100, 101, 640, 12_345, 163_297, 2**20 - 1])
@pytest.mark.parametrize("times", [1.001, 1.3, 13, 1e4])
def test_memory_along_a_line_takes_three_attempts(limit, fixed, times):
    too_large = max(limit + 1, int(limit * times))
    compiler = Compiler(affine(limit, fixed))
    compiler.check(compiler.find(too_large), too_large)
    assert len(compiler.tried) <= 3


@pytest.mark.parametrize("too_large", [101, 130, 2**21])
def test_small_sizes_are_found_to_the_unit(too_large):
    bounds = Compiler(affine(99)).find(too_large)
    assert (bounds.fitting, bounds.failing) == (99, 100)


def test_one_unit_too_many():
    compiler = Compiler(affine(7))
    bounds = compiler.find(8)
    assert (bounds.fitting, bounds.failing) == (7, 8)
    assert compiler.tried == [7]


def test_a_large_size_is_round():
    bounds = Compiler(affine(163_297)).find(2**21)
    assert (bounds.fitting, bounds.failing) == (159 * 1024, 160 * 1024)


@pytest.mark.parametrize("too_large", [1, 2, 1000, 2**21])
def test_nothing_fits(too_large):
    compiler = Compiler(lambda units: CAPACITY * 1.1 + units)
    bounds = compiler.find(too_large)
    assert (bounds.fitting, bounds.failing) == (0, 1)
    assert len(compiler.tried) <= 6


def test_a_line_that_promises_something_where_nothing_fits():
    compiler = Compiler(lambda units: CAPACITY * (1.001 if units < 1000 else units / 500))
    assert compiler.find(2**21).fitting == 0
    assert len(compiler.tried) <= 12


@pytest.mark.parametrize("pad", [2, 128, 20_000])
@pytest.mark.parametrize("limit", [20_000, 163_297])
def test_memory_in_steps(limit, pad):
    compiler = Compiler(lambda units: affine(limit)(-(-units // pad) * pad))
    compiler.check(compiler.find(2**21), 2**21)
    assert len(compiler.tried) <= 16


@pytest.mark.parametrize(("tells", "at_most"), [(True, 6), (False, 14)])
@pytest.mark.parametrize("limit", [3, 99, 1448, 163_297, 2_000_000])
def test_a_compiler_that_does_not_state_the_memory_it_needs(limit, tells, at_most):
    compiler = Compiler(affine(limit), tells=tells, tells_what_fails=False)
    compiler.check(compiler.find(2**21), 2**21)
    assert len(compiler.tried) <= at_most


@pytest.mark.parametrize("plateau", [0.8, 0.99])
def test_a_compiler_that_saves_memory_only_when_it_has_to(plateau):
    def memory(units):
        full = affine(100_000)(units)
        return full if full < plateau * CAPACITY else max(plateau * CAPACITY, full / 2)

    compiler = Compiler(memory)
    compiler.check(compiler.find(2**21), 2**21)
    assert len(compiler.tried) <= 10


def test_two_accounts_that_differ_do_not_mislead():
    """What is done counts 7% more than the complaint says, as libtpu's do."""

    def attempt(units):
        tried.append(units)
        used = 111_000 * units
        return Attempt(units, used <= CAPACITY, used, CAPACITY)

    tried = []
    bounds = largest_that_fits(attempt, Attempt(2**21, False, 103_562 * 2**21, round(15.75 * 2**30)))
    assert tried[0] == 162_816  # by the complaint's own limit; by the capacity it would be 165,888
    assert bounds.fitting <= CAPACITY / 111_000 < bounds.failing
    assert bounds.failing - bounds.fitting <= RESOLUTION * bounds.failing
    assert len(tried) <= 4


@pytest.mark.parametrize("seed", range(200))
def test_the_search_ends_whatever_the_compiler_prints(seed):
    """A larger size may fit where a smaller one did not, and the reported memory mean nothing."""
    draw = random.Random(seed)
    too_large = draw.randint(1, 2 ** draw.randint(1, 30))
    seen = {too_large: False}

    def attempt(units):
        assert 0 < units < too_large
        assert units not in seen
        seen[units] = draw.random() < 0.5
        assert len(seen) <= 40
        memory = draw.choice([None, draw.randint(-CAPACITY, 0), draw.randint(1, 3 * CAPACITY), 1])
        return Attempt(units, seen[units], memory, CAPACITY)

    bounds = largest_that_fits(attempt, Attempt(too_large, False, draw.choice([None, 2 * CAPACITY]), CAPACITY))
    assert bounds.fitting == 0 or seen[bounds.fitting]
    assert not seen[bounds.failing]
    assert bounds.failing - bounds.fitting <= max(1, RESOLUTION * bounds.failing)


def test_adversaries_of_the_line_meet_a_bisection():
    """Memory just under and just over the limit tells nothing; every side is tried."""
    for limit, over in itertools.product((1, 70, 5_000, 163_297, 2_000_000), (1.0001, 1000)):
        compiler = Compiler(lambda units, limit=limit, over=over: CAPACITY * (0.9999 if units <= limit else over))
        compiler.check(compiler.find(2**21), 2**21)
        assert len(compiler.tried) <= 20
