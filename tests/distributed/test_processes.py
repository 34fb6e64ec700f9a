"""Several processes as one run: real processes with two fake devices each, which exchange through gloo."""

import itertools
import json
import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np
import pytest
import yaml
from PIL import Image

from tests.main_in_process import run_here
from tests.main_processes import (
    ROOT,
    find_free_port,
    make_environment,
    parse_last_line,
    run_main,
    run_processes,
    start_main,
    start_processes,
    wait_for_ends,
)
from tests.workdir_contents import list_checkpoint_steps, load_arrays, read_all_reports
from tests.xla_flags import QUICK_COMPILING

STEPS = 9
QUICK = (
    "--config=configs/digits.py",
    "--config.model.block_sizes=(1,)",
    "--config.train.epochs=0.4",
    "--config.optim.warmup_epochs=0.1",
    "--config.optim.learning_rate=0.01",
    "--config.eval.every_epochs=1",
    "--config.eval.batch_size=56",  # 360 examples: the last batch is not full, and some devices get none of it
    "--config.checkpoint.every_steps=3",
    "--config.train.log_every_steps=1",
)
# In float32 the order in which devices add decides now and then on which side of zero an activation falls: no fault,
# but after a few steps the runs are strangers. In float64 they stay the same.
EXACT = (*QUICK, "--config.model.dtype=float64")
LONG = (*QUICK, "--config.train.epochs=40", "--config.optim.warmup_epochs=2")


def assert_same_run(workdir: pathlib.Path, other: pathlib.Path, step: int = STEPS) -> None:
    """Same reports and state, up to the order in which devices add; the runs' activations must be float64."""
    ours, theirs = read_all_reports(workdir), read_all_reports(other)
    assert [(line["step"], line["split"]) for line in ours] == [(line["step"], line["split"]) for line in theirs]
    for mine, yours in zip(ours, theirs, strict=True):
        assert mine["loss"] == pytest.approx(yours["loss"], rel=1e-6), mine["step"]
        assert (mine["top1"], mine["top5"]) == (yours["top1"], yours["top5"])
    arrays, expected = load_arrays(workdir, step), load_arrays(other, step)
    assert arrays.keys() == expected.keys()
    for name, array in arrays.items():
        np.testing.assert_allclose(array, expected[name], rtol=1e-6, atol=1e-9, err_msg=name)


def wait_until(reached: Callable[[], object], processes: list[subprocess.Popen[str]]) -> None:
    """Returns once `reached()` is true; fails the test as soon as one of the processes has ended before."""
    while not reached():
        if any(process.poll() is not None for process in processes):
            pytest.fail("\n".join(f"exit status {status}\n{errors}" for status, _, errors in wait_for_ends(processes)))
        time.sleep(0.05)


def wait_for_step(workdir: pathlib.Path, step: int, processes: list[subprocess.Popen[str]]) -> None:
    """Returns once training has reported `step`."""
    wait_until(lambda: last_reported_step(workdir) >= step, processes)


def last_reported_step(workdir: pathlib.Path) -> int:
    metrics = workdir / "metrics.jsonl"
    return max((json.loads(line)["step"] for line in whole_lines(metrics)), default=0) if metrics.exists() else 0


