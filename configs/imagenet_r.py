"""Evaluates ImageNet weights on ImageNet-R: 30,000 drawings, toys, statues ... of 200 of the classes.

    python main.py --config configs/imagenet_r.py --mode eval
    python main.py --config configs/imagenet_r.py --mode eval --config.model.pretrained= --workdir RUN

The first line judges densenet121.tv_in1k, the second the newest checkpoint of the ImageNet run in RUN. As in the paper
(arXiv:2006.16241) only the 200 classes that occur are allowed as answers.

Expected: 36.81% top-1, 54.03% top-5 (timm's results table, results-imagenet-r.csv). Not reproduced here: weights
and images were not available.
"""

import ml_collections

from configs import default


def get_config() -> ml_collections.ConfigDict:
    """The 30,000 images, judged among their 200 classes, single crop of 224 from 256 px."""
    config = default.get_config()
    config.model.pretrained = "timm/densenet121.tv_in1k"
    config.data.name = "imagenet_r"
    config.data.eval_split = "test"
    config.eval.class_map = "present"
    config.eval.batch_size = 256
    return config
