"""Predictions as CSV and Parquet tables."""

import csv
import json
import os

import pytest
from pyarrow import parquet

from densenet_jax.errors import UserError
from densenet_jax.predict.output import PredictionFile
from densenet_jax.predict.table import check_table, column_names, write_table

NAMES = ("crane", "image", "crane")
ENTRIES = [
    {
        "image": 'photos/a, "b"\n\r.png',
        "predictions": [
            {"class_id": 2, "label": "crane", "probability": 0.5},
            {"class_id": 0, "label": "crane", "probability": 0.25},
            {"class_id": 1, "label": "image", "probability": 0.25},
        ],
    },
    {"image": "not utf-8 \udcff.png", "error": "it is empty"},
]


def table_of(tmp_path, suffix, topk, entries=ENTRIES):
    entries = [
        {**entry, **({"predictions": entry["predictions"][: topk or None]} if "predictions" in entry else {})}
        for entry in entries
    ]
    lines, path = tmp_path / "lines", str(tmp_path / f"table{suffix}")
    lines.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    write_table(path, str(lines), NAMES, topk)
    check_table(path)  # it may be written again
    if suffix == ".csv":
        with open(path, newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))
    return parquet.read_table(path).to_pylist()


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
@pytest.mark.parametrize("topk", [0, 1, 2, 5])
def test_a_row_an_image(tmp_path, suffix, topk):
    first, second = table_of(tmp_path, suffix, topk)
    best = {"image": ENTRIES[0]["image"], "label": "crane", "probability": 0.5}
    more = {
        0: {"crane": 0.25, "image (1)": 0.25, "crane (2)": 0.5},
        1: {},
        2: {"label_2": "crane", "probability_2": 0.25},
        5: {"label_2": "crane", "probability_2": 0.25, "label_3": "image", "probability_3": 0.25},
    }[topk]
    empty = "" if suffix == ".csv" else None
    expected = {**best, **more, "error": empty}
    assert first == ({key: str(value) for key, value in expected.items()} if suffix == ".csv" else expected)
    assert list(first) == list(expected)
    refused = {"image": r"not utf-8 \udcff.png", "error": "it is empty"}
    assert second == {key: refused.get(key, empty) for key in expected}


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_decided_labels_have_a_column_beside_their_probability(tmp_path, suffix):
    lines, path = tmp_path / "lines", str(tmp_path / f"table{suffix}")
    pairs = [(1, 0.75, False), (0, 0.5, True)]
    answers = [
        {"class_id": number, "label": "ab"[number], "probability": chance, "predicted": decided}
        for number, chance, decided in pairs
    ]
    entries = [{"image": "x.png", "predictions": answers}, {"image": "y.png", "error": "it is empty"}]
    lines.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    write_table(path, str(lines), ("a", "b"), 0, decided=True)
    if suffix == ".csv":
        assert (tmp_path / "table.csv").read_text().splitlines() == [
            "image,label,probability,a,a_predicted,b,b_predicted,error",
            "x.png,b,0.75,0.5,true,0.75,false,",
            "y.png,,,,,,,it is empty",
        ]
    else:
        first, second = parquet.read_table(path).to_pylist()
        assert (first["a"], first["a_predicted"], first["b_predicted"]) == (0.5, True, False)
        assert second["a_predicted"] is None


def test_many_rows_keep_their_order(tmp_path):
    entries = [{"image": str(number), "error": "?"} for number in range(3000)]
    rows = table_of(tmp_path, ".parquet", 1, entries)
    assert [row["image"] for row in rows] == [str(number) for number in range(3000)]


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
@pytest.mark.parametrize("content", [b"", b"image,label\n", b"PAR1", b"\xff\xfe"])
def test_other_files_are_not_replaced(tmp_path, suffix, content):
    path = tmp_path / f"mine{suffix}"
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"mine{suffix} is not a table of predictions"):
        check_table(str(path))


def test_columns_are_distinct():
    for options in ({"topk": 0}, {"topk": 5}, {"topk": 0, "decided": True}):
        columns = column_names(("a", "a", "error", "label", "b_predicted", "b", ""), **options)
        assert len(set(columns)) == len(columns)
        assert len(columns) == {0: 11, 5: 12}[options["topk"]] + 7 * ("decided" in options)


def test_removing_lines_leaves_nothing(tmp_path):
    with PredictionFile(str(tmp_path / "lines"), {}) as output:
        output.write(ENTRIES)
        output.finish()
        output.remove()
    assert os.listdir(tmp_path) == []
