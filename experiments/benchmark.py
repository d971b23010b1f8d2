"""Measure speed, with random weights and without any data.

    python experiments/benchmark.py train --depth 12 --batch 4     # a generator's training step on random latents
    python experiments/benchmark.py tokenizer --preset cifar10     # a tokenizer's training step on random images
    python experiments/benchmark.py sample --depth 16 --batch 4    # guided sampling, without and with --fast's setting
    python experiments/benchmark.py quantiser --batch 8            # Alg. 1 against its T bare matrix products

`train` also times diffusers' DiT of the same width, depth and number of tokens, `quantiser` vector_quantize_pytorch's
ResidualVQ, where they are installed. What is compared runs in turns; of each the fastest call counts, after one that
warms up. The peak is that of a square bf16 matrix product. The operations are PyTorch's count for the networks:
optimizer, EMA and the generator's targets take time, but are not counted. The tokenizer is without LPIPS and PatchGAN.
"""

import argparse
import copy
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[1]))
import rdpm  # noqa: E402
from sample import sampling_from  # noqa: E402
from train_gen import update_ema  # noqa: E402
from train_vq import tokenizer_losses  # noqa: E402


def count_flops(run: Callable[[], object]) -> int:
    """Floating-point operations of the matrix products, convolutions and attention in run()."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def in_turns(repeats: int, *runs: Callable[[], Tensor]) -> list[float]:
    """Seconds of each run's fastest call, until the device has the result."""
    seconds: list[list[float]] = [[] for _ in runs]
    for _ in range(repeats + 1):
        for run, measured in zip(runs, seconds, strict=True):
            start = time.perf_counter()
            run().flatten()[0].item()
            measured.append(time.perf_counter() - start)
    return [min(measured[1:]) for measured in seconds]


def tell(name: str, args: argparse.Namespace, seconds: float, flops: int) -> None:
    n, bf16 = 8192 if args.device.type == "cuda" else 1024, args.device.type in ("cuda", "cpu")  # as `rdpm.autocast`
    a = torch.randn(n, n, device=args.device, dtype=torch.bfloat16 if bf16 else torch.float32)
    peak = 2 * n**3 / in_turns(10, lambda: a @ a)[0]
    B, giga = args.batch, flops / 1e9
    print(f"{name}: {B} images in {seconds:.3g} s, {B / seconds:.3g} images/s, {giga / B:.4g} GFLOP each: "
          f"{flops / seconds / peak:.0%} of the matrix-product peak, {peak / 1e9:.4g} GFLOP/s")


