"""Class folders are listed once, and again when something changed."""

import io
import os

import numpy as np
import pytest
from PIL import Image

from densenet_jax.data import folder, folder_index
from densenet_jax.data.headers import is_image_start
from densenet_jax.data.records import DamagedImage
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
    assert names(source)[0] == "val/ant/ant_0.JPEG"  # the folder there is, whatever the split is called
    assert [(source[index].label, source[index].image) for index in range(4)] == [
        (0, b"val ant 0"), (0, b"val ant 1"), (2, b"val zebra 0"), (2, b"val zebra 1"),
    ]  # fmt: skip


def test_the_index_is_used_until_something_changes(tree, monkeypatch):
    first = names(open_source("folder", str(tree), "train"))
    with monkeypatch.context() as patched:
        patched.setattr(folder_index, "_list", lambda *_: pytest.fail("was listed again"))
        assert names(open_source("folder", str(tree), "train")) == first
    (tree / "train" / "bee" / "new.png").write_bytes(b"")
    assert len(open_source("folder", str(tree), "train")) == 13
    (tree / "train" / "bee" / "new.png").unlink()
    assert len(open_source("folder", str(tree), "train")) == 12
    (tree / "train" / "cat").mkdir()
    (tree / "train" / "cat" / "cat_0.png").write_bytes(b"")
    source = open_source("folder", str(tree), "train")
    assert source.class_names == ("ant", "bee", "cat", "zebra")
    assert source[12].label == 3


def test_a_damaged_index_is_replaced(tree):
    open_source("folder", str(tree), "train")
    index = folder_index.index_files(str(tree), str(tree / "train"))[0]
    with open(index, "r+b") as file:
        file.truncate(100)
    assert len(open_source("folder", str(tree), "train")) == 12
    assert os.path.getsize(index) > 100
    assert [name for name in os.listdir(tree) if name.endswith(".tmp")] == []


def test_an_index_of_other_content_is_replaced(tree):
    folder.FolderSource(str(tree), "train")
    index = folder_index.index_files(str(tree), str(tree / "train"))[0]
    for stamp in (b"[]", b'{"version": 3, "classes": 1}'):
        np.savez(index, stamp=np.frombuffer(stamp, np.uint8))
        assert len(folder.FolderSource(str(tree), "train")) == 12


def test_the_index_goes_to_the_cache_where_the_data_are_read_only(tree, monkeypatch):
    save = folder_index._save

    def refuse(file, *arguments):
        if file.startswith(str(tree)):
            raise PermissionError(13, "Permission denied")
        save(file, *arguments)

    monkeypatch.setattr(folder_index, "_save", refuse)
    open_source("folder", str(tree), "train")
    monkeypatch.setattr(folder_index, "_list", lambda *_: pytest.fail("was listed again"))
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


def test_the_first_bytes_decide_where_the_ending_does_not(tree, caplog):
    bee = tree / "train" / "bee"
    for name in ("a.jfif", "no_ending", "wrong.txt"):
        (bee / name).write_bytes(fake_imagenet.jpeg(0))
    for name in ("notes.txt", "BM.csv", "Thumbs.db", "empty"):
        (bee / name).write_bytes(b"BMW,1,2" if name == "BM.csv" else b"")
    (bee / "gone.jfif").symlink_to("nowhere")
    os.mkfifo(bee / "pipe.jpg")
    (tree / "train" / "loose.jpg").write_bytes(b"")
    for listed in ("anew", "by the index"):
        caplog.clear()
        source = open_source("folder", str(tree), "train")
        assert [name.rpartition("/")[2] for name in names(source) if "/bee/" in name] == [
            "a.jfif", "bee_0.JPEG", "bee_1.JPEG", "bee_2.JPEG", "bee_3.JPEG", "no_ending", "wrong.txt",
        ], listed  # fmt: skip
        (message,) = caplog.messages
        assert "7 files are not read as images" in message
        for kind in (
            "1 .txt",
            "1 .csv",
            "1 .db",
            "1 no ending",
            "1 a broken link",
            "1 no regular file",
            "1 outside of",
        ):
            assert kind in message


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "WEBP", "PPM", "TIFF", "GIF"])
def test_every_kind_is_known_by_its_first_bytes(kind):
    file = io.BytesIO()
    Image.new("RGB", (3, 2)).save(file, kind)
    assert is_image_start(file.getvalue()[:32])


def test_a_class_without_images_is_refused(tree, caplog):
    (tree / "train" / "cow").mkdir()
    with pytest.raises(UserError, match="no images of 1 of 4 classes: 'cow'"):
        open_source("folder", str(tree), "train")
    source = open_source("folder", str(tree), "val")  # says it, and evaluates
    assert source.class_names == ("ant", "bee", "cow", "zebra")
    assert "no images of 2 of 4 classes: 'bee', 'cow'" in caplog.text


