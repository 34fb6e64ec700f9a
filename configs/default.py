"""Every setting with its default; a recipe imports this and changes some.

Lengths that can be given in epochs or in steps have two keys; the one in steps wins where it is not 0. What follows
from other settings (steps an epoch, the schedule's length, the scaled rate) is computed after the command line's
overrides, never here.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """Returns the settings that every recipe starts from: densenet121 on ImageNet with the milestone schedule."""
    config = ml_collections.ConfigDict()
    config.profile = ""  # "STEP:COUNT": write a profile of COUNT training steps from STEP on into the work directory
    config.seed = 0  # with the step, the only source of randomness: initial weights, order, crops, augmentation

    model = config.model = ml_collections.ConfigDict()
    model.name = "densenet121"  # a name of densenet_jax.list_models()
    model.pretrained = ""  # start from these weights: a hub id or a file (safetensors, PyTorch, Keras, Paddle)
    model.pretrained_average = "auto"  # of a file with both: the averaged weights; "raw" or "average" insists
    model.growth_rate = 0  # feature maps that a dense layer adds; 0: the variant's own
    model.block_sizes = ()  # layers of each block, such as (6, 12, 24, 16); (): the variant's own
    model.num_classes = 0  # 0: as many as the data set has
    model.dtype = "float32"  # or bfloat16, float16, float64; int8 to predict on a CPU (docs/predict.md)
    model.classifier_dropout = 0.0  # rate before the classifier
    model.drop_path = 0.0  # RDNet: share of examples that skip the last dense layer; rises linearly from the first
    model.layer_dropout = 0.0  # rate after the convolutions of a dense layer (the paper's 0.2 without augmentation)
    model.batch_norm_momentum = 0.9  # kept share of the running statistics (0.9 here is 0.1 in torch)
    model.batch_norm_epsilon = 0.0  # 0: the variant's own (1e-5, of DPN 1e-3)
    model.batch_norm_group_size = 0  # examples that share batch statistics; 0: the whole global batch
    model.unbiased_running_variance = True  # torch's n/(n-1); False: the biased variance, as flax keeps it
    model.remat = False  # recompute dense layers in the backward pass: less memory, more time
    model.block_form = "normalize_once"  # implementation in training; "plain": the same function, slower and larger
    model.kernels = "auto"  # "pallas": our kernels, on any GPU and on TPUs from v5 on; "xla": none; "auto": on Hopper

    data = config.data = ml_collections.ConfigDict()
    data.name = "imagenet2012"  # a tfds name, "digits", "folder" (class folders under data.dir) or "table"
    data.dir = ""  # where data sets are; "": tfds's own directory (TFDS_DATA_DIR or ~/tensorflow_datasets)
    data.train_split = "train"  # split for training
    data.eval_split = "validation"  # split for evaluation
    data.holdout = 0.0  # share (below 1) or number of training images kept back; data.eval_split="holdout" is these
    data.table = ""  # of name="table": a .csv or .parquet file; "{split}" in it stands for the split's name
    data.image_column = "path"  # of the table: paths below data.dir, by default below the table's folder
    data.label_columns = ()  # one column of class names, or one column a label: 1, 0, empty (unknown), -1 (uncertain)
    data.label_separator = ""  # between names in the one label column, such as "|"; "": it has one class
    data.label_none = ""  # of joined names: the name that stands for no label, such as "No Finding"
    data.split_column = ""  # of the table: names of splits; "": all rows are "train"
    data.split_lists = ()  # or pairs (split, text file with the path of an image a line)
    data.group_column = ""  # of the table: what data.holdout must not split, such as a patient
    data.class_order = "text"  # of classes; "natural": numbers by value, as timm; or a file with a name a line
    data.allow_changed = False  # True: go on although files of the data set came or went, or classes were renamed
    data.labels = "single"  # one class an image; "multi": many labels, each 1, 0 or unknown
    data.uncertain = "ignore"  # labels marked uncertain (-1): unknown, or counted as "zero" or "one"
    data.empty = "ignore"  # labels of a table that are empty: unknown, or counted as "zero"
    data.sampler = "shuffled"  # each image once an epoch; "balanced": every class or label comes equally often
    data.image_size_px = 224  # side of the square that the model is trained on
    data.channels = 3  # 1 reads images as gray; others, up to 64, need files with that many
    data.pixel_range = ()  # two stored values that become black and white; (): those of the file's own type
    data.dicom_frame = 0  # frame, from 1 on, of DICOM files that have several; 0: refuse them
    data.exif_orientation = False  # True: turn images of data sets as their camera recorded; prediction always does
    data.crop = "random_resized_crop"  # or "none": the stored image, resized where it has another size
    data.crop_area = (0.08, 1.0)  # share of the image's area that a random crop covers
    data.crop_aspect = (3 / 4, 4 / 3)  # width over height of a random crop
    data.interpolation = "bilinear"  # of training crops: "bilinear" or "bicubic"
    data.mean = ()  # of each channel in [0, 1]; (): the weights' own
    data.std = ()  # likewise
    data.on_damaged = "error"  # or "skip": take the next training image instead, and count
    data.antialias = True  # of training crops; False is faster and differs from the reference trainers
    data.reader_threads = 0  # threads that read and decode whole batches; 0: one a core
    data.prefetch_batches = 4  # decoded batches that wait in memory at most

    augment = config.augment = ml_collections.ConfigDict()  # of training images, on the accelerator
    augment.flip = True  # mirror half of the images
    augment.pad_px = 0  # pad by this much with zeros and crop back at random (CIFAR's 4)
    augment.color_jitter = (0.0, 0.0, 0.0)  # strength of brightness, contrast, saturation; usual: 0.4 each
    augment.rand_layers = 0  # RandAugment: operations an image, in place of color_jitter; 0: none; usual: 2
    augment.rand_magnitude = 9.0  # RandAugment: strength from 0 to 10
    augment.erase_mode = "pixel"  # content of an erased rectangle: "zero", "color" or "pixel" (noise)
    augment.erase = 0.0  # share of images that lose a random rectangle; usual: 0.25
    augment.repeats = 1  # differently augmented copies of each image of a batch; an epoch has 1/repeats of the images
    augment.mixup_alpha = 0.0  # of mixup's Beta distribution; 0: none
    augment.cutmix_alpha = 0.0  # likewise of cutmix
    augment.mix_probability = 1.0  # share of batches that are mixed
    augment.cutmix_share = 0.5  # share of the mixed batches that cutmix mixes, where both are on

    train = config.train = ml_collections.ConfigDict()
    train.epochs = 300.0  # passes over the training split; fractions are allowed
    train.patience_epochs = 0.0  # stop when checkpoint.best_metric has not improved for this long; 0: never
    train.global_batch_size = 256  # examples a step, over all devices
    train.microbatches = 1  # number of parts in which the batch is computed, to save memory
    train.sharding = "replicated"  # "fsdp": parameters and optimizer state split over the devices, gathered on use
    train.average_decay = 0.0  # kept share of the weights' moving average, which is then evaluated; 0: no average
    train.loss = ""  # one class: "softmax" or "binary"; many: "sigmoid", "focal" or "asymmetric"; "": the first
    train.loss_gammas = ()  # powers for present and absent labels; (): focal (2.0, 2.0), asymmetric (0.0, 4.0)
    train.loss_margin = 0.05  # asymmetric: absent labels of a smaller probability count nothing
    train.class_weights = ml_collections.FieldReference("none", object)  # or "balanced", or one number a class
    train.label_smoothing = 0.0  # spread this much evenly over all classes, or over presence and absence of a label
    train.log_every_steps = 0  # steps between reports; 0: 50, fewer in a run of less than 1,000 steps
    train.stall_secs = 600.0  # report, with stack traces of all threads, when nothing moves for this long; 0: never

    optim = config.optim = ml_collections.ConfigDict()
    optim.name = "sgd"  # "sgd", "adamw", "lamb" or "rmsprop"
    optim.learning_rate = 0.1  # peak rate
    optim.base_batch_size = 0  # rates are for a batch of this size and scale with the batch; 0: they are as given
    optim.momentum = 0.9  # sgd and rmsprop
    optim.nesterov = True  # sgd: look ahead along the momentum
    optim.weight_decay = 1e-4  # torch's form: added to the gradient (sgd), or decoupled (adamw, lamb)
    optim.decay_norm_and_bias = True  # False spares batch-norm scales and all biases from weight decay
    optim.clip_grad_norm = 0.0  # cut the gradient's norm to this; 0: never
    optim.betas = (0.9, 0.999)  # adamw and lamb: decay rates of the moment averages
    optim.rms_decay = 0.9  # rmsprop: kept share of the squared gradient
    optim.epsilon = 0.0  # adamw, lamb, rmsprop: against division by zero; 0: the usual
    optim.freeze = ""  # regular expression of parameters that stay fixed, such as "^params/(?!classifier)"
    optim.rate_multipliers = ()  # pairs (regular expression of parameters, factor of the rate); the first match counts
    optim.layer_decay = 1.0  # factor of the rate from each dense layer (RDNet: stage) to the one before it; 1: none
    optim.schedule = "multistep"  # or "constant", "cosine", "exponential", "cosine_restarts", "one_cycle"
    optim.milestone_epochs = (150.0, 225.0, 300.0)  # multistep: where the rate drops
    optim.milestone_steps = ()  # the same in steps
    optim.milestone_rates = ()  # multistep: the rate of each stretch; (): learning_rate times powers of decay_factor
    optim.decay_factor = 0.1  # multistep: factor at each milestone; exponential: in decay_epochs
    optim.decay_epochs = 1.0  # exponential: the rate falls by decay_factor in this time
    optim.decay_steps = 0  # the same in steps
    optim.staircase = False  # exponential: falls at once at the end of each such time
    optim.end_learning_rate = 0.0  # cosine, cosine_restarts, exponential: the lowest rate
    optim.cycle_epochs = 10.0  # cosine_restarts: length of the first cycle
    optim.cycle_steps = 0  # the same in steps
    optim.cycle_multiplier = 1.0  # cosine_restarts: each cycle's length over the one before
    optim.cycle_decay = 1.0  # cosine_restarts: each cycle's peak over the one before
    optim.rise_fraction = 0.3  # one_cycle: share of the steps in which the rate rises
    optim.start_divisor = 25.0  # one_cycle: highest rate over the first
    optim.end_divisor = 1e4  # one_cycle: first rate over the last
    optim.warmup_epochs = 0.0  # linear warmup in front of any schedule
    optim.warmup_steps = 0  # the same in steps
    optim.warmup_learning_rate = 0.0  # rate at the warmup's start

    evaluation = config.eval = ml_collections.ConfigDict()
    evaluation.every_epochs = 1.0  # epochs between validations; there is always one at the end
    evaluation.batch_size = 0  # examples a step, over all devices; 0: train.global_batch_size
    evaluation.image_size_px = 0  # side of the evaluated square; 0: data.image_size_px
    evaluation.crop_fraction = 0.0  # crop side over resized short side (0.875: 224 of 256); 0: the weights' own
    evaluation.interpolation = ""  # "bilinear" or "bicubic", antialiased as Pillow does it; "": the weights' own
    evaluation.crops = 1  # or 10: corners, middle and their mirror images, whose logits are averaged
    evaluation.class_map = ""  # "present": only the classes of the split count (ImageNet-A and -R); "": all
    evaluation.per_class_output = ""  # CSV file that --mode eval writes each class's accuracy to; "": none
    evaluation.confusion_output = ""  # likewise for the examples of each class by predicted class
    evaluation.checkpoint = "latest"  # checkpoint for --mode eval: "latest", "best" or a step

    checkpoint = config.checkpoint = ml_collections.ConfigDict()
    checkpoint.best_metric = ""  # of validation, for the best checkpoint and patience; "": top1, many labels: auroc
    checkpoint.every_steps = 1000  # steps between saves; every validation and the end save as well
    checkpoint.max_to_keep = 10  # newest checkpoints kept; the best by validation top-1 is kept besides

    serve = config.serve = ml_collections.ConfigDict()
    serve.batch_sizes = (1, 4, 16, 64)  # images that a compiled program takes; (1,): each request by itself
    serve.batch_wait_secs = 0.0  # how long a request waits for others while the device is idle
    serve.request_secs = 30.0  # time after which a request is given up and its client gets an error
    serve.stop_secs = 10.0  # time for requests under way to end when the server is stopped
    serve.max_request_pixels = 200_000_000  # of all images of a request together, before they are resized
    serve.hosts = ()  # names, besides localhost, that clients may call the server by
    serve.token_file = ""  # a file with a token that every request has to bring; "": nobody has to log in
    serve.tls_certificate = ""  # a PEM file with the certificate for TLS; "": no encryption
    serve.tls_key = ""  # a PEM file with its key

    return config.lock()
