"""Evaluation as a user asks for it: ImageNet's variants, ten crops, tables by class."""

import csv

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import default
from densenet_jax.augment.basic import normalize
from densenet_jax.config import check_config
from densenet_jax.data.sources import open_source
from densenet_jax.data.transforms import eval_transform
from densenet_jax.errors import UserError
from densenet_jax.experiment import Experiment
from densenet_jax.experiment.augmentation import augment_of
from densenet_jax.models.create import create_model
from densenet_jax.models.pretrained import save_torch_state_dict
from densenet_jax.report.per_class import ClassTables
from densenet_jax.run.evaluate import evaluate, figures_by_class, figures_of
from densenet_jax.training.eval_step import EvalSums
from densenet_jax.training.metrics import ClassificationSums
from tests.data import fake_imagenet
from tests.main_in_process import run_here
from tests.main_processes import parse_last_line

MODEL, BLOCK_SIZES = "densenet_bc_22_12", (1, 1)
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616)  # those of the model's row
LABELS = [1, 2, 0, 2, 3, 4, 1, 8, 2]


@pytest.fixture(scope="module")
def variables():
    """A small model with ImageNet's thousand classes, whose logits differ between images as much as between classes."""
    module = create_model(MODEL, num_classes=1000, block_sizes=BLOCK_SIZES)
    started = jax.jit(module.init)(jax.random.key(1), jnp.zeros((1, 32, 32, 3)))
    kernel = started["params"]["classifier"]["kernel"]
    started["params"]["classifier"]["kernel"] = jax.random.normal(jax.random.key(2), kernel.shape)
    return started


@pytest.fixture(scope="module")
def logits_of(variables):
    """Logits of uint8 images."""
    module = create_model(MODEL, num_classes=1000, block_sizes=BLOCK_SIZES)
    apply = jax.jit(lambda images: module.apply(variables, normalize(images, MEAN, STD), train=False))
    return lambda images: np.asarray(apply(np.stack(images)))


@pytest.fixture(scope="module")
def arguments(variables, tmp_path_factory):
    """What makes a recipe small: the weights' file and 32 px."""
    path = tmp_path_factory.mktemp("weights") / "small.safetensors"
    save_torch_state_dict(variables, path)
    return (
        "--mode=eval",
        f"--config.model.pretrained={path}",
        f"--config.model.name={MODEL}",
        f"--config.model.block_sizes={BLOCK_SIZES}",
        "--config.data.image_size_px=32",
        "--config.eval.batch_size=8",
        "--config.eval.crop_fraction=0.8",
        "--config.eval.interpolation=bicubic",
    )


def images_of(name, directory, split, **crops):
    transform = eval_transform(image_size_px=32, resize_px=40, interpolation="bicubic", **crops)
    source = open_source(name, directory, split)
    return [transform(source[index].image, np.zeros(0)) for index in range(len(source))]


def test_real_labels_count_any_right_class_and_leave_out_images_without_one(arguments, logits_of, user, tmp_path):
    directory = str(tmp_path / "data")
    plain = [(1, 3), (), (0,), (2, 5), (), (4,), (1,), (8,), (2,)]
    fake_imagenet.write_variant(directory, "imagenet2012_real", "validation", LABELS, label_sets=plain)
    logits = logits_of(images_of("imagenet2012_real", directory, "validation"))
    order = np.argsort(-logits, axis=1)
    # Sets that the model meets at the first place, at the third, and not at all.
    sets = [
        (9, int(row[place])) if labels else () for row, labels, place in zip(order, plain, [0, 2, 500] * 3, strict=True)
    ]
    directory = str(tmp_path / "again")
    fake_imagenet.write_variant(directory, "imagenet2012_real", "validation", LABELS, label_sets=sets)
    output, errors = run_here("--config=configs/imagenet_real.py", f"--config.data.dir={directory}", *arguments, **user)
    result = parse_last_line(output)
    counted = [index for index, labels in enumerate(sets) if labels]
    assert result["examples"] == len(counted) == 7
    assert "2 images without a right class are left out" in errors
    for name, best in (("top1", 1), ("top5", 5)):
        right = [set(order[index, :best].tolist()) & set(sets[index]) != set() for index in counted]
        assert result[name] == pytest.approx(np.mean(right))
        assert 0 < np.mean(right) < 1
    shares = np.asarray(jax.nn.softmax(logits))
    losses = [-np.log(sum(shares[index, label] for label in set(sets[index]))) for index in counted]
    assert result["loss"] == pytest.approx(np.mean(losses), rel=1e-3)


