"""A data set that differs from the checkpoint's is reported with its differences before anything is computed."""

import dataclasses
import json
import shutil
import zlib

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from configs import digits
from densenet_jax.config import check_config
from densenet_jax.config.run_settings import read_run_settings
from densenet_jax.data.class_names import read_labels
from densenet_jax.data.identity import _sample_contents, check_identity, is_contradiction
from densenet_jax.data.records import Record
from densenet_jax.errors import UserError
from densenet_jax.experiment import Experiment
from densenet_jax.export.graph import make_graph
from densenet_jax.models.pretrained import read_class_names, save_torch_state_dict
from densenet_jax.predict.predictor import Predictor
from densenet_jax.run.train import _check_dataset, train
from densenet_jax.workdir import write_labels
from tests.untrained_run import make_run


def identity(*classes, name="folder", **splits):
    return {"name": name, "classes": list(classes), "splits": splits}


def split(*files):
    return {"examples": sum(count for count, _ in files), "files": [list(entry) for entry in files]}


SAVED = identity("cat", "dog", train=split((4, "a"), (6, "b")), validation=split((2, "c"), (2, "d")))


@pytest.mark.parametrize(
    ("current", "why", "may_go_on"),
    [
        (
            identity("dog", "zebra", train=split((6, "b"), (4, "a")), validation=split((2, "d"), (2, "c"))),
            r"\(classes renamed: 'cat' to 'zebra'\), so that class 'dog' would be number 0 and was 1",
            False,
        ),
        (SAVED | {"classes": ["dog", "cat"]}, "the same classes in another order", False),
        (SAVED | {"classes": ["cat", "wolf"]}, "classes renamed: 'dog' to 'wolf'", True),
        (SAVED | {"classes": ["cat", "dog", "fox"]}, "classes added: 'fox'.*head has 2 classes", False),
        (SAVED | {"classes": ["cat"]}, "classes removed: 'dog'.*head has 2 classes", False),
        (SAVED | {"classes": ["cat", "cow", "dog"]}, "classes (added|renamed).*number 2 and was 1", False),
        (
            identity("cat", "dog", train=split((4, "a"), (5, "x"))),
            "train has 9 images and had 10; train: 'dog' 5, had 6",
            True,
        ),
        (identity("cat", "dog", validation=split((2, "c"), (2, "x"))), "validation: 'dog' other files", True),
    ],
)  # fmt: skip
def test_differences_are_named(current, why, may_go_on):
    with pytest.raises(UserError, match=why):
        check_identity(SAVED, current, "step 3 of runs/a")
    if may_go_on:
        check_identity(SAVED, current, "step 3 of runs/a", allow_changed=True)
    else:
        with pytest.raises(UserError, match=why):
            check_identity(SAVED, current, "step 3 of runs/a", allow_changed=True)


@pytest.mark.parametrize(
    "current",
    [
        SAVED,
        identity("cat", "dog", test=split((1, "z"), (0, ""))),
        identity("cat", "dog", name="other", train=split((1, ""), (1, ""))),
    ],
)  # fmt: skip
def test_incomparable_identities_pass(current):
    check_identity(SAVED, current, "step 3 of runs/a")


def test_labels_of_an_older_run_are_compared_by_their_order():
    old = identity("Katze", "dog")
    check_identity(old, SAVED, "")
    with pytest.raises(UserError, match="'dog' would be number 0"):
        check_identity(old, SAVED | {"classes": ["dog", "zebra"]}, "")


