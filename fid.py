"""FID, sFID, Inception Score, precision and recall: the five numbers of the papers, in PyTorch.

  python fid.py samples.npz --ref VIRTUAL_imagenet256_labeled.npz    ADM's reference of the papers
  python fid.py FOLDER --ref FOLDER2 --json scores.json              images at any depth
  python fid.py FOLDER2 --save_stats ref.npz                         to measure a reference once
  python fid.py samples.npz --features demo                          the demo: nothing to download
  torchrun --nproc_per_node=8 fid.py samples.npz --ref REF           processes share the images

The numbers of ADM's evaluator (guided-diffusion, TensorFlow 1), but exact where ADM rounds
distances between features to float16 (worth about 0.002 in precision and recall) and where it ends
with an error (fewer images than features). --features dinov2 compares features of our teacher:
Inception misjudges what diffusion models are good at (Stein et al. 2023, arXiv 2306.04675).
"""

import argparse
import hashlib
import json
import math
import os
import re
import sys
import urllib.request
import zipfile
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.models.inception import BasicConv2d, Inception3
from tqdm import tqdm

import maskalign as ma
from maskalign import BadInput, explained

WEIGHTS_URL = (  # the name ends as its sha256 begins
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
    "pt_inception-2015-12-05-6726825d.pth"
)
STATISTICS = ("mu", "sigma", "mu_s", "sigma_s")  # ADM's names; _s: spatial, for sFID
# Pillow knows more, and starts programs for some of them.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "PPM", "TIFF", "GIF", "AVIF", "JPEG2000")
LARGEST = 4096  # pixels a side, so that a batch fits into memory


# ---- 1. The FID Inception: the network behind every published FID --------------------------------
def resize_tf1(images: Tensor, size: int = 299) -> Tensor:
    """Bilinear resize of TensorFlow 1: (N, C, H, W) -> float32 (N, C, size, size), range kept.
    Output pixel i looks at i * H / size, where F.interpolate looks at (i + 0.5) * H / size - 0.5.
    No antialias, no rounding. The order of operations is TensorFlow's: on CPU equal to the bit."""
    x = images.float()
    for dim in (-1, -2):  # along x, then along y
        last = x.shape[dim] - 1
        place = torch.arange(size, device=x.device) * torch.tensor((last + 1) / size).to(x.device)
        low = place.long()
        high = (low + 1).clamp(max=last)
        weight = place - low if dim == -1 else (place - low)[:, None]
        left, right = x.index_select(dim, low), x.index_select(dim, high)
        x = left + (right - left) * weight
    return x


def mixed(block: nn.Module, x: Tensor, pooled: Tensor) -> Tensor:
    """A block of Inception, wired by the names of its layers: branches side by side, then joined.
    branch3x3dbl_2 follows branch3x3dbl_1; both _3a and _3b follow _2. The branch of `pooled`, x
    after the pooling of this block, ends in branch_pool where there is one."""
    outs = {}
    for name, layer in block.named_children():
        branch, _, place = name.partition("_")
        if place == "pool":
            pooled = layer(pooled)
        elif place.endswith("a"):
            side = layer(outs[branch])
        elif place.endswith("b"):
            outs[branch] = torch.cat([side, layer(outs[branch])], dim=1)
        else:
            outs[branch] = layer(outs.get(branch, x))
    return torch.cat([*outs.values(), pooled], dim=1)


class FIDInception(Inception3):
    """The Inception of 2015-12-05: uint8 (N, 3, H, W) -> pool (N, 2048), spatial (N, 2023).
    Layers and state-dict keys are torchvision's, the way through them is not: average pools leave
    the padding out, Mixed_7c pools by the maximum, and there are 1008 classes."""

    def __init__(self):
        super().__init__(num_classes=1008, aux_logits=False, init_weights=False)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        x = (resize_tf1(images) - 128) / 128
        for name, layer in list(self.named_children())[:-3]:  # not avgpool, dropout, fc
            if name in ("Mixed_6a", "Mixed_7a"):  # these halve the image
                x = mixed(layer, x, F.max_pool2d(x, 3, 2))
            elif name == "Mixed_7c":
                x = mixed(layer, x, F.max_pool2d(x, 3, 1, padding=1))
            elif name.startswith("Mixed"):
                x = mixed(layer, x, F.avg_pool2d(x, 3, 1, padding=1, count_include_pad=False))
            else:
                x = layer(x)
            if name == "Mixed_6d":  # ADM's mixed_6/conv[..., :7]: the first branch comes first
                spatial = x[:, :7].permute(0, 2, 3, 1).flatten(1)  # order: row, column, channel
        return x.mean(dim=(2, 3)), spatial


