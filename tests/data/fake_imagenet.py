"""A small data set with ImageNet's layout: real photographs, tfds's files, few images."""

import io
import os

import numpy as np
import tensorflow_datasets as tfds
from array_record.python import array_record_module
from PIL import Image
from skimage import data as photographs

PHOTOGRAPHS = ("astronaut", "cat", "chelsea", "coffee", "rocket")


def jpeg(index: int, *, quality: int = 90, **save: object) -> bytes:
    """A JPEG of 90 to 140 px cut from a photograph; `index` decides which and where."""
    random = np.random.RandomState(index)
    pixels = getattr(photographs, PHOTOGRAPHS[index % len(PHOTOGRAPHS)])()
    height, width = random.randint(90, 140, 2)
    top, left = random.randint(0, pixels.shape[0] - height), random.randint(0, pixels.shape[1] - width)
    file = io.BytesIO()
    Image.fromarray(pixels[top : top + height, left : left + width]).save(file, "JPEG", quality=quality, **save)
    return file.getvalue()


def features(num_classes: int) -> tfds.features.FeaturesDict:
    """The feature spec of tfds `imagenet2012`."""
    return tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(encoding_format="jpeg"),
            "label": tfds.features.ClassLabel(names=[f"n{label:08d}" for label in range(num_classes)]),
            "file_name": tfds.features.Text(),
        }
    )


def variant_features(name: str) -> tfds.features.FeaturesDict:
    """The feature spec of tfds `imagenet_v2`, `imagenet_a` and `imagenet_r`, or of `imagenet2012_real`."""
    if name != "imagenet2012_real":
        return features(1000)
    label = tfds.features.ClassLabel(names=[f"n{label:08d}" for label in range(1000)])
    return tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(encoding_format="jpeg"),
            "original_label": label,
            "real_label": tfds.features.Sequence(label),
            "file_name": tfds.features.Text(),
        }
    )


def write_variant(
    directory: str, name: str, split: str, labels: list[int], *, label_sets: list[tuple[int, ...]] | None = None
) -> str:
    """Writes NAME/1.0.0 with one image a label, and with `label_sets` as its real labels; named PLACE.JPEG."""
    path = os.path.join(directory, name, "1.0.0")
    os.makedirs(path)
    examples = []
    for index, label in enumerate(labels):
        example = {"image": jpeg(index), "file_name": f"{index}.JPEG"}
        answers = {"label": label} if label_sets is None else {"original_label": label, "real_label": label_sets[index]}
        examples.append(example | answers)
    spec = variant_features(name)
    info = _write_split(path, name.partition("/")[0], split, spec, examples)
    tfds.folder_dataset.write_metadata(data_dir=path, features=spec, split_infos=[info], check_data=False)
    return path


def write(
    directory: str,
    *,
    train: int = 40,
    validation: int = 16,
    num_classes: int = 1000,
    used_classes: int = 4,
    replace: dict[str, bytes] | None = None,
) -> str:
    """Writes imagenet2012/5.1.0 below `directory`; open_source("imagenet2012", directory, "train") reads it.

    Example i of a split has class i % used_classes and the name SPLIT_i.JPEG; `replace` gives other bytes for names.
    """
    path = os.path.join(directory, "imagenet2012", "5.1.0")
    os.makedirs(path)
    spec = features(num_classes)
    infos = []
    for split, count in (("train", train), ("validation", validation)):
        examples = []
        for index in range(count):
            name = f"{split}_{index}.JPEG"
            image = (replace or {}).get(name) or jpeg(index + (1000 if split == "validation" else 0))
            examples.append({"image": image, "label": index % used_classes, "file_name": name})
        infos.append(_write_split(path, "imagenet2012", split, spec, examples))
    tfds.folder_dataset.write_metadata(data_dir=path, features=spec, split_infos=infos, check_data=False)
    return path


def _write_split(
    path: str, dataset: str, split: str, spec: tfds.features.FeaturesDict, examples: list[dict]
) -> tfds.core.SplitInfo:
    shards = 2
    template = tfds.core.ShardedFileTemplate(
        data_dir=path, dataset_name=dataset, split=split, filetype_suffix="array_record"
    )
    lengths, num_bytes = [], 0
    for shard, indices in enumerate(np.array_split(np.arange(len(examples)), shards)):
        file = os.path.join(path, f"{dataset}-{split}.array_record-{shard:05d}-of-{shards:05d}")
        writer = array_record_module.ArrayRecordWriter(file, "group_size:1")
        for index in indices.tolist():
            example = examples[index]
            raw = spec.serialize_example(spec.encode_example(example | {"image": io.BytesIO(example["image"])}))
            num_bytes += len(raw)
            writer.write(raw)
        writer.close()
        lengths.append(len(indices))
    return tfds.core.SplitInfo(name=split, shard_lengths=lengths, num_bytes=num_bytes, filename_template=template)


def write_features(directory: str, name: str, features: dict, answers: list[dict]) -> str:
    """Writes NAME/1.0.0 with a split "train" of these further features, one image an answer."""
    path = os.path.join(directory, name, "1.0.0")
    os.makedirs(path)
    spec = tfds.features.FeaturesDict({"image": tfds.features.Image(encoding_format="jpeg")} | features)
    examples = [{"image": jpeg(index)} | answer for index, answer in enumerate(answers)]
    info = _write_split(path, name, "train", spec, examples)
    tfds.folder_dataset.write_metadata(data_dir=path, features=spec, split_infos=[info], check_data=False)
    return path
