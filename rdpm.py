"""RDPM: Recurrent Diffusion Probabilistic Models (arXiv 2412.18390), every component in one file.

The idea. A tokenizer encodes an image into a latent v and quantises it in T steps. Step t takes what
is left of v, mixes Gaussian noise into it, and replaces each vector by its nearest codebook entry (plus
a small learned bias). The vectors of all steps add up to z'_T, which the decoder turns back into the
image. Early steps code mostly noise, the last has none: a diffusion process whose every state is a grid
of integers. A transformer learns by cross-entropy to predict the codes of step t from the noise eps_t,
the class y, t, and the sum so far. Sampling starts from a sum of zero and runs it T times.

Contents: the paper (1 to 6), and what it takes to use it (7 to 9)
    1  configs                                  5  the transformer and its loss, Eqs. (6), (7)
    2  Alg. 1: schedule, quantiser              6  guidance, drawing codes, Alg. 2, Eq. (8)
    3  encoder, decoder, tokenizer, Eq. (1)     7  beyond the paper: another head, drafts
    4  the tokenizer's losses, Eqs. (3) to (5)  8  data      9  running: presets, ranks, steps

Notation; bare numbers such as (3.2) are the paper's sections
    paper         code          shape         meaning
    x, x'         x, x_rec      (B, 3, H, W)  image in [-1, 1] and its reconstruction
    v             v             (B, n, d)     latent, Eq. (1); n = h * w tokens, row by row
    T, t          T, t                        number of steps; step, counted from 1
    C             codebook      (K, d)        codebook: K entries e_k of dimension d
    C_t           codes_t       (B, n)        code indices of step t; codes (T, B, n): of all steps
    eps_t         eps_t         (B, n, d)     noise of step t; eps (T, B, n, d): of all steps
    z_t           z             (B, n, d)     residual v - z'_{t-1}: what t - 1 steps left of v
    v_t           v_t           (B, n, d)     noisy residual alpha_t z_t + beta_t eps_t, Eq. (2)
    v'_t          v_q           (B, n, d)     quantised v_t: codebook entry plus bias
    z'_t          z_sum         (B, n, d)     v'_1 + ... + v'_t; z'_0 = 0
    alpha, beta   alpha, beta   (T,)          factors of signal and of noise, alpha^2 + beta^2 = 1
    gamma         gamma         (T,)          weights of Eq. (4)
    y             y             (B,)          class label; num_classes stands for "no class"
    v-hat'_t      logits        (B, n, K)     output of the transformer f, Eq. (6)
    lambda, tau   guidance, tau               guidance strength; inverse temperature, Eq. (8)
    (not in it)   v_hat         (B, n, d)     the codebook head's prediction of v
"""

from __future__ import annotations

import argparse
import colorsys
import datetime
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import re
import secrets
import shlex
import shutil
import signal
import sys
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields, replace
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

# 1. Configs ---------------------------------------------------------------------------------------

@dataclass
class TokenizerConfig:
    """Sizes and switches. Defaults: the paper's (4.2), VQGAN's f16 where it is silent."""

    image_size: int = 256
    pad: bool = False                     # True: smaller images get a black frame; False: are enlarged
    flip: bool = True                     # both stages train on mirror images too
    channels: int = 128                   # of the first level
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)  # of channels; each level but the last halves the side
    res_blocks: int = 2                   # in each level
    d: int = 32
    K: int = 4096
    T: int = 10
    schedule: str = "pow"                 # "pow", "linear" or "sin" (Table 4)
    phi: float = 0.75                     # base of "pow" (Figure 5)
    weight: bool = True                   # gamma_t = alpha_t in Eq. (4), else 1 (Table 2)
    bias: bool = True                     # the shared convolution on looked-up vectors (Table 2)
    layer_norm: str = "token"             # the encoder's end normalises each "token", or the "image"
    stop_gradients: bool = True           # VQ-VAE's in Eq. (4), printed without (README, Readings)

    def __post_init__(self) -> None:
        self.downsampling = 2 ** (len(self.multipliers) - 1)
        self.side = self.image_size // self.downsampling  # h = w
        if self.image_size % self.downsampling or self.image_size < 8:
            raise UserError(f"--image-size: must be a multiple of {self.downsampling}, at least 8")
        if self.phi > 1:
            raise UserError(f"--phi {self.phi}: must be at most 1, or alpha would fall to 1")


@dataclass
class GeneratorConfig:
    """The transformer's size. The width is 64 * depth, the number of heads depth (Table 1)."""

    depth: int = 12
    num_classes: int = 1000
    bottleneck: bool = False  # project 2d -> d -> width, else 2d -> width (README, Readings)
    head: str = "linear"      # "linear" is the paper's; "codebook" is `CodebookHead`
    patch: int = 1            # patch x patch tokens are one input of the transformer (DiT)
    label_drop: float = 0.1   # probability of training without the class (4.2)
    statistics: bool = False  # keep each class's mean latent and the axes of the spread about it


# Used before they are written: ImageStreams (section 9) draws each image's noise, argmax (9) is
# x.argmax(-1), sum_over_ranks and world_size (9) do nothing on one device, (un)patchify (7) nothing at
# p = patch = 1, UserError (9) is bad input.

# 2. Alg. 1: schedule, quantiser -------------------------------------------------------------------

def alpha_schedule(schedule: str, T: int, phi: float = 0.75) -> Tensor:
    """alpha_1 ... alpha_T, float32 (T,), rising to 1 (4.3; Table 4, Figure 5)."""
    t = torch.arange(1, T + 1, dtype=torch.float64)
    curves = {"sin": torch.sin(math.pi * t / (2 * T)), "linear": t / T, "pow": phi ** (T - t)}
    return curves[schedule].float()


@dataclass
class Quantized:
    """What Alg. 1 leaves behind."""

    codes: Tensor     # (T, B, n)  C_1 ... C_T
    z_sum: Tensor     # (B, n, d)  z'_T
    loss: Tensor      # Eq. (4)
    residual: Tensor  # (T,) mean square of z_t
    error: Tensor     # (T,) mean square of v_t - v'_t


