"""Data: shapes, crops, folders as they are found in the wild, and latents that keep themselves."""

import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import default_collate

import maskalign
from maskalign import (
    FolderImages,
    StepRng,
    build_vae,
    center_crop,
    demo_shapes,
    index_batches,
    make_config,
    prepare_batch,
)


def make_folder(root, classes=("cat", "dog"), per_class=3, size=(40, 30)):
    """class/i.png with random pixels."""
    rng = np.random.default_rng(0)
    for name in classes:
        os.makedirs(root / name, exist_ok=True)
        for i in range(per_class):
            pixels = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    return str(root)


def images_of(folder, size=16, **settings):
    """A folder without a VAE, as FolderImages reads it."""
    return FolderImages(make_config(data=str(folder), image_size=size, vae="none", **settings))


def labels_of(images):
    return [label for _, label in images.samples]


def test_demo_images_are_the_same_at_every_start_and_all_differ():
    once, again = demo_shapes(24), maskalign.demo_shapes(24)
    images, labels = once.datasets["image"], once.datasets["label"]
    assert torch.equal(images, again.datasets["image"])
    assert images.dtype == torch.uint8 and images.shape == (8192, 3, 24, 24)
    assert labels.tolist() == [i % 8 for i in range(8192)] and len(once.classes) == 8
    assert len({image.numpy().tobytes() for image in images}) == 8192
    assert torch.equal(once[5]["image"], images[5]) and once[5]["label"] == 5


def test_demo_classes_differ_in_shape():
    """A pixel-wise mean over many images tells the ring's hole from the disc's middle."""
    data = demo_shapes(24, 2048)
    middle = data.datasets["image"].float().mean(1)[:, 10:14, 10:14].mean((1, 2))
    labels = data.datasets["label"]
    by_class = {name: middle[labels == k].mean().item() for k, name in enumerate(data.classes)}
    assert by_class["ring"] < 80 < 150 < by_class["disc"]


@pytest.mark.parametrize(
    "width, height", [(256, 256), (500, 375), (1200, 900), (100, 60), (60, 100), (257, 700)]
)
def test_center_crop_gives_the_middle_at_any_size(width, height):
    ramp = np.linspace(0, 255, width)[None, :, None] * np.ones((height, 1, 3))
    crop = center_crop(Image.fromarray(ramp.astype(np.uint8)), 64)
    assert crop.size == (64, 64)
    row = np.array(crop)[32, :, 0].astype(float)
    assert row[31:33].mean() == pytest.approx(127, abs=4)  # centred
    covered = min(1.0, height / width) * 255
    assert row[-1] - row[0] == pytest.approx(covered * 63 / 64, abs=6)  # the whole short side


def test_center_crop_halves_by_box_before_bicubic():
    """ADM's recipe, step by step, on 4 x 4 blocks: 256 -> 128 by box, then 128 -> 64."""
    pixels = np.random.default_rng(0).integers(0, 256, (256, 256), dtype=np.uint8)
    halved = pixels.reshape(128, 2, 128, 2).mean((1, 3)).reshape(64, 2, 64, 2).mean((1, 3))
    crop = np.array(center_crop(Image.fromarray(pixels), 64)).astype(float)
    assert np.abs(crop - halved).max() <= 2  # each halving rounds to whole numbers


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK", "P", "RGBA", "1", "LA"])
def test_folder_reads_images_of_any_mode_and_size(mode, tmp_path):
    (tmp_path / "only").mkdir()
    image = Image.fromarray(np.full((20, 50, 3), 200, np.uint8)).convert(mode)
    image.save(tmp_path / "only" / ("x.jpg" if mode == "CMYK" else "x.png"))
    item = images_of(tmp_path, 32)[0]
    crop = item["image"]
    assert crop.shape == (3, 32, 32) and crop.dtype == torch.uint8 and item["label"] == 0


def test_folder_classes_are_its_sorted_subfolders_with_or_without_train(tmp_path):
    plain = images_of(make_folder(tmp_path / "a", ("zebra", "ant")))
    make_folder(tmp_path / "b" / "train", ("zebra", "ant"))
    make_folder(tmp_path / "b" / "val", ("other",))
    split = images_of(tmp_path / "b")
    assert plain.classes == split.classes == ["ant", "zebra"]
    assert len(plain) == len(split) == 6 and plain[5]["label"] == 1


