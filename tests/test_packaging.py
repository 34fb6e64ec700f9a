"""What pip installs may be any version in a range; the requirements files pin the one that was tested."""

import pathlib
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.main_processes import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# The files of extras; "compiler" has none, since it is tested where it is installed.
EXTRAS = {name: lines for name, lines in PROJECT["optional-dependencies"].items() if name != "compiler"}
FILES = {path.stem.removeprefix("requirements-"): path for path in ROOT.glob("requirements-*.txt")}


def lines_of(path: pathlib.Path) -> list[str]:
    return [line for line in path.read_text().splitlines() if line and not line.startswith("#")]


def assert_pins_within(pins: list[str], ranges: list[str]) -> None:
    """Every package has one exact pin, which its range allows."""
    pinned, allowed = (
        {canonicalize_name(each.name): each for each in map(Requirement, lines)} for lines in (pins, ranges)
    )
    assert pinned.keys() == allowed.keys() - {"jaxlib", "tensorstore"} | pinned.keys() & {"jaxlib", "tensorstore"}
    for name, pin in pinned.items():
        (exact,) = pin.specifier
        assert exact.operator == "==", pin
        if name in allowed:
            assert allowed[name].specifier.contains(exact.version), f"{pin} is outside of {allowed[name]}"
            assert not any(each.operator == "==" for each in allowed[name].specifier)


@pytest.mark.parametrize("name", sorted((FILES.keys() - {"dev"}) | EXTRAS.keys()))
def test_an_extra_allows_the_pins_of_its_requirements_file(name):
    first, *pins = lines_of(FILES[name])
    assert first == "-r requirements.txt"
    assert_pins_within(pins, EXTRAS[name])


def test_the_dependencies_allow_the_pins_of_the_requirements_file():
    """jaxlib and tensorstore come with jax and Orbax, whose versions decide theirs."""
    assert_pins_within(lines_of(ROOT / "requirements.txt"), PROJECT["dependencies"])