def find_inception(path: str = "") -> Path:
    """The file of the weights: `path`, or the published one, downloaded once. Raises BadInput."""
    cached = Path(torch.hub.get_dir(), "checkpoints", WEIGHTS_URL.rpartition("/")[2])
    if path or cached.exists():
        return Path(path or cached)
    advice = "run once with internet, or pass --weights FILE"
    with explained(f"cannot download {WEIGHTS_URL}: {advice}"):
        urllib.request.urlopen(WEIGHTS_URL, timeout=10).close()  # offline: known quickly
        torch.hub.load_state_dict_from_url(WEIGHTS_URL, check_hash=True, weights_only=True)
    return cached


def load_inception(path: str = "") -> tuple[FIDInception, str]:
    """The network ready for use, and the hash of its weights file: see find_inception.
    Raises BadInput: offline without a file, a damaged file, or one of something else."""
    path, net = find_inception(path), FIDInception()
    state, digest = ma.read_weights(str(path)), sha256([path])
    # The published file is of a format without a checksum: only its name can tell.
    told = re.search(r"-([0-9a-f]{8})\.pth$", path.name)
    if told and not digest.startswith(told[1]):
        told = f"not what its name says, as its sha256 begins with {digest[:8]}"
        raise BadInput(f"{path} is damaged or {told}: fetch it anew from {WEIGHTS_URL}")
    with explained(f"{path} holds no FID Inception: pass {WEIGHTS_URL.rpartition('/')[2]}"):
        # A file may leave out the counts of batches, which nothing reads.
        unread = {key: value for key, value in net.state_dict().items() if "num_batches" in key}
        net.load_state_dict({**unread, **state})

    # Batch norm folded into the convolution, channels last: both make it twice as fast on CPU.
    for layer in net.eval().requires_grad_(False).modules():
        if isinstance(layer, BasicConv2d):
            layer.conv, layer.bn = fuse_conv_bn_eval(layer.conv, layer.bn), nn.Identity()
    return net.to(memory_format=torch.channels_last), digest


# ---- 2. The metrics: functions of features, in float64 -------------------------------------------
def add_moments(sums: Tensor, x: Tensor) -> None:
    """Adds features (n, D) to sums (D + 1, D + 1) of x x^T, x and 1; sums of processes add up."""
    x = F.pad(x.double(), (0, 1), value=1.0)
    sums.addmm_(x.T, x)


