"""A Dual Path Network on ImageNet; its name stands after a colon.

    python main.py --config configs/dpn.py:dpn68 --workdir ./runs/dpn68

Expected top-1, as PaddleClas publishes for this recipe: dpn68 76.8, dpn92 79.9, dpn98 80.6, dpn131 80.7, dpn107 80.9.
Not reproduced here. With the default: python main.py --config configs/dpn.py trains dpn68.
"""

import ml_collections

from configs import default


def get_config(name: str = "dpn68") -> ml_collections.ConfigDict:
    """Batch 256, 200 epochs of cosine, label smoothing, mixup."""
    config = default.get_config()
    config.model.name = name
    config.augment.mixup_alpha = 0.2
    config.train.epochs = 200.0
    config.train.label_smoothing = 0.1
    config.optim.schedule = "cosine"
    return config
