"""The order of training is a pure function of seed and position, and so are the host's random numbers."""

import itertools
import time

import numpy as np
import pytest

from densenet_jax.data.sampler import BalancedOrder, Draws, ListedOrder, Order


@pytest.mark.parametrize("size", [1, 2, 7, 1437, 5000])
@pytest.mark.parametrize("kind", [Order, ListedOrder])
def test_every_example_once_an_epoch(kind, size):
    order = kind(size, seed=3)
    for epoch in (0, 1, 10**6):
        assert sorted(order.stretch(epoch * size, size)) == list(range(size))


@pytest.mark.parametrize("kind", [Order, ListedOrder])
def test_epochs_and_seeds_have_orders_of_their_own(kind):
    size = 1000
    epochs = [kind(size, 0).stretch(epoch * size, size) for epoch in range(3)]
    seeds = [kind(size, seed).stretch(0, size) for seed in range(3)]
    for orders in (epochs, seeds, [epochs[1], seeds[1]]):  # neighbors share nothing, not even shifted
        for first, second in itertools.pairwise(orders):
            assert np.mean(np.equal(first, second)) < 0.02
    places = np.argsort(epochs[0])
    assert abs(np.corrcoef(places, np.arange(size))[0, 1]) < 0.1


def test_any_stretch_is_part_of_the_same_order():
    order = Order(100, seed=5)
    whole = order.stretch(0, 350)
    for start, count in [(0, 1), (95, 10), (99, 102), (340, 10)]:
        assert order.stretch(start, count) == whole[start : start + count]


def test_the_order_never_changes_between_versions():
    """A run that is resumed after an upgrade goes on in the order it began: do not edit these numbers."""
    assert Order(1_281_167, seed=0).stretch(0, 4) == [63477, 1280019, 103802, 954305]
    assert Order(1_281_167, seed=0).stretch(10**9, 4) == [1083921, 344975, 878315, 543588]
    np.testing.assert_allclose(
        Draws(0, 4).stretch(10**9, 1)[0],
        [0.8188153651429533, 0.2111756587074486, 0.29506617151699643, 0.7171908147619444],
        rtol=0,
        atol=1e-15,
    )


def test_late_positions_cost_what_early_ones_do():
    order = Order(1_281_167, seed=0)
    draws = Draws(0, 40)

    def seconds(start):
        best = 1.0
        for _ in range(5):
            began = time.perf_counter()
            order.stretch(start, 256)
            draws.stretch(start, 256)
            best = min(best, time.perf_counter() - began)
        return best

    assert seconds(256 * 10**6) < 5 * seconds(256 * 10) + 1e-3


def test_draws_depend_on_seed_and_position_only():
    draws = Draws(7, 40)
    whole = draws.stretch(0, 64)
    assert whole.shape == (64, 40)
    assert whole.min() >= 0
    assert whole.max() < 1
    np.testing.assert_array_equal(draws.stretch(17, 5), whole[17:22])
    assert not np.isin(Draws(8, 40).stretch(0, 64), whole).any()
    assert len(np.unique(whole)) == whole.size
    assert abs(whole.mean() - 0.5) < 0.02
    assert Draws(0, 0).stretch(3, 5).shape == (5, 0)
    with pytest.raises(ValueError, match="multiple of 4"):
        Draws(0, 5)


@pytest.mark.parametrize("repeats", [1, 2])
def test_balanced_classes_come_equally_often_and_so_do_their_examples(repeats):
    labels = np.array([0] * 50 + [2] * 7 + [3] * 3, np.int32)
    order = BalancedOrder(labels, seed=1, repeats=repeats)
    whole = np.array(order.stretch(0, 3 * 21 * repeats))
    assert (whole.reshape(-1, repeats) == whole[::repeats, None]).all()
    assert np.bincount(labels[whole]).tolist() == [21 * repeats, 0, 21 * repeats, 21 * repeats]
    counts = np.bincount(whole, minlength=60) / repeats
    assert set(counts[:50]) == {0, 1}
    assert set(counts[50:57]) == {3}
    assert set(counts[57:]) == {7}
    assert order.stretch(31, 17) == whole[31:48].tolist()
    assert BalancedOrder(labels, seed=2, repeats=repeats).stretch(0, 17) != whole[:17].tolist()


def test_balanced_labels_share_with_the_images_that_have_none():
    labels = np.array([[1, 0], [1, 1], [0, np.nan], [0, 0], [np.nan, 0]] * 4, np.float32)
    drawn = labels[BalancedOrder(labels, seed=0).stretch(0, 3 * 20)]
    none = ~(drawn == 1).any(axis=1)
    assert none.sum() == 20
    assert (drawn[:, 1] == 1).sum() >= 20
    # Rounds of three: never two images of nothing before every group had its turn.
    assert none.reshape(-1, 3).sum(axis=1).tolist() == [1] * 20


def test_the_balanced_order_never_changes_between_versions():
    order = BalancedOrder(np.repeat([0, 1, 2], [900, 90, 10]), seed=0)
    assert order.stretch(10**9, 6) == [573, 905, 986, 834, 993, 321]
