"""Judges images of the demo's shapes: how near are they to real ones, and of which class?

The judge is not the teacher. It is a small convolutional network that learned to classify the
8192 shapes of the demo, from another seed. What generated images are compared with are other
shapes, on which no network was trained.
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

COUNT = 8192  # images of the demo


def train_judge(images: Tensor, y: Tensor) -> nn.Sequential:
    """A classifier of uint8 images (N, 3, 24, 24). Its last layer but one gives 64 features."""
    torch.manual_seed(1000)  # no run has this seed
    judge = nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=2, padding=1),
        nn.SiLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.SiLU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1),
        nn.SiLU(),
        nn.Flatten(),
        nn.Linear(64 * 3 * 3, 64),
        nn.SiLU(),
        nn.Linear(64, 8),
    )
    optimizer = torch.optim.AdamW(judge.parameters())
    for ids in torch.randint(len(y), (500, 64)):
        loss = F.cross_entropy(judge(images[ids] / 127.5 - 1), y[ids])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return judge


@functools.cache
def other_shapes() -> Tensor:
    """Images uint8 (2 * COUNT, 3, 24, 24) that are not the demo's. Image i is of class i % 8.

    The first COUNT are left out: they would have the sizes of the demo's shapes.
    """
    return ma.demo_shapes(24, 3 * COUNT).datasets["image"][COUNT:]


@torch.no_grad()
def judge_images(judge: nn.Sequential, images: Tensor) -> tuple:
    """Mean and covariance of the features, and the share in % with the class asked for.

    Image i was asked to be of class i % 8.
    """
    features = judge[:-1](images / 127.5 - 1)
    sums = torch.zeros(65, 65, dtype=torch.float64)
    fid.add_moments(sums, features)
    mean, covariance = fid.mean_and_covariance(sums)
    asked = torch.arange(len(images)) % 8
    correct = judge[-1](features).argmax(dim=1) == asked
    return mean, covariance, 100 * correct.double().mean().item()


@functools.cache
def make_judge() -> tuple:
    """The judge, and what judge_images says of COUNT other shapes."""
    shapes = ma.demo_shapes(24)
    judge = train_judge(shapes.datasets["image"], shapes.datasets["label"])
    return judge, judge_images(judge, other_shapes()[:COUNT])


def score(images: Tensor) -> dict:
    """Of uint8 images (N, 3, 24, 24): fd, the Frechet distance from other shapes, and named."""
    judge, (real_mean, real_covariance, _) = make_judge()
    mean, covariance, named = judge_images(judge, images)
    fd = fid.frechet_distance(mean, covariance, real_mean, real_covariance)
    return dict(fd=fd, named=named)


def score_npz(path: Path) -> dict:
    """The score of images that sample.py wrote."""
    images = torch.from_numpy(np.load(path)["arr_0"])  # (N, 24, 24, 3)
    return score(images.permute(0, 3, 1, 2))


def score_real(count: int) -> dict:
    """The score of `count` more real shapes, which a method can beat by chance only."""
    return score(other_shapes()[COUNT : COUNT + count])
