"""Train the tokenizer: encoder, noisy residual quantiser, decoder (Eqs. 1-5, Alg. 1).

    python train_vq.py --preset shapes                      # two CPU cores: 5 minutes
    python train_vq.py --preset cifar10                     # one CPU core: about an hour
    torchrun --nproc_per_node=8 train_vq.py                 # the paper's run on data/imagenet/{train,val}
    python train_vq.py --preset cifar10 --data my_folder    # your own images, one folder per class

Writes into --out: model.pt (for train_gen.py), state.pt (for --resume), log.jsonl, and grids of
held-out images above their reconstructions. Table 2: --T, --no-weight, --no-bias. Table 4: --schedule.
Figure 5: --phi. Eq. (4) as printed: --no-stop-gradients.
"""

import argparse
import shlex
from dataclasses import asdict, fields
from functools import partial

import torch
from torch.utils.data import Subset
from tqdm import tqdm

import fid
import rdpm
from rdpm import Discriminator, ImageStreams, Tokenizer, TokenizerConfig, autocast, to_float


def parse_args() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    switch = argparse.BooleanOptionalAction
    add("--image-size", type=rdpm.positive_int, help="Pixels a side [the preset's].")
    add("--flip", action=switch, help="Train on mirror images too [the preset's].")
    add("--T", type=rdpm.positive_int, help="Quantisation steps (Table 2) [10].")
    add("--K", type=rdpm.positive_int, help="Codebook size [the preset's].")
    add("--dim", type=rdpm.positive_int, dest="d", help="Codebook dimension d [the preset's].")
    add("--schedule", choices=("pow", "linear", "sin"), help="Schedule of alpha (Table 4).")
    add("--phi", type=rdpm.positive_float, help="Base of the pow schedule (Figure 5) [0.75].")
    add("--weight", action=switch, help="Take gamma_t = alpha_t in Eq. (4) (Table 2) [yes].")
    add("--bias", action=switch, help="Have the shared bias convolution (Table 2) [yes].")
    add("--stop-gradients", action=switch, help="Use VQ-VAE's two terms in Eq. (4) [yes].")
    add("--layer-norm", choices=("token", "image"), help="What the encoder's end normalises over.")
    add("--perceptual", type=rdpm.natural_float, help="Weight of LPIPS in Eq. (5); 0 needs no download.")
    add("--gan", type=rdpm.natural_float, help="Weight of the adversarial loss in Eq. (5), eta.")
    args = rdpm.parse_training_args(p, "vq")
    if args.gan and args.image_size < 24:
        raise rdpm.UserError(f"--image-size {args.image_size}: PatchGAN needs at least 24; give --gan 0")
    return args


@torch.inference_mode()
def evaluate(tokenizer: Tokenizer, images: Subset, args: argparse.Namespace, device: torch.device,
             step: int) -> dict:
    """PSNR and the like on held-out images, and a picture of the first 32 above their reconstructions."""
    shown = range(min(len(images), 32))
    x = torch.stack([images[i][0] for i in shown]).to(device)
    with autocast(device):
        values = fid.evaluate_tokenizer(tokenizer, images, device, args.seed)
        eps = tokenizer.noise(ImageStreams(args.seed, shown, device))
        x_rec, _, _ = tokenizer(to_float(x), eps)
    if rdpm.rank() == 0:
        psnr = values["psnr"]
        tqdm.write(f"step {step}, {len(images)} held-out images: PSNR {psnr:.2f} dB")
        rows = []
        for i in range(0, len(x), 8):
            rows.append(x[i:i + 8])
            rows.append(rdpm.to_uint8(x_rec[i:i + 8]))
        picture = rdpm.image_grid(torch.cat(rows), columns=8)
        picture.save(args.out / f"grid-{step:06d}.png")
    return values


def grad_norm(network: torch.nn.Module) -> torch.Tensor:
    return torch.nn.utils.get_total_norm([weight.grad for weight in network.parameters()])


def main() -> None:
    args = parse_args()
    device = rdpm.launch(args.device)

    # Data
    names = [field.name for field in fields(TokenizerConfig)]
    config = TokenizerConfig(**{name: getattr(args, name) for name in names})
    images = rdpm.load_data(args.data, config.image_size, train=True, pad=config.pad)
    held_out = rdpm.load_data(args.data, config.image_size, train=False, pad=config.pad)
    order = rdpm.balanced_subset(held_out.labels, len(held_out))  # a folder's classes lie one after the other

    # Model
    lpips = None
    if args.perceptual:
        vgg16 = rdpm.pretrained(*rdpm.VGG16)
        linear = rdpm.pretrained(*rdpm.LPIPS_LINEAR)
        lpips = rdpm.LPIPS(vgg16, linear).to(device)
    run = rdpm.Run(args, device)
    torch.manual_seed(args.seed)
    on_gpu = device.type == "cuda"
    memory_format = torch.channels_last if on_gpu else torch.preserve_format
    tokenizer = Tokenizer(config).to(device, memory_format=memory_format)
    discriminator = Discriminator().to(device, memory_format=memory_format)
    if args.init:
        rdpm.start_from(tokenizer, args.init, "tokenizer")
    adam = partial(torch.optim.Adam, lr=args.lr, betas=(0.5, 0.9), fused=True)                  # (4.2)
    optimizer = adam(tokenizer.parameters())
    optimizer_d = adam(discriminator.parameters())
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
        some = Subset(held_out, order if step == run.total else order[:1000])
        values = evaluate(tokenizer, some, args, device, step)
        run.record(step=step, **values)

    # Training
    steps = run.steps(tokenizer, images, images, config.flip, args.workers, optimizers, log_evaluation)
    with run:
        # numbers: each image's place in the whole run, so that every step draws new noise.
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
            norms = [grad_norm(tokenizer), grad_norm(discriminator)] if args.gan else [grad_norm(tokenizer)]
            run.take_step(optimizers, *norms)
    if rdpm.rank() == 0:
        model = args.out / "model.pt"
        command = ["python", "train_gen.py", "--preset", args.preset, "--data", args.data]
        command += ["--tokenizer", str(model)]
        print(f"finished: {model}; next: {shlex.join(command)}")


if __name__ == "__main__":
    rdpm.run_main(main)