def mean_and_covariance(sums: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (D,) and covariance (D, D), with ddof 1, of everything added to `sums`."""
    n, mu = sums[-1, -1], sums[-1, :-1] / sums[-1, -1]
    return mu, (sums[:-1, :-1] - n * torch.outer(mu, mu)) / (n - 1)


def covariance_factor(sigma: Tensor) -> Tensor:
    """F (D, rank) with sigma = F F^T. It leaves out the null space, where roots would make rounding
    visible: so singular covariances are no special case."""
    values, vectors = torch.linalg.eigh((sigma + sigma.T) / 2)
    keep = values > values[-1] * len(sigma) * torch.finfo(values.dtype).eps
    return vectors[:, keep] * values[keep].sqrt()


def frechet_distance(mu1, sigma1, mu2, sigma2) -> float:
    """|mu1 - mu2|^2 + tr sigma1 + tr sigma2 - 2 tr (sigma1 sigma2)^(1/2), of (D,) and (D, D).
    The last trace is the sum of the singular values of F1^T F2: see covariance_factor.
    Raises BadInput for other shapes, and for numbers that are not finite."""
    given = [torch.as_tensor(x).double().cpu() for x in (mu1, sigma1, mu2, sigma2)]
    shapes, d = [tuple(x.shape) for x in given], len(given[0])
    if shapes != 2 * [(d,), (d, d)] or not all(x.isfinite().all() for x in given):
        advice = "measure both sets anew, with the same --features"
        raise BadInput(f"statistics of shapes {shapes} do not compare, or are not finite: {advice}")
    mu1, sigma1, mu2, sigma2 = given
    cross = torch.linalg.svdvals(covariance_factor(sigma1).T @ covariance_factor(sigma2)).sum()
    distance = (mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * cross
    return max(distance.item(), 0.0)  # equal sets: about -1e-13


def inception_score(logits: Tensor, split_size: int = 5000) -> float:
    """exp of the mean of KL(p(class | image) || p(class)), averaged over splits of the images.
    logits (N, classes) in the order of the files: images sorted by class would spoil the score of
    more than one split. A short last split counts as the others do, as in ADM."""
    scores = []
    for split in logits.split(split_size):
        log_p = split.double().log_softmax(dim=1)
        log_marginal = log_p.logsumexp(dim=0) - math.log(len(split))
        divergence = (log_p.exp() * (log_p - log_marginal)).sum(dim=1)
        scores.append(divergence.mean().exp().item())
    return sum(scores) / len(scores)


def squared_distances(u: Tensor, v: Tensor) -> Tensor:
    """float64 (n, D), (m, D) -> (n, m); what is mere rounding becomes 0, as duplicates need."""
    norms = u.square().sum(dim=1)[:, None] + v.square().sum(dim=1)
    distances = norms - 2 * u @ v.T
    return distances.where(distances > 1e-12 * norms, 0.0)


def squared_radii(x: Tensor, k: int) -> Tensor:
    """(n, D) -> (n,): from each point to its k-th nearest neighbour, 256 rows at a time."""
    # The nearest of all is the point itself: hence k + 1.
    return torch.cat([squared_distances(r, x).kthvalue(k + 1).values for r in x.split(256)])


def precision_recall(ref: Tensor, sample: Tensor, k: int = 3) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al. 2019) of features (R, D) and (N, D).
    Around every point lies a ball that reaches to its k-th nearest neighbour in its own set.
    Precision is the share of the sample inside balls of the reference, recall the converse.
    Exact. Raises BadInput for k images or fewer."""
    fewest = min(len(ref), len(sample))
    if fewest <= k:
        raise BadInput(f"{fewest} images are too few for k = {k}: bring at least {k + 1}")
    ref, sample = ref.double(), sample.double()
    ref_radii, sample_radii = squared_radii(ref, k), squared_radii(sample, k)
    hits, recalled = 0, torch.zeros(len(ref), dtype=torch.bool, device=ref.device)
    for rows, radii in zip(sample.split(256), sample_radii.split(256), strict=True):
        distances = squared_distances(rows, ref)  # (256, R)
        hits += (distances <= ref_radii).any(dim=1).sum().item()
        recalled |= (distances <= radii[:, None]).any(dim=0)
    return hits / len(sample), recalled.sum().item() / len(ref)


# ---- 3. Images: an npz or a folder, read batch by batch ------------------------------------------
# source: path of an npz, list of files, or tensor (count, H, W, 3); size: (H, W), or None and count
# 0 for an npz that holds statistics alone.
Images = namedtuple("Images", "name source count size")


def open_images(path: str, rank: int = 0) -> Images:
    """The Images of a folder, at any depth and in natural order, or of an npz. Looks at headers
    alone. Raises BadInput for what is not uint8 RGB, and for too few or too large images."""
    images = open_folder(path, rank) if os.path.isdir(path) else open_npz(path)
    if images.size and (images.count < 4 or max(images.size) > LARGEST):
        found = f"{images.count} images of {images.size[1]} x {images.size[0]} pixels"
        rule = f"at least 4 (k is 3, of precision and recall), at most {LARGEST} pixels a side"
        raise BadInput(f"{path} holds {found}: bring {rule}")
    return images


def open_folder(path: str, rank: int = 0) -> Images:
    """The Images of a folder, all of the first one's size. Raises BadInput."""
    found, errors = [], []
    for folder, inner, names in os.walk(path, onerror=errors.append):
        found += [Path(folder, name) for name in names]
        links = [name for name in inner if os.path.islink(os.path.join(folder, name))]
        errors += [f"{name} in {folder} is a link to a folder" for name in links]
    if errors:
        raise BadInput(f"{path} cannot be read as a whole: mend it, or name another ({errors[0]})")
    files = [file for file in found if file.suffix.lower() in ma.IMAGE_SUFFIXES]
    if not files:
        raise BadInput(f"{path} holds no images: name a folder of {', '.join(ma.IMAGE_SUFFIXES)}")
    if rank == 0 and len(found) > len(files):
        print(f"{path}: skipped {len(found) - len(files)} files that are no images by their names")
    numbers = re.compile(r"(\d+)")  # 9.png is before 10.png
    files.sort(key=lambda file: [int(s) if s.isdecimal() else s for s in numbers.split(str(file))])
    size = read_image(files[0]).shape[:2]
    for file in files:
        read_image(file, size, decode=False)
    return Images(path, files, len(files), size)


def read_image(file: Path, size: tuple | None = None, decode: bool = True) -> np.ndarray | None:
    """An image file -> uint8 (H, W, 3), or only its check. Raises BadInput, naming the file."""
    with explained(f"{file} is no readable image: mend or remove it"):
        if not file.is_file():  # a pipe would keep us waiting
            raise ValueError("no regular file")
        with Image.open(file, formats=FORMATS) as image:
            mode, found = image.mode, (image.height, image.width)
            pixels = np.array(image) if decode else None
    if mode != "RGB" or size not in (None, found):
        rule = f"RGB of {size[1]} x {size[0]} pixels, as the first" if size else "RGB"
        found = f"{mode}, {found[1]} x {found[0]} pixels"
        raise BadInput(f"{file} is {found}: it must be {rule}; convert, crop or remove it")
    return pixels


def open_npz(path: str) -> Images:
    """The Images of an npz, or what has count 0 where it holds none. Raises BadInput."""
    with explained(f"{path!r} is neither a folder nor a readable npz"):
        if not os.path.isfile(path):
            raise ValueError("No such file")
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.endswith(".npy")]
            headers = {name: open_array(archive, name)[1:] for name in names}
    if "arr_0.npy" not in headers:
        return Images(path, path, 0, None)
    shape, fortran_order, dtype = headers["arr_0.npy"]
    if dtype != np.uint8 or fortran_order or len(shape) != 4 or shape[3] != 3 or 0 in shape[1:]:
        rule = "RGB images from 0 to 255, uint8 (N, H, W, 3) in C order"
        raise BadInput(f"{path} holds arr_0 of {dtype} {shape}: it must be {rule}")
    return Images(path, path, shape[0], shape[1:3])


