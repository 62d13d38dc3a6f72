"""Makes `import maskalign` work from any folder, hides the GPU, and sets the two markers.

pytest -m "not slow"     the method, its objective, its samplers: 30 s, for who does the exercises
pytest -m golden         what is compared with numbers of the official programs
"""

import functools
import os
import sys
from pathlib import Path

import pytest

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # what is equal to the bit on CPU is not on a GPU

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent / "golden")]

QUICK = ("config", "data", "method", "model", "objective", "sampler")  # test_*.py; others are slow


def pytest_configure(config):
    config.addinivalue_line("markers", "golden: compared with numbers of the official programs")
    config.addinivalue_line("markers", "slow: not in the quick half; set by conftest.py")


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.stem.removeprefix("test_") not in QUICK:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True, scope="session")
def shapes_are_drawn_once():
    """Each run of the demo draws the same 8192 images: once is enough."""
    import maskalign

    maskalign.demo_shapes = functools.cache(maskalign.demo_shapes)
