"""Class folders are listed once, and again when something changed."""

import os

import numpy as np
import pytest

from densenet_jax.data import folder
from densenet_jax.data.decode import DamagedImage
from densenet_jax.data.sources import open_source
from densenet_jax.errors import UserError
from tests.data import fake_imagenet


@pytest.fixture
def tree(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = tmp_path / "imagenet"
    for split, classes, count in (("train", ("zebra", "ant", "bee"), 4), ("val", ("ant", "zebra"), 2)):
        for label in classes:
            (root / split / label).mkdir(parents=True)
            for index in range(count):
                (root / split / label / f"{label}_{index}.JPEG").write_bytes(f"{split} {label} {index}".encode())
    return root


def names(source):
    return [source[index].name for index in range(len(source))]


def test_images_and_labels_in_a_fixed_order(tree):
    source = open_source("folder", str(tree), "train")
    assert source.class_names == ("ant", "bee", "zebra")
    assert source.num_classes == 3
    assert names(source) == [
        f"train/{label}/{label}_{index}.JPEG" for label in source.class_names for index in range(4)
    ]
    assert [source[index].label for index in range(12)] == [0] * 4 + [1] * 4 + [2] * 4
    np.testing.assert_array_equal(source.labels(), [0] * 4 + [1] * 4 + [2] * 4)
    assert source[5].image == b"train bee 1"


@pytest.mark.parametrize("split", ["val", "validation"])
def test_labels_mean_the_same_in_every_split(tree, split):
    source = open_source("folder", str(tree), split)
    assert source.class_names == ("ant", "bee", "zebra")
    assert [(source[index].label, source[index].image) for index in range(4)] == [
        (0, b"val ant 0"), (0, b"val ant 1"), (2, b"val zebra 0"), (2, b"val zebra 1"),
    ]  # fmt: skip


def test_the_index_is_used_until_something_changes(tree, monkeypatch):
    first = names(open_source("folder", str(tree), "train"))
    with monkeypatch.context() as patched:
        patched.setattr(folder, "_list", lambda *_: pytest.fail("was listed again"))
        assert names(open_source("folder", str(tree), "train")) == first
    (tree / "train" / "bee" / "new.png").write_bytes(b"")
    assert len(open_source("folder", str(tree), "train")) == 13
    (tree / "train" / "bee" / "new.png").unlink()
    assert len(open_source("folder", str(tree), "train")) == 12
    (tree / "train" / "cat").mkdir()
    source = open_source("folder", str(tree), "train")
    assert source.class_names == ("ant", "bee", "cat", "zebra")
    assert source[11].label == 3


def test_a_damaged_index_is_replaced(tree):
    open_source("folder", str(tree), "train")
    index = folder.index_files(str(tree), str(tree / "train"))[0]
    with open(index, "r+b") as file:
        file.truncate(100)
    assert len(open_source("folder", str(tree), "train")) == 12
    assert os.path.getsize(index) > 100
    assert [name for name in os.listdir(tree) if name.endswith(".tmp")] == []


def test_the_index_goes_to_the_cache_where_the_data_are_read_only(tree, monkeypatch):
    save = folder._save

    def refuse(file, *arguments):
        if file.startswith(str(tree)):
            raise PermissionError(13, "Permission denied")
        save(file, *arguments)

    monkeypatch.setattr(folder, "_save", refuse)
    open_source("folder", str(tree), "train")
    monkeypatch.setattr(folder, "_list", lambda *_: pytest.fail("was listed again"))
    assert len(open_source("folder", str(tree), "train")) == 12


def test_only_images_are_listed_in_subfolders_too(tree):
    (tree / "train" / "ant" / "readme.txt").write_bytes(b"")
    (tree / "train" / "ant" / ".hidden.jpg").write_bytes(b"")
    (tree / "train" / "ant" / "more").mkdir()
    (tree / "train" / "ant" / "more" / "deep ö.JPG").write_bytes(b"deep")
    source = open_source("folder", str(tree), "train")
    assert len(source) == 13
    assert source[4].name == "train/ant/more/deep ö.JPG"
    assert source[4].image == b"deep"


def test_a_file_that_vanished_is_named(tree):
    source = open_source("folder", str(tree), "train")
    (tree / "train" / "ant" / "ant_0.JPEG").unlink()
    with pytest.raises(DamagedImage, match=r"train/ant/ant_0\.JPEG"):
        source[0]


def test_a_held_out_part(tree):
    part = open_source("folder", str(tree), "holdout", holdout=0.25)
    rest = open_source("folder", str(tree), "train", holdout=0.25)
    assert sorted(names(part) + names(rest)) == sorted(names(open_source("folder", str(tree), "train")))


def test_what_is_missing_is_named(tree, tmp_path):
    with pytest.raises(UserError, match=r"elsewhere/train does not exist.*train/CLASS/IMAGE"):
        open_source("folder", str(tmp_path / "elsewhere"), "train")
    (tree / "test").mkdir()
    with pytest.raises(UserError, match="no class folders"):
        open_source("folder", str(tree), "test")
    (tree / "test" / "ant").mkdir()
    with pytest.raises(UserError, match="holds no images"):
        open_source("folder", str(tree), "test")
    (tree / "test" / "wasp").mkdir()
    with pytest.raises(UserError, match="lacks: wasp"):
        open_source("folder", str(tree), "test")


def test_real_files_train(tree):
    from densenet_jax.data.pipeline import train_batches
    from densenet_jax.data.transforms import train_transform

    for index, path in enumerate(sorted((tree / "train").rglob("*.JPEG"))):
        path.write_bytes(fake_imagenet.jpeg(index))
    source = open_source("folder", str(tree), "train")
    with train_batches(source, seed=0, global_batch_size=12, transform=train_transform(image_size_px=24)) as batches:
        batch = next(batches)
    assert np.bincount(batch["label"]).tolist() == [4, 4, 4]
    assert batch["image"].std() > 10
