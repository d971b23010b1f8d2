"""Tests: identities against plain code written here from the paper. Run `pytest -q test_rdpm.py`."""

import argparse
import copy
import json
import math
import multiprocessing
import os
import pickle
import re
import runpy
import signal
import socket
import struct
import subprocess
import sys
import urllib.error
import zlib
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import nn

import fid
import rdpm
import sample
import train_gen
import train_vq
from rdpm import RDPM, GeneratorConfig, GlobalBatches, Tokenizer, TokenizerConfig, UserError

HERE = Path(__file__).parent
TOY = {"image_size": 16, "channels": 8, "multipliers": (1, 2), "res_blocks": 1, "d": 4, "K": 16, "T": 5}
CLASSES = 3
torch.set_num_threads(1)


def toy_tokenizer(**changes) -> Tokenizer:
    """A tokenizer with random weights, the bias convolution's (zero at initialisation) included."""
    torch.manual_seed(0)
    tokenizer = Tokenizer(TokenizerConfig(**(TOY | changes)))
    if tokenizer.quantizer.bias is not None:
        nn.init.normal_(tokenizer.quantizer.bias.weight, std=0.15)
        nn.init.normal_(tokenizer.quantizer.bias.bias, std=0.15)
    return tokenizer


def toy_generator(tokenizer: Tokenizer, depth: int = 1, **changes) -> RDPM:
    """A generator whose weights are all random, so that no gate is closed and every input matters."""
    torch.manual_seed(1)
    model = RDPM(GeneratorConfig(depth, CLASSES, **changes), tokenizer)
    for weight in [*model.parameters(), model.mean]:
        nn.init.normal_(weight, std=0.15)
    return model.requires_grad_(False)


def latents(tokenizer: Tokenizer, batch: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """v (B, n, d), normalised like the encoder's, and eps (T, B, n, d)."""
    c, g = tokenizer.config, torch.Generator().manual_seed(seed)
    v = F.layer_norm(torch.randn(batch, c.tokens, c.d, generator=g), (c.d,))
    return v, torch.randn(c.T, batch, c.tokens, c.d, generator=g)


def close(a, b, tolerance=1e-5) -> None:
    a, b = torch.as_tensor(a).double(), torch.as_tensor(b).double()
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# ------------------------------------------------------------------------------------------------------------
# Schedules and noise
# ------------------------------------------------------------------------------------------------------------


def alpha_by_hand(schedule: str, t: int, T: int) -> float:
    return {"sin": math.sin(math.pi * t / (2 * T)), "linear": t / T, "pow": 0.75 ** (T - t)}[schedule]


@pytest.mark.parametrize("schedule", ["sin", "linear", "pow"])
def test_alpha_schedules_by_hand(schedule):
    for T in (1, 2, 10):
        q = toy_tokenizer(schedule=schedule, T=T).quantizer
        close(q.alpha, [alpha_by_hand(schedule, t, T) for t in range(1, T + 1)])
        close(q.alpha**2 + q.beta**2, torch.ones(T))
        assert q.alpha[-1] == 1 and q.beta[-1] == 0 and (q.alpha.diff() > 0).all()


def test_phi_is_the_base_of_pow():
    close(rdpm.alpha_schedule("pow", 3, 0.5), [0.25, 0.5, 1])


def test_lambda_schedules_by_hand():
    assert rdpm.lambda_schedule("constant", 1.5, 3) == [1.5, 1.5, 1.5]
    assert rdpm.lambda_schedule("linear", 1.5, 4) == [0, 0.5, 1.0, 1.5]
    assert rdpm.lambda_schedule("linear", 1.5, 1) == [0]


def test_noise_of_an_image_is_its_own():
    """It depends on (seed, number) only: not on the batch, and no two pairs share it."""
    batch = rdpm.image_noise(7, [0, 1, 2, 3], (5, 3), "cpu")
    assert torch.equal(batch[[2]], rdpm.image_noise(7, [2], (5, 3), "cpu"))
    assert torch.equal(batch[[3, 0]], rdpm.image_noise(7, [3, 0], (5, 3), "cpu"))
    every = torch.cat([rdpm.image_noise(seed, range(5), (4,), "cpu") for seed in range(5)])
    assert len(every.unique(dim=0)) == 25
    many = rdpm.image_noise(0, range(500), (40,), "cpu")
    assert scipy.stats.kstest(many.flatten().numpy(), "norm").pvalue > 1e-3


def test_tokenizer_noise_is_image_noise():
    tokenizer = toy_tokenizer()
    eps = tokenizer.noise(3, [8, 5], "cpu")
    assert torch.equal(eps[:, 1], rdpm.image_noise(3, [5], (5, 64, 4), "cpu")[0])


# ------------------------------------------------------------------------------------------------------------
# Alg. 1, Eq. (2), Eq. (4)
# ------------------------------------------------------------------------------------------------------------


def nearest_by_hand(codebook, rows):
    """Index of the nearest entry of each row, one row at a time."""
    return torch.tensor([int((codebook - row).square().sum(1).argmin()) for row in rows])


def lookup_by_hand(q, codes):
    """Entries plus the 3 x 3 bias convolution (zero padding), one output token at a time."""
    rows = []
    for image in codes:
        e = q.codebook[image]
        for p in range(len(image)):
            r, c = divmod(p, q.side)
            out = e[p]
            if q.bias is not None:
                out = out + q.bias.bias
                for i in range(max(r - 1, 0), min(r + 2, q.side)):
                    for j in range(max(c - 1, 0), min(c + 2, q.side)):
                        out = out + q.bias.weight[:, :, i - r + 1, j - c + 1] @ e[i * q.side + j]
            rows.append(out)
    return torch.stack(rows).view(*codes.shape, -1)


def algorithm_1(q, schedule, weight, stop, v, eps):
    """The paper's Algorithm 1 line by line, and Eq. (4). Returns C_t, z'_t, the loss, mean squares of z_t."""
    z, vq, z_sum = v, 0, 0                                                      # line 1
    all_codes, sums, loss, residual = [], [], 0, []
    for t in range(1, q.T + 1):                                                 # line 2
        alpha = alpha_by_hand(schedule, t, q.T)
        z = z - (vq.detach() if stop and t > 1 else vq)                         # line 3
        v_t = alpha * z + math.sqrt(1 - alpha**2) * eps[t - 1]                  # line 4
        codes = torch.stack([nearest_by_hand(q.codebook.detach(), image.detach()) for image in v_t])
        vq = lookup_by_hand(q, codes)                                           # line 5
        z_sum = z_sum + vq                                                      # line 6
        all_codes.append(codes)
        sums.append(z_sum)
        error = (v_t - vq).square().mean()                                      # Eq. (4)
        if stop:                                                                # VQ-VAE's two terms
            error = (v_t.detach() - vq).square().mean() + 0.25 * (v_t - vq.detach()).square().mean()
        loss = loss + (alpha if weight else 1) * error
        residual.append(z.square().mean().item())
    return torch.stack(all_codes), torch.stack(sums), loss, residual


@pytest.mark.parametrize(("schedule", "bias", "weight", "stop"), [
    ("sin", True, True, False), ("linear", True, False, False), ("pow", True, True, False), ("pow", False, True, False),
    ("sin", False, False, False), ("pow", True, True, True), ("sin", False, False, True)])
def test_quantiser_is_algorithm_1_and_its_loss_and_gradients_are_eq_4(schedule, bias, weight, stop):
    """Codes, sums and loss; and the loss's gradients reach v, codebook and bias, with and without stop-gradients."""
    tokenizer = toy_tokenizer(schedule=schedule, bias=bias, weight=weight, stop_gradients=stop, image_size=8)
    q, exact = tokenizer.quantizer, copy.deepcopy(tokenizer.quantizer).double()
    v, eps = latents(tokenizer, 2)
    v_exact = v.double().requires_grad_()
    v.requires_grad_()
    codes, sums, loss, residual = algorithm_1(exact, schedule, weight, stop, v_exact, eps.double())
    found = q(v, eps)
    assert torch.equal(found.codes, codes)
    assert found.eps is eps
    close(found.z_sum, sums[-1])
    value = loss / 1.25 if stop else loss  # both of VQ-VAE's terms have the same value
    close(found.loss, value)
    close(found.residual, residual)
    close(((q.gamma if weight else 1) * found.error).sum(), value)
    found.loss.backward()
    loss.backward()
    close(v.grad, v_exact.grad)
    assert v.grad.abs().sum() > 0
    for ours, by_hand in zip(q.parameters(), exact.parameters(), strict=True):
        assert by_hand.grad.abs().sum() > 0
        close(ours.grad, by_hand.grad)


def test_sums_of_lookups_and_the_recursion_of_residuals():
    """z'_T is the sum of the looked-up codes; v - z'_t = z_{t+1} = z_t - v'_t."""
    tokenizer = toy_tokenizer()
    q = tokenizer.quantizer
    v, eps = latents(tokenizer, 3)
    found = q(v, eps)
    close(sum(q.lookup(codes) for codes in found.codes), found.z_sum)
    z_sum, z_next = torch.zeros_like(v), v
    for t in range(1, q.T + 1):
        z_sum, codes, z, _ = q.step(t, z_sum, v, eps[t - 1])
        assert torch.equal(codes, found.codes[t - 1])
        close(z, z_next)
        z_next = z - q.lookup(codes)
        close(v - z_sum, z_next)


def test_without_noise_and_bias_it_is_a_plain_residual_vq():
    tokenizer = toy_tokenizer(bias=False)
    q = tokenizer.quantizer
    q.alpha.fill_(1)
    q.beta.fill_(0)
    v, eps = latents(tokenizer, 2)
    left = v
    for codes in q(v, eps).codes:
        assert torch.equal(codes.flatten(), nearest_by_hand(q.codebook, left.flatten(0, 1)))
        left = left - q.codebook[codes]


def test_bias_starts_at_zero_and_codebook_at_unit_scale():
    q = Tokenizer(TokenizerConfig(**(TOY | {"K": 4096}))).quantizer
    codes = torch.randint(0, 4096, (2, 64))
    assert torch.equal(q.lookup(codes), q.codebook[codes])
    assert abs(q.codebook.std() - 1) < 0.05


@pytest.mark.parametrize(("K", "rows"), [(37, 300), (640, 3500), (1000, 2500)])
def test_nearest_is_a_naive_search_in_every_run_and_chunk(K, rows):
    """Runs of 1, 128 and 8 entries; the last two need two chunks."""
    q = toy_tokenizer(K=K).quantizer
    rows = torch.randn(rows, 4)
    assert torch.equal(q.nearest(rows), nearest_by_hand(q.codebook.double(), rows.double()))
    assert torch.equal(q.nearest(rows.view(4, -1, 4)), q.nearest(rows).view(4, -1))


def test_autocast_does_not_change_codes():
    """Encoding, training input and sampling stay in float32, whatever autocast says."""
    tokenizer = toy_tokenizer(K=512, d=8)
    q = tokenizer.quantizer
    v, eps = latents(tokenizer, 4)
    expected, t = q(v, eps), torch.tensor([5, 1, 3, 4])
    inputs = q.training_input(v, eps, t)
    with torch.autocast("cpu", torch.bfloat16):
        found = q(v, eps)
        assert torch.equal(found.codes, expected.codes) and torch.equal(found.z_sum, expected.z_sum)
        assert all(torch.equal(a, b) for a, b in zip(q.training_input(v, eps, t), inputs, strict=True))
        z_sum = torch.zeros_like(v)
        for s in range(q.T):
            z_sum, *_ = q.step(s + 1, z_sum, codes=expected.codes[s])
        assert torch.equal(z_sum, expected.z_sum)


def test_training_input_is_the_samplers_state_given_the_codes():
    """For mixed t: z'_{t-1} is what the sampler holds before step t, the target is Alg. 1's C_t."""
    tokenizer = toy_tokenizer()
    q = tokenizer.quantizer
    t = torch.tensor([3, 1, 5, 2, 5, 1, 4])
    v, eps = latents(tokenizer, len(t))
    codes = q(v, eps).codes
    z_sum, target = q.training_input(v, eps, t)
    for i in range(len(t)):
        state = torch.zeros(1, 64, 4)
        for s in range(1, int(t[i])):
            state, *_ = q.step(s, state, codes=codes[s - 1, [i]])
        close(z_sum[[i]], state)
        assert torch.equal(target[i], codes[t[i] - 1, i])


def test_encoder_normalises_each_token():
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.autocast("cpu", torch.bfloat16):
        v = toy_tokenizer().encode(x)
    assert v.dtype == torch.float32 and v.shape == (2, 64, 4)
    close(v.mean(-1), torch.zeros(2, 64))
    close(v.var(-1, unbiased=False), torch.ones(2, 64), 1e-2)


def test_tokens_lie_row_by_row():
    """A change in the image's top right corner changes the tokens there most; and the decoder's way back."""
    tokenizer = toy_tokenizer(image_size=32)
    x = torch.zeros(1, 3, 32, 32)
    y = x.clone()
    y[:, :, :4, -4:] = 1
    change = (tokenizer.encode(x) - tokenizer.encode(y)).square().sum(-1).view(16, 16)
    assert change[:6, -6:].mean() > 3 * max(change[:6, :6].mean(), change[-6:, -6:].mean())
    z = torch.zeros(1, 256, 4)
    z_changed = z.view(1, 16, 16, 4).clone()
    z_changed[:, :2, -2:] = 3
    change = (tokenizer.decode(z) - tokenizer.decode(z_changed.view(1, 256, 4))).square().sum(1)[0]
    assert change[:8, -8:].mean() > 3 * max(change[:8, :8].mean(), change[-8:, -8:].mean())


def test_decoders_gradient_goes_straight_through():
    """The decoder sees z'_T; its gradient goes to v as if z'_T were v, and not to the codebook."""
    tokenizer = toy_tokenizer()
    x, eps = torch.rand(2, 3, 16, 16), latents(tokenizer, 2)[1]
    x_rec, v, quantized = tokenizer(x, eps)
    z_sum = quantized.z_sum.detach().requires_grad_()
    decoded = tokenizer.decode(z_sum)
    close(x_rec, decoded, 1e-4)
    expected, = torch.autograd.grad(decoded.square().sum(), z_sum)
    learnt = (v, tokenizer.quantizer.codebook)
    found, codebook_gradient = torch.autograd.grad(x_rec.square().sum(), learnt, allow_unused=True)
    close(found, expected, 1e-3)
    assert codebook_gradient is None


# ------------------------------------------------------------------------------------------------------------
# Tokenizer losses
# ------------------------------------------------------------------------------------------------------------


def test_hinge_loss_by_hand():
    real, fake = [2.0, 0.5, -1.0], [-3.0, 0.25]
    expected = (sum(max(0, 1 - r) for r in real) / 3 + sum(max(0, 1 + f) for f in fake) / 2) / 2
    close(rdpm.hinge_loss(torch.tensor(real), torch.tensor(fake)), expected)


def test_adaptive_weight_by_hand():
    """|d loss / d last| / (|d gan / d last| + 1e-4), no gradient through it, at most 10,000."""
    last = torch.tensor([1.0, 2.0], requires_grad=True)
    a, b = torch.tensor([3.0, 4.0]), torch.tensor([0.0, 2.0])
    weight = rdpm.adaptive_weight((a * last).sum(), (b * last).sum(), last)
    close(weight, 5 / 2.0001)
    assert not weight.requires_grad
    close(rdpm.adaptive_weight((a * last).sum(), (0 * last).sum(), last), 1e4)


def small_vgg16(**_) -> nn.Module:
    """torchvision's VGG16 without the 120 million weights of its last layers, which LPIPS does not use."""
    network = nn.Module()
    network.features = torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs["D"])
    return network


def test_lpips_is_the_lpips_package(monkeypatch):
    """With the same random VGG16 and the package's own linear weights."""
    lpips = pytest.importorskip("lpips")
    monkeypatch.setattr(torchvision.models, "vgg16", small_vgg16)
    torch.manual_seed(0)
    theirs = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
    for weight in theirs.net.parameters():
        if weight.ndim > 1:
            nn.init.kaiming_normal_(weight)  # deep features must differ too
    vgg16 = {"features." + key.split(".", 1)[1]: weight for key, weight in theirs.net.state_dict().items()}
    linear = torch.load(Path(lpips.__file__).parent / "weights/v0.1/vgg.pth", "cpu", weights_only=True)
    ours = rdpm.LPIPS(vgg16, linear)
    x, y = torch.rand(2, 2, 3, 40, 36) * 2 - 1
    close(ours(x, y) / theirs(x, y).mean(), 1)
    assert ours(x, y) > 0 and ours(x, x) == 0


