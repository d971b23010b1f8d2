"""Train the tokenizer: encoder, noisy residual quantiser, decoder (Eqs. 1-5, Alg. 1).

    python train_vq.py --preset shapes                      # two CPU cores: 5 minutes
    python train_vq.py --preset mnist                       # two CPU cores: 20 minutes
    python train_vq.py --preset cifar10                     # two CPU cores: 40 minutes
    torchrun --nproc_per_node=8 train_vq.py                 # the paper's run on data/imagenet/{train,val}
    python train_vq.py --preset cifar10 --data my_folder    # your own images, one folder per class

Writes into --out: model.pt (for train_gen.py), state.pt (for --resume), log.jsonl, and grids of held-out images above
their reconstructions. Table 2: --T, --no-weight, --no-bias. Table 4: --schedule, --phi. Eq. (4) as printed:
--no-stop-gradients.
"""

import argparse
import itertools
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

import fid
import rdpm
from rdpm import Discriminator, GlobalBatches, Log, Tokenizer, TokenizerConfig, autocast, to_float, to_uint8


def parse_args() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--image-size", type=int, help="pixels a side; larger images are resized and cropped")
    p.add_argument("--T", type=int, help="quantisation steps (Table 2)")
    p.add_argument("--K", type=int, help="codebook size")
    p.add_argument("--dim", type=int, dest="d", help="codebook dimension d (torchrun would take --d for its own)")
    p.add_argument("--schedule", choices=("pow", "linear", "sin"), help="of alpha (Table 4)")
    p.add_argument("--phi", type=float, help="base of the pow schedule (Figure 5)")
    p.add_argument("--weight", action=argparse.BooleanOptionalAction, help="gamma_t = alpha_t in Eq. (4) (Table 2)")
    p.add_argument("--bias", action=argparse.BooleanOptionalAction, help="shared bias convolution (Table 2)")
    p.add_argument("--stop-gradients", action=argparse.BooleanOptionalAction, help="in Eq. (4), as in VQ-VAE")
    p.add_argument("--perceptual", type=float, help="weight of LPIPS in Eq. (5); 0 needs no pretrained weights")
    p.add_argument("--vgg16", help="local file of torchvision's VGG16 weights, instead of a download")
    p.add_argument("--lpips", help="local file of LPIPS' linear weights, instead of a download")
    p.add_argument("--gan", type=float, help="weight of the adversarial loss in Eq. (5), eta")
    p.add_argument("--gan-start", type=int, default=0, help="first step with the adversarial loss")
    return rdpm.parse_training_args(p, "vq")


@torch.inference_mode()
def save_reconstructions(tokenizer: Tokenizer, images: Subset, seed: int, device: torch.device, path: Path) -> None:
    """A picture of the first 32 images, each row above the row of their reconstructions."""
    chosen = np.linspace(0, len(images) - 1, min(len(images), 32)).astype(int)
    x = torch.stack([images[int(i)][0] for i in chosen]).to(device)
    with autocast(device):
        x_rec, _, _ = tokenizer(to_float(x), tokenizer.noise(seed, range(len(x)), device))
    rows = [half for pair in zip(x.split(8), to_uint8(x_rec).split(8), strict=True) for half in pair]
    rdpm.image_grid(torch.cat(rows), columns=8).save(path)


@torch.inference_mode()
def evaluate(tokenizer: Tokenizer, images: Dataset, args: argparse.Namespace, device: torch.device) -> dict:
    """PSNR in dB and SSIM (per image, then averaged), latent error |v - z'_T|^2, and the share of codes in use."""
    config = tokenizer.config
    seen = torch.zeros(config.T, config.K, dtype=torch.bool, device=device)
    measured, number = [], itertools.count()
    for x, _ in DataLoader(images, batch_size=100, num_workers=args.workers, worker_init_fn=rdpm.own_group):
        x = x.to(device)
        with autocast(device):
            x_rec, v, quantized = tokenizer(to_float(x), tokenizer.noise(args.seed, [next(number) for _ in x], device))
        x_rec, latent_error = to_uint8(x_rec), (v - quantized.z_sum).square().mean(dim=(1, 2))
        measured.append(torch.stack([fid.psnr(x, x_rec), fid.ssim(x, x_rec), latent_error]))
        for t in range(config.T):
            seen[t, quantized.codes[t].unique()] = True
    return dict(zip(("psnr", "ssim", "latent_error"), torch.cat(measured, dim=1).mean(1).tolist(), strict=True)) | {
            "usage": seen.any(0).float().mean().item(), "usage_t": seen.float().mean(1).tolist()}


