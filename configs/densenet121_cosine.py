"""densenet121 on ImageNet: 120 epochs of cosine, color jitter, no weight decay on batch norm and biases.

    python main.py --config configs/densenet121_cosine.py --workdir ./runs/cosine

Expected: 75.43% top-1, 92.60% top-5, as MindSpore's model zoo publishes for this recipe. Not reproduced here.
"""

import ml_collections

from configs import default


def get_config() -> ml_collections.ConfigDict:
    """Batch 256, cosine from 0.1 to 0."""
    config = default.get_config()
    config.augment.color_jitter = (0.4, 0.4, 0.4)
    config.train.epochs = 120.0
    config.optim.schedule = "cosine"
    config.optim.decay_norm_and_bias = False
    return config
