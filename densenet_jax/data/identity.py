"""Compares a data set with a checkpoint's: classes in order, and the files of each."""

import base64
import json
import os
import zlib
from collections.abc import Iterable, Mapping, Sequence
from concurrent import futures
from typing import Any

from densenet_jax.data.class_names import LABELS_FILE, read_labels
from densenet_jax.data.records import DamagedImage, Source
from densenet_jax.data.sampler import spread
from densenet_jax.errors import UserError

# {"name": of the data set, "classes": names, "splits": {split: {"examples": n, "files": [[n, digest], ...],
# "names": packed paths and sizes, or "" if unknown or too many, "contents": {name: checksum} of a sample}}}
Identity = dict[str, Any]
_NAMED = 5  # differences listed per kind
_SAMPLE, _LEAST_SAMPLE = 256, 16  # files of a split whose contents are compared, spread evenly
_SAMPLE_BYTES = 64 * 2**20  # of all of them together, as far as _LEAST_SAMPLE allows
_THREADS = 16  # reading waits for the disk
_MAX_PACKED, _MAX_NAMES = 16 * 2**20, 2**28  # characters; ImageNet's 1.3 million files take 14 million


def identify(name: str, sources: Mapping[str, Source]) -> Identity:
    """Describes a data set as JSON values, to be saved in a checkpoint."""
    splits = {}
    for split, source in sources.items():
        files = source.files()
        splits[split] = {
            "examples": len(source),
            "files": [list(entry) for entry in source.identity()],
            "names": _pack(files),
            "contents": _sample_contents(source) if files else {},
        }
    return {"name": name, "classes": list(next(iter(sources.values())).class_names), "splits": splits}


