"""Weights from the hub's cache, from files whole and hostile, and back into files."""

import json
import logging
import struct
import sys

import huggingface_hub
import huggingface_hub.constants
import huggingface_hub.errors
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from densenet_jax.errors import UserError
from densenet_jax.models.pretrained import load_pretrained, read_state_dict, save_torch_state_dict
from densenet_jax.models.torch_weights import to_torch
from tests.models import golden

BASE, ARCHITECTURE = golden.SMALL_MODELS["small_densenet"]


@pytest.fixture(scope="module")
def variables():
    return golden.drawn_variables("small_densenet")


@pytest.fixture(scope="module")
def weights(variables, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "small.safetensors"
    save_torch_state_dict(variables, path)
    return path


def _load(source, num_classes=None, **options):
    return load_pretrained(BASE, source, num_classes, **ARCHITECTURE, **options)


def _assert_same(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_a_saved_file_loads_as_it_was(variables, weights):
    _assert_same(_load(weights), variables)
    assert {path.name for path in weights.parent.iterdir()} == {"small.safetensors"}


def test_another_class_count_keeps_the_body_and_says_so(variables, weights, caplog):
    with caplog.at_level(logging.WARNING):
        actual = _load(weights, num_classes=4)
    assert "has 10 classes, not 4" in caplog.text
    assert actual["params"].pop("classifier")["kernel"].shape[1] == 4
    body = {key: value for key, value in variables["params"].items() if key != "classifier"}
    _assert_same(actual, {"params": body, "batch_stats": variables["batch_stats"]})


def test_the_same_class_count_keeps_the_head_silently(variables, weights, caplog):
    _assert_same(_load(weights, num_classes=10), variables)
    assert not caplog.records


def test_a_new_head_does_not_hide_a_damaged_body(variables, tmp_path):
    state = to_torch(variables)
    del state["features.conv0.weight"]
    save_file(state, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=r"missing features.conv0.weight"):
        _load(tmp_path / "x.safetensors", num_classes=4)


def test_weights_of_another_variant_are_refused(weights):
    with pytest.raises(UserError, match=r"features.conv0.weight is \[16, 3, 7, 7\], expected \[64, 3, 7, 7\]"):
        load_pretrained("densenet121", weights)


def test_half_precision_is_widened(variables, tmp_path):
    state = {key: value.astype(np.float16) for key, value in to_torch(variables).items() if "num" not in key}
    save_file(state, tmp_path / "half.safetensors")
    loaded = _load(tmp_path / "half.safetensors")
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded)} == {np.dtype(np.float32)}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6), loaded, variables)


def _hostile_files(whole):
    header_size = struct.unpack("<Q", whole[:8])[0]
    header = json.loads(whole[8 : 8 + header_size])
    far = dict(header)
    key = next(key for key in header if key != "__metadata__")
    far[key] = header[key] | {"data_offsets": [0, 2**40]}
    far = json.dumps(far).encode()
    return {
        "empty": b"",
        "text": b"hello, this is not a file of weights at all",
        "huge header": struct.pack("<Q", 2**62) + whole[8:],
        "broken header": whole[:8] + b"x" * header_size + whole[8 + header_size :],
        "truncated": whole[: len(whole) // 2],
        "offsets beyond the end": struct.pack("<Q", len(far)) + far + whole[8 + header_size :],
        "wrong type": whole.replace(b'"F32"', b'"I32"'),
        "unknown type": whole.replace(b'"F32"', b'"F99"'),
    }


@pytest.mark.parametrize(
    "kind",
    [
        "empty",
        "text",
        "huge header",
        "broken header",
        "truncated",
        "offsets beyond the end",
        "wrong type",
        "unknown type",
    ],
)
def test_a_hostile_file_is_a_users_error(kind, weights, tmp_path):
    path = tmp_path / "hostile.safetensors"
    path.write_bytes(_hostile_files(weights.read_bytes())[kind])
    with pytest.raises(UserError, match=r"hostile\.safetensors"):
        _load(path)


def test_nothing_at_the_source():
    with pytest.raises(UserError, match=r"no weights at '/nowhere/x\.safetensors'"):
        _load("/nowhere/x.safetensors")


def test_real_torch_files(variables, tmp_path):
    torch = pytest.importorskip("torch")
    save_torch_state_dict(variables, tmp_path / "small.pth")
    state = torch.load(tmp_path / "small.pth", weights_only=True)
    np.testing.assert_array_equal(state["features.norm0.weight"], variables["params"]["norm0"]["scale"])
    _assert_same(_load(tmp_path / "small.pth"), variables)


def test_the_ending_of_a_saved_file_decides(variables, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    for ending in (".pth", ".pt", ".bin", ".pth.tar"):
        with pytest.raises(UserError, match=r"torch is not installed; install torch, or give a \.safetensors"):
            save_torch_state_dict(variables, tmp_path / f"x{ending}")
    for name in ("x", "x.h5", "x.tar", "x.safetensors.txt"):
        with pytest.raises(UserError, match=r"expected an ending of \.safetensors, \.pth"):
            save_torch_state_dict(variables, tmp_path / name)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def hub_cache(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path


def test_a_hub_id_is_found_in_the_cache_offline(hub_cache, variables, weights):
    repository = hub_cache / "models--timm--small.ra_in1k"
    commit = "0123456789abcdef0123456789abcdef01234567"
    (repository / "snapshots" / commit).mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots" / commit / "model.safetensors").write_bytes(weights.read_bytes())
    _assert_same(_load("timm/small.ra_in1k"), variables)
    _assert_same(_load(f"timm/small.ra_in1k@{commit}"), variables)


def test_a_hub_id_that_cannot_be_reached_says_so(hub_cache):
    with pytest.raises(UserError, match="not in the hub's cache"):
        _load("timm/densenet121.ra_in1k")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (huggingface_hub.errors.EntryNotFoundError("x"), r"none of model\.safetensors, pytorch_model\.bin"),
        (ConnectionError("no route to host\ndetails"), "no route to host;"),
    ],
)
def test_the_hub_s_answers_become_users_errors(monkeypatch, error, message):
    def download(*_, **__):
        raise error

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(UserError, match=message):
        read_state_dict("timm/densenet121.ra_in1k")


def test_our_own_faults_are_not_hidden_as_network_errors(monkeypatch):
    def download(*_, **__):
        raise AttributeError("a bug")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(AttributeError):
        read_state_dict("timm/densenet121.ra_in1k")


def test_saving_checks_the_named_variant(variables, tmp_path):
    with pytest.raises(UserError, match=r"do not fit densenet121: .*conv0"):
        save_torch_state_dict(variables, tmp_path / "x.safetensors", "densenet121")
    assert not list(tmp_path.iterdir())


def test_saving_where_one_may_not_write(variables, tmp_path):
    with pytest.raises(UserError, match="cannot write"):
        save_torch_state_dict(variables, tmp_path / "no" / "such" / "x.safetensors")


def test_a_saved_file_says_that_it_is_pytorch_s(weights):
    size = struct.unpack("<Q", weights.read_bytes()[:8])[0]
    assert json.loads(weights.read_bytes()[8 : 8 + size])["__metadata__"] == {"format": "pt"}
    assert load_file(weights)["features.norm0.num_batches_tracked"] == 0