# ------------------------------------------------------------------------------------------------------------
# Transformer, Eqs. (6) and (7)
# ------------------------------------------------------------------------------------------------------------


def some_inputs(tokenizer: Tokenizer, batch: int = 4):
    """(eps_t, y, t, z'_{t-1}), all different."""
    v, eps = latents(tokenizer, batch)
    t = torch.arange(batch) % tokenizer.config.T + 1
    return eps[0], torch.arange(batch) % (CLASSES + 1), t, v


def test_closed_gates_make_blocks_the_identity():
    """At first blocks are closed: their weights, `ada` apart, do not matter; and the head is zero."""
    tokenizer = toy_tokenizer()
    model = RDPM(GeneratorConfig(2, CLASSES), tokenizer)
    assert (model(*some_inputs(tokenizer))[0] == 0).all()
    nn.init.normal_(model.head.weight)
    before = model(*some_inputs(tokenizer))[0]
    for block in model.blocks:
        for name, weight in block.named_parameters():
            assert name.startswith("ada") == bool((weight == 0).all())
            if not name.startswith("ada"):
                nn.init.normal_(weight)
    assert torch.equal(model(*some_inputs(tokenizer))[0], before)
    assert before.abs().sum() > 0


def test_every_input_matters_to_an_open_model():
    tokenizer = toy_tokenizer()
    model, inputs = toy_generator(tokenizer), some_inputs(tokenizer)
    before, (eps, y, t, z_sum) = model(*inputs)[0], inputs
    for i, other in enumerate((eps + 1, (y + 1) % (CLASSES + 1), t % 5 + 1, z_sum + 1)):
        changed = [other if i == j else value for j, value in enumerate(inputs)]
        assert ((model(*changed)[0] - before).abs().amax((1, 2)) > 1e-4).all()


def layer_norm_by_hand(x):
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()


