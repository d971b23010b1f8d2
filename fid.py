"""FID, sFID, Inception Score, precision, recall; rFID, PSNR, SSIM and code usage for tokenizers.

    python fid.py ref.npz out/                                          a folder of PNGs, or an .npz, against another
    python fid.py --make-ref data/imagenet --size 256 --out ref.npz     once: the reference, of the train split
    python fid.py --ref ref.npz --ckpt gen.pt --num 50000               sample and evaluate, no image files
    torchrun --nproc-per-node 8 -- fid.py --ref ref.npz --ckpt gen.pt   the same numbers, from eight GPUs
    python fid.py --tokenizer vq.pt --data data/imagenet                rFID, PSNR, SSIM, codes; held-out split
    python fid.py mnist a.npz --size 32 --pad --random-features --allow-small     no weights, few images

A set of images is an .npz with uint8 `arr_0` (N, H, W, 3), a folder of images (samples: RGB PNGs), or a data set:
shapes, mnist, cifar10, or a folder with train/ in it. Of a data set the reference is the training split; samples and
--data are the held-out one. A table is printed, and --out written (JSON).

The features are those of the 2015 Inception network (95 MB, fetched and checked). --random-features needs no download:
the same network with seeded random weights, after Naeem et al. 2020, for comparing runs with each other: FD-random.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset, TensorDataset
from torchvision.models.inception import InceptionE
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


def resize_matrix(n: int) -> Tensor:
    """TensorFlow 1's bilinear resize of n pixels to 299, (299, n): source i * n / 299, no half pixel, no blur."""
    i = np.arange(299)
    position = i.astype(np.float32) * np.float32(n / 299)  # float32, because TensorFlow rounds here
    low, share = position.astype(int), position % 1
    matrix = np.zeros((299, n))
    np.add.at(matrix, (i, low), 1 - share)
    np.add.at(matrix, (i, np.minimum(low + 1, n - 1)), share)
    return torch.from_numpy(matrix).float()


class Inception(nn.Module):
    """torchvision's network with the pooling of TensorFlow's of 2015-12-05. `load_inception` adds weights."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        super().__init__()
        self.device, self.weights = torch.device(device), SHA256
        self.net = torchvision.models.inception_v3(num_classes=CLASSES, aux_logits=False, init_weights=False)
        self.net.Mixed_7c = MaxPoolE(POOL)
        for name in ("Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e", "Mixed_7b"):
            getattr(self.net, name).branch_pool.register_forward_pre_hook(leave_out_padding)
        self.layout = torch.channels_last if self.device.type == "cpu" else torch.contiguous_format  # the faster
        self.eval().requires_grad_(False).to(self.device, memory_format=self.layout)

    @torch.no_grad()
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Bytes (B, 3, H, W) -> float32 pool_3 (B, 2048), spatial features (B, 2023), logits (B, 1008) less bias.

        sFID's spatial features: channels 0..6 of Mixed_6d (its 1x1 branch), flattened height, width, channel.
        """
        with torch.autocast(self.device.type, enabled=False):  # float32; rdpm.py has switched TF32 off
            x = images.to(self.device).float()
            height, width = (resize_matrix(n).to(self.device) for n in x.shape[2:])
            x = ((height @ x @ width.T - 128) / 128).contiguous(memory_format=self.layout)
            for name, block in list(self.net.named_children())[:-2]:  # without dropout and fc
                x = block(x)
                if name == "Mixed_6d":
                    spatial = x[:, :7].permute(0, 2, 3, 1).flatten(1)
            pool = x.flatten(1)
            return pool, spatial, pool @ self.net.fc.weight.T


def load_inception(random_features: bool = False, device: torch.device | str = "cpu") -> Inception:
    """The network with the official weights, or with seeded He-normal ones. UserError if they cannot be had."""
    inception = Inception(device)
    if random_features:  # they see blur, layout and a change of classes; light noise they hardly see
        rng, inception.weights = np.random.RandomState(0), "random-0"  # RandomState: NumPy never changes its stream
        for w in inception.net.state_dict().values():
            if w.ndim > 1:
                w.copy_(torch.from_numpy(rng.standard_normal(tuple(w.shape)) * (2 / w[0].numel()) ** 0.5))
    else:
        inception.net.load_state_dict(rdpm.pretrained(URL, SHA256))
    return inception


