"""Evaluation of several labels: every example once, on any number of devices, and through the command line."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from sklearn import metrics

from densenet_jax.run.evaluate import evaluate, figures_of
from densenet_jax.training import sharding
from densenet_jax.training.eval_step import make_eval_step
from tests.label_run import label_flags, write_label_set
from tests.main_in_process import run_here
from tests.main_processes import parse_last_line, run_processes

EXAMPLES, LABELS, BATCH = 43, 4, 8


class Linear(nn.Module):
    """One product with all pixels."""

    @nn.compact
    def __call__(self, images, train):
        return nn.Dense(LABELS)(images.reshape(images.shape[0], -1))


@pytest.fixture(scope="module")
def split():
    """Images, and labels of which some are unknown and the last is always 1."""
    generator = np.random.default_rng(0)
    labels = generator.choice(np.float32([0, 1, np.nan]), (EXAMPLES, LABELS), p=[0.5, 0.3, 0.2])
    labels[:, 3] = 1
    return generator.integers(0, 256, (EXAMPLES, 2, 2, 1), np.uint8), labels


def evaluated(split, devices):
    """Counts over the split in padded batches on so many devices, and the logits of all images."""
    images, labels = split
    padding = -EXAMPLES % BATCH
    arrays = {
        "image": np.concatenate([images, images[:padding]]),
        "label": np.concatenate([labels, labels[:padding]]),
        "mask": np.arange(EXAMPLES + padding) < EXAMPLES,
    }
    batches = [
        {name: array[start : start + BATCH] for name, array in arrays.items()} for start in range(0, EXAMPLES, BATCH)
    ]
    model, scale = Linear(), lambda pixels: pixels.astype(jnp.float32) / 255
    variables = model.init(jax.random.key(0), scale(images), train=False)
    mesh = sharding.make_mesh(jax.devices()[:devices])
    step = jax.jit(make_eval_step(model, scale), out_shardings=sharding.replicated(mesh))
    counts = evaluate(step, variables, batches, mesh, examples=EXAMPLES, batch_count=len(batches))
    return counts, np.asarray(model.apply(variables, scale(images), train=False))


@pytest.mark.parametrize("devices", [1, 8])
def test_every_example_counts_once_in_the_order_of_the_split(split, devices):
    counts, logits = evaluated(split, devices)
    assert counts.rows is not None
    np.testing.assert_allclose(counts.rows["logit"], logits, rtol=1e-5)
    np.testing.assert_array_equal(counts.rows["label"], split[1])


def test_figures_are_those_of_scikit_learn_over_the_whole_split(split):
    counts, logits = evaluated(split, 8)
    labels = split[1]
    figures = figures_of(counts)
    assert list(figures) == ["examples", "loss", "auroc", "average_precision", "f1", "labels"]
    assert (figures["examples"], figures["labels"]) == (EXAMPLES, 3)
    known = ~np.isnan(labels)
    chances = 1 / (1 + np.exp(-logits.astype(float)))
    assert figures["loss"] == pytest.approx(metrics.log_loss(labels[known], chances[known]), rel=1e-5)
    columns = [(labels[known[:, k], k], logits[known[:, k], k]) for k in range(3)]
    assert figures["auroc"] == pytest.approx(np.mean([metrics.roc_auc_score(*each) for each in columns]), abs=1e-9)
    precision = np.mean([metrics.average_precision_score(*each) for each in columns])
    assert figures["average_precision"] == pytest.approx(precision, abs=1e-9)
    assert figures["f1"] == pytest.approx(np.mean([metrics.f1_score(true, own >= 0) for true, own in columns]))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, user, no_report):
    """The table's path, the directory of a finished run, and the last line of its training."""
    folder = tmp_path_factory.mktemp("labels")
    table = write_label_set(folder / "data")
    output, errors = run_here(*label_flags(table), f"--workdir={folder / 'run'}", **user)
    return table, folder / "run", parse_last_line(output), errors


def test_training_and_evaluation_end_with_the_figures_of_labels(finished, user):
    _, workdir, trained, errors = finished
    names = ["mode", "step", "examples", "loss", "auroc", "average_precision", "f1", "labels"]
    assert list(trained) == names
    assert (trained["examples"], trained["labels"]) == (10, 2)
    assert trained["auroc"] > 0.6
    assert f"AUROC {trained['auroc']:.4f}" in errors
    reports = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    validations = [report for report in reports if report["split"] == "validation"]
    assert [list(report) for report in validations] == [["step", "split", "epoch", *names[3:]]] * 2
    assert {"loss", "f1", "learning_rate"} <= reports[0].keys()
    output, errors = run_here("eval", f"--workdir={workdir}", "--checkpoint=best", **user)
    best = max(validations, key=lambda report: (report["auroc"], report["step"]))
    assert parse_last_line(output) == {"mode": "eval", **{name: best.get(name, 10) for name in names[1:]}}
    assert f"(validation AUROC {best['auroc']:.4f})" in errors


@pytest.mark.slow
def test_processes_together_have_the_figures_of_one(finished, user):
    _, workdir, trained, _ = finished
    output, _ = run_processes(2, "--mode=eval", f"--workdir={workdir}", devices=2, **user)
    evaluated = parse_last_line(output)
    assert evaluated.pop("mode") == "eval"
    assert evaluated == pytest.approx({name: trained[name] for name in evaluated}, rel=1e-5)
