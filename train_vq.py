"""Train the tokenizer: encoder, noisy residual quantiser, decoder (Eqs. 1-5, Alg. 1).

    python train_vq.py --preset shapes                      # two CPU cores: 5 minutes
    python train_vq.py --preset cifar10                     # one CPU core: about an hour
    torchrun --nproc_per_node=8 train_vq.py                 # the paper's run on data/imagenet/{train,val}
    python train_vq.py --preset cifar10 --data my_folder    # your own images, one folder per class

Writes into --out: model.pt (for train_gen.py), state.pt (for --resume), log.jsonl, and grids of held-out images above
their reconstructions. Table 2: --T, --no-weight, --no-bias. Table 4: --schedule, --phi. Eq. (4) as printed:
--no-stop-gradients.
"""

import argparse
from dataclasses import asdict, fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

import fid
import rdpm
from rdpm import RANK, Discriminator, ImageStreams, Log, Tokenizer, TokenizerConfig, autocast, to_float, to_uint8


def parse_args() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--image-size", type=rdpm.positive_int, help="pixels a side; other sizes are resized and cropped")
    p.add_argument("--T", type=rdpm.positive_int, help="quantisation steps (Table 2)")
    p.add_argument("--K", type=rdpm.positive_int, help="codebook size")
    p.add_argument("--dim", type=rdpm.positive_int, dest="d", help="codebook dimension d (--d would be torchrun's)")
    p.add_argument("--schedule", choices=("pow", "linear", "sin"), help="of alpha (Table 4)")
    p.add_argument("--phi", type=rdpm.positive_float, help="base of the pow schedule (Figure 5)")
    p.add_argument("--weight", action=argparse.BooleanOptionalAction, help="gamma_t = alpha_t in Eq. (4) (Table 2)")
    p.add_argument("--bias", action=argparse.BooleanOptionalAction, help="shared bias convolution (Table 2)")
    p.add_argument("--stop-gradients", action=argparse.BooleanOptionalAction, help="in Eq. (4), as in VQ-VAE")
    p.add_argument("--layer-norm", choices=("token", "image"), help="what the encoder's last layer normalises over")
    p.add_argument("--perceptual", type=rdpm.natural_float, help="weight of LPIPS in Eq. (5); 0: no download")
    p.add_argument("--gan", type=rdpm.natural_float, help="weight of the adversarial loss in Eq. (5), eta")
    p.add_argument("--gan-start", type=rdpm.natural_int, default=0, help="first step with the adversarial loss")
    args = rdpm.parse_training_args(p, "vq")
    if args.gan and args.image_size < 24:
        raise rdpm.UserError(f"--image-size {args.image_size}: PatchGAN needs at least 24; give --gan 0")
    return args


def hinge_loss(real: Tensor, fake: Tensor) -> Tensor:
    """The discriminator's loss (VQGAN) on its logits of real and of reconstructed images."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def adaptive_weight(loss: Tensor, gan_loss: Tensor, last_layer: Tensor) -> Tensor:
    """VQGAN's weight of the adversarial loss: the ratio of both losses' gradient norms at the decoder's last layer."""
    gradients = [torch.autograd.grad(part, last_layer, retain_graph=True)[0] for part in (loss, gan_loss)]
    gradients = torch.stack(gradients).float()
    rdpm.sum_over_ranks(gradients)  # one weight for all ranks; with --accum, one for each part
    rest, gan = gradients / rdpm.WORLD_SIZE
    return (rest.norm() / (gan.norm() + 1e-4)).clamp(0, 1e4).detach()


