"""Runs that die, and what becomes of them: real processes, real signals, real disks."""

import collections
import contextlib
import json
import os
import pathlib
import random
import re
import resource
import signal
import subprocess
import time

import cv2
import numpy as np
import pytest

from densenet_jax.data.sampler import Order
from tests.main_processes import parse_last_line, run_main
from tests.watched_run import EVAL_STEPS, SHORT_RUN, TOTAL_STEPS, Run
from tests.workdir_contents import assert_same_end, list_checkpoint_steps

pytestmark = pytest.mark.slow

KILLS = {"data preparation": 2, "compiling": 2, "step": 6, "save": 5, "evaluation": 3, "report": 2}


@pytest.fixture(scope="module")
def finished(hasty_user, tmp_path_factory) -> pathlib.Path:
    """A run that nothing interrupted, although another one tried to join it."""
    workdir = tmp_path_factory.mktemp("runs") / "finished"
    with Run(*SHORT_RUN, f"--workdir={workdir}", **hasty_user) as run:
        assert run.wait_for(lambda: run.says(r"training \d+/"))
        output, errors = run_main(*SHORT_RUN, f"--workdir={workdir}", expect=2, **hasty_user)
        assert output == ""
        assert errors == f"error: --workdir {workdir} is in use by another run; wait for its end or choose another.\n"
        assert run.end() == 0, run.errors
    assert list_checkpoint_steps(workdir)[-1] == TOTAL_STEPS
    assert not (workdir / "stalls.txt").exists()
    return workdir


def kill_in(moment: str, run: Run, workdir: pathlib.Path, datasets: pathlib.Path, chance: random.Random) -> str:
    """Waits until `run` is in that moment, kills it a little later, and tells in which moment it really died."""
    temporary = lambda: list((workdir / "checkpoints").glob("*.orbax-checkpoint-tmp*"))  # noqa: E731
    steps = chance.randint(3, 9)
    begins, delay_secs = {
        "data preparation": (lambda: datasets.exists() and any(datasets.iterdir()), 0.1),
        "compiling": (lambda: run.says(r"steps, .* an epoch"), 0.5),
        "step": (lambda: len(run.steps_reported()) >= steps, 0.2),
        "save": (temporary, 0.05),
        "evaluation": (lambda: set(run.steps_reported()) & set(EVAL_STEPS), 0.3),
        "report": (lambda: run.says("the latest checkpoint is"), 0.5),
    }[moment]
    if not run.wait_for(begins):
        return "never"
    time.sleep(chance.uniform(0, delay_secs))
    run.process.send_signal(signal.SIGKILL)
    if run.end() != -signal.SIGKILL:
        return "never"
    validated = run.errors.count("validation:")
    due = len(set(run.steps_reported()) & set(EVAL_STEPS))
    still = {
        "data preparation": not run.says("steps, "),
        "compiling": not run.says("compiling: "),
        "step": True,
        "save": bool(temporary()),
        "evaluation": due > validated,
        "report": not run.says("report: "),
    }[moment]
    return moment if still else f"just after {moment}"


@pytest.mark.parametrize("seed", [20])
def test_twenty_kills_at_random_moments_end_bit_for_bit_like_the_uninterrupted_run(seed, finished, user, tmp_path):
    chance = random.Random(seed)
    datasets, workdir = tmp_path / "datasets", tmp_path / "run"
    own = {**user, "TFDS_DATA_DIR": str(datasets)}
    middle = [moment for moment in ("step", "save", "evaluation") for _ in range(KILLS[moment])]
    chance.shuffle(middle)
    first = [moment for moment in ("data preparation", "compiling") for _ in range(KILLS[moment])]
    last = ["report"] * KILLS["report"]
    reached: collections.Counter[str] = collections.Counter()
    for moment in (*first, *middle, *last):
        with Run(*SHORT_RUN, f"--workdir={workdir}", **own) as run:
            where = kill_in(moment, run, workdir, datasets, chance)
        reached[where] += 1
        print(
            f"seed {seed}: wanted {moment}, killed in: {where}; finished checkpoints {list_checkpoint_steps(workdir)}"
        )
    assert reached["never"] == 0, reached
    assert reached.total() == 20
    assert all(reached[moment] for moment in KILLS), reached
    output, errors = run_main(*SHORT_RUN, f"--workdir={workdir}", **own)
    assert parse_last_line(output)["step"] == TOTAL_STEPS
    assert "damaged" not in errors  # a kill leaves no checkpoint that has its name and is not whole
    assert_same_end(workdir, finished, TOTAL_STEPS)
    assert not list((workdir / "checkpoints").glob("*tmp*"))


