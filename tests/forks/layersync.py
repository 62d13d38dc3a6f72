"""LayerSync (arXiv 2510.12581): an early block learns from a later one of the same network.

What differs from SiT: in the same pass, the tokens after block early_depth are pulled towards those
after late_depth, which know more of the image. No teacher, no projector, no new weight.

  python tests/forks/layersync.py                                        the demo, on a laptop
  torchrun --nproc_per_node=8 tests/forks/layersync.py --data IMAGENET   the real thing
  python sample.py runs/layersync-demo/latest.pt                         its images

--mask_ratio 0.25 --mixer_depth 2 makes it a MaskAlign without a teacher: ours, published by nobody,
untested at scale. --align_coeff 0.5 adds REPA.
"""

import dataclasses
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[2]))

import maskalign
from maskalign import SIZES, at_least_float32, setting

# NOTE(paper): XL's pair is that of its code, L's is reported by others. S's, B's and the demo's are
# ours, after the same rule (early: not among the first blocks; late: not in the last fifth).
EARLY = dict(zip(SIZES, (4, 4, 8, 8, 2), strict=True))  # S, B, L, XL, demo
LATE = dict(zip(SIZES, (9, 9, 18, 16, 4), strict=True))


@dataclasses.dataclass(frozen=True)
class LayerSync(maskalign.Config):
    """SiT's settings as defaults, and three more."""

    method: str = setting("layersync")  # no note, so no flag: there is no other here
    class_token: bool = setting(False, "as SiT: no class token")
    mixer_depth: int = setting(0, "as SiT: no mixing blocks", rule="0 or above")
    mask_ratio: float = setting(0.0, "as SiT: no token dropped", rule="in [0, 1)")
    align_coeff: float = setting(0.0, "as SiT: no alignment with a teacher", rule="0 or above")
    sync_coeff: float = setting(0.2, "LayerSync: lambda, early block with late")
    early_depth: int = setting(8, "LayerSync: the tokens after this block, from 1, are pulled")
    late_depth: int = setting(16, "LayerSync: towards those after this block")
    sizes = {k: row | dict(early_depth=EARLY[k], late_depth=LATE[k]) for k, row in SIZES.items()}

    def __post_init__(self):
        rule = f"above early_depth, {self.early_depth}, and at most the depth, {self.depth}"
        fits = self.early_depth < self.late_depth <= self.depth  # were they equal, sync would be -1
        maskalign.require(self, "late_depth", fits, rule)


def keep_output(layer: nn.Module, inputs: tuple, output: Tensor) -> None:
    """A forward hook: PyTorch calls it after the layer, which then remembers what it put out."""
    layer.kept = output if layer.training else None  # the EMA, a copy with hooks, keeps nothing


def build_model(config: LayerSync) -> maskalign.SiT:
    model = maskalign.build_model(config)
    model.pair = [model.blocks[depth - 1] for depth in (config.early_depth, config.late_depth)]
    for block in model.pair:
        block.register_forward_hook(keep_output)
    return model


def draw_step(run: maskalign.Run, generator: torch.Generator) -> dict:
    """As maskalign's, and the two blocks: no tensors, so training_losses gets them as they are."""
    return maskalign.draw_step(run, generator) | dict(pair=run.model.pair)


def training_losses(model, x, y, z, config: LayerSync, *, pair: list, **drawn) -> dict:
    """maskalign's losses (it refuses names that it does not know in `drawn`) and "sync": minus the
    mean cosine between the early block's kept tokens and the late block's."""
    losses = maskalign.training_losses(model, x, y, z, config, **drawn)
    early, late = (at_least_float32(block.kept) for block in pair)  # (N, [1+]K, D)
    # Detached: else late would also move towards early, and the loss would not show it.
    sync = -F.cosine_similarity(early, late.detach(), dim=-1).mean()
    return losses | dict(loss=losses["loss"] + config.sync_coeff * sync, sync=sync)


def train(config: LayerSync, signals: list | tuple = ()) -> None:
    ours = dict(build_model=build_model, draw_step=draw_step, training_losses=training_losses)
    maskalign.train(config, **ours, signals=signals)


if __name__ == "__main__":
    maskalign.main(train, LayerSync, __doc__)
