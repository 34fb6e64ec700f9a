"""Writes the tree of modules into docs/architecture.md, each with the first line of its docstring.

python docs/site/tree.py
"""

import ast
import pathlib
import re
import textwrap

ROOT = pathlib.Path(__file__).parents[2]
PAGE = ROOT / "docs/architecture.md"
NAME_WIDTH, LINE_WIDTH = 38, 120
TREE = re.compile(r"(<!-- tree -->\n).*?(<!-- /tree -->)", re.DOTALL)


def make_tree() -> str:
    """Returns one line a module, room by room, in a block of code."""
    package, lines = ROOT / "densenet_jax", ["```text"]
    for folder in [package, *sorted(path for path in package.rglob("*") if (path / "__init__.py").exists())]:
        depth = len(folder.relative_to(ROOT).parts) - 1
        lines.append(_entry(f"{folder.name}/", folder / "__init__.py", depth))
        for path in sorted(folder.glob("*.py")):
            if path.name != "__init__.py":
                lines.append(_entry(path.name, path, depth + 1))
    return "\n".join([*lines, "```\n"])


def _entry(name: str, path: pathlib.Path, depth: int) -> str:
    start = f"{'  ' * depth}{name}".ljust(NAME_WIDTH)
    summary = (ast.get_docstring(ast.parse(path.read_text())) or "").split("\n")[0].removesuffix(".")
    room = LINE_WIDTH - len(start)
    if len(summary) > room:  # ends at a colon, a semicolon or a parenthesis
        clause = re.match(rf"(.{{20,{room - 1}}})(?=[:;] | \()", summary)
        summary = clause[1] if clause else textwrap.shorten(summary, room, placeholder=" ...")
    return f"{start}{summary}".rstrip()


def write_tree(page: str) -> str:
    """Returns the page with its tree made anew."""
    return TREE.sub(lambda match: match[1] + make_tree() + match[2], page)


if __name__ == "__main__":
    PAGE.write_text(write_tree(PAGE.read_text()))