def turned_by_hand(x, side):
    """2-D rotary positions of one head's x (n, head_dim), pair by pair: half turn by row, half by column."""
    out, pairs = torch.empty_like(x), x.shape[1] // 2
    for p in range(len(x)):
        for i in range(pairs):
            place = p // side if i < pairs // 2 else p % side
            angle = place * 100.0 ** (-2 * (i % (pairs // 2)) / pairs)
            a, b = x[p, i], x[p, i + pairs]
            out[p, i] = a * math.cos(angle) - b * math.sin(angle)
            out[p, i + pairs] = a * math.sin(angle) + b * math.cos(angle)
    return out


def test_block_by_hand():
    """AdaLN, attention head by head, rotary positions, SwiGLU and gates."""
    torch.manual_seed(0)
    width, heads, side = 16, 2, 3
    block = rdpm.Block(width, heads).double()
    for weight in block.parameters():
        nn.init.normal_(weight, std=0.5)
    x, c = torch.randn(2, side**2, width).double(), torch.randn(2, width).double()
    angles = rdpm.rotary_angles(side, width // heads).double()
    found = block(x, c, angles.cos(), angles.sin())
    for image in range(2):
        ada = (block.ada.weight @ c[image] + block.ada.bias).view(6, width)
        shift1, scale1, gate1, shift2, scale2, gate2 = ada
        h = layer_norm_by_hand(x[image]) * (1 + scale1) + shift1
        q, k, v = (h @ w.T for w in block.qkv.weight.view(3, width, width))
        outs = []
        for head in range(heads):
            part = slice(head * width // heads, (head + 1) * width // heads)
            scores = turned_by_hand(q[:, part], side) @ turned_by_hand(k[:, part], side).T
            scores = scores / math.sqrt(width / heads)
            weights = scores.exp() / scores.exp().sum(1, keepdim=True)
            outs.append(weights @ v[:, part])
        y = x[image] + gate1 * (torch.cat(outs, 1) @ block.out.weight.T)
        h = layer_norm_by_hand(y) * (1 + scale2) + shift2
        gate, up = (h @ w.T for w in block.gate_up.weight.view(2, -1, width))
        y = y + gate2 * ((gate / (1 + (-gate).exp()) * up) @ block.down.weight.T)
        close(found[image], y, 1e-5)


@pytest.mark.parametrize("shape", [(2, 3, 5, 4), (1, 1, 64, 16)])
def test_attention_is_pytorchs(shape):
    """What a CPU computes is what the fused kernel computes on a GPU; gradients too."""
    torch.manual_seed(0)
    ours, theirs = (torch.randn(3, *shape, generator=torch.Generator().manual_seed(0)).requires_grad_() for _ in "ab")
    weights = torch.randn(shape)
    for function, qkv in ((rdpm.attention, ours), (F.scaled_dot_product_attention, theirs)):
        (function(*qkv) * weights).sum().backward()
    close(rdpm.attention(*ours), F.scaled_dot_product_attention(*theirs))
    close(ours.grad, theirs.grad)


@torch.no_grad()
@pytest.mark.parametrize("head", ["linear", "codebook"])
def test_prepared_sampling_changes_no_bit(head):
    tokenizer = toy_tokenizer()
    model, cpu = toy_generator(tokenizer, depth=2, head=head), torch.device("cpu")
    with rdpm.autocast(cpu):
        before = model(*some_inputs(tokenizer))[0]
        rdpm.prepare_sampling(model, cpu, compiled=False)
        assert torch.equal(model(*some_inputs(tokenizer))[0], before)
    assert {name for name, w in model.named_parameters() if w.dtype == torch.float32} == {"embed_y.weight"} | (
        {"log_s"} if head == "codebook" else set())
    assert all(block.ada.weight.dtype == torch.bfloat16 for block in model.blocks)


def test_rotary_products_depend_on_the_offset_only():
    side, q, k = 6, torch.randn(32).double(), torch.randn(32).double()
    angles = rdpm.rotary_angles(side, 32).double()
    cos, sin = angles.cos(), angles.sin()
    q, k = (rdpm.rotate(x.expand(1, 1, side**2, 32), cos, sin)[0, 0] for x in (q, k))
    products = (q @ k.T).view(side, side, side, side)  # [row, column] of q, then of k
    close(products[:-1, :-1, :-1, :-1], products[1:, 1:, 1:, 1:])
    close(products[:-1, :, :-1, :], products[1:, :, 1:, :])
    offsets = {(i, j): products[2, 2, 2 + i, 2 + j].item() for i in range(-2, 3) for j in range(-2, 3)}
    assert len({round(product, 6) for product in offsets.values()}) == 25


@pytest.mark.parametrize(("depth", "millions"), [(12, 133), (16, 310), (20, 602)])
def test_sizes_of_table_1(depth, millions):
    with torch.device("meta"):
        model = RDPM(GeneratorConfig(depth), Tokenizer(TokenizerConfig()))
    count = sum(weight.numel() for weight in model.parameters())
    assert abs(count / 1e6 / millions - 1) < 0.005
    assert model.config.width == {12: 768, 16: 1024, 20: 1280}[depth]
    assert model.blocks[0].heads == depth and len(model.blocks) == depth


def test_codebook_head_with_the_true_v_gives_the_tokenizers_codes():
    """Its logits are -|v_t - e_k|^2 / 2, scaled by the step and by the token's doubt."""
    tokenizer = toy_tokenizer()
    model = RDPM(GeneratorConfig(1, CLASSES, head="codebook", patch=2), tokenizer).requires_grad_(False)
    t = torch.arange(10) % 5 + 1
    v, eps = latents(tokenizer, 10)
    z_sum, codes = tokenizer.quantizer.training_input(v, eps, t)
    eps_t = eps[t - 1, torch.arange(10)]
    doubt = torch.rand(10, 64, 1)
    model.mean.copy_(torch.randint(-2, 3, model.mean.shape) / 2)
    y, q = t % CLASSES, tokenizer.quantizer
    beta = q.beta[t - 1, None, None].double()
    start = model.mean[CLASSES] + beta * (model.mean[y] - model.mean[CLASSES])
    model.head.register_forward_hook(lambda *_: model.group(torch.cat([v.double() - start, doubt], dim=-1)))
    model.log_s.fill_(-5)
    with torch.autocast("cpu", torch.bfloat16):
        logits, v_hat = model(eps_t, y, t, z_sum)
    assert torch.equal(logits.argmax(-1), codes)
    close(v_hat, v, 1e-5)
    model.log_s.copy_(torch.arange(5) / 4)
    v_t = q.alpha[t - 1, None, None] * (v - z_sum) + q.beta[t - 1, None, None] * eps_t
    distances = (v_t[:, :, None] - q.codebook).square().sum(-1)
    by_hand = -distances / 2 / (model.log_s[t - 1, None, None] + doubt).exp()
    close(model(eps_t, y, t, z_sum)[0].log_softmax(-1), by_hand.log_softmax(-1), 1e-4)


def test_the_linear_head_sees_noise_and_sum_whole_or_through_d_numbers():
    """A change of both in the null space of `bottleneck` is invisible behind it, and not without it."""
    tokenizer = toy_tokenizer()
    whole, narrow = (toy_generator(tokenizer, bottleneck=bottleneck) for bottleneck in (False, True))
    (eps, y, t, z_sum), d = some_inputs(tokenizer), tokenizer.config.d
    invisible = torch.linalg.svd(narrow.squeeze.weight).Vh[d:].sum(0)
    other = eps + invisible[:d], y, t, z_sum + invisible[d:]
    close(narrow(*other)[0], narrow(eps, y, t, z_sum)[0], 1e-4)
    assert (whole(*other)[0] - whole(eps, y, t, z_sum)[0]).abs().mean() > 0.01


def test_patches_by_hand():
    """Patch (i, j) holds its 2 x 2 tokens row by row; `ungroup` undoes `group`."""
    model = RDPM(GeneratorConfig(1, CLASSES, patch=2), toy_tokenizer())
    x = torch.randn(2, 64, 3)
    grid, groups = x.view(2, 8, 8, 3), model.group(x)
    for i in range(4):
        for j in range(4):
            tokens = [grid[:, 2 * i + a, 2 * j + b] for a in range(2) for b in range(2)]
            assert torch.equal(groups[:, 4 * i + j], torch.cat(tokens, dim=1))
    assert torch.equal(model.ungroup(groups), x)
    with pytest.raises(UserError, match="--patch 3"):
        RDPM(GeneratorConfig(1, CLASSES, patch=3), toy_tokenizer())


def test_eq_7_by_hand():
    torch.manual_seed(0)
    logits, codes = torch.randn(2, 3, 5), torch.randint(0, 5, (2, 3))
    loss, accuracy = rdpm.generator_loss(logits, codes)
    for image in range(2):
        p = [logits[image, i, codes[image, i]].exp() / logits[image, i].exp().sum() for i in range(3)]
        close(loss[image], -sum(math.log(x) for x in p) / 3)
        right = [max(range(5), key=lambda k, i=i: logits[image, i, k]) == codes[image, i] for i in range(3)]
        close(accuracy[image], sum(right) / 3)


# ------------------------------------------------------------------------------------------------------------
# Alg. 2, guidance, Eq. (8)
# ------------------------------------------------------------------------------------------------------------


class Recorder(nn.Module):
    """A model, or fixed logits, that writes down the inputs of each pass."""

    def __init__(self, model=None, logits=None):
        super().__init__()
        self.config, self.inner, self.logits, self.calls = GeneratorConfig(1, CLASSES), model, logits, []
        self.mean = model.mean if model else torch.zeros(CLASSES + 1, 1, 4)

    def forward(self, eps, y, t, z_sum):
        self.calls.append((eps.clone(), y.clone(), t.clone(), z_sum.clone()))
        return self.inner(eps, y, t, z_sum) if self.inner else (self.logits.expand(*eps.shape[:2], -1), None)


def algorithm_2(model, tokenizer, y, eps, lambdas):
    """The paper's Algorithm 2 with guidance, argmax instead of Eq. (8)."""
    z_sum = torch.zeros_like(eps[0])
    for t in range(1, tokenizer.config.T + 1):
        step = torch.full_like(y, t)
        cond, _ = model(eps[t - 1], y, step, z_sum)
        uncond, _ = model(eps[t - 1], torch.full_like(y, CLASSES), step, z_sum)
        codes = (cond + (cond - uncond) * lambdas[t - 1]).argmax(-1)
        z_sum = z_sum + lookup_by_hand(tokenizer.quantizer, codes)
    return tokenizer.decode(z_sum)


@torch.no_grad()
@pytest.mark.parametrize("head", ["linear", "codebook"])
@pytest.mark.parametrize(("schedule", "lambdas"), [("constant", [4] * 5), ("linear", [0, 1, 2, 3, 4])])
def test_sample_is_algorithm_2_with_guidance(head, schedule, lambdas):
    tokenizer = toy_tokenizer(image_size=8)
    model, y = toy_generator(tokenizer, head=head), torch.tensor([0, 2, 1])
    eps = tokenizer.noise(5, [4, 0, 9], "cpu")
    images, raw = (rdpm.sample(model, tokenizer, y, 5, [4, 0, 9], guidance=guidance,
                               guidance_schedule=schedule, gumbel=False) for guidance in (4.0, 0.0))
    close(images, algorithm_2(model, tokenizer, y, eps, lambdas), 1e-4)
    close(raw, algorithm_2(model, tokenizer, y, eps, [0] * 5), 1e-4)
    assert (raw - images).abs().max() > 1e-2


def test_second_pass_only_where_lambda_is_not_zero():
    tokenizer = toy_tokenizer()
    for schedule, guidance, sizes in (("linear", 1.5, [3, 6, 6, 6, 6]), ("constant", 1.5, [6] * 5),
                                      ("constant", 0.0, [3] * 5)):
        model = Recorder(logits=torch.zeros(16))
        y = torch.tensor([0, 1, 2])
        list(rdpm.sample_steps(model, tokenizer, y, 0, [0, 1, 2], guidance, schedule))
        assert [len(call[1]) for call in model.calls] == sizes
        assert [call[2].unique().tolist() for call in model.calls] == [[1], [2], [3], [4], [5]]
        assert [call[1].tolist() for call in model.calls] == [[0, 1, 2, 3, 3, 3][:size] for size in sizes]


@torch.no_grad()
def test_guidance_begins_where_it_is_told():
    """Before guidance_from the codes are those without guidance, and cost one pass; then those of Alg. 2 with it."""
    tokenizer, y = toy_tokenizer(), torch.tensor([0, 1])
    recorder = Recorder(toy_generator(tokenizer))
    settings = {"guidance": 4, "guidance_schedule": "constant", "gumbel": False}
    late = list(rdpm.sample_steps(recorder, tokenizer, y, 0, [0, 1], **settings, guidance_from=4))
    assert [len(call[0]) for call in recorder.calls] == [2, 2, 2, 4, 4]
    without = list(rdpm.sample_steps(recorder.inner, tokenizer, y, 0, [0, 1], **settings | {"guidance": 0}))
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(late[:3], without[:3], strict=True))
    eps = tokenizer.noise(0, [0, 1], "cpu")
    close(tokenizer.decode(late[-1][0]), algorithm_2(recorder.inner, tokenizer, y, eps, [0, 0, 0, 4, 4]))


def test_fast_saves_nine_of_nineteen_passes():
    parser = argparse.ArgumentParser()
    rdpm.add_sampling_flags(parser)
    flags = rdpm.sampling_flags(parser.parse_args(["--fast", "--tau", "2"]), 10)
    assert flags == {"tau": 2.0, "skip": 3, "guidance_from": 8}
    for settings, passes in ((flags, 10), ({}, 19)):
        tokenizer, model = toy_tokenizer(T=10), Recorder(logits=torch.zeros(16))
        list(rdpm.sample_steps(model, tokenizer, torch.tensor([0]), 0, [0], **settings))
        assert sum(len(call[1]) for call in model.calls) == passes


def test_noise_of_each_step_is_the_images_with_and_without_gumbel():
    tokenizer, y, seen = toy_tokenizer(), torch.tensor([0, 1]), []
    eps = tokenizer.noise(1, [6, 7], "cpu")
    for gumbel in (True, False):
        model = Recorder(logits=torch.arange(16.0))
        seen.append([z for z, _ in rdpm.sample_steps(model, tokenizer, y, 1, [6, 7], 0.0, gumbel=gumbel)])
        assert torch.equal(torch.stack([call[0] for call in model.calls]), eps)
        before = [torch.zeros_like(eps[0]), *seen[-1][:-1]]
        assert all(torch.equal(call[3], z_sum) for call, z_sum in zip(model.calls, before, strict=True))
    assert not torch.equal(seen[0][-1], seen[1][-1])


def test_gumbel_draws_follow_eq_8():
    """Codes are distributed as softmax(tau * logits); tau = 1 and tau = 3 are told apart."""
    tokenizer = toy_tokenizer(K=5, T=1, bias=False)
    logits, y = torch.tensor([0.0, 1.0, -0.3, 0.6, 0.2]), torch.zeros(100).long()
    expected = {tau: 6400 * (tau * logits.double()).softmax(0).numpy() for tau in (1.0, 3.0)}
    for tau in (1.0, 3.0):
        (z, _), = rdpm.sample_steps(Recorder(logits=logits), tokenizer, y, 0, range(100), tau=tau)
        hits = (z[:, :, None] == tokenizer.quantizer.codebook).all(-1)
        assert (hits.sum(-1) == 1).all()
        counts = hits.sum((0, 1)).numpy()
        for other in (1.0, 3.0):
            p = scipy.stats.chisquare(counts, expected[other]).pvalue
            assert p > 1e-3 if other == tau else p < 1e-9
        assert len(hits.float().argmax(-1).unique(dim=0)) == 100  # every image draws its own


# ------------------------------------------------------------------------------------------------------------
# Beyond the paper: previews, known codes, steps without the network
# ------------------------------------------------------------------------------------------------------------


def known_steps(T: int, batch: int, k: int) -> torch.Tensor:
    return (torch.arange(T) < k).view(T, 1, 1).expand(T, batch, 1)


@torch.no_grad()
@pytest.mark.parametrize("head", ["linear", "codebook"])
def test_nothing_known_is_plain_sampling_and_all_known_the_reconstruction(head):
    tokenizer, y, numbers = toy_tokenizer(), torch.tensor([0, 2, 1]), [4, 0, 9]
    inner = toy_generator(tokenizer, head=head)
    v, _ = latents(tokenizer, 3)
    plain = list(rdpm.sample_steps(inner, tokenizer, y, 5, numbers))
    assert all((v_hat is None) == (head == "linear") for _, v_hat in plain)
    if head == "codebook":  # with guidance too, the preview is that of the class
        eps = tokenizer.noise(5, numbers, "cpu")
        for t in range(2, 6):
            close(plain[t - 1][1], inner(eps[t - 1], y, torch.full_like(y, t), plain[t - 2][0])[1], 1e-4)
    for known in (known_steps(5, 3, 0), torch.zeros(5, 3, 64, dtype=torch.bool)):
        again = rdpm.sample_steps(inner, tokenizer, y, 5, numbers, v=v, known=known)
        for (z, v_hat), (z_again, v_again) in zip(plain, again, strict=True):
            assert torch.equal(z, z_again) and (head == "linear" or torch.equal(v_hat, v_again))
    quantized = tokenizer.quantizer(v, tokenizer.noise(5, numbers, "cpu"))
    for known in (known_steps(5, 3, 5), torch.ones(5, 3, 64, dtype=torch.bool)):
        for labels in (y, (y + 1) % CLASSES, torch.full_like(y, CLASSES)):
            model = Recorder(inner)
            *_, (z_sum, v_hat) = rdpm.sample_steps(model, tokenizer, labels, 5, numbers, v=v, known=known)
            assert torch.equal(z_sum, quantized.z_sum) and torch.equal(v_hat, v) and not model.calls


def encode_by_hand(q, t, v, z_sum, eps):
    """Codes of Alg. 1's step t, token by token and entry by entry."""
    v_t = q.alpha[t - 1] * (v - z_sum) + q.beta[t - 1] * eps
    return (v_t[:, :, None] - q.codebook).square().sum(-1).argmin(-1)


@torch.no_grad()
def test_known_codes_and_skipped_steps_by_hand():
    """Where known, codes are Alg. 1's on v; in the first `skip` steps the others are Alg. 1's on the class's mean."""
    tokenizer, y, numbers = toy_tokenizer(), torch.tensor([0, 2, 1]), [4, 0, 9]
    model, q = toy_generator(tokenizer, head="codebook"), tokenizer.quantizer
    v, _ = latents(tokenizer, 3)
    eps = tokenizer.noise(5, numbers, "cpu")
    share = torch.tensor([1, 0, 0.5, 0.5, 0.5]).view(5, 1, 1)
    known = torch.rand(5, 3, 64, generator=torch.Generator().manual_seed(0)) < share
    for skip, passes in ((0, [2, 3, 4, 5]), (3, [4, 5])):
        recorder, z_sum = Recorder(model), torch.zeros_like(v)
        found = rdpm.sample_steps(recorder, tokenizer, y, 5, numbers, 0.0, gumbel=False, skip=skip, v=v, known=known)
        for t, (z_found, _) in enumerate(found, 1):
            free = encode_by_hand(q, t, model.mean[y], z_sum, eps[t - 1])
            if t > skip:
                free = model(eps[t - 1], y, torch.full_like(y, t), z_sum)[0].argmax(-1)
            codes = torch.where(known[t - 1], encode_by_hand(q, t, v, z_sum, eps[t - 1]), free)
            z_sum = z_sum + lookup_by_hand(q, codes)
            close(z_found, z_sum)
        assert [int(call[2][0]) for call in recorder.calls] == passes


@torch.no_grad()
def test_sampling_goes_on_from_a_sum():
    tokenizer, y, numbers = toy_tokenizer(), torch.tensor([0, 2, 1]), [4, 0, 9]
    model = toy_generator(tokenizer)
    whole = [z for z, _ in rdpm.sample_steps(model, tokenizer, y, 5, numbers, gumbel=False)]
    rest = [z for z, _ in rdpm.sample_steps(model, tokenizer, y, 5, numbers, gumbel=False, after=(2, whole[1]))]
    assert len(rest) == 3 and all(torch.equal(a, b) for a, b in zip(whole[2:], rest, strict=True))


@torch.no_grad()
def test_equal_numbers_are_equal_noise():
    tokenizer, y = toy_tokenizer(), torch.tensor([0, 1, 0])
    images = rdpm.sample(toy_generator(tokenizer), tokenizer, y, 5, [3, 3, 3])
    assert torch.equal(images[0], images[2]) and not torch.equal(images[0], images[1])


@torch.no_grad()
def test_mixtures_of_classes_by_hand():
    tokenizer = toy_tokenizer()
    model = toy_generator(tokenizer)
    tables = model.embed_y.weight.clone(), model.mean.clone()
    sample.mix_classes(model, 2, 0, 3)
    for found, table in zip((model.embed_y.weight, model.mean), tables, strict=True):
        close(found, torch.stack([table[2], (table[2] + table[0]) / 2, table[0], table[CLASSES]]))
    assert model.config.num_classes == 3  # the label of "no class"


def test_an_image_is_the_same_alone_and_in_a_batch_and_changes_with_the_seed():
    tokenizer = toy_tokenizer()
    model = toy_generator(tokenizer)
    labels = torch.tensor(rdpm.balanced_labels(6, CLASSES))
    batch = rdpm.sample(model, tokenizer, labels, 3, range(6))
    for numbers in ([4], [5, 1]):
        close(rdpm.sample(model, tokenizer, labels[numbers], 3, numbers), batch[numbers], 1e-4)
    other = rdpm.sample(model, tokenizer, labels, 4, range(6))
    assert ((batch - other).abs().amax((1, 2, 3)) > 1e-2).all()


def test_labels_are_balanced():
    assert rdpm.balanced_labels(7, 3) == [0, 1, 2, 0, 1, 2, 0]


# ------------------------------------------------------------------------------------------------------------
# Data
# ------------------------------------------------------------------------------------------------------------


def test_every_byte_survives_the_round_trip():
    x = torch.arange(256).to(torch.uint8)
    assert torch.equal(rdpm.to_uint8(rdpm.to_float(x)), x)
    assert rdpm.to_float(x)[[0, 255]].tolist() == [-1, 1]
    assert rdpm.to_uint8(torch.tensor([-9.0, 9.0])).tolist() == [0, 255]


def adm_crop(image: Image.Image, size: int) -> np.ndarray:
    """guided-diffusion's center_crop_arr, in its terms."""
    width, height = image.size
    while width >= 2 * size and height >= 2 * size:
        width, height = width // 2, height // 2
        image = image.resize((width, height), resample=Image.BOX)
    scale = size / (width if width < height else height)
    array = np.array(image.resize((round(width * scale), round(height * scale)), resample=Image.BICUBIC))
    y, x = (array.shape[0] - size) // 2, (array.shape[1] - size) // 2
    return array[y:y + size, x:x + size]


@pytest.mark.parametrize("size", [(40, 33), (33, 75), (16, 16), (17, 130), (64, 64), (31, 31)])
def test_center_crop_is_adms(size):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), np.uint8))
    found = np.array(rdpm.center_crop(image, 16))
    assert found.shape == (16, 16, 3) and np.array_equal(found, adm_crop(image, 16))


def test_fit_pads_28_to_32_in_the_middle_of_black():
    digit = np.random.default_rng(0).integers(0, 256, (28, 28), np.uint8)
    found = np.array(rdpm.fit(Image.fromarray(digit), 32, True, "digit"))
    expected = np.pad(digit, 2)
    assert all(np.array_equal(found[:, :, channel], expected) for channel in range(3))
    with pytest.raises(UserError, match="digit: 28 x 28 is smaller"):
        rdpm.fit(Image.fromarray(digit), 32, False, "digit")


def test_mnist_is_read_padded_and_split(tmp_path, monkeypatch):
    """Through torchvision, from files in MNIST's own format."""
    raw = tmp_path / "data" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    digits = np.random.default_rng(0).integers(0, 256, (3, 28, 28), np.uint8)
    for name, shift in (("train", 0), ("t10k", 1)):
        header = np.array([0x803, 3, 28, 28], ">i4").tobytes()
        (raw / f"{name}-images-idx3-ubyte").write_bytes(header + (digits + shift).astype(np.uint8).tobytes())
        labels = np.array([0x801, 3], ">i4").tobytes() + bytes([7, 0, 7])
        (raw / f"{name}-labels-idx1-ubyte").write_bytes(labels)
    monkeypatch.chdir(tmp_path)
    for train in (True, False):
        images = rdpm.load_data("mnist", 32, train, pad=True)
        assert len(images) == 3 and len(images.classes) == 10 and images.labels.tolist() == [7, 0, 7]
        x, y = images[2]
        assert y == 7 and np.array_equal(x[1].numpy(), np.pad(digits[2] + np.uint8(not train), 2))


def draw_folder(folder: Path, count: int = 30, size: int = 32) -> Path:
    """`count` PNGs of three classes of shapes, in one folder per class."""
    for i in range(count):
        file = folder / rdpm.SHAPES[i % CLASSES] / f"{i:03d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        rdpm.draw_shape(i % CLASSES, np.random.default_rng(i), size).save(file)
    return folder


def test_folder_without_val_holds_out_every_twentieth(tmp_path):
    draw_folder(tmp_path, 60)
    train, held_out = (rdpm.load_data(str(tmp_path), 32, train) for train in (True, False))
    files = sorted(tmp_path.glob("*/*.png"))
    read = [np.array(Image.open(file)).transpose(2, 0, 1) for file in files]
    labels = [rdpm.SHAPES.index(file.parent.name) for file in files]
    for images, places in ((train, [i for i in range(60) if i % 20]), (held_out, [0, 20, 40])):
        assert len(images) == len(places) and images.classes == list(rdpm.SHAPES[:3])
        for i, place in enumerate(places):
            x, y = images[i]
            assert y == labels[place] == images.labels[i] and np.array_equal(x.numpy(), read[place])
            mirrored, y = images[len(images) + i]
            assert y == labels[place] and np.array_equal(mirrored.numpy(), read[place][:, :, ::-1])
    with pytest.raises(IndexError):
        train[2 * len(train)]


@pytest.mark.parametrize("name", ["val", "test"])
def test_folder_with_a_held_out_folder(tmp_path, name):
    draw_folder(tmp_path / "train", 6)
    draw_folder(tmp_path / name, 3, size=40)
    assert len(rdpm.load_data(str(tmp_path), 32, True)) == 6
    held_out = rdpm.load_data(str(tmp_path), 32, False)
    file, = (tmp_path / name / "arrow").glob("*.png")
    assert len(held_out) == 3
    assert np.array_equal(held_out[0][0].permute(1, 2, 0).numpy(), adm_crop(Image.open(file), 32))


def test_shapes_are_ten_classes_always_the_same_and_the_splits_differ():
    train, again, held_out = (rdpm.load_data("shapes", 32, train) for train in (True, True, False))
    assert len(train) == 20_000 and len(held_out) == 2_000 and len(train.classes) == 10
    assert [train[i][1] for i in range(10)] == list(range(10))
    assert np.array_equal(np.bincount(train.labels), [2000] * 10)
    pictures = [images[i][0].numpy().tobytes() for images in (train, held_out) for i in range(30)]
    assert len(set(pictures)) == 60
    assert [again[i][0].numpy().tobytes() for i in range(30)] == pictures[:30]


def test_global_batches_do_not_depend_on_the_ranks():
    def batches(rank=0, world=1, steps=range(0, 9), flip=True, seed=0):
        return list(GlobalBatches(30, 8, steps, seed, flip, rank, world))

    whole = batches()
    assert len(whole) == 9 and all(len(batch) == 8 for batch in whole)
    for world in (2, 4):
        shares = [batches(rank, world) for rank in range(world)]
        assert [sum(parts, []) for parts in zip(*shares, strict=True)] == whole
    assert batches(steps=range(4, 9)) == whole[4:]
    items = sum(whole, [])
    for epoch in (items[:30], items[30:60]):
        assert sorted(i % 30 for i in epoch) == list(range(30))
        assert 5 < sum(i >= 30 for i in epoch) < 25
    assert items[:30] != items[30:60] and batches(seed=1) != whole
    assert max(sum(batches(flip=False), [])) == 29


def test_cached_latents_are_the_encoders(tmp_path):
    """Item by item, flips too; another tokenizer or other images get another file; a second call reads it."""
    images = rdpm.load_data(str(draw_folder(tmp_path / "data")), 32, True)
    tokenizer = toy_tokenizer(image_size=32)
    cpu = torch.device("cpu")

    def cache(tokenizer, images, flip=True):
        return train_gen.cache_latents(tokenizer, images, tmp_path, flip, 0, 0, 1, cpu)

    cached = cache(tokenizer, images)
    file, = tmp_path.glob("latents-*.npy")
    assert len(cached) == 2 * len(images)
    assert not list(tmp_path.glob("*.part"))
    with torch.no_grad():
        for i in (0, 3, len(images), len(images) + 3, 2 * len(images) - 1):
            v, y = cached[i]
            x, label = images[i]
            assert y == label and v.dtype == torch.float16
            assert (v - tokenizer.encode(rdpm.to_float(x[None]))[0]).abs().mean() < 0.03  # bf16
    written = file.stat().st_mtime_ns
    assert np.array_equal(cache(tokenizer, images).tensors[0], cached.tensors[0]) and file.stat().st_mtime_ns == written
    cache(tokenizer, images, flip=False)
    tokenizer.decoder.layers[0].bias.data += 1
    cache(tokenizer, images)
    data = str(draw_folder(tmp_path / "more", 33))
    cache(tokenizer, rdpm.load_data(data, 32, True))
    assert len(list(tmp_path.glob("latents-*.npy"))) == 4
    changed = rdpm.load_data(data, 32, True)
    Image.new("RGB", (32, 32)).save(changed.source.samples[changed.indices[4]][0])
    v = cache(tokenizer, changed)[4][0]
    assert (v - tokenizer.encode(rdpm.to_float(changed[4][0][None]))[0]).abs().mean() < 0.03
    assert len(list(tmp_path.glob("latents-*.npy"))) == 5


def test_unfinished_and_damaged_latents(tmp_path):
    """What a killed run has left goes, what another is writing stays; a cut file is an error that names it."""
    images = rdpm.load_data(str(draw_folder(tmp_path / "data")), 32, True)
    cache = partial(train_gen.cache_latents, toy_tokenizer(image_size=32), images, tmp_path, False, 0, 0, 1,
                    torch.device("cpu"))
    cache()
    file, = tmp_path.glob("latents-*.npy")
    whole = file.read_bytes()
    file.unlink()
    old, new = (tmp_path / f"{file.stem}-{number}.part" for number in (1, 2))
    for part in (old, new):
        part.touch()
    os.utime(old, (0, 0))
    cache()
    assert new.exists() and not old.exists() and file.read_bytes() == whole
    file.write_bytes(whole[:1000])
    with pytest.raises(UserError, match=f"{file}: damaged .* remove it"):
        cache()


# ------------------------------------------------------------------------------------------------------------
# Learning rate, EMA, checkpoints
# ------------------------------------------------------------------------------------------------------------


def test_learning_rate_by_hand():
    def rates(warmup, final):
        return [rdpm.learning_rate(step, 8, 2.0, warmup, final) for step in range(8)]

    assert rates(4, 1.0) == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0, 2.0, 2.0]
    close(rates(4, 0.1), [0.5, 1.0, 1.5, 2.0, 2.0, 1.55, 1.1, 0.65])
    assert rates(0, 1.0) == [2.0] * 8


