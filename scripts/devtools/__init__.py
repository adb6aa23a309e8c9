"""The Python code that the commands in scripts/, the tests and the benchmarks share."""

from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parent.parent.parent
"""The clone."""