def assert_refused_for_lack_of_room(run: Run, workdir: pathlib.Path, why: str) -> None:
    assert run.end() == 2, run.errors
    said = run.lines[-1]
    assert said.startswith(f"error: {workdir}"), run.errors
    assert f"can't be written to: {why} (" in said
    assert "MiB are free there" in said
    assert "Traceback" not in run.errors


def test_file_size_limit_that_is_hit_in_a_save_leaves_the_last_checkpoint(finished, hasty_user, tmp_path):
    """Needs no rights: a limit on the size of files makes every larger write fail, as a full disk does."""
    with Run(*SHORT_RUN, f"--workdir={tmp_path}", **hasty_user) as run:
        assert run.wait_for(lambda: list_checkpoint_steps(tmp_path))
        resource.prlimit(run.process.pid, resource.RLIMIT_FSIZE, (100_000, 100_000))  # a state has 600,000 bytes
        assert_refused_for_lack_of_room(run, tmp_path, "File too large")
    kept = list_checkpoint_steps(tmp_path)
    assert kept
    with Run(*SHORT_RUN, f"--workdir={tmp_path}", **hasty_user) as run:
        assert run.end() == 0
        assert run.says(f"continuing after step {kept[-1]}")
    assert_same_end(tmp_path, finished, TOTAL_STEPS)


@contextlib.contextmanager
def small_disk(path: pathlib.Path, size: str):
    """A file system of that size at `path`; where the user may not mount one, the test is skipped."""
    path.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", path], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no right to mount a small disk: {mounted.stderr.decode().strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", path], check=True)


def test_full_disk_leaves_the_last_checkpoint(finished, hasty_user, tmp_path):
    disk = tmp_path / "disk"
    with small_disk(disk, "5m"):
        with Run(*SHORT_RUN, f"--workdir={disk}/run", **hasty_user) as run:
            assert_refused_for_lack_of_room(run, disk / "run", "No space left on device")
        kept = list_checkpoint_steps(disk / "run")
        assert kept
        assert kept[-1] < TOTAL_STEPS
        subprocess.run(["mount", "-o", "remount,size=200m", disk], check=True)
        with Run(*SHORT_RUN, f"--workdir={disk}/run", **hasty_user) as run:
            assert run.end() == 0
            assert run.says(f"continuing after step {kept[-1]}")
        assert_same_end(disk / "run", finished, TOTAL_STEPS)


def test_stop_at_a_validation_step_leaves_a_checkpoint_that_can_become_the_best(hasty_user, tmp_path):
    every_step = ("--config.train.global_batch_size=479", "--config.eval.every_epochs=0.3333333333")
    arguments = (*SHORT_RUN, *every_step, "--config.train.epochs=2", "--config.eval.batch_size=64")
    with Run(*arguments, f"--workdir={tmp_path}", **hasty_user) as run:
        assert run.wait_for(lambda: run.says("validation:"))
        run.process.send_signal(signal.SIGTERM)
        assert run.end() == 130, run.errors
    step = list_checkpoint_steps(tmp_path)[-1]
    scores = tmp_path / "checkpoints" / str(step) / "metrics" / "metrics"
    assert run.says(f"stopped and saved after step {step};")
    assert not scores.exists()
    run_main(*arguments, f"--workdir={tmp_path}", **hasty_user)
    validated = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    (top1,) = [line["top1"] for line in validated if (line["step"], line["split"]) == (step, "validation")]
    assert json.loads(scores.read_text())["top1"] == top1


STALL = r"nothing has moved for \d+ s while waiting for the images of step 100\n(.*\n)*Thread 0x.*recent call first"