def test_ema_by_hand():
    """decay * ema + (1 - decay) * model, with (1 + step) / (10 + step) instead while that is smaller."""
    ema, model = nn.Linear(2, 1), nn.Linear(2, 1)
    old, new = ema.weight.detach().clone(), model.weight.detach().clone()
    rdpm.update_ema(ema, model, 0.9, 10**6)
    close(ema.weight, 0.9 * old + 0.1 * new)
    old = ema.weight.detach().clone()
    rdpm.update_ema(ema, model, 0.9, 2)
    close(ema.weight, 0.25 * old + 0.75 * new)
    assert torch.equal(model.weight, new)


def tokenizer_file(path: Path) -> Path:
    tokenizer = toy_tokenizer()
    rdpm.save_checkpoint(path, {"kind": "tokenizer", "config": asdict(tokenizer.config), "step": 1,
                                "model": rdpm.half(tokenizer.state_dict())})
    return path


def test_model_files_round_trip(tmp_path):
    """Weights come back as their half-precision values; the generator's file holds its tokenizer."""
    path = tokenizer_file(tmp_path / "vq.pt")
    tokenizer, expected = rdpm.load_tokenizer(path), toy_tokenizer()
    assert tokenizer.config == expected.config and not tokenizer.training
    for weight, original in zip(tokenizer.parameters(), expected.parameters(), strict=True):
        assert torch.equal(weight, original.half().float()) and not weight.requires_grad
    for head in ("linear", "codebook"):
        model = toy_generator(tokenizer, head=head)
        its_tokenizer = {"config": asdict(tokenizer.config), "model": rdpm.half(tokenizer.state_dict())}
        rdpm.save_checkpoint(tmp_path / "gen.pt", {
            "kind": "generator", "config": asdict(model.config), "model": rdpm.half(model.state_dict()),
            "tokenizer": its_tokenizer, "classes": ["a", "b", "c"], "sampling": {"tau": 2.0}, "step": 9})
        loaded, its_tokenizer, info = rdpm.load_generator(tmp_path / "gen.pt")
        assert info == {"classes": ["a", "b", "c"], "sampling": {"tau": 2.0}, "step": 9}
        assert its_tokenizer.config == expected.config and loaded.config == model.config
        model.load_state_dict({name: weight.half().float() for name, weight in model.state_dict().items()})
        assert torch.equal(loaded(*some_inputs(tokenizer))[0], model(*some_inputs(tokenizer))[0])
        for weight, original in zip(its_tokenizer.parameters(), tokenizer.parameters(), strict=True):
            assert torch.equal(weight, original)
    assert not list(tmp_path.glob("*.part"))


