"""FID, sFID, Inception Score, precision and recall: the five numbers of the papers.

  python fid.py samples.npz --ref VIRTUAL_imagenet256_labeled.npz    ADM's reference
  python fid.py DIR --ref DIR2 --json scores.json                    folders of images
  python fid.py DIR2 --save_stats ref.npz                            measure it once
  python fid.py samples.npz --features demo                          the demo
  torchrun --nproc_per_node=8 fid.py samples.npz --ref REF           on 8 GPUs

All come from features, which a network (Inception) computes from each image. FID fits a
Gaussian to the features of each set, and is the squared Frechet distance of the two.

The papers use ADM's evaluator (guided-diffusion, TensorFlow 1). These are its numbers,
without its rounding of distances (about 0.002 of precision and recall).
"""

import argparse
import hashlib
import json
import math
import os
import re
import zipfile
from collections import namedtuple
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch import distributed as dist
from torchvision.models.inception import Inception3
from tqdm import tqdm

import maskalign as ma

WEIGHTS_URL = (  # ends as the file's sha256 begins
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
    "pt_inception-2015-12-05-6726825d.pth"
)
STATISTICS = ("mu", "sigma", "mu_s", "sigma_s")  # as ADM; _s (spatial) is for sFID


# ---- 1. The networks that compute features
def resize_tf1(images: Tensor, size: int = 299) -> Tensor:
    """Bilinear resize of TensorFlow 1: (N, C, H, W) -> float32 (N, C, size, size).
    Output pixel i looks at i * H / size, F.interpolate at (i + 0.5) * H / size - 0.5. No
    antialias, no rounding. On a CPU, this order of operations gives its very bits."""
    x = images.float()
    for _ in range(2):  # along x, then along y
        last = x.shape[-1] - 1
        scale = torch.tensor(x.shape[-1] / size, device=x.device)  # float32
        position = torch.arange(size, device=x.device) * scale
        low = position.long()
        high = (low + 1).clamp(max=last)
        left = x[..., low]
        right = x[..., high]
        x = left + (right - left) * (position - low)
        x = x.transpose(-1, -2)
    return x


def repool(block: nn.Module, x: Tensor, pool: nn.Module) -> Tensor:
    """block(x), but its last branch, branch_pool, pools with pool."""
    branches = block._forward(x)
    branches[-1] = block.branch_pool(pool(x))
    return torch.cat(branches, dim=1)


class FIDInception(Inception3):
    """The network of the usual FID: uint8 images (N, 3, H, W) -> features (N,
    2048), spatial features (N, 2023). Layers and names of weights are torchvision's. What
    differs is the pooling: averages leave out the padding, and Mixed_7c takes the maximum."""

    widths = (2048, 2023)

    def __init__(self):
        super().__init__(num_classes=1008, aux_logits=False, init_weights=False)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        average = nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)
        maximum = nn.MaxPool2d(3, stride=1, padding=1)
        x = (resize_tf1(images) - 128) / 128
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(self.maxpool1(x)))
        x = self.maxpool2(x)  # (N, 192, 35, 35)
        for block in (self.Mixed_5b, self.Mixed_5c, self.Mixed_5d):
            x = repool(block, x, average)
        x = self.Mixed_6a(x)  # (N, 768, 17, 17)
        for block in (self.Mixed_6b, self.Mixed_6c, self.Mixed_6d):
            x = repool(block, x, average)
        # ADM's mixed_6/conv[..., :7]: of Mixed_6d's first branch
        spatial = x[:, :7].permute(0, 2, 3, 1).flatten(1)  # order: row, column, channel
        x = repool(self.Mixed_6e, x, average)
        x = self.Mixed_7a(x)  # (N, 1280, 8, 8)
        x = repool(self.Mixed_7b, x, average)
        x = repool(self.Mixed_7c, x, maximum)  # (N, 2048, 8, 8)
        return x.mean(dim=(2, 3)), spatial


def load_inception(path: str = "") -> tuple[FIDInception, str]:
    """The network with weights of a file (or the published ones), and its sha256."""
    if not path:
        torch.hub.load_state_dict_from_url(WEIGHTS_URL, check_hash=True, weights_only=True)
        path = f"{torch.hub.get_dir()}/checkpoints/{os.path.basename(WEIGHTS_URL)}"
    net = FIDInception()
    state = torch.load(path, map_location="cpu")
    net.load_state_dict(dict(state))  # a plain dict may lack num_batches_tracked
    net.fc.bias = None  # ADM's Inception Score leaves it out
    net.eval().requires_grad_(False)
    net.to(memory_format=torch.channels_last)  # 1.5 times as fast on a CPU
    return net, hashlib.sha256(Path(path).read_bytes()).hexdigest()[:8]