@pytest.mark.parametrize(
    ("names", "wrong"), [(("a", "b"), False), (("A", "b"), False), (("b", "a"), True), (("a",), True), ((), True)]
)
def test_contradictions(names, wrong):
    assert is_contradiction(names, ("a", "b")) is wrong


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on two class folders of 12-bit images; one has a name that a plain line of labels.txt can't hold."""
    root = tmp_path_factory.mktemp("identity")
    for part, count in (("train", 9), ("val", 8)):
        for name in ("# one", "two"):
            (root / "data" / part / name).mkdir(parents=True)
            for index in range(count):
                drawn = np.random.default_rng(index if name == "two" else 100 + index)
                pixels = drawn.integers(0, 4096, (8, 8), np.uint16)
                more = {"dpi": (72, 72)} if name == "two" else {}  # so that the classes' files have different sizes
                Image.fromarray(pixels).save(root / "data" / part / name / f"{index}.png", **more)
    settings = {"data__name": "folder", "data__eval_split": "val", "data__mean": (0.5,), "data__std": (0.5,)}
    settings["data__pixel_range"] = (0, 4095)
    make_run(root / "run", root / "data", **settings)
    return root, settings


def experiment_on(directory, settings, **changes):
    config = digits.get_config()
    config.unlock()
    config.train.global_batch_size = 16
    settings = settings | {"data__dir": str(directory)} | changes
    config.update_from_flattened_dict({key.replace("__", "."): value for key, value in settings.items()})
    return Experiment(check_config(config))


def changed_copy(root, tmp_path, change):
    shutil.copytree(root / "data", tmp_path / "data")
    change(tmp_path / "data")
    return tmp_path / "data"


def rename(data):
    for part in ("train", "val"):
        (data / part / "# one").rename(data / part / "zebra")


def rename_in_place(data):
    for part in ("train", "val"):
        (data / part / "two").rename(data / part / "zwei")


def remove_file(data):
    (data / "train" / "two" / "3.png").unlink()


def test_the_same_data_go_on(run):
    root, settings = run
    identity, same_classes = _check_dataset(experiment_on(root / "data", settings), str(root / "run"))
    assert same_classes
    assert identity["splits"]["train"]["examples"] == 18
    experiment_on(root / "data", settings).saved_variables(str(root / "run"))


def swap_classes(data):
    for part in ("train", "val"):
        (data / part / "two").rename(data / part / "other")
        (data / part / "# one").rename(data / part / "two")
        (data / part / "other").rename(data / part / "# one")


def swap_contents(data):
    """Exchanges the pictures of two classes in place, which leaves the folders' times and names as they were."""
    for index in range(9):
        one, two = (data / "train" / folder / f"{index}.png" for folder in ("# one", "two"))
        first = one.read_bytes()
        one.write_bytes(two.read_bytes())
        two.write_bytes(first)


def rename_files(data):
    for index in range(7):
        (data / "train" / "two" / f"{index}.png").rename(data / "train" / "two" / f"ä{index}.png")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (rename, r"\(classes renamed: '# one' to 'zebra'\), so that class 'two' would be number 0 and was 1"),
        (remove_file, r"had 18; train: 'two' 8, had 9; train files removed: two/3.png\); restore it"),
        (swap_contents, r"train: other contents of 18 of 18 sampled files: train/# one/0.png, .* and 13 more\)"),
        (swap_classes, r"\(val files of another size: # one/0.png, .*; train files of another size: # one/0.png, "),
        (
            rename_files,
            r"'two' other files; train files removed: two/0.png, .*two/4.png and 2 more; "
            r"train files added: two/ä0.png, .* and 2 more\)",
        ),
    ],
)
def test_training_does_not_go_on_with_other_data(run, tmp_path, change, why):
    root, settings = run
    with pytest.raises(UserError, match=why):
        _check_dataset(experiment_on(changed_copy(root, tmp_path, change), settings), str(root / "run"))


@pytest.mark.parametrize(("size", "count"), [(10, 256), (1000, 64), (10**5, 16)])
def test_fewer_large_files_are_compared(monkeypatch, size, count):
    class Files:
        def __len__(self):
            return 1000

        def __getitem__(self, index):
            return Record(image=bytes([index % 256]) * size, label=0, name=str(index))

    monkeypatch.setattr("densenet_jax.data.identity._SAMPLE_BYTES", 64_000)
    sample = _sample_contents(Files())
    assert (len(sample), sample["999"]) == (count, zlib.crc32(bytes([999 % 256]) * size))


