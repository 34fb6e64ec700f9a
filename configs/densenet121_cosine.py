"""densenet121 on ImageNet with a cosine schedule and five epochs of warmup.

    python main.py --config configs/densenet121_cosine.py --workdir ./runs/cosine

Expected: about 75.4% top-1 (published for 120 epochs of cosine from 0.1 at batch 256: 75.43 top-1, 92.60 top-5).
Not reproduced here.
"""

import ml_collections

from configs import default


def get_config() -> ml_collections.ConfigDict:
    """120 epochs, cosine from 0.1 to 0; weight decay spares batch norm and biases."""
    config = default.get_config()
    config.train.epochs = 120.0
    config.optim.schedule = "cosine"
    config.optim.warmup_epochs = 5.0
    config.optim.decay_norm_and_bias = False
    return config
