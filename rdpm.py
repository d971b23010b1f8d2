"""RDPM: Recurrent Diffusion Probabilistic Models (arXiv 2412.18390), every component in one file.

The idea. A tokenizer encodes an image into a latent v and quantises it in T steps. Step t takes what is left of v
after the steps before it, mixes Gaussian noise into it, and replaces each vector by its nearest codebook entry; the
entries add up to z'_T, which the decoder turns back into the image. Early steps code mostly noise, the last step has
none: a diffusion process whose every state is a grid of code indices. A transformer learns by cross-entropy to
predict the codes of step t from the noise eps_t, the class y, t, and the sum so far. Sampling starts from a sum of
zero, runs the transformer T times, and decodes the last sum.

Contents, leaves before roots
    1  configs and presets                5  transformer, Eq. (6), and its cross-entropy, Eq. (7)
    2  schedules, the noise of an image   6  sampler, Alg. 2, Eq. (8)
    3  encoder, decoder, noisy residual   7  data
       quantiser (Alg. 1), tokenizer      8  checkpoints, EMA, launching, logging
    4  losses, Eqs. (3)-(5), discriminator

Notation
    paper         code          shape         meaning
    x, x'         x, x_rec      (B, 3, H, W)  image in [-1, 1] and its reconstruction
    v             v             (B, n, d)     latent, Eq. (1); n = h * w tokens, row by row
    T, t          T, t                        number of steps; step, counted from 1
    K, d          K, d                        codebook size and dimension
    C             codebook      (K, d)        codebook, entries e_k
    C_t           codes         (B, n)        code indices of step t; (T, B, n) for all steps
    eps_t         eps           (B, n, d)     noise of step t; (T, B, n, d) for all steps
    z_t           z             (B, n, d)     residual v - z'_{t-1}
    v_t           v_t           (B, n, d)     noisy residual alpha_t z_t + beta_t eps_t, Eq. (2)
    v'_t          vq            (B, n, d)     quantised v_t: codebook entry plus bias
    z'_t          z_sum         (B, n, d)     v'_1 + ... + v'_t; z'_0 = 0
    alpha, beta   alpha, beta   (T,)          share of signal and of noise, alpha^2 + beta^2 = 1
    gamma         gamma         (T,)          weights of Eq. (4)
    y             y             (B,)          class label; num_classes stands for "no class"
    lambda, tau   guidance, tau               guidance strength; inverse temperature, Eq. (8)
    (not in it)   v_hat         (B, n, d)     the codebook head's prediction of v
"""

import argparse
import atexit
import colorsys
import datetime
import functools
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm


class UserError(Exception):
    """Bad input. The message is the one line that a person sees: what is wrong, where, what to do."""


class CorruptImage(UserError):
    """A file that cannot be read as an image."""


# ------------------------------------------------------------------------------------------------------------
# 1. Configs and presets
# ------------------------------------------------------------------------------------------------------------


@dataclass
class TokenizerConfig:
    """The tokenizer's sizes and switches.

    The defaults are the paper's (4.2), but for stop_gradients, or VQGAN's f16 where it is silent.
    """

    image_size: int = 256
    channels: int = 128                             # of the first level
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)  # channels of each level; each level but the last halves the side
    res_blocks: int = 2                             # a level
    d: int = 32
    K: int = 4096
    T: int = 10
    schedule: str = "pow"                           # "pow", "linear" or "sin" (Table 4)
    phi: float = 0.75                               # of "pow" (Figure 5)
    weight: bool = True                             # gamma_t = alpha_t in Eq. (4), else 1 (Table 2)
    bias: bool = True                               # the shared convolution on looked-up vectors (Table 2)
    stop_gradients: bool = True                     # VQ-VAE's in Eq. (4), which is printed without (README, Readings)

    def __post_init__(self) -> None:
        self.multipliers = tuple(self.multipliers)
        if self.image_size % self.downsampling:
            raise UserError(f"image size {self.image_size} is not a multiple of {self.downsampling}, the downsampling "
                            f"of multipliers {self.multipliers}: change one of them")

    @property
    def downsampling(self) -> int:
        return 2 ** (len(self.multipliers) - 1)

    @property
    def side(self) -> int:
        """Tokens along one side, h = w."""
        return self.image_size // self.downsampling

    @property
    def tokens(self) -> int:
        """n = h * w."""
        return self.side**2


@dataclass
class GeneratorConfig:
    """The transformer's size. Width is 64 * depth and the number of heads is depth (Table 1)."""

    depth: int = 12
    num_classes: int = 1000
    label_drop: float = 0.1   # probability of training without the class (3.2)
    bottleneck: bool = False  # input projection 2d -> d -> width, else 2d -> width (README, Readings)
    head: str = "linear"      # "linear" is the paper's; "codebook" predicts the latent, see RDPM.forward
    patch: int = 1            # tokens along one side of what the transformer sees as one (DiT's patch size)

    @property
    def width(self) -> int:
        return 64 * self.depth


# A preset is a row of defaults for the scripts' flags, no more: a flag that is given wins. `imagenet` is the paper.
SMALL_VQ = {"batch": 64, "lr": 1e-3, "lr_final": 0.02, "warmup": 100, "perceptual": 0.0, "gan": 0.0}
SMALL_GEN = {"depth": 4, "batch": 128, "lr": 1e-3, "lr_final": 0.1, "warmup": 200, "ema": 0.999,
             "head": "codebook", "patch": 2}
SMALL_TOKENIZER = {"image_size": 32, "res_blocks": 1, "schedule": "sin"}
TINY_TOKENIZER = SMALL_TOKENIZER | {"channels": 16, "multipliers": (1, 2, 4), "d": 4, "K": 512}
SAMPLING = {"guidance": 1.5, "guidance_schedule": "linear", "tau": 1.0, "gumbel": True}
PRESETS = {
    "imagenet": {
        "data": "data/imagenet", "pad": False, "flip": True, "tokenizer": {}, "sampling": SAMPLING,
        "train_vq": {"epochs": 10, "batch": 128, "lr": 4e-5, "lr_final": 1.0, "perceptual": 1.0, "gan": 0.75},
        "train_gen": {"depth": 12, "epochs": 250, "batch": 1024, "lr": 4e-4, "lr_final": 0.1, "warmup": 1000,
                      "ema": 0.9999, "head": "linear", "patch": 1},
    },
    "cifar10": {
        "data": "cifar10", "pad": False, "flip": True, "sampling": SAMPLING,
        "tokenizer": SMALL_TOKENIZER | {"channels": 32, "multipliers": (1, 2, 2), "d": 4, "K": 1024},
        "train_vq": SMALL_VQ | {"epochs": 5, "batch": 32}, "train_gen": SMALL_GEN | {"epochs": 200},
    },
    "mnist": {
        "data": "mnist", "pad": True, "flip": False, "sampling": SAMPLING, "tokenizer": TINY_TOKENIZER,
        "train_vq": SMALL_VQ | {"epochs": 1.75}, "train_gen": SMALL_GEN | {"epochs": 8},
    },
    "shapes": {
        "data": "shapes", "pad": False, "flip": False, "sampling": SAMPLING, "tokenizer": TINY_TOKENIZER,
        "train_vq": SMALL_VQ | {"epochs": 2.5}, "train_gen": SMALL_GEN | {"epochs": 12},
    },
}


# ------------------------------------------------------------------------------------------------------------
# 2. Schedules, and the noise of an image
# ------------------------------------------------------------------------------------------------------------


def alpha_schedule(schedule: str, T: int, phi: float = 0.75) -> Tensor:
    """Table 4, Figure 5: the share of signal alpha_1 ... alpha_T, rising to alpha_T = 1. Shape (T,), float32.

    "sin": sin(pi t / 2T); "linear": t / T; "pow": phi^(T - t), the paper's choice with phi = 0.75.
    """
    t = torch.arange(1, T + 1, dtype=torch.float64)
    return {"sin": torch.sin(math.pi * t / (2 * T)), "linear": t / T, "pow": phi ** (T - t)}[schedule].float()


def lambda_schedule(schedule: str, guidance: float, T: int) -> list[float]:
    """lambda_1 ... lambda_T (3.2 and Table 3): 0 is no guidance; "linear" rises from 0 at t = 1 to `guidance` at T."""
    rising = [guidance * (t - 1) / max(T - 1, 1) for t in range(1, T + 1)]
    return {"constant": [guidance] * T, "linear": rising}[schedule]


