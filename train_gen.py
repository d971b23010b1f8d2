"""Train the generator: the transformer that predicts step t's codes (Eqs. 6-7).

    python train_gen.py --preset shapes                     # two CPU cores: 10 minutes
    torchrun --nproc_per_node=8 train_gen.py --depth 16     # the paper's run on data/imagenet/train

Needs a tokenizer (train_vq.py of the same preset, or --tokenizer). Encodes all images, and their mirror
images if the tokenizer mirrors, once, into a file beside it (imagenet: 42 GB; --latents puts it
elsewhere). Writes into --out: model.pt (EMA weights in half precision, with all that sample.py needs),
state.pt (for --resume), log.jsonl, and sample grids.
"""

import argparse
import copy
import hashlib
import os
import shlex
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Subset, TensorDataset
from tqdm import tqdm

import fid
import rdpm
from rdpm import RDPM, GeneratorConfig, Images, ImageStreams, Sampling, Tokenizer, autocast, to_float


def parse_args() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("--depth", type=rdpm.positive_int, help="Layers and heads; the width is 64 times that (Table 1).")
    add("--head", choices=("linear", "codebook"), help="linear is the paper's, codebook `CodebookHead`.")
    add("--patch", type=rdpm.positive_int, help="The transformer sees this many tokens squared as one.")
    add("--bottleneck", action="store_true", help="Project 2d -> d -> width, not 2d -> width.")
    add("--tokenizer", type=Path, help="The tokenizer's model.pt [runs/PRESET-vq/model.pt].")
    add("--latents", type=Path, help="Folder for the encoded images [the tokenizer's, or --out].")
    add("--ema", type=rdpm.natural_float, help="Decay of the averaged weights [the preset's].")
    add("--fid-ref", help="Log the EMA weights' FID against this reference (fid.py --make-ref).")
    add("--fid-every", type=rdpm.positive_int, default=10, help="Checkpoints between these [10].")
    add("--fid-num", type=rdpm.positive_int, default=10_000, help="Images for these [10000].")
    args = rdpm.parse_training_args(p, "gen")
    args.tokenizer = args.tokenizer or Path(f"runs/{args.preset}-vq/model.pt")
    if not args.tokenizer.is_file():
        first = f"python train_vq.py --preset {args.preset}"
        raise rdpm.UserError(f"--tokenizer {args.tokenizer}: no such file; {first}")
    return args


def latents_file(images: Images, args: argparse.Namespace, shape: tuple[int, ...]) -> Path:
    """Its name is a hash of tokenizer and data (files by name, size, time): what has changed is new."""
    identity = hashlib.sha256(args.tokenizer.read_bytes())
    identity.update(repr((shape, images.classes)).encode())
    identity.update(images.labels.tobytes())
    if isinstance(images.source, rdpm.Folder):  # the other sets never change
        identity.update(images.source.names.tobytes())
        root = os.fsencode(images.source.root) + b"/"
        for name in images.source.names[images.indices]:
            status = os.stat(root + name)
            identity.update(b"%d %d" % (status.st_size, status.st_mtime_ns))
    name = f"latents-{identity.hexdigest()[:16]}.npy"
    if args.latents:
        args.latents.mkdir(parents=True, exist_ok=True)
        return args.latents / name
    folder = args.tokenizer.parent
    if (folder / name).exists() or os.access(folder, os.W_OK):
        return folder / name
    return args.out / name


@torch.inference_mode()
def encode_images(tokenizer: Tokenizer, images: Images, path: Path, shape: tuple[int, ...],
                  args: argparse.Namespace, device: torch.device) -> None:
    """Write the latents of all images, then of their mirror images. No unfinished file has the name."""
    def create() -> Path:
        unfinished = rdpm.beside(path)
        empty = np.lib.format.open_memmap(unfinished, "w+", np.float16, shape)
        empty.flush()
        return unfinished

    unfinished = rdpm.from_rank_0(create)
    own = range(len(images))[rdpm.rank_slice(len(images))]
    loader = DataLoader(Subset(images, own), 125, num_workers=args.workers, worker_init_fn=rdpm.ignore_signals)
    try:
        begin = np.load(unfinished, mmap_mode="r").offset
        with open(unfinished, "r+b") as file, autocast(device):  # not by mmap: machines may share a page of it
            first = own.start
            bar = tqdm(loader, desc="caching latents", unit=" x 125 img", disable=rdpm.rank() > 0)
            for x, _ in bar:
                x = to_float(x.to(device))
                for place in range(first, shape[0], len(images)):  # of the images, and of their mirror images
                    v = tokenizer.encoder(x).half().cpu()
                    file.seek(begin + 2 * place * v[0].numel())
                    file.write(v.numpy().tobytes())
                    x = x.flip(3)
                first += len(x)
        rdpm.barrier()
        if rdpm.rank() == 0:
            os.replace(unfinished, path)
        rdpm.barrier()
    finally:
        if rdpm.rank() == 0:
            unfinished.unlink(missing_ok=True)