@pytest.mark.parametrize(
    "suffix", [".JPEG", ".JPG", ".jpg", ".png", ".webp", ".bmp", ".tif", ".ppm"]
)
def test_formats_of_photographs_are_read(suffix, tmp_path):
    (tmp_path / "only").mkdir()
    Image.new("RGB", (40, 30), (200, 100, 50)).save(tmp_path / "only" / f"x{suffix}")
    crop = images_of(tmp_path)[0]["image"]
    assert (crop.float().mean((1, 2)) - torch.tensor([200.0, 100.0, 50.0])).abs().max() < 8


@pytest.mark.parametrize(
    "kind, suffix", [("uint16", "png"), ("uint16", "tif"), ("int32", "tif"), ("float32", "tif")]
)
def test_an_image_that_8_bits_would_clip_is_refused_and_never_white_or_black(
    kind, suffix, tmp_path
):
    ramp = np.linspace(0, 1 if kind == "float32" else 65535, 1200).reshape(30, 40)
    (tmp_path / "only").mkdir()
    Image.fromarray(ramp.astype(kind)).save(tmp_path / "only" / f"x.{suffix}")
    with pytest.raises(OSError, match=f"only/x.{suffix}: "):
        images_of(tmp_path)[0]


def test_an_image_is_read_as_its_pixels_are_stored_as_adm_does(tmp_path):
    """Neither turned by its EXIF, nor laid over black where it is transparent. Of several frames
    the first counts."""
    folder = tmp_path / "only"
    folder.mkdir()
    left_red = Image.new("RGB", (40, 40))
    left_red.paste((255, 0, 0), (0, 0, 20, 40))
    turned = Image.Exif()
    turned[0x0112] = 6
    left_red.save(folder / "0.jpg", exif=turned, quality=95)
    left_red.save(
        folder / "1.jpg", "MPO", save_all=True, append_images=[Image.new("RGB", (40, 40))]
    )
    clear = left_red.convert("RGBA")
    clear.putalpha(0)
    clear.save(folder / "2.png")
    films = dict(save_all=True, append_images=[Image.new("RGB", (40, 40))], lossless=True)
    left_red.save(folder / "3.webp", **films)
    images = images_of(folder.parent)
    for i in range(4):
        red = images[i]["image"][0].float()
        assert red[:, :6].mean() > 245 and red[:, -6:].mean() < 10, i


def test_no_image_file_can_start_a_program(tmp_path):
    """Pillow shows an EPS by Ghostscript, whatever the name of the file."""
    folder = Path(make_folder(tmp_path, ("a",), per_class=1))
    Image.new("RGB", (40, 30)).save(folder / "a" / "x.eps")
    os.rename(folder / "a" / "x.eps", folder / "a" / "1.jpg")
    with pytest.raises(OSError, match="a/1.jpg"):
        images_of(folder)[1]


def test_files_that_are_no_images_by_their_name_are_left_out(tmp_path):
    folder = make_folder(tmp_path)
    for name in ("cat/a.txt", "dog/b.TXT", "dog/c.svg", "dog/Thumbs"):
        (tmp_path / name).write_text("no image")
    assert len(images_of(folder)) == 6


def test_train_is_a_class_where_other_classes_lie_beside_it(tmp_path):
    vehicles = images_of(make_folder(tmp_path / "a", ("bus", "train", "tram")))
    assert vehicles.classes == ["bus", "train", "tram"] and len(vehicles) == 9
    root = tmp_path / "b"
    make_folder(root / "train", ("ant", "bee"))
    make_folder(root / "val", ("ant", "bee"))
    make_folder(root / "test", ("all",))
    (root / "LICENSE").write_text("x")
    split = images_of(root)
    assert split.classes == ["ant", "bee"] and len(split) == 6


