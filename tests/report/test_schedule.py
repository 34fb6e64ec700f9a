"""Any recipe's learning rate can be drawn, with or without its data set."""

import importlib

import numpy as np
import pytest
from PIL import Image

from configs import default
from densenet_jax.config import check_config
from densenet_jax.errors import UserError
from densenet_jax.experiment import Experiment
from densenet_jax.flags import Command
from densenet_jax.modes import schedule_mode
from densenet_jax.report.schedule import all_rates, turning_points
from densenet_jax.training.schedules import make_schedule
from tests.data import fake_imagenet
from tests.main_in_process import run_here
from tests.main_processes import parse_last_line


def drawn(recipe, directory, workdir, **changes):
    config = importlib.import_module(f"configs.{recipe}").get_config()
    config.update_from_flattened_dict({"data.dir": str(directory), **changes})
    return schedule_mode(check_config(config), str(workdir), Command())


def test_schedule_of_imagenet_is_drawn_without_imagenet(tmp_path, capsys):
    workdir = tmp_path / "run"
    result = drawn("densenet121_paper", tmp_path, workdir)
    assert list(result) == ["path", "total_steps", "peak_learning_rate", "end_learning_rate"]
    assert result["total_steps"] == -(-90 * 1_281_167 // 256)
    assert (result["peak_learning_rate"], result["end_learning_rate"]) == pytest.approx((0.1, 0.001))
    errors = capsys.readouterr().err
    assert "not prepared here; taking its known 1,281,167 training images" in errors
    for milestone in ("step    150137  epoch   30.00  learning rate 0.01", "step    300274"):
        assert milestone in errors
    with Image.open(workdir / "schedule.png") as picture:
        blue = np.asarray(picture.convert("RGB"), int)
        assert ((blue[..., 2] > 120) & (blue[..., 0] < 90)).sum() > 500  # the line


def test_prepared_images_are_counted(tmp_path, capsys):
    fake_imagenet.write(str(tmp_path), train=40, validation=2)
    changes = {"train.global_batch_size": 8, "data.holdout": 8.0}
    result = drawn("densenet121_paper", tmp_path, tmp_path / "run", **changes)
    assert result["total_steps"] == 90 * 32 // 8
    assert "known" not in capsys.readouterr().err


@pytest.mark.parametrize(("held_out", "left"), [(0.0, 50_000), (0.1, 45_000), (5_000, 45_000)])
def test_known_number_is_less_what_is_held_out(held_out, left, tmp_path):
    config = default.get_config()
    changes = {"data.name": "cifar10", "data.dir": str(tmp_path), "data.holdout": float(held_out)}
    config.update_from_flattened_dict(changes)
    assert Experiment(check_config(config)).data.count_train_examples() == (left, False)


def test_unknown_set_that_is_not_prepared_is_a_users_error(tmp_path):
    with pytest.raises(UserError, match=r"oxford_flowers102 is not prepared"):
        drawn("densenet121", tmp_path, tmp_path, **{"data.name": "oxford_flowers102"})


def test_picture_that_can_not_be_written_is_a_users_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"schedule.png can't be written .* choose another --workdir"):
        drawn("densenet121", tmp_path, tmp_path / "file")


@pytest.mark.parametrize(
    ("name", "options", "points"),
    [
        ("constant", {}, [0, 999]),
        ("cosine", {}, [0, 999]),
        ("cosine", {"warmup_steps": 50}, [0, 50, 999]),
        ("multistep", {"warmup_steps": 50, "milestone_steps": (300, 600)}, [0, 50, 300, 600, 999]),
        ("cosine_restarts", {"cycle_steps": 400}, [0, 400, 800, 999]),
        ("one_cycle", {"rise_fraction": 0.25}, [0, 250, 999]),
        ("exponential", {"decay_steps": 250, "staircase": True}, [0, 250, 500, 750, 999]),
        ("exponential", {"decay_steps": 250}, [0, 999]),
    ],
)
def test_turning_points_are_where_the_course_changes(name, options, points):
    schedule = make_schedule(name, learning_rate=0.1, total_steps=1000, **options)
    actual = turning_points(all_rates(schedule, 1000))
    assert len(actual) == len(points)
    assert all(abs(ours - expected) <= 1 for ours, expected in zip(actual, points, strict=True)), actual


def test_schedule_mode_ends_with_one_line(user, tmp_path):
    output, errors = run_here("--mode=schedule", "--config=configs/densenet121.py", f"--workdir={tmp_path}", **user)
    result = parse_last_line(output)
    assert (len(output.splitlines()), result["mode"]) == (1, "schedule")
    assert result["path"] == str(tmp_path / "schedule.png")
    assert "epoch  150.00  learning rate 0.01" in errors
