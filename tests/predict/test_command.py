"""`--mode predict` as a user meets it."""

import csv
import json
import pathlib
import shutil
import signal
import threading
import time

import numpy as np
import pytest
from PIL import Image

from densenet_jax.data.sources import open_source
from densenet_jax.errors import UserError
from densenet_jax.flags import Command
from densenet_jax.predict.predictor import Predictor
from tests.main_in_process import run_here
from tests.main_processes import parse_last_line, run_main, start_main
from tests.predict.files import encoded, gradient


def lines_of(path):
    return [json.loads(line) for line in pathlib.Path(path).read_text().splitlines()]


@pytest.fixture(scope="module")
def pictures(digits, tmp_path_factory):
    """Some of the evaluated digits as files, one of them damaged."""
    folder = tmp_path_factory.mktemp("pictures")
    for index in range(12):
        (folder / f"{index:02d}.png").write_bytes(digits[1].data.eval_source[index].image)
    (folder / "12.png").write_bytes(b"\x89PNG damaged")
    return folder


def test_predictions_and_exit_status(digits, pictures, user, tmp_path):
    workdir = digits[0]
    output, errors = run_here(
        *("--mode", "predict", "--workdir", str(workdir), "--images", str(pictures), "--topk", "3"), expect=3, **user
    )
    lines = lines_of(workdir / "predictions.jsonl")
    assert parse_last_line(output) == {
        "mode": "predict", "images": 12, "refused": 1, "path": str(workdir / "predictions.jsonl"),
    }  # fmt: skip
    assert [set(line) for line in lines] == [{"image", "predictions"}] * 12 + [{"image", "error"}]
    predictor = Predictor.from_workdir(workdir, batch_sizes=(8,))
    for line, answers in zip(lines, predictor([line["image"] for line in lines[:12]], topk=3), strict=False):
        for written, answer in zip(line["predictions"], answers, strict=True):
            assert (written["class_id"], written["label"]) == (answer.class_id, answer.label)
            assert written["probability"] == pytest.approx(answer.probability, rel=1e-4)
    best = lines[0]["predictions"][0]
    assert f"00.png  {{{best['class_id']}: '{best['label']}'}} {best['probability']:.2f}" in errors
    # Words that the shell made of *.png are images, too, and flags may follow them.
    words = ["--images", *(str(pictures / f"{number:02d}.png") for number in (3, 1)), "--output", str(tmp_path / "o")]
    labels = tmp_path / "labels.txt"
    labels.write_text("".join(f"digit {number}\n" for number in range(10)))
    output, _ = run_here("--mode=predict", f"--workdir={workdir}", *words, f"--labels={labels}", **user)
    assert parse_last_line(output)["images"] == 2
    named = lines_of(tmp_path / "o")
    assert named[1]["predictions"][0]["label"] == f"digit {named[1]['predictions'][0]['class_id']}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--mode=predict",), "error: --mode predict needs --images"),
        pytest.param(("x.png",), "error: x.png is not a flag", marks=pytest.mark.slow),
    ],
)
def test_mistakes(digits, arguments, message, user):
    output, errors = run_here(*arguments, f"--workdir={digits[0]}", expect=2, **user)
    assert errors.splitlines()[-1].startswith(message)
    assert output == ""


def test_flags_of_other_modes_are_refused():
    Command(mode="predict", images=("x.png",), topk=3).check_mode()
    Command(mode="eval").check_mode()
    for command, message in (
        (
            Command(mode="eval", images=("x.png",)),
            "--images x.png is for --mode predict or export, but --mode is eval; leave it out",
        ),
        (Command(mode="eval", topk=3), "--topk 3 is for"),
        (Command(mode="eval", compare=("runs/a",)), "--compare runs/a is for --mode report, but"),
    ):
        with pytest.raises(UserError, match=message):
            command.check_mode()


