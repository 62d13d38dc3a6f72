"""fid.py gives the numbers of ADM's evaluator, says their worth, and refuses in one sentence."""

import json
import os
import sys
import zipfile
from pathlib import Path

import fid_formula as formula
import numpy as np
import pytest
import timm
import torch
from PIL import Image
from processes import start_ranks

import fid
import maskalign
from maskalign import BadInput

GOLD = formula.load("public")
CPU = torch.device("cpu")


def shapes_of_inception():
    """Its state dict without values, which would take a second."""
    with torch.device("meta"):
        return fid.FIDInception().state_dict()


@pytest.fixture(scope="session")
def weights_file(tmp_path_factory):
    """The made-up weights of the golden numbers."""
    path = tmp_path_factory.mktemp("fid") / "w.pth"
    shapes = {k: v.shape for k, v in shapes_of_inception().items() if "num_b" not in k}
    weights = formula.state_dict(shapes, formula.PUBLIC["weight_seed"])
    torch.save({k: torch.from_numpy(v) for k, v in weights.items()}, path)
    return path


@pytest.fixture(scope="session")
def inception(weights_file):
    """The network with these, and what the protocol says of it."""
    return fid.build_features("inception", str(weights_file), CPU)


@pytest.fixture(scope="session")
def measured(inception):
    """The statistics and features of two golden sets, computed once."""
    torch.set_num_threads(os.cpu_count())  # the one network here that is large enough
    results = {}
    for name in "CD":
        pixels = torch.from_numpy(formula.images("public", name))
        images = fid.Images(name, pixels, len(pixels), tuple(pixels.shape[1:3]))
        results[name] = fid.measure(images, inception[0], CPU, batch_size=8)  # faster than 64
    torch.set_num_threads(1)
    return results


def hardly_trained():
    """Makes the demo's features cost nothing: by a teacher of two steps, on 512 images."""
    make, draw = maskalign.make_config, maskalign.demo_shapes
    maskalign.make_config = lambda: make(teacher_steps=2)
    maskalign.demo_shapes = lambda size, count=512: draw(size, count)


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """fid.py with these features, in an empty folder."""
    for name in ("make_config", "demo_shapes"):  # they come back after the test
        monkeypatch.setattr(maskalign, name, getattr(maskalign, name))
    hardly_trained()
    monkeypatch.chdir(tmp_path)
    return lambda *argv: run(*argv, "--features=demo")


def run(*argv):
    return fid.run(fid.parse_args([str(x) for x in argv]))


def pictures(n=40, size=24, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, size, size, 3), dtype=np.uint8)


def png(path, *size, mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size or (24, 24)).save(path)


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


@pytest.mark.parametrize("name", "CD")
def test_features_are_those_of_adm(name, measured, inception):
    gold = GOLD["features"][name]
    features = measured[name]["features"]
    logits = features @ inception[0].fc.weight.T
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


def test_features_of_small_images_are_those_of_adm_and_spatial_ones_in_its_order(inception):
    gold, n = GOLD["features"]["A"], 4  # of 64
    images = torch.from_numpy(formula.images("public", "A")[:n]).permute(0, 3, 1, 2)
    pool, spatial = (part.numpy() for part in inception[0](images))
    found = formula.condense(pool)
    for key in ("row_norms", "row_probe"):
        assert found[key] == pytest.approx(gold["pool"][key][:n], rel=1e-4)
    for part, kind in ((pool, "pool"), (spatial, "spatial")):
        values = np.array(gold[kind]["values"][:2])
        error = part[:2, gold[kind]["columns"]] - values
        assert np.linalg.norm(error) <= 1e-4 * np.linalg.norm(values), kind


def assert_pair(found, pair, sample):
    gold = GOLD["pairs"][pair]
    assert found["fid"] == pytest.approx(gold["FID"], rel=2e-5)
    assert found["sfid"] == pytest.approx(gold["sFID"], rel=2e-5)
    # Counts: exact, as no point lies nearer to a ball's edge than 2.6e-3 of its radius.
    assert (found["precision"], found["recall"]) == (gold["precision"], gold["recall"])
    score = GOLD["inception_score"][sample]["split_5000"]
    assert found["inception_score"] == pytest.approx(score, rel=5e-5)