def tokenizer_losses(net: nn.Module, discriminator: nn.Module | None, lpips: nn.Module | None, real: Tensor,
                     eps: Tensor, args: argparse.Namespace, last_layer: Tensor) -> tuple[dict, Tensor, rdpm.Quantized]:
    """Images (B, 3, H, W) in [-1, 1] -> losses of Eqs. (3)-(5) by name, x', and what Alg. 1 leaves behind."""
    x_rec, _, quantized = net(real, eps)
    recon = F.mse_loss(x_rec.float(), real)                                             # Eq. (3)
    perceptual = lpips(real, x_rec) if lpips else torch.zeros_like(recon)
    rest, gan = recon + args.perceptual * perceptual, torch.zeros_like(recon)
    loss = rest + 0.25 * quantized.loss                                                 # delta = 0.25
    if discriminator:
        discriminator.requires_grad_(False)                                             # it is trained by its own loss
        gan = -discriminator(x_rec).float().mean()
        balance = adaptive_weight(rest, gan, last_layer)
        loss = loss + args.gan * balance * gan                                          # Eq. (5)
        discriminator.requires_grad_(True)
    losses = {"loss": loss, "recon": recon, "quant": quantized.loss, "perceptual": perceptual, "gan": gan}
    return losses | {"discriminator": torch.zeros_like(recon)}, x_rec, quantized


@torch.inference_mode()
def evaluate(tokenizer: Tokenizer, images: Subset, args: argparse.Namespace, device: torch.device, step: int) -> dict:
    """PSNR and the like on held-out images, and a picture of the first 32, each row above their reconstructions."""
    with autocast(device):
        values = fid.evaluate_tokenizer(tokenizer, images, device, args.seed)
        x = torch.stack([images[i][0] for i in range(min(len(images), 32))]).to(device)
        x_rec, _, _ = tokenizer(to_float(x), tokenizer.noise(ImageStreams(args.seed, range(len(x)), device)))
    if RANK == 0:
        tqdm.write(f"step {step}, {len(images)} held-out images: PSNR {values['psnr']:.2f} dB")
        rows = [row for pair in zip(x.split(8), to_uint8(x_rec).split(8), strict=True) for row in pair]
        rdpm.image_grid(torch.cat(rows), columns=8).save(args.out / f"grid-{step:06d}.png")
    return values


