"""Mistakes cost nothing: nothing is written before all is right, and a work directory of an older version opens."""

import hashlib
import json
import os
import pathlib
import shutil
import tarfile
from collections import namedtuple

import numpy as np
import pytest

from densenet_jax.errors import UserError
from densenet_jax.system import disk
from densenet_jax.workdir import only_run_in
from tests.main_in_process import run_here
from tests.workdir_contents import list_checkpoint_steps, load_arrays

FIXTURES = pathlib.Path(__file__).parent / "fixtures"
SHORT = ("--config=digits", "--config.train.epochs=0.2", "--config.optim.warmup_epochs=0")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("train.global_batch_size=4000", "but digits has 1,437 training images; take 1437 or less"),
        ("train.global_batch_size=12", "which 8 devices don't divide"),
        ("model.pretrained=nothing.safetensors", "no weights at 'nothing.safetensors'"),
        ("data.mean=(0.1,0.2)", "config.data.mean has 2 numbers"),
        ("train.microbatches=7", "config.train.microbatches is 7, which does not divide"),
        ("optim.freeze=^params/nothing", "matches 0 of"),
        ("optim.warmup_epochs=3", "config.optim.warmup_epochs or warmup_steps is"),
        ("profile=9:9", "which ends at step 17; the run has 5 steps"),
    ],
)
def test_a_mistake_is_reported_before_anything_is_written(setting, message, user, tmp_path):
    _, errors = run_here(*SHORT, f"--workdir={tmp_path}/run", f"--config.{setting}", expect=2, **user)
    assert message in errors.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def test_room_on_the_disk_is_looked_at_first(user, tmp_path, monkeypatch):
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: usage(2**18))
    _, errors = run_here(*SHORT, f"--workdir={tmp_path}/a/run", expect=2, **user)
    assert "a checkpoint needs up to 0.6 MiB and 0.2 MiB are free there; make room" in errors
    assert list(tmp_path.iterdir()) == []


def test_a_refused_command_leaves_no_directory(tmp_path):
    with pytest.raises(UserError), only_run_in(str(tmp_path / "run")):
        raise UserError("a mistake")
    assert list(tmp_path.iterdir()) == []

    def begin_run(*files: str) -> None:
        with only_run_in(str(tmp_path / "run")):
            (tmp_path / "run" / "checkpoints").mkdir()
            for name in ("config.json", "labels.txt", *files):
                (tmp_path / "run" / name).write_text("{}")
            raise UserError("a mistake that compiling found")

    with pytest.raises(UserError):
        begin_run()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError):
        begin_run("metrics.jsonl")
    assert (tmp_path / "run" / "config.json").exists()
    (tmp_path / "kept").mkdir()
    with pytest.raises(UserError), only_run_in(str(tmp_path / "kept")):
        raise UserError("a mistake")
    assert (tmp_path / "kept").is_dir()


@pytest.fixture(scope="module")
def old_run(tmp_path_factory) -> tuple[pathlib.Path, dict]:
    """A run that an earlier version was stopped in; see fixtures/make_old_run.py."""
    folder = tmp_path_factory.mktemp("old")
    with tarfile.open(FIXTURES / "old_run.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder / "old_run", json.loads((FIXTURES / "old_run.json").read_text())


def test_an_older_run_is_restored_bit_for_bit(old_run):
    workdir, expected = old_run
    arrays = load_arrays(workdir, expected["step"])
    digests = {name: hashlib.sha256(np.ascontiguousarray(each).tobytes()).hexdigest() for name, each in arrays.items()}
    assert digests == expected["arrays"]


def test_an_older_run_is_evaluated_alike(old_run, user):
    workdir, expected = old_run
    output, errors = run_here("eval", f"--workdir={workdir}", **user)
    result = json.loads(output)
    assert list(result) == list(expected["eval"])
    for name in ("step", "examples", "loss", "top1", "top5"):
        assert result[name] == pytest.approx(expected["eval"][name], rel=1e-4), name
    assert f"the latest checkpoint is step {expected['step']}; none was validated" in errors


@pytest.mark.slow
def test_an_older_run_is_continued_to_its_end(old_run, user, tmp_path):
    workdir, expected = old_run
    copy = shutil.copytree(workdir, tmp_path / "copy")
    output, errors = run_here("train", f"--workdir={copy}", **user)
    assert f"continuing after step {expected['step']}" in errors
    assert "the latest checkpoint is step 23, also the best" in errors
    assert json.loads(output)["step"] == expected["end"]["step"] == list_checkpoint_steps(copy)[-1]
    assert json.loads(output)["loss"] == pytest.approx(expected["end"]["loss"], rel=0.02)


def test_a_damaged_checkpoint_names_one_that_is_whole(digits, tmp_path):
    workdir = shutil.copytree(digits[0], tmp_path / "run")
    good = next((workdir / "checkpoints").glob("[0-9]*"))
    bad = shutil.copytree(good, workdir / "checkpoints" / "7")
    data = max(bad.rglob("*"), key=lambda path: path.stat().st_size)
    data.write_bytes(bytes(os.path.getsize(data)))
    _, errors = run_here("eval", f"--workdir={workdir}", "--checkpoint=7", expect=2)
    assert f"is damaged: {data.relative_to(bad)}" in errors
    assert f"step {good.name} is whole: --checkpoint={good.name}." in errors
