"""The benchmarks against other implementations run as one command each and write the promised columns."""

import importlib.util
import json
import sys
import threading
import types

import pytest

from tests.main_processes import ROOT, run_python

TINY = ("--models", "densenet_bc_22_12", "--block_sizes", "1", "1", "1", "--image_size_px", "8", "--turns", "2")
HAS_TORCH = importlib.util.find_spec("timm") is not None


def run(script, path, *arguments):
    flags = (*TINY, "--turn_secs", "0.05", "--output", str(path), *arguments)
    result = run_python(f"benchmarks/{script}.py", *flags, timeout_secs=300)
    assert result.returncode == 0, result.stderr
    content = json.loads(path.read_text())
    assert set(content) == {"date", "device", "versions", "rows"}
    assert content["device"]
    assert "jax" in content["versions"]
    return result.stdout, content["rows"]


@pytest.mark.slow
def test_train_step(tmp_path):
    sizes = ("--batch_sizes", "2", "--image_size_px", "8", "12")
    arguments = (*sizes, "--implementations", "densenet_jax", "torch_eager")
    table, rows = run("train_step", tmp_path / "rows.json", *arguments)
    columns = {"model", "batch_size", "dtype", "implementation", "mode", "images_per_sec", "peak_bytes", "compile_secs"}
    cases = {(row["image_size_px"], row["batch_size"], row["mode"], row["implementation"]) for row in rows}
    assert len(cases) == len(rows) == 2 * 2 * 2
    for row in rows:
        assert columns <= set(row)
        assert row["implementation"] in table
        if row["implementation"] == "torch_eager" and not HAS_TORCH:
            assert "worker ended" in row["error"]  # an implementation that isn't there is named; the others run
            continue
        assert "error" not in row
        low, high = row["quartiles"]
        assert 0 < low <= row["images_per_sec"] <= high
        assert row["turns"] == 2
        assert row["interleaved"] is True
        assert row["peak_bytes"] > 10e6
        assert row["compile_secs"] > 0


@pytest.mark.parametrize("mode", ["train", "infer"])
def test_an_rdnet_is_a_case_like_the_others(mode, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "versus"))
    from jax_worker import prepare

    overrides = {"block_sizes": (1, 1), "growth_rate": 8}
    case, _ = prepare("rdnet_tiny", mode, 2, 16, 3, "float32", "default", overrides)
    for _ in range(2):
        case.step()
        case.wait()


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
    from versus.report import Rows

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
    from versus.turns import KeptWorkers

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


