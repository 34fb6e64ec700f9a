"""Settings: every key is read, every mistake is one clear sentence."""

import ast
import importlib
import json
import operator
import pathlib

import ml_collections
import pytest

from configs import default
from densenet_jax.cli import explain_flag_error
from densenet_jax.config import check_config, flatten, to_dict
from densenet_jax.config.run_settings import differences
from densenet_jax.errors import UserError
from densenet_jax.workdir import claim_workdir

ROOT = pathlib.Path(__file__).parent.parent
RECIPES = sorted(path.stem for path in (ROOT / "configs").glob("*.py") if path.stem not in ("__init__", "default"))


def keys_read_in_code() -> set[str]:
    """Every `config.section.key` that stands in the package."""
    sections = {key for key, _ in default.get_config().items()}
    read = set()
    for path in (ROOT / "densenet_jax").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            parts = []
            while isinstance(node, ast.Attribute):
                parts.append(node.attr)
                node = node.value
            parts.append(node.id if isinstance(node, ast.Name) else "")
            parts = parts[::-1]
            if "config" in parts and (rest := parts[parts.index("config") + 1 :]) and rest[0] in sections:
                read.add(".".join(rest[:2]))
    return read


def test_every_key_is_read_and_every_read_key_exists():
    known = {key for key, _ in flatten(default.get_config())}
    read = {key for key in keys_read_in_code() if "." in key or key in ("profile", "seed")}
    assert known - read == set(), "keys that nothing reads"
    assert read - known == set(), "keys that no config has"


def test_every_key_has_a_comment():
    uncommented = [
        line.strip()
        for line in (ROOT / "configs/default.py").read_text().splitlines()
        if " = " in line and "ConfigDict" not in line and "#" not in line
    ]
    assert uncommented == []


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_is_a_valid_short_diff_with_its_command(name):
    module = importlib.import_module(f"configs.{name}")
    config = check_config(module.get_config())
    assert {key for key, _ in flatten(config)} == {key for key, _ in flatten(default.get_config())}
    assert f"python main.py --config configs/{name}.py" in module.__doc__


def test_default_values_pass_their_own_check():
    check_config(default.get_config())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("train.global_batch_size", 0),
        ("train.epochs", -1.0),
        ("data.crop_area", (0.5, 0.1)),
        ("model.dtype", "float8"),
        ("eval.checkpoint", "newest"),
        ("optim.learning_rate", 0.0),
        ("optim.freeze", "("),
        ("optim.name", "adam"),
        ("optim.schedule", "linear"),
        ("optim.cycle_multiplier", 0.5),
        ("optim.cycle_decay", 0.0),
        ("optim.rise_fraction", 1.0),
        ("optim.start_divisor", 0.5),
        ("optim.rate_multipliers", (("(", 1.0),)),
    ],
)
def test_value_out_of_range_names_key_value_and_expectation(key, value):
    config = default.get_config()
    config.update_from_flattened_dict({key: value})
    with pytest.raises(UserError, match=f"config.{key} is .*expected") as caught:
        check_config(config)
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("config.optim.learing_rate", "config.optim.learning_rate"),
        ("config.learning_rate", "config.optim.learning_rate"),
        ("config.optm.learning_rate", "config.optim.learning_rate"),
        ("config.train.batch_size", "config.eval.batch_size"),
    ],
)
def test_misspelt_key_is_reported_with_the_nearest(wrong, right):
    config = default.get_config()
    with pytest.raises((AttributeError, KeyError)) as caught:
        operator.attrgetter(wrong.removeprefix("config."))(config)
    said = explain_flag_error(caught.value, ["main.py", f"--{wrong}=1"], config)
    assert said == f"{wrong} is not a setting; the nearest is {right}."


