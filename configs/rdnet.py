"""An RDNet on ImageNet with its authors' recipe; the name stands after a colon, "rdnet_large_384" fine-tunes at 384 px.

    python main.py --config configs/rdnet.py --workdir ./runs/rdnet_tiny
    python main.py --config configs/rdnet.py:rdnet_large --workdir ./runs/rdnet_large
    python main.py --config configs/rdnet.py:rdnet_large_384 --workdir ./runs/rdnet_large_384

Expected top-1, as the authors' model cards give it: rdnet_tiny 82.8%, rdnet_small 83.7%, rdnet_base 84.4%, rdnet_large
84.8%, at 384 px 85.8%. Not reproduced here. Source: 2403.19588 and the settings that go with it
(github.com/naver-ai/rdnet, TRAINING.md). They draw the interpolation of each training crop; here it is bicubic.
"""

import ml_collections

from configs import default

_DROP_PATH = {"rdnet_tiny": 0.15, "rdnet_small": 0.35, "rdnet_base": 0.4, "rdnet_large": 0.5}


def get_config(name: str = "rdnet_tiny") -> ml_collections.ConfigDict:
    """AdamW at batch 512 for 300 epochs of cosine, with mixup, cutmix, RandAugment, erasing and drop path."""
    config = default.get_config()
    large = name == "rdnet_large_384"
    config.model.name = "rdnet_large" if large else name
    config.model.dtype = "bfloat16"
    config.model.drop_path = _DROP_PATH.get(name, 0.15)
    config.data.interpolation = "bicubic"
    config.augment.rand_layers = 2
    config.augment.erase = 0.25
    config.augment.mixup_alpha = 0.8
    config.augment.cutmix_alpha = 1.0
    config.train.epochs = 300.0
    config.train.global_batch_size = 512
    config.train.label_smoothing = 0.1
    config.optim.name = "adamw"
    config.optim.learning_rate = 1e-3
    config.optim.base_batch_size = 512
    config.optim.weight_decay = 0.05
    config.optim.decay_norm_and_bias = False
    config.optim.schedule = "cosine"
    config.optim.end_learning_rate = 1e-6
    config.optim.warmup_epochs = 20.0
    config.optim.warmup_learning_rate = 1e-4
    return _finetune(config) if large else config


def _finetune(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """30 epochs at 384 px from the weights at 224 px, without mixtures, with rates that fall towards the stem."""
    config.model.pretrained = "naver-ai/rdnet_large.nv_in1k"
    config.model.drop_path = 0.6
    config.data.image_size_px = 384
    config.eval.crop_fraction = 1.0
    config.augment.mixup_alpha = 0.0
    config.augment.cutmix_alpha = 0.0
    config.train.epochs = 30.0
    config.optim.learning_rate = 2e-5
    config.optim.layer_decay = 0.7
    config.optim.weight_decay = 1e-8
    config.optim.warmup_epochs = 5.0
    config.optim.warmup_learning_rate = 1e-6
    return config
