"""Workers that take turns, and the report of their figures, for benchmarks against other implementations."""

import pathlib
import sys

# A checkout that is not installed can be measured as well.
sys.path.append(str(pathlib.Path(__file__).resolve().parent.parent.parent))
