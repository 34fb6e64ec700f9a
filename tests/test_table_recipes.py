"""The recipes for tables run to their end on small sets with the layout of the real ones."""

import pytest

from tests.inputs import medical
from tests.label_run import write_label_set
from tests.main_in_process import run_here
from tests.main_processes import parse_last_line

SMALL = (
    *("--config.model.pretrained=", "--config.model.name=densenet_bc_22_12", "--config.model.block_sizes=(1,)"),
    *("--config.model.growth_rate=4", "--config.data.image_size_px=8", "--config.train.epochs=2.0"),
    *("--config.train.global_batch_size=8", "--config.eval.batch_size=8"),
)

pytestmark = pytest.mark.usefixtures("no_report")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def train(tmp_path, *arguments):
    output, _ = run_here(*SMALL, f"--workdir={tmp_path / 'run'}", *arguments)
    return parse_last_line(output)


def test_chexnet_trains_and_is_judged_on_the_official_test_list(tmp_path):
    medical.write_chest_xray14(str(tmp_path))
    recipe = ("--config=chexnet", f"--config.data.dir={tmp_path / 'images'}")
    trained = train(tmp_path, *recipe)
    assert (trained["mode"], trained["step"], trained["examples"]) == ("train", 5, 2)
    assert (tmp_path / "run" / "labels.txt").read_text().split() == list(medical.FINDINGS)
    tested = train(tmp_path, *recipe, "--mode=eval", "--config.data.eval_split=test")
    assert (tested["examples"], tested["step"]) == (4, 5)


def test_chexpert_trains_on_one_table_and_is_judged_on_the_other(tmp_path):
    medical.write_chexpert(str(tmp_path))
    result = train(tmp_path, "--config=chexpert", f"--config.data.dir={tmp_path}")
    assert (result["examples"], result["step"]) == (4, 4)
    assert 0 <= result["auroc"] <= 1
    assert (tmp_path / "run" / "labels.txt").read_text().split("\n")[:-1] == list(medical.OBSERVATIONS)


@pytest.mark.parametrize(
    ("recipe", "columns", "figure"), [(":multi", "('bright', 'left')", "auroc"), ("", "('bright',)", "top1")]
)
def test_finetune_table_holds_groups_out(tmp_path, recipe, columns, figure):
    table = write_label_set(tmp_path / "data")
    changes = ("--config.data.group_column=patient", f"--config.data.label_columns={columns}")
    result = train(tmp_path, f"--config=finetune_table{recipe}", f"--config.data.table={table}", *changes)
    assert (result["examples"], result["step"]) == (8, 8)
    assert 0 <= result[figure] <= 1
