"""Published weights to the classes or labels of a table: the body learns at a tenth of the head's rate.

    python main.py --config configs/finetune_table.py --config.data.table=kinds.csv --workdir ./runs/kinds
    python main.py --config configs/finetune_table.py:multi --config.data.table=labels.csv \
        --config.data.label_columns="('edema', 'mass')" --config.data.group_column=patient --workdir ./runs/labels

A table has a column `path` (below its folder, or below config.data.dir) and, for the first command, a column `label`
with class names; for the second a column a label with 1, 0 or nothing for unknown. A fifth of the images, in whole
groups, is held out for validation; config.data.split_column names a column that says it instead, with
config.data.eval_split its value. docs/data.md has all ways to say what is in a table.

Expected: what the data allow; not reproduced here (the published weights were not available). The tests do it without.
"""

import ml_collections

from configs import default, finetune


def get_config(labels: str = "single") -> ml_collections.ConfigDict:
    """The recipe `finetune` on a table with one class ("single") or many labels ("multi") an image."""
    config: ml_collections.ConfigDict = finetune.get_config("table")
    config.data.labels = labels
    config.data.label_columns = ("label",) if labels == "single" else ()
    config.data.holdout = 0.2
    config.data.eval_split = "holdout"
    config.train.label_smoothing = 0.1 if labels == "single" else default.get_config().train.label_smoothing
    return config
