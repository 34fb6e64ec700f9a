"""Evaluates ImageNet weights on ImageNet-A: 7,500 photographs that ResNet-50 gets wrong, of 200 of the classes.

    python main.py --config configs/imagenet_a.py --mode eval
    python main.py --config configs/imagenet_a.py --mode eval --config.model.pretrained= --workdir RUN

The first line judges densenet121.tv_in1k, the second the newest checkpoint of the ImageNet run in RUN. As in the paper
(arXiv:1907.07174) only the 200 classes that occur are allowed as answers.

Expected: 2.55% top-1, 22.65% top-5 (timm's results table, results-imagenet-a.csv). Not reproduced here: weights
and photographs were not available.
"""

import ml_collections

from configs import default


def get_config() -> ml_collections.ConfigDict:
    """The 7,500 images, judged among their 200 classes, single crop of 224 from 256 px."""
    config = default.get_config()
    config.model.pretrained = "timm/densenet121.tv_in1k"
    config.data.name = "imagenet_a"
    config.data.eval_split = "test"
    config.eval.class_map = "present"
    config.eval.batch_size = 256
    return config