def measure_quantiser(tokenizer: Tokenizer, device: torch.device) -> None:
    """Time Alg. 1, forward and backward, on 8 latents, against the T matrix products that it cannot do without."""
    config = tokenizer.config
    v = torch.randn(8, config.tokens, config.d, device=device)
    eps = tokenizer.noise(0, range(8), device)
    rows, codebook = v.flatten(0, 1), tokenizer.quantizer.codebook.detach()
    scores = v.new_empty(len(rows), config.K)

    def search() -> Tensor:
        for _ in range(config.T):
            torch.mm(rows, codebook.t(), out=scores)
        return scores

    def quantise() -> Tensor:
        tokenizer.quantizer(v, eps).loss.backward()
        return tokenizer.quantizer.codebook.grad

    whole, bare = rdpm.shortest_time(quantise), rdpm.shortest_time(search)
    print(f"quantiser: {8 / whole:.4g} latents/s, {whole / bare:.2f} times its {config.T} matrix products")


def main() -> None:
    args = parse_args()
    rank, world, device = where = rdpm.launch(args.device, args.timeout)
    config = TokenizerConfig(**{field.name: getattr(args, field.name) for field in fields(TokenizerConfig)})
    images = rdpm.load_data(args.data, config.image_size, train=True, pad=args.pad, strict=args.strict)
    held_out = rdpm.load_data(args.data, config.image_size, train=False, pad=args.pad, strict=args.strict)
    lpips = rdpm.load_lpips(args.vgg16, args.lpips).to(device) if args.perceptual and not args.benchmark else None
    rdpm.open_run(args, rank, world)
    steps = args.steps or max(1, round(args.epochs * len(images) / args.batch))
    warmup = max(1, round(0.5 * len(images) / args.batch)) if args.warmup is None else args.warmup

    torch.manual_seed(args.seed)
    tokenizer = Tokenizer(config).to(device)
    discriminator = Discriminator().to(device)
    # Adam (0.5, 0.9), no weight decay (4.2).
    optimizer = torch.optim.Adam(tokenizer.parameters(), args.lr, betas=(0.5, 0.9), fused=True)
    optimizer_d = torch.optim.Adam(discriminator.parameters(), args.lr, betas=(0.5, 0.9), fused=True)
    parts = {"tokenizer": tokenizer, "discriminator": discriminator, "optimizer": optimizer, "optimizer_d": optimizer_d}
    identity = asdict(config) | {"seed": args.seed, "batch": args.batch, "data": images.sha256, "flip": args.flip}
    start = rdpm.load_state(args.out / "state.pt", "tokenizer-training", identity, parts, steps) if args.resume else 0
    net, net_d = rdpm.data_parallel(tokenizer), rdpm.data_parallel(discriminator)

    batches = GlobalBatches(len(images), args.batch, range(start, steps), args.seed, args.flip, rank, world)
    loader = DataLoader(images, batch_sampler=batches, num_workers=args.workers, pin_memory=device.type == "cuda",
                        persistent_workers=args.workers > 0, worker_init_fn=rdpm.own_group)
    # Spread over the set, which is sorted by class.
    check = Subset(held_out, np.linspace(0, len(held_out) - 1, min(len(held_out), 1000)).astype(int).tolist())
    last_layer = tokenizer.decoder.layers[-1].weight
    names = ("loss", "recon", "quant", "perceptual", "gan", "discriminator")
    totals, totals_t = torch.zeros(len(names) + 1, device=device), torch.zeros(2, config.T, device=device)  # + count

    def one_image() -> None:
        x_rec, _, quantized = tokenizer(to_float(images[0][0].to(device)[None]), tokenizer.noise(0, [0], device))
        (x_rec.sum() + quantized.loss).backward()
        tokenizer.zero_grad()

    guard, log = rdpm.Guard(device, args.timeout, start), Log(args, where, start, steps, rdpm.count_flops(one_image))

    for step, (x, _) in enumerate(loader, start):
        lr = rdpm.learning_rate(step, steps, args.lr, warmup, args.lr_final)
        for group in optimizer.param_groups + optimizer_d.param_groups:
            group["lr"] = lr
        first = rdpm.TRAINING_NUMBERS + step * args.batch
        numbers = range(first, first + args.batch)[batches.share]
        gan = args.gan > 0 and step >= args.gan_start
        sums, sums_t = torch.zeros(len(names), device=device), torch.zeros(2, config.T, device=device)
        if (stop := guard.stop()) and args.benchmark:
            raise KeyboardInterrupt  # there is nothing to save
        for part in rdpm.micro_batches(len(x), args.accum, net, net_d):
            real = to_float(x[part].to(device, non_blocking=True))
            share = len(real) / len(x)
            with autocast(device):
                x_rec, _, quantized = net(real, tokenizer.noise(args.seed, numbers[part], device))
                recon = F.mse_loss(x_rec.float(), real)                                      # Eq. (3)
                perceptual = lpips(real, x_rec) if lpips else torch.zeros((), device=device)
                loss = recon + 0.25 * quantized.loss + args.perceptual * perceptual         # Eq. (5)
                g_loss = d_loss = torch.zeros((), device=device)
                if gan:
                    discriminator.requires_grad_(False)
                    g_loss = -discriminator(x_rec).float().mean()
                    balance = rdpm.adaptive_weight(recon + args.perceptual * perceptual, g_loss, last_layer)
                    loss = loss + args.gan * balance * g_loss
            (share * loss).backward()
            if gan:
                discriminator.requires_grad_(True)
                with autocast(device):
                    logits = net_d(torch.cat([real, x_rec.detach()])).float()
                d_loss = rdpm.hinge_loss(*logits.chunk(2))
                (share * d_loss).backward()
            sums += share * torch.stack([loss, recon, quantized.loss, perceptual, g_loss, d_loss]).detach()
            sums_t += share * torch.stack([quantized.residual, quantized.error])
        grad_norm = torch.nn.utils.get_total_norm([w.grad for w in tokenizer.parameters()])
        norms = grad_norm, torch.nn.utils.get_total_norm([w.grad for w in discriminator.parameters() if gan])
        optimizer.found_inf = optimizer_d.found_inf = bad = guard.not_finite(*sums, *norms)
        optimizer.step()
        optimizer.zero_grad()
        if gan:
            optimizer_d.step()
            optimizer_d.zero_grad()
        totals += torch.where(bad > 0, 0, torch.cat([sums, torch.ones_like(bad)[None]]))
        totals_t += torch.where(bad > 0, 0, sums_t)

        done = step + 1
        if done % args.log_every == 0 or done == steps:
            rdpm.sum_over_ranks(totals, totals_t)
            columns = dict(zip(names, (totals[:-1] / totals[-1]).tolist(), strict=True))
            columns |= dict(zip(("residual_t", "error_t"), (totals_t / totals[-1]).tolist(), strict=True))
            log.step(done, lr=lr, grad_norm=grad_norm.item(), guard=guard, images=images, **columns)
            totals.zero_()
            totals_t.zero_()
        save = (done % args.save_every == 0 or done == steps) and not args.benchmark
        if rank == 0 and (stop or save):
            rdpm.save_checkpoint(args.out / "model.pt", {
                "kind": "tokenizer", "config": asdict(config), "model": rdpm.half(tokenizer.state_dict()),
                "step": done})
            rdpm.save_state(args.out / "state.pt", "tokenizer-training", identity, parts, done)
        if stop and done < steps:
            log.stopped(done)
        if save:
            if rank == 0:
                log.record(step=done, **evaluate(tokenizer, held_out if done == steps else check, args, device))
                save_reconstructions(tokenizer, check, args.seed, device, args.out / f"grid-{done:06d}.png")
            rdpm.barrier()
    if args.benchmark:
        log.benchmark()
        if rank == 0:
            measure_quantiser(tokenizer, device)


if __name__ == "__main__":
    rdpm.run_main(main)
