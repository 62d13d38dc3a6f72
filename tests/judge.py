"""A judge of pictures of the demo's shapes: how near to real ones, and how often of their class.

It is not the teacher: a small convolutional network, of another seed, that learned to name the 8192
shapes of the demo. Every other shape that it is compared with is one on which nobody was trained.
"""

import functools
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import fid
import maskalign as ma

SHAPES = 8192  # the demo's; demo_shapes draws the same ones first, however many it draws


def train_judge(images: Tensor, y: Tensor) -> nn.Sequential:
    """A classifier of uint8 images (N, 3, 24, 24); its last layer but one gives 64 features."""
    torch.manual_seed(1000)  # no run has this seed
    layers = []
    for channels, width in ((3, 16), (16, 32), (32, 64)):
        layers += [nn.Conv2d(channels, width, 3, stride=2, padding=1), nn.SiLU()]
    judge = nn.Sequential(*layers, nn.Flatten(), nn.Linear(9 * 64, 64), nn.SiLU(), nn.Linear(64, 8))
    optimizer = torch.optim.AdamW(judge.parameters())
    for batch in torch.randint(len(y), (500, 64)):
        F.cross_entropy(judge(images[batch] / 127.5 - 1), y[batch]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return judge


@torch.no_grad()
def look(judge: nn.Sequential, images: Tensor) -> tuple:
    """Mean and covariance of the features; share in % named as asked: image i is of class i % 8."""
    features, sums = judge[:-1](images / 127.5 - 1), torch.zeros(65, 65, dtype=torch.float64)
    fid.add_moments(sums, features)
    hits = judge[-1](features).argmax(dim=1) == torch.arange(len(images)) % 8
    return *fid.mean_and_covariance(sums), 100 * hits.double().mean().item()


@functools.cache
def make_judge() -> tuple:
    """The judge, and what it sees in held-out shapes: mean, covariance, share named rightly."""
    images, y = ma.demo_shapes(24, 2 * SHAPES).tensors
    judge = train_judge(images[:SHAPES], y[:SHAPES])
    return judge, *look(judge, images[SHAPES:])


def score(images: Tensor) -> dict:
    """fd, the Frechet distance from held-out shapes, and named, of uint8 images (N, 3, 24, 24)."""
    judge, *held_out, _ = make_judge()
    *stats, named = look(judge, images)
    return dict(fd=fid.frechet_distance(*stats, *held_out), named=named)


def score_npz(path: Path) -> dict:
    """The same of images that sample.py wrote."""
    return score(torch.from_numpy(np.load(path)["arr_0"]).permute(0, 3, 1, 2))


def score_real(count: int) -> dict:
    """The same of `count` real shapes, others still: what no method can beat but by chance."""
    return score(ma.demo_shapes(24, 2 * SHAPES + count).tensors[0][2 * SHAPES :])
