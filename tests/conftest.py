"""Makes `import maskalign` work from any folder, hides the GPU, and sets the two markers.

pytest -m "not slow"     the method, its objective, its samplers: 50 s, for who does the exercises
pytest -m golden         what is compared with numbers of the official programs
"""

import functools
import multiprocessing.forkserver
import os
import sys
from pathlib import Path

import pytest

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # what is equal to the bit on CPU is not on a GPU
os.environ["OMP_NUM_THREADS"] = "1"  # also of the programs: such small networks gain by no more
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads crawl on a busy machine

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent / "golden")]

QUICK = ("config", "data", "fid", "form", "method", "model", "objective", "sampler")
SLOW = {"folder", "quick", "vae_file"}  # but not what asks for these fixtures


def pytest_configure(config):
    config.addinivalue_line("markers", "golden: compared with numbers of the official programs")
    config.addinivalue_line("markers", "slow: not in the quick half; set by conftest.py")


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.stem.removeprefix("test_") not in QUICK or SLOW & set(item.fixturenames):
            item.add_marker(pytest.mark.slow)


def pytest_collection_finish(session):
    """The server of processes.py imports torch on another core, while the first tests run."""
    if any(item.get_closest_marker("slow") for item in session.items):
        import processes  # noqa: F401, it says what to import

        multiprocessing.forkserver.ensure_running()


@pytest.fixture(autouse=True, scope="session")
def shapes_are_drawn_once():
    """Each run of the demo draws the same 8192 images: once is enough."""
    import maskalign

    maskalign.demo_shapes = functools.cache(maskalign.demo_shapes)


@pytest.fixture
def all_cores():
    """For the few networks here that are large enough to gain by it."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count())
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def vae_file(tmp_path_factory):
    """The SD-VAE's format, with made-up values."""
    return save_weights("vae/sd_vae", tmp_path_factory.mktemp("vae") / "vae.pth")


@pytest.fixture(scope="session")
def small_vae_file(tmp_path_factory):
    """The same with a quarter of the channels: for what only needs some VAE."""
    return save_weights("vae/sd_vae", tmp_path_factory.mktemp("vae") / "small.pth", shrink=4)


@pytest.fixture(scope="session")
def dino_file(tmp_path_factory):
    """Meta's format: 37 x 37 positions and a mask token, in a .pth file; made-up values."""
    path = tmp_path_factory.mktemp("dino") / "dinov2_vits14_pretrain.pth"
    return save_weights("dinov2/vit_s14_224", path)


def save_weights(case, path, shrink=1):
    import torch
    from golden_cases import CASES, weights

    case = dict(CASES[case])
    case["state_dict"] = [
        (name, [n // shrink if n >= 128 else n for n in shape])
        for name, shape in case["state_dict"]
    ]
    torch.save(weights(case, torch.float32), path)
    return str(path)