def image_generators(seed: int, numbers: list[int], device: torch.device | str) -> list[torch.Generator]:
    """One random stream per image, a function of (seed, image number) only.

    What an image gets therefore depends neither on the batch it is in nor on the number of devices. SeedSequence
    mixes the pair, because PyTorch's CPU generator looks at the low 32 bits of its seed alone.
    """
    seeds = [np.random.SeedSequence([seed, i]).generate_state(2, np.uint32).tolist() for i in numbers]
    return [torch.Generator(device).manual_seed((high >> 1 << 32) + low) for high, low in seeds]


TRAINING_NUMBERS = 2**32  # the first number of a training image: evaluation and sampling count from 0


def image_noise(seed: int, numbers: list[int], shape: tuple[int, ...], device: torch.device | str) -> Tensor:
    """Standard normal noise (B, *shape), image by image from `image_generators`."""
    return torch.stack([torch.randn(shape, generator=g, device=device)
                        for g in image_generators(seed, numbers, device)])


# ------------------------------------------------------------------------------------------------------------
# 3. Tokenizer: encoder, decoder, noisy residual quantiser
# ------------------------------------------------------------------------------------------------------------


def group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(min(32, channels // 4), channels, eps=1e-6)


class ResBlock(nn.Module):
    """Pre-activation residual block of VQGAN (Esser et al. 2021): (B, c_in, h, w) -> (B, c_out, h, w)."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = group_norm(c_in), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2, self.conv2 = group_norm(c_out), nn.Conv2d(c_out, c_out, 3, padding=1)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return self.skip(x) + self.conv2(F.silu(self.norm2(h)))


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(c)) v, each (B, heads, n, c).

    Not by PyTorch's fused kernel on a CPU: forward and backward, it took 2.3 times as long there at 256 tokens (two
    cores, bfloat16), 4.4 times at 64 and 1.2 times at 4,096.
    """
    if q.device.type == "cpu":
        return (q @ (k * k.shape[-1] ** -0.5).mT).softmax(-1) @ v
    return F.scaled_dot_product_attention(q, k, v)


class SpatialAttention(nn.Module):
    """Single-head self-attention over the positions of a feature map, as in VQGAN's lowest level."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = group_norm(channels)
        self.qkv, self.out = nn.Conv2d(channels, 3 * channels, 1), nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        B, c, h, w = x.shape
        q, k, v = self.qkv(self.norm(x)).flatten(2).transpose(1, 2)[:, None].chunk(3, dim=-1)  # (B, 1, hw, c)
        y = attention(q, k, v)
        return x + self.out(y[:, 0].transpose(1, 2).reshape(B, c, h, w))


def stage(c_in: int, c_out: int, blocks: int, attention: bool) -> list[nn.Module]:
    """The blocks of one resolution."""
    layers: list[nn.Module] = []
    for i in range(blocks):
        layers.append(ResBlock(c_out if i else c_in, c_out))
        if attention:
            layers.append(SpatialAttention(c_out))
    return layers


class Encoder(nn.Module):
    """Eq. (1), v = E(x): (B, 3, H, W) in [-1, 1] -> latent (B, n, d) with every token normalised over d."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        widths = [config.channels * m for m in config.multipliers]
        last = widths[-1]
        layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 3, padding=1)]
        for i, width in enumerate(widths):
            layers += stage(widths[max(i - 1, 0)], width, config.res_blocks, attention=i == len(widths) - 1)
            if i < len(widths) - 1:
                layers.append(nn.Conv2d(width, width, 3, stride=2, padding=1))
        layers += [ResBlock(last, last), SpatialAttention(last), ResBlock(last, last)]
        self.layers = nn.Sequential(*layers, group_norm(last), nn.SiLU(), nn.Conv2d(last, config.d, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        v = self.layers(x).flatten(2).transpose(1, 2)  # (B, n, d)
        # No learned gain: with one, the encoder could out-shout the noise of Eq. (2), which has unit variance.
        return F.layer_norm(v.float(), v.shape[-1:])


class Decoder(nn.Module):
    """x' = D(z'_T): (B, n, d) -> (B, 3, H, W), about [-1, 1]."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.side = config.side
        widths = [config.channels * m for m in reversed(config.multipliers)]
        first = widths[0]
        layers: list[nn.Module] = [nn.Conv2d(config.d, first, 3, padding=1)]
        layers += [ResBlock(first, first), SpatialAttention(first), ResBlock(first, first)]
        layers += stage(first, first, config.res_blocks + 1, attention=True)
        for c_in, c_out in itertools.pairwise(widths):
            layers += [nn.Upsample(scale_factor=2.0, mode="nearest"), nn.Conv2d(c_in, c_in, 3, padding=1)]
            layers += stage(c_in, c_out, config.res_blocks + 1, attention=False)
        last = widths[-1]
        self.layers = nn.Sequential(*layers, group_norm(last), nn.SiLU(), nn.Conv2d(last, 3, 3, padding=1))

    def forward(self, z_sum: Tensor) -> Tensor:
        return self.layers(z_sum.transpose(1, 2).unflatten(2, (self.side, self.side)))


class Quantized(NamedTuple):
    """What Alg. 1 leaves behind."""

    codes: Tensor     # (T, B, n)  C_1 ... C_T
    eps: Tensor       # (T, B, n, d)
    z_sum: Tensor     # (B, n, d)  z'_T
    loss: Tensor      # Eq. (4)
    residual: Tensor  # (T,) mean square of z_t
    error: Tensor     # (T,) mean square of v_t - v'_t


class NoisyResidualQuantizer(nn.Module):
    """The diffusion-based quantiser (3.1): T steps of one shared codebook, each on a noisy residual."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.T, self.side, self.stop_gradients = config.T, config.side, config.stop_gradients
        # Unit scale, because the first steps quantise almost pure N(0, 1) noise: from 1/K almost no code survives.
        self.codebook = nn.Parameter(torch.randn(config.K, config.d))
        # "bias": v' = e + conv(e) with one convolution for all t; zero at first, so that training starts without it.
        self.bias = nn.Conv2d(config.d, config.d, 3, padding=1) if config.bias else None
        if self.bias is not None:
            nn.init.zeros_(self.bias.weight)
            nn.init.zeros_(self.bias.bias)
        alpha = alpha_schedule(config.schedule, config.T, config.phi)
        self.register_buffer("alpha", alpha, persistent=False)  # they follow from the config
        self.register_buffer("beta", (1 - alpha.double() ** 2).clamp(min=0).sqrt().float(), persistent=False)
        self.register_buffer("gamma", alpha.clone() if config.weight else torch.ones_like(alpha), persistent=False)

    @torch.no_grad()
    def nearest(self, v_t: Tensor) -> Tensor:
        """Q's search: indices (...) of the codebook entries nearest to v_t (..., d).

        |v - e|^2 = |v|^2 - 2 (v . e - |e|^2 / 2): the argmax of one matrix product. In chunks, which share their
        memory and on a CPU stay in its cache. PyTorch's argmax is not vectorised on a CPU, its maximum is: so first
        the run of entries that holds the best, then the best of that run (twice as fast).
        """
        K, run = len(self.codebook), math.gcd(len(self.codebook), 128)
        entries = torch.cat([self.codebook, -self.codebook.square().sum(1, keepdim=True) / 2], dim=1).t()
        rows = F.pad(v_t.reshape(-1, v_t.shape[-1]), (0, 1), value=1.0)
        parts = rows.split(max(1, 2 ** (21 if rows.device.type == "cpu" else 28) // K))
        scores = rows.new_empty(len(parts[0]), K)
        codes = []
        for part in parts:
            runs = torch.mm(part, entries, out=scores[:len(part)]).view(len(part), K // run, run)
            best = runs.amax(2).argmax(1)
            codes.append(best * run + runs[torch.arange(len(part), device=best.device), best].argmax(1))
        return torch.cat(codes).view(v_t.shape[:-1])

    def lookup(self, codes: Tensor) -> Tensor:
        """v' for codes (B, n): the codebook's entries plus the bias convolution of their grid, (B, n, d)."""
        e = F.embedding(codes, self.codebook)
        if self.bias is None:
            return e
        grid = e.transpose(1, 2).unflatten(2, (self.side, self.side))
        return e + self.bias(grid).flatten(2).transpose(1, 2)

    def step(self, t: int, z_sum: Tensor, v: Tensor | None = None, eps: Tensor | None = None,
             codes: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """One residual step, Eq. (2): z'_{t-1} -> z'_t. Encoder, training input and sampler all come through here.

        An encoder knows v and eps_t and wants the codes; a sampler has predicted the codes. Always float32, whatever
        autocast says: the same latent and noise must give the same codes everywhere.
        Returns (z'_t, codes, z_t, v_t - v'_t); the last two only when encoding.
        """
        exact = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)  # the bias convolution's default is TF32
        with torch.autocast(z_sum.device.type, enabled=False), exact:
            if codes is not None:
                return z_sum + self.lookup(codes), codes, None, None
            z = v.float() - z_sum                                       # Alg. 1, line 3
            v_t = self.alpha[t - 1] * z + self.beta[t - 1] * eps        # Alg. 1, line 4
            codes = self.nearest(v_t)                                   # Alg. 1, line 5
            vq = self.lookup(codes)
            return z_sum + vq, codes, z, v_t - vq                       # Alg. 1, line 6

    def forward(self, v: Tensor, eps: Tensor) -> Quantized:
        """Alg. 1 and Eq. (4): quantise v (B, n, d) in T steps with the noise eps (T, B, n, d).

        A mean over elements, a sum over t. As printed, codebook, bias and encoder all learn from all of it. With
        `stop_gradients` each v'_t learns from its own step alone, and v a quarter as much: the gradients of VQ-VAE's
        (sg(v_t) - v'_t)^2 + 0.25 (v_t - sg(v'_t))^2 (van den Oord et al. 2017). That is the default, because it
        reconstructs better by 0.3 to 1.7 dB (README); the loss's value is Eq. (4)'s.
        """
        if self.stop_gradients:
            v = v.detach() + 0.25 * (v - v.detach())
        z_sum = torch.zeros_like(v, dtype=torch.float32)
        codes, residual, error = [], [], []
        for t in range(1, self.T + 1):
            z_sum, codes_t, z, difference = self.step(t, z_sum, v, eps[t - 1])
            codes.append(codes_t)
            residual.append(z.detach().square().mean())
            error.append(difference.square().mean())
            if self.stop_gradients:
                z_sum = z_sum.detach()
        error = torch.stack(error)
        return Quantized(torch.stack(codes), eps, z_sum, (self.gamma * error).sum(), torch.stack(residual),
                         error.detach())

    @torch.no_grad()
    def training_input(self, v: Tensor, eps: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """What the transformer is taught with: z'_{t-1} (B, n, d) and the target C_t (B, n), one t (B,) per image.

        v (B, n, d); eps (T, B, n, d). Images are sorted by t, so that those still under way are a prefix and each is
        quantised only up to its own t. t lies on the CPU: its counts then cost no synchronisation.
        """
        order = t.argsort(descending=True, stable=True)
        order, back = torch.stack([order, order.argsort()]).to(v.device, non_blocking=True)
        v, z_sum = v[order], torch.zeros_like(v, dtype=torch.float32)
        targets = torch.zeros(v.shape[:2], dtype=torch.long, device=v.device)
        for s in range(1, int(t.max()) + 1):
            here, beyond = int((t >= s).sum()), int((t > s).sum())
            z_new, codes, _, _ = self.step(s, z_sum[:here], v[:here], eps[s - 1, order[:here]])
            targets[beyond:here] = codes[beyond:]
            z_sum[:beyond] = z_new[:beyond]  # an image whose t is s stops at z'_{s-1}
        return z_sum[back], targets[back]


class Tokenizer(nn.Module):
    """Encoder, noisy residual quantiser and decoder (3.1, Figure 4)."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.quantizer = NoisyResidualQuantizer(config)

    def encode(self, x: Tensor) -> Tensor:
        """x (B, 3, H, W) in [-1, 1] -> v (B, n, d)."""
        return self.encoder(x)

    def decode(self, z_sum: Tensor) -> Tensor:
        """z'_t (B, n, d) -> image (B, 3, H, W), about [-1, 1]."""
        return self.decoder(z_sum)

    def noise(self, seed: int, numbers: list[int], device: torch.device | str) -> Tensor:
        """eps (T, B, n, d), one random stream per image number."""
        c = self.config
        return image_noise(seed, numbers, (c.T, c.tokens, c.d), device).transpose(0, 1)

    def forward(self, x: Tensor, eps: Tensor) -> tuple[Tensor, Tensor, Quantized]:
        """Reconstruct x. Returns x', v and the Quantized. Straight-through: the decoder's gradient goes to v."""
        v = self.encode(x)
        quantized = self.quantizer(v, eps)
        return self.decode(v + (quantized.z_sum - v).detach()), v, quantized


# ------------------------------------------------------------------------------------------------------------
# 4. Tokenizer losses, Eqs. (3)-(5), and the discriminator
# ------------------------------------------------------------------------------------------------------------

VGG16_URL = "https://download.pytorch.org/models/vgg16-397923af.pth"
LPIPS_URL = "https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/master/lpips/weights/v0.1/vgg.pth"
LPIPS_SHA256 = "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868"


class LPIPS(nn.Module):
    """Perceptual loss of Eq. (5): LPIPS v0.1 on VGG16 (Zhang et al. 2018), as VQGAN uses it.

    Takes the state dicts of torchvision's VGG16 and of LPIPS' linear layers; `load_lpips` finds them.
    """

    def __init__(self, vgg16: dict[str, Tensor], linear: dict[str, Tensor]) -> None:
        super().__init__()
        network = torchvision.models.vgg16(weights=None, init_weights=False)
        network.load_state_dict(vgg16)
        # Out-of-place ReLUs, because the taps relu1_2, relu2_2, relu3_3, relu4_3 and relu5_3 keep their outputs.
        layers = [nn.ReLU() if isinstance(layer, nn.ReLU) else layer for layer in network.features]
        ends = (0, 4, 9, 16, 23, 30)
        self.slices = nn.ModuleList(nn.Sequential(*layers[a:b]) for a, b in itertools.pairwise(ends))
        for i in range(5):
            self.register_buffer(f"linear{i}", linear[f"lin{i}.model.1.weight"].clone())
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1))
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1))
        self.requires_grad_(False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Distance of two batches (B, 3, H, W) in [-1, 1], mean over the batch."""
        x, y = (x - self.shift) / self.scale, (y - self.shift) / self.scale
        total = 0.0
        for i, layers in enumerate(self.slices):
            x, y = layers(x), layers(y)
            difference = x / (x.norm(dim=1, keepdim=True) + 1e-10) - y / (y.norm(dim=1, keepdim=True) + 1e-10)
            total = total + (difference.float().square() * getattr(self, f"linear{i}")).sum(1).mean()
        return total


def load_lpips(vgg16: str | None = None, linear: str | None = None) -> LPIPS:
    """LPIPS with pretrained weights from local paths or, where a path is None, by a checked download."""
    files = fetch(VGG16_URL, "397923af", vgg16, "--vgg16"), fetch(LPIPS_URL, LPIPS_SHA256, linear, "--lpips")
    return LPIPS(*(torch.load(file, map_location="cpu", weights_only=True) for file in files))


class Discriminator(nn.Sequential):
    """PatchGAN (Isola et al. 2017): image (B, 3, H, W) -> one logit per patch, high for real.

    GroupNorm where pix2pix has BatchNorm: the result does not depend on how a batch is spread over devices.
    """

    def __init__(self, channels: int = 64, layers: int = 3) -> None:
        widths = [channels * min(2**i, 8) for i in range(layers + 1)]
        blocks: list[nn.Module] = [nn.Conv2d(3, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for i in range(1, layers + 1):
            stride = 2 if i < layers else 1
            blocks += [nn.Conv2d(widths[i - 1], widths[i], 4, stride=stride, padding=1, bias=False),
                       group_norm(widths[i]), nn.LeakyReLU(0.2)]
        super().__init__(*blocks, nn.Conv2d(widths[-1], 1, 4, padding=1))


def hinge_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Discriminator's hinge loss of VQGAN on logits of real and reconstructed images."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def adaptive_weight(loss: Tensor, gan_loss: Tensor, last_layer: Tensor) -> Tensor:
    """VQGAN's weight of the adversarial loss: the ratio of both losses' gradient norms at the decoder's last layer.

    Of the batch of all ranks, as if it were one; with gradient accumulation, of each part by itself.
    """
    nll_gradient, = torch.autograd.grad(loss, last_layer, retain_graph=True)
    gan_gradient, = torch.autograd.grad(gan_loss, last_layer, retain_graph=True)
    gradients = torch.stack([nll_gradient, gan_gradient]).float()
    sum_over_ranks(gradients)
    nll_gradient, gan_gradient = gradients / (dist.get_world_size() if dist.is_initialized() else 1)
    return (nll_gradient.norm() / (gan_gradient.norm() + 1e-4)).clamp(0, 1e4).detach()


# ------------------------------------------------------------------------------------------------------------
# 5. Transformer, Eq. (6), and its cross-entropy, Eq. (7)
# ------------------------------------------------------------------------------------------------------------


def rotary_angles(side: int, head_dim: int) -> Tensor:
    """2-D rotary positions: angles (n, head_dim / 2), the first half by row, the second by column.

    Base 100 instead of Llama's 10,000 (Heo et al. 2024): a grid has tens of positions a side, not thousands.
    """
    frequencies = 100.0 ** (-torch.arange(0, head_dim // 2, 2) / (head_dim // 2))
    axis = torch.arange(side).float()[:, None] * frequencies                 # (side, head_dim / 4)
    rows, columns = axis.repeat_interleave(side, dim=0), axis.repeat(side, 1)
    return torch.cat([rows, columns], dim=1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (x_i, x_{i + head_dim/2}) of x (B, heads, n, head_dim) by their position's angles."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm without affine, then the condition's shift and scale (B, 1, width)."""
    return F.layer_norm(x, x.shape[-1:]) * (1 + scale) + shift


class Block(nn.Module):
    """Llama-style transformer block with AdaLN-Zero (Peebles & Xie 2023): bidirectional attention and SwiGLU."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        hidden = round(8 / 3 * width / 8) * 8
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.gate_up, self.down = nn.Linear(width, 2 * hidden, bias=False), nn.Linear(hidden, width, bias=False)
        self.ada = nn.Linear(width, 6 * width)

    def forward(self, x: Tensor, c: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x (B, n, width), condition c (B, width) -> (B, n, width)."""
        B, n, width = x.shape
        shift1, scale1, gate1, shift2, scale2, gate2 = self.ada(c)[:, None].chunk(6, dim=-1)
        qkv = self.qkv(modulate(x, shift1, scale1)).view(B, n, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                                 # each (B, heads, n, head_dim)
        cos, sin = cos.to(q.dtype), sin.to(q.dtype)
        h = attention(rotate(q, cos, sin), rotate(k, cos, sin), v)
        x = x + gate1 * self.out(h.transpose(1, 2).reshape(B, n, width))
        gate, up = self.gate_up(modulate(x, shift2, scale2)).chunk(2, dim=-1)
        return x + gate2 * self.down(F.silu(gate) * up)


class RDPM(nn.Module):
    """The transformer f of Eq. (6): (eps_t, y, t, z'_{t-1}) -> logits over the K codes of every token."""

    def __init__(self, config: GeneratorConfig, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.config = config
        self.recompute = False  # activations in the backward pass instead of keeping them (train_gen.py --recompute)
        width, d, K = config.width, tokenizer.config.d, tokenizer.config.K
        self.side, p = tokenizer.config.side, config.patch
        if self.side % p:
            raise UserError(f"--patch {p}: does not divide the tokenizer's {self.side} x {self.side} tokens")
        # Noise and sum are concatenated (2d) and "projected back to d" (4.2), which does not say which d. The code
        # depends on both: through the codebook's d = 4, the linear head's loss ended at 2.7, without at 1.6 (README).
        self.squeeze = nn.Linear(2 * d, d) if config.bottleneck else nn.Identity()
        self.embed = nn.Linear(p * p * (d if config.bottleneck else 2 * d), width)
        self.embed_t = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.embed_y = nn.Embedding(config.num_classes + 1, width)           # the last row: no class
        self.blocks = nn.ModuleList(Block(width, config.depth) for _ in range(config.depth))
        self.ada = nn.Linear(width, 2 * width)
        angles = rotary_angles(self.side // p, width // config.depth)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        self.register_buffer("mean", torch.zeros(config.num_classes + 1, self.side**2, d))  # each class's mean latent
        if config.head == "linear":
            self.head = nn.Linear(width, p * p * K)
        else:
            self.head = nn.Linear(width, p * p * (d + 1))   # v, and how sure
            for name in ("codebook", "alpha", "beta"):
                self.register_buffer(name, getattr(tokenizer.quantizer, name).detach().clone(), persistent=False)
            self.log_s = nn.Parameter((0.7 * self.alpha**2 + 0.03).log())
        self.initialize()

    def initialize(self) -> None:
        """DiT's: Xavier for projections, N(0, 0.02) for embeddings, zero for AdaLN and heads."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for weight in (self.embed_y.weight, self.embed_t[0].weight, self.embed_t[2].weight):
            nn.init.normal_(weight, std=0.02)
        for module in [block.ada for block in self.blocks] + [self.ada, self.head]:
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)

    def group(self, x: Tensor) -> Tensor:
        """Tokens to patches: (B, n, c) -> (B, n / p^2, p^2 c)."""
        p, side = self.config.patch, self.side // self.config.patch
        return x.view(len(x), side, p, side, p, -1).transpose(2, 3).reshape(len(x), side**2, -1)

    def ungroup(self, x: Tensor) -> Tensor:
        """Patches to tokens: (B, n / p^2, p^2 c) -> (B, n, c)."""
        p, side = self.config.patch, self.side // self.config.patch
        return x.view(len(x), side, side, p, p, -1).transpose(2, 3).reshape(len(x), self.side**2, -1)

    def forward(self, eps: Tensor, y: Tensor, t: Tensor, z_sum: Tensor) -> tuple[Tensor, Tensor | None]:
        """Eq. (6): noise eps_t (B, n, d), class y (B,), step t (B,) in 1..T, z'_{t-1} (B, n, d) -> logits (B, n, K).

        head = "linear" is the paper's classifier. head = "codebook" uses what the tokenizer knows: the target is the
        entry nearest to alpha_t (v - z'_{t-1}) + beta_t eps_t, where only v is unknown. The network predicts v, and
        the logits are the negative squared distances to the entries, each token's scaled by how sure it is. That
        prediction v_hat (B, n, d) comes second, a clean preview; the linear head has none.
        """
        half = torch.exp(-math.log(10000) * torch.arange(128, device=t.device) / 128)
        phase = t[:, None].float() * half
        c = F.silu(self.embed_t(torch.cat([phase.cos(), phase.sin()], dim=1)) + self.embed_y(y))   # (B, width)
        x = self.embed(self.group(self.squeeze(torch.cat([eps, z_sum], dim=-1))))         # (B, n / p^2, width)
        for block in self.blocks:
            run = functools.partial(checkpoint, block, use_reentrant=False) if self.recompute else block
            x = run(x, c, self.cos, self.sin)
        shift, scale = self.ada(c)[:, None].chunk(2, dim=-1)
        out = self.ungroup(self.head(modulate(x, shift, scale))).float()
        if self.config.head == "linear":
            return out, None
        with torch.autocast(out.device.type, enabled=False):
            alpha, beta, log_s = (w[t - 1].view(-1, 1, 1) for w in (self.alpha, self.beta, self.log_s))
            # Early the mean latent of the class is the best guess, late the sum knows more: beta_t shifts.
            v_hat = self.mean[-1] + beta * (self.mean[y] - self.mean[-1]) + out[..., :-1]
            doubt = out[..., -1:]
            q = alpha * (v_hat - z_sum) + beta * eps
            # (q . e_k - |e_k|^2 / 2) / s as one matrix product.
            rows = torch.cat([q, torch.full_like(doubt, -0.5)], dim=-1) / (log_s + doubt).exp()
            entries = torch.cat([self.codebook, self.codebook.square().sum(1, keepdim=True)], dim=1)
            return rows @ entries.t(), v_hat


def generator_loss(logits: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """Eq. (7): cross-entropy of logits (B, n, K) and codes (B, n), mean over positions; and the accuracy. Each (B,)."""
    loss = F.cross_entropy(logits.flatten(0, 1), codes.flatten(), reduction="none").view(codes.shape)
    return loss.mean(1), (logits.detach().argmax(-1) == codes).float().mean(1)


# ------------------------------------------------------------------------------------------------------------
# 6. Sampler, Alg. 2
# ------------------------------------------------------------------------------------------------------------


def balanced_labels(num: int, num_classes: int) -> list[int]:
    """Labels 0, 1, ..., num_classes - 1, 0, 1, ...: as many of each class as possible."""
    return [i % num_classes for i in range(num)]


def add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    """What sample.py and fid.py can say of the sampler; `sampling_flags` reads it."""
    parser.add_argument("--guidance", type=float, help="strength lambda; 0 is none")
    parser.add_argument("--guidance-schedule", choices=("constant", "linear"))
    parser.add_argument("--tau", type=float, help="inverse temperature, Eq. (8)")
    parser.add_argument("--gumbel", action=argparse.BooleanOptionalAction,
                        help="draw codes, Eq. (8), or take the likeliest")
    parser.add_argument("--fast", action="store_true",
                        help="half the network passes; on the demo 1 %% fewer samples are recognised (README)")
    parser.add_argument("--compile", action="store_true", help="torch.compile, on a GPU with CUDA graphs; slow start")


def sampling_flags(args: argparse.Namespace, T: int) -> dict:
    """The arguments of `sample` that were given; the checkpoint's own defaults stand for the others."""
    given = {name: getattr(args, name) for name in ("guidance", "guidance_schedule", "tau", "gumbel")}
    # With T = 10 three steps without the network and guidance from the eighth on: 10 passes for 19 (README).
    fast = {"skip": 3 * T // 10, "guidance_from": 7 * T // 10 + 1} if args.fast else {}
    return {name: value for name, value in given.items() if value is not None} | fast


def guided(model: RDPM, guidance: float, eps: Tensor, y: Tensor, t: Tensor, z_sum: Tensor) -> tuple:
    """RDPM.forward with guidance (3.2): logits cond + (cond - uncond) * lambda, and the v_hat of the class."""
    if guidance == 0:                                        # the linear schedule's first step needs no second pass
        logits, v_hat = model(eps, y, t, z_sum)
    else:
        no_class = torch.full_like(y, model.config.num_classes)
        logits, v_hat = model(*map(torch.cat, ([eps, eps], [y, no_class], [t, t], [z_sum, z_sum])))
        cond, uncond = logits.chunk(2)
        logits = cond + (cond - uncond) * guidance
    # A copy, because the next replay of a CUDA graph writes where this one wrote.
    return logits, None if v_hat is None else v_hat[:len(y)].clone()


@torch.inference_mode()
def sample_steps(model: RDPM, tokenizer: Tokenizer, y: Tensor, seed: int, numbers: list[int], guidance: float = 1.5,
                 guidance_schedule: str = "linear", guidance_from: int = 1, tau: float = 1.0, gumbel: bool = True,
                 skip: int = 0, v: Tensor | None = None, known: Tensor | None = None,
                 after: tuple[int, Tensor] | None = None) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Alg. 2 without its last line: yields (z'_t, v_hat) for t = 1 ... T, each (B, n, d).

    y (B,) class labels; image i is drawn from the stream (seed, numbers[i]) and depends on nothing else in the batch:
    equal numbers are equal noise. Guidance, its schedule, Gumbel noise and tau are the rows of Table 3; guidance = 0
    is no guidance, nor is there any before step `guidance_from`. v_hat is the network's preview of the clean latent;
    the linear head has none (None).

    Beyond the paper, codes need not be predicted. Where known (T, B, n) is true, a code is encoded from the latent v
    (B, n, d), by Alg. 1 with the sampler's own noise: known everywhere is the tokenizer's reconstruction, known in
    the first steps keeps a layout, known outside a region inpaints it. That clamps, it does not sample a posterior.
    The first `skip` steps encode the class's mean latent where nothing is known, and cost no network pass.
    `after` = (t, z'_t) goes on from there.
    """
    T, device, quantizer = tokenizer.config.T, y.device, tokenizer.quantizer
    lambdas = lambda_schedule(guidance_schedule, guidance, T)
    streams = image_generators(seed, numbers, device)
    shape = (T, tokenizer.config.tokens, tokenizer.config.d)
    eps = torch.stack([torch.randn(shape, generator=g, device=device) for g in streams], dim=1)  # (T, B, n, d)
    given, mean = known, model.mean[y]
    known = (torch.arange(T, device=device) < skip)[:, None, None]
    known = known if given is None else known | given
    any_known, all_known = known.flatten(1).any(1).tolist(), known.flatten(1).all(1).tolist()
    start, z_sum = after or (0, torch.zeros_like(eps[0]))
    for t in range(start + 1, T + 1):
        if any_known[t - 1]:
            latent = mean if given is None else torch.where(given[t - 1, ..., None], v, mean)
            z_new, encoded, _, _ = quantizer.step(t, z_sum, latent, eps[t - 1])
        if all_known[t - 1]:
            z_sum, v_hat = z_new, latent
        else:
            strength = lambdas[t - 1] if t >= guidance_from else 0
            logits, v_hat = guided(model, strength, eps[t - 1], y, torch.full_like(y, t), z_sum)
            if gumbel:                                       # Eq. (8); tau multiplies: an inverse temperature
                u = torch.stack([torch.rand(logits.shape[1:], generator=g, device=device) for g in streams])
                logits = logits * tau - torch.log(-torch.log(u))
            codes = logits.argmax(-1)
            if any_known[t - 1]:
                codes = torch.where(known[t - 1], encoded, codes)
            z_sum, *_ = quantizer.step(t, z_sum, codes=codes)
        yield z_sum, v_hat


@torch.inference_mode()
def sample(model: RDPM, tokenizer: Tokenizer, y: Tensor, seed: int, numbers: list[int], **sampling) -> Tensor:
    """Alg. 2: images (B, 3, H, W), about [-1, 1], for labels y (B,). See `sample_steps` for the rest."""
    *_, (z_sum, _) = sample_steps(model, tokenizer, y, seed, numbers, **sampling)
    return tokenizer.decode(z_sum).float()


# ------------------------------------------------------------------------------------------------------------
# 7. Data
# ------------------------------------------------------------------------------------------------------------


def to_uint8(x: Tensor) -> Tensor:
    """Floats in [-1, 1] -> bytes, round(127.5 (x + 1))."""
    return (127.5 * (x.float() + 1)).round().clamp(0, 255).to(torch.uint8)


def to_float(x: Tensor) -> Tensor:
    """Bytes -> floats in [-1, 1]."""
    return x.float() / 127.5 - 1


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """ADM's crop (Dhariwal & Nichol 2021): halve with BOX while twice too large, bicubic to size, centre crop."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def fit(image: Image.Image, size: int, pad: bool, name: str) -> Image.Image:
    """An image as RGB, size x size: `center_crop`, or with `pad` centred on black if it is small enough."""
    if pad and max(image.size) <= size:
        canvas = Image.new("RGB", (size, size))
        canvas.paste(image, ((size - image.width) // 2, (size - image.height) // 2))
        return canvas
    if min(image.size) < size:
        raise UserError(f"{name}: {image.width} x {image.height} is smaller than the crop of {size} x {size}; "
                        "use larger images, or a --preset for smaller ones")
    return center_crop(image.convert("RGB"), size)


def read_image(path: str) -> Image.Image:
    """An image file as RGB, turned as its EXIF data say. CorruptImage, naming the file, if it cannot be read."""
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
            if image.mode.startswith("I"):  # 16 bits: Pillow would clip, not scale
                image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
            return image.convert("RGB")
    except Exception as error:  # Pillow's decoders raise many kinds
        raise CorruptImage(f"{path}: not a readable image ({error}); repair or remove it") from error


def load_image(path: str, size: int, pad: bool) -> Image.Image:
    """`read_image`, then `fit`."""
    return fit(read_image(path), size, pad, path)


SHAPES = ("arrow", "bar", "crescent", "cross", "disc", "frame", "ring", "square", "star", "triangle")


def draw_shape(label: int, rng: np.random.Generator, size: int) -> Image.Image:
    """One of `SHAPES`, bright on dark, in a random colour, place, size and rotation; drawn 4 times too large."""

    def polygon(corners: int, start: float, radii: tuple[float, ...] = (1.0,)) -> np.ndarray:
        angle = 2 * math.pi * (np.arange(corners) / corners + start)
        return np.resize(radii, corners)[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)

    disc, square = polygon(48, 0), polygon(4, 1 / 8)
    parts = {  # polygons within the unit disc, painted in turn with the shape's and the background's colour
        "arrow": [np.array([[1, 0], [0, .8], [0, .3], [-1, .3], [-1, -.3], [0, -.3], [0, -.8]])],
        "bar": [square * [1.4, 0.35]],
        "crescent": [disc, disc * 0.85 + [0.5, 0]],
        "cross": [np.array([[1, .3], [.3, .3], [.3, 1], [-.3, 1], [-.3, .3], [-1, .3],
                            [-1, -.3], [-.3, -.3], [-.3, -1], [.3, -1], [.3, -.3], [1, -.3]])],
        "disc": [disc],
        "frame": [square, square * 0.55],
        "ring": [disc, disc * 0.55],
        "square": [square],
        "star": [polygon(10, -1 / 4, (1.0, 0.4))],
        "triangle": [polygon(3, -1 / 4)],
    }[SHAPES[label]]
    foreground, background = colorsys.hsv_to_rgb(*rng.uniform((0, 0.3, 0.75), 1)), rng.uniform(0, 0.25, 3)
    colours = [tuple(int(255 * c) for c in colour) for colour in (foreground, background)]
    angle, radius = rng.uniform(-0.5, 0.5), rng.uniform(0.7, 0.95)
    centre = 1 + rng.uniform(-1, 1, 2) * (1 - radius)
    rotation = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    image = Image.new("RGB", (4 * size, 4 * size), colours[1])
    for part, colour in zip(parts, colours, strict=False):
        points = (part @ rotation.T * radius + centre) * 2 * size
        ImageDraw.Draw(image).polygon([tuple(p) for p in points], fill=colour)
    return image.resize((size, size), Image.Resampling.BOX)


class Shapes(torch.utils.data.Dataset):
    """The built-in procedural set: 20,000 training and 2,000 held-out images, drawn on demand, item = its seed."""

    def __init__(self, size: int, train: bool) -> None:
        self.size, self.split, self.classes = size, int(train), list(SHAPES)
        self.targets = balanced_labels(20_000 if train else 2_000, len(SHAPES))

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, i: int) -> tuple[Image.Image, int]:
        return draw_shape(self.targets[i], np.random.default_rng([self.split, i]), self.size), self.targets[i]


class Images(torch.utils.data.Dataset):
    """Both flips of a set of images: item i + N is item i mirrored. Items are (uint8 (3, H, W), label).

    A corrupt file is named and counted once, and replaced by the next of its class; an error if `strict`.
    """

    def __init__(self, source: torch.utils.data.Dataset, indices: np.ndarray, strict: bool = True) -> None:
        self.source, self.indices, self.classes, self.strict = source, indices, list(source.classes), strict
        self.labels = np.asarray(source.targets)[indices]
        self.sha256 = hashlib.sha256(repr(self.classes).encode() + self.labels.tobytes()).hexdigest()
        self.corrupt = torch.zeros(len(indices), dtype=torch.bool).share_memory_()  # data workers fill it in

    def read(self, i: int) -> Image.Image:
        while True:
            try:
                return self.source[int(self.indices[i])][0]
            except CorruptImage as error:
                if not (self.strict or self.corrupt[i]):
                    print(f"replaced by the next of its class: {error}", file=sys.stderr)
                self.corrupt[i] = True
                left = np.flatnonzero((self.labels == self.labels[i]) & ~self.corrupt.numpy())
                if self.strict or not len(left):
                    raise
                i = left[np.searchsorted(left, i) % len(left)]

    def __len__(self) -> int:
        """N; the flips are not counted."""
        return len(self.indices)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        if i >= 2 * len(self):
            raise IndexError(i)
        flip, i = divmod(i, len(self))
        image = ImageOps.mirror(self.read(i)) if flip else self.read(i)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1), int(self.labels[i])


def load_data(data: str, size: int, train: bool, pad: bool = False, strict: bool = True) -> Images:
    """The training or the held-out split of "shapes", "mnist", "cifar10", or a folder with one folder per class.

    A folder may hold train/ and val/ (or test/); where there is no held-out folder, every 20th image is held out.
    strict: see `Images`.
    """
    if data == "shapes":
        source = Shapes(size, train)
    elif data in ("mnist", "cifar10"):
        kind = torchvision.datasets.MNIST if data == "mnist" else torchvision.datasets.CIFAR10
        try:
            with rank_zero_first():
                source = kind("data", train, functools.partial(fit, size=size, pad=pad, name=data), download=True)
        except (OSError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"--data {data}: the download into data/ failed ({reason}); give --data a folder with one "
                            "folder per class, or --data shapes, which needs no download") from error
    else:
        root = Path(data)
        if not root.is_dir():
            raise UserError(f"--data {data}: no such folder; give a folder with one folder of images per class "
                            "(train/ and val/ below it are used), or shapes, mnist, cifar10")
        folder = root / "train" if (root / "train").is_dir() else root
        held_out = next((root / name for name in ("val", "test") if folder != root and (root / name).is_dir()), None)
        try:
            loader = functools.partial(load_image, size=size, pad=pad)
            source = torchvision.datasets.ImageFolder(folder if train or not held_out else held_out, loader=loader)
        except FileNotFoundError as error:
            raise UserError(f"--data {data}: {str(error).splitlines()[0]}; every class needs a folder with at least "
                            "one image") from error
        if not held_out:
            if len(source.targets) < 20:
                raise UserError(f"--data {data}: {len(source.targets)} images; give at least 20, or a val/ folder")
            kept = np.arange(len(source.targets)) % 20 != 0
            return Images(source, np.flatnonzero(kept if train else ~kept), strict)
    return Images(source, np.arange(len(source.targets)), strict)


class GlobalBatches(torch.utils.data.Sampler):
    """This rank's share of each step's batch, as lists of item indices (flips included, see `Images`).

    The global batch of a step is a function of seed and step: the same for any number of ranks, and after a resume.
    """

    def __init__(self, images: int, batch: int, steps: range, seed: int, flip: bool, rank: int, world: int) -> None:
        self.images, self.batch, self.steps, self.seed, self.flip = images, batch, steps, seed, flip
        self.share = slice(rank * batch // world, (rank + 1) * batch // world)
        self.epoch = functools.lru_cache(maxsize=2)(self.epoch)

    def epoch(self, number: int) -> np.ndarray:
        """The shuffled items of an epoch; each image once, flipped by a coin."""
        rng = np.random.default_rng([self.seed, number])
        return rng.permutation(self.images) + self.images * (rng.integers(0, 2, self.images) if self.flip else 0)

    def __iter__(self) -> Iterator[list[int]]:
        for step in self.steps:
            places = np.arange(step * self.batch, (step + 1) * self.batch)[self.share]
            yield [int(self.epoch(p // self.images)[p % self.images]) for p in places]


# ------------------------------------------------------------------------------------------------------------
# 8. Checkpoints, EMA, launching, logging
# ------------------------------------------------------------------------------------------------------------


def fetch(url: str, sha256: str, path: str | None = None, flag: str = "") -> Path:
    """A local file, or a download into torch.hub's cache; either must have this SHA-256 (or begin with it)."""
    file = Path(path) if path else Path(torch.hub.get_dir()) / "checkpoints" / f"{sha256[:8]}-{url.split('/')[-1]}"
    if not path:
        try:
            with rank_zero_first():
                if not file.exists():
                    file.parent.mkdir(parents=True, exist_ok=True)
                    torch.hub.download_url_to_file(url, str(file), sha256)
        except (OSError, RuntimeError) as error:
            raise UserError(f"cannot download {url} ({error}); put the file with sha256 {sha256} at {file}, "
                            f"or name it with {flag}") from error
    if not file.is_file():
        raise UserError(f"{flag} {file}: no such file; it can be had from {url}")
    found = hashlib.sha256(file.read_bytes()).hexdigest()
    if not found.startswith(sha256):
        raise UserError(f"{file}: sha256 is {found[:16]}..., not {sha256[:16]}...; fetch it again from {url}")
    return file


def save_checkpoint(path: Path, contents: dict) -> None:
    """Write tensors and builtins to `path`: into a temporary file, to the disk, then renamed over the old one."""
    part = path.with_suffix(".part")
    try:
        with open(part, "wb") as file:
            torch.save(contents, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # PyTorch's writer turns the one into the other
        part.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written ({str(error).splitlines()[0]}); is the disk full? What was saved "
                        "before is untouched: make room, then --resume") from error


def read_checkpoint(path: str | Path, kind: str) -> dict:
    """Contents of a checkpoint of this kind; never unpickles code. UserError, naming the file, if it is not one."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such checkpoint; name one, or train it (README, Training)")
    try:
        contents = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zipfile, pickle and PyTorch each raise their own
        raise UserError(f"{path}: not a checkpoint, or a damaged one ({type(error).__name__}); copy or train it "
                        "again") from error
    found = contents.get("kind") if isinstance(contents, dict) else None
    if found != kind:
        raise UserError(f"{path}: holds {f'a {found}' if found else 'something else'}, not a {kind}")
    return contents


def half(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict on the CPU in half precision, as model files hold it."""
    return {name: weight.cpu().half() for name, weight in state.items()}


def frozen(tokenizer: Tokenizer, device: torch.device | str) -> Tokenizer:
    """For inference; with channels last, which is 1.2 times as fast on 256 pixels."""
    return tokenizer.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)


def build_tokenizer(contents: dict, path: str | Path, device: torch.device | str) -> Tokenizer:
    try:
        tokenizer = Tokenizer(TokenizerConfig(**contents["config"]))
        tokenizer.load_state_dict(contents["model"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{path}: the tokenizer's weights do not fit its config ({type(error).__name__})") from error
    return frozen(tokenizer, device)


def load_tokenizer(path: str | Path, device: torch.device | str = "cpu") -> Tokenizer:
    """The tokenizer that train_vq.py wrote, for inference. UserError if the file is not one."""
    return build_tokenizer(read_checkpoint(path, "tokenizer"), path, device)


def load_generator(path: str | Path, device: torch.device | str = "cpu") -> tuple[RDPM, Tokenizer, dict]:
    """The generator that train_gen.py wrote, with its tokenizer, for inference. UserError if the file is not one.

    The dict has "classes" (names), "sampling" (defaults of `sample`) and "step".
    """
    contents = read_checkpoint(path, "generator")
    tokenizer = build_tokenizer(contents.get("tokenizer", {}), path, device)
    try:
        model = RDPM(GeneratorConfig(**contents["config"]), tokenizer)
        model.load_state_dict(contents["model"])
        if any(contents.get(key, value) != value for key, value in asdict(tokenizer.config).items()):
            raise ValueError  # no weight of a linear head would tell another T, none of a codebook head another K
        info = {key: contents[key] for key in ("classes", "sampling", "step")}
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{path}: the generator's weights do not fit its config ({type(error).__name__})") from error
    return model.eval().requires_grad_(False).to(device), tokenizer, info


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, decay: float, step: int) -> None:
    """ema <- decay * ema + (1 - decay) * model; early on the decay is smaller, to forget the initialisation."""
    weight = 1 - min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), weight)


def learning_rate(step: int, steps: int, base: float, warmup: int, final: float) -> float:
    """Linear warm-up, then linear from `base` to `final * base` (final = 1: constant)."""
    if step < warmup:
        return base * (step + 1) / warmup
    return base * (1 + (final - 1) * (step - warmup) / max(steps - warmup, 1))


def save_state(path: Path, kind: str, config: dict, parts: dict, step: int) -> None:
    """Everything a run needs to go on: modules and optimizers by name, and the step.

    No random state: noise, order, flips, t and dropped labels are functions of (seed, step).
    """
    save_checkpoint(path, {"kind": kind, "config": config, "step": step,
                           "parts": {name: part.state_dict() for name, part in parts.items()}})


def load_state(path: Path, kind: str, config: dict, parts: dict, steps: int) -> int:
    """Put a `save_state` file back into the same parts; returns the step. UserError if it belongs to another run."""
    contents = read_checkpoint(path, kind)
    for name, value in config.items():
        if (was := contents["config"].get(name)) != value:
            raise UserError(f"--resume: {path} was trained with {name} = {was}, not {value}; give the flags it was "
                            "started with")
    if contents["step"] >= steps:
        raise UserError(f"--resume: {path} is at step {contents['step']} of {steps} already, so it is finished; to go "
                        "on, give more --steps")
    for name, part in parts.items():
        part.load_state_dict(contents["parts"][name])
    return contents["step"]


class Launch(NamedTuple):
    rank: int
    world: int
    device: torch.device


def launch(device: str | None = None, timeout: float = 1800) -> Launch:
    """Pick the device, and join the process group if torchrun (or anything that sets its variables) started us.

    A collective operation that takes longer than `timeout` seconds is an error.
    """
    rank, world, local = (int(os.environ.get(key, default)) for key, default in
                          (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(f"cuda:{local}" if device == "cuda" else device)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {device}: {str(error).splitlines()[0]}") from error
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if "RANK" in os.environ and not dist.is_initialized():
        wait = datetime.timedelta(seconds=timeout)
        store, rank, world = next(dist.rendezvous("env://", timeout=wait))
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            # torchrun has one store for all restarts; the addresses of dead processes must not be read from it
            # (github.com/pytorch/pytorch/issues/135712; for several machines see the README).
            store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=wait)
    return Launch(rank, world, device)


def sum_over_ranks(*tensors: Tensor) -> None:
    """Replace each tensor by its sum over all ranks."""
    if dist.is_initialized():
        for tensor in tensors:
            dist.all_reduce(tensor)


def data_parallel(module: nn.Module) -> nn.Module:
    """The module itself, or in a process group its DistributedDataParallel."""
    if not dist.is_initialized():
        return module
    return nn.parallel.DistributedDataParallel(module, broadcast_buffers=False, gradient_as_bucket_view=True)


def micro_batches(size: int, count: int, *nets: nn.Module) -> Iterator[slice]:
    """`count` slices of a batch, for gradient accumulation. Ranks exchange gradients in the last one's backward."""
    for i in range(count):
        with ExitStack() as stack:
            for net in nets:
                if i + 1 < count and hasattr(net, "no_sync"):
                    stack.enter_context(net.no_sync())
            yield slice(i * size // count, (i + 1) * size // count)


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


@contextmanager
def rank_zero_first() -> Iterator[None]:
    """The block runs on rank 0, then on the others."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    if rank > 0:
        barrier()
    try:
        yield
    finally:
        if rank == 0:
            barrier()


BF16_DEVICES = ("cuda", "cpu")


def autocast(device: torch.device) -> torch.autocast:
    """bf16 mixed precision where the device has it."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type in BF16_DEVICES)


def prepare_sampling(model: RDPM, device: torch.device, compiled: bool) -> None:
    """Linear layers in bfloat16, as `autocast` casts them in every pass: the same bits, 6 % faster.

    compiled: by torch.compile, which on a GPU also records each batch size's pass as a CUDA graph.
    """
    if device.type in BF16_DEVICES:
        for layer in model.modules():
            if isinstance(layer, nn.Linear):
                layer.bfloat16()
    if compiled:
        model.compile(mode="reduce-overhead", dynamic=False)


def run_main(main: Callable[[], None]) -> None:
    """Run a script: bad input ends with one line and exit code 2, no traceback."""
    try:
        main()
    except (UserError, OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
            raise
        for bar in list(tqdm._instances):  # or they would write over the message
            bar.close()
        # A data worker's error arrives with its traceback as text; the last line is the message.
        message = re.sub(r"^rdpm\.\w+: ", "", str(error).strip().splitlines()[-1])
        print("error: " + message, file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's would raise
        for worker in multiprocessing.active_children():
            worker.kill()
        if dist.is_initialized():
            dist.destroy_process_group()


def own_group(_: int) -> None:
    """For data workers: a signal to all our processes is for their parent to hear, which still needs them."""
    os.setpgrp()
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(20))  # which ends them


STOPPED = 75  # exit code of a training that was told to stop and has saved: EX_TEMPFAIL of sysexits.h, "try again"
BAD_STEPS = 10


class Guard:
    """In each step: is every rank still there, has one been told to stop, is it finite? Never waits for a GPU."""

    def __init__(self, device: torch.device, timeout: float, start: int) -> None:
        starts = [start] * (dist.get_world_size() if dist.is_initialized() else 1)
        if dist.is_initialized():
            dist.all_gather_object(starts, start)
        if len(set(starts)) > 1:
            raise UserError(f"the ranks would go on from steps {starts}: --out must be one folder that all of them see")
        self.told, self.timeout = False, datetime.timedelta(seconds=timeout)
        self.group = dist.new_group(backend="gloo", timeout=self.timeout) if dist.is_initialized() else None
        self.skipped, self.in_a_row = torch.zeros(2, device=device)
        self.seen = torch.zeros((), pin_memory=device.type == "cuda")  # in_a_row, a moment ago
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.hear)

    def hear(self, number: int, _) -> None:
        """SIGTERM (a cluster takes its machine back) or Ctrl-C: finish the step. The second Ctrl-C ends it at once."""
        self.told = True
        signal.signal(number, signal.SIG_DFL if number == signal.SIGINT else signal.SIG_IGN)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # if it was sent to the data workers too, PyTorch would raise

    def stop(self) -> bool:
        """Whether to stop after this step: the same answer on every rank, if one was told to. Call it before the step.

        UserError if ten steps in a row were skipped, or if a rank is gone, or hangs (before its forward pass).
        """
        self.seen.copy_(self.in_a_row, non_blocking=True)
        votes = torch.tensor([int(self.told), int(self.seen.item() >= BAD_STEPS)])
        if self.group:
            try:
                dist.monitored_barrier(self.group, self.timeout, wait_all_ranks=True)
                dist.all_reduce(votes, dist.ReduceOp.MAX, self.group)
            except RuntimeError as error:
                raise UserError(f"a rank is gone or hangs: {str(error).splitlines()[0]}") from error
        if votes[1]:
            raise UserError(f"the last {BAD_STEPS} steps gave a loss or gradient that is not finite; state.pt is from "
                            "before: lower --lr, or look for what is wrong in the data")
        return bool(votes[0])

    def not_finite(self, *values: Tensor) -> Tensor:
        """1.0 if a loss or gradient norm of any rank is not finite, else 0.0: a fused optimizer's `found_inf`.

        That is how torch.amp.GradScaler makes an optimizer skip a step without asking the GPU first.
        """
        # .to, because PyTorch's norm of no gradients lies on the CPU.
        bad = (~torch.stack([value.to(self.skipped.device) for value in values]).isfinite()).any().float()
        sum_over_ranks(bad)
        bad = bad.clamp(max=1)
        self.skipped += bad
        self.in_a_row = torch.where(self.in_a_row < BAD_STEPS, (self.in_a_row + 1) * bad, self.in_a_row)
        return bad


def image_grid(images: Tensor, columns: int) -> Image.Image:
    """Bytes (N, 3, H, W) as one picture; images under 96 pixels are enlarged without smoothing."""
    grid = torchvision.utils.make_grid(images.cpu(), columns, padding=1, pad_value=255).permute(1, 2, 0).numpy()
    return ImageOps.scale(Image.fromarray(grid), max(1, 96 // images.shape[-1]), Image.Resampling.NEAREST)


def count_flops(run: Callable[[], object]) -> int:
    """Floating-point operations of the matrix products, convolutions and attention in run()."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def shortest_time(run: Callable[[], Tensor]) -> float:
    """Seconds of the fastest of ten calls, each until the device has the result."""
    seconds = []
    for _ in range(10):
        start = time.perf_counter()
        run().flatten()[0].item()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


@functools.cache
def matrix_peak(device: torch.device) -> float:
    """FLOP/s of this device in a square matrix product, bf16 where `autocast` is."""
    n = 8192 if device.type == "cuda" else 1024
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16 if device.type in BF16_DEVICES else torch.float32)
    return 2 * n**3 / shortest_time(lambda: a @ a)


class Log:
    """A run's progress bar and its log.jsonl, whose first record says what ran where. Rank 0 writes.

    flops: of one image's training step, for the share of the devices' matrix-product peak.
    """

    def __init__(self, args: argparse.Namespace, where: Launch, start: int, steps: int, flops: int) -> None:
        device, self.batch, self.last = where.device, args.batch, (time.perf_counter(), start)
        self.flops, self.peak = flops, matrix_peak(device) * where.world / flops  # images/s
        self.file = open(args.out / "log.jsonl", "a", buffering=1) if where.rank == 0 else None  # noqa: SIM115
        self.bar = tqdm(total=steps, initial=start, unit="step", mininterval=0.5 if sys.stderr.isatty() else 30.0,
                        disable=where.rank > 0)
        commit = shutil.which("git") and subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True,
            check=False).stdout.strip()
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
        self.record(command=" ".join(sys.argv), commit=commit, torch=torch.__version__, device=f"{device}, {name}",
                    world=where.world, args=vars(args), flops_per_image=flops, peak_images_per_s=round(self.peak, 1))

    def record(self, **values) -> None:
        if self.file:
            self.file.write(json.dumps(values, default=str) + "\n")

    def benchmark(self) -> None:
        """Print the speed of the last steps."""
        self.bar.close()
        if self.file:
            rate, flops = self.rate, f"{self.flops / 1e9:.3g} GFLOP a step and image"
            print(f"{rate:.3g} images/s of {flops}: {rate / self.peak:.0%} of the matrix-product peak, "
                  f"{self.peak * self.flops / 1e9:.4g} GFLOP/s")

    def stopped(self, step: int) -> None:
        """End the process after a signal; the state of this step has been saved."""
        barrier()  # a launcher that sees one rank end may kill the one that is still writing
        self.bar.close()
        self.record(step=step, stopped=True)
        if self.file:
            print(f"told to stop: saved after step {step}; the same command with --resume goes on", file=sys.stderr)
        sys.exit(STOPPED)

    def step(self, step: int, loss: float, lr: float, grad_norm: float, guard: Guard, images: Images,
             **columns) -> None:
        """One fixed line on the bar; that and the `columns` (lists over t if they end in _t) into log.jsonl."""
        now, (then, before) = time.perf_counter(), self.last
        self.last = now, step
        self.rate = rate = (step - before) * self.batch / (now - then)
        memory = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else resource.getrusage(
            resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        self.bar.set_postfix_str(f"loss {loss:.4f}, lr {lr:.1e}, grad {grad_norm:.2f}, {rate:.3g} img/s = "
                                 f"{rate / self.peak:.0%} of peak, {memory / 2**30:.1f} GiB", refresh=False)
        self.bar.update(step - self.bar.n)
        corrupt = images.corrupt.byte()
        if dist.is_initialized():
            dist.all_reduce(corrupt, dist.ReduceOp.MAX)
        self.record(step=step, loss=loss, lr=lr, grad_norm=grad_norm, images_per_s=round(rate, 1),
                    share_of_peak=round(rate / self.peak, 3), skipped_steps=int(guard.skipped),
                    corrupt_images=int(corrupt.sum()), **columns)


def open_run(args: argparse.Namespace, rank: int, world: int) -> None:
    """Make --out, or refuse it: never write over a run. With --resume and nothing there yet, a run begins."""
    if args.batch % world:
        raise UserError(f"--batch {args.batch}: must be a multiple of the {world} devices")
    if args.accum > args.batch // world:
        raise UserError(f"--accum {args.accum}: a device has {args.batch // world} images a step; lower it, or raise "
                        "--batch")
    state, model = args.out / "state.pt", args.out / "model.pt"
    if not args.resume and (state.exists() or model.exists()):
        raise UserError(f"--out {args.out} already holds a run; continue it with --resume, or choose another --out")
    if args.resume and not state.exists():  # a restarted job has the command line of its first start
        if model.exists():
            raise UserError(f"--resume: there is no {state} to continue from, but a model.pt; choose another --out")
        args.resume = False
    barrier()  # every rank has looked before one writes
    if rank == 0:
        try:
            args.out.mkdir(parents=True, exist_ok=True)
            (args.out / "log.jsonl").touch()
        except OSError as error:
            raise UserError(f"--out {args.out}: cannot write there ({error.strerror})") from error


def check_numbers(args: argparse.Namespace, positive: tuple[str, ...], others: tuple[str, ...]) -> None:
    """UserError for a flag that is negative, NaN or 2^32 and more, or 0 where it must be `positive`."""
    for name in positive + others:
        value = getattr(args, name, None)
        if value is not None and not (0 <= value < 2**32 and (value > 0 or name in others)):
            kind = "a positive number" if name in positive else "a number from 0 up"
            raise UserError(f"--{'dim' if name == 'd' else name.replace('_', '-')} {value}: must be {kind}")


def parse_training_args(parser: argparse.ArgumentParser, stage: str) -> argparse.Namespace:
    """Add the flags both trainers share, take defaults from the preset's `stage`, and check the numbers."""
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="imagenet", help="defaults (imagenet: the paper's)")
    add("--data", help="shapes, mnist, cifar10, or a folder with one folder of images per class")
    add("--out", help=f"the run's folder (default runs/PRESET-{stage})")
    add("--epochs", type=float, help="passes over the data")
    add("--steps", type=int, help="optimizer steps, instead of --epochs")
    add("--batch", type=int, help="global batch, over all devices")
    add("--lr", type=float, help="peak learning rate")
    add("--lr-final", type=float, help="last learning rate, as a share of the peak")
    add("--warmup", type=int, help="steps of linear warm-up")
    add("--seed", type=int, default=0)
    add("--accum", type=int, default=1, help="backward passes a step: divides the memory, not the batch")
    add("--resume", action="store_true", help="continue the run in --out, or begin it")
    add("--strict", action="store_true", help="a corrupt image is an error, not replaced by the next of its class")
    add("--timeout", type=float, default=1800, help="seconds that ranks wait for one that hangs")
    add("--device", help="cuda, mps or cpu; the best there is by default")
    add("--benchmark", action="store_true", help="measure the speed of 20 steps; needs no data and keeps nothing")
    add("--workers", type=int, default=min(8, os.cpu_count() or 1), help="data workers a process")
    add("--log-every", type=int, default=50, help="steps between log lines")
    add("--save-every", type=int, default=1000, help="steps between checkpoints and picture grids")
    add("--flip", action=argparse.BooleanOptionalAction, help="train on mirrored images too (digits must not)")
    preset = PRESETS[parser.parse_known_args()[0].preset]
    tokenizer = asdict(TokenizerConfig(**preset["tokenizer"])) if stage == "vq" else {}
    common = {name: preset[name] for name in ("data", "pad", "flip")}
    parser.set_defaults(**common, **preset[f"train_{stage}"], **tokenizer)
    args = parser.parse_args()
    args.out = Path(args.out or f"runs/{args.preset}-{stage}")
    if args.benchmark:  # ten steps to warm up, ten to measure
        args.steps, args.log_every, args.resume, args.data = 20, 10, False, "shapes"
        args.out = Path(tempfile.mkdtemp())
        atexit.register(shutil.rmtree, args.out, ignore_errors=True)
    check_numbers(args, positive=("epochs", "steps", "batch", "lr", "accum", "timeout", "log_every", "save_every",
                                  "image_size", "T", "K", "d", "phi", "depth", "patch", "fid_every", "fid_num"),
                  others=("seed", "workers", "warmup", "lr_final", "perceptual", "gan", "gan_start", "ema"))
    return args
