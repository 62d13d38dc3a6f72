"""HASTE (arXiv 2505.16792): REPA that also teaches attention, and stops teaching in time.

What differs from REPA: a second loss pulls our attention maps towards the teacher's. From
step tau on, both losses have weight zero. Early in training the teacher helps, later it
holds the network back.

  python tests/forks/haste.py                                        the demo
  torchrun --nproc_per_node=8 tests/forks/haste.py --data IMAGENET   the paper's SiT-XL/2
  python sample.py runs/haste-demo/latest.pt                         images of the demo

--mask_ratio, --mixer_depth and --class_token can be combined with it.
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))

import maskalign
from maskalign import SIZES, SiTOutput, gather_tokens, setting

# Tab. 16: pairs of blocks whose attention is compared (one of ours, one of the teacher's),
# the block after which tokens are aligned, and tau. S and the demo are our choice.
PAIRS_B = ((3, 8), (4, 10), (5, 12))  # counted from 1
PAIRS_XL = ((5, 9), (6, 10), (7, 11), (8, 12))
ROWS = {
    "SiT-S/2": dict(attn_pairs=PAIRS_B, align_depth=5, stop_align_at=100_000),
    "SiT-B/2": dict(attn_pairs=PAIRS_B, align_depth=5, stop_align_at=100_000),
    "SiT-L/2": dict(attn_pairs=PAIRS_XL, align_depth=8, stop_align_at=250_000),
    "SiT-XL/2": dict(attn_pairs=PAIRS_XL, align_depth=8, stop_align_at=250_000),
    "demo": dict(attn_pairs=((2, 1), (3, 2)), align_depth=3, stop_align_at=1000),
}


@dataclass(frozen=True)
class Haste(maskalign.Config):
    """The settings of REPA, and three more."""

    method: str = setting("haste")  # without a help text, so it is no flag
    class_token: bool = setting(False, "also denoise a class token (REPA: no)")
    mixer_depth: int = setting(0, "number of mixing blocks (REPA: 0)")
    mask_ratio: float = setting(0.0, "share of patches to drop (REPA: 0)")
    attn_coeff: float = setting(0.5, "weight of the loss of attention", group="this fork")
    stop_align_at: int = setting(250_000, "the step tau from which on nothing is aligned")
    attn_pairs: tuple = setting(PAIRS_XL)
    sizes = {name: SIZES[name] | ROWS[name] for name in SIZES}


def keep_output(layer, inputs, output) -> None:
    """A forward hook: PyTorch calls it after the layer. It keeps what the layer put out."""
    layer.kept = output


def watched(blocks, numbers: list) -> list:
    """Attention layers of some blocks, of which we keep from now on what qkv puts out."""
    layers = [blocks[number - 1].attn for number in numbers]
    for layer in layers:
        layer.qkv.register_forward_hook(keep_output)
    return layers


def take_qkv(layers: list) -> list:
    """Queries, keys and values of watched layers, from the last pass (N, -, 3, heads, d)."""
    taken = []
    for layer in layers:
        taken.append(layer.qkv.kept.unflatten(-1, (3, layer.num_heads, -1)))
        layer.qkv.kept = None
    return taken


class HasteSiT(maskalign.SiT):
    """SiT that also returns, as extra, the qkv of the blocks that learn attention."""

    def __init__(self, config: Haste):
        super().__init__(config)
        self.layers = watched(self.blocks, [ours for ours, _ in config.attn_pairs])

    def forward(self, *inputs) -> SiTOutput:
        out = super().forward(*inputs)
        return out._replace(extra=take_qkv(self.layers))


class HasteTeacher:
    """Images -> the teacher's tokens z (N, 1+T, z_dim), and the qkv of its blocks."""

    def __init__(self, config: Haste, dataset, device):
        self.teacher = maskalign.load_teacher(config, dataset, device)
        self.dim = self.teacher.dim
        blocks = self.teacher.vit.blocks
        self.layers = watched(blocks, [theirs for _, theirs in config.attn_pairs])

    def __call__(self, images: Tensor) -> tuple:
        z = self.teacher(images)
        return z, take_qkv(self.layers)


def attention_logits(qkv: Tensor, num_patches: int, ids_keep=None) -> Tensor:
    """What softmax is given, for all patches or for ids_keep (N, K): (N, heads, K, K)."""
    patches = qkv[:, -num_patches:]  # they come after class token and registers
    q, k, _ = gather_tokens(patches, ids_keep).unbind(dim=2)  # (N, K, heads, d)
    return torch.einsum("nqhd,nkhd->nhqk", q, k) / math.sqrt(q.shape[-1])


def attention_loss(ours: list, theirs: list, num_patches: int, ids_keep=None) -> Tensor:
    """The mean cross-entropy of our attention maps and the teacher's, from qkv of both."""
    losses = []
    for our_qkv, their_qkv in zip(ours, theirs, strict=True):
        # Tokens are left out before softmax: both maps are distributions over the same ones.
        target = attention_logits(their_qkv, num_patches, ids_keep)
        logits = attention_logits(our_qkv, target.shape[-1])  # we have the kept ones only
        heads = min(logits.shape[1], target.shape[1])  # L and XL have four more
        log_p = logits[:, :heads].log_softmax(dim=-1)  # in float32, also under autocast
        losses.append(-(target[:, :heads].softmax(dim=-1) * log_p).sum(dim=-1).mean())
    return torch.stack(losses).mean()


def training_losses(model, x, y, z, config: Haste, rng, ema=None) -> dict:
    """maskalign's losses, and attn. z is what HasteTeacher returns."""
    z, theirs = z
    seen = {}

    def network(x_t, t, y, cls_t, ids_keep):  # model, of which we keep two things
        out = model(x_t, t, y, cls_t, ids_keep)
        seen.update(ours=out.extra, ids_keep=ids_keep)
        return out

    terms = maskalign.training_losses(network, x, y, z, config, rng)
    num_patches = (x.shape[-1] // config.patch_size) ** 2
    attn = attention_loss(seen["ours"], theirs, num_patches, seen["ids_keep"])
    teaches = float(rng.step < config.stop_align_at)  # 1, and 0 from tau on
    taught = config.align_coeff * terms["align"] + config.attn_coeff * attn
    loss = terms["denoise"] + config.cls_coeff * terms["cls"] + teaches * taught
    return terms | dict(loss=loss, attn=attn)


def train(config: Haste) -> None:
    ours = dict(build_model=HasteSiT, build_teacher=HasteTeacher, losses=training_losses)
    maskalign.train(config, **ours)


if __name__ == "__main__":
    maskalign.main(train, Haste, __doc__)