def test_damaged_and_foreign_checkpoints_are_named(tmp_path):
    path = tokenizer_file(tmp_path / "vq.pt")
    whole = path.read_bytes()
    for length in (0, 1, 100, len(whole) // 2, len(whole) - 30):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match="vq.pt: not a checkpoint, or a damaged one"):
            rdpm.load_tokenizer(path)
    path.write_bytes(whole)
    for load, message in ((rdpm.load_generator, "vq.pt: holds a tokenizer, not a generator"),
                          (lambda _: rdpm.load_tokenizer(tmp_path / "no.pt"), "no.pt: no such checkpoint")):
        with pytest.raises(UserError, match=message):
            load(path)
    contents = rdpm.read_checkpoint(path, "tokenizer")
    contents["config"]["K"] = 17
    torch.save(contents, path)
    with pytest.raises(UserError, match="vq.pt: the tokenizer's weights do not fit its config"):
        rdpm.load_tokenizer(path)
    for foreign in ([1, 2], {"kind": "other"}, torch.zeros(3)):
        torch.save(foreign, path)
        with pytest.raises(UserError, match="vq.pt: holds (a other|something else), not a tokenizer"):
            rdpm.load_tokenizer(path)


class Hostile:
    """Unpickling one creates a file."""

    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def test_hostile_checkpoints_run_no_code(tmp_path):
    contents = {"kind": "tokenizer", "config": Hostile(tmp_path / "appeared")}
    torch.save(contents, tmp_path / "zip.pt")
    (tmp_path / "raw.pt").write_bytes(pickle.dumps(contents, protocol=2))
    for name in ("zip.pt", "raw.pt"):
        with pytest.raises(UserError, match=name):
            rdpm.load_tokenizer(tmp_path / name)
    assert not (tmp_path / "appeared").exists()


# ------------------------------------------------------------------------------------------------------------
# Learning: one batch by heart
# ------------------------------------------------------------------------------------------------------------


def test_tokenizer_overfits_one_batch():
    tokenizer = toy_tokenizer(T=3, channels=16, K=64)
    images = rdpm.load_data("shapes", 16, True)
    x = rdpm.to_float(torch.stack([images[i][0] for i in range(4)]))
    eps = tokenizer.noise(0, range(4), "cpu")
    optimizer = torch.optim.Adam(tokenizer.parameters(), 2e-3, betas=(0.5, 0.9))
    for _ in range(150):
        x_rec, _, quantized = tokenizer(x, eps)
        (F.mse_loss(x_rec, x) + 0.25 * quantized.loss).backward()
        optimizer.step()
        optimizer.zero_grad()
    x_rec, _, _ = tokenizer(x, eps)
    assert F.mse_loss(x_rec, x) < 0.02 < 0.1 < x.var()


@pytest.mark.parametrize(("head", "patch"), [("linear", 1), ("codebook", 2)])
def test_generator_overfits_one_batch(head, patch):
    tokenizer = toy_tokenizer(image_size=8)
    torch.manual_seed(0)
    model = RDPM(GeneratorConfig(2, CLASSES, head=head, patch=patch), tokenizer)
    v, eps = latents(tokenizer, 6)
    t, y = torch.tensor([1, 2, 3, 4, 5, 5]), torch.arange(6) % CLASSES
    with torch.no_grad():
        z_sum, codes = tokenizer.quantizer.training_input(v, eps, t)
    inputs = eps[t - 1, torch.arange(6)], y, t, z_sum
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    for _ in range(150):
        rdpm.generator_loss(model(*inputs)[0], codes)[0].mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(model(*inputs)[0].argmax(-1), codes)


# ------------------------------------------------------------------------------------------------------------
# The scripts, end to end
# ------------------------------------------------------------------------------------------------------------

COMMON = ["--preset", "shapes", "--device", "cpu", "--workers", 0, "--batch", 4, "--log-every", 1]
VQ = [*COMMON, "--T", 3, "--K", 32]
GEN = [*COMMON, "--depth", 1]


@pytest.fixture(autouse=True)
def signals():
    """A training in this process leaves its handlers behind."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD)
    before = [signal.getsignal(number) for number in numbers]
    yield
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for worker in multiprocessing.active_children():
        worker.kill()
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


def shell(*command) -> str:
    """Run python with these arguments in the repository; returns stdout."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, command)]
    done = subprocess.run(command, cwd=HERE, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def run(script, *flags) -> None:
    """A script's main() in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, flags)])
        script.main()


def records(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def losses(out: Path) -> list[float]:
    return [record["loss"] for record in records(out) if "loss" in record]


@pytest.fixture(scope="module")
def shapes(tmp_path_factory) -> Path:
    """Both trainings and the sampler as a user runs them, on the built-in images."""
    out = tmp_path_factory.mktemp("shapes")
    shell("train_vq.py", *VQ, "--steps", 2, "--out", out / "vq", "--gan", 0.75)
    tokenizer = ["--tokenizer", out / "vq/model.pt"]
    shell("train_gen.py", *GEN, "--steps", 2, "--out", out / "gen", *tokenizer, "--no-cache")
    said = shell("sample.py", "--ckpt", out / "gen/model.pt", "--num", 13, "--batch", 5, "--device", "cpu",
                 "--npz", out / "a.npz", "--out", out / "a.png")
    (out / "said").write_text(said)
    return out


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The same on a folder of images, with cached latents and the other switches, in this process."""
    out = tmp_path_factory.mktemp("folder")
    flags = ["--data", draw_folder(out / "data"), "--steps", 3, "--save-every", 2]
    run(train_vq, *VQ, *flags, "--out", out / "vq", "--no-bias", "--no-weight")
    run(train_gen, *GEN, *flags, "--out", out / "gen", "--tokenizer", out / "vq/model.pt", "--head", "linear",
        "--bottleneck")
    return out


def test_training_writes_its_files_and_log(shapes):
    for stage, steps in (("vq", 2), ("gen", 2)):
        names = {"model.pt", "state.pt", "log.jsonl", "grid-000002.png"}
        assert {file.name for file in (shapes / stage).iterdir()} == names
        first, *rest = records(shapes / stage)
        assert first["command"].startswith(f"train_{stage}.py") and first["torch"] == torch.__version__
        assert first["world"] == 1 and str(first["args"]["batch"]) == "4"
        trained = [record for record in rest if "loss" in record]
        assert [record["step"] for record in trained] == list(range(1, steps + 1))
        assert all(math.isfinite(record[key]) for record in trained for key in ("loss", "lr", "grad_norm"))
    trained = records(shapes / "vq")[1]
    expected = trained["recon"] + 0.25 * trained["quant"]  # Eq. (5); the adversarial weight is not logged
    assert abs(trained["loss"] - expected) > 1e-6 and trained["discriminator"] > 0
    assert len(trained["residual_t"]) == len(trained["error_t"]) == 3
    evaluated, = (record for record in records(shapes / "vq") if "psnr" in record)
    assert 0 < evaluated["psnr"] < 50 and len(evaluated["usage_t"]) == 3 and evaluated["latent_error"] > 0
    assert rdpm.load_generator(shapes / "gen/model.pt")[2]["sampling"] == rdpm.PRESETS["shapes"]["sampling"]


def test_logged_loss_is_eq_5_and_residuals_are_the_tokenizers(folder):
    for record in records(folder / "vq"):
        if "recon" in record:
            close(record["loss"], record["recon"] + 0.25 * record["quant"])
            close(record["quant"], sum(record["error_t"]))  # --no-weight
            close(record["residual_t"][0], 1, 1e-2)  # z_1 = v is normalised


def test_sampling_writes_picture_and_npz(shapes):
    arrays = np.load(shapes / "a.npz")
    assert arrays["arr_0"].shape == (13, 32, 32, 3) and arrays["arr_0"].dtype == np.uint8
    assert arrays["arr_1"].tolist() == [*range(10), 0, 1, 2]
    assert Image.open(shapes / "a.png").size == (10 * 33 * 3 + 3, 2 * 33 * 3 + 3)
    assert "13 images" in (shapes / "said").read_text()


def test_sample_script_chooses_classes_and_shows_steps(shapes, tmp_path):
    model, tokenizer, info = rdpm.load_generator(shapes / "gen/model.pt")
    common = ["--ckpt", shapes / "gen/model.pt", "--num", 4, "--device", "cpu", "--classes", "ring", 3,
              "--seed", 5, "--out", tmp_path / "a.png", "--npz", tmp_path / "a.npz"]
    sampling = {"guidance": 3.0, "guidance_schedule": "constant", "tau": 2.0}
    run(sample, *common, "--steps", "--tau", 2, "--guidance", 3, "--guidance-schedule", "constant")
    arrays = dict(np.load(tmp_path / "a.npz"))
    labels = torch.tensor([6, 3, 6, 3])
    assert arrays["arr_1"].tolist() == labels.tolist()
    with rdpm.autocast(torch.device("cpu")):
        images = rdpm.sample(model, tokenizer, labels, 5, range(4), **sampling)
    assert np.array_equal(arrays["arr_0"], rdpm.to_uint8(images).permute(0, 2, 3, 1).numpy())
    assert Image.open(tmp_path / "a.png").size == (3 * 33 * 3 + 3, 8 * 33 * 3 + 3)  # z'_t and previews
    run(sample, *common, "--no-gumbel")
    assert not np.array_equal(np.load(tmp_path / "a.npz")["arr_0"], arrays["arr_0"])


@pytest.fixture(scope="module")
def sampled(shapes):
    """sample.py on the codebook-head checkpoint: the images that it writes, and its picture."""
    def run_sample(out: Path, *flags, ckpt=shapes / "gen/model.pt", name="a.png"):
        # One image a batch: bf16 products of another batch size may differ in their last bit.
        run(sample, "--ckpt", ckpt, "--device", "cpu", "--seed", 5, "--out", out / name, "--npz", out / "a.npz",
            "--batch", 1, *flags)
        return np.load(out / "a.npz")["arr_0"]
    return run_sample


@pytest.fixture
def ref(tmp_path) -> Path:
    rdpm.draw_shape(8, np.random.default_rng(0), 32).save(tmp_path / "ref.png")
    return tmp_path / "ref.png"


def cells(path: Path, columns: int) -> np.ndarray:
    """The images of a picture grid, (N, 32, 32, 3)."""
    grid = np.array(Image.open(path).convert("RGB"))[::3, ::3]
    rows = grid.shape[0] // 33
    return np.stack([grid[1 + 33 * r:33 + 33 * r, 1 + 33 * c:33 + 33 * c] for r in range(rows) for c in range(columns)])


def test_layout_goes_from_plain_samples_to_the_reconstruction(sampled, ref, tmp_path, capsys):
    plain = [sampled(tmp_path, "--num", 1, "--classes", name)[0] for name in ("ring", "disc")]
    reconstruction, = sampled(tmp_path, "--reconstruct", ref)
    original = np.array(Image.open(ref))
    psnr = 10 * math.log10(255**2 / ((original - reconstruction.astype(float)) ** 2).mean())
    bits = 3 * 5 * 64 / 32**2  # T = 3 steps of log2(32) bits for 64 tokens
    assert f"t = 3: {bits:.3f} bits a pixel, PSNR {psnr:.2f}" in capsys.readouterr().out
    strip = cells(tmp_path / "a.png", 4)
    assert np.array_equal(strip[0], original) and np.array_equal(strip[3], reconstruction)
    images = sampled(tmp_path, "--layout", ref, "--layout-steps", 0, 2, 3, "--classes", "ring", "disc")
    assert np.array_equal(images[:2], plain)
    assert (images[4:] == reconstruction).all() and not (images[2:4] == reconstruction).all()
    picture = cells(tmp_path / "a.png", 3)
    assert all(np.array_equal(image, original) for image in picture[::3])
    assert np.array_equal(picture[[1, 2, 4, 5, 7, 8]], images)


def test_edit_redraws_the_mask_and_nothing_else(sampled, ref, tmp_path):
    mask = np.zeros((32, 32), np.uint8)
    mask[9:17, 3:30] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    original, inside = np.array(Image.open(ref)), mask > 0
    nobody, ring = (sampled(tmp_path, "--edit", ref, "--mask", tmp_path / "mask.png", "--num", 2, *flags)
                    for flags in ((), ("--classes", "ring")))
    for images in (nobody, ring):
        assert all(np.array_equal(image[~inside], original[~inside]) for image in images)
        assert not np.array_equal(images[0], images[1])
    assert not np.array_equal(nobody, ring)
    picture = cells(tmp_path / "a.png", 4)
    assert np.array_equal(picture[0], original) and np.array_equal(picture[2:], ring)
    assert (picture[1][inside] == 128).all() and np.array_equal(picture[1][~inside], original[~inside])


def test_an_enlarged_reference_is_what_it_was(ref, tmp_path, capsys):
    """Pictures of this size are written three times as large; another picture of that size is scaled, and this said."""
    x = sample.reference(str(ref), 32)
    rdpm.image_grid(x[None], 1).save(tmp_path / "large.png")
    assert Image.open(tmp_path / "large.png").size == (96, 96)
    assert torch.equal(sample.reference(str(tmp_path / "large.png"), 32), x) and not capsys.readouterr().out
    Image.open(ref).resize((96, 96), Image.Resampling.BICUBIC).save(tmp_path / "other.png")
    assert not torch.equal(sample.reference(str(tmp_path / "other.png"), 32), x)
    assert "other.png: 96 x 96 resized and cropped to 32 x 32" in capsys.readouterr().out


def test_interpolation_begins_and_ends_with_the_classes(sampled, tmp_path):
    images = sampled(tmp_path, "--interpolate", "ring", 3, "--num", 3)
    ends = [sampled(tmp_path, "--num", 1, "--classes", name)[0] for name in ("ring", 3)]
    assert np.array_equal(images[0], ends[0]) and np.array_equal(images[2], ends[1])
    assert not np.array_equal(images[1], images[0]) and not np.array_equal(images[1], images[2])


def test_strips_and_animations_end_with_the_sample(sampled, folder, tmp_path):
    for ckpt in ({}, {"ckpt": folder / "gen/model.pt"}):  # the codebook head, the linear one
        plain = sampled(tmp_path, "--num", 2, **ckpt)
        sampled(tmp_path, "--num", 2, "--steps", **ckpt)
        strip = cells(tmp_path / "a.png", 3).reshape(2, 2, 3, 32, 32, 3)  # image, raw or preview, t
        assert np.array_equal(strip[:, 0, -1], plain) and np.array_equal(strip[:, 1, -1], plain)
        assert not np.array_equal(strip[:, 0, 0], strip[:, 1, 0])
        sampled(tmp_path, "--num", 2, name="a.gif", **ckpt)
        with Image.open(tmp_path / "a.gif") as animation:
            assert animation.n_frames >= 3
            animation.seek(animation.n_frames - 1)
            animation.convert("RGB").save(tmp_path / "last.png")
        assert np.abs(cells(tmp_path / "last.png", 2) - plain.astype(float)).mean() < 8  # of 255: a GIF has 256 colours


def test_flops_are_counted_by_hand():
    """Two operations for each weight and token; and attention, where PyTorch counts it."""
    tokenizer = toy_tokenizer()
    model, w, n, K = toy_generator(tokenizer, depth=2).requires_grad_(True), 128, 64, tokenizer.config.K
    one, latent = torch.ones(1, dtype=torch.long), torch.zeros(1, n, 4)
    hidden = model.blocks[0].down.in_features
    per_token = 2 * 4 * w + 2 * (4 * w * w + 3 * w * hidden) + w * K
    products = n * per_token + 2 * 6 * w * w + 2 * w * w + 256 * w + w * w  # the condition's: AdaLN, embedding of t
    attention = 2 * 2 * n * n * w
    flops = rdpm.count_flops(lambda: model(latent, one, one, latent))
    assert flops in (2 * products, 2 * (products + attention))


def test_benchmarks_measure_and_leave_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(rdpm.tempfile, "tempdir", str(tmp_path))
    ends = []
    monkeypatch.setattr(rdpm.atexit, "register", lambda end, *args, **more: ends.append(partial(end, *args, **more)))
    flags = ["--preset", "shapes", "--device", "cpu", "--workers", 0, "--batch", 2, "--benchmark"]
    run(train_vq, *flags)
    run(train_gen, *flags, "--depth", 1)
    rate = r"[\d.e+]+ images/s of [\d.e+-]+ GFLOP a step and image: \d+% of the matrix-product peak, [\d.e+]+ GFLOP/s"
    *_, said, quantiser, trained = capsys.readouterr().out.splitlines()
    assert re.fullmatch(rate, said) and re.fullmatch(rate, trained)
    assert re.fullmatch(r"quantiser: [\d.e+]+ latents/s, [\d.]+ times its 10 matrix products", quantiser)
    monkeypatch.setattr(rdpm.Guard, "stop", lambda guard: True)  # told to stop, it saves nothing
    with pytest.raises(KeyboardInterrupt):
        run(train_gen, *flags, "--depth", 1)
    ends = [end for end in ends if end.func is rdpm.shutil.rmtree]  # libraries register theirs at their first use
    assert len(ends) == 3 and {file.name for file in tmp_path.rglob("*") if file.is_file()} == {"log.jsonl"}
    for end in ends:
        end()
    assert not list(tmp_path.iterdir())


def test_training_on_a_folder_caches_latents(folder):
    cached, = (folder / "vq").glob("latents-*.npy")
    model, tokenizer, info = rdpm.load_generator(folder / "gen/model.pt")
    latents = np.load(cached).astype(float)
    labels = rdpm.load_data(str(folder / "data"), 32, True).labels
    for row in range(CLASSES + 1):
        close(model.mean[row], latents[labels == row if row < CLASSES else labels >= 0].mean(0), 1e-3)
    assert info["classes"] == list(rdpm.SHAPES[:3]) and info["step"] == 3
    assert model.config == GeneratorConfig(1, 3, bottleneck=True, head="linear", patch=2)
    assert tokenizer.quantizer.bias is None and tokenizer.config.weight is False
    for stage in ("vq", "gen"):
        grids = sorted(file.name for file in (folder / stage).glob("grid*"))
        assert grids == ["grid-000002.png", "grid-000003.png"]
        assert len(losses(folder / stage)) == 3


def test_other_image_size(tmp_path):
    """One flag of the first script; the others read it from the checkpoint."""
    run(train_vq, *VQ, "--steps", 1, "--image-size", 16, "--out", tmp_path / "vq")
    run(train_gen, *GEN, "--steps", 1, "--tokenizer", tmp_path / "vq/model.pt", "--no-cache", "--out", tmp_path / "gen")
    run(sample, "--ckpt", tmp_path / "gen/model.pt", "--num", 2, "--npz", tmp_path / "a.npz", "--out",
        tmp_path / "a.png", "--device", "cpu")
    assert np.load(tmp_path / "a.npz")["arr_0"].shape == (2, 16, 16, 3)
    assert rdpm.load_generator(tmp_path / "gen/model.pt")[1].config.tokens == 4 * 4


def test_optimizers_are_the_papers(folder):
    """Adam (0.5, 0.9) without decay; AdamW (0.9, 0.95) with 0.03 on matrices; model.pt holds the EMA."""
    vq, gen = (torch.load(folder / stage / "state.pt", weights_only=True)["parts"] for stage in ("vq", "gen"))
    for name in ("optimizer", "optimizer_d"):
        group, = vq[name]["param_groups"]
        assert group["betas"] == (0.5, 0.9) and group["weight_decay"] == 0
    matrices, others = gen["optimizer"]["param_groups"]
    assert (matrices["weight_decay"], others["weight_decay"]) == (0.03, 0)
    assert matrices["betas"] == others["betas"] == (0.9, 0.95)
    assert len(matrices["params"]) == sum(weight.ndim > 1 for name, weight in gen["model"].items()
                                                if name != "mean")
    written = torch.load(folder / "gen/model.pt", weights_only=True)["model"]
    assert all(torch.equal(written[name], weight.half()) for name, weight in gen["ema"].items())
    assert not torch.equal(gen["ema"]["head.weight"], gen["model"]["head.weight"])


def test_generator_is_trained_with_the_noise_its_codes_came_from(folder, tmp_path, monkeypatch):
    """Eq. (6) gets eps_t and z'_{t-1} of each image's own t, which is uniform; a tenth have no class."""
    passes, inputs, taught = [], [], []
    forward, loss = RDPM.forward, rdpm.generator_loss
    training_input = rdpm.NoisyResidualQuantizer.training_input

    def record_forward(self, *args):
        passes.append(args)
        return forward(self, *args)

    def record_inputs(self, *args):
        inputs.append((*args, *training_input(self, *args)))
        return inputs[-1][-2:]

    monkeypatch.setattr(RDPM, "forward", record_forward)
    monkeypatch.setattr(rdpm.NoisyResidualQuantizer, "training_input", record_inputs)
    monkeypatch.setattr(rdpm, "generator_loss", lambda *args: taught.append(args[1]) or loss(*args))
    run(train_gen, *GEN, "--data", folder / "data", "--tokenizer", folder / "vq/model.pt", "--batch", 50,
        "--steps", 8, "--seed", 3, "--out", tmp_path / "gen")
    tokenizer = rdpm.load_tokenizer(folder / "vq/model.pt")
    ts, dropped = [], 0
    for step, (v, eps, t, z_sum, codes) in enumerate(inputs):
        seen_eps, seen_y, seen_t, seen_sum = passes[1 + step]  # the first counted the FLOPs
        assert torch.equal(eps, tokenizer.noise(3, range(2**32 + 50 * step, 2**32 + 50 * step + 50), "cpu"))
        assert torch.equal(seen_eps, torch.stack([eps[t[i] - 1, i] for i in range(50)]))
        assert torch.equal(seen_t, t) and torch.equal(seen_sum, z_sum) and torch.equal(taught[step], codes)
        assert v.shape == (50, 64, 4) and ((seen_y >= 0) & (seen_y <= CLASSES)).all()
        ts += t.tolist()
        dropped += int((seen_y == CLASSES).sum())
    counts = np.bincount(ts, minlength=4)
    assert len(inputs) == 8 and counts[0] == 0 and scipy.stats.chisquare(counts[1:]).pvalue > 1e-3
    assert scipy.stats.binomtest(dropped, 400, 0.1).pvalue > 1e-3


class Interrupted(Exception):
    pass


def same(a, b) -> bool:
    """Equal to the bit, through dicts and lists."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def state(out: Path) -> dict:
    return torch.load(out / "state.pt", weights_only=True)


STAGES = [("vq", ["--gan", 0.75]), ("gen", []), ("gen", ["--no-cache", "--head", "linear"])]


@pytest.fixture
def training(folder):
    """A trainer by stage, and its flags for the folder."""
    flags = {"vq": VQ, "gen": [*GEN, "--tokenizer", folder / "vq/model.pt"]}
    return lambda stage, *more: ({"vq": train_vq, "gen": train_gen}[stage],
                                 [*flags[stage], "--data", folder / "data", *more])


@pytest.mark.parametrize(("stage", "more"), STAGES)
def test_resuming_continues_bit_for_bit(stage, more, training, tmp_path, monkeypatch):
    """Four steps, and two steps, a crash after the checkpoint and --resume: the same state."""
    script, flags = training(stage, *more, "--steps", 4, "--save-every", 2)
    run(script, *flags, "--out", tmp_path / "a")
    save_state = rdpm.save_state

    def save_and_stop(*args):
        save_state(*args)
        raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(rdpm, "save_state", save_and_stop)
        with pytest.raises(Interrupted):
            run(script, *flags, "--out", tmp_path / "b", "--resume")  # nothing there yet: begins
    assert state(tmp_path / "b")["step"] == 2
    run(script, *flags, "--out", tmp_path / "b", "--resume")
    a, b = (state(tmp_path / name) for name in "ab")
    assert a["step"] == b["step"] == 4 and same(a["parts"], b["parts"])
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    different = ["--T", 4] if stage == "vq" else ["--depth", 2]
    with pytest.raises(UserError, match="was trained with"):
        run(script, *flags, "--out", tmp_path / "b", "--resume", *different)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(("stage", "more"), STAGES[:2])
def test_a_signal_saves_and_the_resumed_run_is_the_uninterrupted_one(stage, more, number, training, tmp_path,
                                                                     monkeypatch, capsys):
    script, flags = training(stage, *more, "--steps", 3)
    run(script, *flags, "--out", tmp_path / "a")
    rate = rdpm.learning_rate

    def signalled(step, *args):  # in the middle of the second step
        if step == 1:
            signal.raise_signal(number)
        return rate(step, *args)

    with monkeypatch.context() as patch:
        patch.setattr(rdpm, "learning_rate", signalled)
        with pytest.raises(SystemExit) as stop:
            run(script, *flags, "--out", tmp_path / "b")
    assert stop.value.code == 75 and "saved after step 2; the same command with --resume" in capsys.readouterr().err
    assert state(tmp_path / "b")["step"] == records(tmp_path / "b")[-1]["step"] == 2
    # A second Ctrl-C ends it at once; launchers send SIGTERM more than once.
    assert signal.getsignal(number) == {signal.SIGINT: signal.SIG_DFL, signal.SIGTERM: signal.SIG_IGN}[number]
    run(script, *flags, "--out", tmp_path / "b", "--resume")
    assert same(state(tmp_path / "a")["parts"], state(tmp_path / "b")["parts"])
    assert losses(tmp_path / "a") == losses(tmp_path / "b")


@pytest.mark.parametrize(("stage", "bad"), [("vq", [1]), ("gen", [1]), ("gen", range(1, 11))])
def test_steps_that_are_not_finite_are_skipped_and_ten_in_a_row_the_end(stage, bad, training, tmp_path, monkeypatch):
    """NaN among the noise of some steps: weights and optimizer are as if those steps had not been."""
    script, flags = training(stage, "--lr-final", 1, "--warmup", 0, "--save-every", 1, "--steps", max(bad) + 2,
                             *(["--gan", 0.75] if stage == "vq" else []))
    noise, save_state, states = Tokenizer.noise, rdpm.save_state, []

    def damaged(self, seed, numbers, device):
        eps = noise(self, seed, numbers, device)
        return eps.index_fill(1, torch.tensor([0]), math.nan) if (numbers[0] - 2**32) // 4 in bad else eps

    def record(path, kind, config, parts, done):
        states.append(copy.deepcopy({name: part.state_dict() for name, part in parts.items() if name != "ema"}))
        save_state(path, kind, config, parts, done)

    monkeypatch.setattr(Tokenizer, "noise", damaged)
    monkeypatch.setattr(rdpm, "save_state", record)
    if len(bad) < 10:
        run(script, *flags, "--out", tmp_path)
        assert same(states[0], states[1]) and not any(same(states[1][name], states[2][name]) for name in states[0])
        assert [record["skipped_steps"] for record in records(tmp_path) if "loss" in record] == [0, 1, 1]
        return
    with pytest.raises(UserError, match="the last 10 steps gave a loss or gradient that is not finite"):
        run(script, *flags, "--out", tmp_path)
    assert len(states) == 11 and same(states[0], states[-1])  # not one step more
    assert all(weight.isfinite().all() for weight in state(tmp_path)["parts"]["ema"].values())


@pytest.mark.parametrize("stage", ["vq", "gen"])
def test_accumulation_and_recomputation_do_not_change_the_steps(stage, training, tmp_path, monkeypatch):
    """Batches of five in one, two and five parts; activations twice. In float32: see the test of two ranks."""
    monkeypatch.setattr(rdpm, "autocast", lambda device: torch.autocast("cpu", enabled=False))
    script, flags = training(stage, "--batch", 5, "--steps", 3)
    monkeypatch.setattr(script, "autocast", rdpm.autocast)
    variants = [["--accum", 2], ["--accum", 5], *([["--recompute"]] if stage == "gen" else [])]
    for i, more in enumerate([[], *variants]):
        run(script, *flags, *more, "--out", tmp_path / str(i))
        close(losses(tmp_path / str(i)), losses(tmp_path / "0"), 1e-5)
        (first, a), (begin, b) = (records(tmp_path / name)[:2] for name in ("0", str(i)))
        close(a["grad_norm"], b["grad_norm"], 1e-4)
        assert first["flops_per_image"] == begin["flops_per_image"]


def test_recomputation_keeps_less():
    tokenizer = toy_tokenizer()
    model = toy_generator(tokenizer, depth=4).requires_grad_(True)
    kept = []
    for model.recompute in (False, True):
        kept.append(0)
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(kept.pop() + x.numel()) or x, lambda x: x):
            model(*some_inputs(tokenizer))
    assert kept[1] < kept[0] / 2


def as_rank(rank: str, port: str, command: list[str], files: list[Path]) -> None:
    """`python *command` as one of two ranks, in a new process, with stdout and stderr in `files`."""
    for path, stream in zip(files, (1, 2), strict=True):
        os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY), stream)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "RANK": rank, "LOCAL_RANK": rank}
    os.chdir(HERE)
    sys.argv[:] = command
    runpy.run_path(command[0], run_name="__main__")


@pytest.fixture
def on_two_ranks(tmp_path):
    """What torchrun would start, without torchrun, which hides exit codes.

    The ranks are forked from a process that has imported PyTorch but not used it: a start takes no five seconds.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])

    def start(*command) -> list[subprocess.CompletedProcess]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        command, files = list(map(str, command)), [[tmp_path / f"{rank}.{kind}" for kind in "oe"] for rank in "01"]
        ranks = [context.Process(target=as_rank, args=(rank, port, command, paths))
                 for rank, paths in zip("01", files, strict=True)]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join(100)
            rank.kill()  # if it hangs, or pytest would wait for it
        return [subprocess.CompletedProcess(command, rank.exitcode, *[path.read_text() for path in paths])
                for rank, paths in zip(ranks, files, strict=True)]
    return start


