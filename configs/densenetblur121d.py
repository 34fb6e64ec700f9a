"""densenetblur121d on ImageNet with the modern recipe.

    python main.py --config configs/densenetblur121d.py --workdir ./runs/densenetblur121d

Expected: about 76.6% top-1 (timm publishes 76.57% for densenetblur121d.ra_in1k, whose own recipe differs). Not
reproduced here.
"""

import ml_collections

from configs import modern


def get_config() -> ml_collections.ConfigDict:
    """The modern recipe with a deep, blur-pooled stem."""
    return modern.get_config("densenetblur121d")
