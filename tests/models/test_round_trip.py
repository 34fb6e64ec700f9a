"""What save_torch_state_dict writes, timm and torchvision load strictly and compute the same logits with.

Runs where torch and timm are installed: in this environment, or in the one whose interpreter TORCH_PYTHON names.
"""

import importlib.util
import os
import subprocess
import sys

import pytest

from densenet_jax.models.pretrained import save_torch_state_dict
from tests.models import golden

NAMES = ("densenet121", "densenetblur121d", "dpn48b", "dpn68", "dpn68b", "rdnet_tiny")
INTERPRETER = os.environ.get("TORCH_PYTHON") or (sys.executable if importlib.util.find_spec("timm") else None)


@pytest.mark.skipif(INTERPRETER is None, reason="needs torch and timm: install them or set TORCH_PYTHON")
def test_saved_files_load_strictly_in_pytorch(tmp_path):
    for name in NAMES:
        save_torch_state_dict(golden.drawn_variables(name), tmp_path / f"{name}.safetensors", name)
    script = golden.GOLDEN / "load_strictly.py"
    done = subprocess.run([INTERPRETER, script, tmp_path], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == sorted(NAMES)