@pytest.mark.slow
def test_predict_answers_what_evaluation_counts(user, no_report, tmp_path):
    """A trained run: as many images are right as --mode eval counts."""
    recipe = ("--config.train.epochs=2", "--config.optim.warmup_epochs=0.2", "--config.model.block_sizes=(1,1)")
    run_here(f"--workdir={tmp_path / 'run'}", *recipe, **user)
    table = tmp_path / "classes.csv"
    output, _ = run_here(
        "--mode=eval", f"--workdir={tmp_path / 'run'}", *recipe, f"--config.eval.per_class_output={table}", **user
    )
    counted = parse_last_line(output)
    source = open_source("digits", user["TFDS_DATA_DIR"], "test")
    for index in range(len(source)):
        folder = tmp_path / "digits" / str(source[index].label)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{index:03d}.png").write_bytes(source[index].image)
    run_here("--mode=predict", f"--workdir={tmp_path / 'run'}", "--images", str(tmp_path / "digits"), **user)
    right = [0] * 10
    lines = lines_of(tmp_path / "run" / "predictions.jsonl")
    for line in lines:
        true = int(pathlib.Path(line["image"]).parent.name)
        right[true] += line["predictions"][0]["class_id"] == true
    assert sum(right) / len(lines) == counted["top1"]
    assert [int(row["correct"]) for row in csv.DictReader(table.read_text().splitlines())] == right
    losses = [
        -np.log(answer["probability"])
        for line in lines
        for answer in line["predictions"]
        if answer["class_id"] == int(pathlib.Path(line["image"]).parent.name)
    ]
    if counted["top5"] == 1:
        assert np.mean(losses) == pytest.approx(counted["loss"], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_kill_and_go_on(digits, user, tmp_path, number):
    many = tmp_path / "many"
    many.mkdir()
    data = encoded(gradient(300, 200), "PNG")
    for index in range(400):
        (many / f"{index:04d}.png").write_bytes(data if index % 7 else data[: 500 + index])
    command = ("--mode=predict", f"--workdir={digits[0]}", f"--images={many}", "--features=pooled")
    output = tmp_path / "out.jsonl"
    with start_main(*command, f"--output={output}", **user) as process:
        while not (output.exists() and len(output.read_bytes().splitlines()) > 80):
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.01)
        process.send_signal(number)
        process.communicate(timeout=100)
    assert process.returncode == (-number if number == signal.SIGKILL else 130)
    kept = output.read_bytes()
    assert 80 < len(kept.splitlines()) < 400
    if number == signal.SIGKILL:
        output.write_bytes(kept[:-5])  # a file system may lose the end as well
    _, errors = run_main(*command, f"--output={output}", expect=3, **user)
    assert "already has" in errors
    run_main(*command, f"--output={tmp_path / 'whole.jsonl'}", expect=3, **user)
    lines, whole = lines_of(output), lines_of(tmp_path / "whole.jsonl")
    assert [line["image"] for line in lines] == [f"{many}/{index:04d}.png" for index in range(400)]
    for line, want in zip(lines, whole, strict=True):
        assert line.keys() == want.keys()
        assert line.get("error") == want.get("error")
    resumed, at_once = np.load(tmp_path / "out.npz"), np.load(tmp_path / "whole.npz")
    assert resumed["image"].tolist() == at_once["image"].tolist()
    np.testing.assert_allclose(resumed["pooled"], at_once["pooled"], rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_ten_times_the_images_take_no_more_memory(digits, user, tmp_path):
    """The peak of the whole process, as the system counts it."""
    (tmp_path / "few").mkdir()
    for index in range(200):
        Image.fromarray(np.random.default_rng(index).integers(0, 256, (400, 400, 3), np.uint8)).save(
            tmp_path / "few" / f"{index}.jpg"
        )
    for copy in range(10):
        shutil.copytree(tmp_path / "few", tmp_path / "many" / str(copy))
    peaks = []
    for name in ("few", "many"):
        arguments = ("--mode=predict", f"--workdir={digits[0]}", f"--images={tmp_path / name}")
        with start_main(*arguments, f"--output={tmp_path / name}.jsonl", **user) as process:
            peak = 0
            reader = threading.Thread(target=process.communicate)  # a full pipe would stop the process
            reader.start()
            while reader.is_alive():
                peak = max(peak, _peak_bytes(process.pid))
                time.sleep(0.02)
        assert process.returncode == 0
        peaks.append(peak)
    assert len(lines_of(tmp_path / "many.jsonl")) == 2000
    assert peaks[1] < peaks[0] + 40 * 2**20, peaks  # decoded, the images would be 960 MB more


def _peak_bytes(process_id: int) -> int:
    try:
        status = pathlib.Path(f"/proc/{process_id}/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM")), 0)
