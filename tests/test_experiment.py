"""Settings to parts: what is derived, and what is said beside a figure."""

import math

import pytest

from configs import default, densenet121, digits, finetune
from densenet_jax.config import check_config
from densenet_jax.errors import UserError
from densenet_jax.experiment import Experiment


def experiment(recipe=default, **changes) -> Experiment:
    config = recipe.get_config()
    config.update_from_flattened_dict(changes)
    return Experiment(check_config(config))


def test_published_accuracy_stands_beside_what_was_measured():
    made = experiment(densenet121, **{"model.pretrained": "timm/densenet121.ra_in1k"})
    lines = made.published_beside({"top1": 0.75474})
    assert len(lines) >= 1
    assert "75.574%" in lines[0]
    assert "75.474% (-0.100)" in lines[0]


@pytest.mark.parametrize(
    ("name", "source", "crop_fraction", "mean"),
    [
        ("densenet121", "timm/densenet121.ra_in1k", 0.875, (0.485, 0.456, 0.406)),
        ("dpn68", "timm/dpn68.mx_in1k", 0.875, (124 / 255, 117 / 255, 104 / 255)),
        ("dpn68b", "timm/dpn68b.ra_in1k", 0.95, (0.485, 0.456, 0.406)),
    ],
)
def test_weights_bring_their_own_preprocessing(name, source, crop_fraction, mean):
    made = experiment(**{"model.name": name, "model.pretrained": source})
    assert made.data.preprocessing.crop_fraction == crop_fraction
    assert made.data.mean_std()[0] == pytest.approx(mean)


def test_rate_follows_the_batch_after_overrides(tmp_path):
    changes = {"data.dir": str(tmp_path), "optim.base_batch_size": 32, "train.global_batch_size": 128}
    made = experiment(digits, **changes, **{"optim.warmup_epochs": 0.0})
    assert float(made.schedule(0)) == pytest.approx(0.1 * 128 / 32)
    assert made.timeline.total_steps == math.ceil(40 * 1437 / 128)


def test_held_out_part_of_train_is_evaluated_and_not_trained_on(tmp_path):
    made = experiment(digits, **{"data.dir": str(tmp_path), "data.holdout": 100, "data.eval_split": "holdout"})
    train = {made.data.train_source[index].name for index in range(len(made.data.train_source))}
    held_out = {made.data.eval_source[index].name for index in range(len(made.data.eval_source))}
    assert (len(train), len(held_out)) == (1337, 100)
    assert train & held_out == set()


def test_one_number_a_channel(tmp_path):
    made = experiment(digits, **{"data.dir": str(tmp_path), "data.mean": (0.1, 0.2, 0.3)})
    with pytest.raises(UserError, match=r"config.data.mean has 3 numbers .* config.data.channels is 1"):
        made.data.mean_std()


def test_finetuning_starts_from_published_weights_at_a_tenth_of_the_rate():
    config = finetune.get_config("digits")
    assert config.model.pretrained == "timm/densenet121.ra_in1k"
    assert dict(config.optim.rate_multipliers)[""] == pytest.approx(0.1)


def test_a_model_is_made_on_devices_that_do_not_divide_the_training_batch(tmp_path):
    made = experiment(digits, **{"data.dir": str(tmp_path), "train.global_batch_size": 12})
    assert made.model.implementation.mesh.size == 8
    with pytest.raises(UserError, match=r"config.train.global_batch_size is 12, which 8 devices don't divide"):
        _ = made.mesh


@pytest.mark.parametrize(
    ("platform", "changes", "message"),
    [
        ("cpu", {"model.dtype": "bfloat16"}, "these kernels are for GPUs and TPUs and this is a CPU"),
        ("gpu", {}, "config.model.dtype is float32"),
    ],
)
def test_training_with_kernels_that_are_not_there_is_refused(monkeypatch, tmp_path, platform, changes, message):
    monkeypatch.setattr(Experiment, "_platform", property(lambda self: platform))
    made = experiment(digits, **{"data.dir": str(tmp_path), "model.kernels": "pallas"}, **changes)
    with pytest.raises(UserError, match=message):
        made.check_kernels()
