"""Every setting with its default. A recipe imports this and changes what makes it special.

Lengths that can be given in epochs or in steps have two keys; the one in steps wins where it is not 0. What follows
from other settings (steps an epoch, the schedule's length, the scaled rate) is computed after the command line's
overrides, never here.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """The settings that every recipe starts from: densenet121 on ImageNet with the milestone schedule."""
    config = ml_collections.ConfigDict()
    config.seed = 0  # with the step, the only source of randomness: initial weights, order, crops, augmentation

    model = config.model = ml_collections.ConfigDict()
    model.name = "densenet121"  # a name of densenet_jax.list_models()
    model.pretrained = ""  # start from these weights: a hub id, a .safetensors or a .pth file
    model.num_classes = 0  # 0: as many as the data set has
    model.dtype = "float32"  # of activations and matrix products; parameters, statistics and losses stay float32
    model.classifier_dropout = 0.0  # rate before the classifier
    model.layer_dropout = 0.0  # rate after the convolutions of a dense layer (the paper's 0.2 without augmentation)
    model.batch_norm_momentum = 0.9  # kept share of the running statistics (0.9 here is 0.1 in torch)
    model.batch_norm_group_size = 0  # examples that share batch statistics; 0: the whole global batch
    model.unbiased_running_variance = True  # torch's n/(n-1); False: the biased variance, as flax keeps it
    model.remat = False  # recompute dense layers in the backward pass: less memory, more time

    data = config.data = ml_collections.ConfigDict()
    data.name = "imagenet2012"  # a tfds name, "digits", or "folder" for class folders under data.dir
    data.dir = ""  # where data sets are; "": tfds's own directory (TFDS_DATA_DIR or ~/tensorflow_datasets)
    data.train_split = "train"  # what is trained on
    data.eval_split = "validation"  # what is evaluated
    data.image_size_px = 224  # side of the square that the model is trained on
    data.channels = 3  # 1 reads images as grey
    data.crop = "random_resized_crop"  # or "none": the stored image, resized where it has another size
    data.crop_area = (0.08, 1.0)  # share of the image's area that a random crop covers
    data.crop_aspect = (3 / 4, 4 / 3)  # width over height of a random crop
    data.interpolation = "bilinear"  # of training crops: "bilinear" or "bicubic"
    data.flip = True  # mirror half of the training images
    data.pad_px = 0  # pad by this much with zeros and crop back at random (CIFAR's 4)
    data.mean = ()  # of each channel in [0, 1]; (): the weights' own
    data.std = ()  # likewise
    data.reader_threads = 0  # threads that read and decode whole batches; 0: one a core
    data.prefetch_batches = 4  # decoded batches that wait in memory at most

    train = config.train = ml_collections.ConfigDict()
    train.epochs = 300.0  # passes over the training split; fractions are allowed
    train.global_batch_size = 256  # examples a step, over all devices
    train.label_smoothing = 0.0  # spread this much evenly over all classes
    train.log_every_steps = 50  # steps between reports

    optim = config.optim = ml_collections.ConfigDict()
    optim.name = "sgd"  # "sgd", "adamw", "lamb" or "rmsprop"
    optim.learning_rate = 0.1  # peak rate
    optim.momentum = 0.9  # sgd and rmsprop
    optim.nesterov = True  # sgd: look ahead along the momentum
    optim.weight_decay = 1e-4  # torch's form: added to the gradient (sgd), or decoupled (adamw, lamb)
    optim.decay_norm_and_bias = True  # False spares batch-norm scales and all biases from weight decay
    optim.schedule = "multistep"  # or "cosine", "constant"
    optim.milestone_epochs = (150.0, 225.0, 300.0)  # multistep: where the rate drops
    optim.milestone_steps = ()  # the same in steps
    optim.milestone_rates = ()  # multistep: the rate of each stretch; (): learning_rate times powers of decay_factor
    optim.decay_factor = 0.1  # multistep: factor at each milestone
    optim.end_learning_rate = 0.0  # cosine: the rate at the end
    optim.warmup_epochs = 0.0  # linear warmup from 0 in front of any schedule
    optim.warmup_steps = 0  # the same in steps

    evaluation = config.eval = ml_collections.ConfigDict()
    evaluation.every_epochs = 1.0  # epochs between validations; there is always one at the end
    evaluation.batch_size = 0  # examples a step, over all devices; 0: train.global_batch_size
    evaluation.image_size_px = 0  # side of the evaluated square; 0: data.image_size_px
    evaluation.crop_fraction = 0.0  # crop side over resized short side (0.875: 224 of 256); 0: the weights' own
    evaluation.interpolation = ""  # "bilinear" or "bicubic", antialiased as Pillow does it; "": the weights' own
    evaluation.checkpoint = "latest"  # what --mode eval evaluates: "latest", "best" or a step

    checkpoint = config.checkpoint = ml_collections.ConfigDict()
    checkpoint.every_steps = 1000  # steps between saves; every validation and the end save as well
    checkpoint.max_to_keep = 10  # newest checkpoints kept; the best by validation top-1 is kept besides

    return config.lock()
