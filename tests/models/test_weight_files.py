"""Files of weights: read by their content, whole, and without executing anything in them."""

import io
import json
import pickle
import resource
import shutil
import struct
import zipfile

import h5py
import numpy as np
import pytest
from safetensors.numpy import save_file

from densenet_jax.errors import UserError
from densenet_jax.models.weight_files import read_arrays
from tests.models import golden

FOLDER = golden.GOLDEN / "dialects"
RAW = {"a": np.arange(6.0).reshape(2, 3).T, "b": np.arange(3.0, 7.0)}


def _assert_same(actual, expected):
    assert list(actual) == list(expected)
    for key, value in expected.items():
        np.testing.assert_array_equal(actual[key].astype(np.float64), value)


@pytest.mark.parametrize("file", ["checkpoint.pth.tar", "legacy.ckpt"])
def test_a_training_checkpoint_gives_its_averaged_weights_by_default(file, caplog):
    averaged = {f"module.{key}": 2 * value for key, value in RAW.items()}
    _assert_same(read_arrays(FOLDER / file), averaged)
    assert len(caplog.records) == 1
    assert f"{file} holds state_dict and state_dict_ema: took state_dict_ema; " in caplog.text
    assert "config.model.pretrained_average=raw takes state_dict" in caplog.text
    _assert_same(read_arrays(FOLDER / file, "average"), averaged)
    _assert_same(read_arrays(FOLDER / file, "raw"), RAW)


def test_the_content_decides_and_not_the_ending(tmp_path):
    for ending in ("bin", "safetensors", "h5", ""):
        path = tmp_path / f"weights.{ending}"
        shutil.copy(FOLDER / "checkpoint.pth.tar", path)
        _assert_same(read_arrays(path, "raw"), RAW)


@pytest.mark.parametrize("first", [0x80, 0x50, 0x88])  # of a pickle, a zip archive and neither
def test_a_safetensors_file_may_begin_as_another_kind(tmp_path, first):
    for length in range(8, 300, 8):
        save_file({"a" * length: np.ones(2, np.float32)}, tmp_path / "x")
        if (tmp_path / "x").read_bytes()[0] == first:
            return _assert_same(read_arrays(tmp_path / "x"), {"a" * length: np.ones(2)})
    raise AssertionError("no such file was written")


def test_numbers_of_eight_bits_are_read_for_others_to_refuse():
    assert read_arrays(FOLDER / "fp8.pth")["a"].dtype.name == "float8_e4m3fn"


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("whole.pth", r"a whole pickled torch\.nn\.modules\.linear\.Linear, .*save model\.state_dict\(\)"),
        ("beside.pth", r"torch\.nn\.modules\.linear\.Linear beside the weights(?s:.*)\n    torch\.save\("),
    ],
)
def test_classes_that_are_not_weights_are_named(file, message):
    with pytest.raises(UserError, match=message) as caught:
        read_arrays(FOLDER / file)
    assert str(caught.value).count("\n") <= 2
    assert "\x1b" not in str(caught.value)


def test_no_averaged_weights_where_they_are_asked_for(tmp_path):
    (tmp_path / "x.pth").write_bytes(pickle.dumps({"model": {"a": np.ones(2)}}))
    with pytest.raises(UserError, match="holds no averaged weights"):
        read_arrays(tmp_path / "x.pth", "average")
    (tmp_path / "x.pth").write_bytes(pickle.dumps({"model_ema": {"a": np.ones(2)}}))
    with pytest.raises(UserError, match="holds averaged weights only"):
        read_arrays(tmp_path / "x.pth", "raw")
    with pytest.raises(UserError, match="expected one of auto, raw, average"):
        read_arrays(tmp_path / "x.pth", "both")


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_a_pickle_of_arrays_is_read_as_paddle_writes_it(tmp_path, protocol):
    arrays = {"a": np.arange(6, dtype=np.float32).reshape(2, 3).T, "b": np.arange(2.0).astype(">f4")}
    content = {**arrays, "StructuredToParameterName@@": {"a": "linear_0.w_0"}}
    (tmp_path / "x.pdparams").write_bytes(pickle.dumps(content, protocol))
    _assert_same(read_arrays(tmp_path / "x.pdparams"), arrays)


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("place", ["alone", "beside", "inside"])
def test_nothing_in_a_pickle_is_executed(tmp_path, place):
    evil = Evil(str(tmp_path / "executed"))
    content = {"alone": evil, "beside": {"state_dict": {"a": np.ones(2)}, "x": evil}, "inside": {"a": evil}}[place]
    (tmp_path / "evil.pth").write_bytes(pickle.dumps(content))
    with pytest.raises(UserError, match=r"(io|_io)\.open.*nothing in it was executed"):
        read_arrays(tmp_path / "evil.pth")
    assert not (tmp_path / "executed").exists()


