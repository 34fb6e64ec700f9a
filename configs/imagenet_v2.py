"""Evaluates ImageNet weights on ImageNetV2: 10,000 new photographs of the same 1000 classes.

    python main.py --config configs/imagenet_v2.py --mode eval
    python main.py --config configs/imagenet_v2.py --mode eval --config.model.pretrained= --workdir RUN

The first line judges densenet121.tv_in1k, the second the newest checkpoint of the ImageNet run in RUN. The photographs
were collected anew by ImageNet's own procedure (arXiv:1902.10811); this is the selection "matched-frequency", and
--config.data.name=imagenet_v2/threshold-0.7 and imagenet_v2/topimages are the other two.

Expected: 62.94% top-1, 84.25% top-5 (timm's results table, results-imagenetv2-matched-frequency.csv). Not reproduced
here: weights and photographs were not available.
"""

import ml_collections

from configs import default


def get_config() -> ml_collections.ConfigDict:
    """The 10,000 images, single crop of 224 from 256 px, bicubic as the weights were measured."""
    config = default.get_config()
    config.model.pretrained = "timm/densenet121.tv_in1k"
    config.data.name = "imagenet_v2/matched-frequency"
    config.data.eval_split = "test"
    config.eval.batch_size = 256
    return config
