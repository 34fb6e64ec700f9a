"""densenet169 on ImageNet: 120 epochs, a tenth of the rate from 30, 60 and 90 on.

    python main.py --config configs/densenet169.py --workdir ./runs/densenet169

Expected: 76.81% top-1, as PaddleClas publishes for this recipe. Not reproduced here.
"""

import ml_collections

from configs import densenet121_piecewise


def get_config() -> ml_collections.ConfigDict:
    """densenet121_piecewise with another depth."""
    config = densenet121_piecewise.get_config()
    config.model.name = "densenet169"
    return config
