"""The command line as a user meets it: real processes, real signals, real data."""

import fcntl
import json
import os
import pathlib
import re
import signal

import jax
import jax.numpy as jnp
import pytest

import densenet_jax
from tests.main_in_process import run_here
from tests.main_processes import parse_last_line, run_main, start_main
from tests.workdir_contents import assert_same_end, read_reports

QUICK = (
    "--config=configs/digits.py",
    "--config.model.block_sizes=(1,1)",
    "--config.model.growth_rate=24",
    "--config.train.epochs=2",
    "--config.optim.warmup_epochs=0.2",
    "--config.eval.every_epochs=1",
    "--config.checkpoint.every_steps=12",
    "--config.train.log_every_steps=5",
)
TOTAL_STEPS = 45


def read_files(workdir: pathlib.Path) -> dict[str, tuple[int, int, bytes]]:
    """Every file with its time, inode and content."""
    contents = {}
    for path in sorted(workdir.rglob("*")):
        if path.is_file():
            status = path.stat()
            contents[str(path)] = status.st_mtime_ns, status.st_ino, path.read_bytes()
    return contents


@pytest.fixture(scope="module")
def finished(user, tmp_path_factory) -> pathlib.Path:
    """A run that nothing interrupted."""
    workdir = tmp_path_factory.mktemp("runs") / "finished"
    output, errors = run_main(*QUICK, f"--workdir={workdir}", **user)
    result = parse_last_line(output)
    assert list(result) == ["mode", "step", "examples", "loss", "top1", "top5"]
    assert (result["mode"], result["step"], result["examples"]) == ("train", TOTAL_STEPS, 360)
    assert result["top1"] > 0.5
    assert len(output.splitlines()) == 1
    assert re.search(r"^compiling: \d+\.\d s$", errors, re.MULTILINE)
    assert "images/s" in errors
    assert "left 0:" in errors
    assert "Traceback" not in errors
    return workdir


def test_work_directory_holds_what_is_promised(finished):
    assert json.loads((finished / "config.json").read_text())["model"]["name"] == "densenet_bc_22_12"
    train, validation = read_reports(finished, "train"), read_reports(finished, "validation")
    assert [report["step"] for report in train] == list(range(5, TOTAL_STEPS + 1, 5))
    assert [report["step"] for report in validation] == [23, 45]
    first, second = (json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()[:2])
    expected = {
        "step",
        "epoch",
        "split",
        "loss",
        "top1",
        "top5",
        "learning_rate",
        "images_per_sec",
        "data_wait_fraction",
        "host_memory_bytes",  # memory_bytes besides where the device tells it; the CPU does not
    }
    assert set(first) == expected | {"compile_secs"}
    assert first["compile_secs"] > 0
    assert set(second) == expected
    assert list(finished.glob("events.out.tfevents.*"))


def test_event_file_holds_the_same_scalars(finished):
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    actual = {}
    for path in finished.glob("events.out.tfevents.*"):
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                if value.tensor.float_val:
                    actual[event.step, value.tag] = value.tensor.float_val[0]
    for split in ("train", "validation"):
        for report in read_reports(finished, split):
            assert actual[report["step"], f"{split}/loss"] == pytest.approx(report["loss"], rel=1e-6)


def test_newest_and_best_checkpoints_are_kept(finished):
    steps = sorted(int(path.name) for path in (finished / "checkpoints").iterdir() if path.name.isdigit())
    assert steps == [12, 23, 24, 36, 45]


def test_eval_counts_every_example_whatever_the_batch_size_and_changes_nothing(finished, user):
    before = read_files(finished)
    results = []
    for run, batch_size in ((run_here, 64), (run_main, 7)):  # over eight devices, and on one
        changes = (f"--config.eval.batch_size={batch_size}", "--mode=eval", f"--workdir={finished}")
        results.append(parse_last_line(run(*QUICK, *changes, **user)[0]))
    assert read_files(finished) == before
    for result in results:
        assert (result["mode"], result["step"], result["examples"]) == ("eval", TOTAL_STEPS, 360)
    assert results[0]["top1"] == results[1]["top1"]
    assert results[0]["loss"] == pytest.approx(results[1]["loss"], rel=1e-5)
    assert results[0]["top1"] == read_reports(finished, "validation")[-1]["top1"]


def test_best_checkpoint_can_be_evaluated(finished, user):
    best = max(read_reports(finished, "validation"), key=lambda report: (report["top1"], report["step"]))
    arguments = ("--mode=eval", "--config.eval.checkpoint=best", f"--workdir={finished}")
    result = parse_last_line(run_here(*QUICK, *arguments, **user)[0])
    assert (result["step"], result["top1"]) == (best["step"], best["top1"])


