"""Data on object storage is read by the same path: here from a stand-in on this machine, over HTTP."""

import json
import pathlib
import subprocess
import sys

import pytest

from tests.data import fake_imagenet
from tests.extras import needs
from tests.main_processes import ROOT, make_environment, parse_last_line, run_main

READ = """
import hashlib, json, sys
from densenet_jax.data.sources import open_source
source = open_source("imagenet2012", sys.argv[1], "train[3:]")
records = [source[index] for index in range(len(source))]
print(json.dumps([[record.name, record.label, hashlib.md5(record.image).hexdigest()] for record in records]))
"""


@pytest.fixture
def store(tmp_path):
    """The folder of the bucket `bucket` and what a process's environment needs to find it."""
    command = [sys.executable, str(pathlib.Path(__file__).with_name("object_store.py")), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        address = server.stdout.readline().strip()
        addresses = dict.fromkeys(("CLOUD_STORAGE_EMULATOR_ENDPOINT", "STORAGE_EMULATOR_HOST"), address)
        yield (
            str(tmp_path / "bucket"),
            {
                **addresses,
                "FSSPEC_GS_TOKEN": "anon",
                "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
                "EPATH_USE_TF": "false",
            },
        )
        server.kill()


def records(directory: str, variables: dict[str, str]) -> list:
    result = subprocess.run(
        [sys.executable, "-c", READ, directory],
        cwd=ROOT,
        env=make_environment(**variables),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@needs("gcsfs")
def test_records_of_a_bucket_are_those_of_the_files(store):
    folder, variables = store
    fake_imagenet.write(folder)
    assert records("gs://bucket", variables) == records(folder, {}) != []


@needs("gcsfs")
def test_training_reads_from_a_bucket(store, tmp_path):
    folder, variables = store
    fake_imagenet.write(folder, train=16, validation=8)
    settings = {
        "data.dir": "gs://bucket", "data.image_size_px": 32, "model.name": "densenet_40_12",
        "model.block_sizes": (1, 1, 1), "train.epochs": 1, "train.global_batch_size": 8,
    }  # fmt: skip
    output, _ = run_main(
        "--config=configs/densenet121.py", f"--workdir={tmp_path / 'run'}",
        *(f"--config.{key}={value}" for key, value in settings.items()), **variables,
    )  # fmt: skip
    assert parse_last_line(output)["step"] == 2
    assert parse_last_line(output)["examples"] == 8