DRIVER = f"""
import os, signal, sys
sys.path.insert(0, {str(HERE)!r})
import torch, rdpm
script, event, *sys.argv[1:] = sys.argv[1:]
script = __import__(script)
rdpm.autocast = script.autocast = lambda device: torch.autocast(device.type, enabled=False)
rate = rdpm.learning_rate
def learning_rate(step, *args):  # in the middle of rank 1's eighth step
    if step == 7 and os.environ.get("RANK") == "1" and event == "signal":
        signal.raise_signal(signal.SIGTERM)
    return rate(step, *args)
rdpm.learning_rate = learning_rate
rdpm.run_main(script.main)
"""


@pytest.mark.parametrize("stage", ["vq", "gen"])
def test_two_ranks_train_as_one(stage, training, on_two_ranks, tmp_path, monkeypatch):
    """The same losses, once through torchrun. In float32: in bfloat16 another batch may round to another code."""
    (driver := tmp_path / "driver.py").write_text(DRIVER)
    script, flags = training(stage, "--steps", 20, *(["--no-cache"] if stage == "gen" else ["--gan", 0.75]))
    command = [driver, script.__name__, "none", *flags, "--out"]
    for module in (rdpm, script):
        monkeypatch.setattr(module, "autocast", lambda device: torch.autocast("cpu", enabled=False))
    run(script, *flags, "--out", tmp_path / "one")
    if stage == "vq":
        assert [rank.returncode for rank in on_two_ranks(*command, tmp_path / "two")] == [0, 0]
    else:
        shell("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *command, tmp_path / "two")
    one, two = records(tmp_path / "one"), records(tmp_path / "two")
    assert two[0]["world"] == 2 and len(two) == len(one)
    close(losses(tmp_path / "two"), losses(tmp_path / "one"), 1e-5)
    close(two[1]["grad_norm"], one[1]["grad_norm"], 1e-4)
    if stage == "vq":
        return
    # One of two ranks hears a signal: both stop after the same step, and go on as if nothing had been.
    command[2] = "signal"
    ranks = on_two_ranks(*command, tmp_path / "stopped")
    assert [rank.returncode for rank in ranks] == [75, 75] and "saved after step 8" in ranks[0].stderr
    assert state(tmp_path / "stopped")["step"] == 8
    command[2] = "none"
    ranks = on_two_ranks(*command, tmp_path / "stopped", "--resume")
    assert same(state(tmp_path / "stopped")["parts"], state(tmp_path / "two")["parts"])
    assert losses(tmp_path / "stopped") == losses(tmp_path / "two")


def test_two_ranks_sample_as_one(shapes, on_two_ranks, tmp_path):
    """Seven images in batches of two: the last batch of rank 1 is the only one that is not full."""
    flags = ["--ckpt", shapes / "gen/model.pt", "--num", 7, "--batch", 2, "--device", "cpu", "--steps"]
    run(sample, *flags, "--npz", tmp_path / "1.npz", "--out", tmp_path / "1.png")
    ranks = on_two_ranks("sample.py", *flags, "--npz", tmp_path / "2.npz", "--out", tmp_path / "2.png")
    assert [rank.returncode for rank in ranks] == [0, 0] and not ranks[1].stdout
    for name in ("arr_0", "arr_1"):
        assert np.array_equal(*(np.load(tmp_path / file)[name] for file in ("1.npz", "2.npz")))
    assert np.array_equal(*(Image.open(tmp_path / file) for file in ("1.png", "2.png")))


# ------------------------------------------------------------------------------------------------------------
# Bad input: one clear line, exit code 2, nothing overwritten
# ------------------------------------------------------------------------------------------------------------


def fails(capfd, monkeypatch, script, *flags) -> str:
    """The one line that a script ends with."""
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, flags)])
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        rdpm.run_main(script.main)
    assert stop.value.code == 2
    *before, line = capfd.readouterr().err.splitlines()
    assert line.startswith("error: ") and "Traceback" not in "".join(before)
    return line


