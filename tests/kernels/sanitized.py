"""A pytest plugin (-p sanitized).

Build/sanitize's native module takes the place of the installed one (make sanitize).
"""

import importlib.util
import sys
from pathlib import Path

NAME = "fastlm.kernels._native"
PATH = next((Path(__file__).parents[2] / "build" / "sanitize").glob("_native*.so"))

spec = importlib.util.spec_from_file_location(NAME, PATH)
assert spec is not None
assert spec.loader is not None
sys.modules[NAME] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules[NAME])
