"""The mode: what it refuses, what it tells, and real steps compiled for chips that are not there."""

import types

import pytest

from configs import default, digits
from densenet_jax.config import check_config
from densenet_jax.errors import UserError
from densenet_jax.experiment import Experiment
from densenet_jax.models.dual_path import PLAIN
from densenet_jax.models.fused import Fused
from densenet_jax.plan import plan as planning
from densenet_jax.plan.costs import Costs, DoesNotFitError, parse_memory_error
from densenet_jax.plan.hlo import Collective
from densenet_jax.training import sharding
from tests.extras import needs
from tests.main_in_process import run_here
from tests.main_processes import parse_last_line, run_main

KEYS = {
    "topology", "chips", "hosts", "global_batch_size", "memory_bytes_per_chip", "capacity_bytes_per_chip", "fits",
    "largest_global_batch_that_fits",
    "flops_per_image", "bytes_per_image", "memory_bytes_per_image", "collectives", "bound", "images_per_sec_bound",
    "hours_bound",
}  # fmt: skip


def settings(batch=256, name="imagenet2012", microbatches=1, repeats=1):
    config = default.get_config()
    with config.unlocked():
        config.train.global_batch_size, config.train.microbatches = batch, microbatches
        config.augment.repeats = repeats
        config.data.name = name
        config.data.dir = "/nowhere"
    return check_config(config)


def compiled(monkeypatch, bytes_an_image, fixed=0, raises_above=None):
    """Stands in for the compilers: memory grows with the batch. Returns the batches that were compiled for."""
    asked = []

    def compute_step_costs(config, topology):
        images = config["train"]["global_batch_size"] // topology.chips
        asked.append(images * topology.chips)
        memory = fixed + images * bytes_an_image
        if raises_above is not None and memory > raises_above:
            raise DoesNotFitError(memory)
        return Costs(memory, memory, images * 2e9, images * 9e8, images * 5e8, (Collective("all-reduce", 10**7, 2),))

    monkeypatch.setattr(planning, "compute_step_costs", compute_step_costs)
    monkeypatch.setattr(planning, "check_installed", lambda compiler: None)
    return asked


def test_a_plan_has_every_figure_for_an_absent_data_set(monkeypatch, capsys):
    compiled(monkeypatch, 10**8)
    figures = planning.plan(settings(1024), "v5e:2x2")
    assert figures.keys() == KEYS
    assert figures["fits"] is False  # 256 images of 100 MB on a chip of 17 GB
    figures = planning.plan(settings(256), "v5e:2x2")
    assert figures["fits"] is True
    assert figures["largest_global_batch_that_fits"] is None
    assert (figures["chips"], figures["hosts"], figures["memory_bytes_per_chip"]) == (4, 1, 64 * 10**8)
    assert figures["flops_per_image"] == pytest.approx(2e9)
    assert figures["bytes_per_image"] == pytest.approx(9e8)
    assert figures["memory_bytes_per_image"] == pytest.approx(5e8)
    assert figures["bound"] == "memory"
    assert figures["images_per_sec_bound"] == pytest.approx(4 * 0.819e12 / 5e8)
    images = 1_281_167 // 256 * 256 * 300
    assert figures["hours_bound"] == pytest.approx(images / figures["images_per_sec_bound"] / 3600, rel=1e-3)
    said = capsys.readouterr().err
    assert "bounds, not predictions" in said
    assert "a chip, 37%" in said
    assert "all-reduce: 2 of 10 MB" in said


@pytest.mark.parametrize("raises_above", [None, 16 * 2**30])
def test_a_batch_that_does_not_fit_says_the_largest_that_does(monkeypatch, capsys, raises_above):
    asked = compiled(monkeypatch, 10**8, fixed=2 * 10**9, raises_above=raises_above)
    figures = planning.plan(settings(4096), "v5e:2x2")
    assert figures.keys() == KEYS
    assert figures["fits"] is False
    assert figures["memory_bytes_per_chip"] == 2 * 10**9 + 1024 * 10**8
    largest = (16 * 2**30 - 2 * 10**9) // 10**8 * 4
    assert figures["largest_global_batch_that_fits"] == largest
    said = capsys.readouterr().err
    assert f"found to fit v5e:2x2 is {largest}; {largest + 4}, the next larger, does not fit" in said
    assert "a batch of 4096 does not fit: 104 GB of 17.2 GB available on a chip" in said
    assert {largest, largest + 4} <= set(asked)
    assert len(asked) <= 4
    for batch in asked[1:]:
        assert f"compiling for a batch of {batch}" in said
        assert f"a batch of {batch} {'fits' if batch <= largest else 'does not fit'}: " in said
    assert (figures["flops_per_image"] is None) == (raises_above is not None)


def test_a_model_that_no_batch_fits_is_reported(monkeypatch, capsys):
    compiled(monkeypatch, 10**8, fixed=10**12, raises_above=10**11)
    figures = planning.plan(settings(64), "v5e:2x2")
    assert "even the smallest batch, 4, does not fit v5e:2x2" in capsys.readouterr().err
    assert figures["largest_global_batch_that_fits"] == 0


