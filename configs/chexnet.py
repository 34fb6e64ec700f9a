"""CheXNet: 14 findings on chest X-rays with densenet121 from ImageNet weights (arXiv:1711.05225).

    python main.py --config configs/chexnet.py --config.data.dir=NIH/images --workdir ./runs/chexnet
    python main.py --config configs/chexnet.py --config.data.dir=NIH/images --workdir ./runs/chexnet --mode eval \
        --config.data.eval_split=test --config.eval.checkpoint=best

NIH holds ChestX-ray14 as it is published (https://nihcc.app.box.com/v/ChestXray-NIHCC): Data_Entry_2017.csv,
train_val_list.txt, test_list.txt, and the 112,120 files of all archives in images/. A tenth of the patients of
train_val_list.txt is held out for validation; the second command judges the 25,596 images of test_list.txt.

Published: mean AUROC 0.841 over the 14 findings, on a random split by patients. Not reproduced here (the images were
not available). The paper drops the rate by ten when the validation loss stops falling; here a cosine does.
"""

import ml_collections

from configs import default


def get_config() -> ml_collections.ConfigDict:
    """densenet121 on ChestX-ray14, 224 px, Adam from 0.001 with batches of 16."""
    config = default.get_config()
    config.model.pretrained = "timm/densenet121.tv_in1k"

    config.data.name = "table"
    config.data.table = "../Data_Entry_2017.csv"
    config.data.image_column = "Image Index"
    config.data.labels = "multi"
    config.data.label_columns = ("Finding Labels",)
    config.data.label_separator = "|"
    config.data.label_none = "No Finding"
    config.data.split_lists = (("train", "train_val_list.txt"), ("test", "test_list.txt"))
    config.data.group_column = "Patient ID"
    config.data.holdout = 0.1
    config.data.eval_split = "holdout"
    config.data.crop = "none"

    config.train.epochs = 10.0
    config.train.global_batch_size = 16

    config.optim.name = "adamw"
    config.optim.learning_rate = 0.001
    config.optim.weight_decay = 0.0
    config.optim.schedule = "cosine"

    config.eval.crop_fraction = 1.0
    config.eval.batch_size = 64
    return config
