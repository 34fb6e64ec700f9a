"""What the documentation names exists, and what it marks as runnable runs.

A fenced bash block that follows the line `<!-- runnable -->` in README.md or docs/*.md is run in a copy of the
checkout, in which the digits train a small network for 4 epochs by default. It counts as slow where it calls main.py
for more than its help, or where the line says `<!-- runnable: slow -->`. All blocks share the copy and run in the order
of their pages, so that a run that several pages begin with, such as runs/digits, is trained for the first of them.
"""

import ast
import os
import pathlib
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from typing import NamedTuple

import pytest

from configs import default
from densenet_jax.choices import OPTIMIZERS, SCHEDULES
from densenet_jax.cli import parse
from densenet_jax.config import check_config, flatten
from densenet_jax.flags import MODES
from densenet_jax.models.variants import VARIANTS
from tests.main_processes import ROOT, make_environment, run_main
from tests.small_checkout import copy_checkout

PAGES = [path for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if path.exists()]
RECIPES = sorted(path.stem for path in (ROOT / "configs").glob("*.py") if path.stem not in ("__init__", "default"))
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())

SETTING = re.compile(r"(?<![\w./])config\.([a-z_]+(?:\.[a-z_]+)*)")
FILES_CALLED_CONFIG = ("json", "py")
MODE = re.compile(r"--mode[ =]([a-z_]+)")
RECIPE = re.compile(r"configs/([a-z]\w*)\.py")
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")
IMAGE = re.compile(r"!\[[^\]]*\]\(([^)\s]+)\)")
IN_BACKTICKS = re.compile(r"`([^`\n]+)`")
PROJECT_FILE = re.compile(r"[\w.-]+(?:/[\w.-]+)+\.(?:c|cfg|ipynb|md|npz|py|sh|toml|txt|ya?ml)")
COMMAND = re.compile(r"\b(?:python main\.py|densenet-jax) ([^`\n&|;]*)")
STANDS_FOR_SOMETHING = re.compile(r"\b(?:NAME|MODE|KEY|VALUE|CONFIG)\b|\.\.\.")
CITED_TEST = re.compile(r"(tests/[\w/]+\.py)::(\w+)")
# Where a run or a user keeps files, which no checkout holds.
NOT_IN_THE_CHECKOUT = ("runs/", "./runs/", "checkpoints/", "report/")

RUNNABLE = re.compile(r"^<!-- runnable(: slow)? -->\n+```bash\n(.*?)^```$", re.MULTILINE | re.DOTALL)

# A command that is nothing but a call of main.py, with the lines that it goes on in; a shell would change none of it.
MAIN = re.compile(r"^(python main\.py (?:[^\n$*?~|&;<>`\\]|'[^'\n]*'|\\\n)*\n)", re.MULTILINE)


class Block(NamedTuple):
    """A block of commands that is marked as runnable."""

    page: pathlib.Path
    line: int
    commands: str
    slow: bool


def settings_of(text: str) -> set[str]:
    """Every "section.key" that stands in `text` as config.section.key."""
    return {name for name in SETTING.findall(text) if name not in FILES_CALLED_CONFIG}


def anchors_of(text: str) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def blocks_of(page: pathlib.Path, text: str) -> Iterator[Block]:
    """The runnable blocks of a page, in its order."""
    for match in RUNNABLE.finditer(text):
        commands = match.group(2)
        whole_lines = commands.replace("\\\n", " ").splitlines()
        trains = any("main.py" in line and "--help" not in line for line in whole_lines)
        yield Block(page, text[: match.start(2)].count("\n") + 1, commands, bool(match.group(1)) or trains)


def split_commands(commands: str) -> Iterator[tuple[str, list[str]]]:
    """The commands for a shell, or the arguments of one call of main.py, which needs no new interpreter."""
    for part in MAIN.split(commands):
        if MAIN.fullmatch(part) and "--help" not in part:
            yield part, shlex.split(part.replace("\\\n", " "))[2:]
        elif part.strip():
            yield part, []


BLOCKS = [block for page in PAGES for block in blocks_of(page, page.read_text())]


def test_there_are_pages_and_quick_blocks():
    assert {page.name for page in PAGES} >= {"architecture.md", "migration.md", "recipes.md", "reliability.md"}
    assert any(not block.slow for block in BLOCKS)


@each_page
def test_every_setting_exists(page):
    known = {key for key, _ in flatten(default.get_config())}
    sections = {key.split(".")[0] for key in known}
    assert settings_of(page.read_text()) - known - sections == set()


@each_page
def test_every_mode_exists(page):
    assert set(MODE.findall(page.read_text())) - MODES.keys() == set()


@each_page
def test_every_recipe_exists(page):
    assert set(RECIPE.findall(page.read_text())) - {*RECIPES, "default"} == set()