def test_the_five_numbers_are_those_of_adm(measured, inception, all_cores):
    found = fid.compare(measured["D"], measured["C"], inception[0])
    assert_pair(found, "ref=C,sample=D", "D")
    logits = measured["D"]["features"] @ inception[0].fc.weight.T
    gold = GOLD["inception_score"]["D"]["split_20"]
    assert fid.inception_score(logits, 20) == pytest.approx(gold, rel=5e-5)


def test_the_protocol_and_the_warnings_say_what_the_numbers_are_worth(
    inception, weights_file, capsys
):
    about = inception[1]
    assert about["weights"] == fid.sha256([weights_file])
    assert (about["features"], about["resize"]) == ("inception", "TF1 bilinear to 299, float32")
    fid.warn(64, 2048, about)
    shown = capsys.readouterr().out
    assert "N is 64, below 2048" in shown and "the covariance is singular" in shown
    assert "not those of the papers" in shown  # made-up weights
    fid.warn(50_000, 2048, dict(about, weights="6726825d"))
    assert not capsys.readouterr().out


def test_two_processes_judge_as_one_and_by_a_reference_of_adm_as_adm_does(quick):
    """Its statistics (of 40 images) count for FID and sFID, its images (24) for the others."""
    full, cut = pictures(40), pictures(40)[:24]
    for name, images in (("full", full), ("cut", cut), ("x", pictures(40, seed=1))):
        np.savez(f"{name}.npz", images)
    of_full = quick("x.npz", "--ref=full.npz", "--save_stats=stats.npz")
    with np.load("stats.npz") as stats:
        told = {key: stats[key] for key in (*fid.STATISTICS, "protocol")}
    np.savez("virtual.npz", arr_0=cut, **told)
    one, of_cut = quick("x.npz", "--ref=virtual.npz"), quick("x.npz", "--ref=cut.npz")
    argv = ["--ref=virtual.npz", "--features=demo", "--json=two.json", "--batch_size=12"]  # 24 + 16
    ranks = [r.end() for r in start_ranks(2, "fid.py", "x.npz", *argv, before=hardly_trained)]
    assert [status for status, *_ in ranks] == [0, 0], ranks
    two = json.loads(Path("two.json").read_text())
    for found in (one, two):
        for key, other in (("fid", of_full), ("sfid", of_full), ("recall", of_cut)):
            assert found[key] == pytest.approx(other[key], rel=1e-4), key
        assert found["precision"] == of_cut["precision"]
        assert found["n"] == 40 and found["protocol"]["statistics"] == "stored"
        assert found["protocol"]["reference_images"] == 24
    assert of_cut["fid"] != pytest.approx(of_full["fid"], rel=1e-2)
    assert f"reference_sha256 {fid.sha256(['virtual.npz'])}" in ranks[0][1]

    # ADM's file has no protocol: then it is of Inception.
    del told["protocol"]
    np.savez("virtual.npz", arr_0=cut, **told)
    images, widths = fid.open_images("virtual.npz"), [len(told["mu"]), len(told["mu_s"])]
    for kind, keys in (("inception", set(fid.STATISTICS)), ("demo", set())):
        about = dict(features=kind, weights="any")
        assert fid.stored_statistics(images, about, widths).keys() == keys


def test_any_number_of_processes_measures_the_same(quick, monkeypatch):
    np.savez("x.npz", pictures(9))
    images, (net, _) = fid.open_images("x.npz"), fid.build_features("demo", "", CPU)
    one = fid.measure(images, net, CPU, batch_size=2)
    monkeypatch.setattr(fid.dist, "reduce", lambda part, rank: None)  # the sum is taken below
    parts = [fid.measure(images, net, CPU, rank, 3, batch_size=2)["features"] for rank in range(3)]
    assert [int(part.any(dim=1).sum()) for part in parts] == [4, 4, 1]
    assert torch.equal(sum(parts), one["features"])


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
    found = fid.compare(cut, cut, inception[0])
    assert found["fid"] == pytest.approx(0, abs=1e-9) and found["sfid"] == pytest.approx(
        0, abs=1e-6
    )
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


