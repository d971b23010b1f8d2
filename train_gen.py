"""Train the generator: the transformer that predicts step t's codes (Eqs. 6-7).

    python train_gen.py --preset shapes                     # two CPU cores: 10 minutes
    python train_gen.py --preset mnist                      # two CPU cores: 20 minutes
    python train_gen.py --preset cifar10                    # a GPU, not timed yet
    torchrun --nproc_per_node=8 train_gen.py --depth 16     # the paper's run on data/imagenet/train

Needs a tokenizer (train_vq.py of the same preset, or --tokenizer). Latents of all images and their mirror images are
encoded once into a memory-mapped file beside it (imagenet: 42 GB; --no-cache encodes anew every time).
Writes into --out: model.pt (EMA weights in half precision, with tokenizer, class names and sampling defaults: all
that sample.py needs), state.pt (for --resume), log.jsonl, and sample grids.
"""

import argparse
import copy
import hashlib
import math
import os
import shutil
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, Subset, TensorDataset
from tqdm import tqdm

import fid
import rdpm
from rdpm import PRESETS, RDPM, GeneratorConfig, GlobalBatches, Log, autocast, to_float


def parse_args() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--depth", type=int, help="layers and heads; the width is 64 times that (Table 1)")
    p.add_argument("--head", choices=("linear", "codebook"), help="linear: the paper's; codebook: see RDPM.forward")
    p.add_argument("--patch", type=int, help="the transformer sees patches of this many tokens squared (paper: 1)")
    p.add_argument("--bottleneck", action="store_true",
                   help="input projection 2d -> d -> width instead of 2d -> width (README, Readings)")
    p.add_argument("--compile", action=argparse.BooleanOptionalAction, help="torch.compile (default: on CUDA)")
    p.add_argument("--tokenizer", help="the tokenizer's model.pt (default runs/PRESET-vq/model.pt)")
    p.add_argument("--recompute", action="store_true", help="activations again in the backward pass: a third slower, "
                   "a fraction of the memory (gradient checkpointing)")
    p.add_argument("--cache", action=argparse.BooleanOptionalAction, default=True, help="encode every image only once")
    p.add_argument("--ema", type=float, help="decay of the averaged weights")
    p.add_argument("--fid-ref", help="log the EMA weights' FID against this reference (fid.py --make-ref)")
    p.add_argument("--fid-every", type=int, default=10_000, help="steps between these")
    p.add_argument("--fid-num", type=int, default=10_000, help="images for these")
    p.add_argument("--inception", help="local copy of the Inception weights")
    p.add_argument("--random-features", action="store_true", help="FD-random instead of FID: no weights needed")
    args = rdpm.parse_training_args(p, "gen")
    args.tokenizer = args.tokenizer or f"runs/{args.preset}-vq/model.pt"
    return args