@each_page
def test_every_command_is_accepted(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    for command in COMMAND.findall(page.read_text().replace("\\\n", " ")):
        words = shlex.split(command)
        if STANDS_FOR_SOMETHING.search(command) or "--help" in words:
            continue
        made, config = parse(["main.py", *words])
        made.check_mode()
        assert check_config(config).model.name in VARIANTS


@each_page
def test_every_link_leads_somewhere(page):
    text = page.read_text()
    broken = []
    for target in LINK.findall(text) + IMAGE.findall(text):
        path, _, anchor = target.partition("#")
        if re.match(r"[a-z]+:", path):
            continue
        file = page.parent / path if path else page
        if not file.exists() or (anchor and anchor not in anchors_of(file.read_text())):
            broken.append(target)
    assert broken == []


def is_pattern(path: str) -> bool:
    """Whether a part of the path is in capitals and stands for something, as NAME in configs/NAME.py."""
    return any(part.partition(".")[0].isupper() for part in path.split("/"))


@each_page
def test_every_file_exists(page):
    named = {
        path
        for quoted in IN_BACKTICKS.findall(page.read_text())
        for path in PROJECT_FILE.findall(quoted.split("::")[0])
        if "://" not in quoted and not path.startswith(NOT_IN_THE_CHECKOUT) and not is_pattern(path)
    }
    assert {path for path in named if not (ROOT / path).exists() and not (page.parent / path).exists()} == set()


@each_page
def test_every_cited_test_exists(page):
    cited = CITED_TEST.findall(page.read_text())
    if page.name == "reliability.md":
        assert cited
    assert [f"{file}::{name}" for file, name in cited if name not in functions_of(ROOT / file)] == []


def functions_of(path: pathlib.Path) -> set[str]:
    """Names of the functions of a test file; none where there is no such file."""
    if not path.exists():
        return set()
    return {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)}


# Names that users rely on. They exist and are described; an addition needs no edit here.
PROMISED_RECIPES = {
    *("densenet121", "densenet121_cosine", "densenet121_paper", "densenet121_piecewise", "densenet161"),
    *("densenet161_large_batch", "densenet169", "densenet201", "densenet264", "densenet264_lean", "densenetblur121d"),
    *("digits", "digits_augmented", "dpn", "finetune", "imagenet_a", "imagenet_r", "imagenet_real", "imagenet_v2"),
    *("modern", "paper_small"),
}
PROMISED_NAMES = {
    *("constant", "multistep", "cosine", "exponential", "cosine_restarts", "one_cycle"),
    *("sgd", "adamw", "lamb", "rmsprop"),
}


def test_promised_recipes_schedules_and_optimizers_exist_and_are_described():
    text = (ROOT / "docs/recipes.md").read_text()
    assert PROMISED_RECIPES - {*RECIPES} == set()
    assert PROMISED_NAMES - {*SCHEDULES, *OPTIMIZERS} == set()
    assert {name for name in PROMISED_RECIPES if f"configs/{name}.py" not in text} == set()
    assert {name for name in PROMISED_NAMES if f"`{name}`" not in text} == set()


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_states_its_command_and_result(name):
    head = ast.get_docstring(ast.parse((ROOT / f"configs/{name}.py").read_text())) or ""
    assert re.search(rf"--config (configs/)?{name}\b", head), "its docstring has no command"
    assert re.search(r"[Ee]xpected|[Nn]ot reproduced", head), "its docstring has no expected result"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> pathlib.Path:
    """The copy of the checkout in which the blocks run."""
    return copy_checkout(tmp_path_factory.mktemp("docs") / "checkout")


@pytest.fixture(scope="module")
def python_first(tmp_path_factory) -> str:
    """A PATH on which `python` is the interpreter of this test."""
    directory = tmp_path_factory.mktemp("bin")
    script = directory / "python"
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    script.chmod(0o755)
    return f"{directory}{os.pathsep}{os.environ['PATH']}"


@pytest.mark.parametrize(
    "block",
    [pytest.param(block, marks=[pytest.mark.slow] if block.slow else []) for block in BLOCKS],
    ids=lambda block: f"{block.page.relative_to(ROOT).as_posix()}:{block.line}",
)
def test_runnable_block_runs(block, checkout, python_first, user):
    for commands, arguments in split_commands(block.commands):
        if arguments:
            run_main(*arguments, folder=checkout, **user)
            continue
        result = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", commands],
            cwd=checkout,
            env=make_environment(PATH=python_first, **user),
            capture_output=True,
            text=True,
            timeout=1800 if block.slow else 120,
            check=False,
        )
        assert result.returncode == 0, f"{commands}\n{result.stdout}\n{result.stderr}"


MARKED = """
<!-- runnable -->
```bash
python main.py --help
```

<!-- runnable -->

```bash
python main.py \\
  --mode eval
```

<!-- runnable: slow -->
```bash
echo 1
```

```bash
false
```
"""


def test_blocks_are_found_by_their_mark():
    actual = [(block.line, block.commands.split()[0], block.slow) for block in blocks_of(ROOT / "x.md", MARKED)]
    assert actual == [(4, "python", False), (10, "python", True), (16, "echo", True)]
    assert "false" not in "".join(block.commands for block in blocks_of(ROOT / "x.md", MARKED))


def test_only_plain_calls_of_main_need_no_shell():
    text = "echo a\npython main.py eval \\\n  --images 'a*.png'\npython main.py a $HOME\npython main.py --help\n"
    shell, call, *others = split_commands(text)
    assert (shell[1], call[1]) == ([], ["eval", "--images", "a*.png"])
    assert [arguments for _, arguments in others] == [[], []]
    calls = [call for block in BLOCKS for call in split_commands(block.commands) if call[1]]
    assert len(calls) >= 10


def test_settings_are_found_in_prose_and_commands():
    text = "`config.optim.name`, --config.seed=1, config.json, densenet_jax.config.check_config, (`config.augment.*`)"
    assert settings_of(text) == {"optim.name", "seed", "augment"}