def whole_lines(path: pathlib.Path) -> list[str]:
    return [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


@pytest.fixture(scope="module")
def exact_user(hasty_user) -> dict[str, str]:
    """A user whose JAX has float64."""
    return {**hasty_user, "JAX_ENABLE_X64": "1"}


@pytest.fixture(scope="module")
def alone(exact_user, tmp_path_factory) -> pathlib.Path:
    """The run of one process with four devices."""
    workdir = tmp_path_factory.mktemp("alone")
    run_main(*EXACT, f"--workdir={workdir}", devices=4, **exact_user)
    return workdir


@pytest.fixture(scope="module")
def together(exact_user, tmp_path_factory) -> pathlib.Path:
    """The same run of two processes with two devices each, as the launcher starts them."""
    workdir = tmp_path_factory.mktemp("together")
    result = subprocess.run(
        ["launch/local.sh", "2", *EXACT, f"--workdir={workdir}"],
        cwd=ROOT,
        env=make_environment(**exact_user, DEVICES="2", XLA_FLAGS=QUICK_COMPILING, PYTHON=sys.executable),
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.splitlines()) == 1
    assert (parse_last_line(result.stdout)["step"], parse_last_line(result.stdout)["examples"]) == (STEPS, 360)
    assert result.stderr.count("compiling: ") == 1
    return workdir


@pytest.mark.slow
def test_two_processes_with_two_devices_equal_one_with_four(alone, together):
    assert_same_run(together, alone)
    assert len(list(together.glob("events.out.tfevents.*"))) == 1


@pytest.mark.slow
def test_every_example_of_uneven_shards_counts_once(exact_user, together):
    arguments = (*EXACT, f"--workdir={together}", "--mode=eval", "--config.eval.batch_size=52")
    output, _ = run_processes(2, *arguments, f"--config.eval.confusion_output={together}/confusion.csv", **exact_user)
    result, trained = parse_last_line(output), read_all_reports(together)[-1]
    assert (result["examples"], result["top1"]) == (360, trained["top1"])
    assert result["loss"] == pytest.approx(trained["loss"], rel=1e-6)
    rows = (together / "confusion.csv").read_text().splitlines()[1:]
    counts = [int(number) for row in rows for number in row.split(",")[1:] if number.isdigit()]
    assert sum(counts) >= 360


def copy_as_if_dead_after_step_3(workdir: pathlib.Path, copy: pathlib.Path) -> pathlib.Path:
    """A finished run as if it had died."""
    shutil.copytree(workdir, copy)
    for step in list_checkpoint_steps(copy):
        if step > 3:
            shutil.rmtree(copy / "checkpoints" / str(step))
    return copy


@pytest.mark.slow
def test_a_run_of_two_processes_goes_on_as_one(exact_user, alone, together, tmp_path):
    workdir = copy_as_if_dead_after_step_3(together, tmp_path / "run")
    _, errors = run_main(*EXACT, "--config.train.sharding=fsdp", f"--workdir={workdir}", devices=4, **exact_user)
    assert "continuing after step 3" in errors
    assert_same_run(workdir, alone)


@pytest.mark.slow
def test_a_run_of_one_process_goes_on_as_two(exact_user, alone, tmp_path):
    """Which find each other by what srun tells them."""
    workdir = copy_as_if_dead_after_step_3(alone, tmp_path / "run")
    step = {
        "SLURM_JOB_ID": "1",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": "2",
        "SLURM_STEP_TASKS_PER_NODE": "2",
        "JAX_COORDINATOR_PORT": str(find_free_port()),
    }
    tasks = [{**step, "SLURM_PROCID": str(index), "SLURM_LOCALID": str(index)} for index in range(2)]
    arguments = (*EXACT, "--config.train.sharding=fsdp", f"--workdir={workdir}")
    ends = wait_for_ends([start_main(*arguments, devices=2, **exact_user, **task) for task in tasks])
    assert [status for status, _, _ in ends] == [0, 0], ends
    assert "continuing after step 3" in ends[0][2]
    assert_same_run(workdir, alone)


@pytest.mark.slow
def test_sigterm_to_one_of_two_saves_the_same_step_on_both(user, tmp_path):
    processes = start_processes(2, *LONG, f"--workdir={tmp_path}", **user)
    wait_for_step(tmp_path, 2, processes)
    processes[1].send_signal(signal.SIGTERM)
    ends = wait_for_ends(processes)
    assert [status for status, _, _ in ends] == [130, 130], ends
    assert [output for _, output, _ in ends] == ["", ""]
    newest = list_checkpoint_steps(tmp_path)[-1]
    assert [line["step"] for line in read_all_reports(tmp_path)][-1] == newest
    assert f"stopped and saved after step {newest}" in ends[0][2]
    assert "Traceback" not in ends[0][2] + ends[1][2]


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_one_of_two_killed_ends_the_other_and_a_restart_continues(user, tmp_path, victim):
    processes = start_processes(2, *LONG, f"--workdir={tmp_path}", **user)
    # A report of step 4 would not do: the checkpoint of step 3 is finished beside the steps that follow it.
    wait_until(lambda: list_checkpoint_steps(tmp_path), processes)
    processes[victim].kill()
    status, output, errors = wait_for_ends(processes, timeout_secs=200)[1 - victim]
    assert (status, output) == (1, "")
    last = errors.splitlines()[-1]
    assert last.startswith("error: a process of this run has died or can't be reached")
    assert "start all of them again" in last
    kept = list_checkpoint_steps(tmp_path)[-1]
    if victim == 0:
        return

    reported = last_reported_step(tmp_path)
    processes = start_processes(2, *LONG, f"--workdir={tmp_path}", **user)
    wait_for_step(tmp_path, reported + 3, processes)
    for process in processes:
        process.send_signal(signal.SIGTERM)
    ends = wait_for_ends(processes)
    assert [status for status, _, _ in ends] == [130, 130], ends
    assert f"continuing after step {kept}" in ends[0][2]
    assert [line["step"] for line in read_all_reports(tmp_path)] == list(
        range(1, list_checkpoint_steps(tmp_path)[-1] + 1)
    )


@pytest.mark.slow
def test_a_mistake_of_one_ends_all_with_its_message(user, tmp_path):
    common = (*QUICK, f"--workdir={tmp_path}")
    where = (f"--coordinator=127.0.0.1:{find_free_port()}", "--num_processes=2")
    ends = wait_for_ends(
        [
            start_main(*common, *where, "--process_id=0", devices=2, **user),
            start_main(*common, *where, "--process_id=1", "--config.optim.momentum=0.5", devices=2, **user),
        ]
    )
    assert [status for status, _, _ in ends] == [2, 2], ends
    for _, _, errors in ends:
        assert "config.optim.momentum=0.9 there, config.optim.momentum=0.5 here" in errors.splitlines()[-1]
        assert "Traceback" not in errors
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_damaged_image_of_one_ends_all_with_its_name(user, tmp_path):
    """In the middle of a run, where the other process waits for an exchange with this one."""
    chance = np.random.default_rng(0)
    for split, label, number in itertools.product(("train", "val"), ("a", "b"), range(8)):
        for host in ("whole", "damaged"):
            path = tmp_path / host / split / label / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(chance.integers(0, 256, (8, 8), np.uint8)).save(path)
            if (host, split) == ("damaged", "train"):
                path.write_bytes(path.read_bytes()[:60])
    common = (
        *("--config=configs/digits.py", "--config.model.block_sizes=(1,)", f"--workdir={tmp_path}/run"),
        "--config.optim.warmup_epochs=0",
        *("--config.data.name=folder", "--config.data.eval_split=val", "--config.train.global_batch_size=8"),
    )
    where = (f"--coordinator=127.0.0.1:{find_free_port()}", "--num_processes=2")
    processes = [
        start_main(*common, *where, f"--process_id={index}", f"--config.data.dir={tmp_path}/{host}", **user)
        for index, host in enumerate(("whole", "damaged"))
    ]
    ends = wait_for_ends(processes, timeout_secs=300)
    assert [status for status, _, _ in ends] == [2, 2], ends
    last = [errors.splitlines()[-1] for _, _, errors in ends]
    assert last[0].startswith("error: process 1 on ")
    assert all("Image train/" in line and "can't be decoded" in line for line in last), last
    assert "Traceback" not in ends[0][2] + ends[1][2]


def test_batch_that_the_devices_do_not_divide(user, tmp_path):
    with_batch = (*QUICK, f"--workdir={tmp_path}", "--config.train.global_batch_size=6")
    ends = wait_for_ends(start_processes(2, *with_batch, **user))
    for status, output, errors in ends:
        assert (status, output) == (2, "")
        assert "config.train.global_batch_size is 6, which 4 devices don't divide; take 4 or 8." in errors
        assert sum(line.startswith("error:") for line in errors.splitlines()) == 1
    assert not (tmp_path / "config.json").exists()


@pytest.mark.slow
def test_the_others_do_not_come(user, tmp_path):
    """The first process waits for the second, elsewhere a second one for its coordinator."""
    processes = []
    for index in (0, 1):
        where = (f"--coordinator=127.0.0.1:{find_free_port()}", "--num_processes=2", f"--process_id={index}")
        processes.append(start_main(*QUICK, f"--workdir={tmp_path}", *where, **user))
    ends = wait_for_ends(processes, timeout_secs=200)
    for status, output, errors in ends:
        assert (status, output, len(errors.splitlines())) == (2, "", 1), errors
        assert errors.startswith("error: the 2 processes of this run did not come together at 127.0.0.1")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--coordinator=localhost:1"], "without --num_processes and --process_id"),
        (
            ["--mode=schedule", "--num_processes=2"],
            "--num_processes 2 is for --mode train or eval or calibrate or report, but --mode is schedule",
        ),
    ],
)
def test_flags_that_contradict_themselves_are_one_line(tmp_path, flags, message):
    output, errors = run_here(*QUICK, f"--workdir={tmp_path}/run", *flags, expect=2)
    assert (output, len(errors.splitlines())) == ("", 1)
    assert errors.startswith("error: ")
    assert message in errors
    assert list(tmp_path.iterdir()) == []


