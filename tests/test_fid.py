"""fid.py gives the numbers of ADM's evaluator, says what they are worth, and refuses bad input."""

import hashlib
import io
import json
import os
import sys
import zipfile
from pathlib import Path

import fid_formula as formula
import numpy as np
import pytest
import torch
from PIL import Image
from processes import start_ranks

import fid
import maskalign

GOLD = formula.load("public")
CPU = torch.device("cpu")


def shapes_of_inception():
    """Its state dict without values, which would take a second."""
    with torch.device("meta"):
        return fid.FIDInception().state_dict()


@pytest.fixture(scope="session")
def inception(tmp_path_factory):
    """The network with the made-up weights of the golden numbers."""
    path = tmp_path_factory.mktemp("fid") / "w.pth"
    shapes = {k: v.shape for k, v in shapes_of_inception().items() if "num_b" not in k}
    weights = formula.state_dict(shapes, formula.PUBLIC["weight_seed"])
    torch.save({k: torch.from_numpy(v) for k, v in weights.items()}, path)
    return fid.load_inception(str(path))[0]


@pytest.fixture(scope="session")
def measured(inception):
    """The statistics and features of two golden sets, computed once."""
    results = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count())
    for name in "CD":
        pixels = torch.from_numpy(formula.images("public", name))
        images = fid.Images(name, len(pixels), tuple(pixels.shape[1:3]), pixels, {})
        results[name] = fid.measure(images, inception, CPU, batch_size=8)  # faster than 64
    torch.set_num_threads(threads)
    return results


def hardly_trained():
    """Makes the demo's features cost nothing: a teacher of two steps, on 512 images."""
    make, render = maskalign.make_config, maskalign.demo_shapes
    maskalign.make_config = lambda **given: make(teacher_steps=2, **given)
    maskalign.demo_shapes = lambda size, count=512: render(size, count)


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """fid.py with these features, in an empty folder."""
    for name in ("make_config", "demo_shapes"):  # they come back after the test
        monkeypatch.setattr(maskalign, name, getattr(maskalign, name))
    hardly_trained()
    monkeypatch.chdir(tmp_path)
    return lambda *argv: fid.main([*argv, "--features=demo"])


class Means(torch.nn.Module):
    """In place of Inception: mean and deviation of each colour."""

    widths = (6, 2)

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.fc = torch.nn.Linear(6, 5).requires_grad_(False)

    def forward(self, images):
        x = images.float().flatten(2)
        return torch.cat([x.mean(dim=2), x.std(dim=2)], dim=1), x[:, 0, :2]


@pytest.fixture
def stub(monkeypatch, tmp_path):
    """fid.py with these, in an empty folder: for what does not depend on the features."""
    monkeypatch.setattr(fid, "load_inception", lambda path: (Means(), path or "6726825d"))
    monkeypatch.chdir(tmp_path)
    return lambda *argv: fid.main(argv)


def pictures(n=40, size=24, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, size, size, 3), dtype=np.uint8)


