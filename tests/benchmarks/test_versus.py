"""The benchmarks against other implementations run as one command each and write the promised columns."""

import importlib.util
import json
import subprocess
import sys

import pytest

from tests.running import ROOT, environment

TINY = ("--models", "densenet_bc_22_12", "--block_sizes", "1", "1", "1", "--image_size_px", "8", "--turns", "2")
HAS_TORCH = importlib.util.find_spec("timm") is not None


def run(script, path, *arguments):
    command = [sys.executable, f"benchmarks/{script}.py", *TINY, "--turn_secs", "0.05", "--output", str(path)]
    result = subprocess.run(
        [*command, *arguments], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stderr
    content = json.loads(path.read_text())
    assert set(content) == {"date", "device", "versions", "rows"}
    assert content["device"]
    assert "jax" in content["versions"]
    return result.stdout, content["rows"]


@pytest.mark.slow
def test_train_step(tmp_path):
    arguments = ("--batch_sizes", "2", "4", "--implementations", "densenet_jax", "plain", "torch_eager")
    table, rows = run("train_step", tmp_path / "rows.json", *arguments)
    columns = {"model", "batch_size", "dtype", "implementation", "mode", "images_per_sec", "peak_bytes", "compile_secs"}
    cases = {(row["batch_size"], row["mode"], row["implementation"]) for row in rows}
    assert len(cases) == len(rows) == 2 * 2 * 3
    for row in rows:
        assert columns <= set(row)
        assert row["implementation"] in table
        if row["implementation"] == "torch_eager" and not HAS_TORCH:
            assert "worker ended" in row["error"]  # an implementation that isn't there is told, the others measured
            continue
        assert "error" not in row
        low, high = row["quartiles"]
        assert 0 < low <= row["images_per_sec"] <= high
        assert row["turns"] == 2
        assert row["interleaved"] is True
        assert row["peak_bytes"] > 10e6
        assert row["compile_secs"] > 0


@pytest.mark.slow
def test_latency(tmp_path):
    path, arguments = tmp_path / "rows.json", ("--runtimes", "jax", "--resume", "--batch_sizes")
    _, first = run("latency", path, *arguments, "1")
    table, rows = run("latency", path, *arguments, "1", "2")
    assert rows[0] == first[0]  # kept, not measured again
    assert [(row["model"], row["batch_size"], row["runtime"]) for row in rows] == [
        ("densenet_bc_22_12", 1, "jax"),
        ("densenet_bc_22_12", 2, "jax"),
    ]
    assert all(0 < row["p50"] <= row["p99"] for row in rows)
    assert all(row["calls"] >= row["turns"] == 2 for row in rows)
    assert table.splitlines()[0] == "| p50, ms | batch 1, jax | batch 2, jax |"
    assert table.splitlines()[2].startswith(f"| densenet_bc_22_12 | {rows[0]['p50']:.2f} | ")


def test_rows_are_on_disk_at_once_and_only_gone_on_with_by_the_same_versions(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from versus.rows import Rows

    path = str(tmp_path / "rows.json")
    Rows(path, resume=False).add([{"model": "a", "p50": 1.0}], {"jax": "1"}, "cpu")
    resumed = Rows(path, resume=True)
    assert resumed.has(model="a")
    assert not resumed.has(model="b")
    resumed.add([{"model": "b", "p50": 2.0}], {"torch": "2"}, "cpu")
    assert [row["model"] for row in json.loads((tmp_path / "rows.json").read_text())["rows"]] == ["a", "b"]
    with pytest.raises(SystemExit, match="jax was 1 and is 3"):
        Rows(path, resume=True).add([{"model": "c"}], {"jax": "3"}, "cpu")


def test_a_kept_worker_serves_the_next_case_unless_it_has_failed(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from versus.kept import KeptWorkers

    class Fake:
        def __init__(self, **answer):
            self.answer, self.stopped = answer, False

        def ask(self, request, **arguments):
            return self.answer

        def stop(self):
            self.stopped = True

    good, bad, fresh = Fake(), Fake(error="out of memory"), Fake()
    with KeptWorkers() as workers:
        for _ in range(2):
            held = workers.start("good", lambda: good)
            held.ask("prepare")
            held.stop()
            assert not good.stopped
        held = workers.start("bad", lambda: bad)
        held.ask("prepare")
        held.stop()
        assert bad.stopped
        workers.start("bad", lambda: fresh)
    assert good.stopped
    assert fresh.stopped


def test_workers_that_fail_are_told_and_the_others_measured(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from versus.turns import Contestant, compete

    class Fake:
        def __init__(self, *answers):
            self.answers = list(answers)
            self.stopped = False

        def ask(self, request, **arguments):
            return self.answers.pop(0)

        def stop(self):
            self.stopped = True

    turn = {"secs": [0.5], "processor_secs": 0.5}
    good = Fake({"compile_secs": 1.0}, turn, turn, {"peak_bytes": 7})
    large = [Fake({"error": "out of memory"}), Fake({"compile_secs": 2.0}, turn, turn, {"peak_bytes": 9})]
    bad = Fake({"compile_secs": 1.0}, {"error": "the result is not finite"})
    workers = [good, *large, bad]
    starts = iter(large)
    contestants = [
        Contestant("good", lambda: good, {}),
        Contestant("large", lambda: next(starts), {}),
        Contestant("bad", lambda: bad, {}),
    ]
    compete(contestants, turns=2, turn_secs=0.0)
    assert [one.error for one in contestants] == [None, None, "the result is not finite"]
    assert [one.interleaved for one in contestants] == [True, False, True]
    assert [one.peak_bytes for one in contestants] == [7, 9, None]
    assert [len(one.secs) for one in contestants] == [2, 2, 0]
    assert all(worker.stopped for worker in workers)
