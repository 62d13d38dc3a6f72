"""pictures.py: what README's pictures show is what the program does."""

import numpy as np
import pictures
import torch

import maskalign as ma


def test_a_picture_of_patches_shows_the_kept_ones_where_they_belong():
    x = torch.rand(2, 3, 96, 96) * 2 - 1
    patches = ma.patchify(x, pictures.PATCH)
    ids_keep = ma.sample_token_subset(torch.rand(2, 64), 0.25)  # (2, 48)
    spread = pictures.spread_patches(patches, ids_keep)
    step = pictures.PATCH + pictures.GAP
    assert spread.shape == (2, 3, 8 * step - pictures.GAP, 8 * step - pictures.GAP)
    grey = torch.tensor(pictures.GREY).view(3, 1, 1) / 127.5 - 1
    for image in range(2):
        for token in range(64):
            row, column = divmod(token, 8)
            top, left = row * step, column * step
            shown = spread[image, :, top : top + pictures.PATCH, left : left + pictures.PATCH]
            top, left = row * pictures.PATCH, column * pictures.PATCH
            true = x[image, :, top : top + pictures.PATCH, left : left + pictures.PATCH]
            kept = token in ids_keep[image].tolist()
            assert torch.equal(shown, true if kept else grey.expand_as(true)), token
    between = spread[:, :, :, pictures.PATCH : step]
    assert (between == 1).all()  # white


def test_the_picture_of_the_mask_goes_from_the_clean_image_to_three_quarters_of_x_t():
    clean, noisy, all_patches, kept = pictures.mask_columns(0.4).values()
    assert clean.shape == noisy.shape == (2, 3, 96, 96)
    residual = (noisy - 0.6 * clean) / 0.4  # normal noise
    assert residual.mean().abs() < 0.05 and abs(residual.std() - 1) < 0.05
    grey = (torch.tensor(pictures.GREY) / 127.5 - 1).view(1, 3, 1, 1)
    share = torch.isclose(kept, grey).all(dim=1).sum() / (2 * 96 * 96)
    assert abs(share - 0.25) < 1e-6
    same = (kept == all_patches).all(dim=1)
    assert same.float().mean() > 0.7


def test_the_towers_drop_a_quarter_of_the_patches_and_never_the_class_token():
    picture = np.array(pictures.draw_towers())
    assert picture.shape == (580, 860, 3)

    def tokens(y, left, color):
        """Which of the 17 tokens of the row at y have this color."""
        x = (left + pictures.STEP * np.arange(17) + pictures.SQUARE // 2) // 2
        return (picture[y, x] == color).all(axis=-1)

    for y, left, color in ((173, 40, pictures.BLUE), (297, 40, pictures.BLUE)):
        colored = tokens(y, left, color)
        assert colored[0] and colored.sum() == 13 and tokens(y, left, pictures.GREY).sum() == 4
    assert np.array_equal(tokens(297, 40, pictures.BLUE), tokens(297, 1030, pictures.ORANGE))
    assert tokens(129, 40, pictures.BLUE).all()  # before the mask
