"""Published accuracies, the checkpoints they belong to, and how those checkpoints expect an image."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Preprocessing:
    """Preprocessing of a network's images.

    Attributes:
        mean, std: one number a channel, of inputs scaled to [0, 1].
        input_px: side of the square crop in training.
        test_px: side of the square crop in evaluation.
        crop_fraction: share of the resized shorter side that the evaluation crop covers, in (0, 1].
        interpolation: "bicubic" or "bilinear".
    """

    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    input_px: int = 224
    test_px: int = 224
    crop_fraction: float = 0.875
    interpolation: str = "bicubic"


@dataclass(frozen=True)
class PublishedResult:
    """One published accuracy.

    Attributes:
        dataset: a "+" marks training with augmentation, as in the DenseNet paper.
        top1, top5: per cent, of single-crop evaluation; top5 is None where it was not reported.
        source: paper and table, or the checkpoint's page.
        hub_id: the checkpoint on the Hugging Face hub, "" where no weights go with the figure.
    """

    dataset: str
    top1: float
    top5: float | None
    source: str
    hub_id: str = ""
    preprocessing: Preprocessing = Preprocessing()


AT_224 = Preprocessing()
AT_288 = replace(AT_224, test_px=288, crop_fraction=0.95)
TORCHVISION = replace(AT_224, interpolation="bilinear")
DPN = replace(AT_224, mean=(124 / 255, 117 / 255, 104 / 255), std=(1 / (0.0167 * 255),) * 3)
DPN_RA = replace(AT_224, crop_fraction=0.95)
RDNET = replace(AT_224, crop_fraction=0.9)
RDNET_384 = replace(AT_224, input_px=384, test_px=384, crop_fraction=1.0)
DPN_RA_288 = replace(AT_224, test_px=288, crop_fraction=1.0)


def _hub(checkpoint: str, top1: float, top5: float | None, preprocessing: Preprocessing = AT_224) -> PublishedResult:
    return PublishedResult("imagenet2012", top1, top5, "timm results table", f"timm/{checkpoint}", preprocessing)


def _naver(checkpoint: str, top1: float, preprocessing: Preprocessing = RDNET) -> PublishedResult:
    return PublishedResult("imagenet2012", top1, None, "its model card", f"naver-ai/{checkpoint}", preprocessing)


def _torchvision(name: str, top1: float, top5: float) -> PublishedResult:
    source = f"torchvision {name.replace('densenet', 'DenseNet')}_Weights.IMAGENET1K_V1"
    return PublishedResult("imagenet2012", top1, top5, source, "", TORCHVISION)


def _paper(top1_error: float, top5_error: float | None, source: str = "1608.06993 table 3") -> PublishedResult:
    top5 = None if top5_error is None else round(100 - top5_error, 2)
    return PublishedResult("imagenet2012", round(100 - top1_error, 2), top5, source)


def _tiny(*errors: float | None) -> tuple[PublishedResult, ...]:
    """Takes errors in the order of the paper's table 2; None where it has no figure."""
    datasets = ("cifar10", "cifar10+", "cifar100", "cifar100+", "svhn")
    source = "1608.06993 table 2"
    small = Preprocessing(input_px=32, test_px=32, crop_fraction=1.0)
    return tuple(
        PublishedResult(dataset, round(100 - error, 2), None, source, "", small)
        for dataset, error in zip(datasets, errors, strict=True)
        if error is not None
    )


PUBLISHED: dict[str, tuple[PublishedResult, ...]] = {
    "densenet121": (
        _hub("densenet121.ra_in1k", 75.574, 92.648),
        _hub("densenet121.ra_in1k", 76.486, 93.378, AT_288),
        _hub("densenet121.tv_in1k", 74.750, 92.158),
        _torchvision("densenet121", 74.434, 91.972),
        _paper(25.02, 7.71),
    ),
    "densenet161": (
        _hub("densenet161.tv_in1k", 77.384, 93.656),
        _torchvision("densenet161", 77.138, 93.560),
        _paper(22.2, None, "1608.06993, the authors' released model"),
    ),
    "densenet169": (
        _hub("densenet169.tv_in1k", 75.922, 92.976),
        _torchvision("densenet169", 75.600, 92.806),
        _paper(23.80, 6.85),
    ),
    "densenet201": (
        _hub("densenet201.tv_in1k", 77.284, 93.480),
        _torchvision("densenet201", 76.896, 93.370),
        _paper(22.58, 6.34),
    ),
    "densenet264": (_paper(22.15, 6.12),),
    "densenet264_k48": (_paper(20.26, None, "1707.06990, cosine schedule"),),
    "densenetblur121d": (
        _hub("densenetblur121d.ra_in1k", 76.574, 93.188),
        _hub("densenetblur121d.ra_in1k", 77.320, 93.796, AT_288),
    ),
    "densenet_40_12": _tiny(7.00, 5.24, 27.55, 24.42, 1.79),
    "densenet_100_12": _tiny(5.77, 4.10, 23.79, 20.20, 1.67),
    "densenet_100_24": _tiny(5.83, 3.74, 23.42, 19.25, 1.59),
    "densenet_bc_100_12": _tiny(5.92, 4.51, 24.15, 22.27, 1.76),
    "densenet_bc_250_24": _tiny(5.19, 3.62, 19.64, 17.60, 1.74),
    "densenet_bc_190_40": _tiny(None, 3.46, None, 17.18, None),
    "dpn68": (_hub("dpn68.mx_in1k", 76.304, None, DPN),),
    "dpn68b": (
        _hub("dpn68b.ra_in1k", 78.546, None, DPN_RA),
        _hub("dpn68b.ra_in1k", 79.342, None, DPN_RA_288),
        _hub("dpn68b.mx_in1k", 77.494, None, DPN),
    ),
    "dpn92": (_hub("dpn92.mx_in1k", 80.032, None, DPN),),
    "dpn98": (_hub("dpn98.mx_in1k", 79.664, None, DPN),),
    "dpn107": (_hub("dpn107.mx_in1k", 80.166, None, DPN),),
    "dpn131": (_hub("dpn131.mx_in1k", 79.836, None, DPN),),
    "rdnet_tiny": (_naver("rdnet_tiny.nv_in1k", 82.8),),
    "rdnet_small": (_naver("rdnet_small.nv_in1k", 83.7),),
    "rdnet_base": (_naver("rdnet_base.nv_in1k", 84.4),),
    "rdnet_large": (
        _naver("rdnet_large.nv_in1k", 84.8),
        _naver("rdnet_large.nv_in1k_ft_in1k_384", 85.8, RDNET_384),
    ),
}


def published_preprocessing(source: str | None) -> Preprocessing | None:
    """Returns how a published checkpoint expects images at its training size; None if it is not in the table."""
    results = (result for results in PUBLISHED.values() for result in results if result.hub_id)
    return next((result.preprocessing for result in results if result.hub_id == source), None)