LAUNCHERS = sorted((ROOT / "launch").glob("*.sh"))


@pytest.mark.parametrize("script", LAUNCHERS, ids=lambda path: path.name)
def test_launcher_is_a_script_with_its_usage(script):
    subprocess.run(["bash", "-n", str(script)], check=True)
    text = script.read_text()
    assert text.startswith("#!/usr/bin/env bash\n# ")
    assert os.access(script, os.X_OK)
    assert "set -euo pipefail" in text
    assert f"launch/{script.name}" in text.partition("set -euo pipefail")[0]


def test_gke_manifest_has_a_process_for_every_host_of_its_slice():
    manifest = yaml.safe_load((ROOT / "launch/gke.yaml").read_text())
    (job,) = manifest["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    pod = spec["template"]["spec"]
    chips = pod["containers"][0]["resources"]["limits"]["google.com/tpu"]
    rows, columns = map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    assert spec["parallelism"] == spec["completions"] == rows * columns // chips
    assert pod["containers"][0]["command"][:2] == ["python", "main.py"]


def test_tpu_launcher_shows_its_commands():
    command = ["launch/tpu_vm.sh", "--dry_run", "run", "--config", "configs/digits.py", "--workdir", "/mnt/a b"]
    names = {"TPU": "slice", "ZONE": "us-west4-a"}
    result = subprocess.run(
        command, cwd=ROOT, env=make_environment(**names), capture_output=True, text=True, check=True
    )
    words = shlex.split(result.stdout)
    assert words[:7] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "slice", "--worker=all"]
    there = shlex.split(words[words.index("--command") + 1])
    assert there[-5:] == ["main.py", *command[3:]]


def test_tpu_launcher_makes_no_shared_folder_writable_for_all():
    names = {"TPU": "slice", "ZONE": "us-west4-a", "DISK": "10.0.0.2:/share"}
    command = ["launch/tpu_vm.sh", "--dry_run", "install"]
    result = subprocess.run(
        command, cwd=ROOT, env=make_environment(**names), capture_output=True, text=True, check=True
    )
    (mount,) = (line for line in result.stdout.splitlines() if "nfs-common" in line)
    there = shlex.split(mount)[-3]
    assert there.endswith("sudo chown $(id -u):$(id -g) /mnt/run && sudo chmod 750 /mnt/run")
