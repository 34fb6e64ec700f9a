"""The paper's networks for 32-pixel images; data set and network stand after a colon, "+" is with augmentation.

    python main.py --config configs/paper_small.py --workdir ./runs/c10
    python main.py --config configs/paper_small.py:cifar100,densenet_100_24 --workdir ./runs/c100
    python main.py --config configs/paper_small.py:svhn,densenet_40_12 --workdir ./runs/svhn

Expected error in per cent (arXiv:1608.06993, table 2; not reproduced here):
                        cifar10  cifar10+  cifar100  cifar100+  svhn
    densenet_40_12         7.00      5.24     27.55      24.42  1.79
    densenet_100_12        5.77      4.10     23.79      20.20  1.67
    densenet_100_24        5.83      3.74     23.42      19.25  1.59
    densenet_bc_100_12     5.92      4.51     24.15      22.27  1.76
    densenet_bc_250_24     5.19      3.62     19.64      17.60  1.74
    densenet_bc_190_40        -      3.46         -      17.18     -
"""

import ml_collections

from configs import default


def get_config(choice: str = "cifar10+,densenet_bc_100_12") -> ml_collections.ConfigDict:
    """Batch 64, rate 0.1, a tenth from half and from three quarters of the epochs on."""
    data_set, _, name = choice.partition(",")
    augmented, svhn = data_set.endswith("+"), data_set.startswith("svhn")
    config = default.get_config()
    config.model.name = name or "densenet_bc_100_12"
    config.model.layer_dropout = 0.0 if augmented else 0.2
    config.data.name = "svhn_cropped" if svhn else data_set.removesuffix("+")
    config.data.train_split = "train+extra" if svhn else "train"
    config.data.eval_split = "test"
    config.data.image_size_px = 32
    config.data.crop = "none"
    if svhn:  # the paper only divides by 255 there
        config.data.mean, config.data.std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    config.augment.flip = augmented
    config.augment.pad_px = 4 if augmented else 0
    config.train.epochs = 40.0 if svhn else 300.0
    config.train.global_batch_size = 64
    config.optim.milestone_epochs = (20.0, 30.0) if svhn else (150.0, 225.0)
    return config
