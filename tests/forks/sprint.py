"""SPRINT (arXiv 2510.21986): most of the blocks see a quarter of the patches.

What differs from SiT: the first two blocks and the last two see all patches. Those between
them, the middle, see one patch of each square of 2 x 2. Then a constant vector, the mask
token, takes the places of the others. A linear layer joins these tokens with those before
the middle, so the last blocks have both, and predict all patches. In MaskAlign, a patch
that was dropped does not come back and is not predicted.

For 10% of the images in training, the mask token takes all places (path drop). This allows
another guidance: away from what the network predicts without label and without middle.

  python tests/forks/sprint.py                                        the demo
  torchrun --nproc_per_node=8 tests/forks/sprint.py --data IMAGENET   a SiT-XL/2
  python tests/forks/sprint.py sample runs/sprint-demo/latest.pt      with that guidance

--align_coeff 0.5 adds REPA. In the end the paper trains with all patches: repeat the
command with --kept_of_four 4 and more --steps. Its network has other positions (RoPE).
"""

import functools
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[2]))

import maskalign
import sample
from maskalign import SIZES, SiTOutput, gather_tokens, patchify, setting


@dataclass(frozen=True)
class Sprint(maskalign.Config):
    """The settings of SiT, and four more."""

    method: str = setting("sprint")  # without a help text, so it is no flag
    class_token: bool = setting(False)
    mixer_depth: int = setting(0)
    mask_ratio: float = setting(0.0)  # nothing is dropped for good
    align_coeff: float = setting(0.0, "weight of the alignment with a teacher (SiT: 0)")
    kept_of_four: int = setting(1, "patches of 2 x 2 in the middle", group="this fork")
    dense_first: int = setting(2, "number of blocks before the middle")
    dense_last: int = setting(2, "number of blocks after the middle")
    path_drop: float = setting(0.1, "share of images whose middle is ignored")
    sample_with: str = setting("tests/forks/sprint.py sample")
    sizes = SIZES | dict(demo=SIZES["demo"] | dict(dense_first=1, dense_last=1))  # ours

    def __post_init__(self):
        side = self.latent_shape[1] // self.patch_size
        fits = side % 2 == 0 and 1 <= self.kept_of_four <= 4
        assert fits, f"kept_of_four {self.kept_of_four}: not in {side} x {side} patches"
        fits = self.dense_first < self.align_depth <= self.depth - self.dense_last
        assert fits, f"align_depth {self.align_depth} is no block of the middle"


def sample_in_squares(scores: Tensor, count: int) -> Tensor:
    """Uniform scores (N, T) -> ids_sparse (N, K): the count highest of each square."""
    num_tokens = scores.shape[1]
    side = round(num_tokens**0.5)
    numbers = torch.arange(num_tokens, device=scores.device)
    squares = patchify(numbers.view(1, 1, side, side), 2)[0]  # (T / 4, 4)
    order = scores[:, squares].argsort(dim=-1, descending=True)  # (N, T / 4, 4)
    return squares.expand_as(order).gather(-1, order)[..., :count].flatten(1)


class SprintSiT(maskalign.SiT):
    """SiT whose middle blocks see only the patches ids_sparse (N, K), or all if None."""

    def __init__(self, config: Sprint):
        super().__init__(config)
        width = config.hidden_size
        self.first_sparse = config.dense_first + 1
        self.last_sparse = config.depth - config.dense_last
        self.fusion = nn.Linear(2 * width, width)
        self.initialize_weights()
        # NOTE(paper): its code calls the mask token learnable, but does not train it.
        self.register_buffer("mask_token", 0.02 * torch.randn(width))

    def forward(self, x, t, y, cls=None, ids_keep=None, ids_sparse=None, drop=None):
        """Returns v (N, T, p*p*C) of all patches. drop (N,) is True for a path drop."""
        h, c = self.embed(x, t, y)  # (N, T, D)
        z_pred = None
        for i, block in enumerate(self.blocks, start=1):
            if i == self.first_sparse:
                dense = h
                h = gather_tokens(dense, ids_sparse)  # (N, K, D)
            h = block(h, c)
            if i == self.align_depth and self.training and self.projector is not None:
                z_pred = self.projector(h)
            if i == self.last_sparse:
                if ids_sparse is not None:
                    images = torch.arange(len(h), device=h.device)[:, None]
                    tokens = self.mask_token.to(h.dtype).expand_as(dense).clone()
                    tokens[images, ids_sparse] = h
                    h = tokens  # (N, T, D)
                if drop is not None:
                    h = torch.where(drop[:, None, None], self.mask_token, h)
                # dense is not detached, so the first blocks also learn through it.
                h = self.fusion(torch.cat([h, dense], dim=-1))
        v, v_cls = self.final_layer(h, c)
        return SiTOutput(v, v_cls, z_pred)


def training_losses(model, x, y, z, config: Sprint, rng, ema=None) -> dict:
    """maskalign's losses of all patches, of which a random subset passes the middle.

    NOTE(paper): in its runs, t is often near 0.5. Here it is uniform, as in maskalign.
    """
    num_tokens = (x.shape[-1] // config.patch_size) ** 2
    ids_sparse = sample_in_squares(rng.rand(len(x), num_tokens), config.kept_of_four)
    drop = rng.rand(len(x)) < config.path_drop
    if z is not None:
        z = gather_tokens(z, ids_sparse, class_token=True)  # what the aligned block sees
    sparse = functools.partial(model, ids_sparse=ids_sparse, drop=drop)
    return maskalign.training_losses(sparse, x, y, z, config, rng)


class PathDropGuided(SprintSiT):
    """For sample.py: without label, no patch enters the middle, so guidance is cheaper."""

    def forward(self, x, t, y, cls=None) -> SiTOutput:
        ids_sparse = None
        if (y == self.num_classes).all():
            ids_sparse = y.new_empty(len(y), 0)
        return super().forward(x, t, y, ids_sparse=ids_sparse)


def train(config: Sprint) -> None:
    maskalign.train(config, build_model=SprintSiT, losses=training_losses)


if __name__ == "__main__":
    if sys.argv[1:2] == ["sample"]:
        sample.main(Sprint, PathDropGuided, argv=sys.argv[2:])
    else:
        maskalign.main(train, Sprint, __doc__)
