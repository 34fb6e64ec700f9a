"""Completes the site: pages and files that lie outside of docs/, and no script of another host."""

import pathlib
import re
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = pathlib.Path(__file__).parents[2]
PAGES = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
LINK_OUTSIDE = re.compile(r"\]\(\.\./([^)#\s]+)\)")
DOWNLOADS = "files"


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages of the project's root and every file outside of docs/ that a page links to."""
    for source, target in PAGES.items():
        text = (ROOT / source).read_text().replace("](docs/", "](")
        files.append(File.generated(config, target, content=text))
    texts = [file.content_string for file in files.documentation_pages()]
    for path in sorted({path for text in texts for path in LINK_OUTSIDE.findall(text)} - PAGES.keys()):
        files.append(File.generated(config, f"{DOWNLOADS}/{path}", abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Points links out of docs/ to the copies that `on_files` added."""
    return LINK_OUTSIDE.sub(lambda link: f"]({PAGES.get(link[1], f'{DOWNLOADS}/{link[1]}')})", markdown)


def on_post_build(config: Any) -> None:
    """Replaces what the theme would load from another host: a worker for file:// pages by ours, diagrams by nothing."""
    site = pathlib.Path(config.site_dir)
    for page in site.rglob("*.html"):
        worker = "../" * (len(page.relative_to(site).parts) - 1) + "site/file_worker.js"
        page.write_text(page.read_text().replace("https://unpkg.com/iframe-worker/shim", worker))
    for script in site.glob("assets/javascripts/bundle.*.js"):
        script.write_text(script.read_text().replace("https://unpkg.com/", ""))
