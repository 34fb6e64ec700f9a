"""What the benchmarks against other implementations share: workers that take turns, and the report of their figures."""

import pathlib
import sys

# A checkout that is not installed can be measured as well.
sys.path.append(str(pathlib.Path(__file__).resolve().parent.parent.parent))