def _torch_file(pickled, **members):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("x/data.pkl", pickled)
        for name, content in members.items():
            archive.writestr(
                f"x/{name.replace('_', '/')}", content, zipfile.ZIP_DEFLATED if name == "byteorder" else None
            )
    return file.getvalue()


def _state_of(count, size, stride=1, offset=0):
    """Pickles `count` views, [size], of one storage of 1,024 floats."""
    view = (
        b"ctorch._utils\n_rebuild_tensor_v2\n((X\x07\0\0\0storagectorch\nFloatStorage\nX\1\0\0\x000NK\0tQ"
        + b"".join(b"J" + struct.pack("<i", number) for number in (offset, size))
        + b"\x85J"
        + struct.pack("<i", stride)
        + b"\x85tR"
    )
    return b"\x80\2}(" + b"".join(b"X\4\0\0\0%04d" % number + view for number in range(count)) + b"u."


def _views(*args):
    return _torch_file(_state_of(*args), data_0=bytes(4096))


def _nested():
    content = {}
    content["state_dict"] = content
    return pickle.dumps(content)


_ZEROS_BY_COUNT = (
    b"\x80\2}X\1\0\0\0acnumpy.core.multiarray\n_reconstruct\n)R"
    b"(K\1J\0\0\0\x10\x85cnumpy\ndtype\nX\2\0\0\0f4\x85R\x89J\0\0\0\x40tbs."
)


def _shared(depth=60):
    """Pickles a tuple that has 2**depth leaves and takes 3 bytes a level."""
    return b"\x80\4)" + b"".join(b"\x94h" + bytes([level]) + b"\x86" for level in range(depth))


def _keyed(ending, start=b""):
    """Pickles a use of such a tuple, after `start`, by the opcodes of `ending`."""
    return b"\x80\4" + start + _shared()[2:] + ending + b"."


_BUILTIN = b"cbuiltins\n%b\n"
_HASHES = {
    "key": _keyed(b"K\1s", b"}"),
    "one of many keys": _keyed(b"K\1u", b"}("),
    "key of a new dictionary": _keyed(b"K\1d", b"("),
    "element": _keyed(b"\x90", b"\x8f("),
    "element of a frozen set": _keyed(b"\x91", b"("),
    "argument of set": _keyed(b"\x85\x85R", _BUILTIN % b"set"),
    "argument of frozenset": _keyed(b"\x85\x85R", _BUILTIN % b"frozenset"),
    "argument of dict": _keyed(b"K\1\x86\x85\x85R", _BUILTIN % b"dict"),
    "argument of OrderedDict": _keyed(b"K\1\x86\x85\x85R", b"ccollections\nOrderedDict\n"),
    "type of numbers": _keyed(b"\x85R", b"cnumpy\ndtype\n"),
    "type of a tensor": _keyed(b"tR", b"ctorch._utils\n_rebuild_tensor_v3\n(N" + b"K\0))NN"),
    "numbers of one hash": pickle.dumps({number * (2**61 - 1): 0 for number in range(2, 4)}),
}


@pytest.mark.parametrize("where", list(_HASHES))
def test_objects_that_take_long_to_hash_are_refused(tmp_path, where):
    (tmp_path / "x.pth").write_bytes(_HASHES[where])
    with pytest.raises(UserError, match=r"(too many parts|too large a number|without a name)"):
        read_arrays(tmp_path / "x.pth")


def test_ordinary_keys_and_sets_are_read(tmp_path):
    beside = {("a", 1): {1, (2, 3)}, 2**40: frozenset({"b"}), None: 1}
    for protocol in (2, 4):
        (tmp_path / "x.pth").write_bytes(pickle.dumps({"args": beside, "model": {"a": np.ones(2)}}, protocol))
        _assert_same(read_arrays(tmp_path / "x.pth"), {"a": np.ones(2)})


