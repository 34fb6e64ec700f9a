"""Runs with many labels through the command line: every option at once, resumed, fine-tuned and used."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

import densenet_jax
from densenet_jax.models.torch_weights import to_torch
from tests.label_run import LABELS, label_flags, write_label_set
from tests.main_in_process import run_here
from tests.main_processes import run_processes

# All that changes what a step computes or the order of examples.
OPTIONS = {
    "model__dtype": "float16",
    "data__sampler": "balanced",
    "augment__mixup_alpha": 0.2,
    "train__loss": "asymmetric",
    "train__class_weights": "balanced",
    "train__label_smoothing": 0.1,
    "train__average_decay": 0.9,
    "train__microbatches": 2,
    "train__log_every_steps": 3,
    "checkpoint__every_steps": 4,
}
TIMES = ("images_per_sec", "data_wait_fraction", "compile_secs", "host_memory_bytes")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, user, no_report):
    """The flags of a finished run of eight steps, and its directory."""
    folder = tmp_path_factory.mktemp("labels")
    flags = label_flags(write_label_set(folder / "data"), **OPTIONS)
    run_here(*flags, f"--workdir={folder / 'run'}", **user)
    return flags, folder / "run"


def reports(workdir):
    lines = (json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines())
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]


def test_a_resumed_run_goes_on_as_if_never_stopped(finished, tmp_path, user):
    flags, workdir = finished
    again = tmp_path / "again"
    shutil.copytree(workdir, again)
    assert sorted(int(path.name) for path in (again / "checkpoints").iterdir()) == [4, 8]
    shutil.rmtree(again / "checkpoints" / "8")  # step 4 is between two reports
    _, errors = run_here(*flags, f"--workdir={again}", **user)
    assert "continuing after step 4" in errors
    assert [report["step"] for report in reports(again)] == [3, 4, 6, 8, 8]
    assert reports(again) == reports(workdir)
    assert all(np.isfinite(report["loss"]) for report in reports(workdir))


def test_predictions_have_every_label(finished, user):
    _, workdir = finished
    run_here("predict", f"--workdir={workdir}", f"--images={workdir.parent / 'data' / 'images' / '0.png'}", **user)
    [line] = (workdir / "predictions.jsonl").read_text().splitlines()
    answers = json.loads(line)["predictions"]
    assert sorted(answer["label"] for answer in answers) == sorted(LABELS)
    assert all(0 < answer["probability"] < 1 for answer in answers)
    assert json.loads((workdir / "config.json").read_text())["data"]["labels"] == "multi"


def test_weights_with_another_number_of_outputs_begin_a_run(finished, tmp_path, user):
    flags, _ = finished
    model = densenet_jax.create_model("densenet_bc_22_12", block_sizes=(1,), growth_rate=4, num_classes=10)
    variables = jax.jit(model.init)(jax.random.key(3), jnp.zeros((1, 8, 8, 1)))
    state = {name: np.ascontiguousarray(array) for name, array in to_torch(jax.device_get(variables)).items()}
    save_file(state, tmp_path / "ten.safetensors")
    changes = {"model.pretrained": tmp_path / "ten.safetensors", "optim.learning_rate": 1e-9, "train.epochs": 1.0}
    given = [f"--config.{key}={value}" for key, value in changes.items()]
    run_here(*flags, *given, f"--workdir={tmp_path / 'run'}", **user)
    params = densenet_jax.load_checkpoint(str(tmp_path / "run"))["params"]
    assert params["classifier"]["kernel"].shape[1] == len(LABELS)
    np.testing.assert_allclose(params["conv0"]["kernel"], variables["params"]["conv0"]["kernel"], atol=1e-6)


@pytest.mark.slow
def test_processes_together_train_what_one_does(tmp_path, user):
    options = {name: value for name, value in OPTIONS.items() if name != "model__dtype"}
    flags = label_flags(write_label_set(tmp_path / "data"), **options, train__epochs=2.0)
    run_here(*flags, f"--workdir={tmp_path / 'one'}", **user)
    run_processes(2, *flags, f"--workdir={tmp_path / 'two'}", devices=2, **user)
    one, two = (reports(tmp_path / name) for name in ("one", "two"))
    assert [(report["step"], report["split"]) for report in two] == [(each["step"], each["split"]) for each in one]
    losses = ([report["loss"] for report in run] for run in (one, two))
    np.testing.assert_allclose(*losses, rtol=1e-3)


def test_a_number_of_weights_that_is_not_the_labels_is_one_line(finished, tmp_path, user):
    flags, _ = finished
    _, errors = run_here(*flags, "--config.train.class_weights=1,2", f"--workdir={tmp_path / 'run'}", expect=2, **user)
    assert "config.train.class_weights has 2 numbers, but table has 3 classes; give one number a class." in errors
    assert not (tmp_path / "run").exists()