class DemoFeatures(nn.Module):
    """The demo's teacher, trained again, in place of Inception."""

    def __init__(self):
        super().__init__()
        shapes = ma.demo_shapes(ma.make_config().image_size)
        config = ma.make_config(num_classes=len(shapes.classes))
        side = config.image_size // config.patch_size
        self.teacher = ma.train_classifier(config, shapes, side)
        self.fc = self.teacher.vit.head
        self.widths = (self.teacher.dim, 7 * side**2)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.teacher(images)  # (N, 1+T, D), class token first
        patches = tokens[:, 1:]
        return tokens[:, 0] + patches.mean(dim=1), patches[..., :7].flatten(1)


# ---- 2. The metrics: functions of features, in float64
def add_moments(sums: Tensor, x: Tensor) -> None:
    """Adds features (n, D) to sums (D + 1, D + 1) of x x^T, x and 1. Sums of
    several processes can be added."""
    x = nn.functional.pad(x.double(), (0, 1), value=1.0)
    sums.addmm_(x.T, x)


def mean_and_covariance(sums: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (D,) and covariance (D, D), with ddof 1, of everything added to sums."""
    n = sums[-1, -1]
    mu = sums[-1, :-1] / n
    return mu, (sums[:-1, :-1] - n * torch.outer(mu, mu)) / (n - 1)


def covariance_factor(sigma: Tensor) -> Tensor:
    """F (D, rank) with sigma = F F^T. It leaves out the null space, where roots turn
    1e-16 into 1e-8, so singular covariances are no special case."""
    values, vectors = torch.linalg.eigh((sigma + sigma.T) / 2)
    keep = values > values[-1] * len(sigma) * torch.finfo(values.dtype).eps
    return vectors[:, keep] * values[keep].sqrt()


def frechet_distance(mu1, sigma1, mu2, sigma2) -> float:
    """|mu1 - mu2|^2 + tr sigma1 + tr sigma2 - 2 tr (sigma1 sigma2)^(1/2). The last trace
    is the sum of the singular values of G = F1^T F2 (see covariance_factor), as sigma1
    sigma2 has the eigenvalues of G G^T, and zeros."""
    given = [torch.as_tensor(x).double().cpu() for x in (mu1, sigma1, mu2, sigma2)]
    mu1, sigma1, mu2, sigma2 = given
    fits = mu1.shape == mu2.shape and all(x.isfinite().all() for x in given)
    assert fits, "statistics differ in shape or are not finite: measure anew"
    cross = torch.linalg.svdvals(covariance_factor(sigma1).T @ covariance_factor(sigma2)).sum()
    distance = (mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * cross
    return max(distance.item(), 0.0)  # rounding: -1e-13 for equal sets


def inception_score(logits: Tensor, split_size: int = 5000) -> float:
    """exp of the mean of KL(p(class | image) || p(class)), averaged over splits of the
    images. logits (N, classes) in the order of the files: beyond one split,
    images sorted by class would spoil it. A short last split counts as the others do."""
    scores = []
    for split in logits.split(split_size):
        log_p = split.double().log_softmax(dim=1)
        log_marginal = log_p.logsumexp(dim=0) - math.log(len(split))
        divergence = (log_p.exp() * (log_p - log_marginal)).sum(dim=1)
        scores.append(divergence.mean().exp().item())
    return sum(scores) / len(scores)


def squared_distances(u: Tensor, v: Tensor) -> Tensor:
    """float64 (n, D), (m, D) -> (n, m). Rounding errors become 0: duplicates are at 0."""
    norms = u.square().sum(dim=1)[:, None] + v.square().sum(dim=1)
    distances = norms - 2 * u @ v.T
    return distances.where(distances > 1e-12 * norms, 0.0)


def squared_radii(x: Tensor, k: int) -> Tensor:
    """(n, D) -> (n,): from each point to its k-th nearest neighbour, 256 at a time."""
    # The nearest of all is the point itself: hence k + 1.
    return torch.cat([squared_distances(r, x).kthvalue(k + 1).values for r in x.split(256)])


def precision_recall(ref: Tensor, sample: Tensor, k: int = 3) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al. 2019), of (R, D) and (N, D).
    Around every point lies a ball that reaches to its k-th nearest neighbour in its own
    set. Precision is the share of the sample inside balls of the reference, recall the
    converse."""
    fewest = min(len(ref), len(sample))
    assert fewest > k, f"{fewest} images are too few for k = {k}: use {k + 1} or more"
    ref = ref.double()
    sample = sample.double()
    ref_radii = squared_radii(ref, k)
    sample_radii = squared_radii(sample, k)
    hits = 0
    recalled = torch.zeros(len(ref), dtype=torch.bool, device=ref.device)
    for rows, radii in zip(sample.split(256), sample_radii.split(256), strict=True):
        distances = squared_distances(rows, ref)  # (256, R)
        hits += (distances <= ref_radii).any(dim=1).sum().item()
        recalled |= (distances <= radii[:, None]).any(dim=0)
    return hits / len(sample), recalled.sum().item() / len(ref)


# ---- 3. Images: a folder or an npz, read batch by batch
# files are names, or images uint8 (N, H, W, 3), or [] for an npz. npz is an open npz, or
# {}. size is (H, W). An npz without images has count 0 and size None.
Images = namedtuple("Images", "name count size files npz")


def open_folder(path: str) -> Images:
    """The images at any depth, in natural order: 9.png comes before 10.png."""
    files = [file for file in ma.list_images(Path(path)) if os.path.isfile(file)]
    assert len(files) > 3, f"{path} has {len(files)} images: use 4 or more"
    files.sort(key=lambda x: [int(s) if s.isdecimal() else s for s in re.split(r"(\d+)", x)])
    sizes = {open_image(file).size[::-1]: file for file in files}
    assert len(sizes) == 1, f"sizes (height, width) differ: crop {sizes} to one"
    return Images(path, len(files), sizes.popitem()[0], files, {})


def open_image(file: str) -> Image.Image:
    image = Image.open(file, formats=ma.IMAGE_FORMATS)
    assert image.mode[0] not in "IF", f"{file} ({image.mode}) would be clipped to 8 bits"
    return image


def read_image(file: str) -> np.ndarray:
    try:
        return np.array(open_image(file).convert("RGB"))
    except OSError as error:
        error.add_note(file)
        raise


def open_npz(path: str) -> Images:
    """The images of arr_0, ADM's name for them."""
    assert zipfile.is_zipfile(path), f"{path} is neither a folder nor a complete npz"
    npz = np.load(path)  # reads an array only when asked for it
    if "arr_0" not in npz:
        return Images(path, 0, None, [], npz)
    stream = npz.zip.open("arr_0.npy")
    np.lib.format.read_magic(stream)
    shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(stream)
    fits = dtype == np.uint8 and len(shape) == 4 and shape[3] == 3 and not fortran_order
    assert fits and shape[0] > 3, f"{path} has {dtype} {shape}, not uint8 (N > 3, H, W, 3)"
    return Images(path, shape[0], shape[1:3], [], npz)


def read_batches(images: Images, first: int, last: int, batch_size: int):
    """Yields images first to last - 1 as uint8 (n, H, W, 3), a batch at a time."""
    if images.npz:  # a stream, as arr_0 may have 10 GB; after a header
        stream = images.npz.zip.open("arr_0.npy")
        image_bytes = 3 * math.prod(images.size)
        stream.seek((first - images.count) * image_bytes, os.SEEK_END)
    for start in range(first, last, batch_size):
        n = min(batch_size, last - start)
        batch = images.files[start : start + n]
        if images.npz:
            pixels = bytearray(stream.read(n * image_bytes))
            batch = torch.frombuffer(pixels, dtype=torch.uint8).view(n, *images.size, 3)
        elif isinstance(batch, list):
            batch = torch.from_numpy(np.stack([read_image(file) for file in batch]))
        yield batch


# ---- 4. From images to numbers
def measure(images: Images, net, device, rank=0, world_size=1, batch_size=64) -> dict:
    """mu (D,), sigma (D, D), mu_s, sigma_s and features (N, D), on rank 0. Each process
    takes consecutive whole batches, so their number changes rounding only."""
    share = math.ceil(images.count / (batch_size * world_size)) * batch_size
    row = rank * share
    features = torch.zeros(images.count, net.widths[0], device=device)
    sums = [torch.zeros(d + 1, d + 1, device=device).double() for d in net.widths]
    batches = read_batches(images, row, min(row + share, images.count), batch_size)
    for batch in tqdm(batches, images.name, share // batch_size, disable=rank > 0 or None):
        found = net(batch.to(device).permute(0, 3, 1, 2))
        features[row : row + len(batch)] = found[0]
        row += len(batch)
        for total, x in zip(sums, found, strict=True):
            add_moments(total, x)
    if world_size > 1:
        for total in (features, *sums):
            dist.reduce(total, 0)  # features has zeros for others' rows
    moments = [x for total in sums for x in mean_and_covariance(total)]
    return dict(zip(STATISTICS, moments, strict=True), features=features)


def stored_statistics(images: Images, digest: str, device) -> dict:
    """The results of measure in an npz of ADM or of --save_stats."""
    npz = images.npz
    same = str(npz.get("weights", digest)) == digest  # ADM's lack it
    known = [key for key in (*STATISTICS, "features") if key in npz and same]
    usable = images.count or "mu" in known
    assert usable, f"{images.name} has no images, nor statistics of this network"
    return {key: torch.from_numpy(npz[key]).to(device) for key in known}


def compare(sample: dict, ref: dict, net) -> dict:
    """The five numbers of two results of measure, None where ref lacks something."""
    numbers = dict.fromkeys(("fid", "sfid", "inception_score", "precision", "recall"))
    for name, mu, sigma in (("fid", "mu", "sigma"), ("sfid", "mu_s", "sigma_s")):
        if mu in ref:
            numbers[name] = frechet_distance(sample[mu], sample[sigma], ref[mu], ref[sigma])
    features = sample["features"]
    numbers["inception_score"] = inception_score(net.fc(features))
    if "features" in ref:
        numbers["precision"], numbers["recall"] = precision_recall(ref["features"], features)
    return numbers


# ---- 5. The command line
def parse_args(argv=None):
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    add = parser.add_argument
    path = dict(type=os.path.expanduser, default="")
    file = dict(path, metavar="FILE")
    add("samples", **path, help="folder of images, or npz (arr_0: uint8 N, H, W, 3)")
    add("--ref", **file, help="as samples, or statistics [demo: its shapes]")
    names = dict(choices=["inception", "demo"], default="inception")
    add("--features", **names, help="network for features [inception]")
    add("--weights", **file, help="weights of Inception [downloaded]")
    add("--save_stats", **file, help="npz to write: statistics of --ref, or of samples")
    add("--json", **file, help="to write: numbers and protocol")
    add("--batch_size", type=int, default=64, metavar="N", help="images at a time [64]")
    args = parser.parse_args(argv)
    if not args.ref and not args.save_stats and args.features == "inception":
        parser.error("give --ref, or --save_stats to measure the samples alone")
    for path in filter(None, (args.json, args.save_stats)):
        if os.path.exists(path) or not Path(path).parent.is_dir():
            parser.error(f"{path} must be a new file, in a folder that exists")
    return args


def open_sets(args):
    """The samples and, if they are to be compared, the reference."""
    paths = [path for path in (args.samples, args.ref) if path]
    sets = [open_folder(x) if os.path.isdir(x) else open_npz(x) for x in paths]
    if not args.ref and not args.save_stats:
        shapes = ma.demo_shapes(ma.make_config().image_size).datasets["image"]
        shapes = shapes.permute(0, 2, 3, 1)  # (N, H, W, 3)
        sets.append(Images("rendered shapes", len(shapes), shapes.shape[1:3], shapes, {}))
    size = sets[0].size
    assert size, f"{args.samples} has no images (arr_0)"
    fits = sets[-1].size in (None, size)
    assert fits, f"sizes are {size} and {sets[-1].size}: crop both sets to one size"
    folders = [Path(x).resolve() for x in paths if os.path.isdir(x)]
    nested = any(x in y.parents for x in folders for y in folders)
    assert not nested, f"one folder contains the other: {paths}"
    return sets


def main(argv=None):
    """Prints and returns the numbers and their protocol, on rank 0."""
    args = parse_args(argv)
    rank, world_size, device = ma.setup_distributed()
    torch.set_float32_matmul_precision("highest")  # float32, not TF32
    torch.backends.cudnn.allow_tf32 = False
    sets = open_sets(args)  # refuses what it can before the long work
    digest = "demo"
    if args.features == "demo":
        net = DemoFeatures()
    else:
        net, digest = load_inception(args.weights)
    stored = stored_statistics(sets[-1], digest, device) if rank == 0 else {}
    how = (net.to(device), device, rank, world_size, args.batch_size)
    stats = [measure(images, *how) if images.count else {} for images in sets]
    if world_size > 1:
        dist.destroy_process_group()
    if rank > 0:  # rank 0 does the rest alone
        return None

    stats[-1] |= stored  # as ADM, stored statistics are preferred
    numbers = compare(*stats, net) if len(sets) == 2 else {}
    protocol = dict(
        n=sets[0].count,
        reference=sets[-1].name,
        reference_images=sets[-1].count,
        features=args.features,
        weights=digest,
        sampler=json.loads(str(sets[0].npz.get("settings", "null"))),  # see sample.py
    )
    result = numbers | dict(protocol=protocol)
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1))
    if args.save_stats:
        arrays = {key: x.cpu() for key, x in stats[-1].items()}
        with open(args.save_stats, "wb") as file:
            np.savez(file, weights=digest, **arrays)

    print("protocol:", json.dumps(protocol))  # after the files: a print may fail
    if protocol["n"] != 50_000:
        print("warning: FID is biased upwards at every N: compare at equal N (papers: 50,000)")
    if digest not in WEIGHTS_URL:
        print("warning: not the papers' features, compare only with each other")
    if args.features == "demo":
        print("warning: these features favour methods aligned with this very network")
    for key, value in numbers.items():
        print(f"{key:16}", "-" if value is None else f"{value:.4f}")
    return result


if __name__ == "__main__":
    main()
