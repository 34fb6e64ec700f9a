"""Published weights to new classes: the body learns at a tenth of the head's rate.

    python main.py --config configs/finetune.py:digits --workdir ./runs/finetune
    python main.py --config configs/finetune.py:folder --config.data.dir=PHOTOS --workdir ./runs/photos

PHOTOS holds train/CLASS/*.jpg and val/CLASS/*.jpg, or CLASS/*.jpg alone with --config.data.holdout=0.2. The weights
are timm's densenet121.ra_in1k unless --config.model.pretrained names others; a file that a run's checkpoint was saved
to works as well. Not reproduced here (the published weights were not available); the tests do it with weights of their
own.

To train the new head only: --config.optim.freeze="^params/(?!classifier)"
"""

import ml_collections

from configs import default


def get_config(data_set: str = "digits") -> ml_collections.ConfigDict:
    """densenet121.ra_in1k, 20 epochs of cosine from 0.02."""
    config = default.get_config()
    config.model.pretrained = "timm/densenet121.ra_in1k"
    config.data.name = data_set
    config.data.eval_split = "test" if data_set == "digits" else "validation"
    if data_set == "digits":  # 8x8 gray images, enlarged and read as color images
        config.data.image_size_px = 64
        config.data.crop = "none"
        config.augment.flip = False
        config.eval.crop_fraction = 1.0
    config.train.epochs = 20.0
    config.train.global_batch_size = 64
    config.train.label_smoothing = 0.1
    config.optim.learning_rate = 0.02
    config.optim.schedule = "cosine"
    config.optim.rate_multipliers = (("^params/classifier", 1.0), ("", 0.1))
    return config