def _sample_contents(source: Source) -> dict[str, int]:
    """Returns the checksum of each readable file of a sample by its name; the sample is smaller if files are large."""

    def read(index: int) -> tuple[str, int, int]:
        try:
            record = source[index]
        except DamagedImage:
            return "", 0, 0
        return record.name, zlib.crc32(record.image), len(record.image)

    first = read(0)
    most = min(_SAMPLE, max(_LEAST_SAMPLE, _SAMPLE_BYTES // max(first[2], 1)))
    with futures.ThreadPoolExecutor(_THREADS) as pool:
        sampled = [first, *pool.map(read, spread(len(source), most)[1:])]
    return {name: checksum for name, checksum, _ in sampled if name}


def _pack(files: Mapping[str, int]) -> str:
    text = "\0".join(f"{size} {name}" for name, size in files.items()).encode("utf-8", "surrogateescape")
    packed = base64.b64encode(zlib.compress(text, 1)).decode()
    return packed if len(packed) <= _MAX_PACKED else ""


def _unpack(packed: Any) -> dict[str, str]:
    """Returns the size of each file, as text."""
    try:
        text = zlib.decompressobj().decompress(base64.b64decode(packed), _MAX_NAMES)
    except (TypeError, ValueError, zlib.error):
        return {}
    parts = (entry.partition(" ") for entry in text.decode("utf-8", "backslashreplace").split("\0"))
    return {name: size for size, _, name in parts if name}


def read_identity(workdir: str, step: int) -> Identity | None:
    """Reads the data set that the checkpoint of `step` was trained on; an older one has only the run's labels.txt.

    Raises:
        UserError: labels.txt can't be read.
    """
    from densenet_jax.training.integrity import DamagedCheckpointError, check_files

    checkpoint = os.path.join(workdir, "checkpoints", str(step))
    try:
        check_files(checkpoint, "data")
        with open(os.path.join(checkpoint, "data", "metadata"), encoding="utf-8") as file:
            saved = json.load(file)["dataset"]
        saved["classes"], saved["name"], saved["splits"].items()
    # Restoring reports a damaged checkpoint.
    except (DamagedCheckpointError, OSError, ValueError, LookupError, TypeError, AttributeError):
        path = os.path.join(workdir, LABELS_FILE)
        return {"name": "", "classes": list(read_labels(path)), "splits": {}} if os.path.exists(path) else None
    return saved


def is_contradiction(names: Sequence[str], class_names: Sequence[str]) -> bool:
    """Returns whether `names` number a class differently from `class_names`; renamed classes are no contradiction."""
    return len(names) != len(class_names) or bool(_moved(class_names, names))


def check_identity(saved: Identity, current: Identity, where: str, allow_changed: bool = False) -> None:
    """Checks that `current` is the data set that `saved` describes; compares files of the splits that both have.

    Args:
        where: what was trained on `saved`, for the message.
        allow_changed: let files come and go, and classes be renamed that keep their number.

    Raises:
        UserError: they differ; the message names the differences.
    """
    old, new = saved["classes"], current["classes"]
    changes = [*_class_changes(saved, current), *_file_changes(saved, current)]
    if not changes or (not saved["splits"] and not is_contradiction(old, new)):  # an older run's labels.txt
        return
    start = f"{where} was trained on another data set ({'; '.join(changes)})"
    if moved := _moved(old, new):
        raise UserError(
            f"{start}, so that class {moved[0]!r} would be number {new.index(moved[0])} and was {old.index(moved[0])}; "
            "give the classes their names back, or name a file with the right order as config.data.class_order."
        )
    if len(old) != len(new):
        raise UserError(
            f"{start}, and its head has {len(old)} classes; restore them, or begin a new run with these weights "
            "(config.model.pretrained)."
        )
    if not allow_changed:
        raise UserError(f"{start}; restore it, or set config.data.allow_changed=True to go on with it as it is.")


def _moved(old: Sequence[str], new: Sequence[str]) -> list[str]:
    numbers = {name: number for number, name in enumerate(new)}
    return [name for number, name in enumerate(old) if numbers.get(name, number) != number]


def _class_changes(saved: Identity, current: Identity) -> list[str]:
    old, new = saved["classes"], current["classes"]
    gone, came = [name for name in old if name not in set(new)], [name for name in new if name not in set(old)]
    both = saved["splits"].keys() & current["splits"].keys()
    had, have = (_files_by_class(identity, both) for identity in (saved, current))
    renamed = {}
    for before in gone:
        same_files = [after for after in came if had.get(before) and had[before] == have.get(after)]
        same_place = [after for after in came if old.index(before) == new.index(after)]
        if after := next(iter(same_files or same_place), ""):
            renamed[before] = after
            came.remove(after)
    kinds = {
        "renamed": [f"{before!r} to {after!r}" for before, after in renamed.items()],
        "removed": [repr(name) for name in gone if name not in renamed],
        "added": [repr(name) for name in came],
    }
    changes = [_list(f"classes {kind}: ", names) for kind, names in kinds.items() if names]
    return changes or (["the same classes in another order"] if old != new else [])


def _files_by_class(identity: Identity, splits: Iterable[str]) -> dict[str, list[Any]]:
    """Collects file counts and digests of each class in these splits."""
    files: dict[str, list[Any]] = {}
    for split in sorted(splits):
        for name, (count, digest) in zip(identity["classes"], identity["splits"][split]["files"], strict=False):
            if digest:
                files.setdefault(name, []).append((split, count, digest))
    return files


def _file_changes(saved: Identity, current: Identity) -> list[str]:
    changes: list[str] = []
    if saved["name"] != current["name"]:
        return changes
    for split, now in current["splits"].items():
        if (before := saved["splits"].get(split)) is None or before == now:
            continue
        if before["examples"] != now["examples"]:
            changes.append(f"{split} has {now['examples']} images and had {before['examples']}")
        had, have = (
            {name: tuple(entry) for name, entry in zip(which["classes"], files["files"], strict=False)}
            for which, files in ((saved, before), (current, now))
        )
        details = [
            f"{name!r} {f'{count}, had {had[name][0]}' if count != had[name][0] else 'other files'}"
            for name, (count, _) in have.items()
            if name in had and have[name] != had[name]
        ]
        if details:
            changes.append(_list(f"{split}: ", details))
        files = _list_files(split, before, now, skip=set(saved["classes"]) ^ set(current["classes"]))
        changes += files or _list_contents(split, before, now)
    return changes


def _list_files(split: str, before: dict[str, Any], now: dict[str, Any], skip: set[str]) -> list[str]:
    """Lists files that came, went or changed size, except in the folders of `skip`: classes that came or went."""
    had, have = (_unpack(files.get("names")) for files in (before, now))
    if not had or not have:
        return []
    both = had.keys() & have.keys()
    changed = {name for name in both if had[name] != have[name] and "-1" not in (had[name], have[name])}
    kinds = {"removed": had.keys() - both, "added": have.keys() - both, "of another size": changed}
    kept = {kind: sorted(name for name in names if name.partition("/")[0] not in skip) for kind, names in kinds.items()}
    return [_list(f"{split} files {kind}: ", names) for kind, names in kept.items() if names]


def _list_contents(split: str, before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Lists files of both samples whose contents differ."""
    had, have = (sampled if isinstance(sampled := part.get("contents"), dict) else {} for part in (before, now))
    both = had.keys() & have.keys()
    changed = sorted(name for name in both if had[name] != have[name])
    start = f"{split}: other contents of {len(changed)} of {len(both)} sampled files: "
    return [_list(start, changed)] if changed else []


def _list(start: str, entries: Sequence[str]) -> str:
    more = f" and {len(entries) - _NAMED} more" if len(entries) > _NAMED else ""
    return start + ", ".join(entries[:_NAMED]) + more
