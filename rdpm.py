"""RDPM: Recurrent Diffusion Probabilistic Models (arXiv 2412.18390), every component in one file.

The idea. A tokenizer encodes an image into a latent v and quantises it in T steps. Step t takes what is left of v,
mixes Gaussian noise into it, and replaces each vector by its nearest codebook entry; the entries of all steps add up to
z'_T, which the decoder turns back into the image. Early steps code mostly noise, the last has none: a diffusion process
whose every state is a grid of integers. A transformer learns by cross-entropy to predict the codes of step t from the
noise eps_t, the class y, t, and the sum so far. Sampling starts from a sum of zero and runs the transformer T times.

Contents, leaves before roots
    1  configs and presets                5  transformer, Eq. (6)
    2  schedules, the noise of an image   6  sampler, Alg. 2, Eq. (8)
    3  encoder, decoder, noisy residual   7  data
       quantiser (Alg. 1), tokenizer      8  what training needs: checkpoints, ranks, flags, log
    4  perceptual loss, discriminator

Notation; bare numbers such as (3.2) are the paper's sections
    paper         code          shape         meaning
    x, x'         x, x_rec      (B, 3, H, W)  image in [-1, 1] and its reconstruction
    v             v             (B, n, d)     latent, Eq. (1); n = h * w tokens, row by row
    T, t          T, t                        number of steps; step, counted from 1
    C             codebook      (K, d)        codebook: K entries e_k of dimension d
    C_t           codes_t       (B, n)        code indices of step t; codes (T, B, n): of all steps
    eps_t         eps_t         (B, n, d)     noise of step t; eps (T, B, n, d): of all steps
    z_t           z             (B, n, d)     residual v - z'_{t-1}: what the first t - 1 steps left of v
    v_t           v_t           (B, n, d)     noisy residual alpha_t z_t + beta_t eps_t, Eq. (2)
    v'_t          vq            (B, n, d)     quantised v_t: codebook entry plus bias
    z'_t          z_sum         (B, n, d)     v'_1 + ... + v'_t; z'_0 = 0
    alpha, beta   alpha, beta   (T,)          share of signal and of noise, alpha^2 + beta^2 = 1
    gamma         gamma         (T,)          weights of Eq. (4)
    y             y             (B,)          class label; num_classes stands for "no class"
    v-hat'_t      logits        (B, n, K)     output of the transformer f, Eq. (6): a number for each code
    lambda, tau   guidance, tau               guidance strength; inverse temperature, Eq. (8)
    (not in it)   v_hat         (B, n, d)     the codebook head's prediction of v (not the paper's v-hat'_t)
"""

import argparse
import colorsys
import datetime
import fcntl
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor, nn
from tqdm import tqdm

# The same latent and the same noise must give the same codes everywhere: no TF32 in float32 convolutions.
torch.backends.cudnn.allow_tf32 = False

RANK, WORLD_SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # torchrun sets them
TRAINING_NUMBERS = 2**32  # the first number of a training image: evaluation and sampling count from 0


class UserError(Exception):
    """Bad input. The message is the one line that a person sees: what is wrong, where, what to do."""


def one_line(error: BaseException) -> str:
    """An error's message, of which a data worker's is the last line of a traceback."""
    return (str(error).strip() or type(error).__name__).splitlines()[-1].removeprefix("rdpm.UserError: ")


# 1. Configs and presets -----------------------------------------------------------------------------------------------

@dataclass
class TokenizerConfig:
    """The tokenizer's sizes and switches. Defaults: the paper's (4.2), VQGAN's f16 where it is silent."""

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
    layer_norm: str = "token"                       # the encoder's end normalises each "token", or the whole "image"
    stop_gradients: bool = True                     # VQ-VAE's in Eq. (4), which is printed without (README, Readings)

    def __post_init__(self) -> None:
        self.downsampling = 2 ** (len(self.multipliers) - 1)
        self.side = self.image_size // self.downsampling  # h = w
        if self.image_size % self.downsampling or self.image_size < 8:
            raise UserError(f"--image-size {self.image_size}: must be a multiple of {self.downsampling}, at least 8")
        if self.phi > 1:
            raise UserError(f"--phi {self.phi}: must be at most 1, or alpha would fall to 1")


@dataclass
class GeneratorConfig:
    """The transformer's size. The width is 64 * depth, and the number of heads is depth (Table 1)."""

    depth: int = 12
    num_classes: int = 1000
    bottleneck: bool = False  # input projection 2d -> d -> width, else 2d -> width (README, Readings)
    head: str = "linear"      # "linear" is the paper's; "codebook" predicts the latent, see RDPM.codebook_logits
    patch: int = 1            # tokens along one side of what the transformer sees as one (DiT's patch size)
    label_drop: float = 0.1   # probability of training without the class (4.2)


@dataclass
class Sampling:
    """How to sample: the rows of Table 3, and what the first steps do. Each checkpoint stores its own defaults."""

    guidance: float = 1.5              # lambda; 0 is no guidance
    guidance_schedule: str = "linear"  # lambda_t rises from 0 at t = 1 to lambda at T; or "constant"
    guidance_from: int = 1             # the first step with guidance, which costs variety in early ones
    guidance_to: int = 0               # the last; 0 is T
    tau: float = 1.0                   # inverse temperature of Eq. (8)
    gumbel: bool = True                # draw codes by Eq. (8), or take the likeliest
    skip: int = 0                      # first steps that encode (Alg. 1) a draft of v instead of asking the network
    draft: float = 0.0                 # scale of the draft's noise about the class's mean, as images vary in a class

    def lambdas(self, T: int) -> list[float]:
        """Guidance strengths lambda_1 ... lambda_T (3.2, 4.3)."""
        shares = [(t - 1) / max(T - 1, 1) if self.guidance_schedule == "linear" else 1.0 for t in range(1, T + 1)]
        guided = range(self.guidance_from, (self.guidance_to or T) + 1)
        return [self.guidance * share if t in guided else 0.0 for t, share in enumerate(shares, 1)]


# A preset is a row of defaults, most of them of the scripts' flags: a flag that is given wins. `imagenet` is the paper.
SMALL = {"image_size": 32, "res_blocks": 1, "schedule": "sin", "d": 4, "K": 512, "layer_norm": "image"}
TINY = SMALL | {"channels": 16, "multipliers": (1, 2, 4)}
SMALL_VQ = {"batch": 64, "lr": 1e-3, "lr_final": 0.02, "warmup": 100, "perceptual": 0.0, "gan": 0.0}
SMALL_GEN = {"depth": 4, "batch": 128, "lr": 1e-3, "lr_final": 0.1, "warmup": 200, "ema": 0.999, "head": "codebook",
             "patch": 2}