def open_latents(tokenizer: Tokenizer, images: Images, args: argparse.Namespace,
                 device: torch.device) -> TensorDataset:
    """Encode every image, and with the tokenizer's flip its mirror image, once into a memory-mapped file.

    Items are (v (n, d) float16, label), as in `rdpm.Images`. Never codes: those need fresh noise.
    """
    copies = 2 if tokenizer.config.flip else 1
    tokens = tokenizer.config.side**2
    shape = len(images) * copies, tokens, tokenizer.config.d
    path = rdpm.from_rank_0(latents_file, images, args, shape)
    if not rdpm.from_rank_0(path.exists):
        encode_images(tokenizer, images, path, shape, args, device)
    try:
        v = torch.from_numpy(np.load(path, mmap_mode="c"))  # writable, as PyTorch wants it, but in memory alone
    except (ValueError, EOFError) as error:
        raise rdpm.UserError(f"{path}: damaged ({error}); remove it to encode anew") from error
    num = min(len(v), 4096)
    rows = torch.linspace(0, len(v) - 1, num).long()
    some = v[rows].float()
    variances = some.square().mean((1, 2))  # of normalised latents 1
    if v.shape != shape or (variances - 1).abs().max() > 0.1:
        raise rdpm.UserError(f"{path}: damaged (no unit variance); remove it to encode anew")
    return TensorDataset(v, torch.from_numpy(np.tile(images.labels, copies)))


def principal_axes(x: Tensor, num: int) -> Tensor:
    """The first principal axes (num, D) of rows x (N, D) about zero, each as long as its deviation.

    Exact, by the eigenvectors of the smaller of x x^T and x^T x in float64, and always the same: no random
    state, and the largest number of each axis is positive.
    """
    x = x.double()
    if len(x) < x.shape[1]:
        _, vectors = torch.linalg.eigh(x @ x.T)  # eigenvalues in rising order
        axes = vectors.T @ x
    else:
        values, vectors = torch.linalg.eigh(x.T @ x)
        lengths = values.clamp(min=0).sqrt()
        axes = vectors.T * lengths[:, None]
    axes = axes.flip(0)[:num] / len(x) ** 0.5
    place = axes.abs().argmax(1, keepdim=True)
    signs = axes.gather(1, place).sign()
    return (axes * signs).float()


@torch.no_grad()
def measure_classes(model: RDPM, v: Tensor, labels: Tensor) -> None:
    """Set class_mean and class_axes from all latents v (N, n, d) and their labels (N,)."""
    counts = labels.bincount(minlength=model.config.num_classes)
    for y in counts.nonzero()[:, 0]:
        model.class_mean[y] = v[labels == y].float().mean(0)
    frequencies = counts / len(labels)
    frequencies = frequencies.to(model.class_mean.device)
    of_classes = model.class_mean[:-1]
    model.class_mean[-1] = torch.einsum("cnd,c->nd", of_classes, frequencies)
    chosen = rdpm.balanced_subset(labels.numpy(), 5000)
    means = model.class_mean.cpu()[labels[chosen]]
    deviations = v[chosen].float() - means
    axes = principal_axes(deviations.flatten(1), len(model.class_axes))
    model.class_axes[:len(axes)] = axes


def adamw(model: RDPM, lr: float) -> torch.optim.AdamW:
    """AdamW as in 4.2; biases and scales need no weight decay (Llama)."""
    matrices = [weight for weight in model.parameters() if weight.ndim > 1]
    others = [weight for weight in model.parameters() if weight.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.03}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr, betas=(0.9, 0.95), fused=True)


def draw_steps(seed: int, step: int, T: int, batch: int, label_drop: float) -> tuple[Tensor, Tensor]:
    """For this rank's images: t (B,) in 1..T, uniform, and whether the class is dropped. The same on any ranks."""
    own = rdpm.rank_slice(batch)
    rng = np.random.default_rng([seed, step, 1])
    t = rng.integers(1, T + 1, batch)[own]
    dropped = rng.random(batch)[own] < label_drop
    return torch.from_numpy(t), torch.from_numpy(dropped)