@pytest.fixture
def failing(capfd, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    return lambda *command: fails(capfd, monkeypatch, *command)


@pytest.fixture(scope="module")
def rubbish(folder, shapes, tmp_path_factory) -> Path:
    """What people give by mistake, or by malice, beside a good data/, vq.pt and gen.pt."""
    out = tmp_path_factory.mktemp("rubbish")
    for name, target in (("data", "data"), ("vq.pt", "vq/model.pt"), ("linear.pt", "gen/model.pt")):
        (out / name).symlink_to(folder / target)
    (out / "gen.pt").symlink_to(shapes / "gen/model.pt")
    whole = (out / "vq.pt").read_bytes()
    for percent in range(0, 100, 10):
        (out / f"{percent}.pt").write_bytes(whole[:len(whole) * percent // 100])
    torch.save({"kind": "generator", "config": Hostile(out / "appeared")}, out / "hostile.pt")
    (out / "pickle.pt").write_bytes(pickle.dumps(Hostile(out / "appeared"), protocol=2))
    torch.save([1, 2], out / "list.pt")
    for name, kind, key, value in (("T.pt", "gen", "T", 4), ("linearT.pt", "linear", "T", 4),
                                   ("K.pt", "gen", "K", 33), ("linearK.pt", "linear", "K", 33)):
        contents = rdpm.read_checkpoint(out / f"{kind}.pt", "generator")
        contents["tokenizer"]["config"][key] = value
        if key == "K":
            contents["tokenizer"]["model"]["quantizer.codebook"] = torch.zeros(33, 4)
        torch.save(contents, out / name)
    (out / "nothing").mkdir()
    (out / "hollow" / "class").mkdir(parents=True)
    (out / "few" / "class").mkdir(parents=True)
    Image.new("RGB", (32, 32)).save(out / "few" / "class" / "1.png")
    one = draw_folder(out / "one", 60)
    for name in rdpm.SHAPES[1:3]:
        (one / name).rename(out / name)
    draw_folder(out / "small", size=31)
    for name, size, colour in (("small.png", 16, 0), ("black.png", 32, 0), ("white.png", 32, 255)):
        Image.new("L", (size, size), colour).save(out / name)
    (out / "empty.png").write_bytes(b"")
    (out / "cut.png").write_bytes(next(one.rglob("*.png")).read_bytes()[:60])
    width_and_height = b"IHDR" + struct.pack(">II", 50_000, 50_000) + b"\x08\x02\x00\x00\x00"
    header = struct.pack(">I", 13) + width_and_height + struct.pack(">I", zlib.crc32(width_and_height))
    (out / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + (out / "white.png").read_bytes()[33:])
    np.savez(out / "objects.npz", arr_0=np.array([{}] * 9, dtype=object))
    return out


BAD_INPUT = {
    # data
    "train_vq --data nowhere": "--data nowhere: no such folder; give a folder with",
    "train_vq --data nothing": "--data nothing: .* every class needs a folder with at least one image",
    "train_vq --data hollow": "--data hollow: ",
    "train_vq --data few": "--data few: 1 images; give at least 20",
    "train_vq --data vq.pt": "--data vq.pt: no such folder",
    "train_vq --data small": r"small/\w+/\d+.png: 31 x 31 is smaller than the crop of 32 x 32",
    "train_vq --data small --workers 1": r"small/\w+/\d+.png: 31 x 31 is smaller than the crop of 32 x 32",
    "train_gen --data one --tokenizer vq.pt": "--data one: one class only, arrow; .* needs two or more",
    # numbers
    **{f"train_vq {flags}": message for flags, message in {
        **{flags: f"{flags}: must be a positive number" for flags in (
            "--batch -4", "--batch 0", "--steps -1", "--lr nan", "--lr inf", "--epochs inf", "--T 0", "--K -2",
            "--dim 0", "--log-every 0", "--accum 0", "--image-size 0")},
        "--image-size 30": "image size 30 is not a multiple of 4",
        "--seed -1": "--seed -1: must be a number from 0 up", "--timeout 0": "--timeout 0.0: must be",
        "--accum 5 --data data": "--accum 5: a device has 4 images a step"}.items()},
    "train_gen --depth 0": "--depth 0: must be a positive number",
    "train_gen --data data --tokenizer vq.pt --patch 3": "--patch 3: does not divide the tokenizer's 8 x 8 tokens",
    "train_vq --device cuda:99": "--device cuda:99: ",
    # checkpoints
    "train_gen --data data": "no tokenizer at runs/shapes-vq/model.pt: train one with",
    "train_gen --data data --tokenizer gen.pt": "gen.pt: holds a generator, not a tokenizer",
    "sample --ckpt vq.pt": "vq.pt: holds a tokenizer, not a generator",
    "sample --ckpt no.pt": "no.pt: no such checkpoint",
    "sample --ckpt data": "data: no such checkpoint",
    "sample --ckpt list.pt": "list.pt: holds something else, not a generator",
    **{f"sample --ckpt {name}.pt": f"{name}.pt: not a checkpoint, or a damaged one"
       for name in ("hostile", "pickle", *range(0, 100, 10))},
    **{f"sample --ckpt {name}.pt": f"{name}.pt: the (generator|tokenizer)'s weights do not fit its config"
       for name in ("T", "K", "linearT", "linearK")},
    # the sampler
    **{f"sample --ckpt gen.pt {flags}": message for flags, message in {
        "--classes 10": "class 10: not a class of this checkpoint; it has 0 ... 9: arrow, bar",
        "--classes=-1": "class -1: not a class", "--classes rings": "class rings: not a class",
        "--num 0": "--num 0: must be a positive", "--batch -4": "--batch -4: must be", "--seed -1": "--seed -1: must",
        "--guidance nan": "--guidance nan: must be a number", "--out a.txt": "--out a.txt: must end in .png",
        "--out no/a.png": "no/a.png: there is no folder no", "--npz a.png": "--npz a.png: must end in .npz",
        "--edit white.png --mask small.png": r"--mask small.png: \(16, 16\), but white.png is \(32, 32\)",
        "--edit white.png --mask black.png": "--mask black.png: is all black",
        "--edit black.png --mask white.png": "--mask white.png: is all white",
        "--edit white.png": "--edit needs --mask", "--layout white.png": "--layout needs --layout-steps",
        "--layout white.png --layout-steps 0 4": "--layout-steps 0 4: each must be 0 ... 3",
        "--layout white.png --layout-steps -1": "--layout-steps -1: each must be 0 ... 3",
        "--layout white.png --layout-steps 1 --num 3": "--num: does nothing beside --layout",
        "--reconstruct white.png --fast": "--fast: does nothing beside --reconstruct",
        "--interpolate 0 1 --steps": "--steps: does nothing beside --interpolate",
        "--steps --out a.gif": "--out a.gif: --steps draws a still picture",
        "--edit no.png --mask black.png": "no.png: no such picture",
        "--edit white.png --mask black.png --reconstruct white.png": "only one of --layout",
        "--reconstruct cut.png": "cut.png: not a readable image", "--reconstruct vq.pt": "vq.pt: not a readable image",
        "--reconstruct empty.png": "empty.png: not a readable image",
        "--reconstruct bomb.png": r"bomb.png: not a readable image \(.*2500000000 pixels.*bomb"}.items()},
    # FID while training
    **{f"train_gen --data data --tokenizer vq.pt --fid-ref {flags}": message for flags, message in {
        "no.npz --fid-num 9": "--fid-num 9: N = 9", "no.npz --fid-num 1 --random-features": "--fid-num 1: N = 1",
        "no.npz --fid-num 4 --random-features": "no.npz: no such file",
        "objects.npz --fid-num 4 --random-features": "objects.npz: .*holds Python objects"}.items()},
}


@pytest.mark.parametrize("command", BAD_INPUT)
def test_bad_input_gets_one_line(command, rubbish, failing, monkeypatch):
    monkeypatch.chdir(rubbish)
    before = set(rubbish.rglob("*"))
    script, *flags = command.split()
    common = {"train_vq": VQ, "train_gen": GEN, "sample": ["--device", "cpu"]}[script]
    line = failing(globals()[script], *common, *flags)
    assert re.search(BAD_INPUT[command], line), line
    assert not (rubbish / "appeared").exists()
    assert not [file for file in set(rubbish.rglob("*")) - before if file.is_file() and file.name != "log.jsonl"]


def test_unwritable_out(failing, rubbish, training):
    for stage in ("vq", "gen"):
        script, flags = training(stage)
        line = failing(script, *flags, "--out", rubbish / "vq.pt/out")
        assert re.search("--out .*vq.pt/out: cannot write there", line)


FORMATS = {"CMYK": "jpg", "L": "png", "LA": "png", "P": "png", "RGBA": "png", "I;16": "png", "1": "png"}


def test_unusual_images_are_converted(tmp_path):
    """CMYK, grey, palette, 16 bits, transparency, and turned by EXIF: the colours of the RGB original."""
    colour = Image.fromarray(np.linspace(0, 255, 32 * 32 * 3).astype(np.uint8).reshape(32, 32, 3))
    grey = np.array(colour.convert("L"))
    for mode, kind in FORMATS.items():
        path = tmp_path / f"{mode[:2]}.{kind}"
        image = Image.fromarray(grey.astype(np.uint16) * 257) if mode == "I;16" else colour.convert(mode)
        image.save(path, quality=100)
        expected = {"CMYK": colour, "RGBA": colour, "P": image.convert("RGB"), "1": image.convert("RGB")}.get(
            mode, Image.fromarray(grey).convert("RGB"))
        read = rdpm.read_image(str(path))
        assert read.mode == "RGB" and np.abs(np.array(read, int) - np.array(expected, int)).max() <= 6, mode
    turned = colour.crop((0, 0, 32, 16))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 270 degrees to see it upright
    turned.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.jpg", exif=exif, quality=100)
    read = np.array(rdpm.read_image(str(tmp_path / "turned.jpg")), int)
    assert read.shape == (16, 32, 3) and np.abs(read - np.array(turned, int)).mean() < 3


@pytest.mark.parametrize("workers", [0, 1])
def test_corrupt_images_are_named_counted_and_replaced(failing, tmp_path, workers, capfd):
    files = sorted(draw_folder(tmp_path / "data", 60).glob("*/*.png"))
    arrow, bar = ([file for file in files if file.parent.name == name] for name in ("arrow", "bar"))
    for file in (arrow[3], arrow[-1], bar[3], bar[4]):
        file.write_bytes(file.read_bytes()[:60])
    flags = [*VQ, "--data", "data", "--epochs", 2, "--workers", workers]
    run(train_vq, *flags, "--out", "a")
    said = capfd.readouterr().err
    assert said.count("replaced by the next of its class: data/") == said.count("not a readable image") == 4
    assert records(tmp_path / "a")[-2]["corrupt_images"] == 4
    line = failing(train_vq, *flags, "--out", "b", "--strict")
    assert re.search(r"data/(arrow|bar)/\d+.png: not a readable image", line)
    images = rdpm.load_data("data", 32, True, strict=False)
    paths = [Path(images.source.samples[i][0]) for i in images.indices]
    for broken, instead in ((arrow[3], arrow[4]), (arrow[-1], arrow[0] if arrow[0] in paths else arrow[1]),
                            (bar[3], bar[5]), (bar[4], bar[5])):
        if broken in paths:
            item, label = images[paths.index(broken)]
            assert torch.equal(item, images[paths.index(instead)][0]) and images.classes[label] == broken.parent.name
    for file in bar:
        file.write_bytes(b"")
    assert re.search(r"data/bar/\d+.png: not a readable image", failing(train_vq, *flags, "--out", "c"))  # none is left


def test_a_dead_worker_is_an_error(failing, tmp_path, monkeypatch):
    draw = rdpm.draw_shape
    monkeypatch.setattr(rdpm, "draw_shape", lambda label, *args: os._exit(1) if label == 3 else draw(label, *args))
    assert "DataLoader worker" in failing(train_vq, *VQ, "--workers", 1, "--steps", 99)


def test_a_full_disk_leaves_the_last_checkpoint(training, tmp_path):
    """RLIMIT_FSIZE stands for the disk: state.pt of the second step does not fit any more."""
    script, flags = training("gen", "--steps", 2, "--save-every", 1, "--out", tmp_path / "a")
    limited = f"""
import resource, sys
sys.path.insert(0, {str(HERE)!r})
import rdpm, train_gen
save = rdpm.save_state
def save_state(path, *args):
    if path.exists():
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size // 2,) * 2)
    save(path, *args)
rdpm.save_state = save_state
rdpm.run_main(train_gen.main)"""
    command = [sys.executable, "-c", limited, *map(str, flags)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    *_, line = done.stderr.splitlines()
    assert done.returncode == 2 and re.search(r"error: .*state.pt: cannot be written .*is the disk full", line)
    names = {file.name for file in (tmp_path / "a").iterdir()}
    assert names == {"state.pt", "model.pt", "log.jsonl", "grid-000001.png"}
    assert state(tmp_path / "a")["step"] == 1
    run(script, *flags, "--resume")
    assert state(tmp_path / "a")["step"] == 2


@pytest.mark.parametrize("stage", ["vq", "gen"])
def test_a_finished_run_is_not_overwritten(failing, folder, training, stage):
    script, flags = training(stage)
    before = {file: file.read_bytes() for file in (folder / stage).iterdir()}
    line = failing(script, *flags, "--steps", 1, "--out", folder / stage)
    assert f"--out {folder / stage} already holds a run" in line
    assert {file: file.read_bytes() for file in (folder / stage).iterdir()} == before


def test_no_network_for_pretrained_weights(failing, monkeypatch, tmp_path):
    def no_network(*_):
        raise urllib.error.URLError("no route")

    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    flags = [*VQ, "--perceptual", 1]
    line = failing(train_vq, *flags)
    assert f"cannot download {rdpm.VGG16_URL}" in line and "--vgg16" in line
    assert "--vgg16 nowhere.pth: no such file" in failing(train_vq, *flags, "--vgg16", "nowhere.pth")
    (tmp_path / "wrong.pth").write_bytes(b"not these weights")
    assert "wrong.pth: sha256 is" in failing(train_vq, *flags, "--vgg16", "wrong.pth")
    assert not (tmp_path / "runs").exists()


def test_no_network_for_data(failing, monkeypatch):
    def no_network(*_, **__):
        raise urllib.error.URLError("no route")

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", no_network)
    assert "--data cifar10: the download into data/ failed" in failing(train_vq, *VQ, "--data", "cifar10")


# ------------------------------------------------------------------------------------------------------------
# README
# ------------------------------------------------------------------------------------------------------------


def test_names_in_the_readmes_paper_and_code_table_exist():
    text = (HERE / "README.md").read_text()
    section = re.search(r"^#+ Paper and code\n(.*?)(?=^#+ |\Z)", text, re.MULTILINE | re.DOTALL)
    assert section, "no heading 'Paper and code'"
    _, _, *rows = [line for line in section[1].splitlines() if line.startswith("|")]
    assert len(rows) >= 15
    for row in rows:
        names = re.findall(r"`([^`]+)`", row.split("|")[2])
        assert names, row
        for name in names:
            found = rdpm
            for part in name.split("."):
                found = getattr(found, part, None)
            assert found is not None or (HERE / name).is_file(), name


# ------------------------------------------------------------------------------------------------------------
# fid.py: against the packages that define these numbers, and the mistakes users make
# ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def inception_state():
    """Random weights with batch norms that do something, unlike freshly made ones."""
    state, rng = fid.random_state(), np.random.RandomState(1)
    for name, w in state.items():
        if name.endswith(("bn.weight", "bn.bias", "fc.bias")):
            w += torch.from_numpy(rng.uniform(-0.1, 0.1, tuple(w.shape))).float()
    return state


@pytest.fixture(scope="session")
def inception(inception_state):
    return fid.Inception(inception_state, "random-test")


@pytest.fixture(scope="session")
def torch_fidelity_inception(inception_state):
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "load_state_dict_from_url", lambda *args, **kwargs: inception_state)
        return module.FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"])


def bytes_of(*shape, seed=0):
    return torch.from_numpy(np.random.RandomState(seed).randint(0, 256, shape, np.uint8))


def near(x, y, tolerance):
    assert (x - y).abs().max() <= tolerance * y.abs().max(), (x - y).abs().max() / y.abs().max()


def test_inception_equals_torch_fidelity(inception, torch_fidelity_inception):
    x = bytes_of(2, 3, 40, 32)
    pool, _, logits = inception(x)
    near(pool, torch_fidelity_inception(x)[0], 1e-4)
    near(logits, torch_fidelity_inception(x)[1], 1e-4)


def test_inception_equals_pytorch_fid(inception, inception_state, monkeypatch):
    module = pytest.importorskip("pytorch_fid.inception")
    monkeypatch.setattr(module, "load_state_dict_from_url", lambda *args, **kwargs: inception_state)
    x = bytes_of(2, 3, 299, 299)  # at 299 neither resizes
    theirs = module.InceptionV3(resize_input=False).eval()((x.float() - 128) / 256 + 0.5)[0].flatten(1)
    near(inception(x)[0], theirs, 1e-4)


@pytest.mark.parametrize("height, width", [(28, 28), (40, 26), (256, 299), (640, 333)])
def test_resize_is_tensorflows(height, width):
    module = pytest.importorskip("torch_fidelity.interpolate_compat_tensorflow")
    x = bytes_of(1, 3, height, width).float()
    ours = fid.resize_matrix(height) @ x @ fid.resize_matrix(width).T
    theirs = module.interpolate_bilinear_2d_like_tensorflow1x(x, (299, 299), align_corners=False)
    assert (ours - theirs).abs().max() < 1e-3
    assert (fid.resize_matrix(height) != 0).sum(1).max() <= 2


def test_sfid_layer_and_layout(inception, torch_fidelity_inception):
    seen = []
    handle = torch_fidelity_inception.Mixed_6d.branch1x1.register_forward_hook(lambda m, i, o: seen.append(o))
    x = bytes_of(1, 3, 32, 32)
    torch_fidelity_inception(x)
    handle.remove()
    spatial = inception(x)[1]
    assert spatial.shape == (1, 2023)
    by_hand = torch.tensor([[seen[0][0, c, h, w] for h in range(17) for w in range(17) for c in range(7)]])
    near(spatial, by_hand, 1e-4)


def test_float32_whatever_the_trainer_set(inception):
    x = bytes_of(1, 3, 32, 32)
    before = inception(x)
    torch.set_float32_matmul_precision("high")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            after = inception(x)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert all(a.dtype == torch.float32 and torch.equal(a, b) for a, b in zip(after, before, strict=True))


def test_random_features_are_the_same_everywhere(inception_state):
    first = inception_state["Conv2d_1a_3x3.conv.weight"].flatten()[:3]
    near(first, torch.tensor([1.764052, 0.400157, 0.978738]) * (2 / 27) ** 0.5, 1e-5)  # RandomState(0), forever


@pytest.mark.parametrize("n1, n2", [(500, 400), (60, 50), (500, 40), (40, 500)])
def test_frechet_distance_equals_pytorch_fid(n1, n2, monkeypatch):
    module = pytest.importorskip("pytorch_fid.fid_score")
    sqrtm = module.linalg.sqrtm
    monkeypatch.setattr(module.linalg, "sqrtm", lambda a, disp: (sqrtm(a), None))  # SciPy 1.18 removes `disp`
    rng, d = np.random.RandomState(0), 128
    mix = rng.standard_normal((d, d)) * np.geomspace(1, 0.01, d)
    x, y = np.abs(rng.standard_normal((n1, d)) @ mix), np.abs(rng.standard_normal((n2, d)) @ mix + 0.3)
    stats = x.mean(0), np.cov(x, rowvar=False), y.mean(0), np.cov(y, rowvar=False)
    ours = fid.frechet_distance(*stats)
    assert ours == pytest.approx(module.calculate_frechet_distance(*stats), rel=1e-6)
    # The trace of the root is also the sum of singular values of the centred features' product: no root at all.
    product = (x - x.mean(0)) @ (y - y.mean(0)).T / np.sqrt((n1 - 1) * (n2 - 1))
    root = np.linalg.svd(product, compute_uv=False).sum()
    exact = ((stats[0] - stats[2]) ** 2).sum() + np.trace(stats[1]) + np.trace(stats[3]) - 2 * root
    assert ours == pytest.approx(exact, rel=1e-6)
    assert abs(fid.frechet_distance(*stats[:2], *stats[:2])) < 1e-5 * np.trace(stats[1])


def features(n, seed=0):
    """Images, pool_3, spatial features, logits."""
    rng = np.random.RandomState(seed)
    pool, spatial, logits = (torch.from_numpy(rng.gamma(1, 1, (n, d))).float() for d in (2048, 2023, 1008))
    return bytes_of(n, 3, 8, 8, seed=seed), pool, spatial, logits


def streamed(n, data, batch, keep=0):
    """FeatureStatistics fed in batches, last batch first."""
    s = fid.FeatureStatistics(n, keep)
    for numbers in reversed(torch.arange(n).split(batch)):
        s.update(numbers.tolist(), *(x[numbers] for x in data))
    return s.gather()


def test_streamed_moments():
    data = features(57)
    s = streamed(57, data, 10)
    for layer, x in ((s.pool, data[1].double().numpy()), (s.spatial, data[2].double().numpy())):
        mu, sigma = s.moments(layer)
        np.testing.assert_allclose(mu, x.mean(0), rtol=1e-12)
        np.testing.assert_allclose(sigma, np.cov(x, rowvar=False), atol=1e-11)
    np.testing.assert_allclose(s.means, data[0].double().mean((0, 2, 3)).numpy())
    assert s.sha256 == streamed(57, data, 10).sha256 != streamed(57, features(57, seed=1), 10).sha256


def test_inception_score_equals_torch_fidelity():
    module = pytest.importorskip("torch_fidelity.metric_isc")
    n = 203
    data = features(n)
    label = torch.arange(n) * 20 // n                            # sorted by class: file order would give nonsense
    logits = data[3] + 12 * torch.nn.functional.one_hot(label, 1008)
    theirs = module.isc_features_to_metric(logits)["inception_score_mean"]
    ours = streamed(n, (*data[:3], logits), 16).inception_score()
    assert ours == pytest.approx(theirs, rel=1e-9)
    in_file_order = module.isc_features_to_metric(logits, shuffle=False)["inception_score_mean"]
    assert in_file_order < 0.3 * ours


def test_precision_and_recall_equal_torch_fidelity():
    module = pytest.importorskip("torch_fidelity.metric_prc")
    rng = np.random.RandomState(0)
    reference = torch.from_numpy(rng.standard_normal((130, 16))).float()
    samples = torch.from_numpy(0.7 * rng.standard_normal((90, 16)) + 0.2).float()
    theirs = module.prc_features_to_metric(samples, reference, prc_neighborhood=3, prc_batch_size=1000,
                                           save_cpu_ram=False, verbose=False)
    precision, recall = fid.precision_recall(reference=reference, samples=samples, tile=37)
    assert (precision, recall) == pytest.approx((theirs["precision"], theirs["recall"]), abs=1e-7)
    assert precision > recall + 0.1
    with pytest.raises(TypeError):
        fid.precision_recall(reference, samples)  # in which order? they must be named


def test_psnr_and_ssim_equal_scikit_image():
    metrics = pytest.importorskip("skimage.metrics")
    x = bytes_of(4, 3, 33, 40)
    x[1] = 250 + x[1] // 50                                       # bright and flat: where rounding would show
    x[2] = torch.arange(40)[None, None] * 6
    y = (x.int() + bytes_of(4, 3, 33, 40, seed=1) // 16 - 8).clamp(0, 255).byte()
    x[3], y[3] = 65, 255                                          # flat: nothing but the means
    for i in range(4):
        a, b = (z[i].permute(1, 2, 0).numpy() for z in (x, y))
        assert fid.psnr(x, y)[i].item() == pytest.approx(metrics.peak_signal_noise_ratio(a, b), abs=1e-5)
        theirs = metrics.structural_similarity(a, b, channel_axis=2)
        assert fid.ssim(x, y)[i].item() == pytest.approx(theirs, abs=1e-5)
        on_unit = metrics.structural_similarity(a / 255, b / 255, channel_axis=2, data_range=1)
        assert theirs == pytest.approx(on_unit, abs=1e-9)         # the convention that fid.py names
    assert fid.ssim(x, x).tolist() == [1] * 4


# The command line, on small pictures and random weights.


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """A folder with sets of images, good and bad."""
    root = tmp_path_factory.mktemp("pictures")

    def folder(name, images, ending="png"):
        (root / name).mkdir(parents=True)
        for i, image in enumerate(images):
            Image.fromarray(image).save(root / name / f"{i:06}.{ending}")

    x = bytes_of(9, 24, 24, 3).numpy()
    colour = np.array([90, 40, 10], np.uint8) + bytes_of(9, 24, 24, 3, seed=2).numpy() // 8
    folder("good", x)
    folder("tree/train/a", x[:5])
    folder("tree/train/b", x[5:])
    folder("tree/test/a", x[::2], "jpg")
    folder("mixed", [*x[:4], x[4, :20]])
    folder("larger", bytes_of(9, 48, 60, 3, seed=1).numpy())
    folder("rgba", np.concatenate([x, x[..., :1]], axis=3))
    folder("deep", x[..., 0].astype(np.uint16) * 256)
    folder("jpeg", x, "jpg")
    folder("renamed", x)
    Image.fromarray(x[0]).save(root / "renamed/000000.png", format="JPEG")
    folder("gap", x)
    (root / "gap/000003.png").unlink()
    folder("twice", x)
    Image.fromarray(x[0]).save(root / "twice/000002.jpg")
    folder("broken", x)
    (root / "broken/000005.png").write_bytes((root / "good/000005.png").read_bytes()[:100])
    folder("rgb", colour)
    folder("bgr", colour[..., ::-1])
    np.savez(root / "good.npz", arr_0=x)
    np.savez(root / "objects.npz", arr_0=np.array([1, "a", None], dtype=object))
    np.savez(root / "words.npz", arr_0=np.array(["a", "b"]))
    np.savez(root / "nothing.npz", arr_0=np.zeros((0, 24, 24, 3)))
    np.savez(root / "half.npz", mu=np.zeros(2048))
    np.savez(root / "nan_mu.npz", mu=np.full(2048, np.nan), sigma=np.eye(2048))
    np.savez_compressed(root / "compressed.npz", arr_0=x)
    np.savez(root / "one.npz", arr_0=x[:1])
    np.savez(root / "many.npz", arr_0=np.zeros((2047, 8, 8, 3), np.uint8))
    nan = x / np.float32(127.5) - 1
    np.savez(root / "float.npz", arr_0=nan)
    nan[7, 3] = np.nan
    np.savez(root / "nan.npz", arr_0=nan)
    np.savez(root / "channels_first.npz", arr_0=x.transpose(0, 3, 1, 2))
    (root / "truncated.npz").write_bytes((root / "good.npz").read_bytes()[:5000])
    (root / "weights.pth").write_bytes(b"not Inception")
    statistics = {"mu": np.zeros(2048), "sigma": np.eye(2048), "weights": "random-test"}
    np.savez(root / "statistics.npz", **statistics)
    np.savez(root / "adm.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    return root


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """A folder with a small tokenizer and a small generator."""
    root = tmp_path_factory.mktemp("checkpoints")
    torch.manual_seed(0)
    config = rdpm.TokenizerConfig(image_size=24, channels=8, multipliers=(1, 1, 1), res_blocks=1, d=4, K=16, T=3)
    tokenizer = rdpm.Tokenizer(config)
    vq = {"kind": "tokenizer", "config": asdict(config), "model": tokenizer.state_dict()}
    config = rdpm.GeneratorConfig(depth=1, num_classes=3)
    model = toy_generator(tokenizer)
    rdpm.save_checkpoint(root / "vq.pt", vq)
    rdpm.save_checkpoint(root / "gen.pt", {
        "kind": "generator", "config": asdict(config), "model": model.state_dict(),
        "tokenizer": vq, "classes": ["a", "b", "c"], "sampling": rdpm.PRESETS["mnist"]["sampling"], "step": 1})
    return root


@pytest.fixture(scope="session")
def remembering(inception):
    """The same features, computed once for each batch of images: most runs below use the same pictures."""
    seen = {}

    def features(images):
        key = images.shape, images.contiguous().numpy().tobytes()
        seen[key] = seen.get(key) or inception(images)
        return seen[key]
    features.weights, features.device = inception.weights, inception.device
    return features


@pytest.fixture
def run_fid(pictures, checkpoints, remembering, monkeypatch, capsys, tmp_path):
    """Runs fid.py with these flags; names with a known place are completed. Returns what it printed and wrote."""
    def run_fid(flags, loaded=True):
        words = [next((str(root / word) for root in (pictures, checkpoints) if word and (root / word).exists()), word)
                 for word in flags.split()]
        monkeypatch.setattr(sys, "argv", ["fid.py", *words])
        if loaded:
            monkeypatch.setattr(fid, "load_inception", lambda *args: remembering)
        monkeypatch.chdir(tmp_path)
        fid.main()
        written = tmp_path / "fid.json"
        return capsys.readouterr().out, json.loads(written.read_text()) if written.exists() else {}
    return run_fid


MISTAKES = {
    "2. few": ("--ref good --samples good", r"good: N = 9, .* at least 2048 images; --allow-small"),
    "2. almost": ("--ref good --samples many.npz", r"many.npz: N = 2047, .*--allow-small"),
    "2. one": ("--ref good --samples one.npz --allow-small", r"one.npz: N = 1, .* 2 in any case"),
    "2. few sampled": ("--ref good --ckpt gen.pt --num 9", r"--num 9: N = 9, .*--allow-small"),
    "3. reference of rFID": ("--tokenizer vq.pt --data tree --ref good", r"rFID compares .* own reconstructions"),
    "4. uncropped": ("--ref larger --samples good --allow-small",
                     r"\(3, 24, 24\).*larger is \(3, 48, 60\).*--size N crops"),
    "4. mixed": ("--ref mixed --samples good --allow-small", r"000004.png: \(3, 20, 24\), but 000000.png is"
                 r" \(3, 24, 24\).*--size N crops"),
    "4. mixed samples": ("--ref good --samples mixed --allow-small", r"000004.png: \(3, 20, 24\).* one size$"),
    "5. other weights": ("--ref good --samples good --inception weights.pth",
                         r"weights.pth: sha256 is .* not 6726825d"),
    "5. other statistics": ("--ref adm.npz --samples good --allow-small", r"adm.npz: .*network 6726825d, not random"),
    "8. float": ("--ref good --samples float.npz",
                 r"float.npz: arr_0 must be uint8 RGB .* but is float32 \(9, 24, 24, 3\)"
                 r", min -1.0, max 1.0$"),
    "8. NaN": ("--ref good --samples nan.npz", r"nan.npz: .*NaN in images \[7\]"),
    "8. channels first": ("--ref good --samples channels_first.npz", r"uint8 \(9, 3, 24, 24\)"),
    "8. RGBA": ("--ref good --samples rgba",
                r"000000.png: must be uint8 RGB, but is uint8 \(24, 24, 4\), min 0, max 255"),
    "8. JPEG by another name": ("--ref good --samples renamed --allow-small", r"000000.png: not a PNG"),
    "8. objects": ("--ref good --samples objects.npz", r"objects.npz: .*holds Python objects"),
    "8. words": ("--ref good --samples words.npz", r"words.npz: arr_0 must be uint8 RGB .* but is <U\d+ \(2,\)"),
    "8. nothing": ("--ref good --samples nothing.npz", r"nothing.npz: .* but is float64 \(0, 24, 24, 3\)$"),
    "reference without sigma": ("--ref half.npz --samples good --allow-small", r"half.npz: mu and sigma must be"),
    "reference of NaN": ("--ref nan_mu.npz --samples good --allow-small", r"nan_mu.npz: mu and sigma must be finite"),
    "no folder for --out": ("--ref good --samples good --out nowhere/a.json", r"there is no folder nowhere"),
    "not an npz": ("--make-ref good --out a.json", r"--out a.json: --make-ref writes an .npz"),
    "number of a set": ("--ref good --samples good --num 2", r"--num 2: only for --ckpt and --tokenizer"),
    "negative tau": ("--ref good --ckpt gen.pt --tau -1", r"--tau -1.0: must be a number from 0 up"),
    "8. 16 bits": ("--ref good --samples deep", r"000000.png: must be uint8 RGB, but is u?int\d\d \(24, 24\)"),
    "8. JPEG": ("--ref good --samples jpeg", r"000000.jpg: not a PNG"),
    "truncated npz": ("--ref good --samples truncated.npz", r"truncated.npz: truncated"),
    "truncated reference": ("--ref truncated.npz --samples good --allow-small", r"truncated.npz: truncated"),
    "truncated PNG": ("--ref good --samples broken --allow-small", r"000005.png: truncated"),
    "no images": ("--ref good --samples statistics.npz", r"statistics.npz: holds no images"),
    "missing set": ("--ref good --samples nowhere", r"nowhere: no such file or folder"),
    "missing image": ("--ref good --samples gap", r"1 missing images, the first is number 3"),
    "duplicated name": ("--ref good --samples twice", r"twice/000002"),
    "no size": ("--ref shapes --samples good --allow-small", r"shapes: .*--size N"),
    "no mode": ("--ref good", r"give one of --samples"),
}


@pytest.mark.parametrize("flags, message", MISTAKES.values(), ids=MISTAKES)
def test_mistakes_get_one_line(run_fid, flags, message):
    with pytest.raises(rdpm.UserError, match=message) as error:
        run_fid(flags, loaded="--inception" not in flags)
    assert "\n" not in str(error.value)


def test_statistics_only_reference(run_fid):
    """Mistakes 6, 7, 10: N in the name; precision, recall and sFID refused, with the reason; never called FID."""
    out, report = run_fid("--ref statistics.npz --samples compressed.npz --allow-small")
    values = report["values"]
    assert values.pop("FD-random-9") > 0 and report["N"] == 9 and "FID" not in out
    assert values == {"sFD-random-9": None, "precision-random": None, "recall-random": None}
    assert re.search(r"sFD-random-9 unavailable: .*statistics.npz holds no mu_s", out)
    assert re.search(r"precision, recall unavailable: .* statistics only", out)


def test_channel_order_is_questioned(run_fid):
    """Mistake 8, the one that bytes cannot show."""
    assert "BGR" in run_fid("--ref rgb --samples bgr --allow-small")[0]
    assert "BGR" not in run_fid("--ref rgb --samples rgb --allow-small")[0]


def test_no_sqrtm(inception):
    """Mistake 9: SciPy's root is not used, and a near-singular product stays real."""
    assert "sqrtm" not in Path(fid.__file__).read_text()
    x = np.random.RandomState(0).standard_normal((300, 200)) * np.geomspace(1, 1e-9, 200)
    value = fid.frechet_distance(x.mean(0), np.cov(x, rowvar=False), x[::2].mean(0), np.cov(x[::2], rowvar=False))
    assert isinstance(value, float) and 0 < value < 1


def test_reference_file(run_fid, pictures, tmp_path):
    """--make-ref writes what the folder itself gives; ADM's layout; the split and the crop it says."""
    assert "N = 9" in run_fid("--make-ref tree --out ref.npz --allow-small")[0]
    with np.load(tmp_path / "ref.npz") as file:
        assert {name: file[name].shape for name in ("mu", "sigma", "mu_s", "sigma_s", "arr_0")} == {
            "mu": (2048,), "sigma": (2048, 2048), "mu_s": (2023,), "sigma_s": (2023, 2023), "arr_0": (9, 24, 24, 3)}
        assert (file["arr_0"] == np.load(pictures / "good.npz")["arr_0"]).all()
    _, direct = run_fid("--ref good --samples rgb --allow-small")
    out, report = run_fid(f"--ref {tmp_path}/ref.npz --samples rgb --allow-small")
    assert report["values"] == pytest.approx(direct["values"], rel=1e-6)
    assert report["reference sha256"] and report["weights"] == "random-test" and "fid.py" in report["command"]
    assert direct["values"]["FD-random-9"] > 0 and "N = 9, uint8 (3, 24, 24)" in out
    _, cropped = run_fid("--ref larger --samples good --size 24 --allow-small")
    assert cropped["N"] == 9


def test_training_split_against_held_out(run_fid):
    out, report = run_fid("--ref tree --samples tree --allow-small")
    assert report["N"] == 5 and report["values"]["FD-random-5"] > 0


def test_npz_equals_folder(run_fid):
    assert run_fid("--ref rgb --samples good --allow-small")[1]["values"]["FD-random-9"] == pytest.approx(
        run_fid("--ref rgb --samples good.npz --allow-small")[1]["values"]["FD-random-9"], rel=1e-9)


def test_generator_equals_its_samples(run_fid, checkpoints, pictures, inception, tmp_path):
    """Sampling and evaluating in one pass gives what writing the images and reading them gives."""
    _, report = run_fid("--ref rgb --ckpt gen.pt --num 9 --allow-small --seed 5 --tau 2 --fast")
    model, tokenizer, info = rdpm.load_generator(checkpoints / "gen.pt")
    sampling = info["sampling"] | {"tau": 2.0, "skip": 0, "guidance_from": 3}  # T = 3
    assert report["sampling"] == sampling and report["seed"] == 5
    with rdpm.autocast(torch.device("cpu")):
        x = rdpm.sample(model, tokenizer, torch.tensor([0, 1, 2] * 3), 5, list(range(9)), **sampling)
    assert len(x.unique(dim=0)) == 9
    np.savez(tmp_path / "samples.npz", arr_0=rdpm.to_uint8(x).permute(0, 2, 3, 1).numpy())
    _, written = run_fid(f"--ref rgb --samples {tmp_path}/samples.npz --allow-small")
    assert report["values"] == pytest.approx(written["values"], rel=1e-9)


def test_damaged_generator_is_named(run_fid, monkeypatch):
    sample = rdpm.sample

    def damaged(*args, **sampling):
        x = sample(*args, **sampling).clone()
        x[4, 0, 3, 3] = float("nan")
        return x
    monkeypatch.setattr(rdpm, "sample", damaged)
    with pytest.raises(rdpm.UserError, match=r"images \[4\]"):
        run_fid("--ref rgb --ckpt gen.pt --num 9 --allow-small")


def test_tokenizer(run_fid, checkpoints, pictures, remembering):
    """rFID, PSNR, SSIM and code usage are those of a plain loop over the held-out images."""
    out, report = run_fid("--tokenizer vq.pt --data tree --allow-small --seed 3")
    assert "held-out split" in out and "tree" in out and "7x7 window" in out
    tokenizer = rdpm.load_tokenizer(checkpoints / "vq.pt")
    decibels, codes, originals, reconstructions = [], [[] for _ in range(3)], [], []
    for i, path in enumerate(sorted((pictures / "tree/test").rglob("*.jpg"))):
        x = np.array(Image.open(path)).astype(float)
        with torch.inference_mode():
            x_rec, _, quantized = tokenizer(torch.from_numpy(x / 127.5 - 1).float().permute(2, 0, 1)[None],
                                            tokenizer.noise(3, [i], "cpu"))
        originals.append(torch.from_numpy(x).byte().permute(2, 0, 1))
        reconstructions.append(rdpm.to_uint8(x_rec)[0])
        error = reconstructions[-1].permute(1, 2, 0).double().numpy() - x
        decibels.append(10 * np.log10(255**2 / (error**2).mean()))
        for t in range(3):
            codes[t] += quantized.codes[t].flatten().tolist()
    values, originals, reconstructions = report["values"], torch.stack(originals), torch.stack(reconstructions)
    assert report["N"] == 5 and values["PSNR"] == pytest.approx(np.mean(decibels), abs=1e-3)
    assert values["SSIM"] == pytest.approx(fid.ssim(originals, reconstructions).mean().item(), abs=1e-5)
    assert values["codes used"] == [len(set(used)) for used in codes]
    shares = [np.bincount(used, minlength=16) / len(used) for used in codes]
    assert values["perplexity"] == pytest.approx([np.prod(p ** -p) for p in shares])
    pools = [remembering(images)[0].double().numpy() for images in (originals, reconstructions)]
    moments = [moment for pool in pools for moment in (pool.mean(0), np.cov(pool, rowvar=False))]
    assert values["rFD-random-5"] == pytest.approx(fid.frechet_distance(*moments), rel=1e-3)


def test_comparison_by_hand(remembering, monkeypatch):
    """With the official weights: the names of a paper, each value from its own features."""
    monkeypatch.setattr(fid, "SHA256", remembering.weights)
    x, y = features(40, 1), features(30, 2)
    s, r = streamed(40, (x[0], x[1] * 0.9, x[2], x[3]), 16, keep=40), streamed(30, y, 16, keep=30)
    reference = fid.Reference("r", "", r.moments(r.pool), r.moments(r.spatial), r.kept)
    result = fid.compare(s, reference, remembering)
    assert list(result["values"]) == ["FID-40", "sFID-40", "IS", "precision", "recall"]
    assert any("shuffled" in note for note in result["notes"])
    pool, spatial = ([np.asarray(z).astype(float) for z in pair] for pair in ((x[1] * 0.9, y[1]), (x[2], y[2])))
    for name, pair in (("FID-40", pool), ("sFID-40", spatial)):
        moments = [moment for z in pair for moment in (z.mean(0), np.cov(z, rowvar=False))]
        assert result["values"][name] == pytest.approx(fid.frechet_distance(*moments), rel=1e-6)
    assert result["values"]["IS"] == s.inception_score()
    both = fid.precision_recall(reference=y[1], samples=x[1] * 0.9)
    assert (result["values"]["precision"], result["values"]["recall"]) == both and both[0] != both[1]


def test_training_logs_the_fid_of_the_ema_weights(folder, remembering, monkeypatch, tmp_path):
    np.savez(tmp_path / "ref.npz", mu=np.zeros(2048), sigma=np.eye(2048), weights=remembering.weights)
    monkeypatch.setattr(fid, "load_inception", lambda *args: remembering)
    run(train_gen, *GEN, "--data", folder / "data", "--tokenizer", folder / "vq/model.pt", "--steps", 3, "--ema", 0.5,
        "--lr", 0.02, "--warmup", 0, "--out", tmp_path / "gen", "--fid-ref", tmp_path / "ref.npz", "--fid-every", 2,
        "--fid-num", 4, "--random-features")
    logged = [record for record in records(tmp_path / "gen") if "FD-random-4" in record]
    assert [record["step"] for record in logged] == [2, 3]
    model, tokenizer, info = rdpm.load_generator(tmp_path / "gen/model.pt")
    model.load_state_dict(torch.load(tmp_path / "gen/state.pt", weights_only=True)["parts"]["ema"])
    reference = fid.load_reference(str(tmp_path / "ref.npz"), remembering, keep=0)
    tokenizer = rdpm.load_tokenizer(folder / "vq/model.pt")
    result = fid.fid_of_generator(model, tokenizer, info, reference, remembering, 4)
    assert logged[1]["FD-random-4"] == pytest.approx(result["values"]["FD-random-4"], rel=1e-6)
    assert logged[0]["FD-random-4"] != logged[1]["FD-random-4"]


def test_two_ranks_equal_one(run_fid, pictures, checkpoints, on_two_ranks, tmp_path, monkeypatch):
    """Evaluating a generator on two ranks gives the values of one. Batches of 4, so that both have some of 9 images."""
    # As if random weights were the official ones, so that the Inception Score is there too.
    (script := tmp_path / "small_batches.py").write_text(
        f"import sys\nsys.path.insert(0, {str(HERE)!r})\nimport fid, rdpm\n"
        "fid.BATCH, fid.SHA256 = 4, 'random-0'\nrdpm.run_main(fid.main)\n")
    flags = "--ckpt gen.pt --num 9 --random-features --allow-small --device cpu --ref good.npz --out"
    monkeypatch.setattr(fid, "BATCH", 4)
    monkeypatch.setattr(fid, "SHA256", "random-0")
    run_fid(f"{flags} one.json", loaded=False)
    words = flags.replace("gen.pt", str(checkpoints / "gen.pt")).replace("good.npz", str(pictures / "good.npz")).split()
    ranks = on_two_ranks(script, *words, tmp_path / "two.json")
    assert [rank.returncode for rank in ranks] == [0, 0], ranks
    one, two = (json.loads((tmp_path / name).read_text()) for name in ("one.json", "two.json"))
    assert two["samples sha256"] == one["samples sha256"]
    assert two["values"] == pytest.approx(one["values"], rel=1e-6) and "IS" in one["values"]