def main() -> None:
    args = parse_args()
    device = rdpm.launch(args.device)
    config = TokenizerConfig(**{field.name: getattr(args, field.name) for field in fields(TokenizerConfig)})
    images, held_out = (rdpm.load_data(args.data, config.image_size, train, args.pad) for train in (True, False))
    weights = [rdpm.pretrained(*file) for file in (rdpm.VGG16, rdpm.LPIPS_LINEAR)] if args.perceptual else []
    lpips = rdpm.LPIPS(*weights).to(device) if weights else None
    log = Log(args)
    steps = args.steps or max(1, round(args.epochs * len(images) / args.batch))
    warmup = max(1, round(0.5 * len(images) / args.batch)) if args.warmup is None else args.warmup  # (4.2)

    torch.manual_seed(args.seed)
    layout = torch.channels_last if device.type == "cuda" else torch.preserve_format  # for bfloat16 convolutions
    tokenizer = Tokenizer(config).to(device, memory_format=layout)
    discriminator = Discriminator().to(device, memory_format=layout)
    optimizer, optimizer_d = (torch.optim.Adam(net.parameters(), args.lr, betas=(0.5, 0.9), fused=True)  # (4.2)
                              for net in (tokenizer, discriminator))
    parts = {"tokenizer": tokenizer, "discriminator": discriminator, "optimizer": optimizer, "optimizer_d": optimizer_d}
    identity = asdict(config) | {"seed": args.seed, "batch": args.batch, "data": images.sha256, "flip": args.flip}
    start = rdpm.load_state(args.out / "state.pt", "tokenizer-training", identity, parts) if args.resume else 0
    net, net_d = rdpm.data_parallel(tokenizer), rdpm.data_parallel(discriminator)
    if args.compile or args.compile is None and device.type == "cuda":  # not the decoder, for adaptive_weight
        tokenizer.encoder.compile(dynamic=False)

    batches = rdpm.global_batches(len(images), args.batch, range(start, steps), args.seed, args.flip)
    loader = DataLoader(images, batch_sampler=batches, num_workers=args.workers, pin_memory=device.type == "cuda",
                        worker_init_fn=rdpm.ignore_signals)
    order = rdpm.balanced_subset(held_out.labels, len(held_out))  # of a folder all classes lie one after the other
    names = ("loss", "recon", "quant", "perceptual", "gan", "discriminator")
    totals = torch.zeros(len(names) + 2 * config.T + 1, device=device)  # of the names, residual_t, error_t; steps
    log.begin(start, steps := max(steps, start), device)

    for step, (x, _) in enumerate(loader, start):
        lr = rdpm.learning_rate(step, steps, args.lr, warmup, args.lr_final)
        for group in optimizer.param_groups + optimizer_d.param_groups:
            group["lr"] = lr
        # What is drawn for an image depends on the seed and its place in the global batch, not on the rank.
        first = rdpm.TRAINING_NUMBERS + step * args.batch
        numbers = range(first, first + args.batch)[rdpm.own_share(args.batch)]
        gan, sums = args.gan > 0 and step >= args.gan_start, torch.zeros_like(totals)
        for i in range(args.accum):
            part = slice(i * len(x) // args.accum, (i + 1) * len(x) // args.accum)
            real = to_float(x[part].to(device, non_blocking=True))
            share, eps = len(real) / len(x), tokenizer.noise(ImageStreams(args.seed, numbers[part], device))
            with autocast(device):
                losses, x_rec, quantized = tokenizer_losses(net, discriminator if gan else None, lpips, real, eps, args,
                                                            tokenizer.decoder.layers[-1].weight)
            (share * losses["loss"]).backward()
            if gan:
                with autocast(device):
                    logits = net_d(torch.cat([real, x_rec.detach()])).float()
                losses["discriminator"] = hinge_loss(*logits.chunk(2))
                (share * losses["discriminator"]).backward()
            values = torch.stack([losses[name].detach() for name in names])
            sums += share * torch.cat([values, quantized.residual, quantized.error, torch.ones(1, device=device)])
        grad_norm = torch.nn.utils.get_total_norm([w.grad for w in tokenizer.parameters()])
        norm_d = torch.nn.utils.get_total_norm([w.grad for w in discriminator.parameters()] if gan else [])
        skipped = rdpm.step_if_finite([optimizer, optimizer_d] if gan else [optimizer], sums.sum(), grad_norm, norm_d)
        totals += torch.where(skipped > 0, 0, sums)

        done = step + 1
        if done % args.log_every == 0 or done == steps:
            rdpm.sum_over_ranks(totals)
            means, residual_t, error_t = (totals[:-1] / totals[-1]).split([len(names), config.T, config.T])
            columns = dict(zip(names, means.tolist(), strict=True))
            log.step(done, round(totals[-1].item() / rdpm.WORLD_SIZE), lr=lr, grad_norm=grad_norm.item(), **columns,
                     residual_t=residual_t.tolist(), error_t=error_t.tolist())
            totals.zero_()
        stop = log.told_to_stop(done)
        if RANK == 0 and (stop or done % args.save_every == 0 or done == steps):
            state = {"kind": "tokenizer-training", "config": identity, "step": done,
                     "parts": {name: part.state_dict() for name, part in parts.items()}}
            rdpm.save_run(args.out, state, rdpm.inference_state(tokenizer, kind="tokenizer", step=done))
        if stop and done < steps:
            log.stopped(done)
        if done % args.save_every == 0 and done < steps:
            log.record(step=done, **evaluate(tokenizer, Subset(held_out, order[:1000]), args, device, done))
    log.bar.close()
    if not (args.out / f"grid-{steps:06d}.png").exists():
        log.record(step=steps, **evaluate(tokenizer, Subset(held_out, order), args, device, steps))
    if RANK == 0:
        print(f"finished: {args.out / 'model.pt'}; next: python train_gen.py --preset {args.preset} --data {args.data} "
              f"--tokenizer {args.out / 'model.pt'}")


if __name__ == "__main__":
    rdpm.run_main(main)
