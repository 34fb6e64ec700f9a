"""The reference of the Python interface is built from the docstrings without a warning and leaves no module out."""

import pathlib
import re
import subprocess
import sys

from tests.extras import needs

ROOT = pathlib.Path(__file__).parent.parent


def test_what_users_import_stands_first():
    import densenet_jax

    listed = re.findall(r"^::: densenet_jax\.(?:\w+\.)*(\w+)$", (ROOT / "docs/api/index.md").read_text(), re.MULTILINE)
    assert set(listed) == set(densenet_jax.__all__) - {"__version__"}


@needs("mkdocs", "mkdocstrings")
def test_it_is_built_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    pages = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.html")}
    missing = [
        module
        for path in (ROOT / "densenet_jax").rglob("[a-z]*.py")
        if not any(
            page.endswith((module := path.relative_to(ROOT).with_suffix("").as_posix()) + ".html") for page in pages
        )
        and not any(page.endswith(f"{module}/index.html") for page in pages)
    ]
    assert missing == []
