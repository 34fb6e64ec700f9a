"""Counts and mistakes over a split, against a plain recount."""

import types

import jax
import numpy as np
import pytest

from densenet_jax.report.gather import Answers, gather_answers
from densenet_jax.run.evaluate import predict_batches
from densenet_jax.training import sharding

CLASSES = 4


def split(examples: int, batch_size: int, seed: int = 0, crops: int = 0):
    """Random answers, their labels, and padded batches whose images carry the example's number."""
    generator = np.random.default_rng(seed)
    probabilities = generator.dirichlet(np.ones(CLASSES), examples).astype(np.float32)
    labels = generator.integers(0, CLASSES, examples)
    batches = []
    for start in range(0, examples, batch_size):
        count = min(batch_size, examples - start)
        image = np.zeros((batch_size, 2, 2, 1), np.uint8)
        image[:count, 0, 0, 0] = np.arange(start, start + count)
        if crops:
            image = np.stack([np.zeros_like(image)] * (crops - 1) + [image], axis=1)
        label, mask = np.zeros(batch_size, np.int32), np.zeros(batch_size, bool)
        label[:count], mask[:count] = labels[start : start + count], True
        batches.append({"image": image, "label": label, "mask": mask})
    return probabilities, labels, batches


def answering(probabilities: np.ndarray):
    """A step that looks its answers up by the number in the image."""

    def step(variables, batch):
        image = np.asarray(batch["image"])
        numbers = image.reshape(len(image), -1, 2, 2, 1)[:, -1, 0, 0, 0]
        rest = {name: np.asarray(array) for name, array in batch.items() if name != "image"}
        maps = np.zeros((len(image), 1, 1), np.float32)
        return {**rest, "probability": probabilities[np.minimum(numbers, len(probabilities) - 1)], "map": maps}

    return step


def gather(step, batches, **options) -> Answers:
    return gather_answers(predict_batches(step, {}, batches, sharding.make_mesh(), len(batches)), **options)


@pytest.mark.parametrize("crops", [0, 5])
@pytest.mark.parametrize(("examples", "most"), [(50, 5), (50, 1), (3, 5), (8, 100)])
def test_counts_and_surest_mistakes_are_those_of_a_recount(examples, most, crops):
    probabilities, labels, batches = split(examples, 8, crops=crops)
    answers = gather(answering(probabilities), batches, most_mistakes=most)
    predicted = probabilities.argmax(axis=1)
    matrix = np.zeros((CLASSES, CLASSES), int)
    np.add.at(matrix, (labels, predicted), 1)
    np.testing.assert_array_equal(answers.matrix(CLASSES), matrix)
    assert answers.counted.shape == (2, examples)
    assert answers.right == (labels == predicted).sum()
    np.testing.assert_array_equal(answers.scores(CLASSES).examples, matrix.sum(axis=1))

    wrong = np.flatnonzero(labels != predicted)
    surest = wrong[np.argsort(-probabilities[wrong].max(axis=1), kind="stable")][:most]
    assert [mistake.index for mistake in answers.mistakes] == surest.tolist()
    for mistake in answers.mistakes:
        assert mistake.image.shape == (2, 2, 1)
        assert mistake.image[0, 0, 0] == mistake.index
        assert mistake.image.base is None
        assert (mistake.label, mistake.predicted) == (labels[mistake.index], predicted[mistake.index])
        assert mistake.confidence == probabilities[mistake.index].max()
        assert mistake.label_probability == probabilities[mistake.index, mistake.label]


def test_frequent_confusions_come_first():
    probabilities, _, batches = split(120, 8)
    answers = gather(answering(probabilities), batches)
    confused = answers.list_confused(4)
    counts = [count for _, _, count in confused]
    off_diagonal = answers.matrix(CLASSES)
    np.fill_diagonal(off_diagonal, 0)
    assert counts == sorted(off_diagonal.ravel().tolist(), reverse=True)[:4]
    assert all(off_diagonal[true, predicted] == count for true, predicted, count in confused)


def test_any_of_several_right_classes_is_right_and_none_is_left_out():
    probabilities = np.array([[0.1, 0.6, 0.3, 0]] * 8, np.float32)
    probabilities += np.arange(8, dtype=np.float32)[:, None] * 0.001
    image = np.zeros((8, 2, 2, 1), np.uint8)
    image[:, 0, 0, 0] = np.arange(8)
    label_set = np.zeros((8, CLASSES), bool)
    label_set[0, [0, 1]] = label_set[1, [0, 2]] = True
    batch = {"image": image, "label": np.zeros(8, np.int32), "mask": np.ones(8, bool), "label_set": label_set}
    answers = gather(answering(probabilities), [batch])
    assert answers.rows.tolist() == [[1, 2, *[-1] * 6], [1, 1, *[-1] * 6]]
    assert [mistake.index for mistake in answers.mistakes] == [1]


def test_second_process_keeps_images_of_its_share_only(monkeypatch):
    probabilities, labels, batches = split(16, 16)
    share = [{name: array[8:] for name, array in batch.items()} for batch in batches]
    monkeypatch.setattr("densenet_jax.run.evaluate.to_devices", lambda batch, mesh: batch)
    monkeypatch.setattr(
        "densenet_jax.report.gather.jax", types.SimpleNamespace(process_index=lambda: 1, device_get=jax.device_get)
    )
    whole = answering(probabilities)
    step = lambda variables, batch: whole(variables, batches[0])  # noqa: E731 - as if gathered from both
    answers = gather(step, share)
    assert answers.counted.shape == (2, 16)
    wrong = set(np.flatnonzero(labels != probabilities.argmax(axis=1)).tolist())
    assert {mistake.index for mistake in answers.mistakes} == {index for index in wrong if index >= 8}
    assert all(mistake.image[0, 0, 0] == mistake.index for mistake in answers.mistakes)
