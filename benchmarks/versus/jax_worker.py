"""Trains or evaluates a network of this project; a worker of `turns`."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from worker import serve

import densenet_jax
from densenet_jax.kernels.cpu.elementwise import update_in_place
from densenet_jax.models.fused.inference import prepare_inference
from densenet_jax.models.variants import get_variant
from densenet_jax.run.log_interval import runs_alone, wait_for_end
from densenet_jax.system.host import keep_freed_memory, release_freed_memory, restart_without_thread_caches


class JaxCase:
    """One compiled step and its arrays."""

    def __init__(self, step: Any, arrays: tuple[Any, ...], batch: tuple[Any, ...], keeps: int) -> None:
        self._step, self._arrays, self._batch, self._keeps = step, arrays, batch, keeps
        self._result: Any = None

    def step(self) -> None:
        """Issues one step."""
        *kept, self._result = self._step(*self._arrays, *self._batch)
        self._arrays = (*kept, *self._arrays[self._keeps :])

    def wait(self) -> None:
        """Waits for the device."""
        jax.block_until_ready((self._arrays, self._result))
        if not np.isfinite(np.asarray(self._result).ravel()[0]):
            raise FloatingPointError("the result is not finite")

    def sample(self) -> list[float]:
        """Returns the loss, or the first image's logits."""
        return np.atleast_2d(np.asarray(self._result, np.float32))[0].tolist()

    def forget_peak(self) -> None:
        """Releases what compiling has freed, as main.py does; a GPU's peak includes autotuning all the same."""
        release_freed_memory()

    def peak_bytes(self) -> int | None:
        """Returns the device allocator's peak."""
        statistics = jax.local_devices()[0].memory_stats()
        return statistics.get("peak_bytes_in_use") if statistics else None


class TrainCase(JaxCase):
    """A training step, compiled when it is first issued, which ends before the next one where training waits for it."""

    _runs_alone: bool | None = None

    def step(self) -> None:
        """Issues one step."""
        if self._runs_alone is None:
            self._step = self._step.lower(*self._arrays, *self._batch).compile()
            self._runs_alone = runs_alone(self._step)
        super().step()

    def wait(self) -> None:
        """Waits for the device."""
        super().wait()
        if self._runs_alone:
            wait_for_end(self._result)


def draw_variables(network: Any, images: jax.Array, random: np.random.Generator) -> Any:
    """Draws variables like fresh ones, without compiling their initializers for minutes."""

    def draw(path: Any, like: Any) -> jax.Array:
        name = path[-1].key
        if name == "kernel":
            deviation = np.sqrt(2 / np.prod(like.shape[:-1]))
            return jnp.asarray(random.standard_normal(like.shape, np.float32) * deviation, like.dtype)
        return jnp.full(like.shape, name in ("scale", "var", "gamma"), like.dtype)

    shapes = jax.eval_shape(network.init, jax.random.key(0), images[:1])
    return jax.tree_util.tree_map_with_path(draw, shapes)


def prepare(
    model: str,
    mode: str,
    batch_size: int,
    image_size_px: int,
    channels: int,
    dtype: str,
    form: str,
    overrides: dict[str, Any],
) -> tuple[JaxCase, dict[str, Any]]:
    """Makes a step of SGD with momentum on one batch (mode "train"), or its logits ("infer")."""
    variant = get_variant(model)
    kernels = "xla" if form == "without_kernels" else "auto"
    block_form = "plain" if form == "plain" else "normalize_once"
    options = {"dtype": jnp.dtype(dtype), "kernels": kernels, "block_form": block_form}
    network = densenet_jax.create_model(model, **options, **overrides)
    random = np.random.default_rng(0)
    shape = (batch_size, image_size_px, image_size_px, channels)
    images = jnp.asarray(random.standard_normal(shape, np.float32))
    labels = jnp.asarray(random.integers(0, variant.num_classes, batch_size), jnp.int32)
    variables = draw_variables(network, images, np.random.default_rng(0))  # as versus/onnx_export.py does
    params, statistics = variables["params"], variables.get("batch_stats", {})
    device_info = {
        "platform": jax.default_backend(),
        "device": jax.devices()[0].device_kind,
        "version": jax.__version__,
    }
    if mode == "infer":
        network, variables = prepare_inference(network, variables)  # as a Predictor does
        logits = jax.jit(lambda variables, images: (network.apply(variables, images, train=False),))
        return JaxCase(logits, (variables,), (images,), 0), device_info
    optimizer = optax.sgd(0.01, momentum=0.9)

    def loss_of(params: Any, statistics: Any, images: Any, labels: Any) -> Any:
        arrays = {"params": params, "batch_stats": statistics}
        logits, new = network.apply(arrays, images, train=True, mutable=["batch_stats"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), new.get("batch_stats", {})

    def update(state: Any, gradients: Any) -> Any:
        params, momentum = state
        updates, momentum = optimizer.update(gradients, momentum, params)
        return optax.apply_updates(params, updates), momentum

    def step(params: Any, statistics: Any, momentum: Any, images: Any, labels: Any) -> Any:
        (loss, statistics), gradients = jax.value_and_grad(loss_of, has_aux=True)(params, statistics, images, labels)
        params, momentum = update_in_place(update, (params, momentum), gradients)
        return params, statistics, momentum, loss

    arrays = (params, statistics, jax.jit(optimizer.init)(params))
    return TrainCase(jax.jit(step, donate_argnums=(0, 1, 2)), arrays, (images, labels), 3), device_info


if __name__ == "__main__":
    restart_without_thread_caches()  # as main.py does
    keep_freed_memory()
    serve(prepare, lambda error: "RESOURCE_EXHAUSTED" in str(error))
