"""Data: shapes, crops, folders as they are found in the wild, and latents encoded beforehand."""

import os

import numpy as np
import pytest
import torch
from PIL import Image

import maskalign
from maskalign import (
    BadInput,
    FolderImages,
    build_vae,
    cache_file,
    center_crop,
    demo_shapes,
    encode_images,
    index_batches,
    make_config,
    prepare,
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
    images = FolderImages(str(tmp_path), 16)
    with pytest.raises(BadInput, match=f"x.tif has pixels of mode {mode}, .*: save it with 8 or"):
        images[0]


@pytest.mark.parametrize("suffix", [".gif", ".jfif", ".jp2", ".avif", ".JPEG", ".webp"])
def test_formats_of_photographs_are_read(suffix, tmp_path):
    if Image.registered_extensions().get(suffix.lower()) not in Image.SAVE:
        pytest.skip("this Pillow was built without it")
    (tmp_path / "only").mkdir()
    Image.new("RGB", (40, 30), (200, 100, 50)).save(tmp_path / "only" / f"x{suffix}")
    (crop, _) = FolderImages(str(tmp_path), 16)[0]
    assert (crop.float().mean((1, 2)) - torch.tensor([200.0, 100.0, 50.0])).abs().max() < 8


def test_files_that_are_skipped_are_told_in_one_line(tmp_path, capsys):
    folder = make_folder(tmp_path)
    for name in ("cat/a.txt", "dog/b.TXT", "dog/c.svg", "dog/Thumbs"):
        (tmp_path / name).write_text("no image")
    images = FolderImages(folder, 16)
    maskalign.tell_skipped(folder, images.skipped)
    shown = capsys.readouterr().out
    assert len(images) == 6 and "no image by its name: 2 .txt, 1 no suffix, 1 .svg\n" in shown
    maskalign.tell_skipped(folder, FolderImages(make_folder(tmp_path / "all"), 16).skipped)
    assert capsys.readouterr().out == ""


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


def test_a_file_that_is_no_image_is_named_before_any_work(tmp_path):
    folder = make_folder(tmp_path)
    (tmp_path / "cat" / "notes.jpg").write_text("no image")
    with pytest.raises(
        BadInput, match="must hold images as class/.* cannot identify image file .*cat/notes.jpg"
    ):
        FolderImages(folder, 16)


def test_a_truncated_image_is_named_when_it_is_read(tmp_path):
    folder = make_folder(tmp_path)
    whole = (tmp_path / "dog" / "1.png").read_bytes()
    (tmp_path / "dog" / "1.png").write_bytes(whole[: len(whole) // 2])
    images = FolderImages(folder, 16)  # its header is fine
    with pytest.raises(BadInput, match="dog/1.png is no readable image"):
        images[4]


def test_every_image_is_seen_once_per_epoch_in_an_order_of_the_seed():
    config = make_config(batch_size=4, steps=15, seed=3)
    stream = [i for batch in index_batches(10, config, 0, 0, 1) for i in batch]
    epochs = [stream[k : k + 10] for k in range(0, 60, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 6
    assert stream != [
        i
        for batch in index_batches(10, make_config(batch_size=4, steps=15, seed=4), 0, 0, 1)
        for i in batch
    ]


@pytest.mark.parametrize("world_size, accum", [(1, 2), (2, 1), (2, 3), (6, 2)])
def test_processes_and_micro_batches_share_the_same_stream(world_size, accum):
    one = make_config(batch_size=12, steps=5)
    whole = [list(batch) for batch in index_batches(7, one, 0, 0, 1)]  # fewer images than a batch
    config = make_config(batch_size=12, steps=5, accum=accum)
    ranks = [list(index_batches(7, config, 0, rank, world_size)) for rank in range(world_size)]
    for step in range(5):
        parts = [ranks[r][step * accum + a] for r in range(world_size) for a in range(accum)]
        assert [i for part in parts for i in part] == whole[step]


def test_the_stream_goes_on_where_it_stopped():
    config = make_config(batch_size=4, steps=9)
    whole = [list(b) for b in index_batches(10, config, 0, 0, 1)]
    assert [list(b) for b in index_batches(10, config, 5, 0, 1)] == whole[5:]


def prepared(folder, vae_file, **typed):
    config = make_config(
        data=folder, image_size=16, vae_weights=vae_file, prepare=True, workers=0, **typed
    )
    data, vae = FolderImages(folder, 16), build_vae(config, "cpu")
    return config, data, vae, cache_file(config, data, vae)


def test_prepared_latents_are_those_encoded_on_the_fly(tmp_path, vae_file):
    config, data, vae, path = prepared(make_folder(tmp_path / "data"), vae_file)
    prepare(config, data, vae, "cpu", 0, 1)
    data.cache = path
    assert path.parent == tmp_path / "data-latents" and len(data) == 6
    for image, _, moments in (data[i] for i in range(6)):
        direct = encode_images(vae, image[None])[0]
        torch.testing.assert_close(moments.float(), direct, rtol=2e-3, atol=1e-4)  # float16
        assert moments.dtype == torch.float16 and moments.shape == (8, 2, 2)


def test_killed_preparation_goes_on_without_doing_rows_again(tmp_path, vae_file, monkeypatch):
    config, data, vae, path = prepared(make_folder(tmp_path / "data", per_class=40), vae_file)
    calls, encode = [], maskalign.encode_images

    def count(vae, images):
        calls.append(len(images))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return encode(vae, images)

    monkeypatch.setattr(maskalign, "encode_images", count)
    with pytest.raises(KeyboardInterrupt):
        prepare(config, data, vae, "cpu", 0, 1)
    assert not path.exists()  # half a cache is not taken for a whole one
    prepare(config, data, vae, "cpu", 0, 1)
    assert calls == [32, 32, 32, 16] and (np.load(path)[:, -1, -1, -1] > 0).all()
    prepare(config, data, vae, "cpu", 0, 1)  # nothing left to do
    assert len(calls) == 4


def test_cache_of_other_files_crop_or_vae_is_not_used(tmp_path, vae_file):
    folder = make_folder(tmp_path / "data")
    config, data, vae, path = prepared(folder, vae_file)
    vae.register_buffer("quant_conv/bias", getattr(vae, "quant_conv/bias") + 1)
    assert cache_file(config, data, vae) != path
    bigger = make_config(data=folder, image_size=32, vae_weights=vae_file)
    assert cache_file(bigger, data, build_vae(bigger, "cpu")) != path
    os.rename(f"{folder}/cat/0.png", f"{folder}/cat/9.png")
    assert prepared(folder, vae_file)[3] != path
