"""TensorFlow SavedModel through jax2tf: a directory that `tf.saved_model.load` opens without JAX."""

from collections.abc import Callable

import numpy as np

from densenet_jax.export.graph import Graph
from densenet_jax.export.verify import Outputs, in_order


def write(graph: Graph, path: str, precision: str, representative: np.ndarray | None) -> None:
    """Writes a SavedModel whose default signature maps "images" to the graph's named outputs."""
    del precision, representative
    import tensorflow as tf

    module = tf.Module()
    module.call = make_tensorflow_function(graph, graph.function, graph.input_dtype, graph.batch_size)
    tf.saved_model.save(module, path, signatures={"serving_default": module.call.get_concrete_function()})


def make_tensorflow_function(
    graph: Graph, function: Callable, dtype: type, batch_size: int, after: Callable = lambda outputs: outputs
) -> Callable:
    """Makes a tf.function from images [b, h, w, c] of `dtype` to a dictionary of the graph's outputs by name.

    Args:
        batch_size: fixed batch size; 0 accepts any.
        after: TensorFlow operation on the first output.
    """
    import tensorflow as tf
    from jax.experimental import jax2tf

    shape = (batch_size or None, *graph.image_shape)
    polymorphic = None if batch_size else [f"b, {', '.join(map(str, graph.image_shape))}"]
    converted = jax2tf.convert(function, polymorphic_shapes=polymorphic, with_gradient=False)

    def call(images: tf.Tensor) -> dict[str, tf.Tensor]:
        outputs = converted(images)
        first, *more = outputs if graph.has_maps else (outputs,)
        return dict(zip(graph.output_names, (after(first), *more), strict=True))

    signature = [tf.TensorSpec(shape, dtype, name="images")]
    return tf.function(call, input_signature=signature, autograph=False)


def load(path: str) -> Callable[[np.ndarray], Outputs]:
    """Loads the SavedModel as a function of images."""
    import tensorflow as tf

    loaded = tf.saved_model.load(path)

    def call(images: np.ndarray) -> Outputs:
        outputs = loaded.signatures["serving_default"](images=tf.constant(images))
        return in_order({name: output.numpy() for name, output in outputs.items()})

    return call
