"""From reports to charts and figures."""

import pytest

from densenet_jax.report.curves import NONE, compare_charts, final_figures, run_charts
from densenet_jax.report.settings import changed_settings, different_settings, every_setting
from tests.report.reading import records


def test_charts_hold_the_reports():
    history = records(3)
    charts = {chart.name: chart for chart in run_charts(history, mixed=False)}
    assert list(charts) == ["loss", "top1", "learning_rate", "throughput", "data_wait"]
    train, validation, raw = charts["loss"].lines
    assert (train.label, validation.label) == ("training", "validation")
    assert list(train.xs) == [0.5, 1.0, 1.5, 2.0, 2.5, 3.0]
    assert list(validation.xs) == [1.0, 2.0, 3.0]
    assert list(train.ys) == pytest.approx([2.0, 1.0, 2 / 3, 0.5, 0.4, 1 / 3])
    assert list(raw.xs) == []
    assert {line.style for line in charts["top1"].lines} == {0, 1, 2}


def test_mixed_training_is_named_and_raw_weights_have_a_line():
    history = [{**record, "raw_loss": 9.0} if record["split"] == "validation" else record for record in records(2)]
    train, _, raw = run_charts(history, mixed=True)[0].lines
    assert train.label == "training, mixed images"
    assert list(raw.ys) == [9.0, 9.0]


@pytest.mark.parametrize("epochs", [0, 1])
def test_run_that_stopped_early_has_the_charts_that_can_be_drawn(epochs):
    history = records(epochs, validated=False)
    charts = run_charts(history, mixed=False)
    assert len(charts) == 5 * epochs
    for chart in charts:
        _, picture = chart.render()
        assert "validation" not in picture.alt


def test_final_figures_are_of_the_last_and_of_the_best_validation():
    history = records(3)
    next(record for record in history if record["split"] == "validation" and record["step"] == 4)["top1"] = 0.99
    figures = dict(final_figures(history))
    assert figures["epochs"] == "3"
    assert figures["steps"] == "6"
    assert figures["validation top-1"] == "88.33%"
    assert figures["best top-1"] == "99.00%"
    assert figures["step of the best"] == "4"
    assert figures["last training loss"] == "0.3333"
    assert figures["images/s, median"] == "400"  # of 200 to 600: the first report warms up
    assert figures["waiting for data, median"] == "25.0%"
    assert {value for _, value in final_figures([])} == {NONE}


def test_each_run_looks_the_same_in_every_chart_of_a_comparison():
    charts = compare_charts({"a": records(2), "b": records(3, validated=False)})
    for chart in charts:
        assert [(line.label, line.style) for line in chart.lines] == [("a", 0), ("b", 1)]
    assert compare_charts({"a": [], "b": []}) == []


def test_settings_are_compared_key_by_key():
    ours = {"seed": 0, "data": {"name": "é", "mean": [0.5]}}
    theirs = {"seed": 0, "data": {"name": "digits"}, "model": {"remat": True}}
    assert every_setting(ours) == [("config.seed", "0"), ("config.data.name", '"é"'), ("config.data.mean", "[0.5]")]
    assert different_settings([ours, theirs]) == [
        ("config.data.name", '"é"', '"digits"'),
        ("config.data.mean", "[0.5]", "(absent)"),
        ("config.model.remat", "(absent)", "true"),
    ]
    assert changed_settings(ours, theirs)[0] == ("config.data.name", '"digits"', '"é"')
    assert changed_settings(ours, ours) == []
