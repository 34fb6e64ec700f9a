"""Every setting meets twenty values that nobody should give: each is taken, or refused in one line."""

import json
import math

import ml_collections
import pytest

from configs import default
from densenet_jax.cli import parse
from densenet_jax.config import RULES, check_config, flatten, to_dict
from densenet_jax.errors import UserError
from densenet_jax.workdir import to_json

HOSTILE = (
    *("-1", "0", "1", "64.5", "1e400", "-1e400", "nan", "inf", "1e39", "99999999999999999999999"),
    *(
        "",
        "''",
        "None",
        "True",
        "x'y\"z",
        "(",
        "(1,",
        "('a', 1.0)",
        "[[1, 2], 'x']",
        "0.9",
        "((1, (2,)),)",
        "(nan, inf)",
    ),
)
KEYS = [key for key, _ in flatten(default.get_config())]


def test_every_setting_has_a_rule():
    assert set(KEYS) == RULES.keys()


@pytest.mark.parametrize("key", KEYS)
def test_a_hostile_value_is_taken_or_refused_in_one_line(key, monkeypatch):
    monkeypatch.setattr(ml_collections.ConfigDict, "__str__", lambda self: "")  # absl's flags print it, in slow YAML
    # Which lists all of the class's attributes for every setting of every recipe, to refuse their names.
    monkeypatch.setattr(ml_collections.ConfigDict, "_ensure_mutability", lambda self, attribute: None)
    for value in HOSTILE:
        message, checked = "", None
        try:
            checked = check_config(parse(["densenet-jax", "--config=digits", f"--config.{key}={value}"])[1])
        except UserError as error:
            message = str(error)
        if checked is None:
            assert "\n" not in message
            assert key.split(".")[-1] in message, value
        else:
            json.loads(to_json(to_dict(checked)), parse_constant=pytest.fail)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("optim.betas=0.9", r"config.optim.betas is \(0.9,\); expected two shares in \[0, 1\), such as \(0.9, 0.999\)"),
        ("optim.rate_multipliers=('^params', 0.1)", "config.optim.rate_multipliers is .* expected pairs with brackets"),
        ("optim.learning_rate=inf", "config.optim.learning_rate is inf; expected numbers that float32 can hold"),
        ("data.image_size_px=64.5", "config.data.image_size_px is '64.5'; expected a whole number."),
        ("augment.flip=maybe", "config.augment.flip is 'maybe'; expected True or False."),
        ("optim.name=sdg", "config.optim.name is 'sdg'; expected sgd, adamw, lamb or rmsprop."),
        ("data.crop_area=(1, 'a')", "config.data.crop_area is .* expected two shares"),
    ],
)
def test_the_message_names_what_is_expected(setting, message):
    with pytest.raises(UserError, match=message):
        check_config(parse(["densenet-jax", "--config=digits", f"--config.{setting}"])[1])


def test_json_has_no_numbers_that_the_standard_lacks():
    text = to_json({"loss": math.nan, "rates": [math.inf, 1.5], "inner": {"top1": -math.inf}})
    assert json.loads(text, parse_constant=pytest.fail) == {
        "loss": None,
        "rates": [None, 1.5],
        "inner": {"top1": None},
    }
