"""Settings to parts: what is derived, and what is said beside a figure."""

import math

import numpy as np
import pytest
from PIL import Image

from configs import default, densenet121, digits, finetune
from densenet_jax.config import check_config
from densenet_jax.errors import UserError
from densenet_jax.experiment import Experiment
from densenet_jax.run.train import Trainer
from densenet_jax.training.timeline import Timeline
from tests.label_run import label_flags, write_label_set
from tests.main_in_process import run_here
from tests.main_processes import parse_last_line
from tests.workdir_contents import read_reports


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


def test_a_known_data_set_that_is_not_here_has_its_classes_and_its_size(tmp_path):
    made = experiment(densenet121, **{"data.dir": str(tmp_path)})
    assert (made.num_classes, made.timeline.examples) == (1000, 1_281_167)
    with pytest.raises(UserError, match="is not prepared"):
        made.check(str(tmp_path), starts=True)


def test_one_number_a_channel(tmp_path):
    with pytest.raises(UserError, match=r"config.data.mean has 3 numbers .* config.data.channels is 1"):
        experiment(digits, **{"data.mean": (0.1, 0.2, 0.3)})
    made = experiment(digits, **{"data.dir": str(tmp_path), "data.mean": (), "data.std": ()})
    with pytest.raises(UserError, match=r"config.data.mean has 3 numbers .* config.data.channels is 1"):
        made.data.mean_std()  # the weights' own


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
        (
            "cpu",
            {"model.dtype": "int8"},
            "config.model.dtype is 'int8', in which networks are evaluated but not trained",
        ),
    ],
)
def test_training_with_kernels_that_are_not_there_is_refused(monkeypatch, tmp_path, platform, changes, message):
    monkeypatch.setattr(Experiment, "_platform", property(lambda self: platform))
    made = experiment(digits, **{"data.dir": str(tmp_path), "model.kernels": "pallas"}, **changes)
    with pytest.raises(UserError, match=message):
        made.check_kernels()


def test_growth_and_blocks_of_a_variant_can_be_changed(tmp_path):
    changes = {"data.dir": str(tmp_path), "model.growth_rate": 4, "model.block_sizes": (1, 2)}
    changed = experiment(digits, **changes).model.architecture
    assert (changed.growth_rate, changed.block_sizes) == (4, (1, 2))
    assert experiment(digits, **{"data.dir": str(tmp_path)}).model.architecture.block_sizes == (3, 3, 3)
    with pytest.raises(UserError, match="has no setting 'growth_rate'"):
        _ = experiment(digits, **changes, **{"model.name": "dpn68"}).model


def test_class_folders_without_splits_are_split_by_holdout(tmp_path):
    for number in range(10):
        folder = tmp_path / "photos" / ("cat", "dog")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (number, 0, 0)).save(folder / f"{number}.png")
    changes = {"data.dir": str(tmp_path / "photos"), "data.holdout": 0.2, "data.eval_split": "holdout"}
    data = experiment(finetune, **{"data.name": "folder", **changes}).data
    assert data.train_source.class_names == ("cat", "dog")
    assert (len(data.train_source), len(data.eval_source)) == (8, 2)
    usual = experiment(finetune, **{"data.name": "folder", **changes, "data.eval_split": "validation"}).data
    assert (usual.eval_split, len(usual.eval_source)) == ("holdout", 2)
    assert usual.identify(train=True)["splits"] == data.identify(train=True)["splits"]
    changes["data.holdout"] = 0.0
    missing = experiment(finetune, **{"data.name": "folder", **changes, "data.eval_split": "validation"}).data
    with pytest.raises(UserError, match=r"photos/validation or .*photos/val does not exist.*--config.data.holdout=0.2"):
        _ = missing.eval_source
    changes["data.dir"] = str(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"config.data.dir is '.*nowhere', which does not exist"):
        _ = experiment(finetune, **{"data.name": "folder", **changes}).data.train_source


