"""The method: a random token subset after mixing blocks, without which a dropped token is gone."""

import pytest
import torch
from draws import given, numbers, scores_of
from test_model import tiny

from maskalign import (
    StepRng,
    gather_tokens,
    make_config,
    sample_token_subset,
    training_losses,
)


def trained_looking(sit, seed=0):
    """Gives every weight a value, as after training: at init gates and heads hide everything."""
    generator = torch.Generator().manual_seed(seed)
    for p in sit.parameters():
        p.data.copy_(torch.randn(p.shape, generator=generator) * 0.2)
    return sit.eval()


def batch(n=3):
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(n, 4, 8, 8, generator=generator),
        torch.rand(n, generator=generator),
        torch.arange(n),
        torch.randn(n, 16, generator=generator),
    )


def subset(n, num_tokens, mask_ratio, seed=0):
    """A random subset of the patches of n images."""
    scores = torch.rand(n, num_tokens, generator=torch.Generator().manual_seed(seed))
    return sample_token_subset(scores, mask_ratio)


@pytest.mark.parametrize(
    "num_tokens, ratio, kept",
    [
        (256, 0.25, 192),
        (256, 0.0, 256),
        (256, 0.75, 64),
        (36, 0.25, 27),
        (10, 0.25, 8),
        (4, 0.99, 1),
    ],
)
def test_subset_has_the_stated_size_without_repetition(num_tokens, ratio, kept):
    ids = subset(50, num_tokens, ratio)
    assert ids.shape == (50, kept)
    assert all(len(set(row)) == kept and set(row) <= set(range(num_tokens)) for row in ids.tolist())


def test_each_token_is_kept_equally_often():
    n, num_tokens = 20000, 64
    ids = subset(n, num_tokens, 0.25)
    share = torch.bincount(ids.flatten(), minlength=num_tokens) / n
    spread = (0.75 * 0.25 / n) ** 0.5
    assert (share - 0.75).abs().max() < 4.5 * spread


def test_pairs_of_tokens_are_kept_independently_of_their_distance():
    ids = subset(20000, 16, 0.25)
    kept = torch.zeros(20000, 16).scatter_(1, ids, 1.0)
    both = kept.T @ kept / 20000  # expected 12/16 * 11/15 = 0.55
    off_diagonal = both[~torch.eye(16, dtype=torch.bool)]
    assert (off_diagonal - 0.55).abs().max() < 4.5 * (0.55 * 0.45 / 20000) ** 0.5


def test_every_image_gets_a_subset_of_its_own():
    ids = subset(100, 256, 0.25)
    assert len({tuple(row) for row in ids.tolist()}) == 100


def test_the_kept_patches_are_those_of_the_lowest_scores():
    scores = torch.tensor([[0.9, 0.1, 0.5, 0.2], [0.3, 0.8, 0.7, 0.0]])
    kept = sample_token_subset(scores, 0.5)
    assert [sorted(row) for row in kept.tolist()] == [[1, 3], [0, 3]]


def test_class_token_is_never_dropped():
    tokens = torch.arange(2 * 5, dtype=torch.float).view(2, 5, 1)  # class token 0 and 5
    kept = gather_tokens(tokens, torch.tensor([[1, 3], [0, 2]]), class_token=True)
    assert kept[:, :, 0].tolist() == [[0, 2, 4], [5, 6, 8]]
    x, t, y, cls = batch()
    sit = trained_looking(tiny()).train()
    ids = subset(3, 16, 0.75)
    out = sit(x, t, y, cls, ids)
    assert (
        out.v.shape == (3, 4, 16) and out.v_cls.shape == (3, 16) and out.z_pred.shape == (3, 5, 16)
    )
    assert not torch.allclose(out.v_cls, sit(x, t, y, cls + 1, ids).v_cls)


@pytest.mark.parametrize("mixer_depth, reaches", [(0, False), (2, True)])
def test_a_dropped_token_reaches_the_others_only_through_the_mixer(mixer_depth, reaches):
    sit, (x, t, y, cls) = trained_looking(tiny(mixer_depth=mixer_depth)).train(), batch()
    ids = torch.arange(1, 16).expand(3, 15)  # drops token 0, top left
    changed = x.clone()
    changed[:, :, :2, :2] += 5.0
    one, two = (sit(image, t, y, cls, ids) for image in (x, changed))
    same = all(torch.equal(a, b) for a, b in zip(one[:3], two[:3], strict=True))
    assert same != reaches


def test_kept_tokens_keep_their_positions():
    sit, (x, t, y, cls) = trained_looking(tiny(mixer_depth=0, depth=2)), batch()
    x = torch.ones_like(x)  # only positions tell tokens apart
    a = sit(x, t, y, cls, torch.tensor([[0, 1]] * 3)).v
    b = sit(x, t, y, cls, torch.tensor([[0, 9]] * 3)).v
    assert not torch.allclose(a[:, 1], b[:, 1])


def test_mixer_blocks_see_every_token_and_the_others_only_the_kept_ones():
    sit, (x, t, y, cls), seen = tiny(), batch(), []
    for block in (*sit.mixer, *sit.blocks):
        block.register_forward_hook(lambda module, args, out: seen.append(out.shape[1]))
    sit(x, t, y, cls, subset(3, 16, 0.25))
    assert seen == [17, 17, 13, 13, 13, 13]


def test_no_mask_and_no_mixer_equals_reg():
    x, _, y, _ = batch()
    z = torch.randn(3, 17, 16)
    sit = trained_looking(tiny(mixer_depth=0)).train()
    size = dict(data="x", num_classes=10, image_size=64, z_dim=16)
    losses = []
    for changes in (dict(mask_ratio=0.0, mixer_depth=0), dict(method="reg")):
        config = make_config(**size, **changes)
        losses.append(training_losses(sit, x, y, z, config, StepRng(config, step=7)))
    assert losses[0] == losses[1] and losses[0]["align"] != 0


def test_keeping_all_patches_is_no_mask():
    """In any order: attention does not know it, and all losses are means."""
    x, _, y, _ = batch()
    z, drawn = torch.randn(3, 17, 16), numbers(3, (4, 8, 8), z_dim=16)
    sit = trained_looking(tiny(mixer_depth=1)).train()
    size = dict(data="x", num_classes=10, image_size=64, z_dim=16, mixer_depth=1)
    none = training_losses(sit, x, y, z, make_config(**size, mask_ratio=0.0), given(drawn))
    everything = torch.stack([torch.randperm(16) for _ in range(3)])
    drawn["scores"] = scores_of(everything, 16)
    # A ratio that rounds to no dropped patch still takes the way of the mask.
    all_kept = training_losses(sit, x, y, z, make_config(**size, mask_ratio=0.01), given(drawn))
    for name, value in none.items():
        torch.testing.assert_close(all_kept[name], value)