def open_array(archive: zipfile.ZipFile, name: str = "arr_0.npy") -> tuple:
    """(stream at the first value, shape, fortran_order, dtype) of an array in an npz: unlike
    np.load it needs no memory for the array, and never unpickles. Raises any error."""
    stream = archive.open(name)
    version, _ = np.lib.format.read_magic(stream)
    header = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}
    shape, fortran_order, dtype = header[version](stream)
    held = archive.getinfo(name).file_size - stream.tell()
    promised = math.prod(shape) * dtype.itemsize if min(shape, default=0) >= 0 else -1
    if promised != held and not dtype.hasobject:
        raise ValueError(f"{name} should hold {promised} bytes and holds {held}")
    return stream, shape, fortran_order, dtype


def read_batches(images: Images, first: int, last: int, batch_size: int):
    """Yields images first..last - 1 as uint8 (n, H, W, 3); holds one batch. Raises BadInput."""
    ranges = [(i, min(i + batch_size, last)) for i in range(first, last, batch_size)]
    if torch.is_tensor(images.source):
        for start, end in ranges:
            yield images.source[start:end]
    elif isinstance(images.source, list):
        with ThreadPoolExecutor() as pool:
            for start, end in ranges:
                arrays = list(pool.map(read_image, images.source[start:end]))
                yield torch.from_numpy(np.stack(arrays))
    else:
        image_bytes = 3 * math.prod(images.size)
        sentence = f"{images.name} is damaged: write it anew"
        with explained(sentence), zipfile.ZipFile(images.source) as archive:
            stream, *_ = open_array(archive)
            stream.seek(first * image_bytes, os.SEEK_CUR)
            for start, end in ranges:
                pixels = bytearray(stream.read((end - start) * image_bytes))
                batch = torch.frombuffer(pixels, dtype=torch.uint8)
                yield batch.view(end - start, *images.size, 3)


