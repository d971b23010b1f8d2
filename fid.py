"""FID, sFID, Inception Score, precision, recall; rFID, PSNR, SSIM and code usage for tokenizers.

    python fid.py ref.npz out/                              a folder of PNGs, or an .npz, against another
    python fid.py --make-ref data/imagenet --size 256 --out ref.npz     once: the reference
    python fid.py ref.npz --ckpt gen.pt --num 50000         sample and evaluate, no image files
    torchrun --nproc-per-node 8 -- fid.py ref.npz --ckpt gen.pt     the same, from eight GPUs
    python fid.py --tokenizer vq.pt --data data/imagenet    rFID, PSNR, SSIM, codes; held-out split
    python fid.py mnist a.npz --size 32 --random-features --allow-small     no weights, few images

A set of images is an .npz with uint8 `arr_0` (N, H, W, 3), a folder of images (samples: RGB PNGs),
or a data set: shapes, mnist, cifar10, or a folder with train/ in it. Of a data set the reference is
the training split; samples and --data are the held-out one. --out is written (JSON), and a table
printed. An .npz that is not compressed is read image by image; a compressed one is held in memory.

The features are those of the 2015 Inception network (95 MB, fetched and checked). --random-features
needs no download: the same network with seeded random weights, after Naeem et al. 2020, for comparing
runs with each other: FD-random.
"""

import argparse
import json
import os
import struct
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset
from torchvision.models.inception import InceptionE
from tqdm import tqdm

import rdpm
from rdpm import UserError

URL = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
POOL = 2048
SPATIAL = 17 * 17 * 7
CLASSES = 1008
BATCH = 64                # fixed: an image's features move by about 1e-6 with the size of its batch
REFERENCE_KEPT = 10_000   # features kept for precision and recall, as many as ADM takes
SAMPLES_KEPT = 50_000
SPLIT = 5000              # images in a split of the Inception Score, as ADM has it
STATISTICS = {"mu": (POOL,), "sigma": (POOL, POOL), "mu_s": (SPATIAL,), "sigma_s": (SPATIAL, SPATIAL)}


# Inception ----------------------------------------------------------------------------------------

class MaxPoolE(InceptionE):
    """Mixed_7c of the 2015 network takes the maximum where torchvision's block averages."""

    def forward(self, x: Tensor) -> Tensor:
        *others, _ = self._forward(x)
        pooled = F.max_pool2d(x, 3, stride=1, padding=1)
        return torch.cat([*others, self.branch_pool(pooled)], 1)


def leave_out_padding(module: nn.Module, inputs: tuple[Tensor]) -> Tensor:
    """From torchvision's 3x3 average, which counts the padding, to TensorFlow's, which does not."""
    ones = torch.ones_like(inputs[0][:1, :1])
    return inputs[0] / F.avg_pool2d(ones, 3, stride=1, padding=1)


def resize_matrix(n: int) -> Tensor:
    """TensorFlow 1's bilinear resize of n pixels to 299, (299, n): source i * n / 299."""
    i = np.arange(299)
    position = i.astype(np.float32) * np.float32(n / 299)  # float32, because TensorFlow rounds here
    left = position.astype(int)
    right = np.minimum(left + 1, n - 1)
    fraction = position % 1
    matrix = np.zeros((299, n))
    matrix[i, left] = 1 - fraction
    matrix[i, right] += fraction  # of the last pixels both are one
    return torch.from_numpy(matrix).float()


