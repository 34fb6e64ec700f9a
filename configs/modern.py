"""densenet121, or another variant after a colon, on ImageNet with training methods newer than the paper.

    python main.py --config configs/modern.py --workdir ./runs/modern
    python main.py --config configs/modern.py:densenetblur121d --workdir ./runs/blur

Expected: above 75.6% top-1 for densenet121, the best published for 120 epochs of the plain recipe (timm's own longer
recipes reach 75.57% with densenet121.ra_in1k and 76.57% with densenetblur121d.ra_in1k). Not reproduced here.
"""

import ml_collections

from configs import default


def get_config(name: str = "densenet121") -> ml_collections.ConfigDict:
    """200 epochs of cosine at batch 1024 in bfloat16, with label smoothing, mixup and averaged weights."""
    config = default.get_config()
    config.model.name = name
    config.model.dtype = "bfloat16"
    config.augment.mixup_alpha = 0.1
    config.train.epochs = 200.0
    config.train.global_batch_size = 1024
    config.train.label_smoothing = 0.1
    config.train.average_decay = 0.9999
    config.optim.schedule = "cosine"
    config.optim.learning_rate = 0.1
    config.optim.base_batch_size = 256
    config.optim.weight_decay = 5e-5
    config.optim.decay_norm_and_bias = False
    config.optim.warmup_epochs = 5.0
    return config