# ---- reading


def test_a_folder_at_any_depth_reads_as_the_npz_in_natural_order(tmp_path):
    images = pictures(12)
    np.savez_compressed(tmp_path / "x.npz", images)
    for i, image in enumerate(images):
        path = tmp_path / "png" / ("a" if i < 6 else "b/c") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    for name in ("x.npz", "png"):
        found = fid.open_images(str(tmp_path / name))
        assert found.count == 12 and found.size == (24, 24)
        for first, last in ((0, 12), (7, 12), (12, 12)):  # a rank skips to its share
            batches = list(fid.read_batches(found, first, last, 5))
            assert all(len(batch) <= 5 for batch in batches)
            assert np.array_equal(np.concatenate([images[:0], *batches]), images[first:last])


def test_a_folder_takes_the_same_files_as_training_and_tells_the_others(tmp_path, capsys):
    for i, suffix in enumerate((".PNG", ".jfif", ".jp2", ".webp")):
        png(tmp_path / f"sub.jpg/{i}{suffix}")  # the folder is no image, whatever its name
    for name in ("samples.json", "sub.jpg/a.txt", "b.txt"):
        (tmp_path / name).write_text("{}")
    assert fid.open_images(str(tmp_path)).count == 4
    assert "skipped 3 files that are no images by their names\n" in capsys.readouterr().out
    assert fid.open_images(str(tmp_path), rank=1).count == 4 and not capsys.readouterr().out


def test_reading_holds_a_batch_and_not_the_file(tmp_path):
    import tracemalloc

    np.savez(tmp_path / "x.npz", np.zeros((4000, 64, 64, 3), np.uint8))  # 49 MB
    found = fid.open_images(str(tmp_path / "x.npz"))
    tracemalloc.start()
    assert sum(len(batch) for batch in fid.read_batches(found, 0, 4000, 50)) == 4000
    assert tracemalloc.get_traced_memory()[1] < 4e6
    tracemalloc.stop()


def test_the_order_of_the_files_does_not_matter(quick):
    images = pictures()
    np.savez("a.npz", images)
    np.savez("b.npz", images[::-1])
    np.savez("ref.npz", pictures(seed=1))
    a, b = (quick(name, "--ref=ref.npz") for name in ("a.npz", "b.npz"))
    for key in ("fid", "sfid", "inception_score", "precision", "recall"):
        assert a[key] == pytest.approx(b[key], rel=1e-9)


# ---- the command


def test_the_demo_scores_against_its_drawn_shapes_and_says_so(quick, capsys):
    np.savez("shapes.npz", maskalign.demo_shapes(24, 64).tensors[0].permute(0, 2, 3, 1))
    np.savez("noise.npz", pictures(64))
    Path("noise.json").write_text('{"sampler": "sde", "steps": 250}')
    near, far = quick("shapes.npz"), quick("noise.npz")
    assert 0 < near["fid"] < far["fid"] and near["sfid"] < far["sfid"] and near["precision"] == 1
    shown = capsys.readouterr().out
    assert "FD-demo" in shown and "such numbers compare only with each other" in shown
    assert "reference drawn shapes" in shown and "'steps': 250" in shown
    assert far["protocol"]["sampler"]["sampler"] == "sde"


def test_saved_statistics_serve_as_reference_of_the_same_features_only(
    quick, inception, monkeypatch
):
    np.savez("a.npz", pictures())
    np.savez("b.npz", pictures(seed=1))
    direct = quick("a.npz", "--ref=b.npz", "--save_stats=of_ref.npz")
    assert quick("b.npz", "--ref=b.npz", "--save_stats=again.npz")["recall"] == 1
    quick("b.npz", "--ref=of_ref.npz")
    for name in ("of_ref.npz", "again.npz"):
        assert quick("a.npz", f"--ref={name}")["fid"] == pytest.approx(direct["fid"], rel=1e-12)
    assert quick("of_ref.npz", "--ref=a.npz")["precision"] == direct["recall"]  # also as samples
    monkeypatch.setattr(fid, "load_inception", lambda path: (inception[0], "w"))
    with pytest.raises(BadInput, match="of_ref.npz holds statistics of demo .*, not w: measure"):
        run("a.npz", "--ref=of_ref.npz")


