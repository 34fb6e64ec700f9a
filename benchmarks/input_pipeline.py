"""Measures images a second from JPEG files to uint8 crops of 224 px: this project's pipeline, tf.data and Pillow.

    python benchmarks/input_pipeline.py --output input_pipeline.json

Photograph-like files (500x375 on average, quality 90) are cut from scikit-image's photographs. Every measurement is a
process of its own, bound to its cores; the compared pipelines take turns. All do equal work: torchvision's crop boxes,
exact DCT, the same files. tf.data is measured where an interpreter has TensorFlow: this one or --tensorflow_python.
Images a second of processor time are reported as well: they hold on a machine that has other work. So is the time for
which an image of this project's pipeline holds the interpreter's lock (microseconds of processor time, a run of its
own): it bounds one process, however many cores it has.
"""

import argparse
import functools
import importlib.util
import io
import json
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from multiprocessing import shared_memory

import interpreter_time
from versus import report

SIDE_PX = 224
BATCH = 128
WARM_UP_BATCHES = 3
PHOTOGRAPHS = (
    "astronaut",
    "cat",
    "chelsea",
    "coffee",
    "rocket",
    "hubble_deep_field",
    "retina",
    "brick",
    "grass",
    "gravel",
)
PIPELINES = {
    "densenet_jax": ("jax", {}),
    "densenet_jax_wheels": ("jax", {"DENSENET_JAX_NATIVE": "0"}),
    "tf_data": ("tensorflow", {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": ""}),
    "pillow_processes": ("pillow", {}),
}


def write_photographs(directory: pathlib.Path, count: int) -> None:
    """Writes `count` JPEG files to DIRECTORY/train/CLASS, and torchvision-like crop boxes of each to boxes.npz."""
    import numpy as np
    from PIL import Image
    from skimage import data as photographs

    random = np.random.RandomState(0)
    available = [pixels for name in PHOTOGRAPHS if (pixels := _photograph(photographs, name)) is not None]
    for index in range(count):
        pixels = available[index % len(available)]
        width, height = random.randint(400, 601), random.randint(300, 451)
        share = random.uniform(0.6, 1.0)
        rows, columns = int(pixels.shape[0] * share), int(pixels.shape[1] * share)
        top, left = random.randint(pixels.shape[0] - rows + 1), random.randint(pixels.shape[1] - columns + 1)
        image = Image.fromarray(pixels[top : top + rows, left : left + columns]).resize((width, height))
        noisy = np.asarray(image, np.float32) + random.normal(0, 5, (height, width, 1))  # a sensor's
        image = Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))
        image = image.convert("L") if index % 50 == 0 else image
        folder = directory / "train" / f"class_{index % 10}"
        folder.mkdir(parents=True, exist_ok=True)
        options = {} if image.mode == "L" else {"subsampling": "4:4:4" if index % 5 == 0 else "4:2:0"}
        image.save(folder / f"{index:05d}.JPEG", quality=90, **options)


def _photograph(photographs, name: str):  # type: ignore[no-untyped-def]
    import numpy as np

    try:
        pixels = getattr(photographs, name)()
    except Exception:  # not shipped with the package, and there may be no network
        return None
    return pixels if pixels.ndim == 3 else np.repeat(pixels[:, :, None], 3, 2)


def crop_boxes(files: list[str]) -> list[tuple[int, int, int, int]]:
    """Draws (top, left, height, width) for each file as torchvision's RandomResizedCrop does."""
    import numpy as np
    from PIL import Image

    random = np.random.RandomState(1)
    boxes = []
    for file in files:
        with Image.open(file) as image:
            width, height = image.size
        for _ in range(10):
            area, ratio = random.uniform(0.08, 1) * width * height, np.exp(random.uniform(np.log(3 / 4), np.log(4 / 3)))
            columns, rows = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
            if 0 < columns <= width and 0 < rows <= height:
                boxes.append((random.randint(height - rows + 1), random.randint(width - columns + 1), rows, columns))
                break
        else:
            boxes.append((0, 0, height, width))
    return boxes


def jax_batches(directory: str, antialias: bool, threads: int) -> Iterator[object]:
    """Yields batches of this project's training pipeline."""
    import numpy as np

    from densenet_jax.data.pipeline import train_batches
    from densenet_jax.data.sources import SubsetSource, open_source
    from densenet_jax.data.transforms import train_transform

    files = open_source("folder", directory, "train")
    source = SubsetSource(files, np.arange(1_281_167) % len(files))  # ordering costs what it costs on ImageNet
    transform = train_transform(image_size_px=SIDE_PX, antialias=antialias)
    yield from train_batches(source, seed=0, global_batch_size=BATCH, transform=transform, reader_threads=threads)


