"""Deterministic fixtures for testing a five-metric (FID, sFID, IS, Precision, Recall) tool.

Everything here is a pure function of small integers and strings: no random generator, no
transcendental function, no data file except fid.json.  Only integer arithmetic, exact
power-of-two scaling and IEEE-754 double + - * / sqrt are used, so every platform produces the same
bits (`python fid_formula.py` checks this against the sha256 values kept in fid.json).

    state_dict(shapes, seed)        synthetic weights for the FID Inception, from {name: shape}
    images(which, name)             uint8 [N,H,W,3] image set 'A'...'D'
    resize_cases(which)             single images for the 299x299 resize
    frechet_cases, pr_cases, is_cases(which)   inputs for the pure statistics
    load(which)                     the golden numbers, which = 'public' (or another set there)

The numbers in fid.json (or the file named by $FID_GOLDEN) were computed with the original tools;
its 'about' entry describes every field.  The definition of the public set is in this file; that of
any other set is in the json file itself, so this file can be handed out alone.
"""

import hashlib
import json
import os

import numpy as np

GOLDEN = os.environ.get(
    "FID_GOLDEN", os.path.join(os.path.dirname(os.path.abspath(__file__)), "fid.json")
)
_GAMMA = np.uint64(0x9E3779B97F4A7C15)


# ------------------------------------------------------------------------------- integer hashing


def fnv1a(text):
    """64-bit FNV-1a hash of a string, as a Python int."""
    h = 14695981039346656037
    for byte in text.encode("utf-8"):
        h = ((h ^ byte) * 1099511628211) & 0xFFFFFFFFFFFFFFFF
    return h


def hash_ints(tag, n):
    """n int64 numbers in [-2**23, 2**23): element i is the top 24 bits of a splitmix64 step."""
    with np.errstate(over="ignore"):
        z = np.uint64(fnv1a(tag)) + np.arange(1, n + 1, dtype=np.uint64) * _GAMMA
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return (z >> np.uint64(40)).astype(np.int64) - (1 << 23)


def uniform(tag, shape):
    """float64 numbers in [-1, 1), multiples of 2**-23 (hence exact in float32 too)."""
    shape = tuple(int(s) for s in np.atleast_1d(shape)) if not isinstance(shape, tuple) else shape
    return (hash_ints(tag, int(np.prod(shape, dtype=np.int64))) / 8388608.0).reshape(shape)


# --------------------------------------------------------------------------------- weight formula


def weight(name, shape, seed):
    """The synthetic value of one state-dict entry (numpy array) from its name, shape and seed.

    *.num_batches_tracked   int64 0
    *.bn.weight             1 + u/4            in [0.75, 1.25)
    *.bn.bias               u/8
    *.bn.running_mean       u/16
    *.bn.running_var        1 + u/2            in [0.5, 1.5)
    *.conv.weight           GAIN * sqrt(6/fan_in) * u (He-uniform) with each filter's mean removed
                            (half of it in the first layer; exact integer sums), so that random
                            features do not collapse on their common positive part; GAIN is 1.15
                            but for the modules listed in GAINS
    fc.weight               u * FC_GAIN / sqrt(in_features)
    fc.bias                 4 * u
    """
    shape = tuple(int(s) for s in shape)
    if name.endswith("num_batches_tracked"):
        return np.zeros(shape, np.int64)
    tag = f"weights/{seed}/{name}"
    if name == "fc.bias":
        w = uniform(tag, shape) * 4
    elif name == "fc.weight":
        w = uniform(tag, shape) * (FC_GAIN / np.sqrt(float(shape[1])))
    elif name.endswith("bn.weight"):
        w = 1.0 + uniform(tag, shape) / 4
    elif name.endswith("bn.bias"):
        w = uniform(tag, shape) / 8
    elif name.endswith("running_mean"):
        w = uniform(tag, shape) / 16
    elif name.endswith("running_var"):
        w = 1.0 + uniform(tag, shape) / 2
    elif len(shape) == 4:
        fan_in = int(np.prod(shape[1:]))
        k = hash_ints(tag, shape[0] * fan_in).reshape(shape[0], fan_in)
        part = 1 if name.startswith("Conv2d_1a") else 2  # half of the mean, or all of it
        k = 2 * fan_in * k - part * k.sum(1, keepdims=True)  # int64, exact
        gain = GAINS.get(name.split(".")[0], 1.15)
        w = (k / (2 * fan_in * 8388608.0)) * (gain * np.sqrt(6.0 / fan_in))
        w = w.reshape(shape)
    else:
        raise ValueError(f"no formula for {name} {shape}")
    return w.astype(np.float32)


