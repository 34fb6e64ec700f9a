"""The command line's words, in this process: recipes by name, a mistake as one line, help."""

import contextlib
import pathlib
import subprocess
import sys

import pytest

from densenet_jax import cli, modes
from densenet_jax.__main__ import help_or_version
from densenet_jax.cli import parse
from densenet_jax.config import recipes
from densenet_jax.flags import MODES, Command
from densenet_jax.version import __version__
from tests.main_in_process import run_here
from tests.main_processes import ROOT, run_main


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--config.optim.learing_rate=1"],
            "config.optim.learing_rate is not a setting; the nearest is config.optim.learning_rate.",
        ),
        (["--config.optim.lr=1"], "config.optim.lr is not a setting; the nearest is config.optim.learning_rate."),
        (["--lr=1"], "--lr is not a flag; the nearest is --config.optim.learning_rate=VALUE."),
        (["--epochs", "3"], "--epochs is not a flag; the nearest is --config.train.epochs=VALUE."),
        (["--confg=x"], "--confg is not a flag; the nearest is --config."),
        (["--toppk=3"], "--toppk is not a flag; the nearest is --topk."),
        (["--config.optim.learning_rate=fast"], "config.optim.learning_rate is 'fast'; expected a number."),
        (["--config=configs/nothing.py"], "--config configs/nothing.py: there is no such recipe or file"),
        (["--config=digts"], "--config digts: there is no such recipe or file; the nearest is digits,"),
        (["--mode=trian"], "trian"),
        (["trian"], "trian is not a flag; the nearest mode is train."),
        (["digits"], "digits is not a flag; a recipe is given as --config digits."),
        (["--mode=predict", "photos"], "photos is not a flag; images are given as --images photos."),
        (["serve", "--port=80800"], "--port is '80800'; expected a whole number from 0 to 65535."),
        (["calibrate", "--specificity=2"], "--specificity is '2'; expected a number from 0 to 1."),
        (["--nosuch"], "--nosuch is not a flag; --help lists them, and configs/default.py the settings."),
        (["--config.eval=3"], "config.eval is a section of settings, not one;"),
        (["--topk"], "there is no value after --topk"),
        (["--config.data.name=foldr"], "did you mean config.data.name=folder?"),
        (["--config=LICENSE"], "--config LICENSE is not a Python file (.py)"),
        (["oops"], "oops is not a flag; settings are given as --config.KEY=VALUE."),
        (["--topk=3"], "--topk 3 is for --mode predict, but --mode is train; leave it out."),
        (["--config.model.name=densenet122"], "densenet121"),
        (["--config.model.num_classes=11"], "config.model.num_classes is 11, but digits has 10 classes"),
        (["--config.train.global_batch_size=0"], "config.train.global_batch_size is 0; expected a whole number from 1"),
        (["--mode=eval"], "has no checkpoints"),
        (["--config.data.name=nowhere"], "nowhere"),
    ],
)
def test_a_mistake_is_one_clear_line(arguments, message, user, tmp_path):
    given = arguments if "--config=" in arguments[0] else [*arguments, "--config=digits"]
    output, errors = run_here(f"--workdir={tmp_path / 'run'}", *given, expect=2, **user)
    assert output == ""
    (line,) = errors.splitlines()
    assert line.startswith("error: ")
    assert message in line


def test_a_recipe_that_is_not_python_or_has_unknown_settings_is_one_line(tmp_path):
    recipe = tmp_path / "mine.py"
    for text, message in (
        ("def get_config(:\n", "is not Python: invalid syntax in line 1"),
        ("x = 1\n", "has no function get_config()"),
        (
            "from configs import default\ndef get_config():\n c = default.get_config()\n c.data.sice = 1\n return c\n",
            "the recipe sets or reads sice, which is not a setting",
        ),
    ):
        recipe.write_text(text)
        _, errors = run_here("--config", str(recipe), "parameters", expect=2)
        assert message in errors
        assert len(errors.splitlines()) == 1


