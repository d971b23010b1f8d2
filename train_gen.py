"""Train the generator: the transformer that predicts step t's codes (Eqs. 6-7).

    python train_gen.py --preset shapes                     # two CPU cores: 10 minutes
    torchrun --nproc_per_node=8 train_gen.py --depth 16     # the paper's run on data/imagenet/train

Needs a tokenizer (train_vq.py of the same preset, or --tokenizer). Encodes all images and their mirror images once,
into a file beside it (imagenet: 42 GB). Writes into --out: model.pt (EMA weights in half precision, with all that
sample.py needs), state.pt (for --resume), log.jsonl, and sample grids.
"""

import argparse
import copy
import hashlib
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Subset, TensorDataset
from tqdm import tqdm

import fid
import rdpm
from rdpm import RANK, RDPM, WORLD_SIZE, GeneratorConfig, ImageStreams, Log, Sampling, autocast, to_float


def parse_args() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--depth", type=rdpm.positive_int, help="layers and heads; the width is 64 times that (Table 1)")
    p.add_argument("--head", choices=("linear", "codebook"), help="linear: the paper's; codebook: RDPM.codebook_logits")
    p.add_argument("--patch", type=rdpm.positive_int, help="the transformer sees this many tokens squared as one")
    p.add_argument("--bottleneck", action="store_true", help="2d -> d -> width, not 2d -> width (README, Readings)")
    p.add_argument("--tokenizer", type=Path, help="the tokenizer's model.pt (default runs/PRESET-vq/model.pt)")
    p.add_argument("--ema", type=rdpm.natural_float, help="decay of the averaged weights")
    p.add_argument("--fid-ref", help="log the EMA weights' FID against this reference (fid.py --make-ref)")
    p.add_argument("--fid-every", type=rdpm.positive_int, default=10_000, help="steps between these")
    p.add_argument("--fid-num", type=rdpm.positive_int, default=10_000, help="images for these")
    p.add_argument("--random-features", action="store_true", help="FD-random instead of FID: no weights needed")
    args = rdpm.parse_training_args(p, "gen")
    args.tokenizer = args.tokenizer or Path(f"runs/{args.preset}-vq/model.pt")
    if not args.tokenizer.is_file():
        raise rdpm.UserError(f"--tokenizer {args.tokenizer}: no such file; python train_vq.py --preset {args.preset}")
    return args


@torch.inference_mode()
def cache_latents(tokenizer: rdpm.Tokenizer, images: rdpm.Images, args: argparse.Namespace,
                  device: torch.device) -> TensorDataset:
    """Encode every image, and with --flip its mirror image, once into a memory-mapped file beside the tokenizer.

    Items are (v (n, d) float16, label), as in `rdpm.Images`. Latents only, never codes: those need fresh noise. A hash
    of tokenizer and data (a folder's files by name, size, time) is its name: what has changed is encoded anew.
    """
    shape = len(images) * (1 + args.flip), tokenizer.config.side**2, tokenizer.config.d
    identity = hashlib.sha256(args.tokenizer.read_bytes() + repr((shape, args.pad, images.sha256)).encode())
    for path, _ in getattr(images.source, "samples", ()):  # a folder's files; the other sets never change
        identity.update(repr((path.name, path.stat().st_size, path.stat().st_mtime_ns)).encode())
    path = args.tokenizer.parent / f"latents-{identity.hexdigest()[:16]}.npy"
    part = path.with_suffix(f".{hashlib.sha256(str(args.out.resolve()).encode()).hexdigest()[:8]}.part")  # of this run
    if not path.exists():
        if RANK == 0:
            np.lib.format.open_memmap(part, "w+", np.float16, shape).flush()
        rdpm.barrier()
        share = range(RANK * shape[0] // WORLD_SIZE, (RANK + 1) * shape[0] // WORLD_SIZE)
        loader = DataLoader(Subset(images, share), 250, num_workers=args.workers, worker_init_fn=rdpm.ignore_signals)
        with open(part, "r+b") as file, autocast(device):  # not by mmap: machines may share a page of it
            file.seek(np.load(part, mmap_mode="r").offset + 2 * share.start * shape[1] * shape[2])
            for x, _ in tqdm(loader, desc="caching latents", unit=" x 250 img", disable=RANK > 0):
                file.write(tokenizer.encoder(to_float(x.to(device))).half().cpu().numpy().tobytes())
        rdpm.barrier()
        if RANK == 0:
            part.replace(path)
        rdpm.barrier()
    try:
        v = torch.from_numpy(np.load(path, mmap_mode="c"))  # "c" is writable, as PyTorch wants it, but not to the file
    except (ValueError, EOFError) as error:
        raise rdpm.UserError(f"{path}: damaged ({error}); remove it, and the latents are encoded anew") from error
    return TensorDataset(v, torch.from_numpy(np.tile(images.labels, 1 + args.flip)))


@torch.no_grad()
def update_ema(ema: torch.nn.Module, model: torch.nn.Module, decay: float, step: int) -> None:
    """ema <- decay * ema + (1 - decay) * model; early on the decay is smaller, to forget the initialisation."""
    weight = 1 - min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), weight)