def test_imagenet_a_is_judged_among_its_classes_and_written_by_class(arguments, logits_of, user, tmp_path):
    directory = str(tmp_path / "data")
    fake_imagenet.write_variant(directory, "imagenet_a", "test", LABELS)
    tables = (
        f"--config.eval.per_class_output={tmp_path / 'new' / 'classes.csv'}",
        f"--config.eval.confusion_output={tmp_path / 'confusion.csv'}",
    )
    config = ("--config=configs/imagenet_a.py", f"--config.data.dir={directory}")
    output, errors = run_here(*config, *arguments, *tables, **user)
    result = parse_last_line(output)
    assert "judged among the 6 classes" in errors
    allowed = np.unique(LABELS)
    logits = logits_of(images_of("imagenet_a", directory, "test"))
    predicted = allowed[logits[:, allowed].argmax(axis=1)]
    right = np.equal(predicted, LABELS)
    assert (result["examples"], result["top1"]) == (9, pytest.approx(right.mean()))
    assert result["top1"] != np.equal(logits.argmax(axis=1), LABELS).mean()
    classes = list(csv.DictReader((tmp_path / "new" / "classes.csv").read_text().splitlines()))
    assert [int(row["class_id"]) for row in classes] == allowed.tolist()
    assert [row["class"] for row in classes] == [f"n{label:08d}" for label in allowed]
    assert [int(row["examples"]) for row in classes] == [LABELS.count(label) for label in allowed]
    assert [int(row["correct"]) for row in classes] == [
        int((right & np.equal(LABELS, label)).sum()) for label in allowed
    ]
    confusion = list(csv.reader((tmp_path / "confusion.csv").read_text().splitlines()))
    assert confusion[0][1:] == [row[0] for row in confusion[1:]] == [f"n{label:08d}" for label in allowed]
    counts = np.array([row[1:] for row in confusion[1:]], int)
    expected = np.zeros((6, 6), int)
    np.add.at(expected, (np.searchsorted(allowed, LABELS), np.searchsorted(allowed, predicted)), 1)
    np.testing.assert_array_equal(counts, expected)


def settings(**changes):
    config = default.get_config()
    small = {
        "model.name": MODEL,
        "model.block_sizes": BLOCK_SIZES,
        "data.image_size_px": 32,
        "train.global_batch_size": 8,
        "eval.crop_fraction": 0.8,
    }
    config.update_from_flattened_dict(small | changes)
    return check_config(config)


def test_ten_crops_through_the_settings(variables, logits_of, tmp_path):
    fake_imagenet.write_variant(str(tmp_path), "imagenet_v2/matched-frequency", "test", LABELS)
    source = {"data.name": "imagenet_v2/matched-frequency", "data.dir": str(tmp_path), "data.eval_split": "test"}
    experiment = Experiment(settings(**source, **{"eval.crops": 10, "eval.interpolation": "bicubic"}))
    data = experiment.data
    with data.eval_batches() as batches:
        step = experiment.compile_eval_step()
        counts = evaluate(
            step, jax.device_put(variables), batches, experiment.mesh, examples=9, batch_count=data.eval_batch_count
        )
    crops = np.stack(images_of(source["data.name"], str(tmp_path), "test", crops=5))
    both = np.concatenate([crops, crops[:, :, :, ::-1]], axis=1)
    mean = np.mean([logits_of(both[:, crop]) for crop in range(10)], axis=0)
    losses = -np.asarray(jax.nn.log_softmax(mean))[np.arange(9), LABELS]
    assert figures_of(counts)["loss"] == pytest.approx(losses.mean(), rel=1e-3)
    single = logits_of(crops[:, 4])
    assert abs(losses.mean() + np.asarray(jax.nn.log_softmax(single))[np.arange(9), LABELS].mean()) > 1e-2


def test_several_right_classes_have_neither_tables_nor_a_class_map(tmp_path):
    fake_imagenet.write_variant(str(tmp_path), "imagenet2012_real", "validation", [1, 2], label_sets=[(1,), (2, 3)])
    source = {"data.name": "imagenet2012_real", "data.dir": str(tmp_path)}
    with pytest.raises(UserError, match=r"config.eval.per_class_output.* imagenet2012_real has several"):
        Experiment(settings(**source)).compile_eval_step(confusion=True)
    with pytest.raises(UserError, match=r"config.eval.class_map is 'present', but imagenet2012_real has several"):
        Experiment(settings(**source, **{"eval.class_map": "present"})).compile_eval_step()


def test_an_unwritable_table_is_reported_before_the_work(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "classes.csv", tmp_path):
        with pytest.raises(UserError, match="can't be written"):
            ClassTables(per_class=str(path)).check()


def test_class_without_examples_has_no_accuracy(tmp_path):
    path = tmp_path / "classes.csv"
    ClassTables(per_class=str(path)).write(np.array([[2, 1], [0, 0]]), ("a", "b"))
    assert path.read_text().splitlines()[1:] == ["0,a,3,2,0.666667,1.0,0.666667,0.8", "1,b,0,0,,0.0,,0.0"]


def test_figures_by_class_weigh_every_class_alike():
    counts = EvalSums(ClassificationSums.zeros(), np.asarray(6, np.int32), confusion=np.array([[4, 0], [1, 1]]))
    figures = figures_by_class(counts)
    assert figures == {"balanced_accuracy": 0.75, "f1": pytest.approx((8 / 9 + 2 / 3) / 2)}


def test_mixing_does_not_pair_the_copies_of_an_image():
    config = settings(**{"augment.repeats": 2, "augment.mixup_alpha": 1.0, "augment.flip": False})
    augment = jax.jit(augment_of(config, MEAN, STD, 4, jnp.float32))
    labels = jnp.asarray([0, 0, 1, 1, 2, 2, 3, 3])
    _, targets = augment(jnp.zeros((8, 4, 4, 3), jnp.uint8), labels, jnp.asarray(0))
    used = [set(np.flatnonzero(row).tolist()) for row in np.asarray(targets)]
    assert used == [{0, 1}] * 4 + [{2, 3}] * 4


def test_repeats_that_do_not_divide_the_batch_are_refused_before_anything_is_written(user, tmp_path):
    arguments = ("--config=configs/digits.py", f"--workdir={tmp_path / 'run'}", "--config.augment.repeats=3")
    _, errors = run_here(*arguments, expect=2, **user)
    assert "config.augment.repeats is 3, which does not divide config.train.global_batch_size 64" in errors
    assert not (tmp_path / "run" / "config.json").exists()
