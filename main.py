"""The command line: flags to one call, a user's mistake to one line.

    python main.py --config configs/densenet121.py --workdir ./runs [--mode MODE] [--config.KEY=VALUE ...]

Several processes as one run: the same command for each, with --coordinator HOST:PORT --num_processes N --process_id I
where neither SLURM nor a TPU slice tells them (docs/pods.md).

Every setting and its default stands in configs/default.py. Exit status: 0 done, 2 a user's mistake, 3 done, but some
inputs were refused, 130 interrupted.
"""

import json
import os
import sys
from typing import Any

# Before anything that loads XLA or TensorBoard: their notes are not for the person at the terminal.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")

from absl import flags
from ml_collections import config_flags

from configs import default
from densenet_jax import modes
from densenet_jax.config import check_config, explain_flag_error, to_dict
from densenet_jax.distributed import processes
from densenet_jax.distributed.cluster import Cluster, find_cluster
from densenet_jax.distributed.preemption import Preempted
from densenet_jax.errors import UserError
from densenet_jax.flags import Command, recipe_first
from densenet_jax.system.host import keep_freed_memory

FLAGS = flags.FLAGS
RECIPES = os.path.join(os.path.dirname(os.path.abspath(__file__)), "configs")
DIGITS = os.path.join(RECIPES, "digits.py")
if __name__ == "__main__":
    sys.argv = recipe_first(sys.argv, DIGITS)  # before the next line, which looks there
CONFIG = config_flags.DEFINE_config_file("config", DIGITS, "A recipe in configs/.")
flags.DEFINE_string("workdir", "", "The run's directory; by default ./runs/ and the recipe's name.")
flags.DEFINE_enum("mode", "train", list(modes.MODES), "What to do.")
flags.DEFINE_multi_string("compare", [], "Another run's directory for --mode report to put beside; may be repeated.")
flags.DEFINE_multi_string("images", [], "--mode predict, export: a file, folder or pattern in quotes; repeatable.")
flags.DEFINE_string("output", "", "--mode predict, export: the file to write; by default in the workdir.")
flags.DEFINE_string(
    "labels", "", "--mode predict, serve: a file with a class name a line; by default the run's own names."
)
flags.DEFINE_integer("topk", 5, "--mode predict: how many classes an image, best first.")
flags.DEFINE_string("annotate", "", "--mode predict: a directory for the images with their predictions drawn on.")
flags.DEFINE_string("features", "", "--mode predict: pooled or pyramid, written to a NumPy archive beside the output.")
flags.DEFINE_string("host", "127.0.0.1", "--mode serve: where it listens; 0.0.0.0 for every network.")
flags.DEFINE_integer("port", 8080, "--mode serve: port of REST and of its page; 0: a free one.", 0, 65535)
flags.DEFINE_integer("grpc_port", 8081, "--mode serve: port of gRPC; 0: a free one.", 0, 65535)
flags.DEFINE_string("topology", "", "--mode plan: the chips to plan for, such as v5e:16x16 or h200:1x1x8.")
flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, where this is one of several processes.")
flags.DEFINE_integer("num_processes", None, "How many processes there are.")
flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.")
flags.DEFINE_string("format", "", "--mode export: stablehlo, onnx, savedmodel or tflite.")
flags.DEFINE_string("precision", "float32", "--mode export: float32, or what the format has of float16 and int8.")
flags.DEFINE_bool("preprocess", True, "--mode export: whether the file takes bytes and gives probabilities.")
flags.DEFINE_integer("batch_size", 0, "--mode export: the only batch size that the file takes; 0: any.")


def parse(arguments: list[str]) -> None:
    """Reads the flags and the recipe; every mistake in them becomes a `UserError`."""
    try:
        FLAGS.set_gnu_getopt(True)  # flags may follow --images *.jpg, of which the shell makes many words
        left_over = FLAGS(arguments)[1:]
        CONFIG.value.lock()  # a recipe that is missing shows itself only on use
    except (
        flags.Error,
        ArithmeticError,
        LookupError,
        AttributeError,
        OSError,
        SyntaxError,
        TypeError,
        ValueError,
    ) as e:
        raise UserError(explain_flag_error(e, arguments, default.get_config())) from e
    if left_over and FLAGS.images:
        FLAGS["images"].value = [*FLAGS.images, *left_over]
    elif left_over:
        raise UserError(f"{left_over[0]} is not a flag; settings are given as --config.KEY=VALUE.")


def cluster() -> Cluster | None:
    """The processes that this one belongs to; modes that are not for several run in each for itself.

    Raises:
        UserError: the flags contradict each other or the mode.
    """
    given = FLAGS.coordinator, FLAGS.num_processes, FLAGS.process_id
    if FLAGS.mode in modes.TOGETHER:
        return find_cluster(*given)
    if any(value is not None for value in given):
        raise UserError(f"--mode {FLAGS.mode} runs in one process; leave out --coordinator and the like.")
    return None


def main(arguments: list[str]) -> int:
    """Runs one mode and returns the exit status."""
    if {"--help", "-h", "-help"} & set(arguments[1:]):
        print(f"{__doc__}\n{modes.describe()}")
        return 0
    keep_freed_memory()
    try:
        parse(arguments)
        flag = FLAGS["config"]
        recipe, overrides = config_flags.get_config_filename(flag), config_flags.get_override_values(flag)
        given: dict[str, Any] = {name: FLAGS[name].value for name in Command.flags()}
        given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
        command = Command(recipe, overrides, to_dict(default.get_config()), **given)
        by_recipe = os.path.join("runs", os.path.splitext(os.path.basename(recipe))[0])
        workdir = FLAGS.workdir or (FLAGS.compare or [by_recipe])[0]
        config = check_config(CONFIG.value)
        with processes.join(cluster(), stops_together=FLAGS.mode == "train"):
            result = modes.run(FLAGS.mode, config, workdir, command)
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except (Preempted, KeyboardInterrupt) as stop:
        print(str(stop) or "interrupted", file=sys.stderr)
        return 130
    if processes.is_first():
        print(json.dumps(result), flush=True)
    return 3 if result.get("refused") else 0


if __name__ == "__main__":
    processes.leave(main(sys.argv))