PRESETS = {
    "imagenet": {
        "data": "data/imagenet", "pad": False, "flip": True, "tokenizer": {},
        "train_vq": {"epochs": 10, "batch": 128, "lr": 4e-5, "lr_final": 1.0, "perceptual": 1.0, "gan": 0.75},
        "train_gen": {"depth": 12, "epochs": 250, "batch": 1024, "lr": 4e-4, "lr_final": 0.1, "warmup": 1000,
                      "ema": 0.9999, "head": "linear", "patch": 1}},
    "cifar10": {
        "data": "cifar10", "pad": False, "flip": True,
        "tokenizer": SMALL | {"channels": 32, "multipliers": (1, 2)},
        "train_vq": SMALL_VQ | {"epochs": 6, "batch": 32},
        "train_gen": SMALL_GEN | {"epochs": 240, "lr_final": 0.05, "warmup": 500, "ema": 0.9995},
        "sampling": {"guidance": 3.5, "guidance_schedule": "constant", "guidance_from": 5, "skip": 4, "draft": 1.2}},
    "mnist": {"data": "mnist", "pad": True, "flip": False, "tokenizer": TINY,
              "train_vq": SMALL_VQ | {"epochs": 1.75}, "train_gen": SMALL_GEN | {"epochs": 8}},
    "shapes": {"data": "shapes", "pad": False, "flip": False, "tokenizer": TINY,
               "train_vq": SMALL_VQ | {"epochs": 2.5}, "train_gen": SMALL_GEN | {"epochs": 12}},
}


# 2. Schedules, and the noise of an image ------------------------------------------------------------------------------

def alpha_schedule(schedule: str, T: int, phi: float = 0.75) -> Tensor:
    """alpha_1 ... alpha_T, float32 (T,), rising to 1 (Table 4, Figure 5). The paper's is "pow" with phi = 0.75."""
    t = torch.arange(1, T + 1, dtype=torch.float64)
    return {"sin": torch.sin(math.pi * t / (2 * T)), "linear": t / T, "pow": phi ** (T - t)}[schedule].float()


class ImageStreams:
    """One random stream per image, set by seed, image number (see TRAINING_NUMBERS) and kind of device alone."""

    def __init__(self, seed: int, numbers: Sequence[int], device: torch.device | str) -> None:
        self.device, self.generators = device, []
        for number in numbers:
            # SeedSequence mixes the pair, because PyTorch's CPU generator uses only the low 32 bits of a seed.
            high, low = np.random.SeedSequence([seed, number]).generate_state(2, np.uint32).tolist()
            self.generators.append(torch.Generator(device).manual_seed((high >> 1 << 32) + low))  # 63 bits

    def draw(self, distribution: Callable[..., Tensor], *shape: int) -> Tensor:
        """(B, *shape) from torch.randn or torch.rand."""
        return torch.stack([distribution(shape, generator=g, device=self.device) for g in self.generators])


# 3. Tokenizer: encoder, decoder, noisy residual quantiser -------------------------------------------------------------

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


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(c)) v, each (B, heads, n, c)."""
    if q.device.type == "cpu":  # PyTorch's fused kernel is several times slower there at these sizes
        return (q @ (k * k.shape[-1] ** -0.5).mT).softmax(-1) @ v
    return F.scaled_dot_product_attention(q, k, v)


class SpatialAttention(nn.Module):
    """Single-head self-attention over the positions of a feature map, as in VQGAN's lowest level."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = group_norm(channels)
        self.qkv, self.out = nn.Conv2d(channels, 3 * channels, 1), nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).flatten(2).transpose(1, 2)[:, None].chunk(3, dim=-1)  # each (B, 1, hw, c)
        return x + self.out(attend(q, k, v)[:, 0].transpose(1, 2).reshape(x.shape))


def stage(c_in: int, c_out: int, blocks: int, attention: bool) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for i in range(blocks):
        layers += [ResBlock(c_out if i else c_in, c_out)] + ([SpatialAttention(c_out)] if attention else [])
    return layers


class Encoder(nn.Module):
    """Eq. (1), v = E(x): (B, 3, H, W) in [-1, 1] -> latent (B, n, d), normalised."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.layer_norm = config.layer_norm
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
        # No learned gain: with one, the encoder might grow louder than the noise of Eq. (2), which has unit variance. A
        # normalised token has d - 2 free numbers of d: 2 of 4, too few for the small presets, which take the image.
        return F.layer_norm(v.float(), v.shape[1:] if self.layer_norm == "image" else v.shape[2:])


class Decoder(nn.Module):
    """x' = D(z'_T): (B, n, d) -> (B, 3, H, W), about [-1, 1]."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.side = config.side
        widths = [config.channels * m for m in reversed(config.multipliers)]
        first = widths[0]
        layers = [nn.Conv2d(config.d, first, 3, padding=1), ResBlock(first, first), SpatialAttention(first),
                  ResBlock(first, first), *stage(first, first, config.res_blocks + 1, attention=True)]
        for c_in, c_out in itertools.pairwise(widths):
            layers += [nn.Upsample(scale_factor=2.0, mode="nearest"), nn.Conv2d(c_in, c_in, 3, padding=1)]
            layers += stage(c_in, c_out, config.res_blocks + 1, attention=False)
        last = widths[-1]
        self.layers = nn.Sequential(*layers, group_norm(last), nn.SiLU(), nn.Conv2d(last, 3, 3, padding=1))

    def forward(self, z_sum: Tensor) -> Tensor:
        return self.layers(z_sum.transpose(1, 2).unflatten(2, (self.side, self.side)))  # from (B, d, h, w)


def argmax(x: Tensor) -> Tensor:
    """Index of the largest value along the last dimension of float32 x. On a CPU NumPy's is the faster."""
    return torch.from_numpy(x.numpy().argmax(-1)) if x.device.type == "cpu" else x.argmax(-1)


@dataclass
class Quantized:
    """What Alg. 1 leaves behind."""

    codes: Tensor     # (T, B, n)  C_1 ... C_T
    z_sum: Tensor     # (B, n, d)  z'_T
    loss: Tensor      # Eq. (4)
    residual: Tensor  # (T,) mean square of z_t
    error: Tensor     # (T,) mean square of v_t - v'_t