def _hostile():
    whole = (FOLDER / "checkpoint.pth.tar").read_bytes()
    legacy = (FOLDER / "legacy.ckpt").read_bytes()
    return {
        "a cut archive": whole[: len(whole) // 2],
        "a cut old file": legacy[:-4],
        "nothing but a magic number": b"\x80\x02.",
        "a deep pickle": b"\x80\x02" + b"(" * 100_000 + b"t" * 100_000 + b".",
        "a storage of another size": legacy.replace(struct.pack("<q", 6), struct.pack("<q", 2**40)),
        "HDF5 cut off": b"\x89HDF\r\n\x1a\n" + bytes(80),
        "shards": b'{"weight_map": {}}',
        "a pointer": b"version https://git-lfs.github.com/spec/v1\n",
        "a page": b"<!DOCTYPE html>",
        "a number": pickle.dumps(3),
        "a list": pickle.dumps([1, 2]),
        "an empty dict": pickle.dumps({}),
        "an array of objects": pickle.dumps({"a": np.array([{}], object)}),
        "zeros by their count": _ZEROS_BY_COUNT,
        "a checkpoint in itself": _nested(),
        "a large byteorder": _torch_file(b"\x80\2}.", byteorder=bytes(2**20)),
        "many views of one storage": _views(200, 1024),
        "a view beyond the storage": _views(1, 1000, 2),
        "a view from behind": _views(1, 10, -1, 20),
        "a view from before": _views(1, 10, 1, -5),
        "a number among arrays": pickle.dumps({"a": np.ones(2), "epoch": 3}),
    }


@pytest.mark.parametrize("kind", list(_hostile()))
def test_a_damaged_or_other_file_is_one_line(kind, tmp_path):
    (tmp_path / "x.pth").write_bytes(_hostile()[kind])
    with pytest.raises(UserError, match=r"x\.pth") as caught:
        read_arrays(tmp_path / "x.pth")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


def test_views_within_a_storage_are_read(tmp_path):
    (tmp_path / "x.pth").write_bytes(_views(2, 500, 2, 24))
    _assert_same(read_arrays(tmp_path / "x.pth"), {"0000": np.zeros(500), "0001": np.zeros(500)})


def test_a_large_memo_index_takes_no_memory(tmp_path):
    (tmp_path / "x.pth").write_bytes(b"\x80\2}r" + struct.pack("<I", 2**31) + b".")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match="holds no arrays"):
        read_arrays(tmp_path / "x.pth")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before + 2**16  # KiB


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ({"shape": (2**22,), "chunks": (2**20,), "dtype": "f4"}, "larger than the file"),
        ({"shape": (4,), "dtype": "u1", "external": [("other", 0, 4)]}, "lies in another file"),
        (h5py.ExternalLink("other.h5", "x"), "lies in another file"),
    ],
)
def test_a_keras_file_brings_its_own_numbers(tmp_path, monkeypatch, dataset, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other").write_bytes(b"0123")
    with h5py.File("other.h5", "w") as file:
        file["x"] = np.ones(4)
    with h5py.File("x.h5", "w") as file:
        group = file.create_group("layers/dense/vars")
        group.attrs["name"] = "conv1/conv"
        if isinstance(dataset, dict):
            group.create_dataset("0", **dataset)
        else:
            group["0"] = dataset
    with pytest.raises(UserError, match=message):
        read_arrays(tmp_path / "x.h5")


def test_other_archives_are_one_line(tmp_path):
    np.savez(tmp_path / "x.npz", a=np.ones(2))
    with pytest.raises(UserError, match="a zip archive without weights"):
        read_arrays(tmp_path / "x.npz")
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("x/data.pkl", b"")
        archive.writestr("x/constants.pkl", b"")
    with pytest.raises(UserError, match="a TorchScript program"):
        read_arrays(tmp_path / "x.pt")


def test_a_keras_archive_and_keras_2_s_layout_are_read(tmp_path):
    with h5py.File(tmp_path / "old.h5", "w") as file:
        file.attrs["layer_names"] = [b"conv1/conv", b"relu"]
        file.create_group("relu").attrs["weight_names"] = []
        file.create_group("conv1/conv").attrs["weight_names"] = [b"conv1/conv/kernel:0"]
        file["conv1/conv"]["conv1/conv/kernel:0"] = np.arange(6.0).reshape(1, 1, 2, 3)
    arrays = read_arrays(tmp_path / "old.h5")
    _assert_same(arrays, {"features.conv0.weight": np.arange(6.0).reshape(2, 3).T[:, :, None, None]})
    with h5py.File(tmp_path / "new.h5", "w") as file:
        file["layers/dense/vars/0"], file["layers/dense/vars/1"] = np.ones((3, 2)), np.ones(2)
    with pytest.raises(UserError, match="no named layers"):
        read_arrays(tmp_path / "new.h5")
    with h5py.File(tmp_path / "new.h5", "a") as file:
        file["layers/dense/vars"].attrs["name"] = "predictions"
    with zipfile.ZipFile(tmp_path / "x.keras", "w") as archive:
        archive.write(tmp_path / "new.h5", "model.weights.h5")
    _assert_same(
        read_arrays(tmp_path / "x.keras"), {"classifier.weight": np.ones((2, 3)), "classifier.bias": np.ones(2)}
    )


def test_float64_is_read_from_safetensors_and_float8_and_float6_are_refused(tmp_path):
    save_file({"a": np.linspace(0, 1, 3)}, tmp_path / "x.safetensors")
    _assert_same(read_arrays(tmp_path / "x.safetensors"), {"a": np.linspace(0, 1, 3)})
    for dtype, size in (("F8_E4M3", 4), ("F6_E2M3", 3)):
        header = json.dumps({"a": {"dtype": dtype, "shape": [4], "data_offsets": [0, size]}}).encode()
        (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(size))
        with pytest.raises(UserError, match=rf"holds {dtype} numbers \(a\)|not a file of weights"):
            read_arrays(tmp_path / "x.safetensors")