def sha256(parts: list) -> str:
    """The first 16 digits of the sha256 of files or tensors in a row."""
    digest = hashlib.sha256()
    for part in parts:
        array = part.numpy() if torch.is_tensor(part) else np.memmap(part, np.uint8, "r")
        digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()[:16]


# ---- 4. From images to statistics ----------------------------------------------------------------
def build_features(name: str, weights: str, device, rank: int = 0) -> tuple[nn.Module, dict]:
    """The frozen network of --features, and what the protocol says of it. Raises BadInput."""
    digest = None
    if name == "inception":
        net, digest = load_inception(weights)
        resize = "TF1 bilinear to 299, float32"
    elif name == "dinov2":
        try:
            net = ma.ViTTeacher(ma.Config.teacher, grid=16, weights=weights)
        except BadInput as error:
            raise BadInput(str(error).replace("--teacher_weights", "--weights")) from error
        resize = f"bicubic to {net.size}, bfloat16 on GPU"
    else:
        net = ma.build_teacher(ma.make_config(), ma.demo_shapes(ma.DEMO["image_size"]), "cpu", rank)
        resize = "none, bfloat16 on GPU"
    digest = digest or sha256(list(net.state_dict().values()))
    about = dict(features=name, weights=digest, resize=resize)
    return net.to(device).eval().requires_grad_(False), about


def extract(net: nn.Module, images: Tensor) -> tuple:
    """uint8 (N, 3, H, W) -> features (N, D), and spatial ones (N, D') where sFID makes sense."""
    if isinstance(net, FIDInception):
        return net(images)
    tokens = net(images)
    cls, patches = tokens[:, 0], tokens[:, 1:]
    if net.vit.num_classes == 0:  # DINOv2 knows no classes
        return (cls,)
    return cls + patches.mean(dim=1), patches[..., :7].flatten(1)  # what the demo's head reads


