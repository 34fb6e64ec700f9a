"""Runs side by side."""

import json
import os

import pytest

from densenet_jax.errors import UserError
from densenet_jax.report.compare import report_comparison
from tests.report.reading import Page, records


def make_run(directory, epochs: int, rate: float, offset: float = 0.0) -> str:
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps({"seed": 0, "optim": {"learning_rate": rate}}))
    lines = [json.dumps(record) + "\n" for record in records(epochs, offset=offset)]
    (directory / "metrics.jsonl").write_text("".join(lines))
    return str(directory)


def test_page_has_figures_curves_and_differences_of_every_run(tmp_path):
    first = make_run(tmp_path / "one" / "run<b>", 3, 0.1)
    second = make_run(tmp_path / "two" / "run<b>", 2, 0.25, offset=1.0)
    before = os.listdir(second)
    path = report_comparison([second, first], first)
    assert path == os.path.join(first, "report", "compare.html")
    with open(path, encoding="utf-8") as file:
        page = Page(file.read())
    assert "2 runs side by side" in page.text
    assert "one/run<b> two/run<b>" in page.text
    assert "last training loss 0.3333 1.5000" in page.text
    assert "config.optim.learning_rate 0.1 0.25" in page.text
    assert "config.seed" not in page.text
    assert len(page.pictures) == 12
    assert os.listdir(second) == before
    assert not os.path.exists(os.path.join(first, "report", "index.html"))


def test_page_may_lie_in_a_directory_of_its_own(tmp_path):
    runs = [make_run(tmp_path / name, 0, 0.1) for name in "ab"]
    report_comparison(runs, str(tmp_path / "page"))
    text = Page((tmp_path / "page" / "report" / "compare.html").read_text()).text
    assert "None: all settings are alike." in text
    assert "No metrics have been written yet." in text
    assert os.listdir(tmp_path / "page") == ["report"]


def test_directory_that_is_no_run_or_a_single_run_is_a_users_mistake(tmp_path):
    run = make_run(tmp_path / "run", 1, 0.1)
    with pytest.raises(UserError, match=r"nowhere is not a run's directory.*config.json"):
        report_comparison([run, str(tmp_path / "nowhere")], run)
    with pytest.raises(UserError, match="two runs are needed"):
        report_comparison([run, os.path.join(run, "..", "run")], run)
    assert sorted(os.listdir(tmp_path / "run")) == ["config.json", "metrics.jsonl"]


@pytest.mark.parametrize("line", ["{", "[]", '{"step": 1}', "\x00"])
def test_damaged_reports_are_named(line, tmp_path):
    run = make_run(tmp_path / "run", 1, 0.1)
    with open(os.path.join(run, "metrics.jsonl"), "a", encoding="utf-8") as file:
        file.write(line + "\n")
    with pytest.raises(UserError, match=r"metrics.jsonl line 4 is not a report"):
        report_comparison([make_run(tmp_path / "other", 1, 0.1), run], run)
