"""Folders of images to files of answers: complete, in order, resumable, whatever is among the images."""

import dataclasses
import json
import os
import pathlib
import shutil
import signal
import threading

import numpy as np
import pytest
from PIL import Image

from densenet_jax.distributed.preemption import Preempted
from densenet_jax.errors import UserError
from densenet_jax.predict import batch as module
from densenet_jax.predict.annotate import annotation_path, draw_answers
from densenet_jax.predict.batch import PredictOptions, predict
from densenet_jax.predict.files import check_places, common_folder, find_images
from densenet_jax.predict.output import PredictionFile
from densenet_jax.predict.predictor import ClassProbability, Predictor
from tests.predict.files import BOMBS, encoded
from tests.tiny_model import tiny_model

SHADES = {"dark": 0, "gray": 128, "bright": 255}


def shade(name: str, size: int = 6) -> bytes:
    return encoded(Image.new("RGB", (size, size), (SHADES[name],) * 3))


@pytest.fixture
def photos(tmp_path, monkeypatch) -> pathlib.Path:
    """A folder with images at several depths, and other things."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "photos"
    for number in range(20):
        path = folder / ("" if number % 3 else f"sub{number}") / f"{number:02d}.PNG"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(shade(list(SHADES)[number % 3]))
    (folder / "notes.txt").write_text("no image")
    (folder / ".hidden.png").write_bytes(shade("dark"))
    (folder / ".cache").mkdir()
    (folder / ".cache" / "x.png").write_bytes(shade("dark"))
    (folder / "loop").symlink_to(folder)
    return folder


def run(*images, output="out.jsonl", model=tiny_model, **options):
    return predict(model, PredictOptions(tuple(map(str, images)), output, **options))


def lines_of(path="out.jsonl"):
    return [json.loads(line) for line in pathlib.Path(path).read_text().splitlines()]


def test_a_line_an_image_in_order(photos, capsys):
    figures = run("photos", topk=2)
    lines = lines_of()
    assert figures == {"images": 20, "refused": 0, "path": "out.jsonl"}
    assert [line["image"] for line in lines] == sorted(
        (str(path.relative_to(photos.parent)) for path in photos.rglob("*.PNG") if "loop" not in path.parts),
        key=lambda name: name.split("/"),
    )
    for line in lines:
        number = int(pathlib.Path(line["image"]).stem)
        assert [set(answer) for answer in line["predictions"]] == [{"class_id", "label", "probability"}] * 2
        assert line["predictions"][0]["label"] == list(SHADES)[number % 3]
        assert line["predictions"][0]["class_id"] == number % 3
        assert line["predictions"][0]["probability"] >= line["predictions"][1]["probability"]
    shown = capsys.readouterr()
    assert "photos/01.PNG  {1: 'gray'} " in shown.err
    assert shown.out == ""


def test_batches_and_threads_change_nothing(photos):
    run("photos", output="a.jsonl", largest_batch=8)
    run("photos", output="b.jsonl")
    assert lines_of("a.jsonl") == lines_of("b.jsonl")


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_a_table_is_continued_and_replaced(photos, suffix):
    whole, table = f"whole.{suffix}", f"out.{suffix}"
    assert run("photos", output=whole, topk=0) == {"images": 20, "refused": 0, "path": whole}
    with PredictionFile(f"{table}.partial", {}) as output:  # as a killed run leaves it
        output.write([{"image": "photos/01.PNG", "error": "kept"}])
    pathlib.Path(f"{table}.partial.request").unlink()
    assert run("photos", output=table, topk=0)["refused"] == 1
    assert sorted(path.name for path in pathlib.Path().glob("*.*")) == sorted([table, whole])
    assert run("photos", output=table, topk=0)["refused"] == 0
    assert pathlib.Path(table).read_bytes() == pathlib.Path(whole).read_bytes()


def test_one_bad_image_spoils_nothing(photos, capsys):
    hostile = {
        "zero.jpg": b"",
        "text.jpg": b"hello",
        "cut.png": shade("gray")[:45],
        **{f"bomb of {name}.png": data for name, data in BOMBS.items()},
        "new\nline \x1b[2J.png": b"?",
    }
    for name, data in hostile.items():
        (photos / name).write_bytes(data)
    os.mkfifo(photos / "pipe.png")
    (photos / "gone.png").symlink_to("nowhere")
    figures = run("photos", "absent.jpg", largest_batch=1)
    assert (figures["images"], figures["refused"]) == (20, len(hostile) + 3)
    errors = {line["image"]: line["error"] for line in lines_of() if "error" in line}
    assert errors["photos/zero.jpg"] == "it is empty"
    assert errors["photos/pipe.png"] == "it is a pipe, not an image file"
    assert "No such file" in errors["photos/gone.png"]
    assert "No such file" in errors["absent.jpg"]
    assert "photos/new\nline \x1b[2J.png" in errors
    shown = capsys.readouterr().err
    assert "\x1b[2J" not in shown
    assert r"photos/new\nline \x1b[2J.png  error: it is no JPEG" in shown


def test_nothing_to_predict(photos):
    (photos.parent / "empty").mkdir()
    for places, why in (
        ([], "needs --images"),
        (["nowhere.png"], "'nowhere.png' matches no file or folder"),
        (["no*.png", "zero\0byte"], "matches no file or folder"),
        (["empty"], "'empty' holds no images"),
    ):
        with pytest.raises(UserError, match=why):
            run(*places)
    assert not pathlib.Path("out.jsonl").exists()


def test_wrong_options(photos):
    with pytest.raises(UserError, match="--topk is -1; expected 1 or more"):
        run("photos", topk=-1)
    with pytest.raises(UserError, match="--features is 'deep'; expected pooled, pyramid or strides such as stride_2"):
        run("photos", features="deep")
    with pytest.raises(UserError, match="'stride_2,stride_4'; expected pooled, pyramid or some of tiny's stride_1, s"):
        run("photos", features="stride_2,stride_4")
    assert not pathlib.Path("out.jsonl").exists()
    with pytest.raises(UserError, match="photos can't be written"):
        run("photos", output="photos")


def test_files_folders_and_patterns(photos):
    def expand(*places):
        return [image.path for image in find_images(places)]

    assert expand("photos/0[12].PNG") == ["photos/01.PNG", "photos/02.PNG"]
    assert expand("photos/notes.txt") == ["photos/notes.txt"]  # whoever names a file means it
    assert expand("photos/02.PNG", "photos/01.PNG", "photos/02.PNG") == ["photos/02.PNG", "photos/01.PNG"]
    assert expand("photos/sub*") == [f"photos/sub{n}/{n:02d}.PNG" for n in (0, 12, 15, 18, 3, 6, 9)]
    everything = expand("photos/[!l]*/**", "photos/*.PNG")
    assert len(everything) == len(set(everything)) == 20
    shutil.copy("photos/01.PNG", "photos/[odd].PNG")
    assert expand("photos/[odd].PNG") == ["photos/[odd].PNG"]
    assert check_places(["photos/0*"]) == 6


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_without_rights(photos):
    (photos / "sub3").chmod(0)
    try:
        assert run("photos")["refused"] == 1
    finally:
        (photos / "sub3").chmod(0o755)


class Counting(Predictor):
    """Notes what is read."""

    read: list[str]

    def preprocess(self, image, name=""):
        self.read.append(str(image))
        return super().preprocess(image, name)


@pytest.fixture
def read(monkeypatch) -> list[str]:
    """Paths of the images that are read."""
    Counting.read = []
    monkeypatch.setattr(module, "Predictor", Counting)
    return Counting.read


def test_a_restart_reads_only_what_is_missing(photos, read):
    run("photos", features="pyramid")
    whole, features = pathlib.Path("out.jsonl").read_bytes(), dict(np.load("out.npz"))
    lines = whole.splitlines(keepends=True)
    read.clear()
    run("photos", features="pyramid")
    assert read == []
    for end in (lines[7], lines[7][:-1], lines[7][:9], b"\0" * 30, b""):
        pathlib.Path("out.jsonl").write_bytes(b"".join(lines[:7]) + end)
        note = json.loads(pathlib.Path("out.jsonl.request").read_text())
        pathlib.Path("out.jsonl.request").write_text(json.dumps({**note, "finished": False}))
        read.clear()
        figures = run("photos", features="pyramid")
        assert figures["images"] == 20
        assert len(read) == (12 if end == lines[7] else 13)
        assert pathlib.Path("out.jsonl").read_bytes() == whole
        for name, array in np.load("out.npz").items():
            np.testing.assert_array_equal(array, features[name])


def test_a_file_that_is_only_a_torn_line(photos):
    pathlib.Path("out.jsonl").write_bytes(b'{"image": "photos/0')
    assert run("photos")["images"] == 20
    assert len(lines_of()) == 20


@pytest.mark.parametrize("content", ["my notes\n", "my notes", "{}\n{}\n", '{"image": "a"}\nx\n{"image": "b"}\n'])
def test_somebody_s_file_is_left_alone(photos, content):
    pathlib.Path("out.jsonl").write_text(content)
    with pytest.raises(UserError, match="is not a file of predictions"):
        run("photos")
    assert pathlib.Path("out.jsonl").read_text() == content


def test_a_new_request_replaces_a_finished_one(photos):
    run("photos")
    run("photos/01.PNG", features="pooled")
    assert [line["image"] for line in lines_of()] == ["photos/01.PNG"]
    assert np.load("out.npz")["pooled"].shape == (1, 3)
    run("photos", model=lambda: tiny_model("other"))
    assert len(lines_of()) == 20


def test_a_new_request_spares_an_unfinished_one(photos, monkeypatch):
    monkeypatch.setattr(module._Run, "_write", interrupting(module._Run._write, after=1))
    with pytest.raises(Preempted, match="run the same command to continue"):
        run("photos", largest_batch=1)
    monkeypatch.undo()
    monkeypatch.chdir(photos.parent)
    kept = pathlib.Path("out.jsonl").read_bytes()
    assert 0 < len(kept.splitlines()) < 20
    with pytest.raises(UserError, match=r"unfinished predictions of another request \(topk differ\)"):
        run("photos", topk=1)
    assert pathlib.Path("out.jsonl").read_bytes() == kept
    run("photos")
    run("photos", output="whole.jsonl")
    assert lines_of() == lines_of("whole.jsonl")


def interrupting(write, after):
    """The same, but a signal arrives once some batches are written."""
    calls = []

    def wrapped(*arguments):
        write(*arguments)
        calls.append(1)
        if len(calls) == after:
            os.kill(os.getpid(), signal.SIGTERM)

    return wrapped


def test_images_that_came_later_are_added(photos):
    run("photos", features="pooled")
    (photos / "00.PNG").write_bytes(shade("bright"))
    figures = run("photos", features="pooled")
    archive = np.load("out.npz")
    assert figures["images"] == 21
    assert archive["image"][-1] == "photos/00.PNG"
    np.testing.assert_allclose(archive["pooled"][-1], 1)


def test_two_runs_do_not_write_one_file(photos, monkeypatch):
    refusals = []

    def second(*_):
        try:
            run("photos", "photos")
        except UserError as error:
            refusals.append(str(error))

    write = module._Run._write
    monkeypatch.setattr(module._Run, "_write", lambda *arguments: (second(), write(*arguments)))
    run("photos")
    assert "being written by another run" in refusals[0]


@pytest.mark.parametrize("kind", ["pooled", "pyramid"])
def test_features_belong_to_their_images(photos, kind):
    (photos / "05.PNG").write_bytes(b"damaged")
    figures = run("photos", features=kind, largest_batch=8)
    archive = np.load(figures["features"])  # no pickles in it
    names = [line["image"] for line in lines_of() if "predictions" in line]
    assert archive["image"].tolist() == names
    assert len(names) == 19
    predictor = Predictor(tiny_model())
    want = predictor.features(names, kind)
    want = {"pooled": want} if kind == "pooled" else {f"stride_{stride}": maps for stride, maps in want.items()}
    assert set(archive) == {"image", *want}
    for name, array in want.items():
        np.testing.assert_allclose(archive[name], array, rtol=1e-6)
    assert not os.path.exists("out.npz.partial")


def test_names_that_are_no_unicode(photos):
    shutil.copy(photos / "01.PNG", os.path.join(os.fsencode(photos), b"caf\xe9.png"))
    run("photos", features="pooled", annotate="drawn")
    names = [line["image"] for line in lines_of()]
    assert os.path.exists("photos/caf\udce9.png")
    assert "photos/caf\udce9.png" in names
    assert np.load("out.npz")["image"].tolist() == names


def test_annotated_images(photos):
    (photos / "07.PNG").write_bytes(b"damaged")
    (photos / ("x" * 250 + ".png")).write_bytes(shade("dark"))
    run("photos", annotate="drawn", topk=2)
    drawn = sorted(str(path.relative_to("drawn")) for path in pathlib.Path("drawn").rglob("*.jpg"))
    assert len(drawn) == 20
    assert {"01.PNG.jpg", "sub3/03.PNG.jpg"} < set(drawn)
    with Image.open("drawn/02.PNG.jpg") as image:
        assert image.size == (320, 320 + 2 * 24)
        assert image.getpixel((160, 100)) == (255, 255, 255)
        assert image.getpixel((318, 330))[0] < 230  # the bar of a class that is certain


def test_the_drawing_shows_the_probability():
    answers = [ClassProbability(0, "x", 0.5)]
    picture = np.asarray(draw_answers(np.zeros((2000, 20, 3), np.uint8), answers))
    assert picture.shape == (5120 + 24, 320, 3)
    bar = picture[-4, :, 0] < 250
    assert abs(bar.sum() - 160) <= 2


def test_annotated_images_stay_in_their_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    inside = os.path.abspath("drawn")
    for path in ("../../etc/passwd.jpg", "/etc/x.jpg", "a/../../../b.jpg", "..", "./c.jpg"):
        target = os.path.abspath(annotation_path("drawn", path, common_folder(["d"])))
        assert os.path.commonpath([target, inside]) == inside
    paths = ["a/cat.jpg", "b/cat.jpg", "b/cat.png", "b/cat.png.jpg"]
    assert len({annotation_path("drawn", path, common_folder(paths)) for path in paths[:3]}) == 3


def test_memory_does_not_grow_with_the_number_of_images(photos, monkeypatch):
    most, alive, lock = [0], set(), threading.Lock()
    preprocess = Predictor.preprocess

    def counted(self, image, name=""):
        with lock:
            alive.add(image)
            most[0] = max(most[0], len(alive))
        return preprocess(self, image, name)

    write = module._Run._write

    def written(self, pool, batch, computing):
        write(self, pool, batch, computing)
        with lock:
            alive.difference_update(item.path for item in batch)

    for number in range(300):
        shutil.copy(photos / "01.PNG", photos / f"copy{number}.png")
    monkeypatch.setattr(Predictor, "preprocess", counted)
    monkeypatch.setattr(module._Run, "_write", written)
    run("photos", largest_batch=8)
    assert len(lines_of()) == 320
    assert most[0] <= 8 * (module._READ_AHEAD + 3)


def test_many_labels_have_a_probability_each_and_all_are_listed(photos, capsys):
    def model():
        return dataclasses.replace(tiny_model(), many_labels=True)

    run("photos/01.PNG", model=model, topk=1)
    [line] = lines_of()
    logits = 10 * np.array([-1, 0.1, 1]) * (128 / 255 - 0.5) / 0.5
    logits[1] = 1.0
    expected = dict(zip(("dark", "gray", "bright"), 1 / (1 + np.exp(-logits)), strict=True))
    assert {each["label"]: each["probability"] for each in line["predictions"]} == pytest.approx(expected, rel=1e-3)
    probabilities = [each["probability"] for each in line["predictions"]]
    assert probabilities == sorted(probabilities, reverse=True)
    assert sum(probabilities) > 1.2
    assert "'gray'} 0.73, " in capsys.readouterr().err
    run("photos/01.PNG", model=model, output="table.csv", topk=1)
    header, row = pathlib.Path("table.csv").read_text().splitlines()
    assert header == "image,label,probability,dark,gray,bright,error"
    assert [float(cell) for cell in row.split(",")[3:6]] == pytest.approx(list(expected.values()), rel=1e-3)