def test_a_reference_of_statistics_alone_gives_the_distances_alone(quick, capsys):
    np.savez("a.npz", pictures())
    quick("a.npz", "--ref=a.npz", "--save_stats=full.npz")
    with np.load("full.npz") as full:
        np.savez("slim.npz", mu=full["mu"], sigma=full["sigma"], protocol=full["protocol"])
    found = quick("a.npz", "--ref=slim.npz")
    assert found["fid"] == pytest.approx(0, abs=1e-9)
    assert found["sfid"] is found["precision"] is found["recall"] is None
    assert "precision        -" in capsys.readouterr().out


def test_dinov2_leaves_out_what_it_has_no_answer_to(quick, monkeypatch, tmp_path):
    name = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"  # in place of the large one
    torch.manual_seed(0)
    torch.save(timm.create_model(name, num_classes=0, img_size=256).state_dict(), "vit.pth")
    monkeypatch.setattr(maskalign.Config, "teacher", name)
    np.savez("a.npz", pictures(4))
    found = run("a.npz", "--ref=a.npz", "--features=dinov2", "--weights=vit.pth")
    assert found["fid"] == pytest.approx(0, abs=1e-6) and found["recall"] == 1
    assert found["sfid"] is found["inception_score"] is None
    np.savez("wrong.npz", np.zeros(3))
    with pytest.raises(BadInput, match="cannot read .*wrong.npz.* pass --weights FILE"):
        run("a.npz", "--ref=a.npz", "--features=dinov2", "--weights=wrong.npz")


def light_weights():
    """Weights of the right shapes, a single number each: they need no room in a file."""
    state = shapes_of_inception()
    values = torch.linspace(0.5, 1, len(state))
    return {
        key: value.to(p.dtype).expand(p.shape)
        for (key, p), value in zip(state.items(), values, strict=True)
    }


def test_weights_with_and_without_batch_counts_load_the_same(tmp_path):
    """The full file is in the format of before torch 1.6, as the published one is."""
    state = light_weights()
    slim = {key: value for key, value in state.items() if "num_batches" not in key}
    assert (len(state), len(slim)) == (566, 472)
    torch.save(state, tmp_path / "0.pth", _use_new_zipfile_serialization=False)
    torch.save(slim, tmp_path / "1.pth")
    assert not zipfile.is_zipfile(tmp_path / "0.pth")
    first, second = (fid.load_inception(str(tmp_path / f"{i}.pth"))[0] for i in range(2))
    for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_a_damaged_copy_of_the_published_file_is_refused_by_its_name(tmp_path):
    """The format of before torch 1.6 has no checksum: a flipped bit would be another Inception."""
    beside = tmp_path / "new.pth"
    torch.save(light_weights(), beside, _use_new_zipfile_serialization=False)
    whole, digest = bytearray(beside.read_bytes()), fid.sha256([beside])
    named = tmp_path / f"pt_inception-{digest[:8]}.pth"
    named.write_bytes(whole)
    assert fid.load_inception(str(named))[1] == digest
    whole[-1] ^= 1  # of a number
    named.write_bytes(whole)
    with pytest.raises(
        BadInput, match=f"{digest[:8]}.pth is damaged or .*sha256 begins with .*: fetch it"
    ):
        fid.load_inception(str(named))


# ---- bad input: one sentence each