def test_same_command_on_a_finished_run_trains_nothing(finished, no_report, user):
    steps = sorted(os.listdir(finished / "checkpoints"))
    output, errors = run_here(*QUICK, f"--workdir={finished}", **user)
    assert "nothing left to train" in errors
    assert parse_last_line(output)["step"] == TOTAL_STEPS
    assert sorted(os.listdir(finished / "checkpoints")) == steps


def stop_by(number: signal.Signals, workdir: pathlib.Path, user: dict[str, str]) -> int:
    """Starts a run, asks it to stop as soon as it trains, and returns the step that it saved."""
    process = start_main(*QUICK, f"--workdir={workdir}", **user)
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("training"):
            process.send_signal(number)
            break
    output, errors = process.communicate(timeout=500)
    assert process.returncode == 130, errors
    assert output == ""
    step = int(errors.split("stopped and saved after step ")[1].split(";")[0])
    assert (workdir / "checkpoints" / str(step)).is_dir()
    return step


@pytest.mark.slow
def test_asked_to_stop_it_saves_first_and_can_be_continued(finished, user, tmp_path):
    first = stop_by(signal.SIGTERM, tmp_path, user)
    second = stop_by(signal.SIGINT, tmp_path, user)
    assert first < second < TOTAL_STEPS
    _, errors = run_main(*QUICK, f"--workdir={tmp_path}", **user)
    assert f"continuing after step {second}" in errors
    assert_same_end(tmp_path, finished, TOTAL_STEPS)


def test_weights_come_back_in_python(finished):
    variables = densenet_jax.load_checkpoint(str(finished))
    assert set(variables) == {"params", "batch_stats"}
    module = densenet_jax.create_model("densenet_bc_22_12", num_classes=10, block_sizes=(1, 1), growth_rate=24)
    logits = jax.jit(module.apply)(variables, jnp.zeros((2, 8, 8, 1)))
    assert logits.shape == (2, 10)


def test_second_run_in_a_work_directory_is_refused(user, tmp_path):
    with open(tmp_path / ".lock", "w", encoding="utf-8") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        _, errors = run_here(*QUICK, f"--workdir={tmp_path}", expect=2, **user)
    assert "is in use by another run" in errors
    assert os.listdir(tmp_path) == [".lock"]


def test_settings_of_another_run_are_refused(finished, user):
    before = read_files(finished)
    _, errors = run_here(*QUICK, "--config.optim.learning_rate=0.5", f"--workdir={finished}", expect=2, **user)
    assert "config.optim.learning_rate: 0.1 -> 0.5" in errors
    assert {name: content[2] for name, content in read_files(finished).items()} == {
        name: content[2] for name, content in before.items()
    }


def test_checkpoint_of_another_model_is_refused(finished, user):
    arguments = ("--mode=eval", "--config.model.name=densenet_bc_40_12", "--config.model.block_sizes=(3,3)")
    _, errors = run_here(*QUICK, *arguments, f"--workdir={finished}", expect=2, **user)
    assert "is of another model than densenet_bc_40_12" in errors


@pytest.mark.slow
def test_loss_that_is_not_finite_stops_with_the_step_and_keeps_the_last_good_checkpoint(user, tmp_path):
    hot = ("--config.optim.learning_rate=1e30", "--config.optim.warmup_epochs=0", "--config.optim.schedule=constant")
    _, errors = run_main(*QUICK, *hot, f"--workdir={tmp_path}", expect=2, **user)
    last = errors.splitlines()[-1]
    assert last.startswith("error: the ")
    assert " at step " in last
    assert [name for name in os.listdir(tmp_path / "checkpoints") if name.isdigit()] == []


def test_parameter_table_counts_what_the_variants_table_says(user):
    output, errors = run_here("--mode=parameters", "--config=configs/digits.py", **user)
    result = parse_last_line(output)
    assert (result["model"], result["parameters"], result["image_size_px"]) == ("densenet_bc_22_12", 71254, 8)
    assert 1e6 < result["multiply_adds"] < 1e7
    assert "denseblock1/denselayer1/conv1/kernel" in errors


@pytest.mark.slow
def test_data_page_shows_the_images_and_the_speed(user, tmp_path):
    output, _ = run_main("--mode=data", "--config=configs/digits.py", f"--workdir={tmp_path}", **user)
    result = parse_last_line(output)
    page = (tmp_path / "report" / "data.html").read_text()
    assert result["path"].endswith("report/data.html")
    assert result["pipeline_images_per_sec"] > 0 < result["model_images_per_sec"]
    assert "1,437" in page
    assert page.count("<img") >= 33
