"""densenet161 on ImageNet with a batch of 1024 on eight chips: 90 epochs, rate 0.8, a tenth from 30 and from 60 on.

    python main.py --config configs/densenet161_large_batch.py --workdir ./runs/densenet161_large_batch

Expected: 75.99% top-1, as Ascend's model zoo publishes for eight chips in mixed precision. Not reproduced here.
"""

import ml_collections

from configs import default


def get_config() -> ml_collections.ConfigDict:
    """The rate grows with the batch: 0.2 for 256."""
    config = default.get_config()
    config.model.name = "densenet161"
    config.model.dtype = "bfloat16"
    config.model.batch_norm_group_size = 128  # as there, each of the eight chips normalizes by its own statistics
    config.train.epochs = 90.0
    config.train.global_batch_size = 1024
    config.optim.learning_rate = 0.2
    config.optim.base_batch_size = 256
    config.optim.milestone_epochs = (30.0, 60.0)
    return config
