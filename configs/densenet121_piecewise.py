"""densenet121 on ImageNet: 120 epochs, a tenth of the rate from 30, 60 and 90 on; the other depths start from this.

    python main.py --config configs/densenet121_piecewise.py --workdir ./runs/piecewise

Expected: 75.66% top-1, as PaddleClas publishes for this recipe. Not reproduced here.
"""

import ml_collections

from configs import default


def get_config() -> ml_collections.ConfigDict:
    """Batch 256, random resized crop and flip."""
    config = default.get_config()
    config.train.epochs = 120.0
    config.optim.milestone_epochs = (30.0, 60.0, 90.0)
    return config
