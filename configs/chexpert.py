"""CheXpert: 14 observations on chest X-rays, uncertain labels by policy (arXiv:1901.07031).

    python main.py --config configs/chexpert.py --config.data.dir=DIR --workdir ./runs/chexpert

DIR holds the folder CheXpert-v1.0-small as it is published (https://stanfordmlgroup.github.io/competitions/chexpert/),
with train.csv, valid.csv and the images of both. Labels that a report does not mention are 0. Uncertain ones are 1 (the
paper's U-Ones); --config.data.uncertain=zero and =ignore are its U-Zeros and U-Ignore.

Published, for U-Ones, an average over 30 checkpoints, on the 200 validation studies: AUROC 0.858 for atelectasis, 0.832
cardiomegaly, 0.899 consolidation, 0.941 edema, 0.934 pleural effusion. Not reproduced here (the images were not
available). Figures here are by image, those of the paper by study.
"""

import ml_collections

from configs import default

OBSERVATIONS = (
    *("No Finding", "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion", "Edema"),
    *("Consolidation", "Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion", "Pleural Other"),
    *("Fracture", "Support Devices"),
)


def get_config() -> ml_collections.ConfigDict:
    """densenet121 on CheXpert, 320 px, Adam at 0.0001 with batches of 16 for 3 epochs."""
    config = default.get_config()
    config.model.pretrained = "timm/densenet121.tv_in1k"

    config.data.name = "table"
    config.data.table = "CheXpert-v1.0-small/{split}.csv"
    config.data.image_column = "Path"
    config.data.labels = "multi"
    config.data.label_columns = OBSERVATIONS
    config.data.empty = "zero"
    config.data.uncertain = "one"
    config.data.eval_split = "valid"
    config.data.image_size_px = 320
    config.data.crop = "none"
    config.augment.flip = False

    config.train.epochs = 3.0
    config.train.global_batch_size = 16

    config.optim.name = "adamw"
    config.optim.learning_rate = 0.0001
    config.optim.weight_decay = 0.0
    config.optim.schedule = "constant"

    config.eval.crop_fraction = 1.0
    config.eval.batch_size = 64
    return config