@torch.inference_mode()
def cache_latents(tokenizer: rdpm.Tokenizer, images: rdpm.Images, folder: Path, flip: bool, workers: int, rank: int,
                  world: int, device: torch.device) -> TensorDataset:
    """Encode every image, and its mirror image with `flip`, once into a memory-mapped float16 file in `folder`.

    Items are (v (n, d) float16, label), flips as in `rdpm.Images`. Latents only, never codes: those need fresh noise.
    The file's name is a hash of the tokenizer and the data (a folder's by names, sizes and times of its files): what
    has changed gets another file. Each rank writes a share; an unfinished file has another name and is made anew.
    """
    shape = (len(images) * (1 + flip), tokenizer.config.tokens, tokenizer.config.d)
    identity = hashlib.sha256(repr((shape, asdict(tokenizer.config))).encode() + images.labels.tobytes())
    for i in np.linspace(0, len(images) - 1, min(len(images), 16)).astype(int):  # they show size and crop
        identity.update(images[i][0].numpy().tobytes())
    for path, _ in getattr(images.source, "samples", ()):  # a folder's files; the other sets never change
        file = os.stat(path)
        identity.update(repr((Path(path).name, file.st_size, file.st_mtime_ns)).encode())
    for weight in tokenizer.state_dict().values():
        identity.update(weight.cpu().numpy().tobytes())
    path = folder / f"latents-{identity.hexdigest()[:16]}.npy"
    # Rank 0 decides for all, and makes a name of this run: another one may be caching the same latents.
    parts = [None if path.exists() else folder / f"{path.stem}-{os.getpid()}.part"]
    if dist.is_initialized():
        dist.broadcast_object_list(parts)
    if part := parts[0]:
        size = 2 * math.prod(shape)
        for old in folder.glob(f"{path.stem}-*.part") if rank == 0 else ():
            if time.time() - old.stat().st_mtime > 3600:  # of a run that was killed
                old.unlink()
        if shutil.disk_usage(folder).free < size:
            raise rdpm.UserError(f"{folder}: the latents need {size / 2**30:.2g} GiB, more than is free there; make "
                                 "room, or give --no-cache")
        if rank == 0:
            np.lib.format.open_memmap(part, "w+", np.float16, shape).flush()
        rdpm.barrier()
        header = np.load(part, mmap_mode="r").offset
        share = range(rank * shape[0] // world, (rank + 1) * shape[0] // world)
        batches = [share[i:i + 256] for i in range(0, len(share), 256)]
        loader = DataLoader(images, batch_sampler=batches, num_workers=workers, pin_memory=device.type == "cuda",
                            worker_init_fn=rdpm.own_group)
        with (open(part, "r+b") as file, tqdm(total=len(share), desc="caching latents", unit="img", disable=rank > 0,
                                              smoothing=0) as bar):
            file.seek(header + 2 * share.start * math.prod(shape[1:]))  # not by mmap: machines may share a page of it
            for x, _ in loader:
                with autocast(device):
                    v = tokenizer.encode(to_float(x.to(device, non_blocking=True)))
                file.write(v.half().cpu().numpy().tobytes())
                bar.update(len(x))
        rdpm.barrier()
        if rank == 0:
            os.replace(part, path)
        rdpm.barrier()
    try:
        v = torch.from_numpy(np.load(path, mmap_mode="c"))  # "c" is writable, as PyTorch wants it, but not to the file
    except ValueError as error:
        raise rdpm.UserError(f"{path}: damaged ({error}); remove it, and the latents are encoded anew") from error
    return TensorDataset(v, torch.from_numpy(np.tile(images.labels, 1 + flip)))


def main() -> None:
    args = parse_args()
    rank, world, device = where = rdpm.launch(args.device, args.timeout)
    if args.benchmark:
        tokenizer = rdpm.frozen(rdpm.Tokenizer(rdpm.TokenizerConfig(**PRESETS[args.preset]["tokenizer"])), device)
    elif Path(args.tokenizer).is_file():
        tokenizer = rdpm.load_tokenizer(args.tokenizer, device)
    else:
        raise rdpm.UserError(f"no tokenizer at {args.tokenizer}: train one with `python train_vq.py --preset "
                             f"{args.preset}`, or name one with --tokenizer")
    images = rdpm.load_data(args.data, tokenizer.config.image_size, train=True, pad=args.pad, strict=args.strict)
    if len(images.classes) < 2:
        raise rdpm.UserError(f"--data {args.data}: one class only, {images.classes[0]}; a class-conditional model "
                             "needs two or more, each a folder of images")
    config = GeneratorConfig(args.depth, len(images.classes), bottleneck=args.bottleneck, head=args.head,
                             patch=args.patch)
    torch.manual_seed(args.seed)
    model = RDPM(config, tokenizer).to(device)
    if args.fid_ref:  # before anything that takes long
        size = tokenizer.config.image_size
        fid.check_count(args.fid_num, f"--fid-num {args.fid_num}", allow_small=args.random_features)
        inception = fid.load_inception(args.inception, args.random_features, device)
        reference = fid.load_reference(args.fid_ref, inception, keep=0, size=size, pad=args.pad)
        fid.check_size((3, size, size), "samples", reference)
    rdpm.open_run(args, rank, world)
    steps = args.steps or max(1, round(args.epochs * len(images) / args.batch))
    data = images
    if args.benchmark and args.cache:  # one random latent for all images
        v = torch.randn(1, tokenizer.config.tokens, tokenizer.config.d, dtype=torch.float16)
        data = TensorDataset(v.expand(2 * len(images), -1, -1), torch.from_numpy(np.tile(images.labels, 2)))
    elif args.cache:
        folder = Path(args.tokenizer).parent
        data = cache_latents(tokenizer, images, folder, args.flip, args.workers, rank, world, device)

    def encode(x: Tensor) -> Tensor:
        x = x.to(device, non_blocking=True)
        return x.float() if args.cache else tokenizer.encode(to_float(x))

    loading = {"num_workers": 0 if args.cache else args.workers, "worker_init_fn": rdpm.own_group}
    if not (args.resume or args.benchmark):  # each class's mean latent: the codebook head's start, and for --fast
        items, counts = len(images) * (1 + args.flip), torch.zeros(config.num_classes + 1, 1, 1, device=device)
        chosen = np.linspace(0, items - 1, min(items, max(2000, 50 * config.num_classes))).astype(int).tolist()
        for x, y in DataLoader(Subset(data, chosen), 100, **loading):
            with torch.no_grad(), autocast(device):
                model.mean.index_add_(0, y.to(device), encode(x))
            counts += y.bincount(minlength=len(counts)).to(device).view(-1, 1, 1)
        model.mean[-1], counts[-1] = model.mean.sum(0), counts.sum()  # the last row: of all
        model.mean.div_(counts.clamp(min=1))
    ema = copy.deepcopy(model).requires_grad_(False)
    # Weight decay on matrices only, as Llama trains: it has no business on biases and scales.
    matrices = [w for w in model.parameters() if w.ndim > 1]
    others = [w for w in model.parameters() if w.ndim <= 1]
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.03}, {"params": others, "weight_decay": 0.0}],
                                  args.lr, betas=(0.9, 0.95), fused=True)
    parts = {"model": model, "ema": ema, "optimizer": optimizer}
    tokenizer_hash = args.benchmark or hashlib.sha256(Path(args.tokenizer).read_bytes()).hexdigest()
    identity = asdict(config) | {"seed": args.seed, "batch": args.batch, "data": images.sha256, "flip": args.flip,
                                 "tokenizer": tokenizer_hash}
    start = rdpm.load_state(args.out / "state.pt", "generator-training", identity, parts, steps) if args.resume else 0
    net = rdpm.data_parallel(model)

    batches = GlobalBatches(len(images), args.batch, range(start, steps), args.seed, args.flip, rank, world)
    loader = DataLoader(data, batch_sampler=batches, pin_memory=device.type == "cuda", **loading)
    T, sampling = tokenizer.config.T, PRESETS[args.preset]["sampling"]
    totals = torch.zeros(3, T, device=device)  # cross-entropy, accuracy and count of each t

    def one_image() -> None:
        latent = torch.zeros(1, tokenizer.config.tokens, tokenizer.config.d, device=device)
        one = torch.ones(1, dtype=torch.long, device=device)
        model(latent, one, one, latent)[0].sum().backward()
        model.zero_grad()

    guard, log = rdpm.Guard(device, args.timeout, start), Log(args, where, start, steps, rdpm.count_flops(one_image))
    model.recompute = args.recompute
    if device.type == "cuda" if args.compile is None else args.compile:
        model.compile(dynamic=False)  # shapes never change: --batch is a multiple of the devices

    for step, (x, y) in enumerate(loader, start):
        lr = rdpm.learning_rate(step, steps, args.lr, args.warmup, args.lr_final)
        for group in optimizer.param_groups:
            group["lr"] = lr
        # What is drawn for an image depends on the seed and its place in the global batch, not on the rank.
        first = rdpm.TRAINING_NUMBERS + step * args.batch
        numbers = range(first, first + args.batch)[batches.share]
        rng = np.random.default_rng([args.seed, step])
        t = torch.from_numpy(rng.integers(1, T + 1, args.batch)[batches.share])
        dropped = torch.from_numpy(rng.random(args.batch)[batches.share] < config.label_drop)
        y = torch.where(dropped, config.num_classes, y).to(device, non_blocking=True)
        if (stop := guard.stop()) and args.benchmark:
            raise KeyboardInterrupt  # there is nothing to save
        for part in rdpm.micro_batches(len(x), args.accum, net):
            with torch.no_grad(), autocast(device):
                v = encode(x[part])
                eps = tokenizer.noise(args.seed, numbers[part], device)
                z_sum, codes = tokenizer.quantizer.training_input(v, eps, t[part])
                here = t[part].to(device, non_blocking=True)
                eps_t = eps[here - 1, torch.arange(len(v), device=device)]
            with autocast(device):
                logits, _ = net(eps_t, y[part], here, z_sum)                               # Eq. (6)
                losses, accuracies = rdpm.generator_loss(logits, codes)                    # Eq. (7)
            loss = losses.sum() / len(x)
            loss.backward()
            columns = torch.stack([losses.detach(), accuracies, torch.ones_like(losses)])
            totals.index_add_(1, here - 1, torch.where(columns[0].isfinite(), columns, 0))
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.found_inf = guard.not_finite(loss, grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        rdpm.update_ema(ema, model, args.ema, step)

        done = step + 1
        if done % args.log_every == 0 or done == steps:
            rdpm.sum_over_ranks(totals)
            # null in the log for a t that no image drew
            *sums, counts = totals.tolist()
            means = [[a / n if n else None for a, n in zip(row, counts, strict=True)] for row in sums]
            mean_loss = (totals[0].sum() / totals[2].sum()).item()
            log.step(done, mean_loss, lr, grad_norm.item(), guard, images, cross_entropy_t=means[0],
                     accuracy_t=means[1])
            totals.zero_()
        save = (done % args.save_every == 0 or done == steps) and not args.benchmark
        if rank == 0 and (stop or save):
            rdpm.save_checkpoint(args.out / "model.pt", {
                "kind": "generator", "config": asdict(config), "model": rdpm.half(ema.state_dict()), "step": done,
                "tokenizer": {"config": asdict(tokenizer.config), "model": rdpm.half(tokenizer.state_dict())},
                "T": T, "K": tokenizer.config.K,
                "classes": images.classes, "sampling": sampling})
            rdpm.save_state(args.out / "state.pt", "generator-training", identity, parts, done)
        if stop and done < steps:
            log.stopped(done)
        if save:
            if rank == 0:
                labels = torch.tensor(rdpm.balanced_labels(100, config.num_classes), device=device)
                with autocast(device):
                    x = rdpm.sample(ema, tokenizer, labels, args.seed, range(100), **sampling)
                rdpm.image_grid(rdpm.to_uint8(x), columns=10).save(args.out / f"grid-{done:06d}.png")
            rdpm.barrier()
        if args.fid_ref and (done % args.fid_every == 0 or done == steps):
            info = {"classes": images.classes, "sampling": sampling}
            result = fid.fid_of_generator(ema, tokenizer, info, reference, inception, args.fid_num, args.seed)
            log.record(step=done, **result["values"])
    if args.benchmark:
        log.benchmark()


if __name__ == "__main__":
    rdpm.run_main(main)