@pytest.mark.parametrize(
    "array, message",
    [
        (pictures().astype(np.float32), "x.npz holds arr_0 of float32 .*: it must be RGB images"),
        (pictures()[..., :1], r"arr_0 of uint8 \(40, 24, 24, 1\)"),
        (pictures()[..., 0], r"arr_0 of uint8 \(40, 24, 24\)"),
        (np.asfortranarray(pictures()), "in C order"),
        (pictures(3), "x.npz holds 3 images of 24 x 24 pixels: bring at least 4 "),
        (
            np.zeros((4, 5000, 1, 3), np.uint8),
            "4 images of 1 x 5000 pixels: .* at most 4096 pixels",
        ),
        (np.zeros((4, 0, 9, 3), np.uint8), "it must be RGB images"),
        (pictures(8, 32), r"\(24, 24\), x.npz of \(32, 32\): crop both to one size"),
    ],
)
def test_an_npz_that_cannot_be_scored_is_refused(quick, array, message):
    np.savez("x.npz", array)
    with pytest.raises(BadInput, match=message) as caught:
        quick("x.npz")
    assert "\n" not in str(caught.value)


class Trap:
    def __reduce__(self):
        return os.mkdir, ("unpickled",)


def test_objects_are_refused_and_never_unpickled(quick):
    np.savez("x.npz", np.array([Trap()] * 4, dtype=object))
    with pytest.raises(BadInput, match=r"x.npz holds arr_0 of object \(4,\)"):
        quick("x.npz")
    np.savez("x.npz", pictures(), mu=np.array([Trap()], dtype=object))
    with pytest.raises(BadInput, match="x.npz holds no arrays of numbers .*Object arrays cannot"):
        quick("x.npz")
    assert not Path("unpickled").exists()


def test_files_that_are_no_images_or_damaged_are_named(quick):
    np.savez("good.npz", pictures())
    whole = Path("good.npz").read_bytes()
    Path("cut.npz").write_bytes(whole[:5000])
    Path("text.npz").write_text("hello")
    np.savez("set.npz", pictures())
    Path("set.json").write_text("hello")
    np.savez("other.npz", y=np.zeros(4))
    with zipfile.ZipFile("short.npz", "w") as archive, zipfile.ZipFile("good.npz") as good:
        archive.writestr("arr_0.npy", good.read("arr_0.npy")[:-100])
    for name, message in (
        ("cut.npz", "'cut.npz' is neither a folder nor a readable npz"),
        ("text.npz", "'text.npz' is neither"),
        ("set.npz", "set.json beside the samples is no JSON: move it"),
        ("missing.npz", "'missing.npz' is neither a folder nor a readable npz .*No such file"),
        ("other.npz", r"other.npz holds neither images \(arr_0\) nor statistics"),
        ("short.npz", "'short.npz' is .*arr_0.npy should hold 69120 bytes and holds 69020"),
    ):
        with pytest.raises(BadInput, match=message):
            quick(name)


@pytest.mark.parametrize(
    "size, mode, message",
    [
        ((32, 24), "RGB", "2.png is RGB, 32 x 24 pixels: it must be RGB of 24 x 24 pixels, as"),
        ((24, 24), "L", "2.png is L, 24 x 24 pixels"),
        ((24, 24), "RGBA", "2.png is RGBA, .*; convert, crop or remove it"),
        (None, None, "2.png is no readable image: mend or remove it"),
    ],
)
def test_a_folder_with_an_odd_image_is_refused_before_work(quick, size, mode, message):
    for i in (1, 10, 3, 4):
        png(Path("x", f"{i}.png"))
    if mode:
        png(Path("x/2.png"), *size, mode=mode)
    else:
        Path("x/2.png").write_text("hello")
    with pytest.raises(BadInput, match=message):
        quick("x")
    Path("empty").mkdir()
    with pytest.raises(BadInput, match="empty holds no images: name a folder of .jpg"):
        quick("empty")


EYE, ONES, PART = np.eye(64), np.ones(64), np.ones((9, 64))


