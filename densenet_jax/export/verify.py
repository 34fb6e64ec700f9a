"""Compares the outputs of a written file with those of the model on the same images."""

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np

from densenet_jax.errors import UserError

Outputs = tuple[np.ndarray, ...]  # of a file: probabilities or logits [n, k], and maps [n, h, w, k] where it has them

# float32: largest difference allowed, relative to the largest output if that is above 1.
LARGEST_DIFFERENCE = 1e-4
# Lower precisions: least share of images whose most probable class stays the same.
LEAST_AGREEMENT = {"float16": 0.99, "int8": 0.95}
_CHUNK = 24  # not a divisor of the usual counts, so that the last chunk tries another batch size


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Differences between the outputs of a file and of the model."""

    examples: int
    max_abs_difference: float  # largest difference of any output
    scale: float  # largest output of the model, at least 1
    agreement: float  # share of images with the same most probable class, or of many labels decided the same
    accuracy: tuple[float, float] | None  # share of right answers of model and file; None without labels
    many_labels: bool = False

    def describe(self) -> str:
        """Formats the comparison, a line a sentence so that each fits a narrow terminal."""
        what, share = ("decision", "right labels") if self.many_labels else ("class", "top-1")
        line = (
            f"{self.examples} images, largest difference {self.max_abs_difference:.2e}\n"
            f"same {what} for {self.agreement:.2%}"
        )
        if self.accuracy is not None:
            model, file = self.accuracy
            line += f"; {share} of the model {model:.2%}, of the file {file:.2%} ({file - model:+.2%})"
        return line

    def check(self, precision: str, what: str) -> None:
        """Checks that the file is close enough to the model.

        Raises:
            UserError: it isn't.
        """
        if not np.isfinite(self.max_abs_difference):
            raise UserError(f"{what} returns NaN or infinity, so it was not written.")
        if precision == "float32":
            allowed = LARGEST_DIFFERENCE * self.scale
            if self.max_abs_difference > allowed:
                raise UserError(
                    f"{what} differs from the model by up to {self.max_abs_difference:.2e}, more than the "
                    f"{allowed:.0e} allowed, so it was not written; please report this with "
                    "the versions of the libraries."
                )
        elif self.agreement < LEAST_AGREEMENT[precision]:
            raise UserError(
                f"{what} in {precision} agrees with the model for {self.agreement:.1%} of {self.examples} images, "
                f"less than the {LEAST_AGREEMENT[precision]:.0%} required, so it was not written; use a higher "
                "--precision."
            )


def in_order(outputs: Mapping[str, np.ndarray]) -> Outputs:
    """Returns a file's outputs by name as a tuple, with the maps last."""
    return tuple(outputs[name] for name in sorted(outputs, key=lambda name: name == "maps"))


def run_in_chunks(
    call: Callable[[np.ndarray], Outputs],
    images: np.ndarray,
    batch_size: int,
    done: Callable[[int], None] = lambda count: None,
) -> Outputs:
    """Computes the outputs of all images in padded batches; if any size is accepted (0), of one image and then of many.

    Args:
        call: the file as a function of one batch.
        done: called with the number of images after each batch.
    """
    starts = list(range(0, len(images), batch_size)) if batch_size else [0, *range(1, len(images), _CHUNK)]
    outputs = []
    for start, end in zip(starts, [*starts[1:], len(images)], strict=True):
        batch = images[start:end]
        padded = np.pad(batch, [(0, max(batch_size - len(batch), 0)), *[(0, 0)] * (batch.ndim - 1)])
        outputs.append([np.asarray(output, np.float32)[: len(batch)] for output in call(padded)])
        done(len(batch))
    return tuple(map(np.concatenate, zip(*outputs, strict=True)))


def compare(
    expected: np.ndarray, actual: np.ndarray, labels: np.ndarray | None, threshold: float | None = None
) -> Comparison:
    """Compares outputs float32 [n, k].

    Args:
        labels: the true classes int [n], if known; or many labels float [n, k], NaN where unknown.
        threshold: of many labels, from which output on one is present; None for one class an image.

    Raises:
        UserError: the file's outputs have another shape.
    """
    if expected.shape != actual.shape:
        raise UserError(f"the written file returns outputs of shape {actual.shape}; expected {expected.shape}.")
    ours, theirs = (each.argmax(-1) if threshold is None else each >= threshold for each in (expected, actual))
    accuracy = None
    if labels is not None:
        known = ~np.isnan(labels)
        model, file = (float(np.mean((each == labels)[known])) for each in (ours, theirs))
        accuracy = model, file
    # Excluded classes have logits of minus infinity on both sides.
    with np.errstate(invalid="ignore"):
        difference = np.where(expected == actual, 0.0, np.abs(expected - actual))
    return Comparison(
        examples=len(expected),
        max_abs_difference=float(difference.max()),
        scale=max(1.0, float(np.abs(expected[np.isfinite(expected)]).max())),
        agreement=float(np.mean(ours == theirs)),
        accuracy=accuracy,
        many_labels=threshold is not None,
    )


def compare_maps(expected: np.ndarray, actual: np.ndarray) -> Comparison:
    """Compares activation maps float32 [n, h, w, k]; they agree on an image if the same class has the highest mean.

    Raises:
        UserError: the file's maps have another shape.
    """
    if expected.shape != actual.shape:
        raise UserError(f"the written file returns maps of shape {actual.shape}; expected {expected.shape}.")
    means = compare(expected.mean(axis=(1, 2)), actual.mean(axis=(1, 2)), None)
    difference = float(np.abs(expected - actual).max())
    return dataclasses.replace(means, max_abs_difference=difference, scale=max(1.0, float(np.abs(expected).max())))