class Inception(nn.Module):
    """torchvision's network with the pooling of TensorFlow's. `load_inception` adds weights."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        super().__init__()
        self.device = torch.device(device)
        self.weights = SHA256
        self.net = torchvision.models.inception_v3(num_classes=CLASSES, aux_logits=False, init_weights=False)
        self.net.Mixed_7c = MaxPoolE(POOL)
        for name in ("5b", "5c", "5d", "6b", "6c", "6d", "6e", "7b"):
            block = getattr(self.net, f"Mixed_{name}")
            block.branch_pool.register_forward_pre_hook(leave_out_padding)
        # The faster of the two.
        on_cpu = self.device.type == "cpu"
        self.memory_format = torch.channels_last if on_cpu else torch.contiguous_format
        self.eval().requires_grad_(False).to(self.device, memory_format=self.memory_format)

    @torch.no_grad()
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Bytes (B, 3, H, W) -> float32 pool_3 (B, 2048), spatial (B, 2023), logits (B, 1008).

        sFID's spatial features: channels 0..6 of Mixed_6d (its 1x1 branch) as height, width, channel.
        Logits are those of ADM, without the bias.
        """
        with torch.autocast(self.device.type, enabled=False):  # rdpm.py has switched TF32 off
            x = images.to(self.device).float()
            height, width = (resize_matrix(n).to(self.device) for n in x.shape[2:])
            x = (height @ x @ width.T - 128) / 128
            x = x.contiguous(memory_format=self.memory_format)
            for name, block in list(self.net.named_children())[:-2]:  # without dropout and fc
                x = block(x)
                if name == "Mixed_6d":
                    spatial = x[:, :7].permute(0, 2, 3, 1).flatten(1)
            pool = x.flatten(1)
            return pool, spatial, pool @ self.net.fc.weight.T


def load_inception(random_features: bool = False, device: torch.device | str = "cpu") -> Inception:
    """The network with the official weights, or with seeded random ones. UserError if they cannot be had."""
    inception = Inception(device)
    if not random_features:
        inception.net.load_state_dict(rdpm.pretrained(URL, SHA256))
        return inception
    inception.weights = "random-0"  # they see blur and a change of classes; light noise hardly
    rng = np.random.RandomState(0)  # NumPy never changes its stream
    for w in inception.net.state_dict().values():
        if w.ndim > 1:
            scale = (2 / w[0].numel()) ** 0.5
            w.copy_(torch.from_numpy(rng.standard_normal(tuple(w.shape)) * scale))
    return inception


# Metrics ------------------------------------------------------------------------------------------

