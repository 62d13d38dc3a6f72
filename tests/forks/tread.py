"""TREAD (arXiv 2501.04765): tokens that skip the middle blocks, and come back.

What differs from SiT: in training a share of the tokens skips the blocks first_routed to
last_routed. Unlike MaskAlign's dropped tokens these come back, and are predicted, too.
--class_token --align_coeff 0.5 adds REG's alignment, of the tokens that pass the aligned block.

  python tests/forks/tread.py                                        the demo, on a laptop
  torchrun --nproc_per_node=8 tests/forks/tread.py --data IMAGENET   the real thing
  python sample.py runs/tread-demo/latest.pt                         its images, without a route
"""

import dataclasses
import functools
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[2]))

import maskalign
from maskalign import SIZES, SiTOutput, gather_tokens, require, setting

LAST_ROUTED = dict(zip(SIZES, (9, 9, 21, 25, 4), strict=True))  # S, B, L, XL; the demo's is ours


@dataclasses.dataclass(frozen=True)
class Tread(maskalign.Config):
    """SiT's settings as defaults, a mask that means another thing, and two more."""

    method: str = setting("tread")  # no note, so no flag: there is no other here
    class_token: bool = setting(False, "as SiT: no class token; it would not skip")
    mixer_depth: int = setting(0, "as SiT: no mixing blocks", rule="0 or above")
    mask_ratio: float = setting(0.5, "TREAD: share of patch tokens that skip", rule="in [0, 1)")
    align_coeff: float = setting(0.0, "as SiT: no alignment with a teacher", rule="0 or above")
    first_routed: int = setting(3, "TREAD: first block they skip, from 1 (its code: from 0)")
    last_routed: int = setting(25, "TREAD: the last one")
    sizes = {size: row | dict(last_routed=LAST_ROUTED[size]) for size, row in SIZES.items()}
    sizes["demo"] |= dict(first_routed=2)

    def __post_init__(self):
        rule = f"first_routed, {self.first_routed}, or above, and at most the depth, {self.depth}"
        require(self, "last_routed", self.first_routed <= self.last_routed <= self.depth, rule)


class RoutedSiT(maskalign.SiT):
    """SiT in which only the patches `ids_route` (N, K) pass the route; None: all."""

    def __init__(self, config: Tread):
        super().__init__(config)
        self.first_routed, self.last_routed = config.first_routed, config.last_routed

    def forward(self, x, t, y, cls=None, ids_keep=None, ids_route=None) -> SiTOutput:
        """As SiT's, with v (N, T, p*p*C) for all patches; ids_keep is None."""
        (h, c), z_pred = self.embed(x, t, y, cls), None  # (N, [1+]T, D)
        for i, block in enumerate(self.blocks, start=1):
            if i == self.first_routed:
                before, h = h, gather_tokens(h, ids_route, self.class_token)  # (N, [1+]K, D)
            h = block(h, c)
            if i == self.align_depth:
                z_pred = self.projectors[0](h)
            if i == self.last_routed and ids_route is not None:
                rows = F.pad(ids_route + 1, (1, 0)) if self.class_token else ids_route
                # Not detached: through what skips, the first blocks learn what the last ones need.
                h = before.scatter(1, rows.unsqueeze(-1).expand_as(h), h)  # (N, [1+]T, D)
        return SiTOutput(*self.final_layer(h, c), z_pred)


def build_model(config: Tread) -> RoutedSiT:
    torch.manual_seed(config.seed)
    return RoutedSiT(config)


def training_losses(model, x, y, z, config: Tread, *, ids_keep=None, **drawn) -> dict:
    """maskalign's losses over all patches; ids_keep tells who passes the route. Where the aligned
    block lies in it, z (class token first) keeps only the tokens that it sees."""
    if config.align_coeff > 0 and config.first_routed <= config.align_depth <= config.last_routed:
        z = gather_tokens(z, ids_keep, class_token=True)
    routed = functools.partial(model, ids_route=ids_keep)
    return maskalign.training_losses(routed, x, y, z, config, **drawn)


def train(config: Tread, signals: list | tuple = ()) -> None:
    ours = dict(build_model=build_model, training_losses=training_losses)
    maskalign.train(config, **ours, signals=signals)


if __name__ == "__main__":
    maskalign.main(train, Tread, __doc__)