def save_folder(folder, images):
    for i, image in enumerate(images):
        path = Path(folder, f"{i}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)


def cases(table):
    """Parametrises a test over a table of golden numbers, and marks it `golden`."""
    return pytest.mark.parametrize(
        "case", [pytest.param(case, marks=pytest.mark.golden) for case in GOLD[table]]
    )


# ---- the golden numbers


@cases("resize")
def test_resize_equals_tensorflow_to_the_bit(case):
    image = torch.from_numpy(formula.resize_cases("public")[case]).permute(2, 0, 1)[None]
    found, gold = fid.resize_tf1(image)[0].permute(1, 2, 0).numpy(), GOLD["resize"][case]
    rows, columns = np.transpose(gold["at"])
    assert np.array_equal(found[rows, columns], np.float32(gold["values"]))
    probe = found.ravel().astype(float) @ formula.probe_vector(found.size)
    assert probe == pytest.approx(gold["probe"], rel=1e-12)


@pytest.mark.golden
@pytest.mark.parametrize("name", "CD")
def test_features_are_those_of_adm(name, measured, inception):
    gold = GOLD["features"][name]
    features = measured[name]["features"]
    logits = features @ inception.fc.weight.T
    spatial = {"mean_probe": measured[name]["mu_s"], "cov_trace": measured[name]["sigma_s"]}
    for kind, found in (("pool", features), ("logits_unbiased", logits)):
        found = formula.condense(found.numpy())
        for key in ("values", "row_norms", "row_probe", "mean_probe", "cov_trace", "cov_probe"):
            error = np.subtract(found[key], gold[kind][key])
            assert np.linalg.norm(error) <= 1e-4 * np.linalg.norm(gold[kind][key]), (kind, key)
    probe = torch.from_numpy(formula.probe_vector(2023))
    assert spatial["mean_probe"] @ probe == pytest.approx(gold["spatial"]["mean_probe"], rel=1e-4)
    assert spatial["cov_trace"].trace() == pytest.approx(gold["spatial"]["cov_trace"], rel=1e-4)
    assert probe @ spatial["cov_trace"] @ probe == pytest.approx(
        gold["spatial"]["cov_probe"], rel=1e-4
    )


@pytest.mark.golden
def test_features_of_small_images_are_those_of_adm_and_spatial_ones_in_its_order(inception):
    gold, n = GOLD["features"]["A"], 4  # of 64
    images = torch.from_numpy(formula.images("public", "A")[:n]).permute(0, 3, 1, 2)
    pool, spatial = (part.numpy() for part in inception(images))
    found = formula.condense(pool)
    for key in ("row_norms", "row_probe"):
        assert found[key] == pytest.approx(gold["pool"][key][:n], rel=1e-4)
    for part, kind in ((pool, "pool"), (spatial, "spatial")):
        values = np.array(gold[kind]["values"][:2])
        error = part[:2, gold[kind]["columns"]] - values
        assert np.linalg.norm(error) <= 1e-4 * np.linalg.norm(values), kind


@pytest.mark.golden
def test_the_five_numbers_are_those_of_adm(measured, inception, all_cores):
    found = fid.compare(measured["D"], measured["C"], inception)
    gold = GOLD["pairs"]["ref=C,sample=D"]
    assert found["fid"] == pytest.approx(gold["FID"], rel=2e-5)
    assert found["sfid"] == pytest.approx(gold["sFID"], rel=2e-5)
    # Counts: exact, as no point lies nearer to a ball's edge than 2.6e-3 of its radius.
    assert (found["precision"], found["recall"]) == (gold["precision"], gold["recall"])
    gold = GOLD["inception_score"]["D"]
    assert found["inception_score"] == pytest.approx(gold["split_5000"], rel=5e-5)
    logits = inception.fc(measured["D"]["features"])
    assert fid.inception_score(logits, 20) == pytest.approx(gold["split_20"], rel=5e-5)


@cases("frechet")
def test_frechet_distance_is_exact_also_where_singular(case):
    given = formula.frechet_cases("public")[case]
    traces = np.trace(given[1]) + np.trace(given[3])
    assert fid.frechet_distance(*given) == pytest.approx(GOLD["frechet"][case], abs=1e-9 * traces)


@cases("pr")
def test_precision_and_recall_are_exact_with_ties_and_duplicates(case):
    ref, sample = map(torch.from_numpy, formula.pr_cases("public")[case])
    gold = GOLD["pr"][case]
    assert fid.precision_recall(ref, sample) == (gold["precision"], gold["recall"])


@cases("is")
def test_inception_score_is_that_of_adm_in_float64(case):
    logits, split_size = formula.is_cases("public")[case]
    found = fid.inception_score(torch.from_numpy(logits), split_size)
    assert found == pytest.approx(GOLD["is"][case], rel=1e-12)


# ---- closed forms


def test_equal_covariances_leave_the_squared_distance_of_the_means():
    x = torch.randn(50, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mu, sigma = x.mean(dim=0), x.T.cov()
    assert fid.frechet_distance(mu, sigma, mu + 2, sigma) == pytest.approx(4 * 8, rel=1e-12)
    assert fid.frechet_distance(mu, sigma, mu, 9 * sigma) == pytest.approx(4 * sigma.trace())


def test_a_set_compared_with_itself_gives_0_1_1(measured, inception):
    """By 32 images, and 300 of the features: as singular as all of them, and sooner."""
    cut = {key: x[:300, :300] if x.ndim == 2 else x[:300] for key, x in measured["C"].items()}
    cut["features"] = measured["C"]["features"]
    found = fid.compare(cut, cut, inception)
    assert found["fid"] == pytest.approx(0, abs=1e-9)
    assert found["sfid"] == pytest.approx(0, abs=1e-6)
    assert (found["precision"], found["recall"]) == (1, 1)


def test_copies_of_one_image_are_inside_a_ball_of_radius_0():
    x = torch.rand(1, 500, generator=torch.Generator().manual_seed(0)).repeat(9, 1)
    assert fid.precision_recall(x, x[:5]) == (1, 1) and fid.precision_recall(x, x + 1) == (0, 0)


def test_certain_and_balanced_classes_score_their_number():
    assert fid.inception_score(1000 * torch.eye(7)) == pytest.approx(7)
    assert fid.inception_score(torch.zeros(5, 7)) == pytest.approx(1)


def test_running_sums_give_mean_and_covariance_of_all_pieces():
    x = 5 + np.random.default_rng(0).normal(size=(100, 6))
    parts = [torch.zeros(7, 7, dtype=torch.float64) for _ in range(2)]  # of two processes
    for part, piece in zip(parts * 2, np.split(x, [10, 37, 90]), strict=True):
        fid.add_moments(part, torch.from_numpy(piece))
    mu, sigma = fid.mean_and_covariance(parts[0] + parts[1])
    np.testing.assert_allclose(mu, x.mean(axis=0), rtol=1e-13)
    np.testing.assert_allclose(sigma, np.cov(x, rowvar=False), atol=1e-12)


# ---- any number of processes


def test_two_processes_judge_as_one_and_by_a_reference_of_adm_as_adm_does(quick):
    """Its statistics (of 40 images) count for FID and sFID, its images (24) for the others."""
    full, cut = pictures(40), pictures(40)[:24]
    for name, images in (("full", full), ("cut", cut), ("x", pictures(40, seed=1))):
        np.savez(f"{name}.npz", images)
    of_full = quick("x.npz", "--ref=full.npz", "--save_stats=stats.npz")
    with np.load("stats.npz") as stats:
        known = {key: stats[key] for key in fid.STATISTICS}
    np.savez("virtual.npz", arr_0=cut, **known)  # the layout of ADM's files
    one, of_cut = quick("x.npz", "--ref=virtual.npz"), quick("x.npz", "--ref=cut.npz")
    argv = ["--ref=virtual.npz", "--features=demo", "--json=two.json", "--batch_size=12"]  # 24 + 16
    ranks = [r.end() for r in start_ranks(2, "fid.py", "x.npz", *argv, before=hardly_trained)]
    assert [status for status, *_ in ranks] == [0, 0], ranks
    assert "fid" in ranks[0][1] and not ranks[1][1]
    assert not any("%" in errors for *_, errors in ranks), "no bar where no terminal is"
    two = json.loads(Path("two.json").read_text())
    for found in (one, two):
        for key, other in (("fid", of_full), ("sfid", of_full), ("recall", of_cut)):
            assert found[key] == pytest.approx(other[key], rel=1e-4), key
        assert found["precision"] == of_cut["precision"]
        assert found["protocol"]["n"] == 40 and found["protocol"]["reference_images"] == 24
    assert of_cut["fid"] != pytest.approx(of_full["fid"], rel=1e-2)


@pytest.mark.parametrize(
    "world_size, rows", [(1, [9]), (3, [4, 4, 1]), (8, [2, 2, 2, 2, 1, 0, 0, 0])]
)
def test_any_number_of_processes_measures_the_same(world_size, rows, tmp_path, monkeypatch):
    np.savez(tmp_path / "x.npz", pictures(9))
    images, net = fid.open_npz(str(tmp_path / "x.npz")), Means()
    whole = net(torch.from_numpy(pictures(9)).permute(0, 3, 1, 2))
    if world_size == 1:
        reduced = [fid.measure(images, net, CPU, batch_size=2)["features"]]
    else:
        reduced = []  # by each rank: features, then the sums of both kinds
        monkeypatch.setattr(fid.dist, "reduce", lambda part, _: reduced.append(part.clone()))
        for rank in range(world_size):
            fid.measure(images, net, CPU, rank, world_size, batch_size=2)
        for i, features in enumerate(whole, start=1):
            mu, sigma = fid.mean_and_covariance(sum(reduced[i::3]))
            np.testing.assert_allclose(mu, features.mean(dim=0), rtol=1e-6)
            np.testing.assert_allclose(sigma, np.cov(features.T), rtol=1e-5)
    parts = reduced[::3]
    assert [int(part.any(dim=1).sum()) for part in parts] == rows
    assert torch.equal(sum(parts), whole[0])


# ---- reading


def test_a_folder_at_any_depth_reads_as_the_npz_in_natural_order(tmp_path):
    images = pictures(12)
    np.savez(tmp_path / "x.npz", images)
    np.savez_compressed(tmp_path / "y.npz", images)
    for i, image in enumerate(images):
        path = tmp_path / "png" / ("a" if i < 6 else "b/c") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    sets = [fid.open_npz(str(tmp_path / name)) for name in ("x.npz", "y.npz")]
    for found in (*sets, fid.open_folder(str(tmp_path / "png"))):
        assert found.count == 12 and found.size == (24, 24)
        for first, last in ((0, 12), (7, 12), (12, 12), (20, 12)):  # a rank skips to its share
            batches = list(fid.read_batches(found, first, last, 5))
            assert all(len(batch) <= 5 for batch in batches)
            assert np.array_equal(np.concatenate([images[:0], *batches]), images[first:last])


def test_a_folder_has_no_hidden_files_no_others_and_no_images_behind_links(tmp_path):
    folder = tmp_path / ".data/x"  # that the way to it is hidden does not matter
    for i, suffix in enumerate((".PNG", ".jpeg", ".bmp", ".webp", "\u00b23.png")):
        path = folder / f"sub.jpg/{i}{suffix}"  # the folder is no image, whatever its name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (24, 24)).save(path)
    whole = [str(path) for path in sorted((folder / "sub.jpg").iterdir())]
    for name in (".hidden.png", "._0.png", ".ipynb_checkpoints/0.png", "sub.jpg/.cache/1/0.png"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (24, 24)).save(path)
    for name in ("samples.json", "sub.jpg/a.txt", "b.txt"):
        (folder / name).write_text("{}")
    (folder / "again").symlink_to(folder)  # followed, it would never end
    os.mkfifo(folder / "pipe.png")  # opened, it would keep us waiting
    (folder / "zero.png").symlink_to("/dev/zero")
    assert fid.open_folder(str(folder)).files == whole


def test_images_of_other_modes_are_converted_as_in_training(tmp_path):
    grey = Image.fromarray(pictures(1)[0]).convert("L")
    for i, mode in enumerate(("RGB", "L", "P", "RGBA")):
        grey.convert(mode).save(tmp_path / f"{i}.png")
    found = fid.open_folder(str(tmp_path))
    (batch,) = fid.read_batches(found, 0, 4, 4)
    assert (
        batch.shape == (4, 24, 24, 3)
        and (batch == torch.from_numpy(np.array(grey))[..., None])[[0, 1, 3]].all()
    )


def test_images_that_8_bits_would_clip_are_refused_before_work(no_network):
    save_folder("x", pictures(5))
    Image.fromarray(np.full((24, 24), 30_000, np.uint16)).save("x/2.png")
    assert no_network("x", "--ref=good.npz").startswith("x/2.png (I;16)")


def test_a_folder_that_cannot_be_read_is_told(tmp_path, monkeypatch, capsys):
    save_folder(tmp_path, pictures(5))
    save_folder(tmp_path / "shut", pictures(5))
    scandir = os.scandir

    def refuse(place):  # as for a user who may not read it; root may
        if str(place).endswith("shut"):
            raise PermissionError(13, "Permission denied", str(place))
        return scandir(place)

    monkeypatch.setattr(os, "scandir", refuse)
    assert fid.open_folder(str(tmp_path)).count == 5
    assert "Permission denied" in capsys.readouterr().out


def test_a_flipped_bit_in_an_npz_is_an_error(tmp_path):
    np.savez(tmp_path / "x.npz", pictures(40))
    content = bytearray((tmp_path / "x.npz").read_bytes())
    content[len(content) // 2 + 9000] ^= 1  # of an image of the second half
    (tmp_path / "x.npz").write_bytes(content)
    with pytest.raises(zipfile.BadZipFile, match="CRC"):
        list(fid.read_batches(fid.open_npz(str(tmp_path / "x.npz")), 0, 40, 10))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_reading_holds_a_batch_and_not_the_file(save, tmp_path):
    import tracemalloc

    save(tmp_path / "x.npz", np.zeros((8000, 64, 64, 3), np.uint8))  # 98 MB
    found = fid.open_npz(str(tmp_path / "x.npz"))
    for first, limit in ((0, 4e6), (4000, 40e6)):  # zipfile skips 16 MB at a time
        tracemalloc.start()
        assert sum(map(len, fid.read_batches(found, first, 8000, 50))) == 8000 - first
        assert tracemalloc.get_traced_memory()[1] < limit
        tracemalloc.stop()


def test_the_order_of_the_files_does_not_matter(stub):
    images = pictures()
    np.savez("a.npz", images)
    np.savez("b.npz", images[::-1])
    np.savez("ref.npz", pictures(seed=1))
    a, b = (stub(name, "--ref=ref.npz") for name in ("a.npz", "b.npz"))
    for key in ("fid", "sfid", "inception_score", "precision", "recall"):
        assert a[key] == pytest.approx(b[key], rel=1e-9)


# ---- what is told, and kept


def test_the_demo_scores_against_its_rendered_shapes_and_says_so(quick, capsys):
    shapes = maskalign.demo_shapes(24, 64).datasets["image"].permute(0, 2, 3, 1)
    np.savez("shapes.npz", shapes)
    np.savez("noise.npz", pictures(64))
    near, far = quick("shapes.npz"), quick("noise.npz")
    assert 0 < near["fid"] < far["fid"] and near["sfid"] < far["sfid"]
    assert near["precision"] > 0.9 and far["precision"] == 0
    shown = capsys.readouterr().out
    assert '"features": "demo"' in shown and '"reference": "rendered shapes"' in shown
    assert "favour methods aligned with this very network" in shown
    assert "not the papers' features" in shown


def test_the_settings_that_sample_py_stored_are_in_the_protocol(stub, capsys):
    settings = {"sampler": "sde", "num_steps": 250, "class": "h\u00e9ron"}
    np.savez("x.npz", arr_0=pictures(), settings=json.dumps(settings))
    save_folder("png", pictures())
    found = stub("x.npz", "--ref=png", "--json=x.json")
    assert found["protocol"]["sampler"] == settings
    assert json.loads(Path("x.json").read_text()) == found
    assert '"num_steps": 250' in capsys.readouterr().out
    assert stub("png", "--ref=x.npz")["protocol"]["sampler"] is None


def test_the_warnings_say_what_the_numbers_are_worth(stub, capsys, monkeypatch):
    np.savez("x.npz", pictures())
    np.savez("all.npz", np.zeros((50_000, 1, 2, 3), np.uint8))
    stub("x.npz", "--ref=x.npz")
    shown = capsys.readouterr().out
    assert "FID is biased upwards at every N: compare at equal N (papers: 50,000)" in shown
    assert '"n": 40' in shown and shown.count("warning") == 1
    monkeypatch.setattr(fid, "compare", lambda *given: {})  # it would take an hour
    stub("all.npz", "--ref=all.npz")
    assert "warning" not in capsys.readouterr().out
    stub("all.npz", "--ref=all.npz", "--weights=other")
    assert "not the papers' features" in capsys.readouterr().out


def test_on_a_terminal_of_cp1252_names_are_escaped_and_files_are_written_first(stub, monkeypatch):
    name = "\u732b.npz"
    np.savez(name, pictures())
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="cp1252"))
    found = stub(name, f"--ref={name}", "--json=x.json")
    sys.stdout.flush()
    assert b'"reference": "\\u732b.npz"' in sys.stdout.buffer.getvalue()
    assert json.loads(Path("x.json").read_text())["protocol"]["reference"] == name

    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    sys.stdout.close()  # so that printing fails
    with pytest.raises(ValueError, match="closed file"):
        stub(name, f"--ref={name}", "--json=y.json", "--save_stats=y.npz")
    assert json.loads(Path("y.json").read_text()) == found and len(np.load("y.npz")["mu"]) == 6


def test_saved_statistics_serve_as_reference_of_the_same_features_only(stub):
    np.savez("a.npz", pictures())
    np.savez("b.npz", pictures(seed=1))
    direct = stub("a.npz", "--ref=b.npz", "--save_stats=of_ref.npz")
    assert stub("b.npz", "--save_stats=alone.npz") == {
        "protocol": dict(direct["protocol"], reference="b.npz")
    }
    for name in ("of_ref.npz", "alone.npz"):
        found = stub("a.npz", f"--ref={name}")
        for key in ("fid", "sfid", "inception_score", "precision", "recall"):
            assert found[key] == pytest.approx(direct[key], rel=1e-12)
    with pytest.raises(AssertionError, match="of_ref.npz has no images, nor statistics of this"):
        stub("a.npz", "--ref=of_ref.npz", "--weights=other")
    with pytest.raises(AssertionError, match=r"of_ref.npz has no images \(arr_0\)"):
        stub("of_ref.npz", "--ref=a.npz")
    # A file that has both: statistics of another network do not count, its images do.
    with np.load("of_ref.npz") as stats:
        np.savez("both.npz", arr_0=pictures(seed=1), **{**stats, "mu": stats["mu"] + 9})
    found = [stub("a.npz", "--ref=both.npz", f"--weights={x}")["fid"] for x in ("", "other")]
    assert found[1] == pytest.approx(direct["fid"]) and found[0] > 2 * found[1]


def test_a_reference_of_statistics_alone_gives_the_distances_alone(stub, capsys):
    np.savez("a.npz", pictures())
    stub("a.npz", "--save_stats=full.npz")
    with np.load("full.npz") as full:
        np.savez("slim.npz", mu=full["mu"], sigma=full["sigma"])  # as pytorch-fid's
    found = stub("a.npz", "--ref=slim.npz")
    assert found["fid"] == pytest.approx(0, abs=1e-9)
    assert found["sfid"] is found["precision"] is found["recall"] is None
    assert "precision        -" in capsys.readouterr().out


def test_the_home_folder_is_expanded_in_every_path(stub, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    np.savez("x.npz", pictures())
    save_folder("png", pictures(seed=1))
    (tmp_path / "deep").mkdir()
    monkeypatch.chdir("deep")
    stub("~/x.npz", "--ref=~/png", "--json=~/x.json", "--save_stats=~/stats.npz")
    assert (tmp_path / "x.json").is_file() and (tmp_path / "stats.npz").is_file()
    assert fid.parse_args(["~", "--ref=x", "--weights=~/w"]).weights == str(tmp_path / "w")


# ---- the weights of Inception


def light_weights():
    """Weights of the right shapes, a single number each: they need no room in a file."""
    state = shapes_of_inception()
    values = torch.linspace(0.5, 1, len(state))
    return {
        key: value.to(p.dtype).expand(p.shape)
        for (key, p), value in zip(state.items(), values, strict=True)
    }


def test_weights_load_from_files_of_both_formats_and_are_named_by_their_hash(tmp_path):
    """The full file is in the format of before torch 1.6, as the published one is. That has no
    checksum, so a flipped bit loads, and its hash tells."""
    state = light_weights()
    slim = {key: value for key, value in state.items() if "num_batches" not in key}
    assert (len(state), len(slim)) == (566, 472)
    torch.save(state, tmp_path / "0.pth", _use_new_zipfile_serialization=False)
    torch.save(slim, tmp_path / "1.pth")
    assert not zipfile.is_zipfile(tmp_path / "0.pth")
    damaged = bytearray((tmp_path / "0.pth").read_bytes())
    damaged[-1] ^= 1  # of a number
    (tmp_path / "2.pth").write_bytes(damaged)
    first, second, _ = loaded = [fid.load_inception(str(tmp_path / f"{i}.pth")) for i in range(3)]
    for a, b in zip(first[0].state_dict().values(), second[0].state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert first[0].fc.bias is None and not first[0].training
    assert not any(p.requires_grad for p in first[0].parameters())
    hashes = [hashlib.sha256((tmp_path / f"{i}.pth").read_bytes()).hexdigest() for i in range(3)]
    assert [digest for _, digest in loaded] == [x[:8] for x in hashes]
    assert len(set(hashes)) == 3


def test_the_published_weights_are_downloaded_with_their_hash_checked(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    given = []

    def download(url, **options):
        given.append((url, options))
        (tmp_path / "hub/checkpoints").mkdir(parents=True)
        torch.save(light_weights(), tmp_path / "hub/checkpoints" / url.rpartition("/")[2])

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", download)
    assert isinstance(fid.load_inception()[0], fid.FIDInception)
    assert given == [(fid.WEIGHTS_URL, dict(check_hash=True, weights_only=True))]
    assert fid.WEIGHTS_URL.endswith("pt_inception-2015-12-05-6726825d.pth")


def test_a_wrong_weights_file_is_refused(tmp_path, monkeypatch):
    state, net = light_weights(), fid.FIDInception()
    monkeypatch.setattr(fid, "FIDInception", lambda: net)  # none of them gets into it
    wrong = {
        "empty": {},
        "part": {k: v for k, v in state.items() if "Mixed_6b" not in k},
        "more": {**state, "AuxLogits.fc.bias": torch.zeros(3)},
        "classes": {**state, "fc.weight": torch.zeros(1000, 2048)},
    }
    for name, content in wrong.items():
        torch.save(content, tmp_path / name)
        with pytest.raises(RuntimeError, match="loading state_dict for FIDInception"):
            fid.load_inception(str(tmp_path / name))
    with pytest.raises(FileNotFoundError, match="missing"):
        fid.load_inception(str(tmp_path / "missing"))


# ---- bad input: one sentence each, before the long work


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    """fid.py in an empty folder, where it must refuse before it asks for the network."""
    monkeypatch.setattr(fid, "load_inception", lambda path: pytest.fail("too late"))
    monkeypatch.chdir(tmp_path)
    np.savez("good.npz", pictures())

    def refused(*argv):
        with pytest.raises(AssertionError) as caught:
            fid.main([str(x) for x in argv])
        assert "\n" not in str(caught.value)
        return str(caught.value)

    return refused


RULE = "not uint8 (N > 3, H, W, 3)"


@pytest.mark.parametrize(
    "array, message",
    [
        (pictures().astype(np.float32), f"x.npz has float32 (40, 24, 24, 3), {RULE}"),
        (pictures() / 127.5 - 1, f"x.npz has float64 (40, 24, 24, 3), {RULE}"),
        (pictures().astype(np.uint16), f"x.npz has uint16 (40, 24, 24, 3), {RULE}"),
        (pictures().transpose(0, 3, 1, 2).copy(), f"x.npz has uint8 (40, 3, 24, 24), {RULE}"),
        (pictures()[..., :1], f"x.npz has uint8 (40, 24, 24, 1), {RULE}"),
        (pictures()[..., [0, 1, 2, 0]], f"x.npz has uint8 (40, 24, 24, 4), {RULE}"),
        (pictures()[..., 0], f"x.npz has uint8 (40, 24, 24), {RULE}"),
        (np.asfortranarray(pictures()), f"x.npz has uint8 (40, 24, 24, 3), {RULE}"),
        (pictures(3), f"x.npz has uint8 (3, 24, 24, 3), {RULE}"),
        (np.array([None] * 4, dtype=object), f"x.npz has object (4,), {RULE}"),
        (pictures(8, 32), "sizes are (32, 32) and (24, 24): crop both sets to one size"),
    ],
)
def test_an_npz_that_cannot_be_scored_is_refused(no_network, array, message):
    np.savez("x.npz", array)
    assert message in no_network("x.npz", "--ref=good.npz")
    if "sizes" not in message:
        assert message in no_network("good.npz", "--ref=x.npz")


def test_what_is_no_npz_and_no_folder_is_named(no_network):
    Path("cut.npz").write_bytes(Path("good.npz").read_bytes()[:5000])
    Path("text.npz").write_text("hello")
    for name in ("cut.npz", "text.npz", "missing.npz"):
        assert no_network(name, "--ref=good.npz").startswith(f"{name} is neither a folder nor")
    np.savez("other.npz", y=np.zeros(4))
    assert no_network("other.npz", "--ref=good.npz").startswith("other.npz has no images (arr_0)")
    Path("empty").mkdir()
    assert no_network("good.npz", "--ref=empty").startswith("empty has 0 images: use 4 or more")
    save_folder("few", pictures(3))
    assert no_network("few", "--ref=good.npz").startswith("few has 3 images: use 4 or more")


class Trap:
    def __reduce__(self):
        return os.mkdir, ("unpickled",)


def test_objects_are_never_unpickled(stub):
    np.savez("good.npz", pictures())
    for name in ("mu", "settings", "weights"):
        np.savez("x.npz", pictures(), **{name: np.array([Trap()], dtype=object)})
        with pytest.raises(ValueError, match="Object arrays cannot be loaded"):
            stub("x.npz", "--ref=good.npz" if name == "settings" else "--ref=x.npz")
    assert not Path("unpickled").exists()


def test_a_folder_with_an_odd_image_is_refused_before_work(no_network):
    save_folder("x", pictures(12))
    Image.new("RGB", (32, 24)).save("x/2.png")
    message = no_network("x", "--ref=good.npz")
    assert message.startswith("sizes (height, width) differ: crop {(24, 24): 'x/11.png', (24, 32)")
    # Opened without a list of formats, Pillow would start Ghostscript for this one.
    Path("x/2.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 24 24\n")
    with pytest.raises(OSError, match="cannot identify image file 'x/2.png'"):
        fid.main(["x", "--ref=good.npz"])


def test_a_truncated_image_is_named(stub):
    save_folder("x", pictures(12))
    whole = Path("x/2.png").read_bytes()
    Path("x/2.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(OSError, match="truncated") as caught:
        stub("x", "--ref=x")
    assert caught.value.__notes__ == ["x/2.png"]


def test_a_folder_inside_the_other_is_refused(no_network, stub):
    save_folder("ref/real", pictures(5))
    save_folder("ref/samples", pictures(5, seed=1))
    message = no_network("ref/samples", "--ref=ref")
    assert message == "one folder contains the other: ['ref/samples', 'ref']"
    assert "one folder contains" in no_network("./ref/../ref", f"--ref={os.getcwd()}/ref/real")
    os.symlink("ref/samples", "link")
    assert "one folder contains" in no_network("link", "--ref=ref")


def test_folders_beside_each_other_and_the_same_one_are_compared(stub):
    save_folder("ref", pictures(5))
    save_folder("ref2", pictures(5, seed=1))
    np.savez("ref/samples.npz", pictures(5, seed=1))
    apart = stub("ref2", "--ref=ref")
    assert apart["fid"] > 1 and stub("ref/samples.npz", "--ref=ref")["fid"] == apart["fid"]
    same = stub("ref", "--ref=ref")
    assert same["fid"] == pytest.approx(0, abs=1e-9) and same["precision"] == 1


def test_too_few_points_and_statistics_that_do_not_fit_are_refused():
    with pytest.raises(AssertionError, match="3 images are too few for k = 3: use 4 or more"):
        fid.precision_recall(torch.zeros(9, 2), torch.zeros(3, 2))
    eye = np.eye(3)
    for given in ((eye[0], eye, eye[0, :2], eye[:2, :2]), (eye[0] * np.nan, eye, eye[0], eye)):
        with pytest.raises(AssertionError, match="differ in shape or are not finite: measure"):
            fid.frechet_distance(*given)


def test_features_that_are_not_finite_are_refused(stub, monkeypatch):
    np.savez("a.npz", pictures())
    real = Means.forward

    def broken(net, images):
        features, spatial = real(net, images)
        features[7] = float("nan")
        return features, spatial

    monkeypatch.setattr(Means, "forward", broken)
    with pytest.raises(AssertionError, match="are not finite"):
        stub("a.npz", "--ref=a.npz")


@pytest.mark.parametrize(
    "argv, message",
    [
        (["x.npz"], "give --ref, or --save_stats to measure the samples alone"),
        (["x.npz", "--save_stats="], "give --ref, or --save_stats"),
        (["x.npz", "--save_stats=x.npz"], "x.npz must be a new file"),
        (["x.npz", "--save_stats=./x.npz"], "./x.npz must be a new file"),
        (["x.npz", "--ref=y.npz", "--json=x.json"], "x.json must be a new file"),
        (["x.npz", "--ref=y.npz", "--json=folder"], "folder must be a new file"),
        (["x.npz", "--ref=y.npz", "--json=no/x.json"], "no/x.json must be a new file, in a folder"),
        (["x.npz", "--ref=y.npz", "--features=dinov2"], "choose from"),
        (["x.npz", "--ref=y.npz", "--batch_size=ten"], "invalid int value"),
    ],
)
def test_bad_flags_are_one_sentence(argv, message, tmp_path, monkeypatch, capsys):
    """In a folder where x.npz and x.json are there: nothing is replaced."""
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    for name in ("x.npz", "x.json"):
        Path(name).write_text("{}")
    with pytest.raises(SystemExit):
        fid.parse_args(argv)
    assert message in capsys.readouterr().err
