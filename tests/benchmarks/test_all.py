"""benchmarks/all.py measures what is missing, draws all results and finds what fell."""

import importlib
import json
import subprocess
import types

import pytest

from tests.main_processes import ROOT

FIGURES = {"densenet_jax": 12.0, "torch_eager": 10.0}


def write_file(path, date, figures=FIGURES, device="a processor, 2 cores", batch_sizes=(1, 2, 4), spread=0.02):
    rows = [
        {"model": "densenet121", "batch_size": size, "dtype": "float32", "mode": "train", "image_size_px": 224,
         "implementation": name, "images_per_sec": value, "quartiles": [value * (1 - spread), value * (1 + spread)],
         "peak_bytes": 2**30}
        for size in batch_sizes
        for name, value in figures.items()
    ]  # fmt: skip
    path.write_text(json.dumps({"date": date, "device": device, "versions": {}, "rows": rows}))


@pytest.fixture
def every(monkeypatch):
    """The program as a module, on a machine with a CPU alone."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    module = importlib.import_module("all")
    monkeypatch.setattr(module.cases, "device", lambda: ("cpu", "cpu"))
    return module


def start(every, monkeypatch, directory, *flags):
    where = ("--results", str(directory / "results"), "--workdir", str(directory / "page"))
    monkeypatch.setattr("sys.argv", ["all.py", *where, *flags])
    return every.main()


def replace_run(every, monkeypatch, run):
    fake = types.SimpleNamespace(run=run, TimeoutExpired=subprocess.TimeoutExpired)
    monkeypatch.setattr(every, "subprocess", fake)


def test_a_planted_fall_is_printed_and_one_within_the_spread_or_elsewhere_is_not(every, monkeypatch, tmp_path, capsys):
    results = tmp_path / "results"
    results.mkdir()
    write_file(results / "train_step_old.json", "2026-01-01")
    write_file(results / "train_step_other.json", "2026-01-02", {**FIGURES, "densenet_jax": 3.0}, "another, 2 cores")
    write_file(results / "train_step_new.json", "2026-01-03", {**FIGURES, "densenet_jax": 11.8})
    (results / "broken.json").write_text("{")
    assert start(every, monkeypatch, tmp_path, "--page_only", "--fail_on_fall", "--docs", str(tmp_path)) == 0
    out, err = capsys.readouterr()
    assert "fell" not in out
    assert "broken.json is left out" in err
    page = (tmp_path / "page/report/benchmarks.html").read_text()
    assert "another, 2 cores" in page
    assert page.count("<figure>") == 2 * (1 + 2)  # ratios, throughput and memory over batches
    assert "http" not in page
    for name in ("training", "growth"):
        assert (tmp_path / f"benchmark_{name}.png").read_bytes().startswith(b"\x89PNG")

    monkeypatch.setattr(every.charts, "build_page", lambda read: ("", []))  # drawn once is enough
    write_file(results / "train_step_new.json", "2026-01-03", {**FIGURES, "densenet_jax": 9.0}, batch_sizes=(1,))
    assert start(every, monkeypatch, tmp_path, "--page_only") == 0
    assert start(every, monkeypatch, tmp_path, "--page_only", "--fail_on_fall") == every.FELL
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("fell")]
    assert len(lines) == 2
    assert lines[0].startswith("fell: train_step, densenet121, train, 224 px, batch 1, float32: 0.90 times torch_eager")
    assert "1.20 (" in lines[0]


def test_only_what_is_missing_is_measured_and_a_part_is_gone_on_with(every, monkeypatch, tmp_path, capsys):
    commands, status = [], 1

    def run(command, **_):
        commands.append(command)
        output = command[command.index("--output") + 1]
        write_file(every.pathlib.Path(output), f"2026-01-0{len(commands)}T00:00:00")
        return types.SimpleNamespace(returncode=status)

    replace_run(every, monkeypatch, run)
    tasks = (every.Task("train_step_few", "train_step", ("--models", "densenet121")),
             every.Task("serving", "serving", (), needs=("no_such_module",)))  # fmt: skip
    monkeypatch.setitem(every.TASKS, "cpu", tasks)
    flags = ("--torch_python", "its/python")
    whole = every.path_of(tasks[0], every.report.device_name("cpu"), tmp_path / "results")
    assert start(every, monkeypatch, tmp_path, *flags) == every.FAILED
    assert not whole.exists()  # a part is no result
    assert "serving is left out: this interpreter has no no_such_module" in capsys.readouterr().err
    status = 0
    assert start(every, monkeypatch, tmp_path, *flags) == 0
    assert whole.exists()
    assert "--resume" in commands[1]
    assert commands[1][commands[1].index("--torch_python") + 1] == "its/python"
    assert start(every, monkeypatch, tmp_path, *flags) == 0
    assert len(commands) == 2  # it was there
    assert start(every, monkeypatch, tmp_path, *flags, "--again") == 0
    assert len(commands) == 3
    assert len(list((tmp_path / "results").iterdir())) == 2  # the old one is kept to compare with


def test_nothing_begins_after_the_time_and_a_stopped_task_keeps_its_part(every, monkeypatch, tmp_path, capsys):
    def run(command, timeout, **_):
        assert 0 < timeout <= 60
        now.append(now[-1] + 60)
        raise subprocess.TimeoutExpired(command, timeout)

    now = [0.0]
    monkeypatch.setattr(every.time, "monotonic", lambda: now[-1])
    replace_run(every, monkeypatch, run)
    assert start(every, monkeypatch, tmp_path, "--platform", "cpu", "--minutes", "1", "--only", "train_step") == 0
    err = capsys.readouterr().err
    assert "train_step_few was stopped: its time is up" in err
    assert "train_step_depth is left out: the time is up" in err


def test_every_task_is_a_command_that_its_program_accepts(every, monkeypatch, tmp_path):
    with pytest.raises(SystemExit, match="error: no task for cpu is called nothing; there are latency, train_step_few"):
        start(every, monkeypatch, tmp_path, "--only", "nothing")
    for platform, tasks in every.TASKS.items():
        assert start(every, monkeypatch, tmp_path, "--platform", platform, "--dry_run") == 0
        assert all((ROOT / "benchmarks" / f"{task.script}.py").exists() for task in tasks)
    for task in every.TASKS["gpu"]:
        program = importlib.import_module(task.script)
        monkeypatch.setattr(every.cases, "device", lambda: ("gpu", "a GPU"))
        monkeypatch.setattr("sys.argv", [task.script, *task.flags])
        program.parse()


def test_the_kernels_are_compared_with_their_references_and_a_fault_is_a_row(every, monkeypatch, tmp_path):
    kernels = importlib.import_module("kernels")
    monkeypatch.setattr(kernels, "TINY", ((17, 9),))
    path = tmp_path / "kernels.json"
    monkeypatch.setattr("sys.argv", ["kernels.py", "--turns", "1", "--output", str(path)])
    kernels.main()
    rows = json.loads(path.read_text())["rows"]
    assert [(row["operation"], row["implementation"]) for row in rows] == [
        (operation, name) for operation in ("forward", "backward") for name in ("kernel", "reference")
    ]
    assert all(row["difference"] < 2**-7 for row in rows[::2])
    monkeypatch.setattr(kernels, "measure", lambda *_: 1 / 0)
    kernels.main()
    assert "ZeroDivisionError" in json.loads(path.read_text())["rows"][0]["error"]


def test_kernels_that_might_be_faster_are_right(every, monkeypatch, tmp_path):
    kernels = importlib.import_module("kernels")
    monkeypatch.setattr(kernels, "TINY", ((33, 19),))
    path = tmp_path / "kernels_candidates.json"
    monkeypatch.setattr("sys.argv", ["kernels.py", "--candidates", "--turns", "1", "--output", str(path)])
    kernels.main()
    rows = json.loads(path.read_text())["rows"]
    assert [row["operation"] for row in rows] == ["backward"] * 3 + ["forward"] + ["norm"] * 3
    assert all(row["difference"] < 2**-7 for row in rows)
