"""The site is built without a warning, holds every guide and module, and loads nothing from another host."""

import importlib.util
import json
import pathlib
import re
import subprocess
import sys

import pytest

from tests.extras import needs
from tests.main_processes import ROOT

# A script, style, font, picture or frame of another host. Links to other hosts are not loads.
LOADED_BY_HTML = re.compile(r"<(?!a\b)\w+\b[^>]*\s(?:src|href|srcset|data)=[\"']?(?:https?:)?//[^>]*>")
LOADED_BY_CSS = re.compile(r"(?:url\(|@import)\s*[\"']?(?:https?:)?//[^)]*")
LOADED_BY_SCRIPT = re.compile(
    r"[\"'`](?:https?:)?//[^\"'`\s]+\.(?:m?js|css|json|woff2?)\b|//(?:unpkg|cdn|cdnjs|fonts)\.[^\"'`\s]+"
)

needs_site = needs("mkdocs", "mkdocstrings", "material")


def test_public_names_are_listed():
    import densenet_jax

    listed = re.findall(r"^::: densenet_jax\.(?:\w+\.)*(\w+)$", (ROOT / "docs/api/index.md").read_text(), re.MULTILINE)
    assert set(listed) == set(densenet_jax.__all__) - {"__version__"}


def test_every_guide_is_in_the_navigation():
    navigation = re.findall(r": ([\w/]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    guides = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert guides == set(navigation) - {"changelog.md", "contributing.md"}


def test_every_module_is_in_the_tree_of_the_architecture_page():
    spec = importlib.util.spec_from_file_location("tree", ROOT / "docs/site/tree.py")
    tree = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tree)
    page = tree.PAGE.read_text()
    listed, made = (text.split("<!-- tree -->")[1].split("<!-- /tree -->")[0] for text in (page, tree.write_tree(page)))
    names, expected = ([line[: tree.NAME_WIDTH].rstrip() for line in text.splitlines()] for text in (listed, made))
    assert names == expected, "run `python docs/site/tree.py`"
    assert sum(name.endswith(".py") for name in names) > 100


def find_loads(site: pathlib.Path) -> list[str]:
    """Returns what the files of `site` load from other hosts, each with its file."""
    patterns = {".html": LOADED_BY_HTML, ".css": LOADED_BY_CSS, ".js": LOADED_BY_SCRIPT}
    return [
        f"{path.relative_to(site)}: {load}"
        for path in sorted(site.rglob("*"))
        if path.suffix in patterns and path.name != "search_index.js"  # the text of the pages
        for load in patterns[path.suffix].findall(path.read_text())
    ]


def test_loads_from_other_hosts_are_found(tmp_path):
    (tmp_path / "a.html").write_text('<a href="https://x.y">x</a><link rel=stylesheet href="//x.y/z"><script src=z.js>')
    (tmp_path / "a.css").write_text("@import 'https://x.y/a.css'; b { background: url(data:x) }")
    (tmp_path / "a.js").write_text('f("https://unpkg.com/m.js"); "https://github.com/z"')
    assert [load.split(":")[0] for load in find_loads(tmp_path)] == ["a.css", "a.html", "a.js"]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> pathlib.Path:
    directory = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(directory)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    return directory


@needs_site
def test_every_module_has_a_page(site):
    modules = {path.with_suffix("").relative_to(ROOT).as_posix() for path in ROOT.glob("densenet_jax/**/[a-z]*.py")}
    pages = {path.relative_to(site / "reference").as_posix() for path in (site / "reference").rglob("*.html")}
    assert {name for name in modules if not pages & {f"{name}.html", f"{name}/index.html"}} == set()


@needs_site
def test_nothing_is_loaded_from_another_host(site):
    assert find_loads(site) == []


@needs_site
def test_the_search_knows_every_guide(site):
    index = json.loads((site / "search/search_index.json").read_text())
    places = {entry["location"].split("#")[0] for entry in index["docs"]}
    guides = {path.relative_to(ROOT / "docs").with_suffix(".html").as_posix() for path in ROOT.glob("docs/**/*.md")}
    assert places >= guides | {"changelog.html", "contributing.html"}
    assert (site / "search/search_index.js").exists()  # what the search reads on file:// pages


@needs_site
def test_links_to_files_outside_of_docs_lead_to_copies(site):
    page = (site / "performance.html").read_text()
    (link,) = set(re.findall(r'href="(files/benchmarks/results/train_step_h200\.json)"', page))
    assert (site / link).read_text() == (ROOT / link.removeprefix("files/")).read_text()
