"""Evaluates ImageNet weights on ImageNet ReaL: the validation images, relabeled with every correct class.

    python main.py --config configs/imagenet_real.py --mode eval
    python main.py --config configs/imagenet_real.py --mode eval --config.model.pretrained= --workdir RUN

The first line judges densenet121.tv_in1k, the second the newest checkpoint of the ImageNet run in RUN. An answer is
right if it is any of an image's classes, and images for which the raters found none (3,163 of 50,000) are left out, as
in the paper (arXiv:2006.07159); "examples" in the last line is the number counted. The loss is minus the logarithm of
the right classes' total probability.

Expected: 81.73% top-1, 95.04% top-5 (timm's results table, results-imagenet-real.csv). Not reproduced here: weights and
photographs were not available.
"""

import ml_collections

from configs import default


def get_config() -> ml_collections.ConfigDict:
    """The 50,000 validation images with their real labels, single crop of 224 from 256 px."""
    config = default.get_config()
    config.model.pretrained = "timm/densenet121.tv_in1k"
    config.data.name = "imagenet2012_real"
    config.data.eval_split = "validation"
    config.eval.batch_size = 256
    return config
