"""A small DenseNet-BC on pictures with ten labels each, made from real handwritten digits; five minutes on a laptop.

    python examples/many_labels/make.py DIR
    python main.py --config examples/many_labels/config.py --config.data.dir=DIR --workdir ./runs/many_labels

Expected: a mean AUROC of about 0.97 over the ten labels of 1,000 test pictures (docs/many_labels.md).
"""

import ml_collections

from configs import digits


def get_config() -> ml_collections.ConfigDict:
    """densenet_bc_22_12 on pictures of 16x16 pixels with ten labels."""
    config = digits.get_config()

    config.data.name = "table"
    config.data.table = "labels.csv"
    config.data.label_columns = tuple(f"digit {digit}" for digit in range(10))
    config.data.labels = "multi"
    config.data.split_column = "split"
    config.data.eval_split = "validation"
    config.data.image_size_px = 16

    config.train.epochs = 20.0
    config.train.class_weights = "balanced"
    config.optim.warmup_epochs = 1.0
    return config