def test_misspelt_key_in_a_recipe_is_reported_with_the_nearest():
    config = default.get_config()
    with pytest.raises(AttributeError) as caught:
        config.data.crop_aera = (0.1, 1.0)
    said = explain_flag_error(caught.value, ["main.py"], config)
    assert "crop_aera" in said
    assert "config.data.crop_area" in said


def frozen(**changes: object) -> ml_collections.FrozenConfigDict:
    config = default.get_config()
    config.update_from_flattened_dict(changes)
    return check_config(config)


DEFAULTS = to_dict(default.get_config())


def test_workdir_of_another_run_is_refused_and_left_alone(tmp_path):
    claim_workdir(str(tmp_path), frozen(), DEFAULTS)
    (tmp_path / "checkpoints" / "5").mkdir(parents=True)
    before = (tmp_path / "config.json").read_bytes()
    with pytest.raises(UserError, match=r"config.optim.learning_rate: 0.1 -> 0.2"):
        claim_workdir(str(tmp_path), frozen(**{"optim.learning_rate": 0.2}), DEFAULTS)
    assert (tmp_path / "config.json").read_bytes() == before


def test_workdir_without_a_checkpoint_is_taken_over(tmp_path, capsys):
    claim_workdir(str(tmp_path), frozen(), DEFAULTS)
    claim_workdir(str(tmp_path), frozen(**{"optim.learning_rate": 0.2}), DEFAULTS)
    assert json.loads((tmp_path / "config.json").read_text())["optim"]["learning_rate"] == 0.2
    assert "has no finished checkpoint and is started anew" in capsys.readouterr().err


def test_settings_that_do_not_change_the_run_may_differ(tmp_path):
    claim_workdir(str(tmp_path), frozen(), DEFAULTS)
    claim_workdir(str(tmp_path), frozen(**{"checkpoint.max_to_keep": 3}), DEFAULTS)
    assert json.loads((tmp_path / "config.json").read_text())["checkpoint"]["max_to_keep"] == 3


def test_setting_that_an_older_run_does_not_know_had_its_default(tmp_path):
    older = to_dict(frozen())
    del older["augment"]["repeats"], older["eval"]
    (tmp_path / "config.json").write_text(json.dumps(older))
    (tmp_path / "checkpoints" / "5").mkdir(parents=True)
    with pytest.raises(UserError, match=r"\(config.augment.repeats: 1 -> 2\)"):
        claim_workdir(str(tmp_path), frozen(**{"augment.repeats": 2}), DEFAULTS)
    claim_workdir(str(tmp_path), frozen(), DEFAULTS)
    assert json.loads((tmp_path / "config.json").read_text()) == to_dict(frozen())


def test_unreadable_config_json_is_a_users_error(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config.json can't be read"):
        claim_workdir(str(tmp_path), frozen(), DEFAULTS)


def test_differences_of_equal_settings_are_none():
    assert differences(to_dict(frozen()), to_dict(frozen())) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"data.labels": "multi", "train.loss": "softmax"},
            "train.loss is 'softmax', which .*single, .*'multi'",
        ),
        ({"train.loss": "focal"}, "train.loss is 'focal', .*'single'; expected softmax or binary, or empty"),
        ({"data.labels": "multi", "eval.class_map": "present"}, "eval.class_map is 'present', .*one class an image"),
        ({"train.class_weights": (1, 0, 2)}, r"train.class_weights is \(1, 0, 2\); expected none, balanced or one num"),
        ({"train.class_weights": 2.0}, "train.class_weights is 2.0"),
        ({"train.class_weights": "even"}, "train.class_weights is 'even'"),
        ({"train.loss_gammas": (1.0,)}, "train.loss_gammas .*two powers"),
    ],
)
def test_settings_of_labels_fit_together(changes, message):
    with pytest.raises(UserError, match=message):
        frozen(**changes)
    for weights in ("balanced", (1, 2.5), "1, 2.5"):
        frozen(**{"data.labels": "multi", "train.loss": "asymmetric", "train.class_weights": weights})
