"""LayerSync (arXiv 2510.12581): an early block learns from a later one of the same network.

What differs from SiT: one more loss. It pulls the tokens after block early_depth towards
those after block late_depth, which know more about the image. It needs no teacher, no
projector and no extra parameters.

  python tests/forks/layersync.py                                        the demo
  torchrun --nproc_per_node=8 tests/forks/layersync.py --data IMAGENET   the paper's run
  python sample.py runs/layersync-demo/latest.pt                         images

With --mask_ratio 0.25 --mixer_depth 2 it is a MaskAlign without a teacher. Nobody has
published that, and we have not tested it at scale. --align_coeff 0.5 adds REPA.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[2]))

import maskalign
from maskalign import SIZES, SiTOutput, gather_tokens, setting

# NOTE(paper): XL's depths are those of its code, L's are reported by others. The rest is
# our choice, by the same rule: early is not one of the first blocks, and late is not in the
# last fifth.
DEPTHS = {
    "SiT-S/2": dict(early_depth=4, late_depth=9),
    "SiT-B/2": dict(early_depth=4, late_depth=9),
    "SiT-L/2": dict(early_depth=8, late_depth=18),
    "SiT-XL/2": dict(early_depth=8, late_depth=16),
    "demo": dict(early_depth=2, late_depth=4),
}


@dataclass(frozen=True)
class LayerSync(maskalign.Config):
    """The settings of SiT, and three more."""

    method: str = setting("layersync")  # without a help text, so it is no flag
    class_token: bool = setting(False, "also denoise a class token (SiT: no)")
    mixer_depth: int = setting(0, "number of mixing blocks (SiT: 0)")
    mask_ratio: float = setting(0.0, "share of patches to drop (SiT: 0)")
    align_coeff: float = setting(0.0, "weight of the alignment with a teacher (SiT: 0)")
    sync_coeff: float = setting(0.2, "weight of the new loss, lambda", group="this fork")
    early_depth: int = setting(8, "pull the tokens after this block, counted from 1")
    late_depth: int = setting(16, "towards those after this block")
    sizes = {name: SIZES[name] | DEPTHS[name] for name in SIZES}

    def __post_init__(self):
        fits = 1 <= self.early_depth < self.late_depth <= self.depth
        pair = f"early_depth {self.early_depth} and late_depth {self.late_depth}"
        assert fits, f"{pair} are not two blocks of {self.depth}, the early one first"


class SyncSiT(maskalign.SiT):
    """SiT that also returns, as extra, the tokens after early_depth and late_depth."""

    def __init__(self, config: LayerSync):
        super().__init__(config)
        self.early_depth = config.early_depth
        self.late_depth = config.late_depth

    def forward(self, x, t, y, cls=None, ids_keep=None) -> SiTOutput:
        h, c = self.embed(x, t, y, cls)
        h = gather_tokens(h, ids_keep, self.class_token)  # (N, [1+]K, D)
        z_pred = None
        for i, block in enumerate(self.blocks, start=1):
            h = block(h, c)
            if i == self.early_depth:
                early = h
            if i == self.late_depth:
                late = h
            if i == self.align_depth and self.training and self.projector is not None:
                z_pred = self.projector(h)
        v, v_cls = self.final_layer(h, c)
        return SiTOutput(v, v_cls, z_pred, extra=(early, late))


def training_losses(model, x, y, z, config: LayerSync, rng, ema=None) -> dict:
    """maskalign's losses, and sync: minus the mean cosine of early and late tokens."""
    outputs = []

    def network(*inputs):  # model, of which we keep the output
        outputs.append(model(*inputs))
        return outputs[0]

    terms = maskalign.training_losses(network, x, y, z, config, rng)
    early, late = outputs[0].extra  # (N, [1+]K, D)
    # Late tokens are detached, as they teach. Otherwise they would also learn from early ones.
    late = late.detach().to(x.dtype)  # float32, as bfloat16 is too coarse for a cosine
    sync = -F.cosine_similarity(early.to(x.dtype), late, dim=-1).mean()
    return terms | dict(loss=terms["loss"] + config.sync_coeff * sync, sync=sync)


def train(config: LayerSync) -> None:
    maskalign.train(config, build_model=SyncSiT, losses=training_losses)


if __name__ == "__main__":
    maskalign.main(train, LayerSync, __doc__)