def tensorflow_batches(directory: str, antialias: bool, threads: int) -> Iterator[object]:
    """Yields batches of tf.data with the fused decode and crop."""
    import tensorflow as tf

    files = sorted(map(str, pathlib.Path(directory).rglob("*.JPEG")))
    boxes = crop_boxes(files)

    def decode(file, box):  # type: ignore[no-untyped-def]
        content = tf.io.read_file(file)
        pixels = tf.image.decode_and_crop_jpeg(content, box, channels=3, dct_method="INTEGER_ACCURATE")
        resized = tf.image.resize(pixels, (SIDE_PX, SIDE_PX), "bilinear", antialias=antialias)
        return tf.cast(tf.clip_by_value(tf.round(resized), 0, 255), tf.uint8)

    data = tf.data.Dataset.from_tensor_slices((files, boxes)).shuffle(len(files)).repeat()
    data = data.map(decode, tf.data.AUTOTUNE, deterministic=False).batch(BATCH).prefetch(tf.data.AUTOTUNE)
    options = tf.data.Options()
    options.threading.private_threadpool_size = threads
    yield from data.with_options(options)


WORKER_SECONDS: list[float] = []  # of processor time, a batch each


def pillow_batches(directory: str, antialias: bool, threads: int) -> Iterator[object]:
    """Decodes by Pillow in worker processes into shared memory, as PyTorch's loader with torchvision does."""
    del antialias  # Pillow always does
    import numpy as np

    files = sorted(map(str, pathlib.Path(directory).rglob("*.JPEG")))
    boxes = crop_boxes(files)
    shape = (BATCH, SIDE_PX, SIDE_PX, 3)
    slots = [shared_memory.SharedMemory(create=True, size=int(np.prod(shape))) for _ in range(2 * threads)]
    order = np.random.RandomState(0)
    try:
        with futures.ProcessPoolExecutor(threads) as pool:
            pending: list[tuple[int, futures.Future]] = []
            for slot in range(len(slots)):
                pending.append((slot, pool.submit(_fill_slot, slots[slot].name, shape, _take(files, boxes, order))))
            while True:
                slot, future = pending.pop(0)
                WORKER_SECONDS.append(future.result())
                yield np.ndarray(shape, np.uint8, slots[slot].buf)
                pending.append((slot, pool.submit(_fill_slot, slots[slot].name, shape, _take(files, boxes, order))))
    finally:
        for shared in slots:
            shared.unlink()


def _take(files, boxes, order):  # type: ignore[no-untyped-def]
    return [(files[index], boxes[index]) for index in order.randint(0, len(files), BATCH)]


@functools.cache
def _attach(name: str) -> shared_memory.SharedMemory:
    return shared_memory.SharedMemory(name)


def _fill_slot(name: str, shape: tuple[int, ...], work: list[tuple[str, tuple[int, int, int, int]]]) -> float:
    import numpy as np
    from PIL import Image

    began = time.process_time()
    batch = np.ndarray(shape, np.uint8, _attach(name).buf)
    for row, (file, (top, left, height, width)) in enumerate(work):
        with open(file, "rb") as stream:
            image = Image.open(io.BytesIO(stream.read())).convert("RGB")
        crop = image.crop((left, top, left + width, top + height))
        batch[row] = np.asarray(crop.resize((SIDE_PX, SIDE_PX), Image.Resampling.BILINEAR))
    return time.process_time() - began


BATCHES: dict[str, Callable[[str, bool, int], Iterator[object]]] = {
    "jax": jax_batches,
    "tensorflow": tensorflow_batches,
    "pillow": pillow_batches,
}


def measure(
    kind: str, directory: str, antialias: bool, cores: int, threads: int, seconds: float, lock: bool = False
) -> dict[str, float]:
    """Counts images for `seconds` after a warm-up, on the first `cores` cores.

    With `lock` only {"lock_us": microseconds for which an image holds the interpreter's lock}.
    """
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    batches = BATCHES[kind](directory, antialias, threads or cores)
    if lock:
        interpreter_time.watch()
    for _ in range(WARM_UP_BATCHES):
        next(batches)
    interpreter_time.held_secs()
    began, used, images = time.perf_counter(), _processor_seconds(), 0
    while time.perf_counter() - began < seconds:
        next(batches)
        images += BATCH
    spent, used_since = time.perf_counter() - began, _processor_seconds() - used
    if lock:
        return {"lock_us": 1e6 * interpreter_time.held_secs() / images}
    return {"images_per_sec": images / spent, "images_per_cpu_sec": images / used_since}