@pytest.mark.parametrize(
    "arrays, message",
    [
        (dict(mu=ONES), "x.npz holds statistics that are damaged: measure .*KeyError: 'sigma'"),
        (dict(mu=ONES, sigma=EYE, sigma_s=EYE), "statistics that are damaged.*'mu_s'"),
        (dict(mu=np.float64(1), sigma=EYE), r"mu is torch.float64 \(\), for \(64,\)"),
        (dict(mu=ONES[:9], sigma=EYE[:9, :9]), r"mu is torch.float64 \(9,\), for \(64,\)"),
        (dict(mu=ONES, sigma=EYE[:, :9]), r"sigma is torch.float64 \(64, 9\), for \(64, 64\)"),
        (dict(mu=ONES * np.nan, sigma=EYE), "mu is .*, or not finite"),
        (dict(mu=ONES + 1j, sigma=EYE), "mu is torch.complex128"),
        (dict(mu=ONES, sigma=EYE, features=PART[:3]), r"features is .* \(3, 64\), for \(4, 64\)"),
        (dict(mu=ONES, sigma=EYE, features=PART[:, :3]), r"features is .* \(9, 3\), for \(9, 64\)"),
        (dict(mu=ONES.astype(str), sigma=EYE), "x.npz holds no arrays of numbers"),
        (dict(mu=ONES, sigma=EYE, protocol="hello"), "holds no arrays of numbers .*JSON"),
        (dict(mu=ONES, sigma=EYE, protocol="[1, 2]"), "holds no arrays of numbers .*TypeError"),
        (dict(sigma=EYE), "x.npz holds neither images .* nor statistics"),
    ],
)
def test_statistics_that_do_not_fit_are_refused_before_work(arrays, message, tmp_path):
    about, path = dict(features="inception", weights="w"), str(tmp_path / "x.npz")
    np.savez(path, **arrays)
    with pytest.raises(BadInput, match=message) as caught:
        fid.stored_statistics(fid.open_images(path), about, [64, 36])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("shape", [(10**12,), (-64,), (63,)])
def test_an_array_that_promises_more_than_its_file_holds_is_refused_unread(shape, tmp_path):
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive, archive.open("mu.npy", "w") as file:
        header = dict(descr="<f8", fortran_order=False, shape=shape)
        np.lib.format.write_array_header_1_0(file, header)
        file.write(ONES.tobytes())
    with pytest.raises(BadInput, match="mu.npy should hold .* bytes and holds 512"):
        fid.open_images(str(tmp_path / "x.npz"))


def test_nothing_keeps_it_waiting_and_no_part_of_a_folder_is_passed_over(tmp_path, monkeypatch):
    for i in range(4):
        png(tmp_path / f"x/sub/{i}.png")
    png(tmp_path / "x/\u00b23.png")  # a digit, but no number
    (tmp_path / "x/4.png").symlink_to(tmp_path / "x/sub/0.png")
    folder = str(tmp_path / "x")
    assert fid.open_images(folder).count == 6
    (tmp_path / "x/link").symlink_to(tmp_path)  # followed, it would never end
    with pytest.raises(BadInput, match="x cannot be read as a whole: .*link in .* is a link to a"):
        fid.open_images(folder)
    os.unlink(tmp_path / "x/link")
    for name, make in (("a.png", os.mkfifo), ("b.png", lambda path: os.symlink("/dev/zero", path))):
        make(tmp_path / "x" / name)
        with pytest.raises(BadInput, match=f"{name} is no readable image: .*no regular file"):
            fid.open_images(folder)
        os.unlink(tmp_path / "x" / name)
    os.mkfifo(tmp_path / "x.npz")
    for path in (tmp_path / "x.npz", ""):
        with pytest.raises(BadInput, match="is neither a folder nor a readable npz"):
            fid.open_images(str(path))
    (tmp_path / "x/a.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    with pytest.raises(
        BadInput, match="cannot identify image file"
    ):  # else Pillow runs Ghostscript
        fid.open_images(folder)

    real = os.scandir

    def closed(path):
        if str(path).endswith("sub"):
            raise PermissionError(13, "Permission denied", path)
        return real(path)

    monkeypatch.setattr(os, "scandir", closed)
    with pytest.raises(BadInput, match="x cannot be read as a whole: .*Permission denied: .*sub"):
        fid.open_images(folder)


