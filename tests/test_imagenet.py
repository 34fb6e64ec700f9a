"""The ImageNet recipes on a small data set with ImageNet's layout, through the real entry point."""

import json

import pytest

from tests.data import fake_imagenet
from tests.main_in_process import run_here
from tests.main_processes import parse_last_line, run_main


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory) -> str:
    directory = str(tmp_path_factory.mktemp("imagenet"))
    fake_imagenet.write(directory, train=40, validation=11)
    return directory


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["densenet121", "densenet121_cosine"])
def test_recipe_runs_to_the_end(recipe, imagenet, user, tmp_path):
    arguments = (
        f"--config=configs/{recipe}.py",
        f"--workdir={tmp_path}",
        f"--config.data.dir={imagenet}",
        "--config.train.epochs=1",
        "--config.train.global_batch_size=8",
        "--config.data.image_size_px=64",
        "--config.optim.warmup_epochs=0",
        "--config.model.block_sizes=(1,1,1,1)",  # for the compiler's sake
    )
    output, _ = run_here(*arguments, **user)
    result = parse_last_line(output)
    assert (result["mode"], result["step"], result["examples"]) == ("train", 5, 11)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model"]["name"] == "densenet121"
    if recipe == "densenet121_cosine":
        return
    evaluated = parse_last_line(run_here("--mode=eval", *arguments, **user)[0])
    assert evaluated["top1"] == result["top1"]
    assert evaluated["loss"] == pytest.approx(result["loss"], rel=1e-5)


def test_unprepared_imagenet_is_refused_with_how_to_get_it(user, tmp_path):
    arguments = ("--config=configs/densenet121.py", f"--workdir={tmp_path / 'run'}", f"--config.data.dir={tmp_path}")
    output, errors = run_here(*arguments, expect=2, **user)
    assert output == ""
    assert errors.startswith("error: ")
    assert len(errors.splitlines()) == 1
    for needed in (
        "ILSVRC2012_img_train.tar",
        "ILSVRC2012_img_val.tar",
        "downloads/manual",
        "--mode prepare",
        "tensorflow",
    ):
        assert needed in errors


def test_prepare_verifies_and_names_what_is_wrong(imagenet, user, tmp_path):
    arguments = ("--mode=prepare", "--config=configs/densenet121.py", f"--config.data.dir={imagenet}")
    _, errors = run_main(*arguments, f"--workdir={tmp_path}", expect=2, **user)
    assert "40 images in train instead of 1281167" in errors
    assert "11 images in validation instead of 50000" in errors
