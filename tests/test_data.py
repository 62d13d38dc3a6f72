"""Data: shapes, crops, folders as they are found in the wild, and latents that keep themselves."""

import copy
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import default_collate

import maskalign
from maskalign import (
    BadInput,
    FolderImages,
    Run,
    build_model,
    build_teacher,
    build_vae,
    center_crop,
    demo_shapes,
    encode_images,
    index_batches,
    keep_latents,
    make_config,
    set_up,
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


def test_demo_images_are_decided_by_their_index():
    few, many = demo_shapes(24, 64), demo_shapes(24, 256)
    difference = (few.tensors[0].int() - many.tensors[0][:64].int()).abs()
    assert difference.max() <= 1 and difference.float().mean() < 1e-3  # cos, sin: the last bit
    assert few.tensors[0].dtype == torch.uint8 and few.tensors[0].shape == (64, 3, 24, 24)
    assert few.tensors[1].tolist() == [i % 8 for i in range(64)] and len(few.classes) == 8
    assert len({image.numpy().tobytes() for image in many.tensors[0]}) == 256


def test_demo_classes_differ_in_shape():
    """A pixel-wise mean over many images tells the ring's hole from the disc's middle."""
    images, labels = demo_shapes(24, 2048).tensors
    middle = images.float().mean(1)[:, 10:14, 10:14].mean((1, 2))
    by_class = {name: middle[labels == k].mean().item() for k, name in enumerate(maskalign.SHAPES)}
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


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK", "P", "RGBA", "1", "LA", "I;16"])
def test_folder_reads_images_of_any_mode_and_size(mode, tmp_path):
    (tmp_path / "only").mkdir()
    image = Image.fromarray(np.full((20, 50, 3), 200, np.uint8))
    image = Image.new("I;16", (50, 20), 200 * 256) if mode == "I;16" else image.convert(mode)
    image.save(tmp_path / "only" / ("x.jpg" if mode == "CMYK" else "x.png"))
    crop, label = FolderImages(str(tmp_path), 32)[0]
    assert crop.shape == (3, 32, 32) and crop.dtype == torch.uint8 and label == 0


def test_folder_classes_are_its_sorted_subfolders_with_or_without_train(tmp_path):
    plain = FolderImages(make_folder(tmp_path / "a", ("zebra", "ant")), 16)
    make_folder(tmp_path / "b" / "train", ("zebra", "ant"))
    make_folder(tmp_path / "b" / "val", ("other",))
    split = FolderImages(str(tmp_path / "b"), 16)
    assert plain.classes == split.classes == ["ant", "zebra"]
    assert len(plain) == len(split) == 6 and plain[5][1] == 1


def ramp_file(path, dtype="<u2", mode=None, top=65535):
    """A grey ramp from 0 to `top`, in the format that the name tells."""
    ramp = np.linspace(0, top, 64).astype(dtype)[None].repeat(64, axis=0)
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(ramp)
    assert mode in (None, image.mode)
    image.save(path)


@pytest.mark.parametrize(
    "name, dtype, opened",
    [
        ("x.png", "<u2", ("I;16", "I")),  # "I" before Pillow 11
        ("x.tif", "<u2", ("I;16",)),
        ("x.tif", ">u2", ("I;16B",)),
        ("x.pgm", "<u2", ("I",)),
        ("x.png", "u1", ("L",)),
    ],
)
def test_a_grey_ramp_stays_a_ramp_with_8_and_with_16_bits(name, dtype, opened, tmp_path):
    path, top = tmp_path / "only" / name, np.iinfo(dtype).max
    ramp_file(path, dtype, top=top)
    with Image.open(path) as image:
        assert image.mode in opened
    crop, _ = FolderImages(str(tmp_path), 64)[0]
    expected = np.linspace(0, 255, 64)
    for channel in crop:
        assert np.abs(channel[30].numpy() - expected).max() <= 1
    assert crop.min() == 0 and crop.max() == 255


@pytest.mark.parametrize("mode, dtype", [("I", "<i4"), ("F", "<f4")])
def test_pixels_of_unknown_range_are_refused_with_one_sentence(mode, dtype, tmp_path):
    ramp_file(tmp_path / "only" / "x.tif", dtype, mode, top=1)
    with pytest.raises(
        BadInput, match="x.tif is no readable .*range is unknown: save it with 8 or 16"
    ):
        FolderImages(str(tmp_path), 16)


@pytest.mark.parametrize("suffix", [".gif", ".jfif", ".jp2", ".avif", ".JPEG", ".webp"])
def test_formats_of_photographs_are_read(suffix, tmp_path):
    if Image.registered_extensions().get(suffix.lower()) not in Image.SAVE:
        pytest.skip("this Pillow was built without it")
    (tmp_path / "only").mkdir()
    Image.new("RGB", (40, 30), (200, 100, 50)).save(tmp_path / "only" / f"x{suffix}")
    (crop, _) = FolderImages(str(tmp_path), 16)[0]
    assert (crop.float().mean((1, 2)) - torch.tensor([200.0, 100.0, 50.0])).abs().max() < 8


def test_files_that_are_no_images_by_their_name_are_left_out(tmp_path):
    folder = make_folder(tmp_path)
    for name in ("cat/a.txt", "dog/b.TXT", "dog/c.svg", "dog/Thumbs"):
        (tmp_path / name).write_text("no image")
    assert len(FolderImages(folder, 16)) == 6


def test_train_is_a_class_where_other_classes_lie_beside_it(tmp_path):
    vehicles = FolderImages(make_folder(tmp_path / "a", ("bus", "train", "tram")), 16)
    assert vehicles.classes == ["bus", "train", "tram"] and len(vehicles) == 9
    root = tmp_path / "b"
    make_folder(root / "train", ("ant", "bee"))
    make_folder(root / "val", ("ant", "bee"))
    make_folder(root / "test", ("all",))
    (root / ".cache").mkdir()  # hidden folders and files are no classes
    (root / "LICENSE").write_text("x")
    split = FolderImages(str(root), 16)
    assert split.classes == ["ant", "bee"] and len(split) == 6


def test_a_missing_or_empty_folder_is_one_sentence(tmp_path):
    for folder in (
        tmp_path / "missing",
        tmp_path,
        make_folder(tmp_path / "flat", ("a",), per_class=0),
    ):
        with pytest.raises(BadInput, match=f"--data {folder} must hold images as class/") as caught:
            FolderImages(str(folder), 16)
        assert "\n" not in str(caught.value)


def odd_file(name, path):
    """Something at `path` that ends like an image."""
    if name == "pipe":
        os.mkfifo(path)
    elif name == "cut":
        Image.effect_noise((64, 64), 50).save(path, "PNG")
        os.truncate(path, os.path.getsize(path) // 2)  # its header is fine
    elif name == "line":
        Image.new("L", (60_000, 1)).save(path, "PNG")  # 16 GB, once its sides are large enough
    elif name == "bomb":
        Image.new("1", (14_000, 14_000)).save(path, "PNG")  # above Pillow's 179 megapixels
    else:
        path.write_text("no image")


@pytest.mark.parametrize(
    "name, told",
    [
        ("text", "cannot identify image file"),
        ("cut", "truncated"),
        ("line", "60000 x 1 pixels"),
        ("bomb", "exceeds limit of 178956970 pixels"),
        ("pipe", "no regular file"),
    ],
)
def test_a_file_that_is_no_image_is_named_before_any_work(name, told, tmp_path):
    folder = make_folder(tmp_path)
    odd_file(name, tmp_path / "cat" / "9.jpg")
    with pytest.raises(BadInput, match=f"cat/9.jpg is no readable image: .*{told}"):
        FolderImages(folder, 16)


def test_one_in_many_is_named_when_it_is_read(tmp_path):
    folder = make_folder(tmp_path, per_class=60)
    images = FolderImages(folder, 16)  # looks at each second of 120
    Path(images.samples[7][0]).write_bytes(b"\x89PNG")
    images = FolderImages(folder, 16)
    with pytest.raises(BadInput, match=f"{images.samples[7][0]} is no readable image"):
        images[7]


def batches(config, count, step=0, rank=0, world_size=1):
    """The micro-batches of indices, as lists, that a process takes from `step` on."""
    run = Run(config, rank, world_size, dataset=range(count), step=step)
    return [batch.tolist() for batch in index_batches(run)]


def test_every_image_is_seen_once_per_epoch_in_an_order_of_the_seed():
    config = make_config(batch_size=4, steps=15, seed=3)
    stream = sum(batches(config, 10), [])
    epochs = [stream[k : k + 10] for k in range(0, 60, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 6
    assert stream != sum(batches(make_config(batch_size=4, steps=15, seed=4), 10), [])


@pytest.mark.parametrize("world_size, accum", [(1, 2), (2, 1), (2, 3), (6, 2)])
def test_processes_and_micro_batches_share_the_same_stream(world_size, accum):
    whole = batches(make_config(batch_size=12, steps=5), 7)  # fewer images than a batch
    config = make_config(batch_size=12, steps=5, accum=accum)
    ranks = [batches(config, 7, rank=rank, world_size=world_size) for rank in range(world_size)]
    for step in range(5):
        shares = [ranks[r][step * accum + a] for r in range(world_size) for a in range(accum)]
        assert sum(shares, []) == whole[step]


def test_the_stream_goes_on_where_it_stopped():
    config = make_config(batch_size=4, steps=9)
    assert batches(config, 10, step=5) == batches(config, 10)[5:]


# ---- latents that keep themselves


@pytest.fixture(scope="module")
def vae(small_vae_file):
    return build_vae(make_config(data="x", vae_weights=small_vae_file), "cpu")


@pytest.fixture
def encoded(monkeypatch):
    """The numbers of images that were encoded, call by call."""
    calls = []

    def count(vae, images):
        calls.append(len(images))
        return encode_images(vae, images)

    monkeypatch.setattr(maskalign, "encode_images", count)
    return calls


def run_on(folder, vae, size=16):
    """What a run knows of its data; the latents lie in a folder beside them."""
    config = make_config(data=str(folder), image_size=size)
    dataset = FolderImages(config.data, size)
    dataset.cache = os.path.join(os.path.dirname(folder), "latents")
    return Run(config, dataset=dataset, vae=vae)


def load(run, ids):
    """(images, files of their latents), as a loader hands them over."""
    images, _, files = default_collate([run.dataset[i] for i in ids])
    return images, files


def test_latents_are_written_when_first_seen_and_read_from_then_on(tmp_path, vae, encoded):
    folder = make_folder(tmp_path / "data")
    run = run_on(folder, vae)
    images, files = load(run, [4, 0, 2])
    first = keep_latents(run, images, files)
    assert first.dtype == torch.float32 and first.shape == (3, 8, 2, 2) and encoded == [3]
    assert torch.equal(first, encode_images(vae, images).half().float())

    run = run_on(folder, vae)
    again = keep_latents(run, *load(run, [2, 0, 4]))
    assert torch.equal(again, first.flip(0)) and encoded == [3]
    for file, row in zip(files, first, strict=True):
        kept = np.load(file)
        assert kept.dtype == np.float16 and np.array_equal(kept, row.numpy())
    assert len(list((tmp_path / "latents").rglob("*.npy"))) == 3


def test_a_file_whose_writing_was_killed_is_written_again_and_no_other(tmp_path, vae, encoded):
    """In a batch of the same images: so its numbers are the same, too."""
    run = run_on(make_folder(tmp_path / "data"), vae)
    images, files = load(run, range(6))
    whole = keep_latents(run, images, files)
    before = [(Path(file).read_bytes(), os.stat(file).st_mtime_ns) for file in files]
    length = len(before[3][0])
    for written in (0, 1, 7, 60, length - 64, length - 1):  # bytes that reached the disk
        os.truncate(files[3], written)
        assert torch.equal(keep_latents(run, images, files), whole)
        after = [(Path(file).read_bytes(), os.stat(file).st_mtime_ns) for file in files]
        assert after[3][0] == before[3][0] and after[:3] + after[4:] == before[:3] + before[4:]
    for odd in (b"no numbers", b"PK\x03\x04 no zip", before[0][0][:128]):
        Path(files[3]).write_bytes(odd)
        assert torch.equal(keep_latents(run, images, files), whole)
    np.save(files[3], np.ones((8, 3, 2), np.float16))  # of another shape
    assert torch.equal(keep_latents(run, images, files), whole)
    os.remove(files[3])
    assert torch.equal(keep_latents(run, images, files), whole)
    assert encoded == [6] * 12


def test_what_another_process_wrote_is_what_is_used(tmp_path, vae):
    run = run_on(make_folder(tmp_path / "data"), vae)
    images, files = load(run, [1, 2])
    theirs = torch.full((8, 2, 2), 0.5)
    os.makedirs(os.path.dirname(files[1]))
    np.save(files[1], theirs.half().numpy())
    kept = keep_latents(run, images, files)
    assert torch.equal(kept[1], theirs) and not torch.equal(kept[0], theirs)
    assert np.array_equal(np.load(files[1]), theirs) and np.array_equal(np.load(files[0]), kept[0])


def test_an_image_that_comes_twice_in_a_batch_has_one_file(tmp_path, vae):
    run = run_on(make_folder(tmp_path / "data"), vae)
    images, files = load(run, [5, 5])
    kept = keep_latents(run, images, files)
    assert files[0] == files[1] and torch.equal(kept[0], kept[1])


def test_another_image_or_crop_has_another_file(tmp_path, vae):
    folder = tmp_path / "data"
    make_folder(folder)

    def name(size=16, index=0):
        return run_on(folder, vae, size).dataset[index][2]

    first = name()
    assert name() == first and name(size=32) != first
    assert len({name(index=i) for i in range(6)}) == 6

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
    assert name(index=2) != first


def test_another_vae_has_another_folder(tmp_path, small_vae_file):
    folder = make_folder(tmp_path / "data")
    state = torch.load(small_vae_file, weights_only=True)
    state["quant_conv.bias"] += 1e-3
    torch.save(state, tmp_path / "other.pth")
    folders = []
    for path in (small_vae_file, str(tmp_path / "other.pth"), small_vae_file):
        small = dict(
            image_size=16, depth=1, align_depth=1, hidden_size=32, num_heads=2, method="sit"
        )
        config = make_config(data=folder, vae_weights=path, **small)
        folders.append(set_up(config, build_model, build_teacher).dataset.cache)
    assert folders[0] == folders[2] != folders[1]
    assert {os.path.dirname(path) for path in folders} == {str(tmp_path / "data-latents")}


def test_a_folder_that_moved_finds_its_latents(tmp_path, vae, encoded):
    run = run_on(make_folder(tmp_path / "here"), vae)
    first = keep_latents(run, *load(run, range(6)))
    shutil.move(tmp_path / "here", tmp_path / "there")
    run = run_on(tmp_path / "there", vae)
    assert torch.equal(keep_latents(run, *load(run, range(6))), first) and encoded == [6]


def test_latents_that_are_not_finite_are_not_kept(tmp_path, vae):
    run = run_on(make_folder(tmp_path / "data"), vae)
    run.vae = copy.copy(vae)
    run.vae.tensors = dict(vae.tensors)
    run.vae.tensors["quant_conv.bias"] = vae.tensors["quant_conv.bias"] + 1e6  # no float16 holds it
    with pytest.raises(BadInput, match="gives latents that are not finite: name another"):
        keep_latents(run, *load(run, [0, 1]))
    assert not list((tmp_path / "latents").rglob("*.npy"))
