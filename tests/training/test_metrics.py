"""Sums and counts against a slow count in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from densenet_jax.training.metrics import ClassificationSums, class_ranks, confusion_counts

count = jax.jit(ClassificationSums.from_batch)


def slow_top(logits, labels, k):
    # A stable sort of the negated logits places equal ones by class number.
    best = np.argsort(-logits, axis=1, kind="stable")[:, :k]
    return int((best == labels[:, None]).any(axis=1).sum())


@pytest.mark.parametrize("classes", [3, 5, 20])
def test_counts_equal_a_slow_count_with_ties(classes):
    rng = np.random.default_rng(0)
    logits = rng.integers(0, 4, size=(200, classes)).astype(np.float32)
    labels = rng.integers(0, classes, size=200)
    losses = rng.uniform(size=200).astype(np.float32)
    sums = count(jnp.asarray(logits), jnp.asarray(labels), jnp.asarray(losses))
    assert int(sums.top1) == slow_top(logits, labels, 1)
    assert int(sums.top5) == slow_top(logits, labels, min(5, classes))
    assert int(sums.examples) == 200
    assert float(sums.loss) == pytest.approx(losses.sum(), rel=1e-5)
    assert {sums.top1.dtype, sums.top5.dtype, sums.examples.dtype} == {jnp.dtype(jnp.int32)}


def test_merging_batches_with_padding_equals_one_count():
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(30, 10)).astype(np.float32)
    labels = rng.integers(0, 10, size=30)
    losses = rng.uniform(size=30).astype(np.float32)
    whole = count(jnp.asarray(logits), jnp.asarray(labels), jnp.asarray(losses)).compute()
    merged = ClassificationSums.zeros()
    for start in range(0, 30, 16):
        left = min(16, 30 - start)
        padded_logits = np.full((16, 10), np.nan, np.float32)
        padded_labels = np.zeros(16, int)
        padded_losses = np.full(16, np.nan, np.float32)
        padded_logits[:left] = logits[start : start + left]
        padded_labels[:left] = labels[start : start + left]
        padded_losses[:left] = losses[start : start + left]
        batch = count(
            jnp.asarray(padded_logits),
            jnp.asarray(padded_labels),
            jnp.asarray(padded_losses),
            np.arange(16) < left,
        )
        merged = merged.merge(batch)
    assert merged.compute() == pytest.approx(whole)
    assert merged.compute()["examples"] == 30


def test_mixed_labels_count_the_larger_share():
    logits = jnp.eye(3)
    mixed = jnp.asarray([[0.7, 0.3, 0.0], [0.6, 0.4, 0.0], [0.0, 0.5, 0.5]])
    assert count(logits, mixed, jnp.zeros(3)).top1 == 1


def test_a_row_with_nan_is_never_right():
    logits = jnp.asarray([[jnp.nan, jnp.nan, jnp.nan], [jnp.nan, 0.0, 1.0]])
    assert class_ranks(logits, jnp.asarray([0, 2])).tolist() == [3, 3]


def test_no_example_has_no_mean():
    with pytest.raises(ValueError, match="no example"):
        ClassificationSums.zeros().compute()


def test_confusion_counts():
    rng = np.random.default_rng(2)
    logits = rng.normal(size=(50, 4)).astype(np.float32)
    labels = rng.integers(0, 3, size=50)
    mask = rng.uniform(size=50) < 0.8
    expected = np.zeros((4, 4), int)
    for row, label, counted in zip(logits, labels, mask, strict=True):
        expected[label, row.argmax()] += counted
    counts = confusion_counts(jnp.asarray(logits), jnp.asarray(labels), jnp.asarray(mask))
    np.testing.assert_array_equal(counts, expected)
    assert counts.dtype == jnp.int32