def test_damaged_metrics_are_reported_before_anything_is_compiled(run, tmp_path, monkeypatch):
    root, settings = run
    shutil.copytree(root / "run", tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").write_text("[]\n")
    monkeypatch.setattr("densenet_jax.run.train.Trainer", None)
    with pytest.raises(UserError, match=r"metrics\.jsonl line 1 is not a report"):
        train(experiment_on(root / "data", settings), str(tmp_path / "run"), {})


def test_evaluation_of_other_classes_is_refused(run, tmp_path):
    root, settings = run
    experiment = experiment_on(changed_copy(root, tmp_path, rename), settings)
    with pytest.raises(UserError, match=r"step 1 of .*another data set"):
        experiment.saved_variables(str(root / "run"))


def test_a_changed_data_set_goes_on_by_a_setting_and_labels_follow(run, tmp_path):
    root, settings = run
    experiment = experiment_on(changed_copy(root, tmp_path, rename_in_place), settings, data__allow_changed=True)
    identity, same_classes = _check_dataset(experiment, str(root / "run"))
    assert not same_classes
    write_labels(str(tmp_path), ("# one", "two"))
    write_labels(str(tmp_path), identity["classes"], keep_others=same_classes)
    assert read_labels(tmp_path / "labels.txt") == ("# one", "zwei")


def test_a_checkpoint_without_names_of_files_opens(run, tmp_path):
    root, settings = run
    for names in (None, 3, "", "AAAA", "no"):
        saved = experiment_on(root / "data", settings).data.identify(train=True)
        for part in saved["splits"].values():
            part["names"] = names
        experiment_on(root / "data", settings).data.check_same(saved, "step 1", train=True)
        shutil.rmtree(tmp_path / "data", ignore_errors=True)
        changed = experiment_on(changed_copy(root, tmp_path, remove_file), settings).data
        with pytest.raises(UserError, match=r"'two' 8, had 9\); restore"):
            changed.check_same(saved, "step 1", train=True)


def test_a_flipped_bit_is_no_other_data_set(run, tmp_path):
    root, settings = run
    shutil.copytree(root / "run", tmp_path / "run")
    position = tmp_path / "run" / "checkpoints" / "1" / "data" / "metadata"
    position.write_text(position.read_text().replace('"two"', '"twn"'))
    experiment = experiment_on(root / "data", settings)
    with pytest.raises(UserError, match=r"data/metadata .* is not what was written"):
        experiment.saved_variables(str(tmp_path / "run"))


def test_an_older_checkpoint_is_compared_by_its_labels(run, tmp_path):
    root, settings = run
    shutil.copytree(root / "run", tmp_path / "run")
    position = tmp_path / "run" / "checkpoints" / "1" / "data" / "metadata"
    content = json.loads(position.read_text())
    del content["dataset"]
    position.write_text(json.dumps(content))
    _check_dataset(experiment_on(root / "data", settings), str(tmp_path / "run"))
    stored = json.loads((tmp_path / "run" / "config.json").read_text())
    for key in ("class_order", "allow_changed", "exif_orientation"):
        del stored["data"][key]
    (tmp_path / "run" / "config.json").write_text(json.dumps(stored))
    assert read_run_settings(str(tmp_path / "run")).data.class_order == "text"
    with pytest.raises(UserError, match="'two' would be number 0"):
        _check_dataset(experiment_on(changed_copy(root, tmp_path, rename), settings), str(tmp_path / "run"))


def test_every_path_sees_the_same_16_bits(run, caplog):
    root, settings = run
    predictor = Predictor.from_workdir(root / "run", batch_sizes=(16,))
    assert predictor.class_names == ("# one", "two")
    transform = predictor.model.transform
    data = experiment_on(root / "data", settings).data
    with data.eval_batches() as batches:
        images = next(batches)["image"]
    assert images.dtype == np.uint16
    assert len(np.unique(images)) > 256
    files = sorted((root / "data" / "val").rglob("*.png"))
    np.testing.assert_array_equal(images, [predictor.preprocess(path) for path in files])
    as_array = np.asarray(Image.open(files[0]))
    np.testing.assert_array_equal(predictor.preprocess(as_array), images[0])
    assert not caplog.messages
    Predictor(
        dataclasses.replace(predictor.model, transform=dataclasses.replace(transform, pixel_range=()))
    ).preprocess(files[0])
    assert "of 65535, so that it is almost black" in caplog.text
    graph = make_graph(predictor.model)
    assert graph.input_dtype == np.uint16
    np.testing.assert_allclose(jax.jit(graph.function)(images), predictor.probabilities(images), atol=1e-5)


def test_labels_never_contradict_the_checkpoint(run, tmp_path, caplog):
    shutil.copytree(run[0] / "run", tmp_path / "run")
    (tmp_path / "run" / "labels.txt").write_text("two\nzebra\n")
    assert Predictor.from_workdir(tmp_path / "run").class_names == ("# one", "two")
    assert "contradicts the checkpoint" in caplog.text
    (tmp_path / "run" / "labels.txt").write_text("eins\nzwei\n")  # other words for the same classes
    assert Predictor.from_workdir(tmp_path / "run").class_names == ("eins", "zwei")
    (tmp_path / "run" / "labels.txt").unlink()
    assert Predictor.from_workdir(tmp_path / "run").class_names == ("# one", "two")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    arrays = {"classifier.weight": np.zeros((2, 3), np.float32)}

    def write(name, *classes):
        metadata = {"class_names": json.dumps(classes)} if classes else {}
        save_file(arrays, folder / name, metadata={"format": "pt"} | metadata)
        return str(folder / name)

    return {
        "same": write("same.safetensors", "# one", "two"),
        "turned": write("turned.safetensors", "two", "# one"),
        "others": write("others.safetensors", "ant", "bee"),
        "unnamed": write("unnamed.safetensors"),
    }


def test_classes_of_weights_are_compared(run, weights, caplog):
    root, settings = run
    data = experiment_on(root / "data", settings).data
    for which in ("same", "unnamed"):
        data.check_weights(weights[which])
    assert caplog.messages == []
    data.check_weights(weights["others"])
    assert "has the classes 'ant', 'bee', the data set '# one', 'two'" in caplog.text
    with pytest.raises(UserError, match=r"turned.safetensors has the classes 'two', '# one', but .*class_order"):
        data.check_weights(weights["turned"])
    experiment_on(root / "data", settings, data__allow_changed=True).data.check_weights(weights["turned"])


@pytest.mark.parametrize(("order", "warned"), [("text", True), ("natural", False)])
def test_doubtful_orders_are_reported_once(tmp_path, run, weights, caplog, order, warned):
    for name in ("2", "10"):
        (tmp_path / "val" / name).mkdir(parents=True)
        Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "val" / name / "0.png")
    data = experiment_on(tmp_path, run[1], data__class_order=order).data
    for _ in range(2):
        data.check_weights(weights["unnamed"])
    assert ("in text order ('10', '2'), timm's would be in natural order ('2', '10')" in caplog.text) == warned
    assert len(caplog.messages) == warned


def test_class_names_stay_with_the_weights(tmp_path):
    variables = {"params": {"classifier": {"kernel": np.zeros((3, 2)), "bias": np.zeros(2)}}, "batch_stats": {}}
    path = tmp_path / "weights.safetensors"
    save_torch_state_dict(variables, path, class_names=("# one", "日本"))
    assert read_class_names(path) == ("# one", "日本")
    with pytest.raises(UserError, match="class_names has 1 names, but the model has 2 classes"):
        save_torch_state_dict(variables, path, class_names=("one",))
    (tmp_path / "no.safetensors").write_bytes(b"no")
    assert read_class_names(tmp_path / "no.safetensors") == read_class_names("timm/densenet121") == ()
