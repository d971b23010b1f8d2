"""Measure speed and memory, with random weights and without any data.

    python experiments/benchmark.py train --depth 12 --batch 4     # a generator's training step on random latents
    python experiments/benchmark.py tokenizer --preset cifar10     # a tokenizer's training step on random images
    python experiments/benchmark.py sample --depth 16 --batch 4    # guided sampling, without and with --fast's setting
    python experiments/benchmark.py quantiser --batch 8            # Alg. 1 against its T bare matrix products
    python experiments/benchmark.py memory --depth 16 --batch 128  # what a GPU needs to train, sample, and tokenize

`train` also times diffusers' DiT of the same width, depth and number of tokens, `quantiser`
vector_quantize_pytorch's ResidualVQ, where they are installed. What is compared runs in turns; of
each the fastest call counts, after one that warms up. The peak is that of a square bf16 matrix
product. The operations are PyTorch's count for the networks: optimizer, EMA and the generator's
targets take time, but are not counted. `memory` runs the same steps on tensors without contents and
adds up the storages that are alive: all but what a kernel or the allocator takes beside them. LPIPS
and PatchGAN take part where the preset gives them a weight.
"""

import argparse
import sys
import time
import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.weak import WeakIdKeyDictionary

sys.path.insert(0, str(Path(__file__).parents[1]))
import rdpm  # noqa: E402


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that are alive now, and the most there were."""

    def __init__(self) -> None:
        super().__init__()
        self.known = WeakIdKeyDictionary()
        self.now = 0
        self.peak = 0

    def add(self, size: int) -> None:
        self.now += size
        self.peak = max(self.peak, self.now)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        for tensor in tree_leaves(result):
            storage = tensor.untyped_storage() if isinstance(tensor, Tensor) else None
            if storage is not None and storage not in self.known:
                self.known[storage] = True
                self.add(storage.nbytes())
                weakref.finalize(storage, self.add, -storage.nbytes())
        return result


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
    n = 8192 if args.device.type == "cuda" else 1024
    a = torch.randn(n, n, device=args.device, dtype=torch.float32 if args.device.type == "mps" else torch.bfloat16)
    peak = 2 * n**3 / in_turns(10, lambda: a @ a)[0]
    print(f"{name}: {args.batch} images in {seconds:.3g} s, {args.batch / seconds:.3g} images/s, "
          f"{flops / args.batch / 1e9:.4g} GFLOP each: {flops / seconds / peak:.0%} of the matrix-product peak, "
          f"{peak / 1e9:.4g} GFLOP/s")


def optimizing(model: nn.Module, args: argparse.Namespace, loss_of: Callable) -> Callable[[], Tensor]:
    """A step as train_gen.py takes it, with AdamW, clipping and EMA. loss_of: slice -> mean loss."""
    ema = nn.ParameterList(weight.detach().clone() for weight in model.parameters())
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, betas=(0.9, 0.95), fused=True)

    def step() -> Tensor:
        optimizer.zero_grad()
        for chunk in rdpm.chunks(args.batch, args.accum):
            loss = loss_of(chunk) / args.accum
            loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rdpm.update_ema(ema, model, 0.9999, 0)
        return loss.detach()

    return step


def generator_step(model: rdpm.RDPM, vq: rdpm.Tokenizer, args: argparse.Namespace) -> Callable[[], Tensor]:
    """Of train_gen.py."""
    numbers = range(args.batch)
    v = torch.randn(args.batch, vq.config.side**2, vq.config.d, device=args.device)
    y = torch.zeros(args.batch, dtype=torch.long, device=args.device)
    t = torch.arange(args.batch) % vq.config.T + 1

    def loss_of(chunk: slice) -> Tensor:
        with rdpm.autocast(args.device):
            eps = vq.noise(rdpm.ImageStreams(0, numbers[chunk], args.device))
            return rdpm.generator_losses(model, vq.quantizer, v[chunk], eps, y[chunk], t[chunk])[0].mean()

    return optimizing(model, args, loss_of)


def tokenizer_step(vq: rdpm.Tokenizer, args: argparse.Namespace) -> Callable[[], Tensor]:
    """Of train_vq.py, with a random VGG16."""
    weights = rdpm.PRESETS[args.preset]["train_vq"]
    x = torch.randn(args.batch, 3, vq.config.image_size, vq.config.image_size, device=args.device)
    channels = (64, 128, 256, 512, 512)
    with torch.device(args.device):
        linear = {f"lin{i}.model.1.weight": torch.rand(1, c, 1, 1) for i, c in enumerate(channels)}
        lpips = rdpm.LPIPS(torchvision.models.vgg16().state_dict(), linear)
        discriminator = rdpm.Discriminator()
    trained = [*vq.parameters(), *discriminator.parameters()]
    optimizer = torch.optim.Adam(trained, 1e-4, betas=(0.5, 0.9), fused=True)

    def step() -> Tensor:
        optimizer.zero_grad()
        with rdpm.autocast(args.device):
            eps = vq.noise(rdpm.ImageStreams(0, range(args.batch), args.device))
            loss, _, x_rec = rdpm.tokenizer_losses(
                vq, x, eps, lpips if weights["perceptual"] else None, weights["perceptual"],
                discriminator if weights["gan"] else None, weights["gan"], vq.decoder.layers[-1].weight)
        loss.backward()
        if weights["gan"]:
            with rdpm.autocast(args.device):
                logits = discriminator(torch.cat([x, x_rec.detach()])).float()
            rdpm.hinge_loss(*logits.chunk(2)).backward()
        optimizer.step()
        return loss.detach()

    return step


def train(args: argparse.Namespace, vq: rdpm.Tokenizer) -> None:
    model = rdpm.RDPM(rdpm.GeneratorConfig(args.depth), vq).to(args.device)
    v = torch.randn(args.batch, vq.config.side**2, vq.config.d, device=args.device)
    y = torch.zeros(args.batch, dtype=torch.long, device=args.device)
    flops = count_flops(lambda: model(v, y, y + 1, v).sum().backward())
    models: list[nn.Module] = [model]
    steps = [generator_step(model, vq, args)]
    try:
        from diffusers import DiTTransformer2DModel
        side = 2 * vq.config.side
        dit = DiTTransformer2DModel(args.depth, 64, num_layers=args.depth, sample_size=side).to(args.device)
        x = torch.randn(args.batch, 4, side, side, device=args.device)
        run = rdpm.autocast(args.device)(partial(dit, timestep=y, class_labels=y))
        models.append(dit)
        steps.append(optimizing(dit, args, lambda _: run(x).sample.float().square().mean()))
    except ImportError:
        print("diffusers is not installed: no DiT to compare with")
    for network in models if args.compile else ():
        network.compile(dynamic=False)
    seconds = in_turns(args.repeats, *steps)
    tell(f"training, depth {args.depth}", args, seconds[0], flops)
    for other in seconds[1:]:
        print(f"diffusers' DiT takes {other / seconds[0]:.2f} times our time")


def tokenizer(args: argparse.Namespace, vq: rdpm.Tokenizer) -> None:
    step = tokenizer_step(vq, args)
    flops = count_flops(step)
    if args.compile:
        vq.encoder.compile(dynamic=False)  # as train_vq.py
    tell(f"training of {args.preset}'s tokenizer", args, *in_turns(args.repeats, step), flops)


def sampler(model: rdpm.RDPM, vq: rdpm.Tokenizer, args: argparse.Namespace,
            sampling: rdpm.Sampling) -> Callable[[], Tensor]:
    y = torch.zeros(args.batch, dtype=torch.long, device=args.device)
    draw = partial(rdpm.draw_images, model, vq, y, 0, range(args.batch), sampling)
    return rdpm.autocast(args.device)(draw)


def sample(args: argparse.Namespace, vq: rdpm.Tokenizer) -> None:
    model = rdpm.RDPM(rdpm.GeneratorConfig(args.depth, statistics=True), vq).to(args.device)
    fast = rdpm.sampling_from(argparse.Namespace(fast=True), rdpm.Sampling(), vq.config.T)
    runs = [sampler(model, vq, args, sampling) for sampling in (rdpm.Sampling(), fast)]
    flops = [count_flops(run) for run in runs]
    seconds = in_turns(args.repeats, *runs)
    tell(f"sampling, depth {args.depth}", args, seconds[0], flops[0])
    tell("with --fast", args, seconds[1], flops[1])


def quantiser(args: argparse.Namespace, vq: rdpm.Tokenizer) -> None:
    eps = vq.noise(rdpm.ImageStreams(0, range(args.batch), args.device))
    v = eps[0]
    codebook = vq.quantizer.codebook.detach()
    scores = v.new_empty(v.shape[0] * v.shape[1], len(codebook))

    def backward() -> Tensor:
        vq.quantizer(v, eps).loss.backward()
        return vq.quantizer.codebook.grad

    runs = {"float32 products alone": lambda: [torch.mm(v.flatten(0, 1), codebook.T, out=scores) for _ in eps][-1],
            "quantiser, forward": torch.no_grad()(lambda: vq.quantizer(v, eps).z_sum),
            "quantiser, forward and backward": backward}
    try:
        from vector_quantize_pytorch import ResidualVQ
        other = ResidualVQ(dim=vq.config.d, num_quantizers=len(eps), codebook_size=len(codebook)).to(args.device)
        runs["ResidualVQ, forward in eval"] = lambda: other.eval()(v)[0].detach()
        runs["ResidualVQ, forward in training"] = lambda: other.train()(v)[0].detach()
    except ImportError:
        print("vector_quantize_pytorch is not installed: no ResidualVQ to compare with")
    seconds = in_turns(args.repeats, *runs.values())
    for name, own in zip(runs, seconds, strict=True):
        print(f"{name}: {own:.3g} s for {args.batch} latents, {own / seconds[0]:.2f} times the {len(eps)} products")


def memory(args: argparse.Namespace, vq: rdpm.Tokenizer) -> None:
    """Of a GPU, though the tensors say that they lie on the CPU: a backward pass on a GPU needs one."""
    rdpm.attend = F.scaled_dot_product_attention  # not the CPU's branches
    rdpm.argmax = partial(torch.argmax, dim=-1)

    def training_input(self: nn.Module, v: Tensor, eps: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Without a look at numbers. What the real one takes is free again before the network's activations grow."""
        return torch.zeros_like(v), torch.zeros(v.shape[:2], dtype=torch.long)

    def generator(step_of: Callable, vq: rdpm.Tokenizer, *more: rdpm.Sampling) -> Callable[[], Tensor]:
        model = rdpm.RDPM(rdpm.GeneratorConfig(args.depth), vq.requires_grad_(False))
        return step_of(model, vq, args, *more)

    rdpm.NoisyResidualQuantizer.training_input = training_input
    fake = FakeTensorMode()
    for name, step_of in (("generator's training", lambda vq: generator(generator_step, vq)),
                          ("sampling", lambda vq: generator(sampler, vq, rdpm.Sampling())),
                          ("tokenizer's training", lambda vq: tokenizer_step(vq, args))):
        with fake, LiveBytes() as live:
            step = step_of(rdpm.Tokenizer(vq.config))
            step()  # makes the optimizer's state
            live.peak = live.now
            step()
            print(f"{name}, {args.batch} images: {live.peak / 2**30:.2f} GiB at most, "
                  f"{live.now / 2**30:.2f} GiB at all times")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", choices=("train", "tokenizer", "sample", "quantiser", "memory"))
    p.add_argument("--preset", choices=rdpm.PRESETS, default="imagenet", help="Of the tokenizer's sizes [imagenet].")
    for name in ("image-size", "T", "K"):
        p.add_argument(f"--{name}", type=rdpm.positive_int, help="Instead of the preset's.")
    p.add_argument("--depth", type=rdpm.positive_int, default=12, help="Of the generator [12].")
    p.add_argument("--batch", type=rdpm.positive_int, default=4, help="Images [4].")
    p.add_argument("--accum", type=rdpm.positive_int, default=1, help="Backward passes a step of the generator [1].")
    p.add_argument("--repeats", type=rdpm.positive_int, default=5, help="Calls of which the fastest counts [5].")
    p.add_argument("--compile", action="store_true", help="Use torch.compile, for train and tokenizer.")
    p.add_argument("--device", help="cuda, mps or cpu [the best there is].")
    args = p.parse_args()
    args.device = rdpm.launch("cpu" if args.what == "memory" else args.device)
    torch.manual_seed(0)
    config = rdpm.TokenizerConfig(**rdpm.PRESETS[args.preset]["tokenizer"])
    given = {name: getattr(args, name) for name in ("image_size", "T", "K") if getattr(args, name)}
    vq = rdpm.Tokenizer(replace(config, **given)).to(args.device)
    globals()[args.what](args, vq)


if __name__ == "__main__":
    rdpm.run_main(main)