def test_what_is_hidden_is_no_data(tmp_path):
    """Also not a folder in the class called train, which makes train no folder of classes."""
    folder = Path(make_folder(tmp_path, ("plane", "train", "truck")))
    for hidden in (".cache/x.png", "train/.ipynb_checkpoints/x.png", "plane/._0.png"):
        (folder / hidden).parent.mkdir(exist_ok=True)
        shutil.copy(folder / "plane" / "0.png", folder / hidden)
    data = images_of(folder)
    assert (
        data.classes == ["plane", "train", "truck"]
        and labels_of(data) == [0] * 3 + [1] * 3 + [2] * 3
    )


def test_a_link_to_the_folder_above_adds_no_image_and_a_linked_class_counts(tmp_path):
    folder = Path(make_folder(tmp_path / "data", ("a",)))
    os.symlink(folder / "a", folder / "b")  # as where the classes lie on several disks
    os.symlink(folder, folder / "a" / "loop")  # followed, this would never end
    data = images_of(folder)
    assert data.classes == ["a", "b"] and labels_of(data) == [0] * 3 + [1] * 3


@pytest.mark.parametrize("given", ["a/images", "a", "b"])
def test_a_folder_whose_labels_stand_in_a_file_is_refused(given, tmp_path):
    """As EDM's and REPA's dataset tools write it: its folders are no classes."""
    for place in ("a/images", "b/train"):
        make_folder(tmp_path / place, ("00000", "00001"))
        (tmp_path / place / "dataset.json").write_text('{"labels": []}')
    with pytest.raises(AssertionError, match="dataset.json"):
        images_of(tmp_path / given)


def test_a_folder_inside_a_class_that_cannot_be_read_is_told(tmp_path, monkeypatch, capsys):
    folder = Path(make_folder(tmp_path, ("a", "a/shut", "b")))
    scandir = os.scandir

    def refuse(place):  # as for a user who may not read it; root may
        if str(place).endswith("shut"):
            raise PermissionError(13, "Permission denied", str(place))
        return scandir(place)

    monkeypatch.setattr(os, "scandir", refuse)
    assert len(images_of(folder)) == 6
    assert f"Permission denied: '{folder}/a/shut'" in capsys.readouterr().out


def test_names_may_have_any_character_and_links_to_files_count(tmp_path):
    names = ["[x]", "*", "a, b", "caf\udce9", "new\nline", "\u732b"]  # the fourth is no UTF-8
    folder = Path(make_folder(tmp_path / "data", names, per_class=1))
    shutil.copy(folder / "*/0.png", folder / "*/\udcff.png")
    os.symlink("0.png", folder / "*/link.png")
    data = images_of(folder)
    assert data.classes == sorted(names) and labels_of(data) == [0, 0, 0, 1, 2, 3, 4, 5]
    assert all(data[i]["image"].shape == (3, 16, 16) for i in range(8))
    config = make_config(data=str(folder), vae="x")
    assert len({maskalign.latent_file(config, path) for path, _ in data.samples}) == 8
    os.symlink("gone.png", folder / "[x]/9.png")
    with pytest.raises(OSError, match="x]/9.png: .*No such file"):
        images_of(folder)[4]


def test_what_a_worker_gets_can_be_pickled(tmp_path):
    """So that workers may be started by spawn or forkserver, too."""
    for data in (images_of(make_folder(tmp_path)), demo_shapes(24)):
        again = pickle.loads(pickle.dumps(data))
        assert torch.equal(again[3]["image"], data[3]["image"]) and again.classes == data.classes


def test_one_image_is_a_data_set_with_batches_larger_than_it(tmp_path):
    data = images_of(make_folder(tmp_path, ("only",), per_class=1))
    assert len(data) == 1 and data.classes == ["only"] and data[0]["label"] == 0
    assert batches(make_config(batch_size=3, steps=2), len(data)) == [[0, 0, 0]] * 2


def test_a_missing_flat_or_empty_folder_is_told_by_its_name(tmp_path):
    flat = Path(make_folder(tmp_path / "flat", (".",)))
    for folder in (
        tmp_path / "missing",
        flat,
        Path(make_folder(tmp_path / "empty", ("cat", "dog"), per_class=0)),
    ):
        with pytest.raises(AssertionError, match=str(folder)) as caught:
            images_of(folder)
    assert "'cat', 'dog'" in str(caught.value)