@torch.no_grad()
def measure(
    images: Images, net: nn.Module, device, rank: int = 0, world_size: int = 1, batch_size: int = 64
) -> dict:
    """mu (D,), sigma (D, D), mu_s, sigma_s (where there are spatial features), features (N, D);
    nothing of no images.
    Each rank takes whole batches in a row; the result, on rank 0, does not depend on their number.
    Raises BadInput for features that are not finite."""
    if not images.count:
        return {}
    share = -(-images.count // (batch_size * world_size)) * batch_size
    first, last = min(rank * share, images.count), min((rank + 1) * share, images.count)
    blank = torch.zeros(1, 3, *images.size, dtype=torch.uint8, device=device)
    widths = [x.shape[1] for x in extract(net, blank)]
    features = torch.zeros(images.count, widths[0], device=device)
    sums = [torch.zeros(d + 1, d + 1, dtype=torch.float64, device=device) for d in widths]
    with tqdm(total=last - first, desc=images.name, unit=" images", disable=rank > 0) as bar:
        for batch in read_batches(images, first, last, batch_size):
            if device.type == "cuda":  # pinned: the next batch is read while the GPU works
                batch = batch.pin_memory().to(device, non_blocking=True)
            found = extract(net, batch.permute(0, 3, 1, 2))
            features[first : first + len(batch)] = found[0]
            for total, x in zip(sums, found, strict=True):
                add_moments(total, x)
            first += len(batch)
            bar.update(len(batch))

    if world_size > 1:
        for tensor in (features, *sums):
            dist.reduce(tensor, 0)  # rows of other ranks are zeros here
    finite = features.isfinite().all(dim=1)
    if not finite.all():
        which = f"image {finite.int().argmin()} of {images.name}"
        raise BadInput(f"{which} has features that are not finite: pass other --weights FILE")
    moments = [x for total in sums for x in mean_and_covariance(total)]
    return dict(zip(STATISTICS, moments, strict=False), features=features)


def stored_statistics(images: Images, about: dict, widths: list) -> dict:
    """What an npz of ADM's or of --save_stats already knows: some of the keys of `measure`.
    Raises BadInput where neither these nor images serve --features, of such widths."""
    path = images.name
    if not isinstance(images.source, str):
        return {}
    with explained(f"{path} holds no arrays of numbers"), np.load(path) as file:  # never unpickles
        made = dict(json.loads(str(file["protocol"]))) if "protocol" in file else {}
        keys = [key for key in (*STATISTICS, "features") if key in file]
        known = {key: torch.from_numpy(file[key]) for key in keys}
    if not images.count and "mu" not in known:
        raise BadInput(f"{path} holds neither images (arr_0) nor statistics (mu, sigma)")
    made = made or {**about, "features": "inception"}  # ADM's files do not tell of what they are
    if all(made.get(key) == about[key] for key in about):
        with explained(f"{path} holds statistics that are damaged: measure that set anew"):
            check_statistics(known, widths)
        return known
    if not images.count:
        theirs = f"{made.get('features')} {made.get('weights')}, not {about['weights']}"
        raise BadInput(f"{path} holds statistics of {theirs}: measure that set anew")
    return {}


def check_statistics(known: dict, widths: list) -> None:
    """Raises an error for what `measure` cannot give with features of such widths."""
    shapes = {}
    for mu, sigma, d in zip(STATISTICS[::2], STATISTICS[1::2], widths, strict=False):
        if mu in known or sigma in known:
            shapes |= {mu: (d,), sigma: (d, d)}
    if "features" in known:
        shapes["features"] = (max(4, len(known["features"])), widths[0])  # k = 3 needs 4
    for key, shape in shapes.items():
        x = known[key]
        if x.shape != shape or not x.is_floating_point() or not x.isfinite().all():
            raise ValueError(f"{key} is {x.dtype} {tuple(x.shape)}, for {shape}, or not finite")


@torch.no_grad()
def compare(sample: dict, ref: dict, net: nn.Module) -> dict:
    """The five numbers of two results of `measure`; None where something is missing for one."""
    numbers = dict.fromkeys(("fid", "sfid", "inception_score", "precision", "recall"))
    for name, mu, sigma in (("fid", "mu", "sigma"), ("sfid", "mu_s", "sigma_s")):
        if mu in sample and mu in ref:
            numbers[name] = frechet_distance(sample[mu], sample[sigma], ref[mu], ref[sigma])
    features = sample["features"]
    if isinstance(net, FIDInception):
        logits = F.linear(features, net.fc.weight)  # without the bias, as ADM
        numbers["inception_score"] = inception_score(logits)
    elif net.vit.num_classes > 0:
        numbers["inception_score"] = inception_score(net.vit.head(features))
    if "features" in ref:
        numbers["precision"], numbers["recall"] = precision_recall(ref["features"], features)
    return numbers


# ---- 5. The command ------------------------------------------------------------------------------
def parse_args(argv: list | None = None) -> argparse.Namespace:
    """The command line. Raises BadInput."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=raw)
    add = parser.add_argument
    add("samples", help="npz with arr_0, uint8 (N, H, W, 3), or folder of RGB images")
    add("--ref", help="the same, or an npz of statistics [demo: its drawn shapes]")
    features = dict(choices=["inception", "dinov2", "demo"], default="inception")
    add("--features", **features, help="whose features are compared [inception]")
    add("--weights", default="", metavar="FILE", help="of that network [downloaded once]")
    note = "write the statistics of --ref (without one: of the samples) to an npz, a later --ref"
    add("--save_stats", metavar="FILE", help=note)
    add("--json", metavar="FILE", help="write numbers and protocol there, too")
    add("--batch_size", type=int, default=64, help="images at a time per process [64]")
    args = parser.parse_args(argv)

    # sample.py leaves its settings beside its npz or PNG files.
    base = f"{args.samples}/samples" if os.path.isdir(args.samples) else args.samples
    path = Path(f"{base.removesuffix('.npz')}.json")
    with explained(f"{path} beside the samples is no JSON: move it"):
        args.settings = json.loads(path.read_text()) if path.is_file() else None

    if args.ref is None and not args.save_stats and args.features != "demo":
        raise BadInput("--ref is missing: name one, or --save_stats to measure the samples alone")
    alone = not args.weights or args.features != "demo"
    ma.require(args, "weights", alone, "left out, as the demo trains its teacher itself")
    for name, ending in (("save_stats", ".npz"), ("json", ".json")):
        file = Path(getattr(args, name) or "")
        fits = file.suffix == ending and file.parent.is_dir() and not file.exists()
        rule = f"a new file that ends with {ending}, in a folder that exists"
        ma.require(args, name, getattr(args, name) is None or fits, rule)
    ma.require(args, "batch_size", args.batch_size > 0, "above 0")
    return args


def open_sets(args: argparse.Namespace, rank: int) -> list:
    """Images of the samples, then of the reference if there is one. Raises BadInput."""
    sets = [open_images(path, rank) for path in (args.samples, args.ref) if path is not None]
    if args.features == "demo" and args.ref is None:
        shapes = ma.demo_shapes(ma.DEMO["image_size"]).tensors[0].permute(0, 2, 3, 1)
        sets.append(Images("drawn shapes", shapes, len(shapes), tuple(shapes.shape[1:3])))
    samples, other = sets[0], sets[-1]
    if samples.size and other.size and samples.size != other.size:
        sizes = f"(height, width) {other.size}, {samples.name} of {samples.size}"
        raise BadInput(f"{other.name} has images of {sizes}: crop both to one size first")
    return sets


def warn(n: int, dim: int, about: dict) -> None:
    """Tells what the numbers of n images with dim features are not worth."""
    if n < 2048:
        singular = ", and the covariance is singular" if n <= dim else ""
        print(f"warning: N is {n}, below 2048: Frechet distances are biased upwards{singular}")
    elif n != 50_000:
        print(f"warning: N is {n}, not the papers' 50,000: compare at equal N")
    if about["features"] != "inception" or about["weights"][:8] not in WEIGHTS_URL:
        network = f"{about['features']} {about['weights']}, not those of the papers"
        print(f"warning: features of {network}: such numbers compare only with each other")


def tell(numbers: dict, features: str) -> None:
    """The five numbers, a line each."""
    name = "FID" if features == "inception" else f"FD-{features}"
    labels = dict(fid=name, sfid=f"s{name}", inception_score="Inception Score")
    for key, value in numbers.items():
        print(f"{labels.get(key, key):17}" + ("-" if value is None else f"{value:.4f}"))


def run(args: argparse.Namespace) -> dict | None:
    """What the command line asks for; returns the numbers and their protocol (on rank 0)."""
    rank, world_size, device = ma.setup_distributed()
    torch.set_float32_matmul_precision("highest")  # true float32: no TF32
    torch.backends.cudnn.allow_tf32 = False

    # Whatever can be refused is looked at before the long work.
    sets = open_sets(args, rank)
    net, about = build_features(args.features, args.weights, device, rank)
    widths = [x.shape[1] for x in extract(net, torch.zeros(1, 3, 8, 8, device=device))]
    known = [stored_statistics(images, about, widths) for images in sets]
    if not sets[0].count and "features" not in known[0]:
        raise BadInput(f"{args.samples} holds statistics, but no images (arr_0) to judge")

    stats = []
    for images, stored in zip(sets, known, strict=True):
        found = measure(images, net, device, rank, world_size, args.batch_size)
        if "mu" in stored:  # as ADM: a file's statistics replace those of its images
            found = {key: found[key] for key in found if key == "features"}
        stats.append({key: x.to(device) for key, x in {**found, **stored}.items()})
    if world_size > 1:
        dist.destroy_process_group()
    if rank > 0:  # the rest takes one process, and a minute at most
        return None

    n, dim = stats[0]["features"].shape
    source = sets[-1].source
    protocol = dict(
        n=n,
        reference=sets[-1].name,
        reference_sha256=sha256(source if isinstance(source, list) else [source]),
        reference_images=len(stats[-1].get("features", [])),
        statistics="stored" if "mu" in known[-1] else "of the images",
        **about,
        k=3,
        split_size=5000,
        sampler=args.settings,
    )
    print("protocol:", ", ".join(f"{key} {value}" for key, value in protocol.items()))
    warn(n, dim, about)
    numbers = compare(*stats, net) if len(stats) == 2 else {}
    tell(numbers, args.features)
    result = dict(numbers, n=n, protocol=protocol)
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1))
    if args.save_stats:
        arrays = {key: x.cpu().numpy() for key, x in stats[-1].items()}
        np.savez(args.save_stats, protocol=json.dumps(protocol), **arrays)
    return result


def main() -> None:
    """Scores from the command line; bad input ends it with one sentence."""
    try:
        run(parse_args())
    except (BadInput, OSError) as error:
        sys.exit(f"fid.py: {error}")


if __name__ == "__main__":
    main()
