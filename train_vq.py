"""Train the tokenizer: encoder, noisy residual quantiser, decoder (Eqs. 1-5, Alg. 1).

    python train_vq.py --preset shapes                      # two CPU cores: 5 minutes
    python train_vq.py --preset cifar10                     # one CPU core: about an hour
    torchrun --nproc_per_node=8 train_vq.py                 # the paper's run on data/imagenet/{train,val}
    python train_vq.py --preset cifar10 --data my_folder    # your own images, one folder per class

Writes into --out: model.pt (for train_gen.py), state.pt (for --resume), log.jsonl, and grids of
held-out images above their reconstructions. Table 2: --T, --no-weight, --no-bias. Table 4: --schedule,
--phi. Eq. (4) as printed: --no-stop-gradients.
"""

import argparse
import shlex
from dataclasses import asdict, fields

import torch
from torch.utils.data import Subset
from tqdm import tqdm

import fid
import rdpm
from rdpm import Discriminator, ImageStreams, Tokenizer, TokenizerConfig, autocast, to_float


def parse_args() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    switch = argparse.BooleanOptionalAction
    p.add_argument("--image-size", type=rdpm.positive_int, help="Pixels a side; images are resized and cropped to it.")
    p.add_argument("--flip", action=switch, help="Train on mirror images too, not for letters [the preset's].")
    p.add_argument("--T", type=rdpm.positive_int, help="Quantisation steps (Table 2) [10].")
    p.add_argument("--K", type=rdpm.positive_int, help="Codebook size [the preset's].")
    p.add_argument("--dim", type=rdpm.positive_int, dest="d", help="Codebook dimension d (--d would be torchrun's).")
    p.add_argument("--schedule", choices=("pow", "linear", "sin"), help="Schedule of alpha (Table 4).")
    p.add_argument("--phi", type=rdpm.positive_float, help="Base of the pow schedule (Figure 5) [0.75].")
    p.add_argument("--weight", action=switch, help="Take gamma_t = alpha_t in Eq. (4) (Table 2) [yes].")
    p.add_argument("--bias", action=switch, help="Have the shared bias convolution (Table 2) [yes].")
    p.add_argument("--stop-gradients", action=switch, help="Use VQ-VAE's two terms in Eq. (4) [yes].")
    p.add_argument("--layer-norm", choices=("token", "image"), help="What the encoder's end normalises over.")
    p.add_argument("--perceptual", type=rdpm.natural_float, help="Weight of LPIPS in Eq. (5); 0 needs no download.")
    p.add_argument("--gan", type=rdpm.natural_float, help="Weight of the adversarial loss in Eq. (5), eta.")
    args = rdpm.parse_training_args(p, "vq")
    if args.gan and args.image_size < 24:
        raise rdpm.UserError(f"--image-size {args.image_size}: PatchGAN needs at least 24; give --gan 0")
    return args


@torch.inference_mode()
def evaluate(tokenizer: Tokenizer, images: Subset, args: argparse.Namespace, device: torch.device, step: int) -> dict:
    """PSNR and the like on held-out images, and a picture of the first 32, each row above their reconstructions."""
    with autocast(device):
        values = fid.evaluate_tokenizer(tokenizer, images, device, args.seed)
        x = torch.stack([images[i][0] for i in range(min(len(images), 32))]).to(device)
        x_rec, _, _ = tokenizer(to_float(x), tokenizer.noise(ImageStreams(args.seed, range(len(x)), device)))
    if rdpm.rank() == 0:
        tqdm.write(f"step {step}, {len(images)} held-out images: PSNR {values['psnr']:.2f} dB")
        rows = []
        for originals, reconstructions in zip(x.split(8), rdpm.to_uint8(x_rec).split(8), strict=True):
            rows += [originals, reconstructions]
        rdpm.image_grid(torch.cat(rows), columns=8).save(args.out / f"grid-{step:06d}.png")
    return values


def main() -> None:
    args = parse_args()
    device = rdpm.launch(args.device)

    # Data
    config = TokenizerConfig(**{field.name: getattr(args, field.name) for field in fields(TokenizerConfig)})
    images = rdpm.load_data(args.data, config.image_size, train=True, pad=config.pad)
    held_out = rdpm.load_data(args.data, config.image_size, train=False, pad=config.pad)
    order = rdpm.balanced_subset(held_out.labels, len(held_out))  # a folder's classes lie one after the other

    # Model
    lpips = None
    if args.perceptual:
        lpips = rdpm.LPIPS(rdpm.pretrained(*rdpm.VGG16), rdpm.pretrained(*rdpm.LPIPS_LINEAR)).to(device)
    run = rdpm.Run(args, device)
    torch.manual_seed(args.seed)
    memory_format = torch.channels_last if device.type == "cuda" else torch.preserve_format
    tokenizer = Tokenizer(config).to(device, memory_format=memory_format)
    discriminator = Discriminator().to(device, memory_format=memory_format)
    if args.init:
        rdpm.start_from(tokenizer, args.init, "tokenizer")
    optimizer = torch.optim.Adam(tokenizer.parameters(), args.lr, betas=(0.5, 0.9), fused=True)        # (4.2)
    optimizer_d = torch.optim.Adam(discriminator.parameters(), args.lr, betas=(0.5, 0.9), fused=True)
    optimizers = [optimizer, optimizer_d] if args.gan else [optimizer]

    # Resume
    modules = {"tokenizer": tokenizer, "discriminator": discriminator,
               "optimizer": optimizer, "optimizer_d": optimizer_d}
    run.restore("tokenizer", asdict(config), images, modules, lambda: rdpm.inference_state(tokenizer))
    net = rdpm.data_parallel(tokenizer)
    net_d = rdpm.data_parallel(discriminator)
    if args.compile:
        tokenizer.encoder.compile(dynamic=False)  # not the decoder, for adaptive_weight

    def log_evaluation(step: int) -> None:
        some = order if step == run.total else order[:1000]
        run.record(step=step, **evaluate(tokenizer, Subset(held_out, some), args, device, step))

    # Training
    steps = run.steps(tokenizer, images, images, config.flip, args.workers, optimizers, log_evaluation)
    with run:
        for _, numbers, (x, _) in steps:
            for chunk in rdpm.chunks(len(x), args.accum, net, net_d):
                real = to_float(x[chunk].to(device, non_blocking=True))
                weight = len(real) / len(x)
                with autocast(device):
                    eps = tokenizer.noise(ImageStreams(args.seed, numbers[chunk], device))
                    loss, logged, x_rec = rdpm.tokenizer_losses(
                        net, real, eps, lpips, args.perceptual, discriminator if args.gan else None, args.gan,
                        tokenizer.decoder.layers[-1].weight)
                (weight * loss).backward()
                if args.gan:
                    with autocast(device):
                        logits = net_d(torch.cat([real, x_rec.detach()])).float()
                    logged["discriminator"] = rdpm.hinge_loss(*logits.chunk(2))
                    (weight * logged["discriminator"]).backward()
                run.means.add(weight, **logged)
            grad_norm = torch.nn.utils.get_total_norm([w.grad for w in tokenizer.parameters()])
            norm_d = torch.nn.utils.get_total_norm([w.grad for w in discriminator.parameters()] if args.gan else [])
            run.take_step(optimizers, grad_norm, norm_d)
    if rdpm.rank() == 0:
        model = args.out / "model.pt"
        command = ["python", "train_gen.py", "--preset", args.preset, "--data", args.data, "--tokenizer", str(model)]
        print(f"finished: {model}; next: {shlex.join(command)}")


if __name__ == "__main__":
    rdpm.run_main(main)