@pytest.fixture
def train_step(monkeypatch):
    """The benchmark as a module, that finds a GPU on which `FITS` tells how large a batch each implementation takes."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import train_step
    from versus import cases

    monkeypatch.setattr(cases, "device", lambda: ("gpu", "a GPU"))
    return train_step


FITS = {"densenet_jax": 8, "plain": 3, "torch_eager": 4}


def fake_compete(measured):
    def compete(contestants, turns, turn_secs, budget_secs, together):
        measured.append([(one.name, one.case["batch_size"]) for one in contestants])
        for one in contestants:
            if one.case["batch_size"] > FITS[one.name]:
                one.error = "out of memory"
                continue
            one.prepared = {"compile_secs": 1.0, "platform": "gpu", "version": "1"}
            one.secs, one.processor_secs, one.peak_bytes = [[1.0, 1.0]], [1.0], 7

    return compete


def arguments_for(train_step, monkeypatch, path, *arguments):
    command = ["train_step.py", *TINY, "--output", str(path), "--batch_sizes", "2", "1", *arguments]
    monkeypatch.setattr(sys, "argv", [*command, "--implementations", *FITS])
    return train_step.parse()


def test_batches_grow_until_nobody_fits_and_a_stopped_run_is_gone_on_with(train_step, monkeypatch, tmp_path):
    measured = []
    monkeypatch.setattr(train_step, "compete", fake_compete(measured))
    path = tmp_path / "rows.json"
    arguments = arguments_for(train_step, monkeypatch, path, "--to_the_limit")
    rows = train_step.report.Rows(arguments.output, arguments.resume)
    train_step.measure(arguments, rows, "densenet_bc_22_12", 8, "train")
    everyone = list(FITS)
    ours, torch = "densenet_jax", "torch_eager"
    growing = [*[[(name, size) for name in everyone] for size in (1, 2, 4)], [(ours, 8), (torch, 8)], [(ours, 16)]]
    assert measured == growing
    written = json.loads(path.read_text())["rows"]
    assert [(row["implementation"], row["batch_size"]) for row in written if row["images_per_sec"] is None] == [
        ("plain", 4),
        ("torch_eager", 8),
        ("densenet_jax", 16),
    ]

    # Nothing is measured twice, and who did not fit is not tried again.
    kept = [row for row in written if row["batch_size"] < 8]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rows": kept}))
    measured.clear()
    train_step.measure(arguments, train_step.report.Rows(str(path), True), "densenet_bc_22_12", 8, "train")
    assert measured == growing[3:]
    measured.clear()
    train_step.measure(arguments, train_step.report.Rows(str(path), True), "densenet_bc_22_12", 8, "infer")
    assert measured == growing


def test_without_a_gpu_there_is_no_search_for_the_limit(train_step, monkeypatch, tmp_path):
    from versus import cases

    monkeypatch.setattr(cases, "device", lambda: ("cpu", "cpu"))
    with pytest.raises(SystemExit, match="error: --to_the_limit is for a GPU"):
        arguments_for(train_step, monkeypatch, tmp_path / "rows.json", "--to_the_limit")


def test_no_round_begins_after_the_budget_and_a_silent_worker_is_given_up(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from versus.turns import Contestant, Worker, compete

    script = tmp_path / "worker.py"
    script.write_text(
        "import json, sys, time\n"
        "for line in sys.stdin:\n"
        "    ask = json.loads(line)\n"
        "    time.sleep(ask.get('sleeps', 0))\n"
        "    answer = {'compile_secs': 1.0, 'secs': [0.1], 'processor_secs': 0.1, 'peak_bytes': 1}\n"
        "    print(json.dumps(answer), flush=True)\n"
    )
    contestants = [
        Contestant("quick", lambda: Worker(str(script), sys.executable), {}),
        Contestant("silent", lambda: Worker(str(script), sys.executable), {"sleeps": 600}, limit_secs=0.5),
    ]
    compete(contestants, turns=5, turn_secs=0.0, budget_secs=0.0)
    assert [len(one.secs) for one in contestants] == [1, 0]
    assert [one.error for one in contestants] == [None, "no answer within 0.5 s"]


def test_workers_that_prepare_together_are_awaited_together(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from versus.turns import Contestant, compete

    everyone = threading.Barrier(2, timeout=30)

    class Fake:
        def ask(self, request, **arguments):
            if request == "prepare":
                everyone.wait()
            return {"prepare": {"compile_secs": 1.0}, "peak": {"peak_bytes": 1}}.get(
                request, {"secs": [0.5], "processor_secs": 0.5}
            )

        def stop(self):
            pass

    contestants = [Contestant(name, Fake, {}) for name in ("one", "other")]
    compete(contestants, turns=1, turn_secs=0.0, together=True)
    assert [len(one.secs) for one in contestants] == [1, 1]


def test_a_turn_waits_for_the_device_after_so_many_steps(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "versus"))
    import worker

    done = []
    case = types.SimpleNamespace(step=lambda: done.append("step"), wait=lambda: done.append("wait"))
    actual = worker._turn(case, secs=0.0, steps_a_wait=3)
    assert done == ["step", "step", "step", "wait"]
    assert len(actual["secs"]) == 3


def test_the_benchmarks_need_no_data_libraries():
    """They run where JAX, flax, optax and orbax are and little else."""
    absent = ("tensorflow", "tensorflow_datasets", "clu", "ml_collections", "grain", "torch", "tensorboard")
    code = (
        f"import sys; sys.path[:0] = ['benchmarks', 'benchmarks/versus']\n"
        f"for name in {absent}: sys.modules[name] = None\n"
        "import train_step, jax_worker\n"
        "sizes = {'block_sizes': (1,)}\n"
        "jax_worker.prepare('densenet_bc_22_12', 'infer', 1, 8, 1, 'float32', 'plain', sizes)[0].step()\n"
    )
    done = run_python("-c", code)
    assert done.returncode == 0, done.stderr


def test_workers_that_fail_are_reported_and_the_others_measured(monkeypatch):
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


def test_logits_of_runtimes_with_the_same_weights_are_compared(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import latency
    from versus.turns import Contestant

    samples = {"jax": [1.0, -4.0], "openvino": [1.0, -3.0], "torch_eager": []}
    contestants = [Contestant(name, None, {}, {"sample": sample}) for name, sample in samples.items()]
    assert latency.differences([*contestants, Contestant("onnxruntime", None, {})]) == {"openvino": 0.25}
    assert latency.differences(contestants[2:]) == {}


def test_a_runtime_that_is_not_installed_is_left_out_and_said(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import latency

    monkeypatch.setattr(latency.cases, "device", lambda: ("cpu", "cpu"))
    monkeypatch.setattr(latency, "importable", lambda interpreter, *modules: modules[0] != "openvino")
    monkeypatch.setattr(sys, "argv", ["latency.py", "--openvino_python", "its/python"])
    assert latency.parse().runtimes == ["jax", "onnxruntime", "torch_eager"]
    assert "its/python has no openvino: openvino is left out" in capsys.readouterr().err