class NoisyResidualQuantizer(nn.Module):
    """The diffusion-based quantiser (3.1), in float32, so that all callers find the same codes."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.T = config.T
        self.side = config.side
        self.stop_gradients = config.stop_gradients
        # Unit scale, as the noise of the first steps: with VQ-VAE's U(-1/K, 1/K) most codes stay unused.
        self.codebook = nn.Parameter(torch.randn(config.K, config.d))
        # "bias": v' = e + conv(e), one convolution for all t; zero at first, to begin without it.
        self.bias = nn.Conv2d(config.d, config.d, 3, padding=1) if config.bias else None
        if config.bias:
            nn.init.zeros_(self.bias.weight)
            nn.init.zeros_(self.bias.bias)
        alpha = alpha_schedule(config.schedule, config.T, config.phi)
        beta = (1 - alpha.double() ** 2).clamp(min=0).sqrt().float()
        gamma = alpha.clone() if config.weight else torch.ones_like(alpha)
        self.register_buffer("alpha", alpha, persistent=False)  # they follow from the config
        self.register_buffer("beta", beta, persistent=False)
        self.register_buffer("gamma", gamma, persistent=False)

    @torch.no_grad()
    def nearest(self, v_t: Tensor) -> Tensor:
        """Q's search (3.1): indices (B, n) of the codebook entries nearest to v_t (B, n, d)."""
        # |v - e|^2 = |v|^2 - 2 (v . e - |e|^2 / 2): the nearest is the argmax of one matrix product.
        offset = -self.codebook.square().sum(1) / 2
        scores_at_once = 2**18 if v_t.device.type == "cpu" else 2**28  # 1 MiB, or 1 GiB
        chunks_of_rows = v_t.flatten(0, 1).split(scores_at_once // len(self.codebook) + 1)
        with torch.autocast(v_t.device.type, enabled=False):
            codes = [argmax(F.linear(rows, self.codebook, offset)) for rows in chunks_of_rows]
        return torch.cat(codes).view(v_t.shape[:2])

    def lookup(self, codes: Tensor) -> Tensor:
        """v' (B, n, d) for codes (B, n): entries, plus the bias convolution of their grid."""
        e = F.embedding(codes, self.codebook)
        if self.bias is None:
            return e
        grid = e.transpose(1, 2).unflatten(2, (self.side, self.side))  # (B, d, h, w)
        with torch.autocast(e.device.type, enabled=False):
            bias = self.bias(grid)
        return e + bias.flatten(2).transpose(1, 2)

    def step(self, t: int, z_sum: Tensor, v: Tensor, eps_t: Tensor) -> tuple[Tensor, ...]:
        """One residual step: z'_{t-1}, v, eps_t, each (B, n, d) -> codes C_t (B, n), v'_t, z_t, v_t."""
        z = v - z_sum                                               # Alg. 1, line 3: z_{t-1} - v'_{t-1}
        v_t = self.alpha[t - 1] * z + self.beta[t - 1] * eps_t      # Eq. (2); Alg. 1, line 4
        codes_t = self.nearest(v_t)                                 # Alg. 1, line 5
        return codes_t, self.lookup(codes_t), z, v_t

    def forward(self, v: Tensor, eps: Tensor) -> Quantized:
        """Alg. 1 and Eq. (4), a mean over elements and a sum over t; v (B, n, d), eps (T, B, n, d).

        With `stop_gradients` the square becomes VQ-VAE's two terms, and the running sum is detached.
        """
        z_sum = torch.zeros_like(v)                                 # Alg. 1, line 1: z'_0 = 0
        loss = torch.zeros((), device=v.device)
        codes = []
        residual = []
        error = []
        for t in range(1, self.T + 1):                              # Alg. 1, line 2
            codes_t, v_q, z, v_t = self.step(t, z_sum, v, eps[t - 1])  # Alg. 1, lines 3 to 5
            if self.stop_gradients:
                loss_t = F.mse_loss(v_q, v_t.detach()) + 0.25 * F.mse_loss(v_t, v_q.detach())
                v_q = v_q.detach()
            else:
                loss_t = F.mse_loss(v_q, v_t)
            loss = loss + self.gamma[t - 1] * loss_t                # Eq. (4)
            z_sum = z_sum + v_q                                     # Alg. 1, line 6
            codes.append(codes_t)
            residual.append(z.detach().square().mean())
            error.append((v_t - v_q).detach().square().mean())
        codes, residual, error = map(torch.stack, (codes, residual, error))
        return Quantized(codes, z_sum, loss, residual, error)       # Alg. 1, line 8

    @torch.no_grad()
    def training_input(self, v: Tensor, eps: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Alg. 1 up to each image's own step: v, eps, t (B,; on the CPU) -> z'_{t-1} (B, n, d), C_t (B, n)."""
        z_sum = torch.zeros_like(v)
        target = torch.zeros(v.shape[:2], dtype=torch.long, device=v.device)
        for s in range(1, int(t.max()) + 1):
            here = (t >= s).nonzero()[:, 0]                         # images still under way
            goes_on = (t[here] > s)[:, None, None]
            # t stays on the CPU, where choosing images makes nobody wait.
            here = here.to(v.device, non_blocking=True)
            goes_on = goes_on.to(v.device, non_blocking=True)
            codes_s, v_q, _, _ = self.step(s, z_sum[here], v[here], eps[s - 1, here])
            target[here] = codes_s                                  # overwritten until s = t: C_t
            z_sum[here] += v_q * goes_on                            # without v'_t itself: z'_{t-1}
        return z_sum, target


# 3. Encoder, decoder, tokenizer -------------------------------------------------------------------

def group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(min(32, channels // 4), channels, eps=1e-6)


class ResBlock(nn.Module):
    """Residual block of VQGAN (Esser et al. 2021): (B, c_in, h, w) -> (B, c_out, h, w)."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.norm1 = group_norm(c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = group_norm(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.skip(x) + h


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(c)) v, each (B, heads, n, c)."""
    if q.device.type == "cpu":  # PyTorch's fused kernel is slower there at these sizes
        return (q @ (k * k.shape[-1] ** -0.5).mT).softmax(-1) @ v
    return F.scaled_dot_product_attention(q, k, v)


class SpatialAttention(nn.Module):
    """Single-head self-attention over the positions of a feature map (VQGAN)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = group_norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.qkv(self.norm(x)).flatten(2).transpose(1, 2)  # (B, hw, 3c)
        q, k, v = tokens[:, None].chunk(3, dim=-1)                  # each (B, 1, hw, c)
        h = attend(q, k, v)[:, 0].transpose(1, 2).reshape(x.shape)  # (B, c, h, w)
        return x + self.out(h)


def level(c_in: int, c_out: int, res_blocks: int, attention: bool) -> list[nn.Module]:
    """The layers of one resolution."""
    layers: list[nn.Module] = []
    for i in range(res_blocks):
        layers.append(ResBlock(c_in if i == 0 else c_out, c_out))
        if attention:
            layers.append(SpatialAttention(c_out))
    return layers


class Encoder(nn.Module):
    """Eq. (1), v = E(x): (B, 3, H, W) in [-1, 1] -> latent (B, n, d), normalised."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.layer_norm = config.layer_norm
        widths = [config.channels * m for m in config.multipliers]
        last = len(widths) - 1
        layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 3, padding=1)]
        for i, width in enumerate(widths):
            layers += level(widths[max(i - 1, 0)], width, config.res_blocks, attention=i == last)
            if i < last:
                layers.append(nn.Conv2d(width, width, 3, stride=2, padding=1))
        layers += [ResBlock(width, width), SpatialAttention(width), ResBlock(width, width)]
        layers += [group_norm(width), nn.SiLU(), nn.Conv2d(width, config.d, 3, padding=1)]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        v = self.layers(x).flatten(2).transpose(1, 2)               # (B, n, d)
        # No learned gain: with one, the encoder might grow louder than the noise, of unit variance. A token's
        # norm leaves d - 2 of d numbers free: too few at d = 4, so the small presets take the image's.
        return F.layer_norm(v.float(), v.shape[1:] if self.layer_norm == "image" else v.shape[2:])


class Decoder(nn.Module):
    """x' = D(z'_T): (B, n, d) -> (B, 3, H, W), about [-1, 1]."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.side = config.side
        widths = [config.channels * m for m in reversed(config.multipliers)]
        width = widths[0]
        layers: list[nn.Module] = [nn.Conv2d(config.d, width, 3, padding=1)]
        layers += [ResBlock(width, width), SpatialAttention(width), ResBlock(width, width)]
        layers += level(width, width, config.res_blocks + 1, attention=True)
        for c_in, c_out in itertools.pairwise(widths):
            layers.append(nn.Upsample(scale_factor=2.0, mode="nearest"))
            layers.append(nn.Conv2d(c_in, c_in, 3, padding=1))
            layers += level(c_in, c_out, config.res_blocks + 1, attention=False)
        layers += [group_norm(widths[-1]), nn.SiLU(), nn.Conv2d(widths[-1], 3, 3, padding=1)]
        self.layers = nn.Sequential(*layers)

    def forward(self, z_sum: Tensor) -> Tensor:
        grid = z_sum.transpose(1, 2).unflatten(2, (self.side, self.side))  # (B, d, h, w)
        return self.layers(grid.contiguous())


class Tokenizer(nn.Module):
    """Encoder, noisy residual quantiser and decoder (3.1, Figure 4)."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quantizer = NoisyResidualQuantizer(config)

    def noise(self, streams: ImageStreams) -> Tensor:
        """eps (T, B, n, d), image by image from its stream."""
        eps = streams.draw(torch.randn, self.config.T, self.config.side**2, self.config.d)
        return eps.transpose(0, 1)

    def forward(self, x: Tensor, eps: Tensor) -> tuple[Tensor, Tensor, Quantized]:
        """x -> x', v, Quantized. The decoder sees z'_T; its gradient goes to v (straight-through)."""
        v = self.encoder(x)                                         # Eq. (1)
        quantized = self.quantizer(v, eps)                          # Alg. 1
        straight_through = v + (quantized.z_sum - v).detach()
        return self.decoder(straight_through), v, quantized


# 4. The tokenizer's losses, Eqs. (3) to (5) -------------------------------------------------------

class LPIPS(nn.Module):
    """Perceptual loss of Eq. (5), "features extracted from VGG16": LPIPS v0.1 (Zhang et al. 2018)."""

    def __init__(self, vgg16: dict[str, Tensor], linear: dict[str, Tensor]) -> None:
        super().__init__()
        network = torchvision.models.vgg16(weights=None, init_weights=False)
        network.load_state_dict(vgg16)
        ends = 0, 4, 9, 16, 23, 30  # relu1_2, relu2_2, relu3_3, relu4_3, relu5_3
        self.slices = nn.ModuleList(network.features[a:b] for a, b in itertools.pairwise(ends))
        for i in range(5):
            self.register_buffer(f"linear{i}", linear[f"lin{i}.model.1.weight"].clone())
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1))
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1))
        self.requires_grad_(False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Distance of two batches (B, 3, H, W) in [-1, 1], mean over the batch."""
        x = (x - self.shift) / self.scale
        y = (y - self.shift) / self.scale
        total = torch.zeros((), device=x.device)
        for i, layers in enumerate(self.slices):
            x = layers(x)
            y = layers(y)
            unit_x = x / (x.norm(dim=1, keepdim=True) + 1e-10)
            unit_y = y / (y.norm(dim=1, keepdim=True) + 1e-10)
            squares = (unit_x - unit_y).float().square()
            total = total + (squares * getattr(self, f"linear{i}")).sum(1).mean()
        return total


