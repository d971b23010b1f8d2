"""FID, sFID, Inception Score, precision, recall; rFID, PSNR, SSIM and code usage for tokenizers.

    python fid.py ref.npz out/                                          a folder of PNGs, or an ADM .npz, against another
    python fid.py --make-ref data/imagenet --size 256 --out ref.npz     once: the reference, of the train split
    python fid.py --ref ref.npz --ckpt gen.pt --num 50000               sample and evaluate, no image files
    torchrun --nproc-per-node 8 -- fid.py --ref ref.npz --ckpt gen.pt   the same numbers, from eight GPUs
    python fid.py --tokenizer vq.pt --data data/imagenet                rFID, PSNR, SSIM, codes; held-out split
    python fid.py --ref mnist --samples a.npz --size 32 --pad --random-features --allow-small      no weights, few images

A set of images is an .npz with uint8 `arr_0` (N, H, W, 3), a folder of PNGs, a folder with a folder per class, or the
name of a data set (shapes, mnist, cifar10). Of a name, and of a folder with train/ and val/ (or test/) below, --ref and
--make-ref take the training split, --samples and --data the held-out one. A table is printed, and a JSON file (--out)
written with all that a reader needs to repeat it.

The features are those of the 2015 Inception network (95 MB, fetched and checked). Without internet access use
--random-features: the same network with seeded random weights, after Naeem et al. 2020. Its distances compare runs with
each other, never with a paper, and are called FD-random.
"""

import argparse
import hashlib
import json
import platform
import struct
import sys
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import PIL
import scipy.linalg
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import Tensor, nn
from torchvision.models.inception import BasicConv2d, InceptionE
from tqdm import tqdm

import rdpm
from rdpm import RANK, WORLD_SIZE, UserError
from sample import add_sampling_flags, sampling_from

URL = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
POOL, SPATIAL, CLASSES = 2048, 17 * 17 * 7, 1008
BATCH = 64  # fixed: an image's features move by about 1e-6 with the size of its batch
REFERENCE_KEPT, SAMPLES_KEPT = 10_000, 50_000  # features kept for precision and recall, as many as ADM takes
SPLIT = 5000  # images in a split of the Inception Score, as ADM has it


# Inception ------------------------------------------------------------------------------------------------------------


class MaxPoolE(InceptionE):
    """Mixed_7c of the 2015 network takes the maximum where torchvision's block averages."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([*self._forward(x)[:-1], self.branch_pool(F.max_pool2d(x, 3, stride=1, padding=1))], 1)


def leave_out_padding(module: nn.Module, inputs: tuple[Tensor]) -> Tensor:
    """From torchvision's 3x3 average, which counts the zero padding, to TensorFlow's, which does not."""
    return inputs[0] / F.avg_pool2d(torch.ones_like(inputs[0][:1, :1]), 3, stride=1, padding=1)


def network() -> nn.Module:
    """torchvision's Inception with the pooling of the TensorFlow network of 2015-12-05."""
    net = torchvision.models.inception_v3(num_classes=CLASSES, aux_logits=False, weights=None, init_weights=False)
    net.Mixed_7c = MaxPoolE(POOL)
    for name in ("Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e", "Mixed_7b"):
        getattr(net, name).branch_pool.register_forward_pre_hook(leave_out_padding)
    net.dropout = nn.Identity()
    return net


def random_state() -> dict[str, Tensor]:
    """Seeded He-normal weights, batch norms that do nothing. RandomState: NumPy never changes its stream.

    Such features see blur, layout and a change of classes; light noise they hardly see.
    """
    rng, state = np.random.RandomState(0), network().state_dict()
    for w in state.values():
        if w.ndim > 1:
            w.copy_(torch.from_numpy(rng.standard_normal(tuple(w.shape)) * (2 / w[0].numel()) ** 0.5))
    return state


def resize_matrix(n: int) -> Tensor:
    """TensorFlow 1's bilinear resize of n pixels to 299, (299, n): source i * n / 299, no half pixel, no blur."""
    i = np.arange(299)
    position = i.astype(np.float32) * np.float32(n / 299)  # float32, because TensorFlow rounds here
    low = position.astype(int)
    share = position - low
    matrix = np.zeros((299, n))
    np.add.at(matrix, (i, low), 1 - share)
    np.add.at(matrix, (i, np.minimum(low + 1, n - 1)), share)
    return torch.from_numpy(matrix).float()