FC_GAIN = 16.0
GAINS = {"Conv2d_1a_3x3": 2.0, "Mixed_7c": 0.75}


def state_dict(shapes, seed):
    """{name: numpy array} for {name: shape}; wrap with torch.from_numpy to load into a module."""
    return {name: weight(name, shape, seed) for name, shape in shapes.items()}


# ---------------------------------------------------------------------------------- image formula


def _triangle(v):
    v = v & 511
    return np.where(v < 256, v, 511 - v)


def image(tag, height, width, style):
    """One uint8 [height,width,3] picture: gradient + stripes + checkerboard + disc + grain.

    Coordinates are scaled to 0..1023 first, so a picture has the same content at every size (the
    grain apart).  `style` (0..255) shifts the distribution: colours, stripe rate and grain.
    """
    p = (hash_ints(tag, 48) + (1 << 23)).tolist()  # 48 numbers in [0, 2**24)

    def r(i, n):
        """An integer in [0, n)."""
        return (p[i] * n) >> 24

    def colour(i):
        return np.array([r(i, 256), r(i + 1, 256), r(i + 2, 256)], np.int64)[None, None, :]

    y = ((2 * np.arange(height, dtype=np.int64) + 1) * 512 // height)[:, None, None]
    x = ((2 * np.arange(width, dtype=np.int64) + 1) * 512 // width)[None, :, None]
    # smooth background: bilinear blend of four corner colours
    img = (
        colour(0) * (1023 - x) * (1023 - y)
        + colour(3) * x * (1023 - y)
        + colour(6) * (1023 - x) * y
        + colour(9) * x * y
    ) // (1023 * 1023)
    img = (img * (160 + r(12, 96)) + style * 64) // 256
    # stripes of triangular profile in any direction
    amp = r(13, 120)
    fx, fy = r(14, 12 + style // 16) - 6, r(15, 12 + style // 16) - 6
    wave = _triangle(x * fx + y * fy + r(16, 512)) - 128
    img = img + wave * amp * (colour(17) - 96) // 32768
    # checkerboard on part of the images
    if r(20, 4) == 0:
        cell = 32 + r(21, 160)
        board = ((x // cell + y // cell) & 1) * 2 - 1
        img = img + board * (16 + r(22, 48))
    # up to three discs
    for d in range(r(23, 4)):
        cx, cy, rad = r(24 + 4 * d, 1024), r(25 + 4 * d, 1024), 80 + r(26 + 4 * d, 300)
        inside = ((x - cx) ** 2 + (y - cy) ** 2) < rad * rad
        img = np.where(inside, (img + 3 * colour(36 + 3 * d)) // 4, img)
    # per-pixel grain
    grain = 4 + r(47, 24) + style // 8
    noise = hash_ints(tag + "/grain", height * width * 3).reshape(height, width, 3) >> 12
    img = img + noise * grain // 2048
    return np.clip(img, 0, 255).astype(np.uint8)


PUBLIC = {  # image sets: name -> [number of images, height, width, style, seed]
    "sets": {
        "A": [64, 64, 64, 40, 1],
        "B": [64, 64, 64, 90, 2],
        "C": [32, 256, 256, 40, 3],
        "D": [24, 256, 256, 100, 4],
    },
    "weight_seed": 20151205,
    "variant": 0,
}


def definition(which):
    """{'sets', 'weight_seed', 'variant'} of a golden set."""
    return PUBLIC if which == "public" else load(which)["definition"]


def images(which, name):
    """uint8 [N,H,W,3]: the image set `name` ('A'...'D') of the golden set `which`."""
    n, h, w, style, seed = definition(which)["sets"][name]
    # three pictures in four have the style of the set, the fourth a neutral one
    return np.stack([image(f"images/{seed}/{i}", h, w, style if i % 4 else 64) for i in range(n)])


def resize_cases(which):
    """{case: uint8 [H,W,3]} single images of many sizes, non-square ones included."""
    q = definition(which)["variant"]
    sizes = [
        (32, 32),
        (64, 64),
        (256, 256),
        (299, 299),
        (512, 512),
        (72 + 9 * q, 96),
        (300, 47 + q),
        (5, 7),
        (1, 1),
    ]
    return {f"{h}x{w}": image(f"resize/{which}/{h}x{w}", h, w, 70) for h, w in sizes}


# ------------------------------------------------------------- inputs for the pure statistics


def cloud(tag, kind, n, d, **kw):
    """float32 [n,d] feature clouds, each value exactly representable.

    'uniform'  u * scale + shift
    'lattice'  integers in [-half, half): many ties and exact duplicates
    'feature'  Inception-like: max(0, rank-`rank` mixture + noise + offset), all integer arithmetic,
               then multiplied by scale / 2048 (scale a power of two); `shift` moves the offset
    """
    if kind == "uniform":
        return (uniform(tag, (n, d)) * kw.get("scale", 1.0) + kw.get("shift", 0.0)).astype(
            np.float32
        )
    if kind == "lattice":
        half = kw["half"]
        return ((hash_ints(tag, n * d) * half) >> 23).reshape(n, d).astype(np.float32)
    if kind == "feature":
        rank = kw["rank"]
        z = (sum(hash_ints(f"{tag}#{k}", n * rank) for k in range(3)) >> 14).reshape(n, rank)
        load = (hash_ints(f"feature-loadings/{d}/{rank}", rank * d) >> 17).reshape(rank, d)
        offset = (hash_ints(f"feature-offset/{d}", d) >> 13) + kw.get("shift", 0)
        noise = (hash_ints(tag + "/noise", n * d) >> 13).reshape(n, d)
        x = ((z @ load) >> 5) + noise + offset[None, :]
        return (np.maximum(x, 0) * (kw.get("scale", 1) / 2048.0)).astype(np.float32)
    raise ValueError(kind)


def logits(tag, n, classes, gain, groups):
    """float32 [n,classes]: uniform noise plus a peak of height `gain` at class hash(i) % groups."""
    x = uniform(tag, (n, classes)) * 2
    top = (hash_ints(tag + "/top", n) + (1 << 23)) % groups
    x[np.arange(n), top] += gain * (1 + uniform(tag + "/height", (n,)) / 2)
    return x.astype(np.float32)


def factor(tag, rank, d, zero_from=None):
    """int64 [rank,d] factor M of a covariance M^T M / 2**16; columns >= zero_from are zero."""
    m = (hash_ints(tag, rank * d) >> 15).reshape(rank, d)
    if zero_from is not None:
        m[:, zero_from:] = 0
    return m


def gaussian(tag, d, rank, mu_scale=1.0, zero_from=None):
    """(mu [d], sigma [d,d]) float64 with rank(sigma) <= rank; sigma is exact (integers / 2**16)."""
    m = factor(tag, rank, d, zero_from)
    return uniform(tag + "/mu", (d,)) * mu_scale, (m.T @ m).astype(np.float64) / 65536.0


# ---------------------------------------------------------------------- the cases of fid.json


def frechet_cases(which):
    """{case: (mu1, sigma1, mu2, sigma2)}"""
    s, q = f"frechet/{which}", definition(which)["variant"]

    def g(name, *args, **options):
        return gaussian(f"{s}/{name}", *args, **options)

    d, e = 12 + 5 * q, 64 + 16 * q
    one = (np.array([0.5]), np.array([[2.25]]), np.array([-1.0]), np.array([[0.25]]))
    diag1, diag2 = (
        (np.arange(1, d + 1) % 5).astype(np.float64) ** 2,
        (np.arange(d) % 4).astype(np.float64) ** 2,
    )
    out = {
        "one_dim": one,  # 2.25 + (1.5-0.5)^2 = 3.25
        "diagonal_singular": (np.zeros(d), np.diag(diag1), np.full(d, 0.25), np.diag(diag2)),
        "full_rank": g("a", d, 3 * d) + g("b", d, 3 * d),
        "identical": g("a", d, 3 * d) * 2,
        "sigma2_zero": g("a", d, 3 * d) + (g("b", d, 1)[0], np.zeros((d, d))),
        "rank_one_pair": g("r1", d, 1) + g("r2", d, 1),
        "both_singular": g("s1", e, e // 3) + g("s2", e, e // 4),
        "singular_and_full": g("s3", e, e // 3) + g("f", e, 4 * e),
        "zero_columns": g("z1", e, 2 * e, zero_from=e - 9) + g("z2", e, 2 * e, zero_from=e - 5),
        "large_full_rank": g("l1", 3 * e, 6 * e) + g("l2", 3 * e, 5 * e),
        "large_singular": g("m1", 6 * e, e) + g("m2", 6 * e, e + 7),
    }
    return {k: tuple(v) for k, v in out.items()}


def pr_cases(which):
    """{case: (reference features, sample features)}"""
    s = f"pr/{which}"
    q = definition(which)["variant"]

    def c(name, *args, **options):
        return cloud(f"{s}/{name}", *args, **options)

    return {
        "plane": (
            c("p1", "uniform", 300 + 50 * q, 2),
            c("p2", "uniform", 400 - 70 * q, 2, scale=0.75, shift=0.5),
        ),
        "cloud64": (
            c("c1", "uniform", 350, 64),
            c("c2", "uniform", 280 + 60 * q, 64, scale=1.02, shift=0.05),
        ),
        "lattice_ties": (
            c("l1", "lattice", 260, 3, half=5 + q),
            c("l2", "lattice", 310, 3, half=6 + q),
        ),
        "lattice_duplicates": (
            c("d1", "lattice", 200, 2, half=3 + q),
            c("d2", "lattice", 150, 2, half=5 + q),
        ),
        "tiny_sets": (c("t1", "uniform", 4, 3), c("t2", "uniform", 5 + q, 3)),
        "feature256": (
            c("f1", "feature", 900, 256, rank=16),
            c("f2", "feature", 800 + 150 * q, 256, rank=16, shift=40),
        ),
        "feature2048": (
            c("g1", "feature", 500 + 40 * q, 2048, rank=24, scale=0.5),
            c("g2", "feature", 450, 2048, rank=24, scale=0.5, shift=20),
        ),
        "fp16_overflow": (
            c("o1", "feature", 300, 256, rank=16, scale=32),
            c("o2", "feature", 320 + 20 * q, 256, rank=16, scale=32, shift=40),
        ),
    }


def is_cases(which):
    """{case: (logits, split_size)}"""
    s = f"is/{which}"
    q = definition(which)["variant"]
    return {
        "one_split": (logits(f"{s}/a", 230 + 20 * q, 50, 5.0, 7), 5000),
        "three_splits_last_short": (logits(f"{s}/a", 230 + 20 * q, 50, 5.0, 7), 100),
        "classes1008": (logits(f"{s}/b", 300, 1008, 12.0, 40 + 9 * q), 125),
        "two_full_splits_of_5000": (logits(f"{s}/c", 10000, 20, 4.0, 11 + q), 5000),
        "one_image": (logits(f"{s}/d", 1, 30, 3.0, 5), 5000),
        "saturated": (
            logits(f"{s}/e", 64, 40, 300.0, 9 + q),
            5000,
        ),  # float32 softmax underflows to 0
    }


# ------------------------------------------------------------------------------------------ golden


def load(which=None):
    """The golden file as a dict, or one of its sets, for example 'public'."""
    with open(GOLDEN) as fh:
        data = json.load(fh)
    return data if which is None else data[which]


def digest(array):
    """sha256 of dtype, shape and bytes (little-endian, C order)."""
    a = np.ascontiguousarray(array)
    return hashlib.sha256(f"{a.dtype.str}{a.shape}".encode() + a.tobytes()).hexdigest()


def probe_vector(n):
    """The fixed direction used to condense features: a[i] = uniform('probe')[i]."""
    return uniform("probe", (n,))


def condense(features):
    """A few numbers that pin down a feature matrix [N,D] (float64 arithmetic): see fid.json."""
    f = np.asarray(features, np.float64)
    n, d = f.shape
    cols = np.linspace(0, d - 1, 12).astype(np.int64)
    return {
        "shape": [int(n), int(d)],
        "columns": cols.tolist(),
        "rows": [0, 1, int(n - 1)],
        "values": f[[0, 1, n - 1]][:, cols].tolist(),
        "row_norms": np.sqrt((f * f).sum(1)).tolist(),
        "row_probe": (f @ probe_vector(d)).tolist(),
        "mean": float(f.mean()),
        "mean_probe": float(f.mean(0) @ probe_vector(d)),
        "cov_trace": float(f.var(0, ddof=1).sum()),
        "cov_probe": float((f @ probe_vector(d)).var(ddof=1)),
    }


def self_check():
    for name, want in load("public")["digests"]["images"].items():
        assert digest(images("public", name)) == want, name
    print("image sets reproduce bit for bit")


if __name__ == "__main__":
    self_check()
