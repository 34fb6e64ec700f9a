"""What several tests of deployment look at: one run, and one server for all tests of serving."""

import numpy as np
import pytest
from PIL import Image

from densenet_jax.deploy.predictor import Predictor
from tests.deploy.files import encoded
from tests.deploy.run import make_run
from tests.deploy.serving import serving


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """A run's directory and its experiment."""
    root = tmp_path_factory.mktemp("deployed")
    return root / "run", make_run(root / "run", root / "datasets")


@pytest.fixture(scope="session")
def served_run(tmp_path_factory):
    root = tmp_path_factory.mktemp("serve")
    make_run(root / "run", root / "datasets")
    return root / "run"


@pytest.fixture(scope="session")
def server(served_run, user):
    with serving(served_run, **user) as running:
        yield running


@pytest.fixture(scope="session")
def served(served_run):
    return Predictor.from_workdir(served_run)


@pytest.fixture(scope="session")
def pixels():
    return np.random.default_rng(0).integers(0, 256, (64, 8, 8, 1), dtype=np.uint8)


@pytest.fixture(scope="session")
def pictures(pixels):
    return [encoded(Image.fromarray(image[:, :, 0])) for image in pixels]


@pytest.fixture(scope="session")
def expected(served, pixels):
    return served.probabilities(pixels)