def test_image_that_does_not_come_is_reported_and_the_run_goes_on(hasty_user, tmp_path):
    """A pipe among the images: who opens it waits until somebody writes, as on a network file system that is gone."""
    train = tmp_path / "data" / "train"
    picture = cv2.imencode(".png", np.zeros((8, 8), np.uint8))[1].tobytes()
    for number in range(960):
        folder = train / ("even", "odd")[number // 480]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number:03d}.png").write_bytes(picture)
    (tmp_path / "data" / "val").symlink_to(train)
    late = int(Order(960, 0).stretch(8 * 99, 1)[0])  # first wanted in step 100 of batches of 8
    pipe = train / ("even", "odd")[late // 480] / f"{late:03d}.png"
    stalling = (
        *SHORT_RUN,
        "--config.data.name=folder",
        f"--config.data.dir={tmp_path}/data",
        "--config.data.eval_split=val",
        "--config.train.global_batch_size=8",
        "--config.train.epochs=1",
        "--config.train.stall_secs=2",
        f"--workdir={tmp_path}/run",
    )
    stalls = tmp_path / "run" / "stalls.txt"
    with Run(*stalling, **hasty_user) as run:
        assert run.wait_for(run.steps_reported)  # the folders are listed: pipes among the files would be left out
        pipe.unlink()
        os.mkfifo(pipe)
        # A busy machine may be slow enough to stall in an earlier step, too.
        assert run.wait_for(lambda: stalls.exists() and re.search(STALL, stalls.read_text()) and run.says(STALL))
        writer = os.open(pipe, os.O_WRONLY)
        pipe.unlink()
        pipe.write_bytes(picture)
        os.write(writer, picture)
        os.close(writer)
        assert run.end() == 0, run.errors
    assert "folder.py" in stalls.read_text()
    assert run.says("it goes on after")


def test_profile_of_a_run_can_be_opened(hasty_user, tmp_path):
    arguments = (*SHORT_RUN, "--config.train.epochs=0.3", "--config.profile=3:2", f"--workdir={tmp_path}")
    _, errors = run_main(*arguments, **hasty_user)
    assert "profile: " in errors
    (trace,) = tmp_path.glob("plugins/profile/*/*.xplane.pb")
    import jax

    planes = jax.profiler.ProfileData.from_file(str(trace)).planes
    events = [event for plane in planes for line in plane.lines for event in line.events]
    assert [dict(event.stats)["step_num"] for event in events if event.name == "train"] == [3, 4]
    assert len(events) > 100


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("3", "config.profile is '3'; expected STEP:COUNT, both from 1 on, or empty."),
        ("80:12", "config.profile is '80:12', which ends at step 91; the run has 90 steps."),
    ],
)
def test_wrong_profile_is_one_line(setting, said, user, tmp_path):
    arguments = (*SHORT_RUN, f"--config.profile={setting}", f"--workdir={tmp_path / 'run'}")
    output, errors = run_main(*arguments, expect=2, **user)
    assert output == ""
    assert errors.splitlines()[-1] == f"error: {said}"


def test_damaged_checkpoint_is_passed_over_by_training_and_refused_by_eval(finished, hasty_user, tmp_path):
    """In a copy of a run: a bit is flipped in an array, which Orbax reads without a word."""
    workdir = tmp_path / "run"
    subprocess.run(["cp", "-r", finished, workdir], check=True)
    newest, before = list_checkpoint_steps(workdir)[-1], list_checkpoint_steps(workdir)[-2]
    data = max((workdir / "checkpoints" / str(newest)).rglob("*"), key=lambda path: path.stat().st_size)
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    _, errors = run_main(*SHORT_RUN, "--mode=eval", f"--workdir={workdir}", expect=2, **hasty_user)
    (line,) = [line for line in errors.splitlines() if line.startswith("error:")]
    assert f"checkpoints/{newest} is damaged: {data.relative_to(workdir / 'checkpoints' / str(newest))}" in line
    _, errors = run_main(*SHORT_RUN, f"--workdir={workdir}", **hasty_user)
    assert f"checkpoints/{newest} is damaged" in errors
    assert f"continuing after step {before}" in errors
    assert_same_end(workdir, finished, TOTAL_STEPS)
