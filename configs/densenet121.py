"""densenet121 on ImageNet with the milestone schedule: 300 epochs, a tenth of the rate from 150 and from 225 on.

    python main.py --config configs/densenet121.py --workdir ./runs

Expected: 74 to 76% top-1 on the 50,000 validation images (published: 74.98 after 90 epochs in arXiv:1608.06993,
75.66 after 120 epochs with drops at 30, 60 and 90). Not reproduced here.
"""

import ml_collections

from configs import default


def get_config() -> ml_collections.ConfigDict:
    """The defaults are this recipe: densenet121, 224 px, SGD with Nesterov momentum, rates 0.1, 0.01, 0.001."""
    return default.get_config()