@pytest.mark.parametrize("recipe", ["finetune:digits", "configs/finetune.py:digits", "finetune.py:digits"])
def test_shipped_recipes_are_found_from_any_directory(recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for words in (["--config.seed=4", "--config", recipe], [f"--config={recipe}", "--config.seed=4"]):
        command, config = parse(["densenet-jax", "eval", *words])
        assert (config.data.name, config.seed, command.recipe, command.mode) == ("digits", 4, recipe, "eval")
        assert command.overrides == {"seed": 4}
        assert command.workdir == "runs/finetune"


def test_a_recipe_of_the_users_own_wins_over_a_shipped_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pathlib.Path("digits.py").write_text(
        "from configs import default\ndef get_config():\n    return default.get_config()\n"
    )
    assert parse(["densenet-jax", "--config", "digits.py"])[1].data.name == "imagenet2012"
    assert parse(["densenet-jax", "--config", "digits"])[1].data.name == "digits"


def test_a_work_directory_brings_its_own_settings(digits):
    workdir, experiment = digits
    command, config = parse(["densenet-jax", "eval", f"--workdir={workdir}", "--config.seed=7", "--checkpoint=best"])
    assert config.train.global_batch_size == 16
    assert config.data.dir == experiment.config.data.dir
    assert (config.seed, config.eval.checkpoint) == (7, "best")
    assert "--config " not in command.line(str(workdir), "eval")


def test_help_names_modes_flags_recipes_and_models():
    text = help_or_version(["--help"])
    for word in (*MODES, *(f"--{flag.name}" for flag in Command.flags()), *recipes.names(), "densenet264d"):
        assert word in text
    assert max(map(len, text.splitlines())) <= 80
    one = help_or_version(["predict", "--help"])
    assert "--topk" in one
    assert "--topology" not in one
    assert help_or_version(["--version"]) == f"densenet_jax {__version__}"
    assert help_or_version(["train"]) == ""


@pytest.mark.parametrize("mode", MODES)
def test_the_example_of_each_mode_is_accepted(mode):
    command, _ = parse(["densenet-jax", *MODES[mode].example.replace("'", "").split()])
    command.check_mode()
    assert command.mode == mode


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("data.table=x.csv", "config.data.table is for config.data.name=table, but that is 'digits'; leave it out"),
        ("data.class_order=natural", "config.data.class_order is for config.data.name=folder or table, but"),
        ("data.mean=(0.1,0.2)", "config.data.mean has 2 numbers (0.1, 0.2), but config.data.channels is 1; give one"),
    ],
)
def test_a_setting_that_the_data_set_does_not_take_is_refused(setting, message, capsys):
    assert cli.check(["densenet-jax", "--config=digits", f"--config.{setting}"]) is None
    assert capsys.readouterr().err.startswith(f"error: {message}")


def test_a_lost_standard_output_fails_no_finished_mode(monkeypatch):
    monkeypatch.setattr(modes, "run", lambda *_: {"mode": "train", "loss": float("nan")})
    with open("/dev/full", "w", encoding="utf-8") as full, contextlib.redirect_stdout(full):
        assert cli.main(["densenet-jax", "--config=digits"]) == 0
        full.write("what comes later is dropped, too")


@pytest.mark.parametrize(
    ("redirected", "status"), [(">/dev/full", 2), (">&-", 0), ("| true", 0), ("| head -n 1 >/dev/null", 0)]
)
def test_help_ends_without_a_traceback_where_nobody_reads_it(redirected, status):
    command = f'"{sys.executable}" main.py --help {redirected}'
    result = subprocess.run(["bash", "-o", "pipefail", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == status
    full = "error: standard output can't be written: No space left on device\n"
    assert result.stderr == (full if status else "")


def test_every_mode_has_a_function():
    assert modes.FUNCTIONS.keys() == MODES.keys()


def test_the_program_ends_as_its_mode_does():
    """One real process, for what only the entry point does."""
    output, errors = run_main("parameters", "--config=digits", "--config.model.name=densenet122", expect=2)
    assert output == ""
    assert errors.startswith("error: unknown model 'densenet122'")
    assert run_main("--version")[0] == f"densenet_jax {__version__}\n"