def frechet_distance(mu1: np.ndarray, sigma1: np.ndarray, mu2: np.ndarray, sigma2: np.ndarray) -> float:
    """|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)), in float64. Heusel et al. 2017.

    Means (D,), covariances (D, D). With sigma1 = A A^T, the root's trace is the sum of the roots of the
    eigenvalues of A^T sigma2 A, a symmetric matrix: always real, and faster than the root of a matrix.
    """
    values, vectors = np.linalg.eigh(sigma1)
    some = values > values[-1] * len(values) * np.finfo(float).eps  # the others are rounding errors
    a = vectors[:, some] * np.sqrt(values[some])
    root = np.sqrt(np.linalg.eigvalsh(a.T @ sigma2 @ a).clip(0)).sum()
    return float(((mu1 - mu2) ** 2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * root)


def precision_recall(*, reference: Tensor, samples: Tensor, k: int = 3, tile: int = 1000) -> tuple[float, float]:
    """Precision: samples inside a reference ball. Recall: references inside a sample ball. Each in [0, 1].

    Features (N, D), (M, D), N and M above k. Kynkaanniemi et al. 2019: a ball reaches to its centre's k-th
    neighbour. Only `tile` rows of distances are held.
    """
    def inside(x: Tensor, centres: Tensor) -> float:
        radii = [torch.cdist(rows, centres).kthvalue(k + 1).values for rows in centres.split(tile)]
        radii = torch.cat(radii)
        hits = [(torch.cdist(rows, centres) <= radii).any(1) for rows in x.split(tile)]
        return torch.cat(hits).double().mean().item()

    precision = inside(samples, reference)
    recall = inside(reference, samples)
    return precision, recall


def psnr(x: Tensor, y: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, (B,), of bytes x and y (B, C, H, W)."""
    return 10 * torch.log10(255**2 / (x.float() - y.float()).square().flatten(1).mean(1))


def ssim(x: Tensor, y: Tensor) -> Tensor:
    """Structural similarity, (B,), of bytes x and y (B, C, H, W), H and W at least 7. Wang et al. 2004.

    By scikit-image's defaults: uniform 7x7 window, sample covariance, mean over channels.
    """
    def box(z: Tensor) -> Tensor:  # integers: float32 holds them all
        return F.avg_pool2d(z, 7, 1, divisor_override=1).round().int()

    def covariance(products: Tensor, sum_a: Tensor, sum_b: Tensor) -> Tensor:
        return (49 * box(products) - sum_a * sum_b) / (49 * 48)

    x = x.float()
    y = y.float()
    sum_x = box(x)
    sum_y = box(y)
    mu_x = sum_x / 49
    mu_y = sum_y / 49
    variances = covariance(x * x, sum_x, sum_x) + covariance(y * y, sum_y, sum_y)
    c1 = (0.01 * 255) ** 2
    c2 = (0.03 * 255) ** 2
    above = (2 * mu_x * mu_y + c1) * (2 * covariance(x * y, sum_x, sum_y) + c2)
    below = (mu_x**2 + mu_y**2 + c1) * (variances + c2)
    return (above / below).flatten(1).mean(1)


# Sets of images -----------------------------------------------------------------------------------

@dataclass
class Pictures(Dataset):
    """N images that read(i) returns, uint8 (H, W, 3). Items are (bytes (3, H, W),)."""

    n: int
    read: Callable[[int], np.ndarray]

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> tuple[Tensor]:
        return (torch.from_numpy(self.read(i)).permute(2, 0, 1),)


@contextmanager
def open_npz(path: Path) -> Iterator[np.lib.npyio.NpzFile]:
    """An .npz, of which arrays are read when asked for. UserError if it is damaged or too large."""
    try:
        with np.load(path) as file:
            yield file
    except MemoryError as error:
        reason = rdpm.one_line(error)
        raise UserError(f"{path}: larger than memory ({reason}); write it by np.savez, uncompressed: "
                        "then its images are read one by one") from error
    except Exception as error:  # NumPy, zipfile and zlib raise many
        raise UserError(f"{path}: not a readable .npz ({rdpm.one_line(error)}); write it again") from error


def map_array(path: Path, header_offset: int) -> np.memmap:
    """An array of an .npz where it lies in the file. zip's header: 30 bytes, name, extra field."""
    with open(path, "rb") as file:
        file.seek(header_offset + 26)
        name_length, extra_length = struct.unpack("<HH", file.read(4))
        file.seek(name_length + extra_length, os.SEEK_CUR)
        np.lib.format.read_magic(file)
        shape, transposed, dtype = np.lib.format.read_array_header_1_0(file)
        return np.memmap(path, dtype, "r", file.tell(), shape, order="F" if transposed else "C")


def images_of_npz(path: Path) -> Pictures:
    """arr_0 of an .npz, read image by image if it is not compressed. UserError if it is no RGB."""
    with open_npz(path) as file:
        names = list(file)
        images = np.zeros(0)
        stored = False
        if "arr_0" in names:
            member = file.zip.getinfo("arr_0.npy")
            stored = member.compress_type == zipfile.ZIP_STORED
            images = map_array(path, member.header_offset) if stored else file["arr_0"]
    if "arr_0" not in names:
        raise UserError(f"{path}: holds {', '.join(names)}, but images are needed: arr_0, uint8 RGB (N, H, W, 3)")
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or not images.size:
        raise UserError(f"{path}: arr_0 is {images.dtype} {images.shape}, but must be uint8 RGB (N, H, W, 3); "
                        "write it again")
    if stored:  # mapped anew for each image: what stays mapped counts as memory
        return Pictures(len(images), lambda i: np.array(map_array(path, member.header_offset)[i]))
    return Pictures(len(images), images.__getitem__)


def read_picture(path: Path, generated: bool, size: int | None, pad: bool | None) -> np.ndarray:
    """An image file, uint8 (H, W, 3), as training reads it; `generated` ones must be RGB PNGs."""
    image = rdpm.read_image(path)
    if generated:
        with Image.open(path) as file:  # lossy files would change every number
            if (file.format, file.mode) != ("PNG", "RGB"):
                raise UserError(f"{path}: is {file.format} of mode {file.mode}, but samples must be uint8 RGB PNGs")
    elif size:
        image = rdpm.fit(image, size, pad)
    return np.array(image)


def images_of_folder(root: Path, generated: bool, size: int | None, pad: bool | None) -> Pictures:
    """All image files below a folder, of one size; of numbered samples none may be missing."""
    files = rdpm.image_files(root)
    if not files:
        raise UserError(f"{root}: no such file, or no images in it; give an .npz, a folder, or shapes, mnist, cifar10")
    numbers = sorted(int(path.stem) for path in files if path.stem.isdecimal() and path.parent == root)
    if numbers:  # a grid.png beside numbered samples is no sample
        files = [path for path in files if path != root / "grid.png"]
    for expected, number in enumerate(numbers if generated else [], min(numbers, default=0)):
        if number != expected:
            raise UserError(f"{root}: images are missing or there twice, first number {min(number, expected)}; "
                            "sample them again")
    first = read_picture(files[0], generated, size, pad)

    def read(i: int) -> np.ndarray:
        image = read_picture(files[i], generated, size, pad)
        check_size(image.shape, files[i], first.shape)
        return image

    return Pictures(len(files), read)


def open_images(name: str, generated: bool, size: int | None, pad: bool | None, allow_small: bool) -> Dataset:
    """A set by its name; of a data set the training split, or if `generated` the held-out one.

    Items begin with bytes (3, H, W). pad: smaller images get a black frame; None is as the preset of
    that name says. UserError if there is no such set, or if it is too small or damaged.
    """
    path = Path(name)
    if name in ("shapes", "mnist", "cifar10") or (path / "train").is_dir():
        if not size:
            raise UserError(f"{name}: give the size of its images with --size N, such as 32")
        if pad is None:
            pad = name in rdpm.PRESETS and rdpm.PRESETS[name]["tokenizer"].get("pad", False)
        images = rdpm.load_data(name, size, train=not generated, pad=pad)
    elif path.suffix == ".npz" and path.is_file():
        images = images_of_npz(path)
    else:
        images = images_of_folder(path, generated, size, pad)
    check_count(len(images), name, allow_small)
    return images


def shape_of(images: Dataset) -> tuple[int, ...]:
    """(H, W, 3) of the first image."""
    _, height, width = images[0][0].shape
    return height, width, 3


def check_size(shape: tuple[int, ...], name: str | Path, expected: tuple[int, ...] | None) -> None:
    if expected and shape != expected:
        raise UserError(f"{name}: {shape}, not {expected}; make all one size (--size N crops as ADM does)")


def check_count(n: int, name: str, allow_small: bool) -> None:
    if n < 4 or n < POOL and not allow_small:
        raise UserError(f"{name}: N = {n}, but {POOL} features need as many images (4, and biased, with --allow-small)")


def own_batches(n: int) -> Iterable[list[int]]:
    """This rank's batches of 0..n-1; no batch depends on the number of ranks."""
    rank = rdpm.rank()
    firsts = range(rank * BATCH, n, rdpm.world_size() * BATCH)
    batches = [list(range(first, min(first + BATCH, n))) for first in firsts]
    return tqdm(batches, unit=f" x {BATCH} images", disable=rank > 0, leave=False)


def read_batch(images: Dataset, numbers: list[int]) -> Tensor:
    """The images of these numbers, bytes (B, 3, H, W)."""
    with ThreadPoolExecutor(8) as pool:  # Pillow decodes outside the interpreter's lock
        items = list(pool.map(images.__getitem__, numbers))
    return torch.stack([item[0] for item in items])


# Evaluation ---------------------------------------------------------------------------------------

@dataclass
class Features:
    """What is known of a set of images. None is what a file does not hold, or nobody has asked for."""

    statistics: dict[str, np.ndarray]     # means and covariances, named and shaped as in STATISTICS
    kept: Tensor | None = None            # pool_3 of some images; on rank 0 alone
    n: int = 0
    score: float | None = None            # Inception Score
    shape: tuple[int, ...] | None = None  # of an image, (H, W, 3)


class Moments:
    """Mean and covariance (ddof = 1) of rows that come in batches, in float64."""

    def __init__(self, width: int, device: torch.device) -> None:
        self.total = torch.zeros(width, dtype=torch.float64, device=device)
        self.products = torch.zeros(width, width, dtype=torch.float64, device=device)

    def add(self, x: Tensor) -> None:
        x = x.double()
        self.total += x.sum(0)
        self.products.addmm_(x.T, x)

    def result(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """Of the n rows of all ranks."""
        rdpm.sum_over_ranks(self.total, self.products)
        self.products -= self.total.outer(self.total) / n
        self.products /= n - 1
        return (self.total / n).cpu().numpy(), self.products.cpu().numpy()


def gather_rows(rows: Tensor) -> Tensor:
    """The sum over all ranks for rank 0, and no rows for the others, which hold only their own."""
    for chunk in rows.split(1000):
        total = chunk.clone()
        rdpm.sum_over_ranks(total)
        if rdpm.rank() == 0:
            chunk.copy_(total)
    return rows if rdpm.rank() == 0 else rows[:0].clone()


def measure(images: Callable[[list[int]], Tensor], n: int, inception: Inception, keep: int) -> Features:
    """Statistics of N images; images(numbers) are bytes (B, 3, H, W), numbers in 0..N-1, each rank's own.

    Moments; the Inception Score (Salimans et al. 2016), exp of the mean KL divergence within a split,
    averaged; the pool_3 of `keep` images, or None if that is 0.
    """
    device = torch.device("cpu") if inception.device.type == "mps" else inception.device  # MPS has no float64
    # After a fixed shuffle: files sorted by class would make nonsense of splits and kept images.
    place = torch.from_numpy(np.random.RandomState(2020).permutation(n).argsort()).to(device)
    counts = torch.bincount(place // SPLIT)
    p_sum = torch.zeros(len(counts), CLASSES, dtype=torch.float64, device=device)
    p_log_p_sum = torch.zeros(len(counts), dtype=torch.float64, device=device)
    kept = torch.zeros(min(keep, n), POOL, device=device)
    pool_moments = Moments(POOL, device)
    spatial_moments = Moments(SPATIAL, device)
    for numbers in own_batches(n):
        pool, spatial, logits = (x.to(device) for x in inception(images(numbers)))
        pool_moments.add(pool)
        spatial_moments.add(spatial)
        here = place[numbers]
        kept[here[here < keep]] = pool[here < keep]
        log_p = logits.double().log_softmax(1)
        p_sum.index_add_(0, here // SPLIT, log_p.exp())
        p_log_p_sum.index_add_(0, here // SPLIT, (log_p.exp() * log_p).sum(1))
    rdpm.sum_over_ranks(p_sum, p_log_p_sum)
    p = p_sum / counts[:, None]
    score = (p_log_p_sum / counts - torch.xlogy(p, p).sum(1)).exp().mean().item()
    moments = pool_moments.result(n) + spatial_moments.result(n)
    statistics = dict(zip(STATISTICS, moments, strict=True))
    return Features(statistics, gather_rows(kept) if keep else None, n, score)


def load_reference(name: str, inception: Inception, keep: int = REFERENCE_KEPT, size: int | None = None,
                   pad: bool | None = None, allow_small: bool = False) -> Features:
    """A reference from --make-ref or from ADM, or a set of images.

    keep = 0 saves the time for precision and recall. UserError if it is damaged, too small, or of another network.
    """
    statistics = {}
    if name.endswith(".npz") and Path(name).is_file():
        with open_npz(Path(name)) as file:
            names = list(file)
            weights = str(file["weights"]) if "weights" in names else SHA256  # ADM's files do not say
            if "mu" in names:
                statistics = {key: file[key] for key in STATISTICS if key in names}
    if statistics:
        if weights != inception.weights:
            raise UserError(f"{name}: of the network {weights[:8]}, not {inception.weights[:8]}; use --make-ref again")
        wrong = [key for key, x in statistics.items() if x.shape != STATISTICS[key] or not np.isfinite(x).all()]
        if wrong or list(statistics) not in (["mu", "sigma"], list(STATISTICS)):
            raise UserError(f"{name}: mean and covariance must be finite, ({POOL},) and ({POOL}, {POOL}), "
                            f"of sFID ({SPATIAL},) and ({SPATIAL}, {SPATIAL}); make it again")
        if "arr_0" not in names:
            return Features(statistics)
    images = open_images(name, False, size, pad, allow_small or bool(statistics))
    features = Features(statistics)
    if keep or not statistics:
        features = measure(partial(read_batch, images), len(images), inception, keep)
    features.statistics = statistics or features.statistics
    features.shape = shape_of(images)
    return features


def compare(samples: Features, reference: Features, inception: Inception) -> dict:
    """FID-N, sFID-N, IS, precision and recall, under "values"; a note says why one is None."""
    random = "" if inception.weights == SHA256 else "-random"
    fid = f"FD-random-{samples.n}" if random else f"FID-{samples.n}"
    notes = []
    values = {fid: distance(samples, reference), f"s{fid}": None}
    if "mu_s" in reference.statistics:
        values[f"s{fid}"] = distance(samples, reference, "_s")
    else:
        notes.append(f"s{fid} unavailable: the reference holds no mu_s, sigma_s")
    if not random:  # random features classify nothing
        values["IS"] = samples.score
        if samples.n % SPLIT:
            notes.append(f"IS: the last split holds {samples.n % SPLIT} images, not {SPLIT}; it compares with no other")
    precision = recall = None
    if reference.kept is None:
        notes.append("precision, recall unavailable: the reference holds statistics only, no images (arr_0)")
    elif rdpm.rank() == 0:
        precision, recall = precision_recall(reference=reference.kept, samples=samples.kept)
    values |= {f"precision{random}": precision, f"recall{random}": recall}
    return {"values": values, "notes": notes, "N": samples.n}


def distance(a: Features, b: Features, suffix: str = "") -> float:
    """Fréchet distance of two sets by their pool_3, or by what sFID takes (suffix "_s"); on rank 0 alone."""
    if rdpm.rank() > 0:
        return np.nan
    moments = []
    for features in (a, b):
        moments += [features.statistics["mu" + suffix], features.statistics["sigma" + suffix]]
    return frechet_distance(*moments)


def evaluate_images(images: Callable[[list[int]], Tensor], n: int, reference: Features, inception: Inception) -> dict:
    """`measure` N images and `compare` them. Rank 0 alone has distances, precision and recall."""
    keep = 0 if reference.kept is None else SAMPLES_KEPT
    return compare(measure(images, n, inception, keep), reference, inception)


def fid_of_generator(model: rdpm.RDPM, tokenizer: rdpm.Tokenizer, sampling: rdpm.Sampling, reference: Features,
                     inception: Inception, num: int, seed: int = 0) -> dict:
    """Sample `num` images with balanced labels, and `compare` them; no image is written."""
    size = tokenizer.config.image_size
    check_size((size, size, 3), "samples", reference.shape)

    def draw(numbers: list[int]) -> Tensor:
        labels = torch.tensor(numbers, device=inception.device) % model.config.num_classes
        with rdpm.autocast(inception.device):  # as sample.py
            x = rdpm.draw_images(model, tokenizer, labels, seed, numbers, sampling)
        return rdpm.to_uint8(x)

    return evaluate_images(draw, num, reference, inception) | {"sampling": asdict(sampling)}


class Judge:
    """The FID of a generator in training, against a reference that --make-ref has written."""

    def __init__(self, ref: str, num: int, device: torch.device) -> None:
        if not (ref.endswith(".npz") and Path(ref).is_file()):
            raise UserError(f"--fid-ref {ref}: no such file; give the .npz of fid.py --make-ref")
        with open_npz(Path(ref)) as file:
            random = str(file.get("weights", SHA256)) != SHA256
        check_count(num, f"--fid-num {num}", allow_small=random)
        self.num = num
        self.inception = load_inception(random, device)
        self.reference = load_reference(ref, self.inception, keep=0, allow_small=random)

    def of_generator(self, model: rdpm.RDPM, tokenizer: rdpm.Tokenizer, sampling: rdpm.Sampling, seed: int) -> dict:
        return fid_of_generator(model, tokenizer, sampling, self.reference, self.inception, self.num, seed)


@torch.inference_mode()
def evaluate_tokenizer(tokenizer: rdpm.Tokenizer, data: Dataset, device: torch.device, seed: int,
                       inception: Inception | None = None) -> dict:
    """PSNR in dB, SSIM (per image, rounded to bytes, then averaged), latent error |v - z'_T|^2, codes in use.

    usage: share of the K codes that occur, over all steps and for each t; perplexity_t: exp of their
    entropy. With `inception` also rFID, the distance of the images to their reconstructions, on rank 0.
    """
    n = len(data)
    T = tokenizer.config.T
    K = tokenizer.config.K
    sums = torch.zeros(3, device=device)
    counts = torch.zeros(T, K, dtype=torch.long, device=device)

    def reconstruct(numbers: list[int]) -> Tensor:
        x = read_batch(data, numbers).to(device)
        eps = tokenizer.noise(rdpm.ImageStreams(seed, numbers, device))
        x_rec, v, quantized = tokenizer(rdpm.to_float(x), eps)
        x_rec = rdpm.to_uint8(x_rec)
        latent_error = (v - quantized.z_sum).square().mean((1, 2))
        sums.add_(torch.stack([psnr(x, x_rec), ssim(x, x_rec), latent_error]).sum(1))
        counts.add_(torch.stack([codes.flatten().bincount(minlength=K) for codes in quantized.codes]))
        return x_rec

    values = {}
    if inception:
        before = measure(partial(read_batch, data), n, inception, keep=0)
        after = measure(reconstruct, n, inception, keep=0)
        name = f"rFID-{n}" if inception.weights == SHA256 else f"rFD-random-{n}"
        values[name] = distance(before, after)
    else:
        for numbers in own_batches(n):
            reconstruct(numbers)
    rdpm.sum_over_ranks(sums, counts)
    p = counts / counts.sum(1, keepdim=True)
    values["psnr"], values["ssim"], values["latent_error"] = (sums / n).tolist()
    values["usage"] = (counts.sum(0) > 0).float().mean().item()
    values["usage_t"] = (counts > 0).float().mean(1).tolist()
    values["perplexity_t"] = torch.special.entr(p).sum(1).exp().tolist()
    return values


# The script ---------------------------------------------------------------------------------------

def parse_args() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("sets", nargs="*", metavar="REF SAMPLES", help="Two sets of images, or REF alone with --ckpt.")
    add("--ckpt", help="Generator to sample from, instead of SAMPLES.")
    add("--tokenizer", help="Tokenizer whose reconstructions of --data are evaluated.")
    add("--data", help="Data set to reconstruct, of which the held-out split is taken.")
    add("--make-ref", metavar="DATA", help="Set of images whose statistics are written to --out.")
    add("--num", type=rdpm.positive_int, help="Images to sample [default: 50000], or to reconstruct [default: all].")
    add("--out", type=Path, default=Path("fid.json"), help="A .json, or the .npz of --make-ref [default: fid.json].")
    add("--size", type=rdpm.positive_int,
        help="Pixels a side to crop data sets and reference folders to, as ADM does [default: no crop].")
    add("--random-features", action="store_true", help="Take random weights: FD-random, not FID.")
    add("--allow-small", action="store_true", help=f"Go on with fewer than {POOL} images.")
    add("--seed", type=rdpm.natural_int, default=0, help="Seed of samples or tokenizer's noise [default: 0].")
    rdpm.add_sampling_flags(p)
    add("--device", help="Device to compute on: cuda, mps or cpu [default: the best there is].")
    args = p.parse_args()
    given = [name for name in ("ckpt", "tokenizer", "data", "make_ref", "num") if getattr(args, name)]
    forms = {0: (["make_ref"], ["tokenizer", "data"], ["tokenizer", "data", "num"]),
             1: (["ckpt"], ["ckpt", "num"]),
             2: ([],)}
    of_sampler = [getattr(args, field.name, None) for field in fields(rdpm.Sampling)]
    if not args.ckpt and (args.fast or any(value is not None for value in of_sampler)):
        raise UserError("--guidance, --skip, --fast and the like do nothing without --ckpt; leave them out")
    if given not in forms.get(len(args.sets), ()):
        raise UserError("give two sets REF SAMPLES; or REF and --ckpt; or --tokenizer and --data, whose images rFID "
                        "compares with their own reconstructions, never with a REF; or --make-ref")
    suffix = ".npz" if args.make_ref else ".json"
    if args.out.suffix != suffix or args.out.is_dir() or not os.access(args.out.parent, os.W_OK):
        raise UserError(f"--out {args.out}: must end in {suffix} and lie in a folder that can be written into")
    return args


def say(*lines: str) -> None:
    """Print lines. Who closes the pipe, as `| head -1` does, has seen enough."""
    try:
        print(*lines, sep="\n", flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for exit


def make_reference(args: argparse.Namespace, inception: Inception) -> None:
    """Write a set's statistics, and the images that precision and recall need, as ADM does."""
    images = open_images(args.make_ref, False, args.size, None, args.allow_small)
    features = measure(partial(read_batch, images), len(images), inception, keep=0)
    if rdpm.rank() > 0:
        return
    some = np.sort(np.random.RandomState(2020).permutation(len(images))[:REFERENCE_KEPT])
    arr_0 = np.empty((len(some), *shape_of(images)), np.uint8)
    for row, i in enumerate(some):
        arr_0[row] = images[i][0].permute(1, 2, 0)
    with rdpm.replacing(args.out) as path:
        np.savez(path, arr_0=arr_0, weights=inception.weights, **features.statistics)
    say(f"wrote {args.out}: {args.make_ref}, N = {len(images)}")


def evaluate(args: argparse.Namespace, inception: Inception, device: torch.device) -> dict:
    """What the flags ask for: "values", "N", and perhaps "notes"."""
    if args.tokenizer:
        tokenizer = rdpm.load_tokenizer(args.tokenizer, device)
        config = tokenizer.config
        data = rdpm.load_data(args.data, config.image_size, train=False, pad=config.pad)
        if args.num:
            data = Subset(data, rdpm.balanced_subset(data.labels, args.num))
        check_count(len(data), args.data, args.allow_small)
        return {"values": evaluate_tokenizer(tokenizer, data, device, args.seed, inception), "N": len(data)}
    ref = partial(load_reference, args.sets[0], inception, REFERENCE_KEPT, allow_small=args.allow_small)
    if args.ckpt:
        num = args.num or 50_000
        check_count(num, f"--num {num}", args.allow_small)
        model, tokenizer, _, defaults = rdpm.load_generator(args.ckpt, device)
        config = tokenizer.config
        sampling = rdpm.sampling_from(args, defaults, config.T)
        reference = ref(size=config.image_size, pad=config.pad)
        return fid_of_generator(model, tokenizer, sampling, reference, inception, num, args.seed)
    samples = args.sets[1]
    images = open_images(samples, True, args.size, None, args.allow_small)
    reference = ref(size=args.size)
    check_size(shape_of(images), samples, reference.shape)
    return evaluate_images(partial(read_batch, images), len(images), reference, inception)


def main() -> None:
    args = parse_args()
    device = rdpm.launch(args.device)
    inception = load_inception(args.random_features, device)
    if args.make_ref:
        make_reference(args, inception)
        return
    result = evaluate(args, inception, device)
    if rdpm.rank() > 0:
        return
    result["seed"] = args.seed
    result["weights"] = inception.weights
    result["command"] = " ".join(sys.argv)
    result["versions"] = {module.__name__: module.__version__ for module in (torch, torchvision, np)}
    with rdpm.replacing(args.out) as path:  # before the table: what is printed may be lost
        path.write_text(json.dumps(result, indent=2) + "\n")
    lines = [result["command"], f"N = {result['N']}"]
    for name, value in result["values"].items():
        numbers = np.atleast_1d("-" if value is None else np.round(value, 4))
        lines.append(f"  {name:18} " + " ".join(map(str, numbers)))
    say(*lines, *result.get("notes", ()))


if __name__ == "__main__":
    rdpm.run_main(main)