def test_the_answer_for_a_large_batch_says_how_exact_it_is(monkeypatch, capsys):
    asked = compiled(monkeypatch, 10**4)
    figures = planning.plan(settings(2**24), "v5e:2x2")
    fitting = figures["largest_global_batch_that_fits"]
    failing = min(batch for batch in asked if batch > fitting)
    assert fitting <= 16 * 2**30 // 10**4 * 4 < failing <= 1.01 * fitting
    more = f"{failing}, {failing / fitting - 1:.1%} more, does not fit"
    said = capsys.readouterr().err
    assert f"found to fit v5e:2x2 is {fitting}; {more}" in said
    assert "16777216 images, 4194304 a chip" in said


def test_only_batches_that_the_settings_can_divide_are_tried(monkeypatch, capsys):
    asked = compiled(monkeypatch, 10**8)
    planning.plan(settings(4096, microbatches=8, repeats=2), "v5e:2x2")
    assert all(batch % (4 * 8 * 2) == 0 for batch in asked)
    assert "is 640; 704, the next larger, does not fit" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("config", "topology", "says"),
    [
        (settings(), "", "--topology v5e:2x2"),
        (settings(), "v5r:2x2", "did you mean v5e"),
        (settings(), "v5e:2x3", "not a shape of v5e"),
        (settings(250), "v5e:2x2", "config.train.global_batch_size is 250, which 4 devices don't divide; take 248 or"),
        (settings(8), "v5e:4x4", "take 16"),
        (settings(name="rock_paper_scissors"), "v5e:2x2", "rock_paper_scissors is not prepared"),
    ],
)
def test_impossible_plans_are_refused_before_anything_is_compiled(monkeypatch, config, topology, says):
    asked = compiled(monkeypatch, 1)
    with pytest.raises(UserError) as refused:
        planning.plan(config, topology)
    assert says in str(refused.value)
    assert asked == []


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm.",
            (20.5 * 2**30, 15.75 * 2**30),
        ),
        (
            "the total memory required for HLO temporaries (1.5T) exceeds available HBM (15.75G).",
            (1.5 * 2**40, 15.75 * 2**30),
        ),
        ("the total memory (1.5G) exceeds what there is", (1.5 * 2**30, None)),
        ("RESOURCE_EXHAUSTED: used 512.0M of 1.0M", (2**29, 2**20)),
        ("RESOURCE_EXHAUSTED: used 512.0M of it", (2**29, None)),
        ("RESOURCE_EXHAUSTED: in other words", (None, None)),
    ],
)
def test_needed_and_available_memory_are_read_from_the_message(message, expected):
    assert parse_memory_error(message) == expected


def test_the_flag_belongs_to_the_mode():
    output, errors = run_here("--topology", "v5e:2x2", expect=2)
    assert output == ""
    assert errors.strip().splitlines()[-1].startswith("error: --topology v5e:2x2 is for --mode plan")


def plan_digits(user, topology, *more):
    output, errors = run_main("--mode", "plan", "--config", "configs/digits.py", "--topology", topology, *more, **user)
    figures = parse_last_line(output)
    assert figures.keys() == KEYS | {"mode"}
    assert len(output.splitlines()) == 1
    assert "bounds, not predictions" in errors
    assert "cudart" not in output
    return figures


# The number of parameters, as --mode parameters counts them, of the recipe's model and of one with a layer a block.
PARAMETERS, SMALL_PARAMETERS = 71_254, 20_470
SMALL = "--config.model.block_sizes=(1,1,1)"


def check_digits(figures, chips, batch, parameters=PARAMETERS):
    assert figures["fits"] is True
    assert (figures["chips"], figures["global_batch_size"]) == (chips, batch)
    sums = [one["bytes"] for one in figures["collectives"] if one["op"] == "all-reduce"]
    assert max(sums) >= 0.9 * 4 * parameters
    assert sum(one["bytes"] * one["count"] for one in figures["collectives"]) >= 4 * parameters
    assert 70 * parameters < figures["flops_per_image"] < 700 * parameters
    assert figures["images_per_sec_bound"] > 0
    assert figures["hours_bound"] > 0


@pytest.mark.parametrize(
    ("topology", "chips", "changes", "parameters"),
    [("v5e:2x2", 4, (), PARAMETERS), ("v4:2x2x2", 8, (SMALL,), SMALL_PARAMETERS)],
)
@needs("libtpu")
def test_the_digits_on_tpus_that_are_not_there(user, topology, chips, changes, parameters):
    figures = plan_digits(user, topology, *changes)
    check_digits(figures, chips, digits.get_config().train.global_batch_size, parameters)


@needs("jax_plugins.xla_cuda12")
def test_the_digits_on_gpus_that_are_not_there(user):
    figures = plan_digits(user, "h200:1x1x8", SMALL)
    check_digits(figures, 8, digits.get_config().train.global_batch_size, SMALL_PARAMETERS)


@pytest.mark.parametrize(
    ("platform", "asked", "expected"),
    [
        ("tpu", "normalize_once", "tpu"),
        ("cuda", "normalize_once", "gpu"),
        ("cpu", "normalize_once", "cpu"),
        ("tpu", "plain", None),
    ],
)
def test_the_model_has_the_implementation_for_the_chip_that_is_planned_for(platform, asked, expected):
    config = digits.get_config()
    with config.unlocked():
        config.model.block_form = asked
    absent = (types.SimpleNamespace(platform=platform),)
    made = Experiment(check_config(config), absent_devices=absent)
    made.__dict__["_all_devices"] = mesh = sharding.make_mesh()
    assert made.model.implementation == (Fused(expected, mesh=mesh) if expected else PLAIN)