def optimizing(model: nn.Module, loss_of: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """A step as train_gen.py takes it, with AdamW, clipping and EMA."""
    ema, optimizer = copy.deepcopy(model), torch.optim.AdamW(model.parameters(), 1e-4, betas=(0.9, 0.95), fused=True)

    def step() -> Tensor:
        loss = loss_of()
        loss.backward()
        rdpm.step_if_finite([optimizer], loss.detach(), nn.utils.clip_grad_norm_(model.parameters(), 1.0))
        update_ema(ema, model, 0.9999, 0)
        return loss.detach()

    return step


def train(args: argparse.Namespace, vq: rdpm.Tokenizer, noise: Tensor, v: Tensor) -> None:
    B, c, y = args.batch, vq.config, torch.zeros(args.batch, dtype=torch.long, device=args.device)
    model = rdpm.RDPM(rdpm.GeneratorConfig(args.depth), vq).to(args.device)
    t = ((torch.arange(B) + 0.5) * c.T / B).ceil().long()  # spread over 1 ... T
    here = t.to(args.device)

    def loss() -> Tensor:
        with rdpm.autocast(args.device):
            eps = vq.noise(rdpm.ImageStreams(0, range(B), args.device))
            z_sum, codes = vq.quantizer.training_input(v, eps, t)
            logits, _ = model(eps[here - 1, torch.arange(B, device=args.device)], y, here, z_sum)
        return F.cross_entropy(logits.flatten(0, 1), codes.flatten())

    flops = count_flops(lambda: model(v, y, here, v)[0].sum().backward())
    models, steps = [model], [optimizing(model, loss)]
    try:
        from diffusers import DiTTransformer2DModel
        dit = DiTTransformer2DModel(args.depth, 64, num_layers=args.depth, sample_size=2 * c.side).to(args.device)
        x, run = torch.randn(B, 4, 2 * c.side, 2 * c.side, device=args.device), rdpm.autocast(args.device)(dit)
        models.append(dit)
        steps.append(optimizing(dit, lambda: run(x, timestep=here, class_labels=y).sample.float().square().mean()))
    except ImportError:
        print("diffusers is not installed: no DiT to compare with")
    for network in models if args.compile else ():
        network.compile(dynamic=False)
    seconds = in_turns(args.repeats, *steps)
    tell(f"training, depth {args.depth}", args, seconds[0], flops)
    for other in seconds[1:]:
        print(f"diffusers' DiT takes {other / seconds[0]:.2f} times our time")


def tokenizer(args: argparse.Namespace, vq: rdpm.Tokenizer, noise: Tensor, v: Tensor) -> None:
    x = torch.randn(args.batch, 3, vq.config.image_size, vq.config.image_size, device=args.device)
    optimizer, args.perceptual = torch.optim.Adam(vq.parameters(), 1e-4, betas=(0.5, 0.9), fused=True), 0.0

    def step() -> Tensor:
        with rdpm.autocast(args.device):
            loss = tokenizer_losses(vq, None, None, x, noise, args, x)[0]["loss"]
        loss.backward()
        rdpm.step_if_finite([optimizer], loss.detach())
        return loss.detach()

    flops = count_flops(step)
    for network in (vq.encoder, vq.decoder) if args.compile else ():
        network.compile(dynamic=False)
    tell(f"training of {args.preset}'s tokenizer", args, *in_turns(args.repeats, step), flops)


@torch.inference_mode()
def sample(args: argparse.Namespace, vq: rdpm.Tokenizer, noise: Tensor, v: Tensor) -> None:
    model = rdpm.RDPM(rdpm.GeneratorConfig(args.depth), vq).eval().to(args.device)
    y, T = torch.zeros(args.batch, dtype=torch.long, device=args.device), vq.config.T
    settings = rdpm.Sampling(), sampling_from(argparse.Namespace(fast=True), rdpm.Sampling(), T)
    runs = [lambda s=s: list(rdpm.sample_steps(model, vq, y, 0, range(args.batch), s))[-1][0] for s in settings]
    runs.append(lambda: vq.decoder(v))
    with rdpm.autocast(args.device):
        flops, seconds = [count_flops(run) for run in runs], in_turns(args.repeats, *runs)
    names = f"depth {args.depth}, passes of a sample", "with --fast", "the decoder"
    for name, *measured in zip(names, seconds, flops, strict=True):
        tell(name, args, *measured)


def quantiser(args: argparse.Namespace, vq: rdpm.Tokenizer, noise: Tensor, v: Tensor) -> None:
    rows, codebook = v.flatten(0, 1), vq.quantizer.codebook.detach()
    scores = v.new_empty(len(rows), len(codebook))

    def backward() -> Tensor:
        vq.quantizer(v, noise).loss.backward()
        return vq.quantizer.codebook.grad

    runs = {"float32 products alone": lambda: [torch.mm(rows, codebook.T, out=scores) for _ in noise][-1],
            "quantiser, forward": torch.no_grad()(lambda: vq.quantizer(v, noise).z_sum),
            "quantiser, forward and backward": backward}
    try:
        from vector_quantize_pytorch import ResidualVQ
        other = ResidualVQ(dim=vq.config.d, num_quantizers=len(noise), codebook_size=len(codebook)).to(args.device)
        runs["ResidualVQ, forward in eval"] = lambda: other.eval()(v)[0].detach()
        runs["ResidualVQ, forward in training"] = lambda: other.train()(v)[0].detach()
    except ImportError:
        print("vector_quantize_pytorch is not installed: no ResidualVQ to compare with")
    seconds = in_turns(args.repeats, *runs.values())
    for name, own in zip(runs, seconds, strict=True):
        print(f"{name}: {own:.3g} s for {args.batch} latents, {own / seconds[0]:.2f} times the {len(noise)} products")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", choices=("train", "tokenizer", "sample", "quantiser"))
    p.add_argument("--preset", choices=rdpm.PRESETS, default="imagenet", help="of the tokenizer's sizes")
    for name in ("image-size", "T", "K"):
        p.add_argument(f"--{name}", type=rdpm.positive_int, help="instead of the preset's")
    p.add_argument("--depth", type=rdpm.positive_int, default=12, help="of the generator")
    p.add_argument("--batch", type=rdpm.positive_int, default=4)
    p.add_argument("--repeats", type=rdpm.positive_int, default=5, help="calls of which the fastest counts")
    p.add_argument("--compile", action="store_true", help="torch.compile, for train and tokenizer")
    p.add_argument("--device", help="cuda, mps or cpu; the best there is by default")
    args = p.parse_args()
    args.device = rdpm.launch(args.device)
    torch.manual_seed(0)
    config = replace(rdpm.TokenizerConfig(**rdpm.PRESETS[args.preset]["tokenizer"]),
                     **{name: value for name in ("image_size", "T", "K") if (value := getattr(args, name))})
    vq = rdpm.Tokenizer(config).to(args.device)
    noise = vq.noise(rdpm.ImageStreams(0, range(args.batch), args.device))
    globals()[args.what](args, vq, noise, noise[0])


if __name__ == "__main__":
    rdpm.run_main(main)