def test_a_folder_that_contains_itself_is_named(tree):
    (tree / "train" / "ant" / "loop").symlink_to("..")
    with pytest.raises(UserError, match=r"is a link to a folder that it lies in"):
        open_source("folder", str(tree), "train")


def test_images_in_hidden_folders_are_reported(tree, caplog):
    (tree / "train" / ".cow").mkdir()
    (tree / "train" / ".cow" / "0.png").write_bytes(b"")
    (tree / "train" / ".git").mkdir()
    assert open_source("folder", str(tree), "train").num_classes == 3
    assert "1 in the hidden folder '.cow'" in caplog.text


def test_one_class_is_reported(tmp_path, caplog):
    (tmp_path / "train" / "ant").mkdir(parents=True)
    (tmp_path / "train" / "ant" / "0.png").write_bytes(b"")
    open_source("folder", str(tmp_path), "train")
    assert "one class only, 'ant'" in caplog.text


def test_a_name_that_is_not_utf8_is_refused(tree):
    os.mkdir(os.fsencode(tree / "train") + b"/caf\xe9")
    with pytest.raises(UserError, match=r"b'caf\\xe9' of .* is not UTF-8"):
        open_source("folder", str(tree), "train")


def test_a_file_name_that_is_not_utf8_is_read(tree):
    with open(os.fsencode(tree / "train" / "ant") + b"/z\xe9.jpg", "wb") as file:
        file.write(b"there")
    record = open_source("folder", str(tree), "train")[4]
    assert record.image == b"there"
    assert record.name == "train/ant/z\\xe9.jpg"


def numbered(tmp_path):
    for name in ("1", "2", "10", "12", "b", "A"):
        (tmp_path / "train" / name).mkdir(parents=True)
        (tmp_path / "train" / name / "0.png").write_bytes(name.encode())
    return str(tmp_path)


def test_class_order(tmp_path):
    root = numbered(tmp_path)
    assert open_source("folder", root, "train").class_names == ("1", "10", "12", "2", "A", "b")
    natural = open_source("folder", root, "train", class_order="natural")
    assert natural.class_names == ("1", "2", "10", "12", "A", "b")
    assert [natural[i].image.decode() for i in range(6)] == list(natural.class_names)
    assert [natural[i].label for i in range(6)] == list(range(6))
    order = tmp_path / "order.txt"
    order.write_text("\ufeffb\r\n2\r\n1\r\n12\r\n10\r\nA\r\n", encoding="utf-8")
    given = open_source("folder", root, "train", class_order=str(order))
    assert given.class_names == ("b", "2", "1", "12", "10", "A")
    assert given[0].image == b"b"


@pytest.mark.parametrize(
    ("lines", "why"),
    [("1\n2\n10\n12\nb\n", "lacks 1 classes: A"), ("1\n2\n2\n10\n12\nb\nA\n", "a name twice: 2"),
     ("1\n2\n10\n12\nb\nA\nC\n", "no images of 1 of 7 classes: 'C'")],
)  # fmt: skip
def test_a_class_order_that_does_not_fit(tmp_path, lines, why):
    root = numbered(tmp_path)
    (tmp_path / "order.txt").write_text(lines)
    with pytest.raises(UserError, match=why):
        open_source("folder", root, "train", class_order=str(tmp_path / "order.txt"))


def test_identity_distinguishes_renamed_classes_and_other_files(tree):
    first = open_source("folder", str(tree), "train").identity()
    assert [count for count, _ in first] == [4, 4, 4]
    (tree / "train" / "bee").rename(tree / "train" / "zz")
    (tree / "val" / "zz").mkdir()
    renamed = open_source("folder", str(tree), "train").identity()
    assert renamed == [first[0], first[2], first[1]]
    (tree / "train" / "zz" / "bee_0.JPEG").rename(tree / "train" / "zz" / "bee_9.JPEG")
    other = open_source("folder", str(tree), "train").identity()
    assert other[:2] == renamed[:2]
    assert other[2][0] == 4
    assert other[2] != renamed[2]


def test_a_file_that_vanished_is_named(tree):
    source = open_source("folder", str(tree), "train")
    (tree / "train" / "ant" / "ant_0.JPEG").unlink()
    with pytest.raises(DamagedImage, match=r"train/ant/ant_0\.JPEG"):
        source[0]


def test_a_held_out_part(tree):
    part = open_source("folder", str(tree), "holdout", holdout=0.25)
    rest = open_source("folder", str(tree), "train", holdout=0.25)
    assert sorted(names(part) + names(rest)) == sorted(names(open_source("folder", str(tree), "train")))


def test_a_class_missing_from_the_held_out_part_is_reported(tree, caplog):
    open_source("folder", str(tree), "holdout", holdout=1)
    assert "holdout has no images of 2 of 3 classes" in caplog.text


def test_missing_folders_are_named(tree, tmp_path):
    with pytest.raises(UserError, match=r"config.data.dir is '.*elsewhere', which does not exist"):
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
