"""Dispersive loss (arXiv 2506.09027): images of a batch push each other's tokens apart.

What differs from SiT: one more loss. Take the tokens after a block at a quarter of the
depth, all those of an image as one long vector. These vectors shall be far from each other.
That is a contrastive loss without positive pairs. It needs no teacher, no projector and no
extra parameters.

  python tests/forks/dispersive.py                                        the demo
  torchrun --nproc_per_node=8 tests/forks/dispersive.py --data IMAGENET   the paper's run
  python sample.py runs/dispersive-demo/latest.pt                         images

--align_coeff 0.5 adds REPA, and together with --class_token it adds REG.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.nn.functional import all_gather

sys.path.insert(0, str(Path(__file__).parents[2]))

import maskalign
from maskalign import SIZES, SiTOutput, setting


@dataclass(frozen=True)
class Dispersive(maskalign.Config):
    """The settings of SiT, and three more, as in the paper.

    NOTE(paper): its PyTorch code has weight 0.25, temperature 1 and the last block.
    """

    method: str = setting("dispersive")  # without a help text, so it is no flag
    class_token: bool = setting(False, "also denoise a class token (SiT: no)")
    mixer_depth: int = setting(0)
    mask_ratio: float = setting(0.0)  # tokens of the same place are compared
    align_coeff: float = setting(0.0, "weight of the alignment with a teacher (SiT: 0)")
    disperse_coeff: float = setting(0.5, "weight of the new loss", group="this fork")
    disperse_depth: int = setting(7, "push the tokens after this block, counted from 1")
    temperature: float = setting(0.5, "how far the push reaches, tau")
    sizes = {k: row | dict(disperse_depth=row["depth"] // 4) for k, row in SIZES.items()}

    def __post_init__(self):
        fits = 1 <= self.disperse_depth <= self.depth
        assert fits, f"disperse_depth {self.disperse_depth} is not 1 to {self.depth}"


class WatchedSiT(maskalign.SiT):
    """SiT that also returns, as extra, the tokens after block disperse_depth."""

    def __init__(self, config: Dispersive):
        super().__init__(config)
        self.disperse_depth = config.disperse_depth

    def forward(self, x, t, y, cls=None, ids_keep=None) -> SiTOutput:
        h, c = self.embed(x, t, y, cls)  # (N, [1+]T, D)
        z_pred = None
        for i, block in enumerate(self.blocks, start=1):
            h = block(h, c)
            if i == self.disperse_depth:
                watched = h
            if i == self.align_depth and self.training and self.projector is not None:
                z_pred = self.projector(h)
        v, v_cls = self.final_layer(h, c)
        return SiTOutput(v, v_cls, z_pred, extra=watched)


def gather_batch(h: Tensor) -> Tensor:
    """Rows h of this process -> those of all processes, in the order of the batch."""
    if not dist.is_initialized():  # this is the only process
        return h
    # Each process computes the loss of the whole batch. all_gather adds up the gradients
    # that they send back for a row. The sum is world_size times too large, and DDP divides
    # it by world_size. (torch.distributed.all_gather would send no gradient back.)
    return torch.cat(all_gather(h))


def dispersive_loss(h: Tensor, temperature: float) -> Tensor:
    """Vectors h (N, F) of N images -> log of the mean of exp(-distance / temperature).

    distance is the mean square of a difference. The mean is over all N * N pairs. In N of
    them an image meets itself, so the loss is never below log(1 / N).
    """
    h = h - h.mean(dim=0)  # leaves the differences as they are, and rounds them less
    squares = h.square().mean(dim=1)  # (N,)
    # |a - b|^2 = |a|^2 + |b|^2 - 2ab, since all differences of XL's batch fill 77 GB.
    distances = squares[:, None] + squares - 2 * (h @ h.mT) / h.shape[1]  # (N, N)
    return torch.exp(-distances / temperature).mean().log()


def training_losses(model, x, y, z, config: Dispersive, rng, ema=None) -> dict:
    """maskalign's losses, and disperse.

    NOTE(paper): its code compares the 16 images of a device (32 in PyTorch). Here it is
    the whole batch, so the loss does not depend on the number of processes.
    """
    outputs = []

    def network(*inputs):  # model, of which we keep the output
        outputs.append(model(*inputs))
        return outputs[0]

    terms = maskalign.training_losses(network, x, y, z, config, rng)
    h = outputs[0].extra.flatten(1)  # (N, F)
    with torch.autocast(x.device.type, enabled=False):  # bfloat16 is too coarse
        disperse = dispersive_loss(gather_batch(h.to(x.dtype)), config.temperature)
    loss = terms["loss"] + config.disperse_coeff * disperse
    return terms | dict(loss=loss, disperse=disperse)


def train(config: Dispersive) -> None:
    maskalign.train(config, build_model=WatchedSiT, losses=training_losses)


if __name__ == "__main__":
    maskalign.main(train, Dispersive, __doc__)
