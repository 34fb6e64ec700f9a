"""Every row of the table: its exact parameter count, and that what it states is usable."""

import hashlib

import jax
import pytest

from densenet_jax.errors import UserError
from densenet_jax.models.variants import VARIANTS, get_variant, list_models
from tests.golden.drawn import key_lines
from tests.models import golden

NAMES_USERS_RELY_ON = {
    *("densenet121", "densenet161", "densenet169", "densenet201", "densenet264", "densenet264_k48", "densenet264d"),
    *("densenet121d", "densenetblur121d", "densenet232", "densenet_40_12", "densenet_100_12", "densenet_100_24"),
    *("densenet_bc_100_12", "densenet_bc_250_24", "densenet_bc_190_40"),
    *("dpn48b", "dpn68", "dpn68b", "dpn92", "dpn98", "dpn107", "dpn131"),
    *("rdnet_tiny", "rdnet_small", "rdnet_base", "rdnet_large"),
}


@pytest.mark.parametrize("name", list(VARIANTS))
def test_parameter_count_is_exact(name):
    params = golden.abstract_variables(name)["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == VARIANTS[name].parameter_count


# Beside the counts, which are of the same traced networks.
@pytest.mark.parametrize("name", sorted(path.stem for path in golden.GOLDEN.glob("[dr]*.npz")))
def test_state_dict_keys_and_shapes_are_the_reference_s(name):
    expected = golden.golden(name)
    shapes = golden.torch_shapes(golden.abstract_variables(name))
    assert hashlib.sha256(key_lines(shapes).encode()).hexdigest() == str(expected["keys_sha256"])
    norms = sum(key.endswith("running_mean") for key in shapes)
    assert len(shapes) + norms == int(expected["key_count"])


def test_the_table_has_every_promised_name():
    assert set(VARIANTS) >= NAMES_USERS_RELY_ON


@pytest.mark.parametrize("row", VARIANTS.values(), ids=lambda row: row.name)
def test_row_is_consistent(row):
    assert row.name == row.name.lower()
    ways = [row.preprocessing, *(result.preprocessing for result in row.published)]
    for way in ways:
        assert all(0 < value < 1 for value in way.mean)
        assert all(0 < value < 1 for value in way.std)
        assert 0 < way.crop_fraction <= 1
        assert way.interpolation in ("bicubic", "bilinear")
        assert way.test_px >= way.input_px > 0
    for result in row.published:
        assert result.source
        assert 50 < result.top1 < 100
        assert result.top5 is None or result.top1 < result.top5 < 100


def test_a_checkpoint_is_found_by_its_hub_id():
    row = get_variant("densenet121")
    assert [(r.preprocessing.test_px, r.top1) for r in row.results_of("timm/densenet121.ra_in1k")] == [
        (224, 75.574),
        (288, 76.486),
    ]
    assert row.results_of("weights.safetensors") == ()
    assert get_variant("dpn68b").preprocessing_of("timm/dpn68b.mx_in1k").mean == (124 / 255, 117 / 255, 104 / 255)
    assert get_variant("dpn68b").preprocessing_of(None).crop_fraction == 0.95


def test_unknown_name_gives_the_nearest():
    with pytest.raises(UserError, match=r"densenet112.*densenet121"):
        get_variant("densenet112")


def test_list_models_takes_a_pattern():
    assert list_models("dpn68*") == ["dpn68", "dpn68b"]
    assert list_models() == list(VARIANTS)
