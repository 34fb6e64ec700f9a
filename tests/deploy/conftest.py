"""What several tests of deployment look at."""

import pytest

from tests.deploy.run import make_run


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """A run's directory and its experiment."""
    root = tmp_path_factory.mktemp("deployed")
    return root / "run", make_run(root / "run", root / "datasets")
