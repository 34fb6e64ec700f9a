"""The operating points in torchxrayvision's files become the thresholds of predictions."""

import csv
import json
import re

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from densenet_jax.config import check_config, recipes
from densenet_jax.errors import UserError
from densenet_jax.export.graph import make_graph
from densenet_jax.models.dialects import thresholds_of
from densenet_jax.predict.model import make_deployed
from tests.main_in_process import run_here
from tests.models.test_dialects import THRESHOLDS, _write_state_dict

CHANGES = {
    "model.name": "densenet121",
    "model.growth_rate": 4,
    "model.block_sizes": (2, 1),
    "data.channels": 1,
    "data.mean": (0.5,),
    "data.std": (0.25,),  # torchxrayvision's own is 1/2048, with which drawn weights are sure of everything
    "data.image_size_px": 32,
}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A state dict as torchxrayvision has it, with 18 labels, two of them without a threshold."""
    path = tmp_path_factory.mktemp("xray") / "xray.safetensors"
    _write_state_dict(path, "torchxrayvision")
    return path


def settings(path):
    config = recipes.defaults()
    with config.ignore_type():
        config.update_from_flattened_dict({**CHANGES, "model.pretrained": str(path)})
    return check_config(config)


def op_norm(probabilities):
    """What torchxrayvision makes of them: the threshold at 0.5, and 0.5 where there is none."""
    low, high = probabilities / (2 * THRESHOLDS), 1 - (1 - probabilities) / (2 * (1 - THRESHOLDS))
    return np.where(np.isnan(THRESHOLDS), 0.5, np.where(probabilities < THRESHOLDS, low, high))


def test_predictions_are_decided_by_the_file_s_thresholds(weights, tmp_path, user):
    generator = np.random.default_rng(0)
    for number in range(4):
        Image.fromarray(generator.integers(0, 256, (40, 40)).astype(np.uint8)).save(tmp_path / f"{number}.png")
    flags = [f"--config.{key}={value}" for key, value in CHANGES.items()]
    flags += [f"--config.model.pretrained={weights}", f"--images={tmp_path}/*.png", f"--workdir={tmp_path / 'run'}"]
    _, errors = run_here("predict", "--config=configs/default.py", *flags, f"--output={tmp_path / 'x.jsonl'}", **user)
    assert "has operating points (op_threshs): each output is a label" in errors
    lines = [json.loads(line) for line in (tmp_path / "x.jsonl").read_text().splitlines()]
    seen = set()
    for line in lines:
        by_label = sorted(line["predictions"], key=lambda entry: entry["class_id"])
        probabilities = np.array([entry["probability"] for entry in by_label])
        normed = op_norm(probabilities)
        decided = np.array([entry["predicted"] for entry in by_label])
        np.testing.assert_array_equal(decided[:16], normed[:16] >= 0.5)
        np.testing.assert_array_equal(decided[16:], probabilities[16:] >= 0.5)
        seen |= set((decided != (probabilities >= 0.5)).tolist())
    assert (len(lines), seen) == (4, {True, False})  # 0.5 for all would be another answer
    run_here("predict", "--config=configs/default.py", *flags, f"--output={tmp_path / 'x.csv'}", **user)
    with open(tmp_path / "x.csv", newline="", encoding="utf-8") as file:
        assert [row["3_predicted"] for row in csv.DictReader(file)] == [
            str(entry["predicted"]).lower() for line in lines for entry in line["predictions"] if entry["class_id"] == 3
        ]


def test_exported_files_get_the_thresholds(weights):
    model = make_deployed(settings(weights), "")
    assert model.many_labels
    info = make_graph(model).info
    assert info["labels"] == "multi"
    assert json.loads(info["thresholds"]) == [*map(float, THRESHOLDS[:16]), None, None]


@pytest.mark.parametrize(
    ("thresholds", "why"), [(np.ones(17), "17 thresholds .* from 1 to 1; expected 18"), (np.full(18, -1.0), "from -1")]
)
def test_thresholds_that_don_t_fit_are_refused(weights, tmp_path, thresholds, why):
    path = tmp_path / "wrong.safetensors"
    save_file(load_file(weights) | {"op_threshs": thresholds}, path)
    with pytest.raises(UserError, match=re.escape(str(path)) + " has " + (why if "17" in why else f".*{why}")):
        make_deployed(settings(path), "")


def test_thresholds_are_found_behind_a_wrapper_s_prefix():
    assert thresholds_of({"module.op_threshs": np.array([[0.25, 0.5]])}) == (0.25, 0.5)
    assert thresholds_of({"features.conv0.weight": np.ones(1)}) == ()