def odd_file(name, path):
    """Something at `path` that ends like an image."""
    if name == "cut":
        Image.effect_noise((64, 64), 50).save(path, "PNG")
        os.truncate(path, os.path.getsize(path) // 2)  # its header is fine
    elif name == "bomb":
        Image.new("1", (14_000, 14_000)).save(path, "PNG")  # above Pillow's 179 megapixels
    else:
        path.write_text("no image")


@pytest.mark.parametrize(
    "name, told",
    [
        ("text", "cannot identify image file"),
        ("cut", "truncated"),
        ("bomb", "exceeds limit of 178956970 pixels"),
    ],
)
def test_a_file_that_is_no_image_is_named_when_it_is_read(name, told, tmp_path):
    folder = make_folder(tmp_path)
    odd_file(name, tmp_path / "cat" / "9.jpg")
    images = images_of(folder)
    with pytest.raises(OSError, match=f"cat/9.jpg.*{told}"):
        images[3]


def batches(config, count, step=0, rank=0, world_size=1):
    """The indices that a process takes in each step, from `step` on."""
    return list(index_batches(config, count, step, rank, world_size))


def test_every_image_is_seen_once_per_epoch_in_an_order_of_the_seed():
    config = make_config(batch_size=4, steps=15, seed=3)
    stream = sum(batches(config, 10), [])
    epochs = [stream[k : k + 10] for k in range(0, 60, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 6
    assert stream != sum(batches(make_config(batch_size=4, steps=15, seed=4), 10), [])


@pytest.mark.parametrize("world_size", [2, 3, 12])
def test_processes_share_the_same_stream(world_size):
    config = make_config(batch_size=12, steps=5)
    whole = batches(config, 7)  # fewer images than a batch
    ranks = [batches(config, 7, rank=rank, world_size=world_size) for rank in range(world_size)]
    for step in range(5):
        assert sum([ranks[r][step] for r in range(world_size)], []) == whole[step]


def test_the_stream_continues_where_it_stopped():
    config = make_config(batch_size=4, steps=9)
    assert batches(config, 10, step=5) == batches(config, 10)[5:]


# ---- latents that are kept


@pytest.fixture(scope="module")
def vae(small_vae_file):
    return build_vae(make_config(data="x", vae=small_vae_file), "cpu")


@pytest.fixture
def encoded(vae, monkeypatch):
    """The numbers of images that were encoded, call by call."""
    calls, encode = [], vae.encode

    def count(images):
        calls.append(len(images))
        return encode(images)

    monkeypatch.setattr(vae, "encode", count)
    return calls


@pytest.fixture
def kept(tmp_path, small_vae_file):
    """folder(size): images whose latents are kept in tmp_path / "latents"."""
    folder = make_folder(tmp_path / "data")

    def images(size=16, data=folder, vae=small_vae_file):
        config = make_config(data=data, image_size=size, vae=vae, cache=str(tmp_path / "latents"))
        return FolderImages(config)

    return images


def latents(images, ids, vae, seed=0):
    """x (N, 4, h, w) of these images, as the loop gets it; with the same noise each time."""
    batch = default_collate([images[i] for i in ids])
    x, y, z = prepare_batch(batch, StepRng(make_config(seed=seed), step=0), vae, None)
    assert z is None and y.tolist() == [images.samples[i][1] for i in ids]
    return x


def test_latents_are_kept_when_first_seen_and_read_from_then_on(tmp_path, kept, vae, encoded):
    first = latents(kept(), [4, 0, 2], vae)
    assert first.dtype == torch.float32 and first.shape == (3, 4, 2, 2) and encoded == [3]
    assert len(list((tmp_path / "latents").rglob("*.pt"))) == 3
    again = latents(kept(), [4, 0, 2], vae)
    assert torch.equal(again, first) and encoded == [3]
    item = kept()[4]
    file = torch.load(item["latent_file"])
    assert file.dtype == torch.float16 and file.shape == (8, 2, 2)
    assert torch.equal(item["mean_std"], file)
    assert os.path.getsize(item["latent_file"]) < 3000  # not the storage of the whole batch


def test_a_latent_is_mean_plus_std_times_noise_scaled(kept, vae):
    images = kept()
    x = latents(images, [0, 1], vae)
    pixels = torch.stack([images[i]["image"] for i in (0, 1)]) / 127.5 - 1
    mean, std = vae.encode(pixels).half().float().chunk(2, dim=1)
    noise = StepRng(make_config(seed=0), step=0).randn(2, 4, 2, 2)
    torch.testing.assert_close(x, 0.18215 * (mean + std * noise))


def test_only_what_is_missing_is_written_but_the_whole_batch_is_encoded(kept, vae, encoded):
    """In a batch of the same images, so that its numbers are the same, too."""
    whole = latents(kept(), range(6), vae)
    files = [Path(kept()[i]["latent_file"]) for i in range(6)]
    before = [file.stat().st_mtime_ns for file in files]
    files[3].unlink()
    assert torch.equal(latents(kept(), range(6), vae), whole) and encoded == [6, 6]
    after = [file.stat().st_mtime_ns for file in files]
    assert after[:3] + after[4:] == before[:3] + before[4:] and after[3] != before[3]


def test_a_kill_while_a_latent_is_written_leaves_no_half_file(tmp_path, kept, vae, monkeypatch):
    real = torch.save

    def killed(value, path):
        real(value, path)
        os.truncate(path, 100)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            latents(kept(), [0, 1], vae)
    assert not list((tmp_path / "latents").rglob("*.pt"))
    assert latents(kept(), [0, 1], vae).isfinite().all()


def test_what_another_process_wrote_is_what_is_used(kept, vae):
    images = kept()
    theirs = torch.full((8, 2, 2), 0.5).half()
    maskalign.save_file(theirs, images[2]["latent_file"])
    x = latents(images, [1, 2], vae)
    noise = StepRng(make_config(seed=0), step=0).randn(2, 4, 2, 2)
    torch.testing.assert_close(x[1], 0.18215 * (0.5 + 0.5 * noise[1]))


def test_an_image_that_comes_twice_in_a_batch_has_one_file(tmp_path, kept, vae):
    latents(kept(), [5, 5], vae)
    assert len(list((tmp_path / "latents").rglob("*.pt"))) == 1


def test_another_image_crop_or_vae_has_another_file(tmp_path, kept, small_vae_file):
    folder = tmp_path / "data"

    def name(index=0, **changes):
        return kept(**changes)[index]["latent_file"]

    first = name()
    assert name() == first and name(size=32) != first
    assert len({name(i) for i in range(6)}) == 6

    other = shutil.copy(small_vae_file, tmp_path / "other.pth")
    assert name(vae=str(other)) != first
    used = name(vae=str(other))
    os.utime(other, ns=(0, 0))  # replaced under the same name
    assert name(vae=str(other)) != used

    image, before = folder / "cat" / "0.png", os.stat(folder / "cat" / "0.png")
    os.utime(image, ns=(before.st_atime_ns, before.st_mtime_ns + 1000))
    assert name() != first  # replaced under the same name, later
    os.utime(image, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert name() == first
    with open(image, "ab") as file:
        file.write(b"\0")
    os.utime(image, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert name() != first  # another length
    os.rename(image, folder / "cat" / "9.png")
    assert name(2) != first


def test_an_image_with_a_long_name_can_be_kept(tmp_path, kept, vae):
    image = tmp_path / "data" / "cat" / "0.png"
    os.rename(image, image.with_name("x" * 226 + ".png"))
    images = kept()
    assert latents(images, range(6), vae).isfinite().all()
    assert torch.equal(latents(kept(), range(6), vae), latents(images, range(6), vae))


def test_a_folder_that_moved_finds_its_latents(tmp_path, kept, vae, encoded):
    first = latents(kept(), range(6), vae)
    shutil.move(tmp_path / "data", tmp_path / "there")
    moved = kept(data=str(tmp_path / "there"))
    assert torch.equal(latents(moved, range(6), vae), first) and encoded == [6]
