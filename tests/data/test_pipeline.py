"""What training and evaluation see does not depend on threads, processes or interruptions, and errors arrive."""

import gc
import itertools
import threading
import time
import weakref

import numpy as np
import pytest

from densenet_jax.data.batches import PART
from densenet_jax.data.pipeline import eval_batches, train_batches
from densenet_jax.data.records import DamagedImage, Record
from densenet_jax.data.sources import open_source
from densenet_jax.data.transforms import eval_transform, train_transform
from densenet_jax.errors import UserError
from tests.data import fake_imagenet


class Numbers:
    """A source of `size` images that are their own index, of which some are damaged."""

    def __init__(self, size, damaged=(), seconds=0.0):
        self.size, self.damaged, self.seconds = size, damaged, seconds
        self.num_classes = size
        self.class_names = tuple(map(str, range(size)))
        self.label_sets = self.many_labels = False
        self.reads = 0

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        self.reads += 1
        time.sleep(self.seconds)
        return Record(
            image=b"broken" if index in self.damaged else str(index).encode(), label=index, name=f"image_{index}"
        )

    def labels(self):
        return np.arange(self.size, dtype=np.int32)


class Show:
    """A transform that writes what it was given into the pixels."""

    shape = (2, 2, 1)
    dtype = np.dtype(np.uint8)

    def __init__(self, draws=4):
        self.draws = draws

    def __call__(self, data, draws, name="image"):
        if data == b"broken":
            raise DamagedImage(name, "it is broken")
        return np.full((2, 2, 1), int(256 * draws[0]) if self.draws else int(data) % 256, np.uint8)


def take(batches, count):
    with batches:
        return [next(batches) for _ in range(count)]


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    directory = str(tmp_path_factory.mktemp("data"))
    fake_imagenet.write(directory, train=44, validation=9)
    return directory


def test_every_example_once_an_epoch_and_the_rest_of_one_begins_the_next():
    batches = take(train_batches(Numbers(50), seed=1, global_batch_size=8, transform=Show()), 25)
    labels = np.concatenate([batch["label"] for batch in batches])
    epochs = labels.reshape(
        4, 50
    )  # 25 batches of 8 are 4 epochs of 50: the 7th batch has the end of one, the start of another
    for epoch in epochs:
        assert sorted(epoch.tolist()) == list(range(50))
    assert (epochs[0] != epochs[1]).any()
    assert batches[0]["label"].dtype == np.int32
    assert batches[0]["image"].shape == (8, 2, 2, 1)


@pytest.mark.parametrize("process_count", [2, 4])
def test_processes_share_the_same_global_batches(process_count):
    size = 3 * PART
    common = {"seed": 4, "global_batch_size": 4 * size, "transform": Show()}
    alone = take(train_batches(Numbers(1000), **common), 4)
    shares = [
        take(train_batches(Numbers(1000), **common, process_index=index, process_count=process_count), 4)
        for index in range(process_count)
    ]
    for step, batch in enumerate(alone):
        for key, value in batch.items():
            np.testing.assert_array_equal(np.concatenate([share[step][key] for share in shares]), value)


def test_threads_and_interruptions_change_nothing(imagenet):
    source = open_source("imagenet2012", imagenet, "train")
    common = {"seed": 9, "global_batch_size": 40, "transform": train_transform(image_size_px=32)}
    whole = take(train_batches(source, **common, reader_threads=1, prefetch_batches=1), 6)
    late = [take(train_batches(source, **common, reader_threads=7, start_step=step), 1)[0] for step in range(6)]
    for first, second in zip(whole, late, strict=True):
        np.testing.assert_array_equal(first["image"], second["image"])
        np.testing.assert_array_equal(first["label"], second["label"])
    assert (whole[0]["image"] != whole[1]["image"]).any()
    other_seed = take(train_batches(source, **common | {"seed": 10}), 1)[0]
    assert (other_seed["label"] != whole[0]["label"]).any()


