"""The traffic benchmark: its floor by counting, and the columns it promises."""

import json
import os
import sys

import pytest

from densenet_jax import create_model
from densenet_jax.models.variants import RDNetArchitecture, Variant
from tests.extras import needs
from tests.main_processes import ROOT, run_python
from tests.models.golden import trace_variables

sys.path.insert(0, str(ROOT / "benchmarks"))

import traffic
from traffic import one_stage
from versus import floor
from versus.floor import floor_elements


def run(*arguments):
    return run_python("benchmarks/traffic.py", *arguments)


def test_the_floor_of_densenet121_is_about_160_megabytes_in_bfloat16():
    assert 2 * floor_elements("densenet121", 224) == pytest.approx(160e6, rel=0.03)


def test_the_floor_grows_with_depth_and_with_the_square_of_the_side():
    counts = [floor_elements(name, 224) for name in ("densenet121", "densenet169", "densenet201", "densenet264")]
    assert counts == sorted(counts)
    assert floor_elements("densenet121", 448) == 4 * floor_elements("densenet121", 224)


def test_the_floor_of_a_network_small_enough_to_count_by_hand():
    # densenet_bc_22_12: three blocks of 3 layers on 8, 4 and 2 pixels, 24 maps at first, 12 more a layer.
    def block(width, side):
        layers = sum(4 * (width + 12 * index) + 6 * 48 + 7 * 12 for index in range(3))
        return (layers + 3 * (width + 36)) * side**2

    entering = 7 * (24 * 64 + 30 * 16 + 33 * 4)
    by_hand = 2 * 3 * 64 + entering + block(24, 8) + block(30, 4) + block(33, 2)
    assert floor_elements("densenet_bc_22_12", 8) == by_hand


def test_the_floor_of_an_rdnet_small_enough_to_count_by_hand(monkeypatch):
    # Two stages of one layer on 8 and 4 positions a side: 8 maps and 4 more, of these 8 and 4 more, which are gated.
    small = RDNetArchitecture((1, 1), (4, 4), (1,), squeeze_excite_from=1, stem_width=8, compression=0.7)
    monkeypatch.setattr(floor, "get_variant", lambda name: Variant(name, small, 0))
    first = (4 * 8 + 5 * (8 + 32) + 2 * 4) * 8**2 + 3 * 12 * 8**2
    second = (2 * 8 + 4 * 8 + 5 * (8 + 32) + 6 * 4) * 4**2 + 3 * 12 * 4**2
    assert floor_elements("small", 32) == 2 * 3 * 32**2 + 5 * 8 * 8**2 + first + second


@pytest.mark.parametrize("model", ["dpn68", "densenet264d"])
def test_networks_whose_floor_is_not_counted_have_none(model):
    assert floor_elements(model, 224) is None


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--target", "v5f"), "did you mean v5"),
        (("--models", "densenet120"), "densenet121"),
        (("--models", "dpn68", "--by_stage"), "RDNets"),
    ],
)
def test_a_name_that_is_not_known_is_one_line(arguments, says, monkeypatch):
    monkeypatch.setattr("sys.argv", ["traffic.py", *arguments])
    with pytest.raises(SystemExit) as end:
        traffic.main()
    assert end.value.code.startswith("error: ")
    assert says in end.value.code
    assert len(end.value.code.splitlines()) == 1


def test_a_stage_apart_has_the_layers_that_it_has_in_the_whole():
    def layers(**overrides):
        network = create_model("rdnet_tiny", **overrides)
        shapes = trace_variables(network, side_px=224)["params"]
        stages = [shapes[f"stage{index + 1}"] for index in range(len(network.block_sizes))]
        return [{name: array for name, array in stage.items() if "layer" in name} for stage in stages]

    whole = layers()
    assert [layers(**one_stage("rdnet_tiny", index)) for index in range(7)] == [[stage] for stage in whole]


@needs("libtpu")
def test_the_columns(tmp_path, monkeypatch, capsys):
    path = os.fspath(tmp_path / "traffic.json")
    tiny = ("--models", "densenet_bc_22_12", "--image_size_px", "8", "--batch_sizes", "8", "--target", "v5e")
    done = run(*tiny, "--output", path)
    assert done.returncode == 0, done.stderr
    with open(path, encoding="utf-8") as file:
        content = json.load(file)
    assert content.keys() == {"date", "device", "versions", "rows"}
    assert "libtpu" in content["versions"]
    assert [row["form"] for row in content["rows"]] == ["densenet_jax", "plain"]
    for row in content["rows"]:
        assert (row["model"], row["batch_size"], row["target"]) == ("densenet_bc_22_12", 8, "v5e")
        assert row["bytes_per_image"] > row["floor_bytes_per_image"] > 0
        assert row["temp_bytes"] >= 0  # so small a step may need none
        assert row["memory_bytes_per_image"] > 8 * 8 * 3 * 2  # the image at least
    assert "MB/image" in done.stdout
    kept, missing = content["rows"]
    with open(path, "w", encoding="utf-8") as file:
        json.dump({**content, "rows": [kept]}, file)
    asked = []  # a process for each of them, which has compiled it once already
    monkeypatch.setattr(traffic, "run_child", lambda case: asked.append(case["form"]) or missing)
    monkeypatch.setattr("sys.argv", ["traffic.py", *tiny, "--output", path, "--resume"])
    traffic.main()
    assert asked == ["plain"]
    again = capsys.readouterr()
    assert "densenet_bc_22_12, 8 px, batch 8, v5e, plain" in again.err
    with open(path, encoding="utf-8") as file:
        assert json.load(file)["rows"] == content["rows"]
    assert again.out == done.stdout
