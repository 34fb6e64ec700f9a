"""densenet121 on ImageNet as in the paper: 90 epochs, a tenth of the rate from 30 and from 60 on.

    python main.py --config configs/densenet121_paper.py --workdir ./runs/paper

Expected: 74.98% top-1 single-crop, 76.39% with ten crops (arXiv:1608.06993, table 3). Not reproduced here.
"""

import ml_collections

from configs import default


def get_config() -> ml_collections.ConfigDict:
    """Batch 256, SGD with Nesterov momentum, weight decay 1e-4 on everything."""
    config = default.get_config()
    config.train.epochs = 90.0
    config.optim.milestone_epochs = (30.0, 60.0)
    return config
