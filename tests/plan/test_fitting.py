import pytest

from densenet_jax.plan.fitting import largest_that_fits


@pytest.mark.parametrize("limit", [0, 1, 2, 3, 50, 98, 99])
@pytest.mark.parametrize("guess", [-3, 0, 1, 49, 50, 51, 99, 1000])
def test_the_largest_is_found_whatever_the_guess(limit, guess):
    probes = []

    def fits(number):
        assert 0 < number < 100
        probes.append(number)
        return number <= limit

    assert largest_that_fits(fits, 100, guess) == limit
    assert len(probes) == len(set(probes)) <= 16


def test_a_good_guess_needs_two_probes():
    probes = []
    assert largest_that_fits(lambda number: probes.append(number) or number <= 640, 10_000, 640) == 640
    assert probes == [640, 641]


def test_a_bad_guess_bisects():
    probes = []
    largest_that_fits(lambda number: probes.append(number) or number <= 640, 10_000, 9_000)
    assert len(probes) <= 2 * 14