def test_too_few_points_and_statistics_that_do_not_fit_are_refused():
    with pytest.raises(BadInput, match="3 images are too few .* k = 3: bring at least 4"):
        fid.precision_recall(torch.zeros(9, 2), torch.zeros(3, 2))
    eye = np.eye(3)
    for given in ((eye[0], eye, eye[0, :2], eye[:2, :2]), (eye[0] * np.nan, eye, eye[0], eye)):
        with pytest.raises(BadInput, match="do not compare, or are not finite: measure both"):
            fid.frechet_distance(*given)


def test_features_that_are_not_finite_are_refused(quick, monkeypatch):
    np.savez("a.npz", pictures())
    real = fid.extract

    def broken(net, images):
        features, spatial = real(net, images)
        features[7 % len(features)] = float("nan")
        return features, spatial

    monkeypatch.setattr(fid, "extract", broken)
    with pytest.raises(BadInput, match="image 7 of a.npz has features that are not finite"):
        quick("a.npz")


def test_a_wrong_weights_file_is_refused(tmp_path, monkeypatch):
    state, net = light_weights(), fid.FIDInception()
    monkeypatch.setattr(fid, "FIDInception", lambda: net)  # none of them gets into it
    wrong = {
        "empty": {},
        "part": {k: v for k, v in state.items() if "Mixed_6b" not in k},
        "more": {**state, "AuxLogits.fc.bias": torch.zeros(3)},
        "classes": {**state, "fc.weight": torch.zeros(1000, 2048)},
        "list": [1, 2],
    }
    for name, content in wrong.items():
        torch.save(content, tmp_path / name)
        with pytest.raises(BadInput, match=f"{name} holds no FID Inception: pass pt_incep") as e:
            fid.load_inception(str(tmp_path / name))
        assert "\n" not in str(e.value)
    with pytest.raises(BadInput, match="cannot read .*missing"):
        fid.load_inception(str(tmp_path / "missing"))


def test_offline_without_weights_the_way_out_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def offline(*args, **kwargs):
        raise OSError("Name or service not known")

    monkeypatch.setattr(fid.urllib.request, "urlopen", offline)
    with pytest.raises(BadInput, match="cannot download https.*6726825d.pth: .*--weights FILE"):
        fid.load_inception()


@pytest.mark.parametrize(
    "argv, message",
    [
        (["x.npz"], "--ref is missing: name one, or --save_stats"),
        (["x.npz", "--save_stats="], "--ref is missing"),
        (["x.npz", "--features=demo", "--weights=w"], "weights is w: it must be left out"),
        (["x.npz", "--save_stats=y.pt"], "save_stats is y.pt: it must be a new file that ends"),
        (["x.npz", "--save_stats=x.npz"], "save_stats is x.npz: it must be a new file"),
        (["x.npz", "--save_stats=./x.npz"], "save_stats is ./x.npz: it must be a new file"),
        (["x.npz", "--ref=y.npz", "--json=x.json"], "json is x.json: it must be a new file"),
        (
            ["x.npz", "--ref=y.npz", "--json=y.npz"],
            "json is y.npz: it must be a new file that ends with .json",
        ),
        (["x.npz", "--ref=y.npz", "--json="], "json is : it must be a new file"),
        (["x.npz", "--ref=y.npz", "--json=no/x.json"], "json .* in a folder that exists"),
        (["x.npz", "--ref=y.npz", "--batch_size=0"], "batch_size is 0: it must be above 0"),
    ],
)
def test_bad_flags_are_one_sentence(argv, message, tmp_path, monkeypatch):
    """In a folder where x.npz and x.json are there: nothing is replaced."""
    monkeypatch.chdir(tmp_path)
    for name in ("x.npz", "x.json"):
        Path(name).write_text("{}")
    with pytest.raises(BadInput, match=message):
        fid.parse_args(argv)


def test_the_command_ends_with_the_sentence(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["fid.py", "nothing.npz", "--ref=nothing.npz"])
    with pytest.raises(
        SystemExit, match="^fid.py: 'nothing.npz' is neither a folder nor a readable"
    ):
        fid.main()
