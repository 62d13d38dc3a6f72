"""Troubles that people reported elsewhere, where they belong to no single program or to files of
others: what is silent and wrong there is an error or a line here."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from test_data import make_folder

import fid
import maskalign
import sample
from maskalign import FolderImages, build_vae, load_teacher, make_config, parse_config

VIT = "test_vit.r160_in1k"  # published as a classifier of 1000 classes


def teacher_of(state, path):
    torch.save(state, path)
    config = make_config(data="x", teacher=VIT, teacher_weights=str(path), image_size=64)
    return load_teacher(config, None, "cpu")


def test_a_classifier_can_teach_and_none_of_its_weights_may_be_missing(tmp_path):
    """timm checks that only for a network with as many classes as the file."""
    torch.manual_seed(0)
    whole = maskalign.timm.create_model(VIT).state_dict()
    teacher = teacher_of(whole, tmp_path / "whole.pth")
    found = teacher.vit.state_dict()
    assert all(torch.equal(found[name], whole[name]) for name in whole if name != "pos_embed")
    with torch.no_grad():
        z = teacher(torch.zeros(2, 3, 64, 64, dtype=torch.uint8))
    assert z.shape == (2, 1 + 4**2, teacher.dim)
    part = {name: value for name, value in whole.items() if "blocks.3." not in name}
    with pytest.raises(RuntimeError, match="blocks.3"):
        teacher_of(part, tmp_path / "part.pth")


def test_one_class_teaches_nothing_to_a_classifier():
    """Its loss is 0 from the start: the teacher would stay random."""
    with pytest.raises(AssertionError, match="2 classes"):
        load_teacher(make_config(num_classes=1), maskalign.demo_shapes(24), "cpu")


def test_pictures_in_the_home_folder_are_found_where_the_shell_leaves_the_tilde(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("HOME", str(tmp_path))
    for part in ("train", "val"):
        make_folder(tmp_path / "pictures" / part, ("cat", "dog"))
    flags = ["--image_size=16", "--vae=none"]
    data = [parse_config([f"--data={x}/pictures", *flags]) for x in ("~", tmp_path)]
    assert data[0] == data[1] and FolderImages(data[0]).classes == ["cat", "dog"]
    assert data[0].cache == f"{tmp_path}/pictures-latents"


def test_the_scale_of_another_vae_of_4_channels_is_a_setting(small_vae_file):
    """SDXL's is 0.13025. What is kept of an image does not depend on it."""
    latents = [0.18215, 0.13025]
    configs = [make_config(data="x", vae=small_vae_file, vae_scale=scale) for scale in latents]
    assert [build_vae(config, "cpu").scale for config in configs] == latents
    assert len({maskalign.latent_file(config, "x/a.png") for config in configs}) == 1
    assert sample.load_vae(small_vae_file, 0.5, "cpu").scale == 0.5


def test_no_program_shows_a_bar_where_no_terminal_is(tmp_path, monkeypatch, capfd):
    """As with nohup or Slurm. maskalign.py is in test_safety.py."""
    monkeypatch.chdir(tmp_path)
    config = make_config(hidden_size=32, num_heads=2, depth=1, align_depth=1, z_dim=64)
    model = maskalign.SiT(config)
    sampler = lambda model, x, *args, **more: x  # noqa: E731
    args = sample.parse_args(["x", "--num_images=4", "--batch_size=2"], sample.SAMPLERS)
    job = sample.Job(args, config, model, None, sampler, torch.device("cpu"))
    sample.write_many(job, "{}", Path("x.npz"), 0, 1)

    class Zeros(torch.nn.Module):
        widths = (2, 2)

        def forward(self, images):
            return torch.zeros(len(images), 2), torch.zeros(len(images), 2)

    with np.load("x.npz") as file:
        assert len(file["arr_0"]) == 4
    fid.measure(fid.open_npz("x.npz"), Zeros(), torch.device("cpu"), batch_size=2)
    assert "%" not in capfd.readouterr().err and os.listdir() == ["x.npz"]