class Discriminator(nn.Sequential):
    """PatchGAN (Isola et al. 2017): (B, 3, H, W) -> logits (B, 1, h, w), high for real."""

    def __init__(self) -> None:
        layers: list[nn.Module] = [nn.Conv2d(3, 64, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for c_in, c_out, stride in ((64, 128, 2), (128, 256, 2), (256, 512, 1)):
            layers.append(nn.Conv2d(c_in, c_out, 4, stride=stride, padding=1, bias=False))
            layers.append(group_norm(c_out))  # BatchNorm would depend on the number of devices
            layers.append(nn.LeakyReLU(0.2))
        layers.append(nn.Conv2d(512, 1, 4, padding=1))
        super().__init__(*layers)


def hinge_loss(real: Tensor, fake: Tensor) -> Tensor:
    """The discriminator's loss (VQGAN) on its logits of real and of reconstructed images."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def adaptive_weight(nll: Tensor, gan: Tensor, last_layer: Tensor) -> Tensor:
    """VQGAN's weight of the adversarial loss: the ratio of both gradients at the decoder's end."""
    nll_gradient, = torch.autograd.grad(nll, last_layer, retain_graph=True)
    gan_gradient, = torch.autograd.grad(gan, last_layer, retain_graph=True)
    gradients = torch.stack([nll_gradient, gan_gradient]).float()
    sum_over_ranks(gradients)  # one weight for all ranks; with --accum, one for each chunk
    nll_norm, gan_norm = (gradients / world_size()).flatten(1).norm(dim=1)
    return (nll_norm / (gan_norm + 1e-4)).clamp(0, 1e4).detach()


def tokenizer_losses(
        net: nn.Module, x: Tensor, eps: Tensor, lpips: nn.Module | None, kappa: float,
        discriminator: nn.Module | None, eta: float, last_layer: Tensor) -> tuple[Tensor, dict, Tensor]:
    """Images x (B, 3, H, W) in [-1, 1] and their noise -> the loss of Eq. (5), what is logged, x'.

    kappa, eta: weights of the perceptual and the adversarial loss, each left out without its network.
    """
    x_rec, _, quantized = net(x, eps)
    nll = recon = F.mse_loss(x_rec.float(), x)                      # Eq. (3)
    logged = {"recon": recon, "quant": quantized.loss}
    if lpips:
        logged["perceptual"] = lpips(x, x_rec)
        nll = nll + kappa * logged["perceptual"]                    # + L_pept: VQGAN calls both nll
    loss = nll + 0.25 * quantized.loss                              # + delta L_quant, Eq. (4)
    if discriminator:
        discriminator.requires_grad_(False)                         # it is trained by its own loss
        logged["gan"] = -discriminator(x_rec).float().mean()
        discriminator.requires_grad_(True)
        weight = adaptive_weight(nll, logged["gan"], last_layer)
        loss = loss + eta * weight * logged["gan"]                  # + eta L_gan: Eq. (5)
    logged |= {"loss": loss, "residual_t": quantized.residual, "error_t": quantized.error}
    return loss, logged, x_rec


# 5. The transformer and its loss, Eqs. (6), (7) ---------------------------------------------------

def rotary_angles(side: int, head_dim: int) -> Tensor:
    """2-D rotary positions: angles (n, head_dim / 2), first half by row, second by column."""
    exponents = torch.arange(0, head_dim // 2, 2) / (head_dim // 2)
    frequencies = 100.0 ** -exponents                               # not 10,000: a grid is small
    axis = torch.arange(side).float()[:, None] * frequencies        # (side, head_dim / 4)
    by_row = axis.repeat_interleave(side, dim=0)                    # (n, head_dim / 4)
    by_column = axis.repeat(side, 1)
    return torch.cat([by_row, by_column], dim=1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (x_i, x_{i + head_dim/2}) of x (B, heads, n, head_dim) by their angles."""
    a, b = x.chunk(2, dim=-1)
    turned_a = a * cos - b * sin
    turned_b = a * sin + b * cos
    return torch.cat([turned_a, turned_b], dim=-1)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm without affine, then the condition's shift and scale (B, 1, width)."""
    return F.layer_norm(x, x.shape[-1:]) * (1 + scale) + shift


class Block(nn.Module):
    """Llama's block, with AdaLN-Zero (Peebles & Xie 2023) and attention in both directions."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        hidden = round(8 / 3 * width / 8) * 8  # 8/3: SwiGLU's three matrices cost what two do with 4
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.gate_up = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)
        self.ada = nn.Linear(width, 6 * width)

    def forward(self, x: Tensor, c: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x (B, n, width), condition c (B, width) -> (B, n, width)."""
        B, n, width = x.shape
        shift1, scale1, gate1, shift2, scale2, gate2 = self.ada(c)[:, None].chunk(6, dim=-1)
        qkv = self.qkv(modulate(x, shift1, scale1)).view(B, n, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                        # each (B, heads, n, head_dim)
        q = rotate(q, cos.to(q.dtype), sin.to(q.dtype))
        k = rotate(k, cos.to(q.dtype), sin.to(q.dtype))
        h = attend(q, k, v).transpose(1, 2).reshape(B, n, width)
        x = x + gate1 * self.out(h)
        gate, up = self.gate_up(modulate(x, shift2, scale2)).chunk(2, dim=-1)
        return x + gate2 * self.down(F.silu(gate) * up)


class TimeEmbedding(nn.Module):
    """Step t (B,) -> (B, width): sinusoids, then two layers (DiT)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        frequencies = torch.exp(-math.log(10000) * torch.arange(128, device=t.device) / 128)
        phase = t[:, None].float() * frequencies                    # (B, 128)
        return self.layers(torch.cat([phase.cos(), phase.sin()], dim=1))


class LinearHead(nn.Module):
    """The paper's "classification layer" (3.2): K logits for each token."""

    def __init__(self, width: int, K: int, patch: int) -> None:
        super().__init__()
        self.patch = patch
        self.project = nn.Linear(width, patch * patch * K)

    def forward(self, x: Tensor) -> Tensor:
        return unpatchify(self.project(x), self.patch).float()      # (B, n, K)


class RDPM(nn.Module):
    """The transformer f of Eq. (6): (eps_t, y, t, z'_{t-1}) -> logits of every token's codes."""

    def __init__(self, config: GeneratorConfig, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.config = config
        d = tokenizer.config.d
        side = tokenizer.config.side
        width = 64 * config.depth                                   # Table 1
        patch = config.patch
        if side % patch:
            raise UserError(f"--patch {patch}: does not divide the {side} x {side} tokens")
        # "projected back to d" (3.2), but which d? The codebook's was too narrow at d = 4 (README, Readings).
        inputs = d if config.bottleneck else 2 * d
        self.squeeze = nn.Linear(2 * d, d) if config.bottleneck else nn.Identity()
        self.embed = nn.Linear(patch * patch * inputs, width)
        self.embed_t = TimeEmbedding(width)
        self.embed_y = nn.Embedding(config.num_classes + 1, width)  # the last row: no class
        self.blocks = nn.ModuleList(Block(width, config.depth) for _ in range(config.depth))
        self.ada = nn.Linear(width, 2 * width)
        angles = rotary_angles(side // patch, width // config.depth)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        if config.head == "linear":
            self.head = LinearHead(width, tokenizer.config.K, patch)
        else:
            self.head = CodebookHead(width, tokenizer, patch)       # section 7
        if config.statistics or config.head == "codebook":          # for section 7
            self.register_buffer("class_mean", torch.zeros(config.num_classes + 1, side * side, d))
            self.register_buffer("class_axes", torch.zeros(min(256, side * side * d), side * side * d))
        self.initialize()

    def initialize(self) -> None:
        """DiT's: Xavier for projections, N(0, 0.02) for embeddings, zero for AdaLN and heads."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for layer in (self.embed_y, self.embed_t.layers[0], self.embed_t.layers[2]):
            nn.init.normal_(layer.weight, std=0.02)
        for layer in (*[block.ada for block in self.blocks], self.ada, self.head.project):
            nn.init.zeros_(layer.weight)

    def features(self, eps_t: Tensor, y: Tensor, t: Tensor, z_sum: Tensor) -> Tensor:
        """All of f but its head: (B, n / p^2, width)."""
        c = F.silu(self.embed_t(t) + self.embed_y(y))               # (B, width)
        x = self.squeeze(torch.cat([eps_t, z_sum], dim=-1))         # (B, n, 2d), or (B, n, d)
        x = self.embed(patchify(x, self.config.patch)).float()      # (B, n / p^2, width)
        for block in self.blocks:
            x = block(x, c, self.cos, self.sin)
        shift, scale = self.ada(c)[:, None].chunk(2, dim=-1)
        return modulate(x, shift, scale)

    def forward(self, eps_t: Tensor, y: Tensor, t: Tensor, z_sum: Tensor) -> Tensor:
        """Eq. (6): eps_t (B, n, d), y (B,), t (B,) in 1..T, z'_{t-1} (B, n, d) -> logits (B, n, K)."""
        x = self.features(eps_t, y, t, z_sum)
        if self.config.head == "linear":
            return self.head(x)
        return self.head(x, eps_t, t, z_sum, self.class_mean[y], self.class_mean[-1])


def generator_losses(net: nn.Module, quantizer: NoisyResidualQuantizer, v: Tensor, eps: Tensor,
                     y: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Eq. (7) for each image, and the share of its codes that are predicted right; each (B,).

    v (B, n, d); eps (T, B, n, d); y (B,); t (B,) in 1..T, on the CPU.
    """
    z_sum, codes_t = quantizer.training_input(v, eps, t)            # (B, n, d), (B, n)
    t = t.to(v.device, non_blocking=True)
    eps_t = eps[t - 1, torch.arange(len(v), device=v.device)]       # (B, n, d), of codes_t
    logits = net(eps_t, y, t, z_sum)                                # Eq. (6)
    losses = F.cross_entropy(logits.flatten(0, 1), codes_t.flatten(), reduction="none")
    losses = losses.view(codes_t.shape).mean(1)                     # Eq. (7)
    right = argmax(logits.detach()) == codes_t
    return losses, right.float().mean(1)


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, decay: float, step: int) -> None:
    """ema <- decay * ema + (1 - decay) * model (4.2); early on less, to forget the initial weights."""
    decay = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


# 6. Guidance, drawing codes, Alg. 2, Eq. (8) ------------------------------------------------------

@dataclass
class Sampling:
    """How to sample; a checkpoint stores its defaults. The rows of Table 3 are these flags of sample.py,
    after --skip 0 --guidance-from 1 where a checkpoint (`cifar10`'s) has other defaults:

        raw     --guidance 0 --no-gumbel        + CFG     --guidance-schedule constant --no-gumbel
        + linear  --guidance-schedule linear --no-gumbel    + Gumbel  --guidance-schedule linear
    """

    guidance: float = 1.5              # lambda; 0 is no guidance
    guidance_schedule: str = "linear"  # rises from 0 at t = 1 to lambda at T; or "constant"
    guidance_from: int = 1             # the first step with guidance
    tau: float = 1.0                   # inverse temperature of Eq. (8)
    gumbel: bool = True                # draw codes by Eq. (8), or take the likeliest
    skip: int = 0                      # first steps that encode a draft of v, without the network
    draft: float = 0.0                 # scale of the draft's noise about the class's mean
    strengths: list[float] | None = None  # lambda_1 ... lambda_T, instead of the first three

    def lambdas(self, T: int) -> list[float]:
        """Guidance strengths lambda_1 ... lambda_T (3.2, 4.3)."""
        if self.strengths:
            return self.strengths
        strengths = []
        for t in range(1, T + 1):
            rise = (t - 1) / max(T - 1, 1) if self.guidance_schedule == "linear" else 1.0
            strengths.append(self.guidance * rise if t >= self.guidance_from else 0.0)
        return strengths

    def scaled(self, T: int) -> Sampling:
        """Defaults are chosen at T = 10; this moves their steps to another T."""
        guidance_from = (self.guidance_from - 1) * T // 10 + 1
        return replace(self, skip=self.skip * T // 10, guidance_from=guidance_from)

    def precision(self, device: torch.device) -> torch.autocast | nullcontext:
        """The caller's autocast, but float32 for an argmax, since bfloat16 logits tie."""
        return nullcontext() if self.gumbel else torch.autocast(device.type, enabled=False)


def guided(model: RDPM, strength: float, eps_t: Tensor, y: Tensor, t: Tensor,
           z_sum: Tensor) -> Tensor:
    """Eq. (6) with guidance (3.2): logits cond + (cond - uncond) * lambda_t."""
    if strength == 0:                                               # needs no second pass
        return model(eps_t, y, t, z_sum)
    no_class = torch.full_like(y, model.config.num_classes)
    both = torch.cat([y, no_class])
    eps_t = eps_t.repeat(2, 1, 1)
    z_sum = z_sum.repeat(2, 1, 1)
    cond, uncond = model(eps_t, both, t.repeat(2), z_sum).chunk(2)
    return cond + (cond - uncond) * strength


def draw_codes(logits: Tensor, sampling: Sampling, streams: ImageStreams) -> Tensor:
    """Eq. (8): logits (B, n, K) -> codes (B, n). tau multiplies: it is an inverse temperature."""
    if sampling.gumbel:
        u = streams.draw(torch.rand, *logits.shape[1:])
        logits = logits * sampling.tau - torch.log(-torch.log(u))
    return argmax(logits)


@torch.inference_mode()
def sample(model: RDPM, tokenizer: Tokenizer, y: Tensor, seed: int, numbers: Sequence[int],
           sampling: Sampling) -> Tensor:
    """Alg. 2: labels y (B,) -> images (B, 3, H, W). Image i follows from seed, numbers[i], y[i]."""
    streams = ImageStreams(seed, numbers, y.device)
    eps = tokenizer.noise(streams)                                  # (T, B, n, d)
    z_sum = torch.zeros_like(eps[0])                                # Alg. 2, line 1: z'_0 = 0
    lambdas = sampling.lambdas(tokenizer.config.T)
    for t in range(1, tokenizer.config.T + 1):                      # Alg. 2, line 2
        inputs = eps[t - 1], y, torch.full_like(y, t), z_sum
        with sampling.precision(y.device):
            logits = guided(model, lambdas[t - 1], *inputs)         # Alg. 2, line 3
        codes_t = draw_codes(logits, sampling, streams)             # Eq. (8)
        z_sum = z_sum + tokenizer.quantizer.lookup(codes_t)         # Alg. 2, line 4, of drawn codes
    return tokenizer.decoder(z_sum).float()                         # Alg. 2, line 6


# A reader of the paper can stop here. =============================================================


# 7. Beyond the paper: patches, the codebook head, class statistics, drafts, known codes -----------

def patchify(x: Tensor, patch: int) -> Tensor:
    """Tokens of a square grid to patches (DiT): (B, n, c) -> (B, n / p^2, p^2 c)."""
    B, n, _ = x.shape
    side = math.isqrt(n) // patch
    grid = x.view(B, side, patch, side, patch, -1)
    return grid.transpose(2, 3).reshape(B, side * side, -1)


def unpatchify(x: Tensor, patch: int) -> Tensor:
    """And back: (B, n / p^2, p^2 c) -> (B, n, c)."""
    B, n, _ = x.shape
    side = math.isqrt(n)
    grid = x.view(B, side, side, patch, patch, -1)
    return grid.transpose(2, 3).reshape(B, n * patch * patch, -1)


class CodebookHead(nn.Module):
    """A head that knows the codebook: logits from a prediction v_hat of the latent.

    The target is the entry nearest to v_t = alpha_t (v - z'_{t-1}) + beta_t eps_t, where only v is
    unknown. So the network predicts v, and s, the variance of its error in v_t. The logits are
    -|v_t - e_k|^2 / (2 s), without the terms that all k share. In float32: v_hat's error is divided by s.
    """

    def __init__(self, width: int, tokenizer: Tokenizer, patch: int) -> None:
        super().__init__()
        self.patch = patch
        self.project = nn.Linear(width, patch * patch * (tokenizer.config.d + 1))
        for name in ("codebook", "alpha", "beta"):  # the tokenizer's file holds them
            buffer = getattr(tokenizer.quantizer, name).detach().clone()
            self.register_buffer(name, buffer, persistent=False)
        # Initial s: about the error in v_t that was measured early in training.
        self.log_s = nn.Parameter((0.7 * self.alpha**2 + 0.03).log())

    def predict(self, x: Tensor, t: Tensor, mean_y: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, n / p^2, width), mean latents of the class and of all -> v_hat (B, n, d), s (B, n, 1)."""
        out = unpatchify(self.project(x), self.patch)               # (B, n, d + 1)
        beta = self.beta[t - 1].view(-1, 1, 1)
        log_s = self.log_s[t - 1].view(-1, 1, 1)
        # Start from the class's mean early (beta near 1), later from all images'; out corrects it.
        v_hat = mean + beta * (mean_y - mean) + out[..., :-1]
        return v_hat, (log_s + out[..., -1:]).exp()

    def forward(self, x: Tensor, eps_t: Tensor, t: Tensor, z_sum: Tensor, mean_y: Tensor,
                mean: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            v_hat, s = self.predict(x, t, mean_y, mean)
            alpha = self.alpha[t - 1].view(-1, 1, 1)
            beta = self.beta[t - 1].view(-1, 1, 1)
            v_t = alpha * (v_hat - z_sum) + beta * eps_t            # as predicted
            # (v_t . e_k - |e_k|^2 / 2) / s as one product: dividing the logits would be a second pass.
            rows = torch.cat([v_t, torch.ones_like(s)], dim=-1) / s  # (B, n, d + 1)
            offset = -self.codebook.square().sum(1, keepdim=True) / 2
            return F.linear(rows, torch.cat([self.codebook, offset], dim=1))  # (B, n, K)


def preview(model: RDPM, eps_t: Tensor, y: Tensor, t: Tensor, z_sum: Tensor) -> Tensor | None:
    """v_hat (B, n, d), the codebook head's prediction of v at step t; None with the linear head."""
    if model.config.head == "linear":
        return None
    x = model.features(eps_t, y, t, z_sum)
    with torch.autocast(x.device.type, enabled=False):
        return model.head.predict(x, t, model.class_mean[y], model.class_mean[-1])[0]


def draft_of(model: RDPM, y: Tensor, sampling: Sampling, streams: ImageStreams) -> Tensor:
    """A draft of v (B, n, d): the class's mean, plus noise that is correlated as latents are."""
    if not hasattr(model, "class_axes"):
        raise UserError("--skip, --fast: this checkpoint has no class statistics; leave them out")
    mean = model.class_mean[y]
    if sampling.draft == 0:
        return mean
    along = streams.draw(torch.randn, len(model.class_axes))
    return mean + sampling.draft * (along @ model.class_axes).view_as(mean)


@torch.inference_mode()
def sample_steps(model: RDPM, tokenizer: Tokenizer, y: Tensor, seed: int, numbers: Sequence[int],
                 sampling: Sampling, v: Tensor | None = None, known: Tensor | None = None,
                 previews: bool = False) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Alg. 2 with skipped steps and known codes: yields (z'_t, v_hat) for t = 1 ... T, each (B, n, d).

    In the first `sampling.skip` steps codes are Alg. 1's on a draft of v, without the network: codes drawn
    independently early on would lose what tokens share. Where known (T, B, n or 1) is true, codes are
    Alg. 1's on v (B or 1, n, d). Known first steps keep a layout; known tokens outside a region inpaint
    that region (clamped, no posterior sample). v_hat is the draft, or with `previews` the head's.
    """
    quantizer = tokenizer.quantizer
    streams = ImageStreams(seed, numbers, y.device)
    eps = tokenizer.noise(streams)
    z_sum = torch.zeros_like(eps[0])
    draft = draft_of(model, y, sampling, streams) if sampling.skip else None
    for t, strength in enumerate(sampling.lambdas(len(eps)), start=1):  # Alg. 2, line 2
        inputs = eps[t - 1], y, torch.full_like(y, t), z_sum
        v_hat = draft
        if t <= sampling.skip:
            codes_t, _, _, _ = quantizer.step(t, z_sum, draft, eps[t - 1])
        else:
            with sampling.precision(y.device):
                logits = guided(model, strength, *inputs)           # Alg. 2, line 3
                v_hat = preview(model, *inputs) if previews else None
            codes_t = draw_codes(logits, sampling, streams)         # Eq. (8)
        if known is not None:
            encoded, _, _, _ = quantizer.step(t, z_sum, v, eps[t - 1])
            codes_t = torch.where(known[t - 1], encoded, codes_t)
        z_sum = z_sum + quantizer.lookup(codes_t)                   # Alg. 2, line 4
        yield z_sum, v_hat


@torch.inference_mode()
def draw_images(model: RDPM, tokenizer: Tokenizer, y: Tensor, seed: int, numbers: Sequence[int],
                sampling: Sampling) -> Tensor:
    """Images (B, 3, H, W) by `sample`, or by `sample_steps` if the first steps are skipped."""
    if sampling.skip == 0:
        return sample(model, tokenizer, y, seed, numbers, sampling)
    *_, (z_sum, _) = sample_steps(model, tokenizer, y, seed, numbers, sampling)
    return tokenizer.decoder(z_sum).float()


def add_sampling_flags(p: argparse.ArgumentParser) -> None:
    """What sample.py and fid.py can say of the sampler; `sampling_from` reads it."""
    add = p.add_argument
    add("--guidance", type=natural_float, help="Guidance strength lambda, 0 for none [default: the checkpoint's].")
    add("--guidance-schedule", choices=("constant", "linear"), help="Guidance over the steps [the checkpoint's].")
    add("--guidance-from", type=positive_int, help="First step with guidance [the checkpoint's].")
    add("--tau", type=natural_float, help="Inverse temperature of Eq. (8) [the checkpoint's].")
    add("--gumbel", action=argparse.BooleanOptionalAction,
        help="Draw codes by Eq. (8), or take the likeliest [the checkpoint's].")
    add("--skip", type=natural_int, help="First steps that take a draft, not the network [the checkpoint's].")
    add("--fast", action="store_true",
        help="10 steps in 7 passes: five take the draft, the next two get all the guidance.")


def sampling_from(args: argparse.Namespace, defaults: Sampling, T: int) -> Sampling:
    """The flags that were given, and a checkpoint's defaults for the others."""
    given = {}
    for field in fields(Sampling):
        value = getattr(args, field.name, None)
        if value is not None:
            given[field.name] = value
    sampling = replace(defaults, **given)
    if "tau" in given and not sampling.gumbel:
        raise UserError("--tau: does nothing beside --no-gumbel; leave one of them out")
    if args.fast:
        if "skip" in given or "guidance_from" in given:
            raise UserError("--fast sets --skip and --guidance-from; leave them out")
        half = T // 2
        end = min(half + 2, T)
        strengths = [0.0] * T
        for t in range(half, end):
            strengths[t] = sum(sampling.lambdas(T)[half:]) / (end - half)
        sampling = replace(sampling, skip=half, draft=sampling.draft or 1.0, strengths=strengths)
    elif sampling.guidance and T > 1 and not any(sampling.lambdas(T)[sampling.skip:]):
        raise UserError(f"--guidance {sampling.guidance}: --skip and --guidance-from leave it no step")
    return sampling


# 8. Data ------------------------------------------------------------------------------------------

def to_uint8(x: Tensor) -> Tensor:
    """Floats in [-1, 1] -> bytes, round(127.5 (x + 1))."""
    return (127.5 * (x.float() + 1)).round().clamp(0, 255).to(torch.uint8)


def to_float(x: Tensor) -> Tensor:
    """Bytes -> floats in [-1, 1]."""
    return x.float() / 127.5 - 1


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """ADM's crop (Dhariwal & Nichol 2021): halve by BOX while twice too large, bicubic, crop."""
    while min(image.size) >= 2 * size:
        half = image.width // 2, image.height // 2
        image = image.resize(half, Image.Resampling.BOX)
    scale = size / min(image.size)
    width = round(image.width * scale)
    height = round(image.height * scale)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left = (width - size) // 2
    top = (height - size) // 2
    return image.crop((left, top, left + size, top + size))


def fit(image: Image.Image, size: int, pad: bool) -> Image.Image:
    """An image as RGB, size x size: `center_crop`, or with `pad` on black if it is small enough."""
    image = image.convert("RGB")
    if pad and max(image.size) <= size:
        return torchvision.transforms.functional.center_crop(image, size)
    return center_crop(image, size)


UPRIGHT = {  # EXIF's orientations, and what turns each upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def orientation(image: Image.Image) -> int:
    """By EXIF; 1 is upright. A damaged EXIF block does not make a good picture bad."""
    try:
        return image.getexif().get(0x0112, 1)
    except Exception:  # Pillow's parser raises many kinds
        return 1


def read_image(path: str | Path) -> Image.Image:
    """An image file as RGB, turned as its EXIF data say. UserError, naming it, if it is damaged."""
    try:
        with Image.open(path) as image:
            image.load()
            turn = UPRIGHT.get(orientation(image))
            if image.mode.startswith("I;16"):  # Pillow would clip, not scale
                grey = np.asarray(image) // 257
                image = Image.fromarray(grey.astype(np.uint8))
            if image.mode in ("I", "F"):
                raise ValueError(f"mode {image.mode}, of which black and white are unknown")
            image = image.convert("RGB")
            return image if turn is None else image.transpose(turn)
    except Exception as error:  # Pillow's decoders raise many kinds
        raise UserError(f"{path}: not a readable image ({error}); repair or remove it") from error


@lru_cache
def image_suffixes() -> set[str]:
    """Of all raster formats that this Pillow reads by itself."""
    by_suffix = Image.registered_extensions()
    readable = Image.OPEN.keys() - {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}  # need other programs
    return {suffix for suffix, name in by_suffix.items() if name in readable}


def scan(folder: str, inside: str, ignored: Counter) -> list[bytes]:
    """Names of all images below a folder, each with `inside` before it; counts other files.

    Hidden files and folders are left out. Links to files are followed, links to folders are not.
    """
    names = []
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        suffix = os.path.splitext(entry.name)[1].lower()
        if entry.name.startswith("."):
            continue
        if entry.is_dir(follow_symlinks=False):
            names += scan(entry.path, f"{inside}{entry.name}/", ignored)
        elif suffix in image_suffixes():
            names.append(os.fsencode(inside + entry.name))
        else:
            ignored[suffix or "no suffix"] += 1
    return names


def image_files(folder: Path) -> list[Path]:
    """All image files below a folder, in order of their names."""
    names = scan(str(folder), "", Counter()) if folder.is_dir() else []
    return [folder / os.fsdecode(name) for name in names]


def scan_classes(root: Path) -> tuple[list[str], np.ndarray, np.ndarray, Counter]:
    """Class names, image names (N,) as an array of bytes, labels (N,), numbers of ignored files."""
    folders = [path.name for path in root.iterdir() if path.is_dir()]
    classes = sorted(name for name in folders if not name.startswith("."))
    ignored: Counter = Counter()
    names = [np.array(scan(str(root / name), f"{name}/", ignored), bytes) for name in classes]
    counts = [len(images) for images in names]
    if not classes and image_files(root):
        raise UserError(f"{root}: its images lie in no class's folder; give each class one")
    if not all(counts) or not classes:
        empty = ", ".join(name for name, count in zip(classes, counts, strict=True) if not count)
        raise UserError(f"{root}: no image in {empty or 'it'}; give each class a folder of images")
    return classes, np.concatenate(names), np.repeat(np.arange(len(classes)), counts), ignored


class Folder(torch.utils.data.Dataset):
    """Images in one folder for each class, in ImageFolder's order. Items: RGB image, label.

    The names of ImageNet's 1.28 million files are one array, not a list of objects: a data worker copies
    each object that it touches, since Python counts references in it. Rank 0 lists, the others receive.
    """

    def __init__(self, root: Path, size: int, pad: bool) -> None:
        self.root = root
        self.size = size
        self.pad = pad
        self.classes, self.names, self.targets, self.ignored = from_rank_0(scan_classes, root)

    def path(self, i: int) -> str:
        return os.path.join(self.root, os.fsdecode(self.names[i]))

    def __getitem__(self, i: int) -> tuple[Image.Image, int]:
        return fit(read_image(self.path(i)), self.size, self.pad), int(self.targets[i])


def polygon(corners: int, start: float, radii: tuple[float, ...] = (1.0,)) -> np.ndarray:
    angle = 2 * math.pi * (np.arange(corners) / corners + start)
    directions = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    return np.resize(radii, corners)[:, None] * directions


DISC = polygon(48, 0)
SQUARE = polygon(4, 1 / 8)
CROSS = [[1, .3], [.3, .3], [.3, 1], [-.3, 1], [-.3, .3], [-1, .3],
         [-1, -.3], [-.3, -.3], [-.3, -1], [.3, -1], [.3, -.3], [1, -.3]]
ARROW = [[1, 0], [0, .8], [0, .3], [-1, .3], [-1, -.3], [0, -.3], [0, -.8]]
SHAPES = {  # polygons in the unit disc, painted with the shape's, then the ground's colour
    "arrow": [np.array(ARROW)],
    "bar": [SQUARE * [1.4, 0.35]],
    "crescent": [DISC, DISC * 0.85 + [0.5, 0]],
    "cross": [np.array(CROSS)],
    "disc": [DISC],
    "frame": [SQUARE, SQUARE * 0.55],
    "ring": [DISC, DISC * 0.55],
    "square": [SQUARE],
    "star": [polygon(10, -1 / 4, (1.0, 0.4))],
    "triangle": [polygon(3, -1 / 4)],
}


class Shapes(torch.utils.data.Dataset):
    """The built-in set: bright shapes on dark, in random colour, place, size and rotation."""

    def __init__(self, size: int, train: bool) -> None:
        self.size = size
        self.split = int(train)
        self.classes = list(SHAPES)
        self.targets = np.arange(20_000 if train else 2_000) % len(SHAPES)

    def __getitem__(self, i: int) -> tuple[Image.Image, int]:
        rng = np.random.default_rng([self.split, i])
        label = int(self.targets[i])
        size = 4 * self.size
        foreground = colorsys.hsv_to_rgb(*rng.uniform((0, 0.3, 0.75), 1))
        background = rng.uniform(0, 0.25, 3)
        angle = rng.uniform(-0.5, 0.5)
        radius = rng.uniform(0.7, 0.95)
        centre = 1 + rng.uniform(-1, 1, 2) * (1 - radius)
        cos = math.cos(angle)
        sin = math.sin(angle)
        rotation = np.array([[cos, -sin], [sin, cos]])
        colours = []
        for colour in (foreground, background):
            colours.append(tuple(int(255 * c) for c in colour))
        image = Image.new("RGB", (size, size), colours[1])
        for outline, colour in zip(SHAPES[self.classes[label]], colours, strict=False):
            points = (outline @ rotation.T * radius + centre) * size / 2
            ImageDraw.Draw(image).polygon([tuple(p) for p in points], fill=colour)
        return image.resize((self.size, self.size), Image.Resampling.BOX), label


class Images(torch.utils.data.Dataset):
    """N images and, from N to 2N - 1, their mirror images. Items: uint8 (3, H, W), label."""

    def __init__(self, source: torch.utils.data.Dataset, kept: np.ndarray | slice = slice(None)) -> None:
        self.source = source
        self.classes = list(source.classes)
        self.indices = np.arange(len(source.targets))[kept]
        self.labels = np.asarray(source.targets)[self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        flip, i = divmod(i, len(self))
        image, label = self.source[int(self.indices[i])]
        image = ImageOps.mirror(image) if flip else image
        x = torch.from_numpy(np.array(image))
        return x.permute(2, 0, 1), int(label)

    def __str__(self) -> str:
        text = f"{len(self):,} images of {len(self.classes)} classes"
        ignored = getattr(self.source, "ignored", None)
        if ignored:
            most = ", ".join(f"{suffix} {count}" for suffix, count in ignored.most_common(3))
            text += f" ({ignored.total()} other files ignored: {most})"
        return text


def place_in_class(labels: np.ndarray) -> np.ndarray:
    """The place 0, 1, ... of each image (N,) among those of its class; the labels are sorted."""
    begins = np.searchsorted(labels, labels)
    return np.arange(len(labels)) - begins


def held_out_places(labels: np.ndarray) -> np.ndarray:
    """Which images (N,) to hold out: of more than ten of a class one in twenty, never all."""
    place = place_in_class(labels)
    eleventh = min(10, place.max())  # or the last of the largest class, where all are small
    return (place % 20 == eleventh) & (place > 0)


def load_data(data: str, size: int, train: bool, pad: bool = False) -> Images:
    """The training or held-out split of "shapes", "mnist", "cifar10", or a folder of classes."""
    if data == "shapes":
        return Images(Shapes(size, train))
    if data in ("mnist", "cifar10"):
        dataset = torchvision.datasets.MNIST if data == "mnist" else torchvision.datasets.CIFAR10
        try:
            from_rank_0(lambda: dataset("data", train, download=True) and None)  # send nothing
            return Images(dataset("data", train, partial(fit, size=size, pad=pad)))
        except (OSError, RuntimeError) as error:
            raise UserError(f"--data {data}: cannot be downloaded into data/ ({one_line(error)})") from error
    root = Path(data)
    if not root.is_dir():
        raise UserError(f"--data {data}: no such folder; give one with a folder of images per class, or shapes")
    if (root / "train").is_dir():
        others = [root / name for name in ("val", "test") if (root / name).is_dir()]
        root = root / "train"
        if others:
            return Images(Folder(root if train else others[0], size, pad))
    source = Folder(root, size, pad)
    held_out = held_out_places(source.targets)
    if not held_out.any():
        raise UserError(f"--data {data}: no class has two images; give more of them, or a val/ folder")
    return Images(source, ~held_out if train else held_out)


def balanced_subset(labels: np.ndarray, num: int) -> list[int]:
    """`num` places (or all), as many of each class as can be, in an order that is always the same."""
    order = np.random.default_rng(0).permutation(len(labels))
    by_class = order[np.argsort(labels[order], kind="stable")]
    turns = place_in_class(labels[by_class])
    by_turn = by_class[np.argsort(turns, kind="stable")]
    return by_turn[:num].tolist()


def global_batches(num: int, batch: int, steps: range, seed: int, flip: bool) -> Iterator[list[int]]:
    """This rank's items of `Images` at each step. The whole batch follows from seed and step."""
    @lru_cache(maxsize=2)
    def epoch(number: int) -> np.ndarray:
        rng = np.random.default_rng([seed, number])
        order = rng.permutation(num)
        return order + num * rng.integers(0, 2, num) if flip else order

    for step in steps:
        places = np.arange(step * batch, (step + 1) * batch)
        own = places[rank_slice(batch)]
        yield [int(epoch(place // num)[place % num]) for place in own]


# 9. Running: presets, checkpoints, ranks, steps, flags --------------------------------------------

# Defaults of the scripts' flags, and sizes that have no flag. `imagenet` is the paper.
SMALL = {"image_size": 32, "res_blocks": 1, "schedule": "sin", "d": 4, "K": 512, "layer_norm": "image"}
TINY = SMALL | {"flip": False, "channels": 16, "multipliers": (1, 2, 4)}
SMALL_VQ = {"batch": 64, "lr": 1e-3, "lr_final": 0.02, "warmup": 100, "perceptual": 0.0, "gan": 0.0}
SMALL_GEN = {"batch": 128, "lr": 1e-3, "lr_final": 0.1, "warmup": 200, "ema": 0.999,
             "depth": 4, "head": "codebook", "patch": 2}
PRESETS = {
    "imagenet": {
        "data": "data/imagenet",
        "tokenizer": {},
        "train_vq": {"epochs": 10, "batch": 128, "lr": 4e-5, "lr_final": 1.0, "perceptual": 1.0, "gan": 0.75},
        "train_gen": {"epochs": 250, "batch": 1024, "lr": 4e-4, "lr_final": 0.1, "warmup": 1000,
                      "ema": 0.9999, "depth": 12, "head": "linear", "patch": 1},
        "sampling": {}},
    "cifar10": {
        "data": "cifar10",
        "tokenizer": SMALL | {"channels": 32, "multipliers": (1, 2)},
        "train_vq": SMALL_VQ | {"epochs": 6, "batch": 32},
        "train_gen": SMALL_GEN | {"epochs": 240, "lr_final": 0.05, "warmup": 500, "ema": 0.9995},
        "sampling": {"guidance": 3.5, "guidance_schedule": "constant", "guidance_from": 5, "skip": 4, "draft": 1.2}},
    "mnist": {
        "data": "mnist",
        "tokenizer": TINY | {"pad": True},
        "train_vq": SMALL_VQ | {"epochs": 1.75},
        "train_gen": SMALL_GEN | {"epochs": 8},
        "sampling": {}},
    "shapes": {
        "data": "shapes",
        "tokenizer": TINY,
        "train_vq": SMALL_VQ | {"epochs": 2.5},
        "train_gen": SMALL_GEN | {"epochs": 12},
        "sampling": {}},
}
TRAINING_NUMBERS = 2**32           # the first training image's, so that its stream is no sample's
SKIPS_BY_ITSELF = ("cuda", "cpu")  # devices whose fused optimizers look at `found_inf`; MPS' do not
VGG16 = "https://download.pytorch.org/models/vgg16-397923af.pth", "397923af"  # the first digits of its sha256
LPIPS_LINEAR = ("https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/master/lpips/weights/v0.1/vgg.pth",
                "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868")


class ImageStreams:
    """A random stream for each image, which follows from seed, number and type of device alone."""

    def __init__(self, seed: int, numbers: Sequence[int], device: torch.device | str) -> None:
        self.device = device
        self.generators = []
        for number in numbers:
            # SeedSequence mixes the pair: PyTorch's CPU generator uses only the low 32 bits of a seed.
            high, low = np.random.SeedSequence([seed, number]).generate_state(2, np.uint32).tolist()
            generator = torch.Generator(device)
            self.generators.append(generator.manual_seed((high >> 1 << 32) + low))  # 63 bits

    def draw(self, distribution: Callable[..., Tensor], *shape: int) -> Tensor:
        """(B, *shape) numbers from torch.randn or torch.rand."""
        drawn = [distribution(shape, generator=g, device=self.device) for g in self.generators]
        return torch.stack(drawn)


def argmax(x: Tensor) -> Tensor:
    """Index of the largest value along the last dimension of float32 x."""
    if x.device.type == "cpu":
        return torch.from_numpy(x.numpy().argmax(-1))  # four times as fast as PyTorch's
    return x.argmax(-1)


# The same latent and noise must give the same codes everywhere: no TF32 in float32 convolutions.
torch.backends.cudnn.allow_tf32 = False


class UserError(Exception):
    """Bad input. The message is the line that a person sees: what is wrong, where, what to do."""


def one_line(error: BaseException) -> str:
    """The last line of an error's message: a data worker's is a whole traceback."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[-1].removeprefix("rdpm.UserError: ")


def rank() -> int:
    """This process's number in the group that `launch` has joined, or 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank_slice(num: int) -> slice:
    """This rank's slice of `num` things."""
    begin = rank() * num // world_size()
    end = (rank() + 1) * num // world_size()
    return slice(begin, end)


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def sum_over_ranks(*tensors: Tensor) -> None:
    """Replace each tensor by its sum over all ranks."""
    for tensor in tensors if dist.is_initialized() else ():
        dist.all_reduce(tensor)


def from_rank_0(function: Callable, *args):
    """Call function(*args) on rank 0 alone. Every rank returns its result, or raises its error."""
    answer = [None, None]
    if rank() == 0:
        try:
            answer[0] = function(*args)
        except Exception as error:
            answer[1] = error
    if dist.is_initialized():
        dist.broadcast_object_list(answer)
    if answer[1] is not None:
        raise answer[1]
    return answer[0]


def launch(device: str | None) -> torch.device:
    """Pick the device, and join the process group if torchrun started us."""
    under_torchrun = dist.is_torchelastic_launched()
    if device is None:
        device = "mps" if torch.backends.mps.is_available() else "cpu"
        device = "cuda" if torch.cuda.is_available() else device
    try:
        chosen = torch.device(device)
        if device == "cuda" and under_torchrun:
            chosen = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        reason = one_line(error)
        raise UserError(f"--device {device}: cannot be used ({reason}); give cuda, mps or cpu") from error
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if under_torchrun:
        backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=datetime.timedelta(minutes=30))
    return chosen


def autocast(device: torch.device) -> torch.autocast:
    """bf16 mixed precision where the device has it."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type in ("cuda", "cpu"))


def pretrained(url: str, sha256: str) -> dict[str, Tensor]:
    """A state dict from torch.hub's cache, downloaded at first. UserError if it cannot be had."""
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    file = folder / f"{sha256[:8]}-{url.split('/')[-1]}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not file.exists() and os.environ.get("LOCAL_RANK", "0") == "0":  # once a machine
            torch.hub.download_url_to_file(url, str(file), sha256)
    except (OSError, RuntimeError) as error:
        raise UserError(f"cannot download {url} ({one_line(error)}); put the file at {file}") from error
    barrier()  # the other ranks wait for the download
    found = hashlib.sha256(file.read_bytes()).hexdigest()
    if not found.startswith(sha256):
        raise UserError(f"{file}: its sha256 is not {sha256}; put the file from {url} in its place")
    return torch.load(file, map_location="cpu", weights_only=True)


def beside(path: str | Path) -> Path:
    """A name beside `path` for this run alone to write to."""
    path = Path(path)
    return path.with_name(f"{path.stem}.{secrets.token_hex(4)}.unfinished{path.suffix}")


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A path to write to, which then takes `path`'s place. UserError if that fails."""
    unfinished = beside(path)
    try:
        yield unfinished
        with open(unfinished, "r+b") as file:
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except (OSError, RuntimeError) as error:  # PyTorch's writer turns the one into the other
        free = shutil.disk_usage(Path(path).parent).free / 2**20
        raise UserError(f"{path}: cannot be written ({one_line(error)}; {free:,.0f} MiB are free there); "
                        "what was there is untouched") from error
    finally:
        unfinished.unlink(missing_ok=True)


def write_checkpoint(path: Path, contents: dict) -> None:
    """The same bytes for the same contents: given a path, torch.save would store its name in the file."""
    with replacing(path) as unfinished, open(unfinished, "wb") as file:
        torch.save(contents, file)


def read_checkpoint(path: str | Path, kind: str) -> dict:
    """Contents of a checkpoint of this kind; never unpickles code. UserError if it is not one."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file; give the model.pt that a trainer has written")
    try:
        with zipfile.ZipFile(path) as file:  # PyTorch does not look at the CRC-32 of what is stored
            damaged = file.testzip()
        contents = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zipfile, pickle and PyTorch each raise their own
        name = type(error).__name__
        raise UserError(f"{path}: cannot be read as a checkpoint ({name}); is it whole?") from error
    if damaged:
        raise UserError(f"{path}: {damaged} is damaged (its CRC-32 is wrong); copy the file again")
    found = contents.get("kind", "?") if isinstance(contents, dict) else "?"
    if found != kind:
        raise UserError(f"{path}: holds a {found}, not a {kind}")
    return contents


def inference_state(module: nn.Module, **more) -> dict:
    """A module's config and its weights in half precision, as model.pt holds them."""
    weights = {name: weight.cpu().half() for name, weight in module.state_dict().items()}
    return {"config": asdict(module.config), "model": weights} | more


def from_fields(config: type, stored: dict, path: str | Path):
    """A dataclass from its stored fields. UserError if one is missing: no default stands in."""
    names = {field.name for field in fields(config)}
    different = sorted(names ^ set(stored))
    if different:
        names = ", ".join(different)
        raise UserError(f"{path}: was written by other code ({config.__name__}: {names}); train again")
    return config(**stored)


def build(module: type, config: type, contents: dict, path: str | Path,
          device: torch.device | str, *more) -> nn.Module:
    """A module for inference, from what `inference_state` has stored. UserError if it is damaged."""
    name = module.__name__
    try:
        built = module(from_fields(config, contents["config"], path), *more)
        built.load_state_dict(contents["model"])
    except (KeyError, TypeError, RuntimeError) as error:
        reason = one_line(error)
        raise UserError(f"{path}: the {name}'s weights do not fit its config ({reason})") from error
    for weight in built.state_dict().values():
        if not weight.isfinite().all():
            raise UserError(f"{path}: there is NaN or infinity among the {name}'s weights")
    return built.eval().requires_grad_(False).to(device)


def load_tokenizer(path: str | Path, device: torch.device | str = "cpu",
                   contents: dict | None = None) -> Tokenizer:
    """The tokenizer that train_vq.py wrote, or a generator's from its `contents`."""
    contents = read_checkpoint(path, "tokenizer") if contents is None else contents
    tokenizer = build(Tokenizer, TokenizerConfig, contents, path, device)
    return tokenizer.to(memory_format=torch.channels_last)


def load_generator(path: str | Path, device: torch.device | str = "cpu") -> tuple:
    """What train_gen.py wrote: RDPM, its Tokenizer, class names, Sampling."""
    contents = read_checkpoint(path, "generator")
    missing = {"tokenizer", "classes", "sampling"} - contents.keys()
    if missing:
        raise UserError(f"{path}: has no {' and no '.join(sorted(missing))}; train again")
    tokenizer = load_tokenizer(path, device, contents["tokenizer"])
    model = build(RDPM, GeneratorConfig, contents, path, device, tokenizer)
    model.requires_grad_()  # autocast keeps its bfloat16 copies only of weights that require gradients
    return model, tokenizer, contents["classes"], from_fields(Sampling, contents["sampling"], path)


def start_from(module: nn.Module, path: Path, kind: str, classes: list[str] | None = None) -> None:
    """--init: take a model.pt's weights; the label embedding starts anew if classes differ."""
    contents = read_checkpoint(path, kind)
    anew = ("class_",) if contents.get("classes") == classes else ("class_", "embed_y.")
    own = module.state_dict()
    taken = {name: weight for name, weight in contents["model"].items() if not name.startswith(anew)}
    for name in own.keys() | taken.keys():
        if name.startswith(anew):
            taken[name] = own[name]
        elif name not in own or name not in taken or taken[name].shape != own[name].shape:
            raise UserError(f"--init {path}: its {name} is not this run's; give the flags it had")
    if not all(weight.isfinite().all() for weight in taken.values()):
        raise UserError(f"--init {path}: there is NaN or infinity among its weights")
    module.load_state_dict(taken)


def data_parallel(module: nn.Module) -> nn.Module:
    """The module, or in a process group its DistributedDataParallel: rank 0's weights, sent once."""
    if dist.is_initialized():
        module = nn.parallel.DistributedDataParallel(module, gradient_as_bucket_view=True)
        module.broadcast_buffers = False     # from now on
        module.forward_sync_buffers = False  # PyTorch 2.14's name
    return module


def chunks(size: int, accum: int, *nets: nn.Module) -> Iterator[slice]:
    """A batch in `accum` slices; ranks exchange gradients after the last one's backward pass."""
    for i in range(accum):
        for net in nets:
            net.require_backward_grad_sync = i == accum - 1  # DistributedDataParallel's switch
        yield slice(i * size // accum, (i + 1) * size // accum)


def learning_rate(step: int, steps: int, base: float, warmup: int, final: float) -> float:
    """Linear warm-up, then linear from `base` to `final * base` (final = 1: constant)."""
    if step < warmup:
        return base * (step + 1) / warmup
    passed = (step - warmup) / max(steps - warmup, 1)
    return base * (1 + (final - 1) * passed)


def ignore_signals(_: int) -> None:
    """Data workers ignore what the trainer handles: it still needs them for its last step."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def image_grid(images: Tensor, columns: int) -> Image.Image:
    """Bytes (N, 3, H, W) as one picture; images under 96 pixels are enlarged without smoothing."""
    grid = torchvision.utils.make_grid(images.cpu(), columns, padding=1, pad_value=255)
    picture = Image.fromarray(grid.permute(1, 2, 0).numpy())
    times = max(1, 96 // images.shape[-1])
    return ImageOps.scale(picture, times, Image.Resampling.NEAREST)


class Means:
    """Means of what is logged, over steps, chunks and ranks; kept on the device."""

    def __init__(self) -> None:
        self.step: dict[str, Tensor] = {}
        self.totals: dict[str, Tensor] = {}

    def add(self, weight: Tensor | float, **values: Tensor) -> None:
        """A chunk's values, of any shape, with a weight for all or for each number in them."""
        for name, value in values.items():
            value = value.detach().float()
            total = torch.stack([value * weight, torch.ones_like(value) * weight])
            self.step[name] = self.step.get(name, 0) + total

    def end_step(self, skipped: Tensor) -> None:
        """Take the step's values, unless it was skipped because some of them were not finite."""
        for name, total in self.step.items():
            self.totals[name] = self.totals.get(name, 0) + torch.where(skipped > 0, 0, total)
        self.step = {}

    def flush(self) -> dict[str, float | list[float]]:
        means = {}
        for name, total in self.totals.items():
            sum_over_ranks(total)
            means[name] = (total[0] / total[1]).tolist()
        self.totals = {}
        return means


SIGNALS = [signal.SIGTERM, signal.SIGINT]
if hasattr(signal, "SIGHUP"):  # Windows has none
    SIGNALS.append(signal.SIGHUP)


class Run:
    """A training run: its folder, log.jsonl, progress bar, checkpoints and signals. Rank 0 writes.

    `with run:` stands around the loop over `run.steps(...)`: whatever ends it, its steps are saved.
    """

    def __init__(self, args: argparse.Namespace, device: torch.device) -> None:
        if args.batch % world_size() or args.accum > args.batch // world_size():
            wish = f"must give each of {world_size()} devices as many, --accum or more"
            raise UserError(f"--batch {args.batch}: {wish}")
        self.args = args
        self.device = device
        self.means = Means()
        self.stop_requested = False
        self.skipped_in_a_row = torch.zeros((), device=device)
        self.taken = torch.zeros((), device=device)
        self.done = 0   # steps
        self.saved = 0  # of these
        self.resumes = from_rank_0(self.open_folder)

    def open_folder(self) -> bool:
        """Make --out, or refuse to write over a run. Returns whether this one goes on with it."""
        out = self.args.out
        there = (out / "state.pt").exists()
        if self.args.resume and not there and (out / "model.pt").exists():
            raise UserError(f"--resume: {out} holds a model.pt, but no state.pt; choose another --out")
        if not self.args.resume and (there or (out / "model.pt").exists()):
            raise UserError(f"--out {out} already holds a run; continue it with --resume, or choose another")
        out.mkdir(parents=True, exist_ok=True)
        self.file = open(out / "log.jsonl", "a", buffering=1)  # noqa: SIM115
        try:
            import fcntl
            fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until the process ends
        except BlockingIOError as error:
            raise UserError(f"--out {out}: another run is writing there; choose another") from error
        except (ImportError, OSError):  # Windows, and some network file systems, have no such locks
            pass
        return there

    def restore(self, kind: str, identity: dict, images: Images, modules: dict,
                model_file: Callable[[], dict]) -> None:
        """Put a resumed run's modules and optimizers back. UserError if state.pt is another run's.

        identity: what must be the same. Images may have come or gone, if their classes are the same.
        model_file: what model.pt holds beside its kind and step.
        """
        self.kind = kind
        flags = {"seed": self.args.seed, "batch": self.args.batch}
        self.identity = identity | flags | {"classes": images.classes}
        self.counts = np.bincount(images.labels, minlength=len(images.classes)).tolist()
        self.modules = modules
        self.model_file = model_file
        if not self.resumes:
            return
        path = self.args.out / "state.pt"
        contents = read_checkpoint(path, f"{kind}-training")
        for name, value in self.identity.items():
            was = contents["config"].get(name)
            if was != value:
                change = f"{name} = {str(was)[:60]}, not {str(value)[:60]}"
                raise UserError(f"--resume: {path} was trained with {change}; give the same flags")
        changed = np.abs(np.subtract(contents["counts"], self.counts)).sum()
        if changed and rank() == 0:
            tqdm.write(f"--resume: {changed} images have come or gone since {path}", sys.stderr)
        try:
            for name, module in modules.items():
                module.load_state_dict(contents["modules"][name])
        except (KeyError, ValueError, RuntimeError) as error:
            reason = one_line(error)
            raise UserError(f"--resume: {path} is of other code ({reason}); go on with that") from error
        self.saved = self.done = contents["step"]
        self.write_model()  # the last run may have ended between the two files

    def save(self) -> None:
        """state.pt, then model.pt. No random state: all that is drawn follows from (seed, step)."""
        self.saved = self.done
        if rank() == 0:
            modules = {name: module.state_dict() for name, module in self.modules.items()}
            state = {"kind": f"{self.kind}-training", "config": self.identity, "counts": self.counts,
                     "step": self.done, "modules": modules}
            write_checkpoint(self.args.out / "state.pt", state)
        self.write_model()

    def write_model(self) -> None:
        if rank() == 0:
            contents = {"kind": self.kind, "step": self.done} | self.model_file()
            write_checkpoint(self.args.out / "model.pt", contents)

    def begin(self, network: nn.Module, images: Images) -> None:
        """Say what runs where, here and in the log, show the bar, and listen to signals."""
        threads = f"{torch.get_num_threads()} threads"
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else threads
        parameters = sum(weight.numel() for weight in network.parameters())
        device = f"{self.device}, {name}"
        self.record(command=shlex.join(sys.argv), torch=torch.__version__, device=device,
                    world=world_size(), parameters=parameters, args=vars(self.args))
        if rank() == 0:
            text = f"{images}; {parameters / 1e6:.1f} M parameters; {world_size()} x {device}"
            tqdm.write(text, sys.stderr)
        self.bar = tqdm(total=self.total, initial=self.done, unit="step", disable=rank() > 0,
                        mininterval=0.5 if sys.stderr.isatty() else 30.0)
        self.last_line = time.perf_counter(), self.done
        for number in SIGNALS:
            signal.signal(number, self.on_signal)

    def steps(self, network: nn.Module, data: torch.utils.data.Dataset, images: Images, flip: bool,
              workers: int, optimizers: list[torch.optim.Optimizer],
              evaluate: Callable[[int], None]) -> Iterator[tuple]:
        """The training loop: yields step, the numbers of this rank's images, batch.

        Between two steps it sets the rate, logs, saves, evaluates, and stops after a signal. A resumed run
        evaluates where it begins, if that was due: the signal may have come in between.
        """
        args = self.args
        epoch = len(images) / args.batch
        warmup = max(1, round(0.5 * epoch)) if args.warmup is None else args.warmup                 # (4.2)
        self.total = max(args.steps or round(args.epochs * epoch), 1, self.done)
        to_do = range(self.done, self.total)
        loader = torch.utils.data.DataLoader(
            data, batch_sampler=global_batches(len(images), args.batch, to_do, args.seed, flip),
            num_workers=workers, pin_memory=self.device.type == "cuda", worker_init_fn=ignore_signals)
        self.begin(network, images)
        if self.resumes and self.due():
            evaluate(self.done)
        for step, batch in enumerate(loader, start=self.done):
            lr = learning_rate(step, self.total, args.lr, warmup, args.lr_final)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = lr
            # What is drawn for an image depends on its place in the global batch, not on the rank.
            first = TRAINING_NUMBERS + step * args.batch
            numbers = range(first, first + args.batch)
            yield step, numbers[rank_slice(args.batch)], batch
            self.done = step + 1
            self.bar.update()
            if self.done % args.log_every == 0 or self.done == self.total:
                self.log(lr)
            stop = self.agree_to_stop()
            if stop or self.due():
                self.save()
            if stop and self.done < self.total:
                self.exit_interrupted()
            if self.due():
                self.bar.set_description("evaluating")
                evaluate(self.done)
                self.bar.set_description("")
        self.bar.close()

    def due(self) -> bool:
        """Whether this step has a checkpoint and a picture grid."""
        return self.done % self.args.save_every == 0 or self.done == self.total

    def take_step(self, optimizers: list[torch.optim.Optimizer], *norms: Tensor) -> None:
        """Step fused optimizers, unless a logged value or norm of any rank is NaN or infinite."""
        # As torch.amp.GradScaler does it: `found_inf` stays on the GPU.
        values = [total.sum() for total in self.means.step.values()]
        values += [norm.to(self.device) for norm in norms]  # the norm of no gradients lies on the CPU
        skipped = (~torch.stack(values).isfinite()).any().float()
        sum_over_ranks(skipped)
        skipped.clamp_(max=1)
        for optimizer in optimizers:
            optimizer.found_inf = skipped
            if self.device.type in SKIPS_BY_ITSELF or not skipped:
                optimizer.step()
            optimizer.zero_grad()
        self.means.end_step(skipped)
        self.grad_norm = norms[0]
        self.taken += 1 - skipped
        self.skipped_in_a_row = (self.skipped_in_a_row + 1) * skipped

    def record(self, **values) -> None:
        """A line of log.jsonl."""
        if rank() == 0:  # JSON has no NaN, which is also the mean of a t that no image has drawn
            text = json.dumps(values, default=str)
            text = re.sub(r"(?<=[ \[])-?(NaN|Infinity)(?=[,\]}])", "null", text)
            self.file.write(text + "\n")

    def log(self, lr: float) -> None:
        """A line for the bar and for log.jsonl."""
        now = time.perf_counter()
        then, before = self.last_line
        self.last_line = now, self.done
        steps = self.done - before
        means = self.means.flush()
        loss = means.pop("loss", math.nan)
        grad_norm = self.grad_norm.item()
        rate = steps * self.args.batch / (now - then)
        memory = torch.cuda.max_memory_allocated() / 2**30 if self.device.type == "cuda" else 0.0
        text = f"loss {loss:.4f}, lr {lr:.1e}, grad {grad_norm:.2f}, {rate:.3g} img/s"
        self.bar.set_postfix_str(text + f", {memory:.1f} GiB" * (memory > 0), refresh=False)
        skipped = steps - round(self.taken.item())
        self.record(step=self.done, loss=loss, lr=lr, grad_norm=grad_norm, images_per_s=round(rate, 1),
                    skipped_steps=skipped, **means)
        self.taken.zero_()
        in_a_row = round(self.skipped_in_a_row.item())
        if in_a_row >= max(2, steps) or in_a_row and self.done == self.total:
            good = self.done - in_a_row
            raise UserError(f"no step after {good} had a finite loss and gradient: lower --lr")

    def on_signal(self, number: int, _) -> None:
        """A cluster takes its machine back, a terminal closes, Ctrl-C: finish the step, save, exit."""
        self.stop_requested = True
        # The second Ctrl-C ends the run at once; launchers may send SIGTERM more than once.
        signal.signal(number, signal.SIG_DFL if number == signal.SIGINT else signal.SIG_IGN)

    def agree_to_stop(self) -> bool:
        """Whether any rank was told to stop: several ranks ask each other at log steps only."""
        if world_size() > 1 and self.done % self.args.log_every:
            return False
        votes = torch.tensor(float(self.stop_requested))
        sum_over_ranks(votes)
        return bool(votes)

    def exit_interrupted(self) -> None:
        """End the process after a signal; the state of this step has been saved."""
        barrier()  # a launcher that sees one rank end may kill the one that is still writing
        if rank() == 0:
            text = f"told to stop: saved after step {self.done}; the same command with --resume goes on"
            tqdm.write(text, sys.stderr)
        sys.exit(75)  # EX_TEMPFAIL of sysexits.h: try again

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, _) -> None:
        """An unreadable image, a dead worker, a closed pipe: no finished step is lost."""
        if isinstance(error, Exception) and self.done > self.saved:
            self.save()


def bounded(number: type, low: float, high: float, text: str) -> float:
    value = number(text)
    if not low < value < high:
        least = "above 0" if low == 0 else "from 0 up"
        raise argparse.ArgumentTypeError(f"{text} is not {least}, and below {high}")
    return value


positive_int = partial(bounded, int, 0, 10**7)
natural_int = partial(bounded, int, -1, 2**32)
positive_float = partial(bounded, float, 0, 10**7)
natural_float = partial(bounded, float, -1e-9, 10**7)
for bound in (positive_int, natural_int, positive_float, natural_float):
    bound.__name__ = "number"  # in argparse's errors


def parse_training_args(parser: argparse.ArgumentParser, stage: str) -> argparse.Namespace:
    """Add the flags both trainers share, with the preset's defaults for `stage`, "vq" or "gen"."""
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="imagenet", help="Defaults of most flags [imagenet: the paper's].")
    add("--data", help="shapes, mnist, cifar10, or a folder with one folder of images per class [the preset's].")
    add("--out", type=Path, help=f"The run's folder [runs/PRESET-{stage}].")
    add("--epochs", type=positive_float, help="Passes over the data [the preset's].")
    add("--steps", type=positive_int, help="Optimizer steps, instead of --epochs.")
    add("--batch", type=positive_int, help="Images in a step, over all devices [the preset's].")
    add("--lr", type=positive_float, help="Peak learning rate [the preset's].")
    add("--warmup", type=natural_int, help="Steps in which the rate rises [the preset's].")
    add("--seed", type=natural_int, default=0, help="Of weights, order, noise [0].")
    add("--accum", type=positive_int, default=1, help="Backward passes a step: they divide the memory [1].")
    add("--init", type=Path, metavar="MODEL", help="Start from the weights of a model.pt.")
    add("--resume", action="store_true", help="Continue the run in --out, or begin it.")
    add("--device", help="cuda, mps or cpu [the best there is].")
    add("--compile", action=argparse.BooleanOptionalAction, help="Use torch.compile [on CUDA].")
    add("--workers", type=natural_int, default=min(8, os.cpu_count() or 1),
        help="Data workers of each process [%(default)s].")
    add("--log-every", type=positive_int, default=50, help="Steps between log lines [50].")
    add("--save-every", type=positive_int, default=1000, help="Steps between checkpoints and picture grids [1000].")
    name = parser.parse_known_args()[0].preset
    preset = PRESETS[name]
    parser.set_defaults(out=Path(f"runs/{name}-{stage}"), data=preset["data"])
    parser.set_defaults(**preset[f"train_{stage}"])
    if stage == "vq":
        parser.set_defaults(**asdict(TokenizerConfig(**preset["tokenizer"])))
    args = parser.parse_args()
    if args.compile is None:
        args.compile = torch.cuda.is_available() and args.device != "cpu"
    return args


def run_main(main: Callable[[], None]) -> None:
    """Run a script: bad input, and more than memory can hold, end with one line and exit code 2."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that unfinished files are removed
    try:
        main()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        compiler = type(error).__module__.startswith(("torch._dynamo", "torch._inductor"))
        if compiler:
            error = UserError("--compile: PyTorch finds no working compiler here; give --no-compile")
        expected = isinstance(error, (UserError, OSError, MemoryError))
        if not expected and not re.search("of memory|allocate mem|DataLoader worker", str(error)):
            raise
        for bar in list(tqdm._instances):  # or they would write over the message
            bar.close()
        print(f"error: {one_line(error)}", file=sys.stderr)
        sys.exit(2)
    finally:
        if hasattr(signal, "SIGCHLD"):
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler would raise
        for worker in multiprocessing.active_children():
            worker.kill()  # data workers, which ignore what would end them
        if dist.is_initialized():
            dist.destroy_process_group()
