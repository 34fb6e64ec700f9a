"""Whether a written file does what the model does: the same images through both."""

import dataclasses
from collections.abc import Callable

import numpy as np

from densenet_jax.errors import UserError

# float32: the largest difference, as a share of the largest output where that is above 1.
LARGEST_DIFFERENCE = 1e-4
# Coarser numbers: the share of images whose most probable class must stay the same.
LEAST_AGREEMENT = {"float16": 0.99, "int8": 0.95}
_CHUNK = 24  # does not divide the usual counts: the last chunk is another batch size


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A file's outputs beside the model's.

    Attributes:
        examples: how many images were compared.
        max_abs_difference: of any output of any image.
        scale: the largest output of the model, but at least 1.
        agreement: share of images with the same most probable class.
        accuracy: the share of right answers of model and file, where the right ones are known.
    """

    examples: int
    max_abs_difference: float
    scale: float
    agreement: float
    accuracy: tuple[float, float] | None

    def describe(self) -> str:
        """One line for a person."""
        line = f"largest difference {self.max_abs_difference:.2e}, same answer for {self.agreement:.2%}"
        if self.accuracy is not None:
            model, file = self.accuracy
            line += f"; top-1 of the model {model:.2%}, of the file {file:.2%} ({file - model:+.2%})"
        return f"{line} ({self.examples} images)"

    def check(self, precision: str, what: str) -> None:
        """Checks that the file is close enough.

        Raises:
            UserError: it isn't.
        """
        if not np.isfinite(self.max_abs_difference):
            raise UserError(f"{what} gives values that are no numbers, and was not written.")
        if precision == "float32":
            allowed = LARGEST_DIFFERENCE * self.scale
            if self.max_abs_difference > allowed:
                raise UserError(
                    f"{what} differs from the model by up to {self.max_abs_difference:.2e}, more than the "
                    f"{allowed:.0e} that is tolerated, and was not written; please report this with "
                    "the versions of the libraries."
                )
        elif self.agreement < LEAST_AGREEMENT[precision]:
            raise UserError(
                f"{what} in {precision} answers like the model for {self.agreement:.1%} of {self.examples} images, "
                f"less than the {LEAST_AGREEMENT[precision]:.0%} that are expected, and was not written; use a finer "
                "--precision."
            )


def run_in_chunks(
    call: Callable[[np.ndarray], np.ndarray], images: np.ndarray, batch_size: int, done: Callable[[int], None]
) -> np.ndarray:
    """Outputs for all images: in batches of `batch_size`, padded, or where that is 0 of one image and then of many.

    Args:
        call: the file as a function of one batch.
        images: as the file takes them.
        batch_size: the only one that the file takes; 0: any.
        done: called with the number of images after each batch.
    """
    starts = list(range(0, len(images), batch_size)) if batch_size else [0, *range(1, len(images), _CHUNK)]
    outputs = []
    for start, end in zip(starts, [*starts[1:], len(images)], strict=True):
        batch = images[start:end]
        missing = max(batch_size - len(batch), 0)
        padded = np.concatenate([batch, np.zeros((missing, *batch.shape[1:]), batch.dtype)])
        outputs.append(np.asarray(call(padded), np.float32)[: len(batch)])
        done(len(batch))
    return np.concatenate(outputs)


def compare(expected: np.ndarray, found: np.ndarray, labels: np.ndarray | None) -> Comparison:
    """Compares outputs float32 [n, k]; `labels` int [n] are the right classes, where they are known.

    Raises:
        UserError: the file's outputs have another shape.
    """
    if expected.shape != found.shape:
        raise UserError(f"the written file gives outputs of shape {found.shape}; expected {expected.shape}.")
    ours, theirs = expected.argmax(-1), found.argmax(-1)
    accuracy = None if labels is None else (float(np.mean(ours == labels)), float(np.mean(theirs == labels)))
    # Classes that are left out have logits of minus infinity on both sides.
    with np.errstate(invalid="ignore"):
        difference = np.where(expected == found, 0.0, np.abs(expected - found))
    return Comparison(
        examples=len(expected),
        max_abs_difference=float(difference.max()),
        scale=max(1.0, float(np.abs(expected[np.isfinite(expected)]).max())),
        agreement=float(np.mean(ours == theirs)),
        accuracy=accuracy,
    )
