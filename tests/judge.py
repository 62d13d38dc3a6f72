"""Judges images of the demo's shapes: how near are they to real ones, and of which class?

The judge is not the teacher. It is a small convolutional network that learned to classify the
8192 shapes of the demo, from another seed. What generated images are compared with are other
shapes, on which no network was trained.

A second judge, of another kind, is no network and learns nothing. It compares an image, without
its colors, with the 8192 shapes, and names the class of the nearest.
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


def remove_colors(images: Tensor) -> Tensor:
    """Images uint8 (N, 3, 24, 24) -> unit vectors (N, 576), large where the shape is.

    A pixel is background + inside * (color - background), and only one shape in thousands
    reaches the edge of its image. So the mean over pixels, less that of the edge, points to the
    color.
    """
    x = images.double().permute(0, 2, 3, 1)  # (N, 24, 24, 3)
    edge = torch.cat([x[:, 0], x[:, -1], x[:, :, 0], x[:, :, -1]], dim=1)  # (N, 96, 3)
    x = x.flatten(1, 2) - edge.mean(dim=1, keepdim=True)  # (N, 576, 3)
    to_color = x.mean(dim=1, keepdim=True)  # (N, 1, 3)
    inside = (x * to_color).sum(dim=-1)  # (N, 576), up to a factor for each image
    return F.normalize(inside, dim=1)


@functools.cache
def make_templates() -> Tensor:
    """The demo's shapes without colors, (COUNT, 576). Template i is of class i % 8."""
    return remove_colors(ma.demo_shapes(24).datasets["image"])


def name_by_template(images: Tensor) -> Tensor:
    """The class of the nearest template, by the cosine, of each image."""
    cosines = remove_colors(images) @ make_templates().T  # (N, COUNT)
    return cosines.argmax(dim=1) % 8


def score(images: Tensor) -> dict:
    """Scores of uint8 images (N, 3, 24, 24), where image i was asked to be of class i % 8.

    fd is the Frechet distance from other shapes. named and template are the shares in % with the
    class asked for, as the network sees it, and by the nearest template.
    """
    judge, (real_mean, real_covariance, _) = make_judge()
    mean, covariance, named = judge_images(judge, images)
    fd = fid.frechet_distance(mean, covariance, real_mean, real_covariance)
    correct = name_by_template(images) == torch.arange(len(images)) % 8
    return dict(fd=fd, named=named, template=100 * correct.double().mean().item())


def score_npz(path: Path) -> dict:
    """The score of images that sample.py wrote."""
    images = torch.from_numpy(np.load(path)["arr_0"])  # (N, 24, 24, 3)
    return score(images.permute(0, 3, 1, 2))


def score_real(count: int) -> dict:
    """The score of `count` more real shapes, which a method can beat by chance only."""
    return score(other_shapes()[COUNT : COUNT + count])