class Inception(nn.Module):
    """The FID Inception, from a state dict with torchvision's names and the name of these weights.

    `load_inception` has both.
    """

    def __init__(self, state: dict[str, Tensor], weights: str, device: torch.device | str = "cpu") -> None:
        super().__init__()
        self.weights, self.device, self.net = weights, torch.device(device), network()
        self.net.load_state_dict(state)
        self.eval().requires_grad_(False)
        for module in self.modules():
            if isinstance(module, BasicConv2d):  # one pass over memory instead of two
                module.conv, module.bn = nn.utils.fuse_conv_bn_eval(module.conv, module.bn), nn.Identity()
        # Faster on a CPU; cuDNN's float32 kernels without TF32 prefer the default layout.
        self.layout = torch.channels_last if self.device.type == "cpu" else torch.contiguous_format
        self.to(self.device, memory_format=self.layout)

    @torch.no_grad()
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Bytes (B, 3, H, W) -> float32 pool_3 (B, 2048), spatial features (B, 2023), logits (B, 1008) less bias.

        sFID's spatial features: channels 0..6 of Mixed_6d (its 1x1 branch), flattened height, width, channel.
        """
        with torch.autocast(self.device.type, enabled=False):  # float32; rdpm.py has switched TF32 off
            x = images.to(self.device).float()
            height, width = (resize_matrix(n).to(self.device) for n in x.shape[2:])
            x = ((height @ x @ width.T - 128) / 128).contiguous(memory_format=self.layout)
            for name, block in self.net.named_children():
                if name == "dropout":
                    break
                x = block(x)
                if name == "Mixed_6d":
                    spatial = x[:, :7].permute(0, 2, 3, 1).flatten(1)
            pool = x.flatten(1)
            return pool, spatial, pool @ self.net.fc.weight.T


def load_inception(random_features: bool = False, device: torch.device | str = "cpu") -> Inception:
    """The network with the official weights, or with random ones. UserError if they cannot be had."""
    if random_features:
        return Inception(random_state(), "random-0", device)
    return Inception(rdpm.pretrained(URL, SHA256), SHA256, device)


# Metrics --------------------------------------------------------------------------------------------------------------


def frechet_distance(mu1: np.ndarray, sigma1: np.ndarray, mu2: np.ndarray, sigma2: np.ndarray) -> float:
    """|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)), in float64. Heusel et al. 2017.

    With sigma1 = A A^T, the root's trace is the sum of the roots of the eigenvalues of A^T sigma2 A, a symmetric
    matrix: always real, and several times faster than a matrix root. A is the Cholesky factor, pivoted, so that it
    has as many columns as sigma1 has rank (fewer images than features) and no rounding errors of which to take roots.
    """
    factor, pivots, rank, _ = scipy.linalg.lapack.dpstrf(sigma1, lower=1)
    product = sigma2[np.ix_(pivots - 1, pivots - 1)]
    product = scipy.linalg.blas.dtrmm(1, factor, product, side=1, lower=1)  # triangular: half the work
    product = scipy.linalg.blas.dtrmm(1, factor, product, side=0, lower=1, trans_a=1)
    root = np.sqrt(np.linalg.eigvalsh(product[:rank, :rank]).clip(0)).sum()
    return float(((mu1 - mu2) ** 2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * root)


def precision_recall(*, reference: Tensor, samples: Tensor, k: int = 3, tile: int = 1000) -> tuple[float, float]:
    """Precision: samples inside a reference ball. Recall: references inside a sample ball. Features (N, D), (M, D).

    Kynkaanniemi et al. 2019: a ball reaches to its centre's k-th neighbour. Only `tile` rows of distances are held.
    """
    def inside(x: Tensor, centres: Tensor) -> float:
        radii = torch.cat([torch.cdist(rows, centres).kthvalue(k + 1).values for rows in centres.split(tile)])
        hits = torch.cat([(torch.cdist(rows, centres) <= radii).any(1) for rows in x.split(tile)])
        return hits.double().mean().item()

    with torch.autocast(samples.device.type, enabled=False):
        return inside(samples, reference), inside(reference, samples)


def psnr(x: Tensor, y: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, (B,), of bytes x and y (B, C, H, W)."""
    return 10 * torch.log10(255**2 / (x.float() - y.float()).square().flatten(1).mean(1))


SSIM_CONVENTION = "data range 1 on [0, 1], uniform 7x7 window, sample covariance, per channel (scikit-image's defaults)"