# Metrics --------------------------------------------------------------------------------------------------------------


def frechet_distance(mu1: np.ndarray, sigma1: np.ndarray, mu2: np.ndarray, sigma2: np.ndarray) -> float:
    """|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)), in float64. Heusel et al. 2017.

    With sigma1 = A A^T, the root's trace is the sum of the roots of the eigenvalues of A^T sigma2 A, a symmetric
    matrix: always real, and faster than the root of a matrix.
    """
    values, vectors = np.linalg.eigh(sigma1)
    some = values > values[-1] * len(values) * np.finfo(float).eps  # the others are rounding errors
    a = vectors[:, some] * np.sqrt(values[some])
    root = np.sqrt(np.linalg.eigvalsh(a.T @ sigma2 @ a).clip(0)).sum()
    return float(((mu1 - mu2) ** 2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * root)


def precision_recall(*, reference: Tensor, samples: Tensor, k: int = 3, tile: int = 1000) -> tuple[float, float]:
    """Precision: samples inside a reference ball. Recall: references inside a sample ball. Features (N, D), (M, D).

    Kynkaanniemi et al. 2019: a ball reaches to its centre's k-th neighbour. Only `tile` rows of distances are held.
    """
    def inside(x: Tensor, centres: Tensor) -> float:
        radii = torch.cat([torch.cdist(rows, centres).kthvalue(k + 1).values for rows in centres.split(tile)])
        hits = torch.cat([(torch.cdist(rows, centres) <= radii).any(1) for rows in x.split(tile)])
        return hits.double().mean().item()

    return inside(samples, reference), inside(reference, samples)


def psnr(x: Tensor, y: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, (B,), of bytes x and y (B, C, H, W)."""
    return 10 * torch.log10(255**2 / (x.float() - y.float()).square().flatten(1).mean(1))


def ssim(x: Tensor, y: Tensor) -> Tensor:
    """Structural similarity, (B,), of bytes x and y (B, C, H, W), H and W at least 7, by scikit-image's defaults.

    Data range 1 on [0, 1], uniform 7x7 window, sample covariance, mean over channels.
    """
    def box(z: Tensor) -> Tensor:  # sums of a window's integers: float32 holds them all, int32 their products
        return F.avg_pool2d(z, 7, 1, divisor_override=1).round().int()

    x, y = x.float(), y.float()
    sx, sy = box(x), box(y)
    ux, uy = sx / 49, sy / 49
    vx, vy, vxy = ((49 * box(a * b) - sa * sb) / (49 * 48) for a, b, sa, sb in
                   ((x, x, sx, sx), (y, y, sy, sy), (x, y, sx, sy)))
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    similarity = (2 * ux * uy + c1) * (2 * vxy + c2) / ((ux**2 + uy**2 + c1) * (vx + vy + c2))
    return similarity.flatten(1).mean(1)


# Sets of images -------------------------------------------------------------------------------------------------------


def read_npz(path: Path, *keys: str) -> dict[str, np.ndarray | None]:
    """The arrays of an .npz, None for those that are not among the keys."""
    try:
        with np.load(path) as file:
            return {key: file[key] if key in keys else None for key in file}
    except Exception as error:  # NumPy, zipfile and zlib raise many kinds
        raise UserError(f"{path}: not a readable .npz ({rdpm.one_line(error)}); write it again") from error


class Pictures(Dataset):
    """Image files of one size, as training reads them. Items are (bytes (3, H, W),)."""

    def __init__(self, files: list[Path], generated: bool, size: int | None, pad: bool) -> None:
        self.files, self.generated, self.size, self.pad, self.shape = files, generated, size, pad, None
        self.shape = tuple(self[0][0].shape)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> tuple[Tensor]:
        path, image = self.files[i], rdpm.read_image(self.files[i])
        if self.generated:
            with Image.open(path) as file:  # lossy files would change every number
                if (file.format, file.mode) != ("PNG", "RGB"):
                    raise UserError(f"{path}: is {file.format} of mode {file.mode}, but samples must be uint8 RGB PNGs")
        elif self.size:
            image = rdpm.fit(image, self.size, self.pad)
        image = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        check_size(tuple(image.shape), str(path), self)
        return (image,)


def check_size(shape: tuple[int, ...], name: str, others: "Pictures | Features") -> None:
    if others.shape and others.shape != shape:
        raise UserError(f"{name}: {shape}, not {others.shape}; make all one size (--size N crops as ADM does)")


def open_images(name: str, generated: bool, size: int | None, pad: bool, allow_small: bool) -> Dataset:
    """A set by its name, an .npz in memory. Of a data set the training split, or if `generated` the held-out one."""
    root = Path(name)
    if name in ("shapes", "mnist", "cifar10") or (root / "train").is_dir():
        if not size:
            raise UserError(f"{name}: give the size of its images with --size N, such as 32")
        data = rdpm.load_data(name, size, train=not generated, pad=pad)
    elif root.suffix == ".npz" and root.is_file():
        x = read_npz(root, "arr_0").get("arr_0", np.zeros(0))
        if x.dtype != np.uint8 or x.ndim != 4 or x.shape[3] != 3 or not x.size:
            raise UserError(f"{name}: arr_0 is {x.dtype} {x.shape}, but must be uint8 RGB (N, H, W, 3); write it again")
        data = TensorDataset(torch.from_numpy(x).permute(0, 3, 1, 2))
    elif files := rdpm.image_files(root):
        numbers = sorted(int(path.stem) for path in files if path.stem.isdecimal() and path.parent == root)
        wrong = [min(pair) for pair in enumerate(numbers, min(numbers, default=0)) if pair[0] != pair[1]]
        if generated and wrong:
            raise UserError(f"{name}: images are missing or there twice, first number {wrong[0]}; sample them again")
        data = Pictures(files, generated, size, pad)
    else:
        raise UserError(f"{name}: no such file, or no images in it; give an .npz, a folder, or shapes, mnist, cifar10")
    check_count(len(data), name, allow_small)
    return data


def check_count(n: int, name: str, allow_small: bool) -> None:
    if n < 4 or n < POOL and not allow_small:
        raise UserError(f"{name}: N = {n}, but {POOL} features need as many images (4, and biased, with --allow-small)")


def own_batches(n: int) -> Iterable[list[int]]:
    """This rank's batches of the numbers 0..n-1: every other one, so that none depends on the number of ranks."""
    batches = [list(range(i, min(i + BATCH, n))) for i in range(0, n, BATCH)][RANK::WORLD_SIZE]
    return tqdm(batches, unit=f" x {BATCH} images", disable=RANK > 0, leave=False)


def read(data: Dataset) -> Iterator[tuple[list[int], Tensor]]:
    """This rank's share of a set: (numbers, bytes (B, 3, H, W))."""
    with ThreadPoolExecutor(8) as pool:  # Pillow decodes outside the interpreter's lock
        for numbers in own_batches(len(data)):
            yield numbers, torch.stack([item[0] for item in pool.map(data.__getitem__, numbers)])


# Evaluation -----------------------------------------------------------------------------------------------------------


@dataclass
class Features:
    """What is known of a set of images. None is what a file does not hold."""

    n: int = 0
    pool: tuple[np.ndarray, np.ndarray] | None = None     # mean, covariance
    spatial: tuple[np.ndarray, np.ndarray] | None = None
    kept: Tensor | None = None                            # pool_3 of some images, for precision and recall
    score: float | None = None                            # Inception Score
    means: np.ndarray | None = None                       # of the channels
    shape: tuple[int, ...] | None = None                  # of an image


def measure(batches: Iterable[tuple[list[int], Tensor]], n: int, inception: Inception,
            keep: int = SAMPLES_KEPT) -> Features:
    """Streamed statistics of N images, which come as (numbers in 0..N-1, bytes (B, 3, H, W)), to each rank its share.

    Moments in float64; the Inception Score (Salimans et al. 2016), exp of the mean KL divergence within each split,
    averaged; the pool_3 of `keep` images. Every rank returns the whole.
    """
    device = torch.device("cpu") if inception.device.type == "mps" else inception.device  # MPS has no float64
    zeros = partial(torch.zeros, dtype=torch.float64, device=device)
    # Splits and kept images are chosen after a fixed shuffle: files sorted by class would make nonsense of both.
    place = torch.from_numpy(np.random.RandomState(2020).permutation(n).argsort())
    counts = torch.bincount(place // SPLIT).to(device)
    layers = (zeros(POOL), zeros(POOL, POOL)), (zeros(SPATIAL), zeros(SPATIAL, SPATIAL))
    p, p_log_p, channels = zeros(len(counts), CLASSES), zeros(len(counts)), zeros(3)
    kept = torch.zeros(min(keep, n), POOL, device=device)
    for numbers, images in batches:
        here, images, pool, spatial, logits = (x.to(device) for x in (place[numbers], images, *inception(images)))
        for (total, products), x in zip(layers, (pool.double(), spatial.double()), strict=True):
            total += x.sum(0)
            products.addmm_(x.T, x)
        log_p = logits.double().log_softmax(1)
        p.index_add_(0, here // SPLIT, log_p.exp())
        p_log_p.index_add_(0, here // SPLIT, (log_p.exp() * log_p).sum(1))
        kept[here[here < keep]] = pool[here < keep]
        channels += images.double().mean((2, 3)).sum(0)
    rdpm.sum_over_ranks(*layers[0], *layers[1], p, p_log_p, channels, kept)
    moments = [(total / n, (products - total.outer(total) / n) / (n - 1)) for total, products in layers]  # ddof = 1
    pool, spatial = (tuple(x.cpu().numpy() for x in pair) for pair in moments)
    q = p / counts[:, None]
    score = (p_log_p / counts - torch.xlogy(q, q).sum(1)).exp().mean().item()
    return Features(n, pool, spatial, kept if keep else None, score, (channels / n).cpu().numpy())


def load_reference(name: str, inception: Inception, keep: int = REFERENCE_KEPT, size: int | None = None,
                   pad: bool = False, allow_small: bool = False) -> Features:
    """A reference from --make-ref or from ADM, or a set of images. keep = 0 saves the time for precision and recall."""
    path, features = Path(name), Features()
    stored = path.suffix == ".npz" and path.is_file()
    held = read_npz(path, "mu", "sigma", "mu_s", "sigma_s", "weights") if stored else {}
    weights = str(held.get("weights", SHA256))  # ADM's files do not say
    if "mu" in held and weights != inception.weights:
        raise UserError(f"{name}: of the network {weights[:8]}, not {inception.weights[:8]}; use --make-ref again")
    if "mu" not in held or "arr_0" in held:
        data = open_images(name, False, size, pad, allow_small or "mu" in held)
        if keep or "mu" not in held:
            features = measure(read(data), len(data), inception, keep)
        features.shape = tuple(data[0][0].shape)
    if "mu" in held:
        features.pool, features.spatial = (tuple(held[key] for key in keys if key in held)
                                           for keys in (("mu", "sigma"), ("mu_s", "sigma_s")))
        for pair, n in ((features.pool, POOL), (features.spatial, SPATIAL)):
            if pair and ([x.shape for x in pair] != [(n,), (n, n)] or not all(np.isfinite(x).all() for x in pair)):
                raise UserError(f"{name}: mean and covariance must be finite, ({n},) and ({n}, {n}); make it again")
    return features


def compare(samples: Features, reference: Features, inception: Inception) -> dict:
    """FID-N, sFID-N, IS, precision and recall, under "values". One that cannot be had is None, and a note says why."""
    random, notes = inception.weights != SHA256, []
    fid = f"FD-random-{samples.n}" if random else f"FID-{samples.n}"
    values: dict = {fid: frechet_distance(*samples.pool, *reference.pool), "s" + fid: None}
    if reference.spatial:
        values["s" + fid] = frechet_distance(*samples.spatial, *reference.spatial)
    else:
        notes.append(f"s{fid} unavailable: the reference holds no mu_s, sigma_s")
    if not random:  # random features classify nothing
        values["IS"] = samples.score
    both = ("precision-random", "recall-random") if random else ("precision", "recall")
    if reference.kept is None:
        values |= dict.fromkeys(both)
        notes.append("precision, recall unavailable: the reference holds statistics only, no images (arr_0)")
    else:
        values |= zip(both, precision_recall(reference=reference.kept, samples=samples.kept), strict=True)
    if reference.means is not None:
        as_rgb, as_bgr = (np.abs(means - reference.means).sum() for means in (samples.means, samples.means[::-1]))
        if as_rgb > max(2 * as_bgr, 6):
            notes.append("are the samples BGR? Their channel means fit the reference better the other way round")
    return {"values": values, "notes": notes, "N": samples.n}


def fid_of_generator(model: rdpm.RDPM, tokenizer: rdpm.Tokenizer, sampling: rdpm.Sampling, reference: Features,
                     inception: Inception, num: int, seed: int = 0) -> dict:
    """Sample `num` images with balanced labels, each rank its share, and `compare` them; no image is written."""
    size, classes = tokenizer.config.image_size, model.config.num_classes
    check_size((3, size, size), "samples", reference)

    def batches() -> Iterator[tuple[list[int], Tensor]]:
        for numbers in own_batches(num):
            labels = torch.tensor(numbers, device=inception.device) % classes
            with rdpm.autocast(inception.device):  # as sample.py
                x = rdpm.sample(model, tokenizer, labels, seed, numbers, sampling)
            yield numbers, rdpm.to_uint8(x)

    return compare(measure(batches(), num, inception), reference, inception) | {"sampling": asdict(sampling)}


@torch.inference_mode()
def evaluate_tokenizer(tokenizer: rdpm.Tokenizer, data: Dataset, device: torch.device, seed: int,
                       inception: Inception | None = None) -> dict:
    """PSNR in dB and SSIM (per image, rounded to bytes, then averaged), latent error |v - z'_T|^2, and codes in use.

    usage: share of the K codes that occur, over all steps and for each t; perplexity_t: exp of their entropy. With
    `inception` also rFID, the distance of the images to their reconstructions. Every rank returns the same.
    """
    T, K, n = tokenizer.config.T, tokenizer.config.K, len(data)
    sums, usage = torch.zeros(3, device=device), torch.zeros(T, K, dtype=torch.long, device=device)

    def reconstructions() -> Iterator[tuple[list[int], Tensor]]:
        for numbers, x in read(data):
            x = x.to(device)
            x_rec, v, quantized = tokenizer(rdpm.to_float(x), tokenizer.noise(rdpm.ImageStreams(seed, numbers, device)))
            x_rec, latent_error = rdpm.to_uint8(x_rec), (v - quantized.z_sum).square().mean((1, 2))
            sums.add_(torch.stack([psnr(x, x_rec), ssim(x, x_rec), latent_error]).sum(1))
            usage.add_(torch.stack([codes.flatten().bincount(minlength=K) for codes in quantized.codes]))
            yield numbers, x_rec

    values, batches = {}, reconstructions()
    if inception:
        before, after = (measure(images, n, inception, keep=0) for images in (read(data), batches))
        name = f"rFID-{n}" if inception.weights == SHA256 else f"rFD-random-{n}"
        values[name] = frechet_distance(*before.pool, *after.pool)
    for _ in batches:  # without Inception nobody has asked for them yet
        pass
    rdpm.sum_over_ranks(sums, usage)
    p = usage / usage.sum(1, keepdim=True)
    return values | dict(zip(("psnr", "ssim", "latent_error"), (sums / n).tolist(), strict=True)) | {
        "usage": (usage.sum(0) > 0).float().mean().item(), "usage_t": (usage > 0).float().mean(1).tolist(),
        "perplexity_t": torch.special.entr(p).sum(1).exp().tolist()}


def parse_args() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("sets", nargs="*", metavar="REF SAMPLES", help="the same as --ref REF --samples SAMPLES")
    p.add_argument("--ref", help="compare with this: an .npz, a folder, or a data set's training split")
    p.add_argument("--samples", help="generated images: an .npz, a folder of PNGs, or a data set's held-out split")
    p.add_argument("--ckpt", help="sample from this generator instead")
    p.add_argument("--tokenizer", help="reconstruct --data with this tokenizer")
    p.add_argument("--make-ref", metavar="DATA", help="write the statistics of a set to --out")
    p.add_argument("--num", type=rdpm.positive_int, help="images to sample (default 50000), or to reconstruct (all)")
    p.add_argument("--data", help="a data set, of which the held-out split is taken")
    p.add_argument("--out", type=Path, default=Path("fid.json"), help="a .json, or the .npz of --make-ref")
    p.add_argument("--size", type=rdpm.positive_int, help="crop data sets and reference folders to it, as ADM does")
    p.add_argument("--pad", action="store_true", help="pad a data set's images to the size, if they are smaller")
    p.add_argument("--random-features", action="store_true", help="random weights instead: FD-random, not FID")
    p.add_argument("--allow-small", action="store_true", help=f"go on with fewer than {POOL} images")
    p.add_argument("--seed", type=rdpm.natural_int, default=0, help="of the samples, or of the tokenizer's noise")
    add_sampling_flags(p)
    p.add_argument("--device", help="cuda, mps or cpu; the best there is by default")
    args = p.parse_args()
    given = {name for name in ("ref", "samples", "ckpt", "tokenizer", "data", "make_ref", "num") if getattr(args, name)}
    if len(args.sets) == 2 and not given:
        (args.ref, args.samples), given, args.sets = args.sets, {"ref", "samples"}, []
    allowed = {"ref", "samples"}, {"make_ref"}, {"ref", "ckpt"}, {"ref", "ckpt", "num"}, {"tokenizer", "data"}
    if args.sets or given not in (*allowed, {"tokenizer", "data", "num"}):
        raise UserError("give two sets REF SAMPLES; or --ref and --ckpt; or --tokenizer and --data, whose images rFID "
                        "compares with their own reconstructions, never with a --ref; or --make-ref")
    suffix = ".npz" if args.make_ref else ".json"
    if args.out.suffix != suffix or args.out.is_dir() or not os.access(args.out.parent, os.W_OK):
        raise UserError(f"--out {args.out}: must end in {suffix} and lie in a folder that can be written into")
    return args


def main() -> None:
    args = parse_args()
    device = rdpm.launch(args.device)
    inception = load_inception(args.random_features, device)
    if args.make_ref:
        data = open_images(args.make_ref, False, args.size, args.pad, args.allow_small)
        features = measure(read(data), len(data), inception, keep=0)
        some = np.sort(np.random.RandomState(2020).permutation(len(data))[:REFERENCE_KEPT])  # for precision and recall
        if RANK == 0:
            arrays = dict(zip(("mu", "sigma", "mu_s", "sigma_s"), features.pool + features.spatial, strict=True))
            images = np.stack([data[i][0].permute(1, 2, 0) for i in some])
            with rdpm.replacing(args.out) as path:
                np.savez(path, arr_0=images, weights=inception.weights, **arrays)
            print(f"wrote {args.out}: {args.make_ref}, N = {len(data)}")
        return
    if args.tokenizer:
        tokenizer = rdpm.load_tokenizer(args.tokenizer, device)
        data = rdpm.load_data(args.data, tokenizer.config.image_size, train=False, pad=args.pad)
        if args.num:
            data = Subset(data, rdpm.balanced_subset(data.labels, args.num))
        check_count(len(data), args.data, args.allow_small)
        result = {"values": evaluate_tokenizer(tokenizer, data, device, args.seed, inception), "N": len(data)}
    elif args.ckpt:
        num = args.num or 50_000
        check_count(num, f"--num {num}", args.allow_small)
        model, tokenizer, _, defaults = rdpm.load_generator(args.ckpt, device)
        size, sampling = tokenizer.config.image_size, sampling_from(args, defaults, tokenizer.config.T)
        reference = load_reference(args.ref, inception, REFERENCE_KEPT, size, args.pad, args.allow_small)
        result = fid_of_generator(model, tokenizer, sampling, reference, inception, num, args.seed)
    else:
        data = open_images(args.samples, True, args.size, args.pad, args.allow_small)
        reference = load_reference(args.ref, inception, REFERENCE_KEPT, args.size, args.pad, args.allow_small)
        check_size(tuple(data[0][0].shape), args.samples, reference)
        result = compare(measure(read(data), len(data), inception), reference, inception)
    if RANK == 0:
        result |= {"seed": args.seed, "weights": inception.weights, "command": " ".join(sys.argv),
                   "versions": {module.__name__: module.__version__ for module in (torch, torchvision, np)}}
        print(result["command"], f"N = {result['N']}", sep="\n")
        for name, value in result["values"].items():
            print(f"  {name:18}", *np.atleast_1d("-" if value is None else np.round(value, 4)))
        print(*result.get("notes", ()), sep="\n")
        with rdpm.replacing(args.out) as path:
            path.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    rdpm.run_main(main)