class NoisyResidualQuantizer(nn.Module):
    """The diffusion-based quantiser (3.1). Always in float32: encoder, training and sampler must agree on codes."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.T, self.side, self.stop_gradients = config.T, config.side, config.stop_gradients
        # Unit scale, as the N(0, 1) noise of the first steps: with VQ-VAE's U(-1/K, 1/K) almost all codes stay unused.
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
        """Indices (B, n) of the codebook entries nearest to v_t (B, n, d)."""
        # |v - e|^2 = |v|^2 - 2 (v . e - |e|^2 / 2), so the nearest entry is the argmax of one matrix product.
        offset = -self.codebook.square().sum(1) / 2
        rows = 2 ** (18 if v_t.device.type == "cpu" else 28) // len(self.codebook) + 1  # 1 MiB of scores, or 1 GiB
        with torch.autocast(v_t.device.type, enabled=False):
            scores = (F.linear(part, self.codebook, offset) for part in v_t.flatten(0, 1).split(rows))
            return torch.cat([argmax(part) for part in scores]).view(v_t.shape[:2])

    def lookup(self, codes: Tensor) -> Tensor:
        """v' for codes (B, n): the codebook's entries plus the bias convolution of their grid, (B, n, d)."""
        e = F.embedding(codes, self.codebook)
        if self.bias is None:
            return e
        grid = e.transpose(1, 2).unflatten(2, (self.side, self.side))           # (B, d, h, w)
        with torch.autocast(e.device.type, enabled=False):
            return e + self.bias(grid).flatten(2).transpose(1, 2)

    def step(self, t: int, z_sum: Tensor, v: Tensor, eps_t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """One residual step: v, z'_{t-1} and eps_t, each (B, n, d) -> codes C_t (B, n), v'_t, z_t, v_t."""
        z = v - z_sum                                                           # Alg. 1, line 3, summed over the steps
        v_t = self.alpha[t - 1] * z + self.beta[t - 1] * eps_t                  # Eq. (2); Alg. 1, line 4
        codes_t = self.nearest(v_t)                                             # Alg. 1, line 5
        return codes_t, self.lookup(codes_t), z, v_t

    def forward(self, v: Tensor, eps: Tensor) -> Quantized:
        """Alg. 1 and Eq. (4): quantise v (B, n, d) in T steps with the noise eps (T, B, n, d).

        Eq. (4) is a mean over elements and a sum over t. As printed, codebook, bias and encoder learn from all of it;
        with `stop_gradients` its square becomes VQ-VAE's two terms (van den Oord et al. 2017).
        """
        z_sum, loss = torch.zeros_like(v), 0.0
        codes, residual, error = [], [], []
        for t in range(1, self.T + 1):
            codes_t, vq, z, v_t = self.step(t, z_sum, v, eps[t - 1])
            if self.stop_gradients:
                loss_t = F.mse_loss(vq, v_t.detach()) + 0.25 * F.mse_loss(v_t, vq.detach())  # codebook, commitment
            else:
                loss_t = F.mse_loss(vq, v_t)
            z_sum = z_sum + (vq.detach() if self.stop_gradients else vq)        # Alg. 1, line 6
            loss = loss + self.gamma[t - 1] * loss_t                            # Eq. (4)
            codes.append(codes_t)
            residual.append(z.detach().square().mean())
            error.append((v_t - vq).detach().square().mean())
        return Quantized(torch.stack(codes), z_sum, loss, torch.stack(residual), torch.stack(error))

    @torch.no_grad()
    def training_input(self, v: Tensor, eps: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Input and target of Eq. (6): v, eps (T, B, n, d), t (B,) on the CPU -> z'_{t-1} (B, n, d), C_t (B, n)."""
        z_sum, target = torch.zeros_like(v), torch.zeros(v.shape[:2], dtype=torch.long, device=v.device)
        for s in range(1, int(t.max()) + 1):
            here = (t >= s).nonzero()[:, 0]                                     # images still under way
            goes_on = (t[here] > s)[:, None, None].to(v.device, non_blocking=True)
            here = here.to(v.device, non_blocking=True)
            codes_s, vq, _, _ = self.step(s, z_sum[here], v[here], eps[s - 1, here])
            target[here] = codes_s                                              # overwritten until s = t: C_t
            z_sum[here] += vq * goes_on                                         # without v'_t itself: z'_{t-1}
        return z_sum, target


