"""How a block is computed on each platform: choices that change speed and memory, never the function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
from jax.sharding import Mesh

from densenet_jax.kernels.select import BlockShape, choose, choose_layer_gradients, recomputes_hidden
from densenet_jax.kernels.shard import own_groups
from densenet_jax.models.layers import group_count


@dataclass(frozen=True)
class Arithmetic:
    """The choices.

    Attributes:
      storage: "buffer" keeps all normalized maps of a block in one array that a layer reads the front of; "arrays"
        keeps one array a layer and concatenates them where they are read.
      pointwise: 1x1 convolutions as "dot" or as "convolution".
      library: reads and their derivatives by the CPU's compiled library, where it is there and knows the operands.
      stores_gradients: a layer's gradient, which two convolutions read, is computed before them instead of in each.
      pooling: a transition's average comes "first", before its convolution, or is in its "kernel".
      stem: its strided convolution and maximum are "direct", or "rearranged": `space_to_depth`, `indexed_pool`.
      begins_unwritten: a block's buffer is not filled with zeros first.
      recomputes_hidden: what a layer's first convolution gave is computed again in the backward pass, unasked.
      finishes_layers: all gradients of a layer are computed before those of the next one; otherwise some may wait, and
        what they are computed from is kept for so long.
      kernels: what computes the 1x1 readers of a buffer: "xla" as the other fields say, "pallas" the kernels of
        `densenet_jax.kernels.gpu`, "interpret" those step by step on any platform, for tests.
      layer_gradients: what computes the backward pass of a layer with a bottleneck: "xla" as the other fields say,
        "pallas" the kernels of `densenet_jax.kernels.tpu`, or "interpret".
      mesh: over which the batch is divided where kernels compute or memory is left unwritten: each device takes its
        own part.
    """

    storage: Literal["buffer", "arrays"] = "buffer"
    pointwise: Literal["dot", "convolution"] = "dot"
    library: bool = False
    stores_gradients: bool = False
    pooling: Literal["first", "kernel"] = "first"
    stem: Literal["direct", "rearranged"] = "direct"
    begins_unwritten: bool = False
    recomputes_hidden: bool = False
    finishes_layers: bool = False
    kernels: Literal["xla", "pallas", "interpret"] = "xla"
    layer_gradients: Literal["xla", "pallas", "interpret"] = "xla"
    mesh: Mesh | None = None


# What each platform's compiler makes the most of; measured in docs/performance.md.
ARITHMETIC = {
    "cpu": Arithmetic("buffer", "dot", library=True),
    "tpu": Arithmetic("buffer", "dot", stores_gradients=True, pooling="kernel", begins_unwritten=True),
    "gpu": Arithmetic("arrays", "convolution", stem="rearranged"),
}
WITH_KERNELS = Arithmetic("buffer", "convolution", kernels="pallas")


def arithmetic_for(platform: str = "") -> Arithmetic:
    """That of "cpu", "gpu" or "tpu", without the GPU's kernels; "" is JAX's platform, any other is taken for a GPU."""
    return ARITHMETIC.get(platform or jax.default_backend(), ARITHMETIC["gpu"])


def rearranges_stem(arithmetic: Arithmetic | None) -> bool:
    """Whether a stem's strided convolution is computed as `space_to_depth` says; None is the papers' way."""
    return arithmetic is not None and arithmetic.stem == "rearranged"


def arithmetic_of(form: Callable[..., Any] | None, papers_way: Callable[..., Any] | None) -> Arithmetic | None:
    """How the rest of a network computes whose blocks have that form; None is the papers' way, that of `papers_way`."""
    if form is papers_way:
        return None
    return arithmetic_for(getattr(form, "keywords", {}).get("platform", ""))


def arithmetic_with_kernels(
    platform: str, dtype: Any, shape: BlockShape, group_size: int, wanted: str, mesh: Mesh | None
) -> Arithmetic:
    """That of a platform, with kernels where `kernels.choice` gives them or "interpret" is wanted.

    Args:
      platform: as for `arithmetic_for`.
      dtype: of activations.
      shape: of the block, with all examples.
      group_size: examples that share statistics; 0 is all.
      wanted: as for `choose`.
      mesh: over which the examples are divided; None is JAX's one device.
    """
    parts, groups = 1 if mesh is None else mesh.size, group_count(shape.examples, group_size)
    plain = arithmetic_for(platform)
    if shape.examples % parts or (groups > 1 and groups % parts):
        return replace(plain, begins_unwritten=False)
    own = shape._replace(examples=shape.examples // parts)
    devices = None if mesh is None else tuple(mesh.devices.flat)
    if platform == "tpu":
        # Memory that is not written is there on every device for all examples, if nobody says otherwise.
        is_divided = mesh is not None or jax.device_count() == 1
        plain = replace(
            plain,
            mesh=mesh,
            begins_unwritten=is_divided,
            recomputes_hidden=recomputes_hidden(dtype, own),
            # Without kernels the compiler then needs more memory, not less (docs/performance.md).
            finishes_layers=wanted in ("pallas", "interpret"),
        )
        if (
            own.drops  # which those kernels know nothing of, nor of groups within a device
            or own_groups(mesh, groups) > 1
            or (wanted != "interpret" and choose_layer_gradients(dtype, own, wanted, devices) == "xla")
        ):
            return plain
        return replace(plain, layer_gradients="interpret" if wanted == "interpret" else "pallas")
    if not shape.hidden or (
        wanted != "interpret"
        and choose(platform, dtype, (own.rows, shape.columns, shape.hidden), wanted, devices) == "xla"
    ):
        return plain
    return replace(WITH_KERNELS, kernels="interpret" if wanted == "interpret" else "pallas", mesh=mesh)
