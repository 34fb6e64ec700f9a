"""What pip installs with an extra is what the extra's requirements file has."""

import pathlib
import tomllib

import pytest

from tests.running import ROOT

EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
FILES = {path.stem.removeprefix("requirements-"): path for path in ROOT.glob("requirements-*.txt")}


def lines_of(path: pathlib.Path) -> list[str]:
    return [line for line in path.read_text().splitlines() if line and not line.startswith("#")]


@pytest.mark.parametrize("name", sorted((FILES.keys() - {"dev"}) | EXTRAS.keys()))
def test_an_extra_is_its_requirements_file(name):
    first, *pins = lines_of(FILES[name])
    assert first == "-r requirements.txt"
    assert pins == EXTRAS[name]
    assert all("==" in pin for pin in pins)
