"""Helpers of the plugin's tests serve these too."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "plugin"))
