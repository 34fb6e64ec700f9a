"""A small DenseNet-BC on real handwritten digits: a first run on a laptop without a GPU.

    python main.py --config configs/digits.py --workdir ./runs/digits

1,437 training and 360 held-out images of 8x8 pixels that ship with scikit-learn, prepared on first use.

Expected: 98.3 to 99.5% of the 360 held-out images, depending on seed and processor.
"""

import ml_collections

from configs import default


def get_config() -> ml_collections.ConfigDict:
    """densenet_bc_22_12 on the digits."""
    config = default.get_config()

    config.model.name = "densenet_bc_22_12"

    config.data.name = "digits"
    config.data.eval_split = "test"
    config.data.image_size_px = 8
    config.data.channels = 1
    config.data.crop = "none"
    config.augment.flip = False
    config.augment.pad_px = 1
    config.data.mean = (0.305,)
    config.data.std = (0.376,)

    config.train.epochs = 40.0
    config.train.global_batch_size = 64
    config.train.log_every_steps = 20

    config.optim.schedule = "cosine"
    config.optim.warmup_epochs = 2.0

    config.eval.every_epochs = 5.0

    config.checkpoint.every_steps = 100
    return config