@pytest.mark.parametrize(
    ("scores", "patience", "stalled"),
    [
        ({10: 0.5, 20: 0.6, 30: 0.6, 40: 0.55}, 2.0, True),
        ({10: 0.5, 20: 0.6, 30: 0.6, 40: 0.55}, 3.0, False),
        ({10: 0.5, 20: 0.6, 30: 0.6, 40: 0.61}, 2.0, False),
        ({10: 0.5, 20: 0.4, 30: 0.4}, 2.0, False),  # validated before this step, not at it
        ({10: 0.6, 20: 0.6, 30: 0.6, 40: 0.6}, 0.0, False),
    ],
)
def test_early_stopping_waits_for_so_many_epochs_since_the_best(scores, patience, stalled):
    trainer = object.__new__(Trainer)
    trainer._experiment = experiment(digits, **{"train.patience_epochs": patience})
    trainer._timeline, trainer._metric = Timeline(10, 1, 100.0, 1.0, 1000, 10), "top1"
    trainer._scores, trainer._step = scores, 40
    assert trainer._has_stalled() is stalled


def test_patience_counts_validations_where_an_epoch_is_no_whole_number_of_steps():
    timeline = Timeline(1437, 256, 60.0, 1.0, 1000, 10)
    validated = [step for step in range(1, 337) if timeline.is_eval_step(step)]
    for best in range(50):
        scores = {step: float(number == best) for number, step in enumerate(validated)}
        first = next(
            number
            for number in range(best, len(validated))
            if timeline.stalled_since({step: scores[step] for step in validated[: number + 1]}, 4.0) is not None
        )
        assert first - best == 4


def test_a_run_that_stops_early_stops_at_the_same_step_after_a_kill(user, no_report, tmp_path, monkeypatch):
    changes = {"train__epochs": 20.0, "train__patience_epochs": 2.0, "eval__every_epochs": 1.0}
    changes |= {"optim__learning_rate": 1e-12, "checkpoint__every_steps": 2}
    words = label_flags(write_label_set(tmp_path / "data"), **changes)

    def run(workdir: str) -> dict:
        return parse_last_line(run_here(*words, f"--workdir={tmp_path / workdir}", **user)[0])

    whole = run("whole")
    assert 5 < whole["step"] < 36
    validate = Trainer._validate

    def die_later(self: Trainer, **options) -> dict:
        if self._step > 5:
            raise RuntimeError("killed")
        return validate(self, **options)

    monkeypatch.setattr(Trainer, "_validate", die_later)
    with pytest.raises(RuntimeError, match="killed"):
        run("killed")
    monkeypatch.setattr(Trainer, "_validate", validate)
    assert run("killed") == whole
    assert read_reports(tmp_path / "killed", "validation") == read_reports(tmp_path / "whole", "validation")
    assert run("killed") == whole  # nothing is left to train


def test_a_run_that_stopped_early_has_figures_though_validations_are_due_at_other_steps_now(monkeypatch):
    trainer = object.__new__(Trainer)
    trainer._experiment = experiment(digits, **{"train.patience_epochs": 2.0})
    trainer._timeline, trainer._metric = Timeline(10, 1, 100.0, 3.0, 1000, 10), "top1"
    trainer._scores, trainer._step = {10: 0.6, 20: 0.5, 40: 0.5}, 40
    monkeypatch.setattr(trainer, "_validate", lambda record: {"step": 40, "recorded": record}, raising=False)
    assert trainer.run() == {"step": 40, "recorded": False}


def test_the_best_metric_is_one_that_the_labels_have():
    assert experiment(digits).best_metric == "top1"
    assert experiment(digits, **{"checkpoint.best_metric": "loss"}).best_metric == "loss"
    with pytest.raises(UserError, match=r"best_metric is 'auroc', but config.data.labels is 'single'; expected top1"):
        _ = experiment(digits, **{"checkpoint.best_metric": "auroc"}).best_metric
    with pytest.raises(UserError, match=r"best_metric is 'accuracy'; expected top1, top5, loss, .* or empty"):
        experiment(digits, **{"checkpoint.best_metric": "accuracy"})


def test_classes_are_weighed_by_the_training_images(tmp_path):
    made = experiment(digits, **{"data.dir": str(tmp_path), "train.class_weights": "balanced"})
    counts = np.bincount(made.data.train_source.labels())
    np.testing.assert_allclose(np.array(made.loss.class_weights) * counts, 1437 / 10)
    with pytest.raises(UserError, match="class_weights has 2 numbers, but digits has 10 classes"):
        experiment(digits, **{"data.dir": str(tmp_path), "train.class_weights": (1.0, 2.0)}).loss  # noqa: B018