class Tokenizer(nn.Module):
    """Encoder, noisy residual quantiser and decoder (3.1, Figure 4)."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.quantizer = NoisyResidualQuantizer(config)

    def noise(self, streams: ImageStreams) -> Tensor:
        """eps (T, B, n, d), image by image from its stream."""
        return streams.draw(torch.randn, self.config.T, self.config.side**2, self.config.d).transpose(0, 1)

    def forward(self, x: Tensor, eps: Tensor) -> tuple[Tensor, Tensor, Quantized]:
        """Reconstruct x: x', v, Quantized. The decoder sees z'_T, and its gradient goes to v (straight-through)."""
        v = self.encoder(x)
        quantized = self.quantizer(v, eps)
        return self.decoder(v + (quantized.z_sum - v).detach()), v, quantized


# 4. Perceptual loss and discriminator of Eq. (5) ----------------------------------------------------------------------

VGG16 = "https://download.pytorch.org/models/vgg16-397923af.pth", "397923af"  # the first digits of its sha256
LPIPS_LINEAR = ("https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/master/lpips/weights/v0.1/vgg.pth",
                "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868")


class LPIPS(nn.Module):
    """Perceptual loss of Eq. (5), "features from VGG16": LPIPS v0.1 (Zhang et al. 2018), as VQGAN uses it."""

    def __init__(self, vgg16: dict[str, Tensor], linear: dict[str, Tensor]) -> None:
        super().__init__()
        network = torchvision.models.vgg16(weights=None, init_weights=False)
        network.load_state_dict(vgg16)
        ends = itertools.pairwise((0, 4, 9, 16, 23, 30))  # relu1_2, relu2_2, relu3_3, relu4_3, relu5_3
        self.slices = nn.ModuleList(network.features[start:end] for start, end in ends)
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


class Discriminator(nn.Sequential):
    """PatchGAN (Isola et al. 2017): image (B, 3, H, W) -> logits (B, 1, h, w), one per patch, high for real."""

    def __init__(self) -> None:
        blocks: list[nn.Module] = [nn.Conv2d(3, 64, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for c_in, c_out, stride in ((64, 128, 2), (128, 256, 2), (256, 512, 1)):
            blocks += [nn.Conv2d(c_in, c_out, 4, stride=stride, padding=1, bias=False),
                       group_norm(c_out), nn.LeakyReLU(0.2)]  # BatchNorm would depend on the number of devices
        super().__init__(*blocks, nn.Conv2d(512, 1, 4, padding=1))


# 5. Transformer, Eq. (6) ----------------------------------------------------------------------------------------------

def rotary_angles(side: int, head_dim: int) -> Tensor:
    """2-D rotary positions: angles (n, head_dim / 2), the first half by row, the second by column."""
    frequencies = 100.0 ** (-torch.arange(0, head_dim // 2, 2) / (head_dim // 2))  # not 10,000: a grid is small
    axis = torch.arange(side).float()[:, None] * frequencies                 # (side, head_dim / 4)
    return torch.cat([axis.repeat_interleave(side, dim=0), axis.repeat(side, 1)], dim=1)


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
        hidden = round(8 / 3 * width / 8) * 8  # SwiGLU has three matrices: with 8/3 they cost what two do with 4
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
        h = attend(rotate(q, cos, sin), rotate(k, cos, sin), v)
        x = x + gate1 * self.out(h.transpose(1, 2).reshape(B, n, width))
        gate, up = self.gate_up(modulate(x, shift2, scale2)).chunk(2, dim=-1)
        return x + gate2 * self.down(F.silu(gate) * up)


class RDPM(nn.Module):
    """The transformer f of Eq. (6): (eps_t, y, t, z'_{t-1}) -> logits over the K codes of every token."""

    def __init__(self, config: GeneratorConfig, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.config = config
        width, d, K = 64 * config.depth, tokenizer.config.d, tokenizer.config.K
        self.side, self.patch, p = tokenizer.config.side, config.patch, config.patch
        self.grid = self.side // p
        if self.side % p:
            raise UserError(f"--patch {p}: does not divide the tokenizer's {self.side} x {self.side} tokens")
        # Noise and sum (2d) are "projected back to d" (4.2), which does not say which d. The codebook's is too narrow.
        self.squeeze = nn.Linear(2 * d, d) if config.bottleneck else nn.Identity()
        self.embed = nn.Linear(p * p * (d if config.bottleneck else 2 * d), width)
        self.embed_t = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.embed_y = nn.Embedding(config.num_classes + 1, width)           # the last row: no class
        self.blocks = nn.ModuleList(Block(width, config.depth) for _ in range(config.depth))
        self.ada = nn.Linear(width, 2 * width)
        angles = rotary_angles(self.grid, width // config.depth)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        self.register_buffer("mean", torch.zeros(config.num_classes + 1, self.side**2, d))  # of v, by class and of all
        # Principal axes of v about its class's mean, each as long as its standard deviation.
        self.register_buffer("axes", torch.zeros(min(256, self.side**2 * d), self.side**2 * d))
        if config.head == "linear":
            self.head = nn.Linear(width, p * p * K)
        else:
            self.head = nn.Linear(width, p * p * (d + 1))   # corrections of v_hat and of log s, the uncertainty
            for name in ("codebook", "alpha", "beta"):
                self.register_buffer(name, getattr(tokenizer.quantizer, name).detach().clone(), persistent=False)
            # s starts near the error that v_t has at first: 0.7 of alpha_t^2 Var(v), 0.03 for the codebook. Learned.
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

    def patchify(self, x: Tensor) -> Tensor:
        """Tokens to patches: (B, n, c) -> (B, n / p^2, p^2 c)."""
        grid = x.view(len(x), self.grid, self.patch, self.grid, self.patch, -1).transpose(2, 3)
        return grid.reshape(len(x), self.grid**2, -1)

    def unpatchify(self, x: Tensor) -> Tensor:
        """And back: (B, n / p^2, p^2 c) -> (B, n, c)."""
        grid = x.view(len(x), self.grid, self.grid, self.patch, self.patch, -1).transpose(2, 3)
        return grid.reshape(len(x), self.side**2, -1)

    def forward(self, eps_t: Tensor, y: Tensor, t: Tensor, z_sum: Tensor) -> tuple[Tensor, Tensor | None]:
        """Eq. (6): noise eps_t (B, n, d), class y (B,), step t (B,) in 1..T, z'_{t-1} (B, n, d) -> logits (B, n, K).

        The codebook head also returns v_hat (B, n, d), its prediction of v; the linear head None.
        """
        frequencies = torch.exp(-math.log(10000) * torch.arange(128, device=t.device) / 128)
        phase = t[:, None].float() * frequencies                             # (B, 128): the usual sinusoids of t
        c = F.silu(self.embed_t(torch.cat([phase.cos(), phase.sin()], dim=1)) + self.embed_y(y))  # (B, width)
        x = self.squeeze(torch.cat([eps_t, z_sum], dim=-1))                  # (B, n, 2d), or (B, n, d)
        x = self.embed(self.patchify(x)).float()                             # (B, n / p^2, width)
        for block in self.blocks:
            x = block(x, c, self.cos, self.sin)
        x = modulate(x, *self.ada(c)[:, None].chunk(2, dim=-1))
        if self.config.head == "linear":
            return self.unpatchify(self.head(x)).float(), None
        return self.codebook_logits(x, eps_t, y, t, z_sum)

    def codebook_logits(self, x: Tensor, eps_t: Tensor, y: Tensor, t: Tensor, z_sum: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, n, K) from a prediction v_hat (B, n, d) of the latent, and v_hat. Not in the paper.

        The target is the entry nearest to v_t = alpha_t (v - z'_{t-1}) + beta_t eps_t, where only v is unknown. So the
        network predicts v, and s, the variance left to v_t. The logits are -|v_t - e_k|^2 / 2s, less what all k share.
        """
        with torch.autocast(x.device.type, enabled=False):
            out = self.unpatchify(self.head(x))                                                        # (B, n, d + 1)
            alpha, beta, log_s = (w[t - 1].view(-1, 1, 1) for w in (self.alpha, self.beta, self.log_s))
            # Start from the class's mean early (beta near 1), later from that of all images; out corrects both.
            v_hat = self.mean[-1] + beta * (self.mean[y] - self.mean[-1]) + out[..., :-1]
            s = (log_s + out[..., -1:]).exp()                                                       # (B, n, 1)
            v_t = alpha * (v_hat - z_sum) + beta * eps_t                                            # as predicted
            # (v_t . e_k - |e_k|^2 / 2) / s as one product: dividing (B, n, K) numbers by s would be a slow second pass.
            rows = torch.cat([v_t, torch.ones_like(s)], dim=-1) / s                                 # (B, n, d + 1)
            entries = torch.cat([self.codebook, -self.codebook.square().sum(1, keepdim=True) / 2], dim=1)
            return F.linear(rows, entries), v_hat


# 6. Sampler, Alg. 2 ---------------------------------------------------------------------------------------------------

def guided(model: RDPM, strength: float, eps_t: Tensor, y: Tensor, t: Tensor, z_sum: Tensor) -> tuple:
    """RDPM.forward with guidance (3.2): logits cond + (cond - uncond) * lambda_t, and the v_hat of the class."""
    if strength == 0:                                        # the linear schedule's first step needs no second pass
        return model(eps_t, y, t, z_sum)
    both = torch.cat([y, torch.full_like(y, model.config.num_classes)])
    logits, v_hat = model(eps_t.repeat(2, 1, 1), both, t.repeat(2), z_sum.repeat(2, 1, 1))
    cond, uncond = logits.chunk(2)
    return cond + (cond - uncond) * strength, None if v_hat is None else v_hat[:len(y)]


@torch.inference_mode()
def sample_steps(model: RDPM, tokenizer: Tokenizer, y: Tensor, seed: int, numbers: Sequence[int], sampling: Sampling,
                 v: Tensor | None = None, known: Tensor | None = None) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Alg. 2 without its last line: yields (z'_t, v_hat) for t = 1 ... T, each (B, n, d).

    y (B,) class labels. Image i is drawn from the stream (seed, numbers[i]) and depends on nothing else in the batch.
    v_hat is the draft in a skipped step, else the codebook head's preview of v, or None with the linear head.

    Beyond the paper: where known (T, B, n or 1) is true, codes are encoded from v (B or 1, n, d), by Alg. 1 with the
    sampler's noise. First steps known keep a layout, all but a region inpaints it (clamped, not a posterior sample).
    """
    T, quantizer, draft = tokenizer.config.T, tokenizer.quantizer, model.mean[y]
    streams = ImageStreams(seed, numbers, y.device)
    eps, lambdas = tokenizer.noise(streams), sampling.lambdas(T)
    z_sum = torch.zeros_like(eps[0])
    if sampling.skip and sampling.draft:  # codes drawn independently early on would lose what tokens have in common
        draft = draft + sampling.draft * (streams.draw(torch.randn, len(model.axes)) @ model.axes).view_as(draft)
    # bfloat16 logits have ties: Gumbel noise decides them by lot, but an argmax would take the lowest index.
    precision = nullcontext() if sampling.gumbel else torch.autocast(y.device.type, enabled=False)
    for t in range(1, T + 1):
        if t <= sampling.skip:
            v_hat = draft if known is None else torch.where(known[t - 1, ..., None], v, draft)
            codes_t, *_ = quantizer.step(t, z_sum, v_hat, eps[t - 1])
        else:
            with precision:
                logits, v_hat = guided(model, lambdas[t - 1], eps[t - 1], y, torch.full_like(y, t), z_sum)
            if sampling.gumbel:                              # Eq. (8); tau multiplies: an inverse temperature
                u = streams.draw(torch.rand, *logits.shape[1:])
                logits = logits * sampling.tau - torch.log(-torch.log(u))
            codes_t = argmax(logits)
            if known is not None:
                encoded, *_ = quantizer.step(t, z_sum, v, eps[t - 1])
                codes_t = torch.where(known[t - 1], encoded, codes_t)
        z_sum = z_sum + quantizer.lookup(codes_t)
        yield z_sum, v_hat


@torch.inference_mode()
def sample(model: RDPM, tokenizer: Tokenizer, *args) -> Tensor:
    """Alg. 2: images (B, 3, H, W), about [-1, 1]. The arguments are those of `sample_steps`."""
    *_, (z_sum, _) = sample_steps(model, tokenizer, *args)
    return tokenizer.decoder(z_sum).float()


# 7. Data --------------------------------------------------------------------------------------------------------------

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


def fit(image: Image.Image, size: int, pad: bool) -> Image.Image:
    """An image as RGB, size x size: `center_crop`, or with `pad` centred on black if it is small enough."""
    crop = torchvision.transforms.functional.center_crop if pad and max(image.size) <= size else center_crop
    return crop(image.convert("RGB"), size)


def read_image(path: str | Path) -> Image.Image:
    """An image file as RGB, turned as its EXIF data say. UserError, naming the file, if it cannot be read."""
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
            if image.mode.startswith("I;16"):  # Pillow would clip, not scale
                image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
            if image.mode in ("I", "F"):
                raise ValueError(f"mode {image.mode}, of which black and white are unknown")
            return image.convert("RGB")
    except Exception as error:  # Pillow's decoders raise many kinds
        raise UserError(f"{path}: not a readable image ({error}); repair or remove it") from error


def image_files(folder: Path) -> list[Path]:
    """All image files below a folder, by name. Hidden ones are left out; links to folders are not followed."""
    kinds = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".pgm", ".ppm", ".tif", ".tiff", ".webp"}
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in kinds
                  and not any(part.startswith(".") for part in path.relative_to(folder).parts))


class Folder(torch.utils.data.Dataset):
    """Images in one folder per class. Items are (RGB image of size x size, label)."""

    def __init__(self, root: Path, size: int, pad: bool) -> None:
        self.size, self.pad = size, pad
        self.classes = sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
        self.samples = [(path, label) for label, name in enumerate(self.classes) for path in image_files(root / name)]
        self.targets = [label for _, label in self.samples]
        empty = [self.classes[label] for label in sorted(set(range(len(self.classes))) - set(self.targets))]
        if empty or not self.classes:
            raise UserError(f"{root}: no image in {', '.join(empty[:5]) or 'it'}; give each class a folder of images")

    def __getitem__(self, i: int) -> tuple[Image.Image, int]:
        path, label = self.samples[i]
        return fit(read_image(path), self.size, self.pad), label


def polygon(corners: int, start: float, radii: tuple[float, ...] = (1.0,)) -> np.ndarray:
    angle = 2 * math.pi * (np.arange(corners) / corners + start)
    return np.resize(radii, corners)[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)


DISC, SQUARE = polygon(48, 0), polygon(4, 1 / 8)
SHAPES = {  # polygons within the unit disc, painted in turn with the shape's and the background's colour
    "arrow": [np.array([[1, 0], [0, .8], [0, .3], [-1, .3], [-1, -.3], [0, -.3], [0, -.8]])],
    "bar": [SQUARE * [1.4, 0.35]], "crescent": [DISC, DISC * 0.85 + [0.5, 0]],
    "cross": [np.array([[1, .3], [.3, .3], [.3, 1], [-.3, 1], [-.3, .3], [-1, .3],
                        [-1, -.3], [-.3, -.3], [-.3, -1], [.3, -1], [.3, -.3], [1, -.3]])],
    "disc": [DISC], "frame": [SQUARE, SQUARE * 0.55], "ring": [DISC, DISC * 0.55], "square": [SQUARE],
    "star": [polygon(10, -1 / 4, (1.0, 0.4))], "triangle": [polygon(3, -1 / 4)],
}


class Shapes(torch.utils.data.Dataset):
    """The built-in set: bright shapes on dark, drawn on demand in random colour, place, size and rotation."""

    def __init__(self, size: int, train: bool) -> None:
        self.size, self.split, self.classes = size, int(train), list(SHAPES)
        self.targets = [i % len(SHAPES) for i in range(20_000 if train else 2_000)]

    def __getitem__(self, i: int) -> tuple[Image.Image, int]:
        rng, label, size = np.random.default_rng([self.split, i]), self.targets[i], 4 * self.size
        foreground, background = colorsys.hsv_to_rgb(*rng.uniform((0, 0.3, 0.75), 1)), rng.uniform(0, 0.25, 3)
        colours = [tuple(int(255 * c) for c in colour) for colour in (foreground, background)]
        angle, radius = rng.uniform(-0.5, 0.5), rng.uniform(0.7, 0.95)
        centre = 1 + rng.uniform(-1, 1, 2) * (1 - radius)
        rotation = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
        image = Image.new("RGB", (size, size), colours[1])
        for part, colour in zip(SHAPES[self.classes[label]], colours, strict=False):
            points = (part @ rotation.T * radius + centre) * size / 2
            ImageDraw.Draw(image).polygon([tuple(p) for p in points], fill=colour)
        return image.resize((self.size, self.size), Image.Resampling.BOX), label


class Images(torch.utils.data.Dataset):
    """A set of N images and, from N to 2N - 1, their mirror images. Items are (uint8 (3, H, W), label)."""

    def __init__(self, source: torch.utils.data.Dataset, kept: np.ndarray | slice = slice(None)) -> None:
        self.source, self.classes = source, list(source.classes)
        self.indices = np.arange(len(source.targets))[kept]
        self.labels = np.asarray(source.targets)[self.indices]
        self.sha256 = hashlib.sha256(repr(self.classes).encode() + self.labels.tobytes()).hexdigest()  # not of pixels

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        flip, i = divmod(i, len(self))
        image = self.source[int(self.indices[i])][0]
        image = ImageOps.mirror(image) if flip else image
        return torch.from_numpy(np.array(image)).permute(2, 0, 1), int(self.labels[i])


def load_data(data: str, size: int, train: bool, pad: bool = False) -> Images:
    """The training or the held-out split of "shapes", "mnist", "cifar10", or a folder with a folder for each class."""
    root, held_out = Path(data), None
    if data == "shapes":
        return Images(Shapes(size, train))
    if data in ("mnist", "cifar10"):
        kind = torchvision.datasets.MNIST if data == "mnist" else torchvision.datasets.CIFAR10
        try:
            if RANK == 0:
                kind("data", train, download=True)
            barrier()
            return Images(kind("data", train, partial(fit, size=size, pad=pad)))
        except (OSError, RuntimeError) as error:
            raise UserError(f"--data {data}: cannot be downloaded into data/ ({one_line(error)})") from error
    if not root.is_dir():
        raise UserError(f"--data {data}: no such folder; give one with a folder of images per class, or shapes")
    if (root / "train").is_dir():
        held_out = next((root / name for name in ("val", "test") if (root / name).is_dir()), None)
        root = held_out if held_out and not train else root / "train"
    source = Folder(root, size, pad)
    if held_out:
        return Images(source)
    if len(source.targets) < 20:  # without a held-out folder every 20th image is held out
        raise UserError(f"--data {data}: {len(source.targets)} images; give at least 20, or a val/ folder")
    return Images(source, (np.arange(len(source.targets)) % 20 != 0) == train)


def balanced_subset(labels: np.ndarray, num: int) -> list[int]:
    """`num` places (all, if there are fewer), as many of each class as can be, in an order that is always the same."""
    order = np.random.default_rng(0).permutation(len(labels))
    by_class = order[np.argsort(labels[order], kind="stable")]
    turn = np.arange(len(labels)) - np.searchsorted(labels[by_class], labels[by_class])  # of an image within its class
    return by_class[np.argsort(turn, kind="stable")][:num].tolist()


def own_share(batch: int) -> slice:
    return slice(RANK * batch // WORLD_SIZE, (RANK + 1) * batch // WORLD_SIZE)


def global_batches(num: int, batch: int, steps: range, seed: int, flip: bool) -> Iterator[list[int]]:
    """This rank's share of each step's batch, as items of `Images`. The batch is a function of seed and step alone."""
    @lru_cache(maxsize=2)
    def epoch(number: int) -> np.ndarray:
        rng = np.random.default_rng([seed, number])
        return rng.permutation(num) + num * (rng.integers(0, 2, num) if flip else 0)

    for step in steps:
        places = np.arange(step * batch, (step + 1) * batch)[own_share(batch)]
        yield [int(epoch(place // num)[place % num]) for place in places]


# 8. What training needs: checkpoints, ranks, flags, log ---------------------------------------------------------------

SKIPS_BY_ITSELF = ("cuda", "cpu")  # devices whose fused optimizers look at `found_inf`; MPS' do not


def pretrained(url: str, sha256: str) -> dict[str, Tensor]:
    """A state dict from torch.hub's cache, downloaded at first. UserError if it cannot be had, or is another file."""
    file = Path(torch.hub.get_dir()) / "checkpoints" / f"{sha256[:8]}-{url.split('/')[-1]}"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        if not file.exists() and os.environ.get("LOCAL_RANK", "0") == "0":
            torch.hub.download_url_to_file(url, str(file), sha256)
    except (OSError, RuntimeError) as error:
        raise UserError(f"cannot download {url} ({one_line(error)}); put the file at {file}") from error
    barrier()  # the other ranks wait for the download
    if not hashlib.sha256(file.read_bytes()).hexdigest().startswith(sha256):
        raise UserError(f"{file}: its sha256 is not {sha256}; remove it, or put the file from {url} in its place")
    return torch.load(file, map_location="cpu", weights_only=True)


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A path beside `path` to write to, which then takes its place. If that fails `path` is untouched: UserError."""
    part = Path(path).with_name(f"part-{Path(path).name}")
    try:
        yield part
        with open(part, "rb") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # PyTorch's writer turns the one into the other
        raise UserError(f"{path}: cannot be written ({one_line(error)}); what was there is untouched") from error
    finally:
        part.unlink(missing_ok=True)


def read_checkpoint(path: str | Path, kind: str) -> dict:
    """Contents of a checkpoint of this kind; never unpickles code. UserError, naming the file, if it is not one."""
    try:
        contents = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zipfile, pickle and PyTorch each raise their own
        raise UserError(f"{path}: cannot be read as a checkpoint ({type(error).__name__}); is it whole?") from error
    found = contents.get("kind") if isinstance(contents, dict) else None
    if found != kind:
        raise UserError(f"{path}: holds {f'a {found}' if found else 'something else'}, not a {kind}")
    return contents


def inference_state(module: nn.Module, **more) -> dict:
    """A module's config and its weights in half precision, as model.pt holds them."""
    weights = {name: weight.cpu().half() for name, weight in module.state_dict().items()}
    return {"config": asdict(module.config), "model": weights} | more


def build(kind: type, config: type, contents: dict, path: str | Path, device: torch.device | str, *more) -> nn.Module:
    """A module for inference, from what `inference_state` has stored. UserError if that is damaged."""
    try:
        module = kind(config(**contents["config"]), *more)
        module.load_state_dict(contents["model"])
    except (KeyError, TypeError, RuntimeError) as error:
        raise UserError(f"{path}: the {kind.__name__}'s weights do not fit its config ({one_line(error)})") from error
    if not all(weight.isfinite().all() for weight in module.state_dict().values()):
        raise UserError(f"{path}: there is NaN or infinity among the {kind.__name__}'s weights")
    return module.eval().requires_grad_(False).to(device)


def load_tokenizer(path: str | Path, device: torch.device | str = "cpu", contents: dict | None = None) -> Tokenizer:
    """The tokenizer that train_vq.py wrote, or a generator's from its `contents`."""
    contents = read_checkpoint(path, "tokenizer") if contents is None else contents
    return build(Tokenizer, TokenizerConfig, contents, path, device).to(memory_format=torch.channels_last)


def load_generator(path: str | Path, device: torch.device | str = "cpu") -> tuple[RDPM, Tokenizer, list[str], Sampling]:
    """The generator that train_gen.py wrote, its tokenizer, class names and sampling defaults."""
    contents = read_checkpoint(path, "generator")
    tokenizer = load_tokenizer(path, device, contents.get("tokenizer", {}))
    model = build(RDPM, GeneratorConfig, contents, path, device, tokenizer).requires_grad_()  # for autocast's cache
    return model, tokenizer, contents["classes"], Sampling(**contents["sampling"])


def save_run(out: Path, state: dict, model: dict) -> None:
    """state.pt for --resume first, then model.pt. No random state: all that is drawn follows from (seed, step)."""
    for name, contents in (("state.pt", state), ("model.pt", model)):
        with replacing(out / name) as path:
            torch.save(contents, path)


def load_state(path: Path, kind: str, identity: dict, parts: dict) -> int:
    """Put state.pt's modules and optimizers back; returns the step. UserError if it belongs to another run."""
    contents = read_checkpoint(path, kind)
    for name, value in identity.items():
        if (was := contents["config"].get(name)) != value:
            raise UserError(f"--resume: {path} was trained with {name} = {was}, not {value}; give the same flags")
    try:
        for name, part in parts.items():
            part.load_state_dict(contents["parts"][name])
    except (KeyError, ValueError, RuntimeError) as error:
        raise UserError(f"--resume: {path} is of other code ({one_line(error)}); go on with that") from error
    return contents["step"]


def learning_rate(step: int, steps: int, base: float, warmup: int, final: float) -> float:
    """Linear warm-up, then linear from `base` to `final * base` (final = 1: constant)."""
    if step < warmup:
        return base * (step + 1) / warmup
    return base * (1 + (final - 1) * (step - warmup) / max(steps - warmup, 1))


def autocast(device: torch.device) -> torch.autocast:
    """bf16 mixed precision where the device has it."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type in ("cuda", "cpu"))


def launch(device: str | None) -> torch.device:
    """Pick the device, and join the process group if torchrun (or anything that sets its variables) started us."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    chosen = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if device == "cuda" else device)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if "RANK" in os.environ:
        backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=datetime.timedelta(minutes=30))
    return chosen


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def sum_over_ranks(*tensors: Tensor) -> None:
    """Replace each tensor by its sum over all ranks."""
    for tensor in tensors if dist.is_initialized() else ():
        dist.all_reduce(tensor)


def data_parallel(module: nn.Module) -> nn.Module:
    """The module itself, or in a process group its DistributedDataParallel: rank 0's weights and buffers, sent once."""
    if dist.is_initialized():
        module = nn.parallel.DistributedDataParallel(module, gradient_as_bucket_view=True)
        module.broadcast_buffers = module.forward_sync_buffers = False  # from now on; the second is PyTorch 2.14's name
    return module


def step_if_finite(optimizers: list[torch.optim.Optimizer], *values: Tensor) -> Tensor:
    """Step fused optimizers, unless a loss or gradient norm of any rank is NaN or infinite. Returns 1.0 if skipped."""
    # As torch.amp.GradScaler does it: `found_inf` stays on the GPU. The norm of no gradients lies on the CPU.
    bad = (~torch.stack([value.to(values[0].device) for value in values]).isfinite()).any().float()
    sum_over_ranks(bad)
    for optimizer in optimizers:
        optimizer.found_inf = bad.clamp_(max=1)
        if bad.device.type in SKIPS_BY_ITSELF or not bad:
            optimizer.step()
        optimizer.zero_grad()
    return bad


def ignore_signals(_: int) -> None:
    """Data workers ignore SIGTERM and Ctrl-C; the trainer handles them, and still needs its workers."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def image_grid(images: Tensor, columns: int) -> Image.Image:
    """Bytes (N, 3, H, W) as one picture; images under 96 pixels are enlarged without smoothing."""
    grid = torchvision.utils.make_grid(images.cpu(), columns, padding=1, pad_value=255).permute(1, 2, 0).numpy()
    return ImageOps.scale(Image.fromarray(grid), max(1, 96 // images.shape[-1]), Image.Resampling.NEAREST)


class Log:
    """A run's folder, its log.jsonl, whose first record says what ran where, and its progress bar. Rank 0 writes."""

    def __init__(self, args: argparse.Namespace) -> None:
        """Make --out, or refuse it: never write over a run. With --resume and nothing there yet, a run begins."""
        self.args, self.file, self.told, state = args, None, False, args.out / "state.pt"
        if args.batch % WORLD_SIZE or args.accum > args.batch // WORLD_SIZE:
            raise UserError(f"--batch {args.batch}: must give each of {WORLD_SIZE} devices as many, --accum or more")
        if not (args.resume and state.exists()) and (state.exists() or (args.out / "model.pt").exists()):
            raise UserError(f"--out {args.out} already holds a run; continue it with --resume, or choose another --out")
        args.resume = args.resume and state.exists()
        barrier()  # every rank has looked before one writes
        if RANK == 0:
            args.out.mkdir(parents=True, exist_ok=True)
            self.file = open(args.out / "log.jsonl", "a", buffering=1)  # noqa: SIM115
            try:
                fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until the process ends
            except OSError as error:  # other errors are of network file systems without locks
                if isinstance(error, BlockingIOError):
                    raise UserError(f"--out {args.out}: another run is writing there; choose another --out") from error

    def begin(self, start: int, steps: int, device: torch.device) -> None:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
        self.record(command=" ".join(sys.argv), torch=torch.__version__, device=f"{device}, {name}", world=WORLD_SIZE,
                    args=vars(self.args))
        self.bar = tqdm(total=steps, initial=start, unit="step", disable=RANK > 0,
                        mininterval=0.5 if sys.stderr.isatty() else 30.0)
        self.last, self.skipped = (time.perf_counter(), start), 0
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.hear)

    def record(self, **values) -> None:
        if self.file:  # JSON has no NaN, which is also the mean of a t that no image has drawn
            text = re.sub(r"(?<=[ \[])-?(NaN|Infinity)(?=[,\]}])", "null", json.dumps(values, default=str))
            self.file.write(text + "\n")

    def step(self, step: int, taken: int, loss: float, lr: float, grad_norm: float, **columns) -> None:
        """A line for the bar and log.jsonl. taken: the steps since the last line that were not skipped."""
        now, (then, before) = time.perf_counter(), self.last
        self.last, rate = (now, step), (step - before) * self.args.batch / (now - then)
        memory = f", {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if torch.cuda.is_available() else ""
        self.bar.set_postfix_str(f"loss {loss:.4f}, lr {lr:.1e}, grad {grad_norm:.2f}, {rate:.3g} img/s{memory}", False)
        self.record(step=step, loss=loss, lr=lr, grad_norm=grad_norm, images_per_s=round(rate, 1),
                    skipped_steps=step - before - taken, **columns)
        self.skipped = 0 if taken else self.skipped + step - before
        if self.skipped > 1:
            raise UserError(f"no step after {step - self.skipped} had a finite loss and gradient: lower --lr")

    def hear(self, number: int, _) -> None:
        """SIGTERM (a cluster takes its machine back) or Ctrl-C: the trainer finishes its step, saves, exits with 75."""
        self.told = True  # The second Ctrl-C ends the run at once; launchers may send SIGTERM more than once.
        signal.signal(number, signal.SIG_DFL if number == signal.SIGINT else signal.SIG_IGN)

    def told_to_stop(self, step: int) -> bool:
        """Count a step, and say whether any rank was told to stop: several ranks ask each other at log steps only."""
        self.bar.update()
        if WORLD_SIZE > 1 and step % self.args.log_every:
            return False
        votes = torch.tensor(float(self.told))
        sum_over_ranks(votes)
        return bool(votes)

    def stopped(self, step: int) -> None:
        """End the process after a signal; the state of this step has been saved."""
        barrier()  # a launcher that sees one rank end may kill the one that is still writing
        if RANK == 0:
            tqdm.write(f"told to stop: saved after step {step}; the same command with --resume goes on", sys.stderr)
        sys.exit(75)  # EX_TEMPFAIL of sysexits.h: try again


def bounded(kind: type, low: float, high: float, text: str) -> float:
    value = kind(text)
    if not low < value < high:
        raise argparse.ArgumentTypeError(f"{text} is not {'above 0' if low == 0 else 'from 0 up'}, and below {high}")
    return value


positive_int, natural_int = partial(bounded, int, 0, 10**7), partial(bounded, int, -1, 2**32)
positive_float, natural_float = partial(bounded, float, 0, 10**7), partial(bounded, float, -1e-9, 10**7)
positive_int.__name__ = natural_int.__name__ = positive_float.__name__ = natural_float.__name__ = "number"  # of errors


def parse_training_args(parser: argparse.ArgumentParser, stage: str) -> argparse.Namespace:
    """Add the flags both trainers share, and take defaults from the preset's `stage`."""
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="imagenet", help="defaults (imagenet: the paper's)")
    add("--data", help="shapes, mnist, cifar10, or a folder with one folder of images per class")
    add("--out", type=Path, help=f"the run's folder (default runs/PRESET-{stage})")
    add("--epochs", type=positive_float, help="passes over the data")
    add("--steps", type=positive_int, help="optimizer steps, instead of --epochs")
    add("--batch", type=positive_int, help="global batch, over all devices")
    add("--lr", type=positive_float, help="peak learning rate")
    add("--lr-final", type=natural_float, help="last learning rate, as a share of the peak")
    add("--warmup", type=natural_int, help="steps of linear warm-up")
    add("--seed", type=natural_int, default=0)
    add("--accum", type=positive_int, default=1, help="backward passes a step: divides the memory, not the batch")
    add("--resume", action="store_true", help="continue the run in --out, or begin it")
    add("--device", help="cuda, mps or cpu; the best there is by default")
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile (default: on CUDA)")
    add("--workers", type=natural_int, default=min(8, os.cpu_count() or 1), help="data workers a process")
    add("--log-every", type=positive_int, default=50, help="steps between log lines")
    add("--save-every", type=positive_int, default=1000, help="steps between checkpoints and picture grids")
    add("--flip", action=argparse.BooleanOptionalAction, help="train on mirrored images too (not letters)")
    name = parser.parse_known_args()[0].preset
    preset = PRESETS[name]
    tokenizer = asdict(TokenizerConfig(**preset["tokenizer"])) if stage == "vq" else {}
    parser.set_defaults(out=Path(f"runs/{name}-{stage}"), data=preset["data"], pad=preset["pad"], flip=preset["flip"],
                        **preset[f"train_{stage}"], **tokenizer)
    return parser.parse_args()


def run_main(main: Callable[[], None]) -> None:
    """Run a script: bad input, and more than memory can hold, end with one line and exit code 2."""
    try:
        main()
    except (UserError, OSError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not re.search("of memory|allocate mem|DataLoader worker", str(error)):
            raise
        for bar in list(tqdm._instances):  # or they would write over the message
            bar.close()
        print(f"error: {one_line(error)}", file=sys.stderr)
        sys.exit(2)
    finally:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler would raise
        for worker in multiprocessing.active_children():  # data workers, which ignore what would end them
            worker.kill()
        if dist.is_initialized():
            dist.destroy_process_group()
