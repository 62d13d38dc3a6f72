"""Random numbers that a test has chosen, in the place of maskalign.StepRng."""

import torch


class Given:
    """Hands out `rand` and `randn` one after the other, in the order in which a loss asks.

    maskalign.training_losses asks rand for t, for the label drop, and (with a mask) for the
    scores of the patches; randn for the noise of x, and (with a class token) for that of cls.
    """

    def __init__(self, rand, randn, step=0):
        self.uniform, self.normal, self.step, self.device = list(rand), list(randn), step, "cpu"

    def rand(self, n, *shape):
        return self.next(self.uniform, (n, *shape))

    def randn(self, n, *shape):
        return self.next(self.normal, (n, *shape))

    def next(self, queue, shape):
        numbers = queue.pop(0)
        assert numbers.shape == shape, f"asked for {shape}, given {tuple(numbers.shape)}"
        return numbers


def scores_of(ids_keep, num_tokens):
    """Scores with which sample_token_subset keeps these patches, in this order."""
    scores = torch.ones(len(ids_keep), num_tokens)
    places = torch.linspace(0, 0.5, ids_keep.shape[1])
    return scores.scatter(1, ids_keep, places.expand(len(ids_keep), -1))


def numbers(n, x_shape, z_dim=None, num_tokens=None, seed=0):
    """Seeded numbers for a batch of n: dict(t, drop, scores, noise, cls_noise)."""
    generator = torch.Generator().manual_seed(seed)
    found = dict(t=torch.rand(n, generator=generator), drop=torch.rand(n, generator=generator))
    if num_tokens:
        found["scores"] = torch.rand(n, num_tokens, generator=generator)
    found["noise"] = torch.randn(n, *x_shape, generator=generator)
    if z_dim:
        found["cls_noise"] = torch.randn(n, z_dim, generator=generator)
    return found


def given(found):
    """Given for what `numbers` returned, with or without scores and noise of the class token."""
    rand = [found[name] for name in ("t", "drop", "scores") if name in found]
    return Given(rand, [found[name] for name in ("noise", "cls_noise") if name in found])
