"""HASTE (arXiv 2505.16792): REPA that teaches attention, too, and stops in time.

What differs from REPA: a second loss pulls our attention maps towards the teacher's. From step tau
on both lessons end: early on a teacher leads faster than the data would, later it holds back.

  python tests/forks/haste.py                                        the demo, on a laptop
  torchrun --nproc_per_node=8 tests/forks/haste.py --data IMAGENET   the real thing
  python sample.py runs/haste-demo/latest.pt                         its images

--mask_ratio, --mixer_depth and --class_token combine with it.
"""

import dataclasses
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[2]))

import maskalign
from maskalign import SIZES, setting

# Tab. 16: the block after which tokens are aligned; tau; and the pairs of blocks, from 1, whose
# attention is compared (ours, the teacher's). The demo's row is ours.
EARLY = dict(align_depth=5, stop_align_at=100_000, attn_layers=((3, 8), (4, 10), (5, 12)))
LATE = dict(align_depth=8, stop_align_at=250_000, attn_layers=((5, 9), (6, 10), (7, 11), (8, 12)))
DEMO = dict(align_depth=3, stop_align_at=1000, attn_layers=((2, 1), (3, 2)))
LAYERS = dict(zip(SIZES, (EARLY, EARLY, LATE, LATE, DEMO), strict=True))  # S, B, L, XL, demo


@dataclasses.dataclass(frozen=True)
class Haste(maskalign.Config):
    """REPA's settings as defaults, and three more."""

    method: str = setting("haste")  # no note, so no flag: there is no other here
    class_token: bool = setting(False, "as REPA: no class token")
    mixer_depth: int = setting(0, "as REPA: no mixing blocks", rule="0 or above")
    mask_ratio: float = setting(0.0, "as REPA: no token dropped", rule="in [0, 1)")
    align_coeff: float = setting(0.5, "as REPA: lambda, alignment of tokens")
    attn_coeff: float = setting(0.5, "HASTE: weight of the attention's loss", rule="0 or above")
    stop_align_at: int = setting(250_000, "Tab. 16: tau, from which step on nothing is aligned")
    attn_layers: tuple = setting(LATE["attn_layers"])
    sizes = {size: row | LAYERS[size] for size, row in SIZES.items()}


def keep_output(layer: nn.Module, inputs: tuple, output: Tensor) -> None:
    """A forward hook: PyTorch calls it after the layer, which then remembers what it put out."""
    layer.kept = output if layer.training else None  # the EMA, a copy with hooks, keeps nothing


def hook_attention(blocks: nn.ModuleList, numbers: list) -> list:
    """The attention layers of these blocks, from 1, which from now on keep queries and keys. A
    network with fewer blocks gives its last."""
    layers = [blocks[:number][-1].attn for number in numbers]
    for attn in layers:
        attn.qkv.train().register_forward_hook(keep_output)  # train(): also in the teacher
    return layers


def build_model(config: Haste) -> maskalign.SiT:
    model = maskalign.build_model(config)
    model.compared = hook_attention(model.blocks, [ours for ours, _ in config.attn_layers])
    return model


def build_teacher(config: Haste, dataset, device, rank: int = 0) -> maskalign.ViTTeacher:
    teacher = maskalign.build_teacher(config, dataset, device, rank)
    teacher.compared = hook_attention(teacher.vit.blocks, [its for _, its in config.attn_layers])
    return teacher


def draw_step(run: maskalign.Run, generator: torch.Generator) -> dict:
    """As maskalign's, and the pairs of layers to compare in this step: from tau on, none."""
    drawn, pairs = maskalign.draw_step(run, generator), []
    if run.step < run.config.stop_align_at:
        pairs = list(zip(run.model.compared, run.teacher.compared, strict=True))
    elif run.model.align_depth:  # at tau, and at the first step of a run resumed after it
        stop_aligning(run)
    return drawn | dict(pairs=pairs)  # no tensor: training_losses gets it as it is


def stop_aligning(run: maskalign.Run) -> None:
    """The projector is frozen, not removed: so the weights and the optimizer's state in a
    checkpoint keep their shape, and a resumed run goes on as one that was never stopped."""
    run.model.align_depth = 0
    run.model.projectors.requires_grad_(False)
    if not run.config.class_token:
        run.teacher = None  # nobody asks it any more
    if run.world_size > 1:  # a new wrapper: the old one would wait for the projector's gradients
        run.ddp_model = nn.parallel.DistributedDataParallel(run.model, gradient_as_bucket_view=True)


def attention_logits(attn: nn.Module, num_patches: int, ids_keep: Tensor | None = None) -> Tensor:
    """What the softmax of a layer saw in its last forward pass, (N, heads, K, K), in float32 and
    cut to patches: no class token, no registers. ids_keep: which of them, None: all."""
    qkv = maskalign.gather_tokens(attn.qkv.kept[:, -num_patches:], ids_keep)
    q, k, _ = qkv.unflatten(-1, (3, attn.num_heads, -1)).unbind(2)  # (N, K, heads, head_dim)
    return maskalign.at_least_float32(torch.einsum("nqhd,nkhd->nhqk", q, k)) / q.shape[-1] ** 0.5


def training_losses(model, x, y, z, config: Haste, *, pairs: list, ids_keep=None, **drawn) -> dict:
    """As maskalign's, which refuses what it does not know among `drawn`, and "attn": the mean
    cross-entropy of our attention maps to the teacher's, over layers, heads and queries."""
    losses = maskalign.training_losses(model, x, y, z, config, ids_keep=ids_keep, **drawn)
    attn, num_patches = torch.zeros_like(losses["loss"]), (x.shape[-1] // config.patch_size) ** 2
    for ours, theirs in pairs:
        # Cut before the softmax, so that both maps are distributions over the patches we keep.
        theirs = attention_logits(theirs, num_patches, ids_keep)
        ours = attention_logits(ours, theirs.shape[-1])  # the dropped ones never came so far
        heads = min(ours.shape[1], theirs.shape[1])  # L and XL have four that nobody teaches
        log_ours, theirs = ours[:, :heads].log_softmax(-1), theirs[:, :heads].softmax(-1)
        attn = attn - (theirs * log_ours).sum(dim=-1).mean() / len(pairs)
    return losses | dict(loss=losses["loss"] + config.attn_coeff * attn, attn=attn)


def train(config: Haste, signals: list | tuple = ()) -> None:
    maskalign.train(
        config,
        build_model=build_model,
        build_teacher=build_teacher,
        draw_step=draw_step,
        training_losses=training_losses,
        signals=signals,
    )


if __name__ == "__main__":
    maskalign.main(train, Haste, __doc__)
