"""Weights from a file through the command line: evaluated as they are, fine-tuned, refused where they don't fit."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import densenet_jax
from tests.main_in_process import run_here
from tests.main_processes import parse_last_line

NAME, BLOCK_SIZES = "densenet_bc_22_12", (1,)
SMALL = (
    f"--config.model.name={NAME}",
    f"--config.model.block_sizes={BLOCK_SIZES}",
    "--config.data.image_size_px=8",
    "--config.train.epochs=0.2",
    "--config.train.log_every_steps=1",
)


def weights_file(path: pathlib.Path, num_classes: int, channels: int) -> dict:
    """Writes random weights as PyTorch has them, and returns them."""
    module = densenet_jax.create_model(NAME, num_classes=num_classes, block_sizes=BLOCK_SIZES)
    variables = jax.jit(module.init)(jax.random.key(7), jnp.zeros((1, 8, 8, channels)))
    densenet_jax.save_torch_state_dict(variables, path)
    return variables


@pytest.fixture(scope="module")
def seven_classes(tmp_path_factory) -> tuple[pathlib.Path, dict]:
    path = tmp_path_factory.mktemp("weights") / "seven.safetensors"
    return path, weights_file(path, num_classes=7, channels=3)


def test_evaluates_weights_of_a_file_and_leaves_the_work_directory_alone(user, tmp_path):
    path = tmp_path / "ten.safetensors"
    weights_file(path, num_classes=10, channels=1)
    workdir = tmp_path / "run"
    arguments = (
        "--mode=eval",
        "--config=configs/digits.py",
        f"--config.model.block_sizes={BLOCK_SIZES}",
        f"--workdir={workdir}",
        f"--config.model.pretrained={path}",
    )
    output, errors = run_here(*arguments, **user)
    result = parse_last_line(output)
    assert (result["mode"], result["step"], result["examples"]) == ("eval", 0, 360)
    assert 0 <= result["top1"] < 0.5
    assert "no published figure" in errors
    assert not workdir.exists()


def test_new_classes_keep_the_body_and_a_frozen_one_stays_bit_for_bit(seven_classes, no_report, user, tmp_path):
    path, before = seven_classes
    frozen = ("--config.optim.freeze=^params/(?!classifier)", f"--config.model.pretrained={path}")
    _, errors = run_here("--config=configs/finetune.py:digits", *SMALL, *frozen, f"--workdir={tmp_path}", **user)
    assert "its body is kept, the classifier starts anew" in errors
    after = densenet_jax.load_checkpoint(str(tmp_path))
    head = after["params"].pop("classifier")
    assert head["kernel"].shape[-1] == 10
    assert np.abs(head["bias"]).max() > 0, "biases start at zero and the head learns"
    body = {"params": dict(before["params"]), "batch_stats": before["batch_stats"]}
    del body["params"]["classifier"]
    for (name, old), new in zip(jax.tree_util.tree_leaves_with_path(body), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(old, new, err_msg=jax.tree_util.keystr(name))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["--config.model.pretrained=nowhere.safetensors"], "nowhere.safetensors"),
        (["--config.model.block_sizes=(2,)"], "seven.safetensors does not fit the model: features.norm5.bias is"),
        (["--config.optim.freeze=^params/nothing"], "config.optim.freeze"),
        (["--config.optim.freeze=("], "expected a regular expression"),
    ],
)
def test_weights_that_do_not_fit_are_one_clear_line(changes, said, seven_classes, user, tmp_path):
    arguments = (
        "--config=configs/finetune.py:digits",
        *SMALL,
        f"--config.model.pretrained={seven_classes[0]}",
        *changes,
    )
    output, errors = run_here(*arguments, f"--workdir={tmp_path / 'run'}", expect=2, **user)
    assert output == ""
    last = errors.splitlines()[-1]
    assert last.startswith("error: ")
    assert said in last
    assert "Traceback" not in errors