def test_starting_at_step_a_million_costs_what_starting_at_step_ten_does():
    def seconds_and_reads(start_step):
        source = Numbers(1_281_167)
        began = time.perf_counter()
        batches = train_batches(
            source, seed=0, global_batch_size=64, transform=Show(), start_step=start_step, prefetch_batches=1
        )
        take(batches, 1)
        return time.perf_counter() - began, source.reads

    early, late = seconds_and_reads(10), seconds_and_reads(10**6)
    assert late[1] <= 3 * 64  # what is read ahead, and nothing of what came before
    assert late[0] < 3 * early[0] + 0.2


def test_each_position_has_its_own_crop():
    batches = take(train_batches(Numbers(4), seed=0, global_batch_size=64, transform=Show()), 1)
    assert len(np.unique(batches[0]["image"][:, 0, 0, 0])) > 30


def test_images_that_never_change_are_read_once():
    source = Numbers(40)
    batches = take(train_batches(source, seed=0, global_batch_size=40, transform=Show(draws=0)), 6)
    assert source.reads <= 50  # two threads may meet at one image
    for batch in batches:
        np.testing.assert_array_equal(batch["image"][:, 0, 0, 0], batch["label"])


@pytest.mark.parametrize(
    ("size", "global_batch_size", "process_count"), [(9, 4, 1), (9, 4, 2), (8, 4, 4), (3, 64, 2), (100, 66, 1)]
)
def test_evaluation_sees_every_example_once_on_any_number_of_processes(size, global_batch_size, process_count):
    shares = []
    for index in range(process_count):
        with eval_batches(
            Numbers(size),
            global_batch_size=global_batch_size,
            transform=Show(0),
            process_index=index,
            process_count=process_count,
        ) as batches:
            shares.append(list(batches))
    assert {len(share) for share in shares} == {-(-size // global_batch_size)}
    seen = np.concatenate([batch["label"][batch["mask"]] for step in zip(*shares, strict=True) for batch in step])
    np.testing.assert_array_equal(seen, np.arange(size))
    last = shares[-1][-1]
    assert (last["label"][~last["mask"]] == 0).all()
    assert (last["image"][~last["mask"]] == 0).all()
    assert last["mask"].dtype == bool


def test_a_damaged_image_stops_with_its_name():
    with (
        train_batches(Numbers(50, damaged={7}), seed=0, global_batch_size=10, transform=Show()) as batches,
        pytest.raises(UserError, match=r"image_7 .*on_damaged=skip"),
    ):
        list(itertools.islice(batches, 5))
    with (
        eval_batches(Numbers(50, damaged={49}), global_batch_size=10, transform=Show()) as batches,
        pytest.raises(DamagedImage, match="image_49"),
    ):
        list(batches)


@pytest.mark.parametrize("draws", [0, 4])
def test_damaged_images_may_be_replaced_by_the_next(draws):
    whole = Numbers(50)
    broken = Numbers(50, damaged={7, 8, 49})
    common = {"seed": 0, "global_batch_size": 50, "transform": Show(draws), "on_damaged": "skip"}
    batches = train_batches(broken, **common)
    got, want = take(batches, 2), take(train_batches(whole, **common), 2)
    replaced = np.arange(50)
    replaced[[7, 8, 49]] = 9, 9, 0
    for first, second in zip(got, want, strict=True):
        np.testing.assert_array_equal(first["label"], replaced[second["label"]])
    assert sorted(batches.damaged) == ["image_49", "image_7", "image_8"]

    with eval_batches(broken, global_batch_size=20, transform=Show(), on_damaged="skip") as checked:
        seen = np.concatenate([batch["label"][batch["mask"]] for batch in checked])
    assert sorted(seen.tolist()) == sorted(set(range(50)) - {7, 8, 49})
    assert len(checked.damaged) == 3


def test_a_data_set_that_is_all_damaged_ends():
    with (
        train_batches(
            Numbers(5, damaged=set(range(5))), seed=0, global_batch_size=2, transform=Show(), on_damaged="skip"
        ) as batches,
        pytest.raises(UserError, match="All 5 images"),
    ):
        next(batches)


def test_damaged_records_of_a_real_data_set_are_named(tmp_path):
    cut = fake_imagenet.jpeg(3)[:900]
    fake_imagenet.write(str(tmp_path), train=6, validation=1, replace={"train_3.JPEG": cut, "train_4.JPEG": b""})
    source = open_source("imagenet2012", str(tmp_path), "train")
    transform = train_transform(image_size_px=16)
    with (
        train_batches(source, seed=0, global_batch_size=6, transform=transform) as batches,
        pytest.raises(DamagedImage, match=r"train_[34]\.JPEG"),
    ):
        next(batches)


def test_closing_ends_the_threads():
    before = set(threading.enumerate())
    batches = train_batches(
        Numbers(1000, seconds=0.01), seed=0, global_batch_size=64, transform=Show(), reader_threads=3
    )
    next(batches)
    readers = set(threading.enumerate()) - before
    assert len(readers) == 3
    batches.close()
    batches.close()
    for reader in readers:
        reader.join(timeout=5)
        assert not reader.is_alive()


def test_closing_does_not_wait_for_batches_that_nobody_wants():
    before = set(threading.enumerate())
    batches = train_batches(
        Numbers(1000, seconds=0.1), seed=0, global_batch_size=PART, transform=Show(), reader_threads=1
    )
    batches.start()
    readers = set(threading.enumerate()) - before
    time.sleep(0.2)
    batches.close()
    began = time.monotonic()
    for reader in readers:
        reader.join(timeout=10)
    assert time.monotonic() - began < 0.1 * PART / 2  # an image takes 0.1 seconds, a batch 3.2


def test_batches_that_were_used_are_let_go():
    with train_batches(Numbers(1000), seed=0, global_batch_size=16, transform=Show(), prefetch_batches=2) as batches:
        images = [weakref.ref(next(batches)["image"]) for _ in range(20)]
        gc.collect()
        assert sum(image() is not None for image in images) <= 1


def test_reading_ahead_is_bounded():
    source = Numbers(10_000)
    with train_batches(
        source, seed=0, global_batch_size=64, transform=Show(), reader_threads=16, prefetch_batches=2
    ) as batches:
        batches.start()
        time.sleep(0.5)
        assert source.reads <= 2 * 64
        next(batches)
        time.sleep(0.5)
        assert source.reads <= 3 * 64


def test_batches_are_not_overwritten():
    batches = take(train_batches(Numbers(1000), seed=0, global_batch_size=16, transform=Show(0)), 10)
    for batch in batches:
        np.testing.assert_array_equal(batch["image"][:, 1, 1, 0], batch["label"] % 256)


def test_wrong_arguments_are_named():
    with pytest.raises(UserError, match="10 can't be shared by 4"):
        train_batches(Numbers(5), seed=0, global_batch_size=10, transform=Show(), process_count=4)


def test_real_photographs_come_through(imagenet):
    source = open_source("imagenet2012", imagenet, "validation")
    assert source.num_classes == 1000
    transform = eval_transform(image_size_px=56, resize_px=64)
    with eval_batches(source, global_batch_size=4, transform=transform) as batches:
        got = list(batches)
    assert [int(batch["mask"].sum()) for batch in got] == [4, 4, 1]
    np.testing.assert_array_equal(got[1]["image"][2], transform(source[6].image, np.empty(0)))
    assert got[1]["image"][2].std() > 10


@pytest.mark.parametrize("process_count", [1, 2])
def test_repeats_are_neighbours_with_draws_of_their_own_and_all_are_seen_equally_often(process_count):
    repeats, size, batch = 3, 20, 12
    common = {"seed": 2, "global_batch_size": batch, "transform": Show(), "repeats": repeats}
    shares = [
        take(train_batches(Numbers(size), **common, process_index=index, process_count=process_count), 5)
        for index in range(process_count)
    ]
    batches = [
        {key: np.concatenate([share[step][key] for share in shares]) for key in ("image", "label")} for step in range(5)
    ]
    labels = np.concatenate([entry["label"] for entry in batches]).reshape(-1, repeats)
    assert (labels == labels[:, :1]).all()
    assert sorted(labels[:, 0].tolist()) == list(range(size))  # 5 batches of 12 are 20 images, three times each
    images = np.concatenate([entry["image"][:, 0, 0, 0] for entry in batches]).reshape(-1, repeats)
    assert all(len(set(row)) == repeats for row in images.tolist()[:4])
    late = take(train_batches(Numbers(size), **common, start_step=3), 1)[0]
    np.testing.assert_array_equal(late["label"], batches[3]["label"])