def ssim(x: Tensor, y: Tensor) -> Tensor:
    """Structural similarity, (B,), of bytes x and y (B, C, H, W), H and W at least 7, by SSIM_CONVENTION.

    LlamaGen's published numbers pass data range 2 on [0, 1] images, which turns 0.73 into 0.81.
    """
    def box(z: Tensor) -> Tensor:
        return F.avg_pool2d(F.avg_pool2d(z, (7, 1), 1, divisor_override=1), (1, 7), 1, divisor_override=1)

    device = x.device
    # float64, because the variance is a difference of large sums. MPS has none.
    x, y = (z.to("cpu" if device.type == "mps" else device).double() for z in (x, y))
    sx, sy = box(x), box(y)
    vx, vy, vxy = (box(x * x) - sx * sx / 49) / 48, (box(y * y) - sy * sy / 49) / 48, (box(x * y) - sx * sy / 49) / 48
    ux, uy = sx / 49, sy / 49
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    similarity = (2 * ux * uy + c1) * (2 * vxy + c2) / ((ux**2 + uy**2 + c1) * (vx + vy + c2))
    return similarity.flatten(1).mean(1).float().to(device)


class FeatureStatistics:
    """Streamed statistics of N images: float64 moments, Inception Score, and the pool_3 of `keep` images.

    Images come with their numbers, in any order and on any rank; `gather` adds up the ranks. A fixed shuffle puts images
    into the splits of the Inception Score and picks those that are kept: files sorted by class would make nonsense of it.
    """

    def __init__(self, n: int, keep: int, device: torch.device | str = "cpu") -> None:
        device = torch.device("cpu" if torch.device(device).type == "mps" else device)  # MPS has no float64

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self.n, self.device, splits = n, device, -(-n // SPLIT)
        self.place = torch.from_numpy(np.argsort(np.random.RandomState(2020).permutation(n)))
        self.starts = (torch.arange(splits + 1, device=device) * SPLIT).clamp(max=n)
        self.pool, self.spatial = (zeros(POOL), zeros(POOL, POOL)), (zeros(SPATIAL), zeros(SPATIAL, SPATIAL))
        self.p, self.p_log_p = zeros(splits, CLASSES), zeros(splits)
        self.kept = torch.zeros(min(keep, n), POOL, device=device)
        self.batches: list[tuple] = []  # of each batch: first number, hash, shape, minimum, maximum, channel sums

    def update(self, numbers: list[int], images: Tensor, pool: Tensor, spatial: Tensor, logits: Tensor) -> None:
        """Add a batch: image numbers in 0..N-1, bytes (B, 3, H, W), and what Inception returns for them."""
        images = images.cpu().contiguous()
        self.batches.append((numbers[0], hashlib.sha256(images.numpy()).digest(), tuple(images.shape[1:]),
                             int(images.min()), int(images.max()), images.double().mean((2, 3)).sum(0).numpy()))
        place, pool, spatial, logits = (x.to(self.device) for x in (self.place[numbers], pool, spatial, logits))
        self.kept[place[place < len(self.kept)]] = pool[place < len(self.kept)]
        for (total, products), x in ((self.pool, pool.double()), (self.spatial, spatial.double())):
            total += x.sum(0)
            products.addmm_(x.T, x)
        split = torch.searchsorted(self.starts, place, right=True) - 1
        log_p = logits.double().log_softmax(1)
        self.p.index_add_(0, split, log_p.exp())
        self.p_log_p.index_add_(0, split, (log_p.exp() * log_p).sum(1))

    def gather(self) -> "FeatureStatistics":
        """Add up the ranks' shares; every rank then has the whole."""
        if dist.is_initialized():
            for tensor in (*self.pool, *self.spatial, self.p, self.p_log_p, self.kept):
                dist.all_reduce(tensor)
            shares: list = [None] * dist.get_world_size()
            dist.all_gather_object(shares, self.batches)
            self.batches = sum(shares, [])
        self.batches.sort(key=lambda batch: batch[0])
        self.sha256 = hashlib.sha256(b"".join(batch[1] for batch in self.batches)).hexdigest()  # of all pixels
        self.shape = self.batches[0][2]
        self.means = sum(batch[5] for batch in self.batches) / self.n  # of the channels
        return self

    def moments(self, layer: tuple[Tensor, Tensor]) -> tuple[np.ndarray, np.ndarray]:
        """Mean and covariance (ddof = 1) of `self.pool` or `self.spatial`."""
        mu = layer[0] / self.n
        return mu.cpu().numpy(), ((layer[1] - self.n * mu.outer(mu)) / (self.n - 1)).cpu().numpy()

    def inception_score(self) -> float:
        """exp of the mean KL divergence within each split, averaged. Salimans et al. 2016."""
        counts = self.starts.diff()
        q = self.p / counts[:, None]
        return (self.p_log_p / counts - torch.xlogy(q, q).sum(1)).exp().mean().item()

    def __str__(self) -> str:
        low, high = min(batch[3] for batch in self.batches), max(batch[4] for batch in self.batches)
        r, g, b = self.means
        return f"N = {self.n}, uint8 {self.shape}, min {low}, max {high}, mean R {r:.0f} G {g:.0f} B {b:.0f}"


# Sets of images -------------------------------------------------------------------------------------------------------


def unreadable(path: Path, error: Exception) -> UserError:
    return UserError(f"{path}: truncated, or not what its name says ({rdpm.one_line(error)}); write it again")


def npz_array(path: Path, key: str) -> np.ndarray:
    """An array of an .npz, memory-mapped unless compressed: np.load would hold 50,000 images (10 GB) in memory."""
    with zipfile.ZipFile(path) as archive:
        member = archive.getinfo(key + ".npy")
    if member.compress_type != zipfile.ZIP_STORED:
        return np.load(path)[key]
    with open(path, "rb") as file:
        file.seek(member.header_offset + 26)
        file.seek(sum(struct.unpack("<HH", file.read(4))), 1)  # over the member's name and its extra field
        version = np.lib.format.read_magic(file)
        header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = header(file)
        if dtype.hasobject:
            raise ValueError(f"{key} holds Python objects")
        return np.memmap(path, dtype, "r", file.tell(), shape, "F" if fortran else "C")


class NpzImages(torch.utils.data.Dataset):
    """`arr_0` of an ADM .npz. Items are (bytes (3, H, W),)."""

    def __init__(self, path: Path) -> None:
        try:
            self.images = x = npz_array(path, "arr_0")
        except KeyError as error:
            raise UserError(f"{path}: holds no images (arr_0)") from error
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise unreadable(path, error) from error
        if x.dtype != np.uint8 or x.ndim != 4 or x.shape[3] != 3 or not x.size:
            nan = np.flatnonzero([np.isnan(image).any() for image in x])[:5].tolist() if x.dtype.kind == "f" else []
            limits = f", min {x.min()}, max {x.max()}" if x.size and x.dtype.kind in "buif" else ""
            raise UserError(f"{path}: arr_0 must be uint8 RGB (N, H, W, 3), round(127.5 (x + 1)), but is {x.dtype} "
                            f"{x.shape}{limits}" + (f", NaN in images {nan}" if nan else ""))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[Tensor]:
        return (torch.from_numpy(np.array(self.images[i])).permute(2, 0, 1),)


class FolderImages(torch.utils.data.Dataset):
    """The image files below a folder, in the order of their names. Items are (bytes (3, H, W),).

    Generated images must be RGB PNGs of one size without gaps in their numbers. Photographs may be of any kind that
    `rdpm.read_image` reads; with `size` they get ADM's centre crop.
    """

    def __init__(self, root: Path, generated: bool, size: int | None, pad: bool) -> None:
        self.generated, self.size, self.pad, self.files = generated, size, pad, rdpm.image_files(root)
        if not self.files:
            raise UserError(f"{root}: holds no images")
        counts = Counter(path.with_suffix("") for path in self.files)
        if twice := [str(name) for name, count in counts.items() if count > 1]:
            raise UserError(f"duplicated names, with different endings: {', '.join(twice[:5])}; remove one of each")
        numbers = {int(path.stem) for path in self.files if path.stem.isdigit() and path.parent == root}
        missing = sorted({*range(min(numbers, default=0), max(numbers, default=0))} - numbers)
        if generated and missing:
            raise UserError(f"{root}: {len(missing)} missing images, the first is number {missing[0]}; sample them again")
        self.shape = tuple(self[0][0].shape)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> tuple[Tensor]:
        path = self.files[i]
        if self.generated:
            try:
                with Image.open(path) as file:
                    kind, image = file.format, np.array(file)
            except Exception as error:  # Pillow's decoders raise many kinds
                raise unreadable(path, error) from error
            if kind != "PNG":
                raise UserError(f"{path}: not a PNG; lossy files change every number, write uint8 RGB PNGs (a data set is "
                                "named by the folder above its train/ and val/)")
            if image.dtype != np.uint8 or image.shape[2:] != (3,):
                raise UserError(f"{path}: must be uint8 RGB, but is {image.dtype} {image.shape}, min {image.min()}, max "
                                f"{image.max()}; write it as round(127.5 (x + 1)), without alpha")
        else:
            image = rdpm.read_image(path)
            image = np.array(rdpm.fit(image, self.size, self.pad) if self.size else image)
        image = torch.from_numpy(image).permute(2, 0, 1)
        if i and tuple(image.shape) != self.shape:
            raise UserError(f"{path}: {tuple(image.shape)}, but {self.files[0].name} is {self.shape}; all images "
                            "must have one size" + ("" if self.generated else "; --size N crops them as ADM does"))
        return (image,)


def open_images(name: str, generated: bool, size: int | None, pad: bool = False) -> torch.utils.data.Dataset:
    """The set that a flag names: of a data set the training split, or if `generated` the held-out one."""
    root = Path(name)
    if name in ("shapes", "mnist", "cifar10"):
        if not size:
            raise UserError(f"{name}: give the size of its images with --size N, such as 32")
        return rdpm.load_data(name, size, train=not generated, pad=pad)
    if root.suffix == ".npz" and root.is_file():
        return NpzImages(root)
    if not root.is_dir():
        raise UserError(f"{name}: no such file or folder; give an .npz, a folder, or shapes, mnist, cifar10")
    for split in ("val", "test") if generated else ("train",):
        if (root / "train").is_dir() and (root / split).is_dir():
            return FolderImages(root / split, False, size, pad)
    return FolderImages(root, generated, size, pad)


def check_count(n: int, name: str, allow_small: bool) -> None:
    if n < 2 or n < POOL and not allow_small:
        raise UserError(f"{name}: N = {n}, but the covariance of {POOL} features needs at least {POOL} images"
                        + (", and 2 in any case" if n < 2 else "; --allow-small gives a biased number all the same"))


def own_batches(n: int) -> Iterable[list[int]]:
    """This rank's batches of the numbers 0..n-1: every other one, so that none depends on the number of ranks."""
    batches = [list(range(i, min(i + BATCH, n))) for i in range(0, n, BATCH)][RANK::WORLD_SIZE]
    return tqdm(batches, unit=f" x {BATCH} images", disable=RANK > 0, leave=False)


def read(data: torch.utils.data.Dataset) -> Iterator[tuple[list[int], Tensor]]:
    """This rank's share of a set: (numbers, bytes (B, 3, H, W))."""
    with ThreadPoolExecutor(8) as pool:  # Pillow decodes outside the interpreter's lock
        for numbers in own_batches(len(data)):
            yield numbers, torch.stack([item[0] for item in pool.map(data.__getitem__, numbers)])


def measure(batches: Iterable[tuple[list[int], Tensor]], n: int, keep: int, inception: Inception) -> FeatureStatistics:
    """Statistics of N images that come as (numbers, bytes (B, 3, H, W)), to each rank its share."""
    statistics = FeatureStatistics(n, keep, inception.device)
    for numbers, images in batches:
        statistics.update(numbers, images, *inception(images))
    return statistics.gather()


# Evaluation -----------------------------------------------------------------------------------------------------------


@dataclass
class Reference:
    """What samples are compared with. None is what a file does not hold."""

    name: str
    sha256: str                                    # of the file, or of the pixels
    pool: tuple[np.ndarray, np.ndarray]            # mean, covariance
    spatial: tuple[np.ndarray, np.ndarray] | None
    kept: Tensor | None = None                     # features for precision and recall
    shape: tuple[int, ...] | None = None
    means: np.ndarray | None = None                # of the channels


def load_reference(name: str, inception: Inception, keep: int = REFERENCE_KEPT, size: int | None = None,
                   pad: bool = False, allow_small: bool = False) -> Reference:
    """A reference from --make-ref or from ADM, or the statistics of a set of images.

    keep = 0 leaves out precision and recall, and the time they take. UserError for a bad file, and for statistics
    of another network.
    """
    path, held = Path(name), {}
    if path.suffix == ".npz" and path.is_file():
        try:
            with np.load(path) as file:
                keys = ("mu", "sigma", "mu_s", "sigma_s", "weights")
                held = {key: file[key] for key in keys if key in file.files} | dict.fromkeys({*file.files} - {*keys})
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise unreadable(path, error) from error
    if "mu" not in held:
        data = open_images(name, False, size, pad)
        check_count(len(data), name, allow_small)
        s = measure(read(data), len(data), keep, inception)
        return Reference(name, s.sha256, s.moments(s.pool), s.moments(s.spatial), s.kept if keep else None, s.shape,
                         s.means)
    for mu, sigma, n in (("mu", "sigma", POOL), ("mu_s", "sigma_s", SPATIAL)):
        pair = [held.get(key, np.zeros(0)) for key in (mu, sigma)]
        if mu in held and ([x.shape for x in pair] != [(n,), (n, n)] or not all(np.isfinite(x).all() for x in pair)):
            raise UserError(f"{name}: {mu} and {sigma} must be finite, ({n},) and ({n}, {n}), but are "
                            f"{pair[0].shape} and {pair[1].shape}; make the reference again")
    weights = str(held.get("weights", SHA256))  # ADM's files do not say
    if weights != inception.weights:
        raise UserError(f"{name}: its statistics are of the network {weights[:8]}, not {inception.weights[:8]}; "
                        "make a reference with --make-ref, with or without --random-features as here")
    spatial = (held["mu_s"], held["sigma_s"]) if "mu_s" in held else None
    sha256 = hashlib.sha256(np.memmap(path, np.uint8, "r")).hexdigest()
    reference = Reference(name, sha256, (held["mu"], held["sigma"]), spatial)
    if "arr_0" in held:
        data = NpzImages(path)
        reference.shape = tuple(data[0][0].shape)
        if keep:
            s = measure(read(data), len(data), keep, inception)
            reference.kept, reference.means = s.kept, s.means
    return reference


def make_reference(name: str, out: Path, inception: Inception, size: int | None, pad: bool, allow_small: bool) -> None:
    """Write the statistics of a set, and 10,000 of its images for precision and recall, as an ADM reference."""
    data = open_images(name, False, size, pad)
    check_count(len(data), name, allow_small)
    s = measure(read(data), len(data), 0, inception)
    if RANK == 0:
        (mu, sigma), (mu_s, sigma_s) = s.moments(s.pool), s.moments(s.spatial)
        chosen = np.flatnonzero(s.place < REFERENCE_KEPT).tolist()
        images = np.stack([data[i][0].permute(1, 2, 0).numpy() for i in chosen])
        with rdpm.replacing(out) as path:
            np.savez(path, arr_0=images, mu=mu, sigma=sigma, mu_s=mu_s, sigma_s=sigma_s, weights=inception.weights)
        print(f"{name} ({s}) -> {out}")


def check_size(shape: tuple[int, ...], name: str, reference: Reference) -> None:
    if reference.shape and reference.shape != shape:
        raise UserError(f"{name}: images are {shape}, but the reference {reference.name} is {reference.shape}; make "
                        "them one size (--size N crops a reference folder as ADM does)")


def compare(s: FeatureStatistics, reference: Reference, inception: Inception) -> dict:
    """{"values": {"FID-N", "sFID-N", "IS", "precision", "recall"}, and what they rest on}.

    A value that cannot be had is None, and "notes" says why.
    """
    random, notes = inception.weights != SHA256, []
    fid, sfid, suffix = ("FD-random", "sFD-random", "-random") if random else ("FID", "sFID", "")
    fid, sfid = f"{fid}-{s.n}", f"{sfid}-{s.n}"
    values: dict = {fid: frechet_distance(*s.moments(s.pool), *reference.pool), sfid: None}
    if reference.spatial:
        values[sfid] = frechet_distance(*s.moments(s.spatial), *reference.spatial)
    else:
        notes.append(f"{sfid} unavailable: {reference.name} holds no mu_s, sigma_s")
    if not random:  # random features classify nothing
        values["IS"] = s.inception_score()
        notes.append("IS: images are shuffled with a fixed seed before they are split, so their order has no effect")
    both = None, None
    if reference.kept is None:
        notes.append(f"precision, recall unavailable: {reference.name} holds statistics only, no images (arr_0)")
    elif min(len(reference.kept), len(s.kept)) > 3:
        both = precision_recall(reference=reference.kept, samples=s.kept)
    else:
        notes.append("precision, recall unavailable: they need at least 4 images")
    values["precision" + suffix], values["recall" + suffix] = both
    if reference.means is not None:
        as_rgb, as_bgr = (np.abs(means - reference.means).sum() for means in (s.means, s.means[::-1]))
        if as_rgb > max(2 * as_bgr, 6):
            notes.append("are the samples BGR? Their channel means fit the reference better the other way round")
    return {"values": values, "notes": notes, "N": s.n, "samples": str(s), "samples sha256": s.sha256,
            "reference": reference.name, "reference sha256": reference.sha256, "weights": inception.weights}


def fid_of_generator(model: rdpm.RDPM, tokenizer: rdpm.Tokenizer, sampling: rdpm.Sampling, reference: Reference,
                     inception: Inception, num: int, seed: int = 0) -> dict:
    """Sample `num` images (at least 2) with balanced labels and `compare` them; no image is written.

    Every rank samples its share, and every rank returns the same.
    """
    size, classes = tokenizer.config.image_size, model.config.num_classes
    check_size((3, size, size), "samples", reference)

    def batches() -> Iterator[tuple[list[int], Tensor]]:
        for numbers in own_batches(num):
            labels = torch.tensor(numbers, device=inception.device) % classes
            with rdpm.autocast(inception.device):  # as sample.py
                yield numbers, rdpm.to_uint8(rdpm.sample(model, tokenizer, labels, seed, numbers, sampling))

    s = measure(batches(), num, SAMPLES_KEPT if reference.kept is not None else 0, inception)
    return compare(s, reference, inception) | {"seed": seed, "sampling": asdict(sampling)}


@torch.inference_mode()
def evaluate_tokenizer(tokenizer: rdpm.Tokenizer, data: torch.utils.data.Dataset, device: torch.device, seed: int,
                       statistics: "tuple[Inception, FeatureStatistics, FeatureStatistics] | None" = None) -> dict:
    """PSNR in dB and SSIM (per image, rounded to bytes, then averaged), latent error |v - z'_T|^2, and codes in use.

    usage: share of the K codes that occur, over all steps and for each t; perplexity_t: exp of their entropy. Images and
    reconstructions are added to the `statistics`, for rFID. Every rank takes its share, and returns the same.
    """
    T, K = tokenizer.config.T, tokenizer.config.K
    sums, usage = torch.zeros(3, device=device), torch.zeros(T, K, dtype=torch.long, device=device)
    for numbers, x in read(data):
        x = x.to(device)
        streams = rdpm.ImageStreams(seed, numbers, device)
        x_rec, v, quantized = tokenizer(rdpm.to_float(x), tokenizer.noise(streams))
        x_rec, latent_error = rdpm.to_uint8(x_rec), (v - quantized.z_sum).square().mean((1, 2))
        sums += torch.stack([psnr(x, x_rec), ssim(x, x_rec), latent_error]).sum(1)
        usage += torch.stack([codes.flatten().bincount(minlength=K) for codes in quantized.codes])
        if statistics:
            inception, originals, reconstructions = statistics
            originals.update(numbers, x, *inception(x))
            reconstructions.update(numbers, x_rec, *inception(x_rec))
    rdpm.sum_over_ranks(sums, usage)
    p = usage / usage.sum(1, keepdim=True)
    return dict(zip(("psnr", "ssim", "latent_error"), (sums / len(data)).tolist(), strict=True)) | {
        "usage": (usage.sum(0) > 0).float().mean().item(), "usage_t": (usage > 0).float().mean(1).tolist(),
        "perplexity_t": torch.special.entr(p).sum(1).exp().tolist()}


def rfid(tokenizer: rdpm.Tokenizer, data: torch.utils.data.Dataset, inception: Inception, seed: int = 0) -> dict:
    """The distance of a set to its own reconstructions, and what `evaluate_tokenizer` measures on the way."""
    n = len(data)
    originals, reconstructions = FeatureStatistics(n, 0, inception.device), FeatureStatistics(n, 0, inception.device)
    values = evaluate_tokenizer(tokenizer, data, inception.device, seed, (inception, originals, reconstructions))
    moments = [s.gather().moments(s.pool) for s in (originals, reconstructions)]
    name = f"rFID-{n}" if inception.weights == SHA256 else f"rFD-random-{n}"
    return {"values": {name: frechet_distance(*moments[0], *moments[1])} | values, "N": n, "samples": str(originals),
            "notes": [f"SSIM: {SSIM_CONVENTION}"], "samples sha256": originals.sha256, "weights": inception.weights,
            "seed": seed}


def parse_args() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("sets", nargs="*", metavar="REF SAMPLES", help="the same as --ref REF --samples SAMPLES")
    p.add_argument("--ref", help="compare with this: an .npz, a folder, or a data set's training split")
    mode = p.add_mutually_exclusive_group()
    mode.add_argument("--samples", help="generated images: an .npz, a folder of PNGs, or a data set's held-out split")
    mode.add_argument("--ckpt", help="sample from this generator instead")
    mode.add_argument("--tokenizer", help="reconstruct --data with this tokenizer")
    mode.add_argument("--make-ref", metavar="DATA", help="write the statistics of a set to --out")
    p.add_argument("--num", type=rdpm.positive_int, help="images to sample (default 50000), or to reconstruct (all)")
    p.add_argument("--data", help="a data set, of which the held-out split is taken")
    p.add_argument("--out", help="the JSON file (default fid.json), or the .npz of --make-ref")
    p.add_argument("--size", type=rdpm.positive_int, help="crop data sets and reference folders to it, as ADM does")
    p.add_argument("--pad", action="store_true", help="pad a data set's images to the size, if they are smaller")
    p.add_argument("--random-features", action="store_true", help="random weights instead: FD-random, not FID")
    p.add_argument("--allow-small", action="store_true", help=f"go on with fewer than {POOL} images")
    p.add_argument("--seed", type=rdpm.natural_int, default=0, help="of the samples, or of the tokenizer's noise")
    add_sampling_flags(p)
    p.add_argument("--device", help="cuda, mps or cpu; the best there is by default")
    args = p.parse_args()
    if len(args.sets) == 2:
        args.ref, args.samples = args.sets
    if not (args.make_ref or args.tokenizer or args.samples or args.ckpt) or len(args.sets) not in (0, 2):
        raise UserError("give two sets, or one of --samples or --ckpt (with --ref), --tokenizer (--data), --make-ref")
    if args.tokenizer and (args.ref or not args.data):
        raise UserError("--tokenizer needs --data, and no --ref: rFID compares the images of --data with their own "
                        "reconstructions, never with the reference of a generator")
    if (args.samples or args.ckpt) and not args.ref:
        raise UserError("--ref is missing: the training set, or what --make-ref made of it")
    if args.make_ref and Path(args.out or "").suffix != ".npz":
        raise UserError(f"--out {args.out or 'is missing'}: --make-ref writes an .npz")
    if (args.samples or args.make_ref) and args.num:
        raise UserError(f"--num {args.num}: only for --ckpt and --tokenizer; of a set all images are taken")
    args.out = Path(args.out or "fid.json")
    with rdpm.replacing(args.out.with_name("fid-can-write-here")) as path:  # before anything that takes long
        path.touch()
    args.out.with_name("fid-can-write-here").unlink(missing_ok=True)
    return args


def main() -> None:
    args = parse_args()
    device = rdpm.launch(args.device)
    inception = load_inception(args.random_features, device)
    if args.make_ref:
        return make_reference(args.make_ref, args.out, inception, args.size, args.pad, args.allow_small)
    if args.tokenizer:
        tokenizer = rdpm.load_tokenizer(args.tokenizer, device)
        data = rdpm.load_data(args.data, tokenizer.config.image_size, train=False, pad=args.pad)
        if args.num:
            data = torch.utils.data.Subset(data, rdpm.balanced_subset(data.labels, args.num))
        check_count(len(data), args.data, args.allow_small)
        heading = f"{args.data}, held-out split, against its reconstructions by {args.tokenizer}"
        result = rfid(tokenizer, data, inception, args.seed)
    elif args.ckpt:
        num = args.num or 50_000
        check_count(num, f"--num {num}", args.allow_small)
        model, tokenizer, _, defaults = rdpm.load_generator(args.ckpt, device)
        size, sampling = tokenizer.config.image_size, sampling_from(args, defaults, tokenizer.config.T)
        reference = load_reference(args.ref, inception, REFERENCE_KEPT, size, args.pad, args.allow_small)
        heading = f"{args.ckpt} against {args.ref}"
        result = fid_of_generator(model, tokenizer, sampling, reference, inception, num, args.seed)
    else:
        data = open_images(args.samples, True, args.size, args.pad)
        check_count(len(data), args.samples, args.allow_small)
        reference = load_reference(args.ref, inception, REFERENCE_KEPT, args.size, args.pad, args.allow_small)
        check_size(tuple(data[0][0].shape), args.samples, reference)
        s = measure(read(data), len(data), SAMPLES_KEPT if reference.kept is not None else 0, inception)
        heading = f"{args.samples} against {args.ref}"
        result = compare(s, reference, inception)
    if RANK > 0:
        return
    print(heading, result["samples"], sep="\n")
    for name, value in result["values"].items():
        if value is not None:
            print(f"  {name:18}", *(f"{v:.4f}".removesuffix(".0000") for v in np.atleast_1d(value)))
    print(*result["notes"], sep="\n")
    versions = {module.__name__: module.__version__ for module in (torch, torchvision, np, scipy, PIL)}
    result |= {"command": " ".join(sys.argv), "versions": versions | {"python": platform.python_version()}}
    with rdpm.replacing(args.out) as path:
        path.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    rdpm.run_main(main)