def means_by_step(t: Tensor, T: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """How many images (T,) are at each step, and the matrix (T, B) that takes the mean of theirs."""
    at_step = F.one_hot(t - 1, T).T.float()
    at_step = at_step.to(device, non_blocking=True)
    count = at_step.sum(1)
    return count, at_step / count.clamp(min=1)[:, None]


def draw_grid(model: RDPM, tokenizer: Tokenizer, sampling: Sampling, seed: int, device: torch.device) -> Image.Image:
    """A hundred samples of classes 0, 1, ... in turn: with ten classes, one in each column."""
    y = torch.arange(100, device=device) % model.config.num_classes
    with autocast(device):
        x = rdpm.draw_images(model, tokenizer, y, seed, range(100), sampling)
    return rdpm.image_grid(rdpm.to_uint8(x), columns=10)


def main() -> None:
    args = parse_args()
    device = rdpm.launch(args.device)

    # Data
    tokenizer = rdpm.load_tokenizer(args.tokenizer, device)
    T = tokenizer.config.T
    size = tokenizer.config.image_size
    images = rdpm.load_data(args.data, size, train=True, pad=tokenizer.config.pad)
    if args.fid_ref:  # before anything that takes long
        judge = fid.Judge(args.fid_ref, args.fid_num, device)

    # Model
    sampling = Sampling(**rdpm.PRESETS[args.preset]["sampling"]).scaled(T)
    statistics = args.head == "codebook" or sampling.skip > 0
    config = GeneratorConfig(depth=args.depth, num_classes=len(images.classes), bottleneck=args.bottleneck,
                             head=args.head, patch=args.patch, statistics=statistics)
    torch.manual_seed(args.seed)
    model = RDPM(config, tokenizer).to(device)
    if args.init:
        rdpm.start_from(model, args.init, "generator", images.classes)
    run = rdpm.Run(args, device)
    data = open_latents(tokenizer, images, args, device)
    if statistics and not run.resumes and rdpm.rank() == 0:
        measure_classes(model, *data.tensors)  # data_parallel sends them
    net = rdpm.data_parallel(model)
    ema = copy.deepcopy(model).eval()
    ema.requires_grad_(False)
    optimizer = adamw(model, args.lr)

    # Resume
    tokenizer_hash = hashlib.sha256(args.tokenizer.read_bytes()).hexdigest()
    identity = asdict(config)
    identity["tokenizer"] = tokenizer_hash
    contents = {"classes": images.classes, "sampling": asdict(sampling)}
    contents["tokenizer"] = rdpm.inference_state(tokenizer)
    modules = {"model": model, "ema": ema, "optimizer": optimizer}
    run.restore("generator", identity, images, modules, lambda: rdpm.inference_state(ema, **contents))
    if args.compile:
        model.compile(dynamic=False)  # one shape, or with --accum two

    def evaluate(step: int) -> None:
        """The EMA weights' FID where it is due, and a picture of 100 of their samples."""
        every = args.save_every * args.fid_every
        fid_is_due = step % every == 0 or step == run.total
        if args.fid_ref and fid_is_due:
            result = judge.of_generator(ema, tokenizer, sampling, args.seed)
            run.record(step=step, **result["values"])
        if rdpm.rank() == 0:
            picture = draw_grid(ema, tokenizer, sampling, args.seed, device)
            picture.save(args.out / f"grid-{step:06d}.png")

    # Training
    with run:
        steps = run.steps(model, data, images, tokenizer.config.flip, 0, [optimizer], evaluate)
        # numbers: each image's place in the whole run, so that every step draws new noise.
        for step, numbers, (v, y) in steps:
            t, dropped = draw_steps(args.seed, step, T, args.batch, config.label_drop)
            y = torch.where(dropped, config.num_classes, y)
            for chunk in rdpm.chunks(len(v), args.accum, net):
                inputs = v[chunk].to(device, non_blocking=True).float()
                labels = y[chunk].to(device, non_blocking=True)
                with autocast(device):
                    eps = tokenizer.noise(ImageStreams(args.seed, numbers[chunk], device))
                    losses, accuracies = rdpm.generator_losses(
                        net, tokenizer.quantizer, inputs, eps, labels, t[chunk])
                (losses.sum() / len(v)).backward()
                run.means.add(len(inputs), loss=losses.mean())
                count, mean_of = means_by_step(t[chunk], T, device)
                losses_t = mean_of @ losses.detach()
                accuracies_t = mean_of @ accuracies
                run.means.add(count, cross_entropy_t=losses_t, accuracy_t=accuracies_t)
            grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            run.take_step([optimizer], grad_norm)
            rdpm.update_ema(ema, model, args.ema, step)
    if rdpm.rank() == 0:
        path = args.out / "model.pt"
        print(f"finished: {path}; next: python sample.py --ckpt {shlex.quote(str(path))}")


if __name__ == "__main__":
    rdpm.run_main(main)