def _processor_seconds() -> float:
    """Sums processor seconds of this process and of its workers' finished batches."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime + sum(WORKER_SECONDS)


def run_child(interpreter: str, pipeline: str, arguments: argparse.Namespace, directory: str, **case: object) -> dict:
    """Runs one measurement in a process of its own."""
    kind, environment = PIPELINES[pipeline]
    request = {"kind": kind, "directory": directory, "seconds": arguments.seconds, **case}
    command = [interpreter, __file__, "--measure", json.dumps(request)]
    root = str(pathlib.Path(__file__).resolve().parent.parent)
    search = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    result = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": search} | environment, capture_output=True, text=True, check=False
    )
    if result.returncode:
        raise SystemExit(f"error: measuring {pipeline} failed: {result.stderr.strip().splitlines()[-1:]}")
    return json.loads(result.stdout.strip().splitlines()[-1])


def cases(arguments: argparse.Namespace) -> list[tuple[str, str, dict]]:
    """Lists (pipeline, interpreter, case) of every row."""
    rows = []
    interpreters = {"tf_data": arguments.tensorflow_python}
    if not arguments.tensorflow_python and importlib.util.find_spec("tensorflow"):
        interpreters["tf_data"] = sys.executable
    for cores in arguments.cores:
        for antialias in (False, True):
            for pipeline in PIPELINES:
                interpreter = interpreters.get(pipeline, sys.executable)
                if interpreter and (antialias or pipeline != "pillow_processes"):
                    rows.append((pipeline, interpreter, {"antialias": antialias, "cores": cores, "threads": 0}))
    for threads in arguments.threads:
        case = {"antialias": True, "cores": max(arguments.cores), "threads": threads}
        rows += [(pipeline, sys.executable, case) for pipeline in ("densenet_jax", "densenet_jax_wheels")]
    return rows


def main() -> None:
    """Measures every pipeline and prints the table."""
    everything = len(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=400, help="photographs to make")
    parser.add_argument("--seconds", type=float, default=6.0, help="of one measurement")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each row, taken in turns")
    parser.add_argument("--cores", type=int, nargs="+", default=sorted({1, everything}), help="cores to measure with")
    parser.add_argument("--threads", type=int, nargs="*", default=[], help="also with these numbers of reader threads")
    parser.add_argument("--tensorflow_python", default="", help="an interpreter that has TensorFlow")
    parser.add_argument("--output", help="write the rows to this JSON file")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(**json.loads(arguments.measure))))
        return
    with tempfile.TemporaryDirectory() as directory:
        write_photographs(pathlib.Path(directory), arguments.images)
        sizes = [path.stat().st_size for path in pathlib.Path(directory).rglob("*.JPEG")]
        print(f"{len(sizes)} photographs, {statistics.mean(sizes) / 1000:.0f} kB on average", file=sys.stderr)
        table = cases(arguments)
        results: list[list[dict]] = [[] for _ in table]
        for turn in range(arguments.rounds):
            for entries, (pipeline, interpreter, case) in zip(results, table, strict=True):
                entries.append(run_child(interpreter, pipeline, arguments, directory, **case))
                if turn == 0 and PIPELINES[pipeline][0] == "jax":
                    entries[0] |= run_child(interpreter, pipeline, arguments, directory, **case, lock=True)
    rows = [_row(pipeline, case, entries) for entries, (pipeline, _, case) in zip(results, table, strict=True)]
    _show(rows)
    if arguments.output:
        names = ("jax", "grain", "simplejpeg", "opencv-python-headless", "cykooz-resizer", "pillow", "tensorflow-cpu")
        versions = {name: _version(name, sys.executable) for name in names}
        if arguments.tensorflow_python:
            versions["tensorflow-cpu"] = _version("tensorflow-cpu", arguments.tensorflow_python)
        report.write(arguments.output, report.device_name("cpu"), versions, rows)


def _row(pipeline: str, case: dict, entries: list[dict]) -> dict:
    values = [entry["images_per_sec"] for entry in entries]
    return {
        "pipeline": pipeline, **case, "images_per_sec": round(statistics.median(values), 1),
        "lowest": round(min(values), 1), "highest": round(max(values), 1),
        "images_per_cpu_sec": round(statistics.median(entry["images_per_cpu_sec"] for entry in entries), 1),
        "lock_us": round(entries[0]["lock_us"], 1) if "lock_us" in entries[0] else None,
    }  # fmt: skip


def _version(name: str, interpreter: str) -> str | None:
    code = "import sys; from importlib import metadata; print(metadata.version(sys.argv[1]))"
    result = subprocess.run([interpreter, "-c", code, name], capture_output=True, text=True, check=False)
    return result.stdout.strip() or None


def _show(rows: list[dict]) -> None:
    print(
        f"{'pipeline':22}{'cores':>6}{'threads':>8}{'antialias':>10}{'images/s':>10}{'range':>16}{'images/cpu-s':>14}"
        f"{'lock us':>9}"
    )
    for row in rows:
        spread = f"{row['lowest']:.0f}-{row['highest']:.0f}"
        print(
            f"{row['pipeline']:22}{row['cores']:6}{row['threads'] or 'auto':>8}{row['antialias']!s:>10}"
            f"{row['images_per_sec']:10.0f}{spread:>16}{row['images_per_cpu_sec']:14.0f}{row['lock_us'] or '':>9}"
        )


if __name__ == "__main__":
    main()