def main() -> None:
    args = parse_args()
    device = rdpm.launch(args.device)
    tokenizer = rdpm.load_tokenizer(args.tokenizer, device)
    T, sampling = tokenizer.config.T, Sampling(**rdpm.PRESETS[args.preset].get("sampling", {}))  # for T = 10
    sampling.skip, sampling.guidance_from = sampling.skip * T // 10, (sampling.guidance_from - 1) * T // 10 + 1
    images = rdpm.load_data(args.data, tokenizer.config.image_size, train=True, pad=args.pad)
    config = GeneratorConfig(args.depth, len(images.classes), args.bottleneck, args.head, args.patch)
    torch.manual_seed(args.seed)
    model = RDPM(config, tokenizer).to(device)
    if args.fid_ref:  # before anything that takes long
        fid.check_count(args.fid_num, f"--fid-num {args.fid_num}", allow_small=args.random_features)
        inception = fid.load_inception(args.random_features, device)
        ref = fid.load_reference(args.fid_ref, inception, 0, images[0][0].shape[1], args.pad, args.random_features)
    log = Log(args)
    steps = args.steps or max(1, round(args.epochs * len(images) / args.batch))
    data = cache_latents(tokenizer, images, args, device)
    if RANK == 0 and not args.resume:  # mean latents, and principal axes of at most 5,000; `data_parallel` sends them
        v, labels = data.tensors
        present, counts = labels.unique(return_counts=True)
        for y in present:
            model.mean[y] = v[labels == y].float().mean(0)
        model.mean[-1] = torch.einsum("cnd,c->nd", model.mean[present], (counts / len(v)).to(device))
        chosen = rdpm.balanced_subset(labels.numpy(), 5000)
        rest = (v[chosen].float() - model.mean[labels[chosen]].cpu()).flatten(1)
        _, lengths, axes = torch.svd_lowrank(rest, min(len(rest), len(model.axes)))
        model.axes[:len(lengths)] = (axes * lengths).T / len(rest) ** 0.5
    net, ema = rdpm.data_parallel(model), copy.deepcopy(model).eval().requires_grad_(False)
    matrices, others = ([w for w in model.parameters() if (w.ndim > 1) == wanted] for wanted in (True, False))
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.03}, {"params": others, "weight_decay": 0.0}],
                                  args.lr, betas=(0.9, 0.95), fused=True)  # biases and scales need no decay (Llama)
    parts = {"model": model, "ema": ema, "optimizer": optimizer}
    identity = asdict(config) | {"seed": args.seed, "batch": args.batch, "data": images.sha256, "flip": args.flip,
                                 "tokenizer": hashlib.sha256(args.tokenizer.read_bytes()).hexdigest()}
    start = rdpm.load_state(args.out / "state.pt", "generator-training", identity, parts) if args.resume else 0
    if args.compile or args.compile is None and device.type == "cuda":
        model.compile(dynamic=False)  # one shape, or with --accum two

    batches = rdpm.global_batches(len(images), args.batch, range(start, steps), args.seed, args.flip)
    loader = DataLoader(data, batch_sampler=batches, pin_memory=device.type == "cuda")
    totals = torch.zeros(3, T, device=device)  # cross-entropy, accuracy and count of each t
    taken = torch.zeros((), device=device)     # steps that were finite
    log.begin(start, steps := max(steps, start), device)

    def evaluate(step: int) -> None:
        """The EMA weights' FID where it is due, and a picture of 100 of their samples."""
        if args.fid_ref and (step % args.fid_every == 0 or step == steps):
            result = fid.fid_of_generator(ema, tokenizer, sampling, ref, inception, args.fid_num, args.seed)
            log.record(step=step, **result["values"])
        if RANK == 0 and (step % args.save_every == 0 or step == steps):
            y = torch.arange(100, device=device) % config.num_classes
            with autocast(device):
                pictures = rdpm.to_uint8(rdpm.sample(ema, tokenizer, y, args.seed, range(100), sampling))
            rdpm.image_grid(pictures, columns=10).save(args.out / f"grid-{step:06d}.png")

    for step, (latents, y) in enumerate(loader, start):
        lr = rdpm.learning_rate(step, steps, args.lr, args.warmup, args.lr_final)
        for group in optimizer.param_groups:
            group["lr"] = lr
        # What is drawn for an image depends on the seed and its place in the global batch, not on the rank.
        share, first = rdpm.own_share(args.batch), rdpm.TRAINING_NUMBERS + step * args.batch
        numbers, rng = range(first, first + args.batch)[share], np.random.default_rng([args.seed, step, 1])
        t_cpu = torch.from_numpy(rng.integers(1, T + 1, args.batch)[share])
        dropped = torch.from_numpy(rng.random(args.batch)[share] < config.label_drop)
        y = torch.where(dropped, config.num_classes, y).to(device, non_blocking=True)
        for i in range(args.accum):
            part = slice(i * len(y) // args.accum, (i + 1) * len(y) // args.accum)
            with torch.no_grad(), autocast(device):
                v, t = (a[part].to(device, non_blocking=True) for a in (latents, t_cpu))
                eps = tokenizer.noise(ImageStreams(args.seed, numbers[part], device))      # (T, B, n, d)
                z_sum, codes_t = tokenizer.quantizer.training_input(v.float(), eps, t_cpu[part])
                eps_t = eps[t - 1, torch.arange(len(v), device=device)]                    # the noise of codes_t
            with autocast(device):
                logits, _ = net(eps_t, y[part], t, z_sum)                                  # Eq. (6)
            losses = F.cross_entropy(logits.flatten(0, 1), codes_t.flatten(), reduction="none")
            losses = losses.view(codes_t.shape).mean(1)                                    # Eq. (7), one an image
            loss = losses.sum() / len(y)
            loss.backward()
            accuracies = (rdpm.argmax(logits.detach()) == codes_t).float().mean(1)
            columns = torch.stack([losses.detach(), accuracies, torch.ones_like(losses)])
            totals.index_add_(1, t - 1, torch.where(columns[0].isfinite(), columns, 0))
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        taken += 1 - rdpm.step_if_finite([optimizer], loss, grad_norm)
        update_ema(ema, model, args.ema, step)

        done = step + 1
        if done % args.log_every == 0 or done == steps:
            rdpm.sum_over_ranks(totals)
            loss, (cross_entropy_t, accuracy_t) = totals[0].sum() / totals[2].sum(), totals[:2] / totals[2]
            log.step(done, round(taken.item()), loss.item(), lr, grad_norm.item(),
                     cross_entropy_t=cross_entropy_t.tolist(), accuracy_t=accuracy_t.tolist())
            totals, taken = torch.zeros_like(totals), torch.zeros_like(taken)
        stop = log.told_to_stop(done)
        if RANK == 0 and (stop or done % args.save_every == 0 or done == steps):
            state = {"kind": "generator-training", "config": identity, "step": done,
                     "parts": {name: part.state_dict() for name, part in parts.items()}}
            rdpm.save_run(args.out, state, rdpm.inference_state(
                ema, kind="generator", step=done, classes=images.classes, sampling=asdict(sampling),
                tokenizer=rdpm.inference_state(tokenizer)))
        if stop and done < steps:
            log.stopped(done)
        if done < steps:
            evaluate(done)
    log.bar.close()
    if not (args.out / f"grid-{steps:06d}.png").exists():
        evaluate(steps)
    if RANK == 0:
        print(f"finished: {args.out / 'model.pt'}; next: python sample.py --ckpt {args.out / 'model.pt'}")


if __name__ == "__main__":
    rdpm.run_main(main)
