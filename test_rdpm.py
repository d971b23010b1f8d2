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
import shutil
import signal
import socket
import subprocess
import sys
import urllib.error
from dataclasses import asdict
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
from rdpm import RDPM, GeneratorConfig, ImageStreams, Sampling, Tokenizer, TokenizerConfig, UserError

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
    v = F.layer_norm(torch.randn(batch, c.side**2, c.d, generator=g), (c.d,))
    return v, torch.randn(c.T, batch, c.side**2, c.d, generator=g)


def noise(tokenizer: Tokenizer, seed: int, numbers) -> torch.Tensor:
    """eps (T, B, n, d) of these images, from its definition: a stream for each pair of seed and number."""
    c, eps = tokenizer.config, []
    for number in numbers:
        high, low = np.random.SeedSequence([seed, number]).generate_state(2, np.uint32).tolist()
        stream = torch.Generator().manual_seed((high >> 1) * 2**32 + low)
        eps.append(torch.randn(c.T, c.side**2, c.d, generator=stream))
    return torch.stack(eps, dim=1)


def close(a, b, tolerance=1e-5) -> None:
    a, b = torch.as_tensor(a).double(), torch.as_tensor(b).double()
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# Schedules and noise --------------------------------------------------------------------------------------------------


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
    assert Sampling(1.5, "constant").lambdas(3) == [1.5, 1.5, 1.5]
    assert Sampling(1.5, "linear").lambdas(4) == [0, 0.5, 1.0, 1.5]
    assert Sampling(1.5, "linear").lambdas(1) == [0]
    assert Sampling(1.5, "linear", guidance_from=3).lambdas(4) == [0, 0, 1.0, 1.5]


def test_noise_of_an_image_is_its_own():
    """It depends on (seed, number) only: not on the batch, and no two pairs share it."""
    def normal(seed, numbers, *shape):
        return ImageStreams(seed, numbers, "cpu").draw(torch.randn, *shape)

    batch = normal(7, [0, 1, 2, 3], 5, 3)
    assert torch.equal(batch[[2]], normal(7, [2], 5, 3)) and torch.equal(batch[[3, 0]], normal(7, [3, 0], 5, 3))
    every = torch.cat([normal(seed, range(5), 4) for seed in range(5)])
    assert len(every.unique(dim=0)) == 25
    assert scipy.stats.kstest(normal(0, range(500), 40).flatten().numpy(), "norm").pvalue > 1e-3
    tokenizer = toy_tokenizer()
    assert torch.equal(tokenizer.noise(ImageStreams(3, [8, 5], "cpu")), noise(tokenizer, 3, [8, 5]))


# Alg. 1, Eq. (2), Eq. (4) ---------------------------------------------------------------------------------------------


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
    close(found.z_sum, sums[-1])
    close(found.loss, loss)
    close(found.residual, residual)
    close(((q.gamma if weight else 1) * found.error).sum() * (1.25 if stop else 1), loss)
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
        codes, vq, z, v_t = q.step(t, z_sum, v, eps[t - 1])
        assert torch.equal(codes, found.codes[t - 1]) and torch.equal(vq, q.lookup(codes))
        close(z, z_next)
        close(v_t, q.alpha[t - 1] * z + q.beta[t - 1] * eps[t - 1])
        z_sum, z_next = z_sum + vq, z - vq
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


@pytest.mark.parametrize(("K", "rows"), [(37, 300), (1000, 2500)])
def test_nearest_is_a_naive_search_in_every_chunk(K, rows):
    """The second needs several chunks."""
    q = toy_tokenizer(K=K).quantizer
    rows = torch.randn(rows, 4)
    assert torch.equal(q.nearest(rows[None])[0], nearest_by_hand(q.codebook.double(), rows.double()))
    assert torch.equal(q.nearest(rows.view(4, -1, 4)).flatten(), q.nearest(rows[None])[0])


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
        for codes in expected.codes:
            z_sum = z_sum + q.lookup(codes)
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
            state = state + q.lookup(codes[s - 1, [i]])
        close(z_sum[[i]], state)
        assert torch.equal(target[i], codes[t[i] - 1, i])


@pytest.mark.parametrize("over", ["token", "image"])
def test_encoder_normalises_each_token_or_the_whole_image(over):
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.autocast("cpu", torch.bfloat16):
        v = toy_tokenizer(layer_norm=over).encoder(x)
    assert v.dtype == torch.float32 and v.shape == (2, 64, 4)
    parts = v if over == "token" else v.flatten(1)
    close(parts.mean(-1), torch.zeros(parts.shape[:-1]))
    close(parts.var(-1, unbiased=False), torch.ones(parts.shape[:-1]), 1e-2)
    if over == "image":
        assert v.var(-1, unbiased=False).std() > 0.01  # a token's length is free


def test_residual_stream_and_sampled_logits_are_float32():
    """Under autocast too: bfloat16 logits have ties, which would decide what argmax takes."""
    tokenizer = toy_tokenizer(K=4096)
    model, seen = toy_generator(tokenizer, depth=2), []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        rounded, exact = (model.train(mode)(*some_inputs(tokenizer))[0] for mode in (True, False))
    assert seen == [torch.float32] * 4
    ties = [(logits == logits.amax(-1, keepdim=True)).sum(-1).gt(1).sum() for logits in (rounded, exact)]
    assert ties[0] > 3 and ties[1] == 0
    close(rounded, exact, 0.2)


def test_tokens_lie_row_by_row():
    """A change in the image's top right corner changes the tokens there most; and the decoder's way back."""
    tokenizer = toy_tokenizer(image_size=32)
    x = torch.zeros(1, 3, 32, 32)
    y = x.clone()
    y[:, :, :4, -4:] = 1
    change = (tokenizer.encoder(x) - tokenizer.encoder(y)).square().sum(-1).view(16, 16)
    assert change[:6, -6:].mean() > 3 * max(change[:6, :6].mean(), change[-6:, -6:].mean())
    z = torch.zeros(1, 256, 4)
    z_changed = z.view(1, 16, 16, 4).clone()
    z_changed[:, :2, -2:] = 3
    change = (tokenizer.decoder(z) - tokenizer.decoder(z_changed.view(1, 256, 4))).square().sum(1)[0]
    assert change[:8, -8:].mean() > 3 * max(change[:8, :8].mean(), change[-8:, -8:].mean())


def test_decoders_gradient_goes_straight_through():
    """The decoder sees z'_T; its gradient goes to v as if z'_T were v, and not to the codebook."""
    tokenizer = toy_tokenizer()
    x, eps = torch.rand(2, 3, 16, 16), latents(tokenizer, 2)[1]
    x_rec, v, quantized = tokenizer(x, eps)
    z_sum = quantized.z_sum.detach().requires_grad_()
    decoded = tokenizer.decoder(z_sum)
    close(x_rec, decoded, 1e-4)
    expected, = torch.autograd.grad(decoded.square().sum(), z_sum)
    learnt = (v, tokenizer.quantizer.codebook)
    found, codebook_gradient = torch.autograd.grad(x_rec.square().sum(), learnt, allow_unused=True)
    close(found, expected, 1e-3)
    assert codebook_gradient is None


# Tokenizer losses -----------------------------------------------------------------------------------------------------


def test_hinge_loss_by_hand():
    real, fake = [2.0, 0.5, -1.0], [-3.0, 0.25]
    expected = (sum(max(0, 1 - r) for r in real) / 3 + sum(max(0, 1 + f) for f in fake) / 2) / 2
    close(train_vq.hinge_loss(torch.tensor(real), torch.tensor(fake)), expected)


def test_adaptive_weight_by_hand():
    """|d loss / d last| / (|d gan / d last| + 1e-4), no gradient through it, at most 10,000."""
    last = torch.tensor([1.0, 2.0], requires_grad=True)
    a, b = torch.tensor([3.0, 4.0]), torch.tensor([0.0, 2.0])
    weight = train_vq.adaptive_weight((a * last).sum(), (b * last).sum(), last)
    close(weight, 5 / 2.0001)
    assert not weight.requires_grad
    close(train_vq.adaptive_weight((a * last).sum(), (0 * last).sum(), last), 1e4)


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


# Transformer, Eqs. (6) and (7) ----------------------------------------------------------------------------------------


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
    for function, qkv in ((rdpm.attend, ours), (F.scaled_dot_product_attention, theirs)):
        (function(*qkv) * weights).sum().backward()
    close(rdpm.attend(*ours), F.scaled_dot_product_attention(*theirs))
    close(ours.grad, theirs.grad)


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
    assert model.embed.out_features == {12: 768, 16: 1024, 20: 1280}[depth]
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


# Alg. 2, guidance, Eq. (8) --------------------------------------------------------------------------------------------


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
    return tokenizer.decoder(z_sum)


@torch.no_grad()
@pytest.mark.parametrize("head", ["linear", "codebook"])
@pytest.mark.parametrize(("schedule", "lambdas"), [("constant", [4] * 5), ("linear", [0, 1, 2, 3, 4])])
def test_sample_is_algorithm_2_with_guidance(head, schedule, lambdas):
    tokenizer = toy_tokenizer(image_size=8)
    model, y = toy_generator(tokenizer, head=head), torch.tensor([0, 2, 1])
    eps = noise(tokenizer, 5, [4, 0, 9])
    images, raw = (rdpm.sample(model, tokenizer, y, 5, [4, 0, 9], Sampling(guidance, schedule, gumbel=False))
                   for guidance in (4.0, 0.0))
    close(images, algorithm_2(model, tokenizer, y, eps, lambdas), 1e-4)
    close(raw, algorithm_2(model, tokenizer, y, eps, [0] * 5), 1e-4)
    assert (raw - images).abs().max() > 1e-2


def test_second_pass_only_where_lambda_is_not_zero():
    tokenizer = toy_tokenizer()
    for schedule, guidance, sizes in (("linear", 1.5, [3, 6, 6, 6, 6]), ("constant", 1.5, [6] * 5),
                                      ("constant", 0.0, [3] * 5)):
        model = Recorder(logits=torch.zeros(16))
        y = torch.tensor([0, 1, 2])
        list(rdpm.sample_steps(model, tokenizer, y, 0, [0, 1, 2], Sampling(guidance, schedule)))
        assert [len(call[1]) for call in model.calls] == sizes
        assert [call[2].unique().tolist() for call in model.calls] == [[1], [2], [3], [4], [5]]
        assert [call[1].tolist() for call in model.calls] == [[0, 1, 2, 3, 3, 3][:size] for size in sizes]


@torch.no_grad()
def test_guidance_begins_where_it_is_told():
    """Before guidance_from the codes are those without guidance, and cost one pass; then those of Alg. 2 with it."""
    tokenizer, y = toy_tokenizer(), torch.tensor([0, 1])
    recorder = Recorder(toy_generator(tokenizer))
    late, without = Sampling(4, "constant", 4, gumbel=False), Sampling(0, gumbel=False)
    late = list(rdpm.sample_steps(recorder, tokenizer, y, 0, [0, 1], late))
    assert [len(call[0]) for call in recorder.calls] == [2, 2, 2, 4, 4]
    without = list(rdpm.sample_steps(recorder.inner, tokenizer, y, 0, [0, 1], without))
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(late[:3], without[:3], strict=True))
    eps = noise(tokenizer, 0, [0, 1])
    close(tokenizer.decoder(late[-1][0]), algorithm_2(recorder.inner, tokenizer, y, eps, [0, 0, 0, 4, 4]))


def test_fast_saves_nine_of_nineteen_passes():
    parser = argparse.ArgumentParser()
    sample.add_sampling_flags(parser)
    fast = sample.sampling_from(parser.parse_args(["--fast", "--tau", "2"]), Sampling(guidance=3), 10)
    assert fast == Sampling(guidance=3, tau=2.0, skip=3, guidance_from=8)
    for settings, passes in ((fast, 10), (Sampling(), 19)):
        tokenizer, model = toy_tokenizer(T=10), Recorder(logits=torch.zeros(16))
        list(rdpm.sample_steps(model, tokenizer, torch.tensor([0]), 0, [0], settings))
        assert sum(len(call[1]) for call in model.calls) == passes


def test_noise_of_each_step_is_the_images_with_and_without_gumbel():
    tokenizer, y, seen = toy_tokenizer(), torch.tensor([0, 1]), []
    eps = noise(tokenizer, 1, [6, 7])
    for gumbel in (True, False):
        model = Recorder(logits=torch.arange(16.0))
        seen.append([z for z, _ in rdpm.sample_steps(model, tokenizer, y, 1, [6, 7], Sampling(0.0, gumbel=gumbel))])
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
        (z, _), = rdpm.sample_steps(Recorder(logits=logits), tokenizer, y, 0, range(100), Sampling(tau=tau))
        hits = (z[:, :, None] == tokenizer.quantizer.codebook).all(-1)
        assert (hits.sum(-1) == 1).all()
        counts = hits.sum((0, 1)).numpy()
        for other in (1.0, 3.0):
            p = scipy.stats.chisquare(counts, expected[other]).pvalue
            assert p > 1e-3 if other == tau else p < 1e-9
        assert len(hits.float().argmax(-1).unique(dim=0)) == 100  # every image draws its own


# Beyond the paper: previews, known codes, steps without the network ---------------------------------------------------


def known_steps(T: int, batch: int, k: int) -> torch.Tensor:
    return (torch.arange(T) < k).view(T, 1, 1).expand(T, batch, 1)


@torch.no_grad()
@pytest.mark.parametrize("head", ["linear", "codebook"])
def test_nothing_known_is_plain_sampling_and_all_known_the_reconstruction(head):
    tokenizer, y, numbers = toy_tokenizer(), torch.tensor([0, 2, 1]), [4, 0, 9]
    inner = toy_generator(tokenizer, head=head)
    v, _ = latents(tokenizer, 3)
    plain = list(rdpm.sample_steps(inner, tokenizer, y, 5, numbers, Sampling()))
    assert all((v_hat is None) == (head == "linear") for _, v_hat in plain)
    if head == "codebook":  # with guidance too, the preview is that of the class
        eps = noise(tokenizer, 5, numbers)
        for t in range(2, 6):
            close(plain[t - 1][1], inner(eps[t - 1], y, torch.full_like(y, t), plain[t - 2][0])[1], 1e-4)
    for known in (known_steps(5, 3, 0), torch.zeros(5, 3, 64, dtype=torch.bool)):
        again = rdpm.sample_steps(inner, tokenizer, y, 5, numbers, Sampling(), v, known)
        for (z, v_hat), (z_again, v_again) in zip(plain, again, strict=True):
            assert torch.equal(z, z_again) and (head == "linear" or torch.equal(v_hat, v_again))
    quantized = tokenizer.quantizer(v, noise(tokenizer, 5, numbers))
    for known in (known_steps(5, 3, 5), torch.ones(5, 3, 64, dtype=torch.bool)):
        for labels in (y, (y + 1) % CLASSES, torch.full_like(y, CLASSES)):
            model = Recorder(inner)
            *_, (z_sum, v_hat) = rdpm.sample_steps(model, tokenizer, labels, 5, numbers, Sampling(), v, known)
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
    eps = noise(tokenizer, 5, numbers)
    share = torch.tensor([1, 0, 0.5, 0.5, 0.5]).view(5, 1, 1)
    known = torch.rand(5, 3, 64, generator=torch.Generator().manual_seed(0)) < share
    for skip, passes in ((0, [2, 3, 4, 5]), (3, [4, 5])):
        recorder, z_sum = Recorder(model), torch.zeros_like(v)
        settings = Sampling(0.0, gumbel=False, skip=skip)
        found = rdpm.sample_steps(recorder, tokenizer, y, 5, numbers, settings, v, known)
        for t, (z_found, _) in enumerate(found, 1):
            free = encode_by_hand(q, t, model.mean[y], z_sum, eps[t - 1])
            if t > skip:
                free = model(eps[t - 1], y, torch.full_like(y, t), z_sum)[0].argmax(-1)
            codes = torch.where(known[t - 1], encode_by_hand(q, t, v, z_sum, eps[t - 1]), free)
            z_sum = z_sum + lookup_by_hand(q, codes)
            close(z_found, z_sum)
        assert [int(call[2][0]) for call in recorder.calls] == passes


@torch.no_grad()
def test_an_image_depends_on_its_seed_and_number_alone():
    """The same alone and in a batch; equal numbers are equal noise; another seed is another image."""
    tokenizer = toy_tokenizer()
    model, labels = toy_generator(tokenizer), torch.arange(6) % CLASSES
    batch = rdpm.sample(model, tokenizer, labels, 3, range(6), Sampling())
    for numbers in ([4], [5, 1]):
        close(rdpm.sample(model, tokenizer, labels[numbers], 3, numbers, Sampling()), batch[numbers], 1e-4)
    other = rdpm.sample(model, tokenizer, labels, 4, range(6), Sampling())
    assert ((batch - other).abs().amax((1, 2, 3)) > 1e-2).all()
    images = rdpm.sample(model, tokenizer, torch.tensor([0, 1, 0]), 5, [3, 3, 3], Sampling())
    assert torch.equal(images[0], images[2]) and not torch.equal(images[0], images[1])


# Data -----------------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("size", [(40, 33), (33, 75), (16, 16), (17, 130), (64, 64), (31, 31), (5, 4), (300, 3)])
def test_center_crop_is_adms(size):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), np.uint8))
    found = np.array(rdpm.center_crop(image, 16))
    assert found.shape == (16, 16, 3) and np.array_equal(found, adm_crop(image, 16))


def test_fit_pads_28_to_32_in_the_middle_of_black():
    digit = np.random.default_rng(0).integers(0, 256, (28, 28), np.uint8)
    found = np.array(rdpm.fit(Image.fromarray(digit), 32, True))
    expected = np.pad(digit, 2)
    assert all(np.array_equal(found[:, :, channel], expected) for channel in range(3))
    enlarged = adm_crop(Image.fromarray(digit).convert("RGB"), 32)  # without padding: bicubic, as ADM does it
    assert np.array_equal(rdpm.fit(Image.fromarray(digit), 32, False), enlarged)


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


NAMES = ["arrow", "bar", "crescent"]


def draw_folder(folder: Path, count: int = 30, size: int = 32) -> Path:
    """`count` PNGs of three classes of shapes, in one folder per class."""
    shapes = rdpm.Shapes(size, train=True)
    for i in range(count):
        file = folder / NAMES[i % CLASSES] / f"{i:03d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        shapes[10 * i + i % CLASSES][0].save(file)
    return folder


def test_folder_without_val_holds_out_every_twentieth(tmp_path):
    draw_folder(tmp_path, 60)
    train, held_out = (rdpm.load_data(str(tmp_path), 32, train) for train in (True, False))
    files = sorted(tmp_path.glob("*/*.png"))
    read = [np.array(Image.open(file)).transpose(2, 0, 1) for file in files]
    labels = [NAMES.index(file.parent.name) for file in files]
    for images, places in ((train, [i for i in range(60) if i % 20]), (held_out, [0, 20, 40])):
        assert len(images) == len(places) and images.classes == NAMES
        for i, place in enumerate(places):
            x, y = images[i]
            assert y == labels[place] == images.labels[i] and np.array_equal(x.numpy(), read[place])
            mirrored, y = images[len(images) + i]
            assert y == labels[place] and np.array_equal(mirrored.numpy(), read[place][:, :, ::-1])


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


def test_global_batches_do_not_depend_on_the_ranks(monkeypatch):
    def batches(steps=range(0, 9), flip=True, seed=0):
        return list(rdpm.global_batches(30, 8, steps, seed, flip))

    whole = batches()
    assert len(whole) == 9 and all(len(batch) == 8 for batch in whole)
    assert batches(range(4, 9)) == whole[4:]
    items = sum(whole, [])
    for epoch in (items[:30], items[30:60]):
        assert sorted(i % 30 for i in epoch) == list(range(30))
        assert 5 < sum(i >= 30 for i in epoch) < 25
    assert items[:30] != items[30:60] and batches(seed=1) != whole
    assert max(sum(batches(flip=False), [])) == 29
    for world in (2, 4):
        monkeypatch.setattr(rdpm, "WORLD_SIZE", world)
        shares = []
        for rank in range(world):
            monkeypatch.setattr(rdpm, "RANK", rank)
            shares.append(batches())
        assert [sum(parts, []) for parts in zip(*shares, strict=True)] == whole


def test_balanced_subset_by_hand():
    """As many of each class as can be: of `shapes`, whose labels alternate, and of a folder, where they are sorted."""
    for labels in (np.arange(200) % 10, np.sort(np.arange(200) % 10)):
        chosen = rdpm.balanced_subset(labels, 37)
        counts = np.bincount(labels[chosen], minlength=10)
        assert len(set(chosen)) == 37 and counts.min() == 3 and counts.max() == 4
        assert chosen == rdpm.balanced_subset(labels, 37) and len(rdpm.balanced_subset(labels, 900)) == 200
    few = np.array([0] * 50 + [1] * 2)
    assert np.bincount(few[rdpm.balanced_subset(few, 10)]).tolist() == [8, 2]


def test_cached_latents_are_the_encoders(tmp_path):
    """Item by item, flips too; another tokenizer or other images get another file; a second call reads it."""
    images = rdpm.load_data(str(draw_folder(tmp_path / "data")), 32, True)
    tokenizer = toy_tokenizer(image_size=32)

    def cache(tokenizer, images, flip=True):
        args = argparse.Namespace(tokenizer=tmp_path / "vq.pt", flip=flip, pad=False, workers=0)
        return train_gen.cache_latents(tokenizer, images, args, torch.device("cpu"))

    cached = cache(tokenizer, images)
    file, = tmp_path.glob("latents-*.npy")
    assert len(cached) == 2 * len(images)
    assert not list(tmp_path.glob("*.part"))
    with torch.no_grad():
        for i in (0, 3, len(images), len(images) + 3, 2 * len(images) - 1):
            v, y = cached[i]
            x, label = images[i]
            assert y == label and v.dtype == torch.float16
            assert (v - tokenizer.encoder(rdpm.to_float(x[None]))[0]).abs().mean() < 0.03  # bf16
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
    assert (v - tokenizer.encoder(rdpm.to_float(changed[4][0][None]))[0]).abs().mean() < 0.03
    assert len(list(tmp_path.glob("latents-*.npy"))) == 5


@pytest.mark.parametrize("length", [0, 50, 1000])
def test_damaged_latents_are_named(tmp_path, length):
    images = rdpm.load_data(str(draw_folder(tmp_path / "data")), 32, True)
    args = argparse.Namespace(tokenizer=tmp_path / "vq.pt", flip=False, pad=False, workers=0)
    arguments = toy_tokenizer(image_size=32), images, args, torch.device("cpu")
    train_gen.cache_latents(*arguments)
    file, = tmp_path.glob("latents-*.npy")
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(UserError, match=f"{file}: damaged .* remove it"):
        train_gen.cache_latents(*arguments)


# Learning rate, EMA, checkpoints --------------------------------------------------------------------------------------


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
    train_gen.update_ema(ema, model, 0.9, 10**6)
    close(ema.weight, 0.9 * old + 0.1 * new)
    old = ema.weight.detach().clone()
    train_gen.update_ema(ema, model, 0.9, 2)
    close(ema.weight, 0.25 * old + 0.75 * new)
    assert torch.equal(model.weight, new)


def tokenizer_file(path: Path, **changes) -> Path:
    tokenizer = toy_tokenizer(**changes)
    torch.save({"kind": "tokenizer", "step": 1} | rdpm.inference_state(tokenizer), path)
    return path


def generator_contents(model: RDPM, tokenizer: Tokenizer) -> dict:
    return {"kind": "generator", "classes": ["a", "b", "c"], "sampling": {"tau": 2.0}, "step": 9,
            "tokenizer": rdpm.inference_state(tokenizer)} | rdpm.inference_state(model)


def test_model_files_round_trip(tmp_path):
    """Weights come back as their half-precision values; the generator's file holds its tokenizer."""
    path = tokenizer_file(tmp_path / "vq.pt")
    tokenizer, expected = rdpm.load_tokenizer(path), toy_tokenizer()
    assert tokenizer.config == expected.config and not tokenizer.training
    for weight, original in zip(tokenizer.parameters(), expected.parameters(), strict=True):
        assert torch.equal(weight, original.half().float()) and not weight.requires_grad
    for head in ("linear", "codebook"):
        model = toy_generator(tokenizer, head=head)
        torch.save(generator_contents(model, tokenizer), tmp_path / "gen.pt")
        loaded, its_tokenizer, classes, sampling = rdpm.load_generator(tmp_path / "gen.pt")
        assert classes == ["a", "b", "c"] and sampling == Sampling(tau=2.0)
        assert its_tokenizer.config == expected.config and loaded.config == model.config
        model.load_state_dict({name: weight.half().float() for name, weight in model.state_dict().items()})
        assert torch.equal(loaded(*some_inputs(tokenizer))[0], model(*some_inputs(tokenizer))[0])
        for weight, original in zip(its_tokenizer.parameters(), tokenizer.parameters(), strict=True):
            assert torch.equal(weight, original)


def test_damaged_and_foreign_checkpoints_are_named(tmp_path):
    path = tokenizer_file(tmp_path / "vq.pt")
    whole = path.read_bytes()
    for length in (0, 1, 100, len(whole) // 2, len(whole) - 30):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match="vq.pt: not a checkpoint, or damaged"):
            rdpm.load_tokenizer(path)
    path.write_bytes(whole)
    for load, message in ((rdpm.load_generator, "vq.pt: holds a tokenizer, not a generator"),
                          (lambda _: rdpm.load_tokenizer(tmp_path / "no.pt"), "no.pt: not a checkpoint, or damaged")):
        with pytest.raises(UserError, match=message):
            load(path)
    contents = rdpm.read_checkpoint(path, "tokenizer")
    contents["config"]["K"] = 17
    torch.save(contents, path)
    with pytest.raises(UserError, match="vq.pt: the Tokenizer's weights do not fit its config"):
        rdpm.load_tokenizer(path)
    contents["config"]["K"], contents["model"]["quantizer.codebook"][3, 1] = 16, math.nan
    torch.save(contents, path)
    with pytest.raises(UserError, match="vq.pt: there is NaN or infinity among the Tokenizer's"):
        rdpm.load_tokenizer(path)
    tokenizer = toy_tokenizer()
    contents = generator_contents(toy_generator(tokenizer), tokenizer)
    contents["model"]["embed.weight"][0, 0] = math.inf
    torch.save(contents, tmp_path / "gen.pt")
    with pytest.raises(UserError, match="gen.pt: there is NaN or infinity among the RDPM's"):
        rdpm.load_generator(tmp_path / "gen.pt")
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


# Learning: one batch by heart -----------------------------------------------------------------------------------------


def test_tokenizer_overfits_one_batch():
    tokenizer = toy_tokenizer(T=3, channels=16, K=64)
    images = rdpm.load_data("shapes", 16, True)
    x = rdpm.to_float(torch.stack([images[i][0] for i in range(4)]))
    eps = noise(tokenizer, 0, range(4))
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
        F.cross_entropy(model(*inputs)[0].flatten(0, 1), codes.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(model(*inputs)[0].argmax(-1), codes)


# The scripts, end to end ----------------------------------------------------------------------------------------------

COMMON = ["--preset", "shapes", "--device", "cpu", "--workers", 0, "--batch", 4, "--log-every", 1]
VQ = [*COMMON, "--T", 3, "--K", 32]
GEN = [*COMMON, "--depth", 1]
STAGES = [("vq", ["--gan", 0.75]), ("gen", []), ("gen", ["--head", "linear"])]


@pytest.fixture(autouse=True)
def signals():
    """A training in this process leaves its handlers behind."""
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    yield
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
    """A script's main() in this process, and the lock on its folder opened as the end of a process would."""
    logs = []

    class Log(rdpm.Log):
        def __init__(self, *args):
            logs.append(self)
            super().__init__(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, flags)])
        patch.setattr(script, "Log", Log, raising=False)
        try:
            script.main()
        finally:
            for log in logs:
                log.file and log.file.close()


def records(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def logged(out: Path, key: str = "loss") -> list:
    return [record[key] for record in records(out) if key in record]


def state(out: Path) -> dict:
    return torch.load(out / "state.pt", weights_only=True)


def same(a, b) -> bool:
    """Equal to the bit, through dicts and lists."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.fixture(scope="module")
def shapes(tmp_path_factory) -> Path:
    """Both trainings and the sampler as a user runs them, on the built-in images."""
    out = tmp_path_factory.mktemp("shapes")
    said = shell("train_vq.py", *VQ, "--steps", 2, "--out", out / "vq", "--gan", 0.75)
    assert "PSNR" in said and f"next: python train_gen.py --preset shapes --data shapes --tokenizer {out}/vq" in said
    tokenizer = ["--tokenizer", out / "vq/model.pt"]
    said = shell("train_gen.py", *GEN, "--steps", 2, "--out", out / "gen", *tokenizer)
    assert f"next: python sample.py --ckpt {out}/gen/model.pt" in said
    said = shell("sample.py", "--ckpt", out / "gen/model.pt", "--num", 13, "--batch", 5, "--device", "cpu",
                 "--npz", out / "a.npz", "--out", out / "a.png")
    assert "wrote " in said and "guidance 1.5" in said
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


@pytest.fixture
def training(folder):
    """A trainer by stage, and its flags for the folder."""
    flags = {"vq": VQ, "gen": [*GEN, "--tokenizer", folder / "vq/model.pt"]}
    return lambda stage, *more: ({"vq": train_vq, "gen": train_gen}[stage],
                                 [*flags[stage], "--data", folder / "data", *more])


def test_training_writes_its_files_and_log(shapes, folder):
    for stage, steps in (("vq", 2), ("gen", 2)):
        names = {"model.pt", "state.pt", "log.jsonl", "grid-000002.png"}
        assert {file.name for file in (shapes / stage).iterdir()} == names
        first, *rest = records(shapes / stage)
        assert first["command"].startswith(f"train_{stage}.py") and first["torch"] == torch.__version__
        assert first["world"] == 1 and first["args"]["batch"] == 4
        trained = [record for record in rest if "loss" in record]
        assert [record["step"] for record in trained] == list(range(1, steps + 1))
        assert all(math.isfinite(record[key]) for record in trained for key in ("loss", "lr", "grad_norm"))
        assert [file.name for file in sorted((folder / stage).glob("grid*"))] == ["grid-000002.png", "grid-000003.png"]
    trained = records(shapes / "vq")[1]
    expected = trained["recon"] + 0.25 * trained["quant"]  # Eq. (5); the adversarial weight is not logged
    assert abs(trained["loss"] - expected) > 1e-6 and trained["discriminator"] > 0
    assert len(trained["residual_t"]) == len(trained["error_t"]) == 3
    evaluated, = (record for record in records(shapes / "vq") if "psnr" in record)
    assert 0 < evaluated["psnr"] < 50 and len(evaluated["usage_t"]) == 3 and evaluated["latent_error"] > 0
    for record in records(folder / "vq"):
        if "recon" in record:
            close(record["loss"], record["recon"] + 0.25 * record["quant"])
            close(record["quant"], 1.25 * sum(record["error_t"]))  # --no-weight, two terms
            close(record["residual_t"][0], 1, 1e-2)  # z_1 = v is normalised


def test_training_on_a_folder_caches_latents(folder):
    cached, = (folder / "vq").glob("latents-*.npy")
    model, tokenizer, classes, _ = rdpm.load_generator(folder / "gen/model.pt")
    latents = np.load(cached).astype(float)
    labels = rdpm.load_data(str(folder / "data"), 32, True).labels
    for row in range(CLASSES + 1):
        close(model.mean[row], latents[labels == row if row < CLASSES else labels >= 0].mean(0), 1e-3)
    assert classes == NAMES
    assert model.config == GeneratorConfig(1, 3, bottleneck=True, head="linear", patch=2)
    assert tokenizer.quantizer.bias is None and tokenizer.config.weight is False


def test_other_image_size(tmp_path):
    """One flag of the first script; the others read it from the checkpoint."""
    run(train_vq, *VQ, "--steps", 1, "--image-size", 16, "--out", tmp_path / "vq")
    run(train_gen, *GEN, "--steps", 1, "--tokenizer", tmp_path / "vq/model.pt", "--out", tmp_path / "gen")
    run(sample, "--ckpt", tmp_path / "gen/model.pt", "--num", 2, "--out", tmp_path / "images", "--device", "cpu")
    assert [Image.open(tmp_path / f"images/00000{i}.png").size for i in (0, 1)] == [(16, 16)] * 2
    assert rdpm.load_generator(tmp_path / "gen/model.pt")[1].config.side == 4


def test_the_imagenet_preset_is_the_papers():
    """4.2, as literals."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train_vq.py"])
        vq = vars(train_vq.parse_args())
        patch.setattr(sys, "argv", ["train_gen.py", "--tokenizer", __file__])
        gen = vars(train_gen.parse_args())
    assert vq | {"K": 4096, "d": 32, "T": 10, "schedule": "pow", "phi": 0.75, "weight": True, "bias": True,
                 "image_size": 256, "lr": 4e-5, "lr_final": 1.0, "batch": 128, "epochs": 10, "warmup": None,
                 "perceptual": 1.0, "gan": 0.75, "gan_start": 0, "flip": True} == vq
    assert gen | {"depth": 12, "lr": 4e-4, "lr_final": 0.1, "batch": 1024, "epochs": 250, "warmup": 1000, "ema": 0.9999,
                  "head": "linear", "patch": 1, "flip": True} == gen
    assert GeneratorConfig().label_drop == 0.1 and Tokenizer(TokenizerConfig(**TOY)).encoder is not None


def test_optimizers_are_the_papers(folder):
    """Adam (0.5, 0.9) without decay; AdamW (0.9, 0.95) with 0.03 on matrices; model.pt holds the EMA."""
    vq, gen = (state(folder / stage)["parts"] for stage in ("vq", "gen"))
    for name in ("optimizer", "optimizer_d"):
        group, = vq[name]["param_groups"]
        assert group["betas"] == (0.5, 0.9) and group["weight_decay"] == 0
    matrices, others = gen["optimizer"]["param_groups"]
    assert (matrices["weight_decay"], others["weight_decay"]) == (0.03, 0)
    assert matrices["betas"] == others["betas"] == (0.9, 0.95)
    assert len(matrices["params"]) == sum(weight.ndim > 1 for name, weight in gen["model"].items() if name != "mean")
    written = torch.load(folder / "gen/model.pt", weights_only=True)["model"]
    assert all(torch.equal(written[name], weight.half()) for name, weight in gen["ema"].items())
    assert not torch.equal(gen["ema"]["head.weight"], gen["model"]["head.weight"])


def test_warm_up_is_half_an_epoch_and_both_networks_get_the_rate(training, tmp_path):
    """28 images and batches of 4: seven steps an epoch; 4 steps of warm-up, then constant."""
    script, flags = training("vq", "--gan", 0.75, "--lr-final", 1)
    parser = train_vq.rdpm.PRESETS["shapes"]["train_vq"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(parser, "warmup", None)
        run(script, *flags, "--steps", 5, "--lr", 0.004, "--out", tmp_path)
    close(logged(tmp_path, "lr"), [0.001, 0.002, 0.003, 0.004, 0.004])
    parts = state(tmp_path)["parts"]
    assert [parts[name]["param_groups"][0]["lr"] for name in ("optimizer", "optimizer_d")] == [0.004] * 2


class FakeLPIPS(nn.Module):
    def forward(self, x, y):
        return (x.float() - y.float()).abs().mean()


def test_a_step_with_perceptual_and_adversarial_loss_by_hand(training, tmp_path, monkeypatch):
    """One step of plain SGD in float32: the gradients of both networks are those of Eq. (5), written out here."""
    batches, before, eta, kappa = [], [], 0.6, 0.3
    losses = train_vq.tokenizer_losses

    def record(net, discriminator, lpips, real, eps, *args):
        batches.append((real, eps))
        before.extend(copy.deepcopy((net, discriminator)))
        return losses(net, discriminator, lpips, real, eps, *args)

    class Descent(torch.optim.SGD):
        def __init__(self, weights, lr, betas, fused):
            super().__init__(weights, 1.0, fused=True)

    monkeypatch.setattr(train_vq, "tokenizer_losses", record)
    monkeypatch.setattr(torch.optim, "Adam", Descent)
    monkeypatch.setattr(rdpm, "pretrained", lambda *_: None)
    monkeypatch.setattr(rdpm, "LPIPS", lambda *_: FakeLPIPS())
    for module in (rdpm, train_vq):
        monkeypatch.setattr(module, "autocast", lambda device: torch.autocast("cpu", enabled=False))
    script, flags = training("vq", "--gan", eta, "--perceptual", kappa, "--lr", 1, "--warmup", 0, "--steps", 1)
    run(script, *flags, "--out", tmp_path)
    (x, eps), (tokenizer, discriminator) = batches[0], before
    x_rec, _, quantized = tokenizer(x, eps)
    nll = (x - x_rec).square().mean() + kappa * (x - x_rec).abs().mean()
    fooled = -discriminator(x_rec).mean()
    norms = [torch.autograd.grad(loss, tokenizer.decoder.layers[-1].weight, retain_graph=True)[0].norm()
             for loss in (nll, fooled)]
    loss = nll + 0.25 * quantized.loss + eta * (norms[0] / (norms[1] + 1e-4)) * fooled
    gradients = torch.autograd.grad(loss, list(tokenizer.parameters()))
    real, fake = discriminator(x), discriminator(x_rec.detach())
    hinge = ((1 - real).clamp(min=0).mean() + (1 + fake).clamp(min=0).mean()) / 2
    gradients_d = torch.autograd.grad(hinge, list(discriminator.parameters()))
    parts = state(tmp_path)["parts"]
    for name, network, expected in (("tokenizer", tokenizer, gradients), ("discriminator", discriminator, gradients_d)):
        for (key, weight), gradient in zip(network.named_parameters(), expected, strict=True):
            assert gradient.abs().max() > 0 or "bias" in key
            close(weight - parts[name][key], gradient, 1e-4)
    close(logged(tmp_path)[0], loss.detach(), 1e-4)
    close(logged(tmp_path, "discriminator")[0], hinge.detach(), 1e-4)


def test_a_clipped_step_and_its_ema_by_hand(training, tmp_path, monkeypatch):
    """The gradient is clipped to norm 1, and the grid is drawn by the averaged weights."""
    clip, before, drawn = torch.nn.utils.clip_grad_norm_, [], []

    def record(weights, norm):
        weights = list(weights)
        for weight in weights:
            weight.grad *= 1000
        before.append([(weight.detach().clone(), weight.grad.clone()) for weight in weights])
        return clip(weights, norm)

    class Descent(torch.optim.SGD):
        def __init__(self, groups, lr, betas, fused):
            super().__init__([{"params": group["params"]} for group in groups], 1.0, fused=True)

    draw = rdpm.sample
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", record)
    monkeypatch.setattr(torch.optim, "AdamW", Descent)
    monkeypatch.setattr(rdpm, "sample", lambda ema, *args: drawn.append(ema.head.bias.clone()) or draw(ema, *args))
    script, flags = training("gen", "--lr", 1, "--warmup", 0, "--steps", 1, "--ema", 0.05, "--out", tmp_path)
    run(script, *flags)
    parts, total = state(tmp_path)["parts"], math.sqrt(sum(float(g.square().sum()) for _, g in before[0]))
    assert total > 10
    names = [name for name, _ in rdpm.load_generator(tmp_path / "model.pt")[0].named_parameters()]
    for name, (weight, gradient) in zip(names, before[0], strict=True):
        new = weight - gradient / total
        close(parts["model"][name], new)
        close(parts["ema"][name], 0.05 * weight + 0.95 * new)
    assert torch.equal(drawn[0], parts["ema"]["head.bias"])
    assert not torch.equal(drawn[0], parts["model"]["head.bias"])


def test_generator_is_trained_with_the_noise_its_codes_came_from(folder, tmp_path, monkeypatch):
    """Eq. (6) gets eps_t and z'_{t-1} of each image's own t, which is uniform; a tenth have no class; Eq. (7)."""
    passes, inputs = [], []
    forward, training_input = RDPM.forward, rdpm.NoisyResidualQuantizer.training_input

    def record_forward(self, *args):
        passes.append((args, forward(self, *args)))
        return passes[-1][1]

    def record_inputs(self, *args):
        inputs.append((*args, *training_input(self, *args)))
        return inputs[-1][-2:]

    monkeypatch.setattr(RDPM, "forward", record_forward)
    monkeypatch.setattr(rdpm.NoisyResidualQuantizer, "training_input", record_inputs)
    run(train_gen, *GEN, "--data", folder / "data", "--tokenizer", folder / "vq/model.pt", "--batch", 50,
        "--steps", 8, "--seed", 3, "--out", tmp_path)
    tokenizer = rdpm.load_tokenizer(folder / "vq/model.pt")
    ts, dropped = [], 0
    for step, (v, eps, t, z_sum, codes) in enumerate(inputs):
        (seen_eps, seen_y, seen_t, seen_sum), (logits, _) = passes[step]
        assert torch.equal(eps, noise(tokenizer, 3, range(2**32 + 50 * step, 2**32 + 50 * step + 50)))
        assert torch.equal(seen_eps, torch.stack([eps[t[i] - 1, i] for i in range(50)]))
        assert torch.equal(seen_t, t) and torch.equal(seen_sum, z_sum)
        assert v.shape == (50, 64, 4) and ((seen_y >= 0) & (seen_y <= CLASSES)).all()
        p = logits.detach().double().softmax(-1).gather(2, codes[..., None])[..., 0]
        close(logged(tmp_path)[step], -p.log().mean(), 1e-4)
        right = (logits.argmax(-1) == codes).double().mean(1)
        for s, accuracy in enumerate(logged(tmp_path, "accuracy_t")[step], 1):
            assert accuracy is None if s not in t else accuracy == pytest.approx(right[t == s].mean().item(), abs=1e-5)
        ts += t.tolist()
        dropped += int((seen_y == CLASSES).sum())
    counts = np.bincount(ts, minlength=4)
    assert len(inputs) == 8 and counts[0] == 0 and scipy.stats.chisquare(counts[1:]).pvalue > 1e-3
    assert scipy.stats.binomtest(dropped, 400, 0.1).pvalue > 1e-3


# Resuming, signals, ranks ---------------------------------------------------------------------------------------------


class Interrupted(Exception):
    pass


@pytest.mark.parametrize(("stage", "more"), STAGES)
def test_resuming_continues_bit_for_bit(stage, more, training, tmp_path, monkeypatch, capsys):
    """Four steps; and two steps, a crash when state.pt is written and model.pt is not, and --resume: the same state."""
    script, flags = training(stage, *more, "--steps", 4, "--save-every", 2)
    run(script, *flags, "--out", tmp_path / "a")
    replacing = rdpm.replacing

    def interrupted(path):
        if path.name == "model.pt":
            raise Interrupted
        return replacing(path)

    with monkeypatch.context() as patch:
        patch.setattr(rdpm, "replacing", interrupted)
        with pytest.raises(Interrupted):
            run(script, *flags, "--out", tmp_path / "b", "--resume")  # nothing there yet: begins
    assert state(tmp_path / "b")["step"] == 2 and not (tmp_path / "b/model.pt").exists()
    run(script, *flags, "--out", tmp_path / "b", "--resume")
    a, b = (state(tmp_path / name) for name in "ab")
    assert a["step"] == b["step"] == 4 and same(a["parts"], b["parts"])
    assert logged(tmp_path / "a") == logged(tmp_path / "b")
    different = ["--T", 4] if stage == "vq" else ["--depth", 2]
    with pytest.raises(UserError, match="was trained with"):
        run(script, *flags, "--out", tmp_path / "b", "--resume", *different)
    # Finished: --resume says so, and makes the last picture anew if it is missing.
    (grid := tmp_path / "b/grid-000004.png").unlink()
    for _ in range(2):
        capsys.readouterr()
        run(script, *flags, "--out", tmp_path / "b", "--resume")
        assert "finished: " in capsys.readouterr().out and grid.exists()
    assert same(state(tmp_path / "b"), b)


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
    assert logged(tmp_path / "a") == logged(tmp_path / "b")


@pytest.mark.parametrize(("stage", "bad", "own"), [("vq", [1], True), ("gen", [1], True), ("gen", [1], False),
                                                   ("gen", [0, 1, 2], True)])
def test_steps_that_are_not_finite_are_skipped(stage, bad, own, training, tmp_path, monkeypatch):
    """NaN among the noise of some steps: weights and optimizer are as if those had not been. None left: the end.

    own: whether the device's optimizers look at found_inf by themselves (MPS' do not).
    """
    script, flags = training(stage, "--lr-final", 1, "--warmup", 0, "--save-every", 1, "--steps", max(bad) + 2,
                             "--log-every", len(bad) + 1 - (len(bad) > 1), *(["--gan", 0.75] if stage == "vq" else []))
    draw, states = Tokenizer.noise, []

    def damaged(self, streams):
        eps = draw(self, streams)
        return eps.index_fill(1, torch.tensor([0]), math.nan) if len(states) in bad else eps

    def record(out, state, model):
        states.append(copy.deepcopy({name: part for name, part in state["parts"].items() if name != "ema"}))

    monkeypatch.setattr(Tokenizer, "noise", damaged)
    monkeypatch.setattr(rdpm, "save_run", record)
    if not own:
        monkeypatch.setattr(rdpm, "SKIPS_BY_ITSELF", ())
        step = torch.optim.AdamW.step
        monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: (self.__dict__.pop("found_inf"), step(self)))
    if len(bad) == 1:
        run(script, *flags, "--out", tmp_path)
        assert same(states[0], states[1]) and not any(same(states[1][name], states[2][name]) for name in states[0])
        assert logged(tmp_path, "skipped_steps") == [1, 0]
        return
    with pytest.raises(UserError, match="no step after 0 had a finite loss and gradient"):
        run(script, *flags, "--out", tmp_path)
    assert same(states[0], states[-1])


@pytest.mark.parametrize("stage", ["vq", "gen"])
def test_accumulation_does_not_change_the_steps(stage, training, tmp_path, monkeypatch):
    """Batches of five in one, two and five parts. In float32: see the test of two ranks."""
    monkeypatch.setattr(rdpm, "autocast", lambda device: torch.autocast("cpu", enabled=False))
    script, flags = training(stage, "--batch", 5, "--steps", 3)
    monkeypatch.setattr(script, "autocast", rdpm.autocast)
    for parts in (1, 2, 5):
        run(script, *flags, "--accum", parts, "--out", tmp_path / str(parts))
        for key in ("loss", "grad_norm"):
            close(logged(tmp_path / str(parts), key), logged(tmp_path / "1", key), 1e-4)


def as_rank(rank: str, port: str, command: list[str], files: list[Path]) -> None:
    """`python *command` as one of two ranks, in a new process, with stdout and stderr in `files`."""
    for path, stream in zip(files, (1, 2), strict=True):
        os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY), stream)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "RANK": rank, "LOCAL_RANK": rank}
    rdpm.RANK, rdpm.WORLD_SIZE = int(rank), 2
    for name in ("fid", "sample", "train_vq", "train_gen"):
        sys.modules.pop(name, None)
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
    script, flags = training(stage, "--steps", 20, "--accum", 2)
    command = [driver, script.__name__, "none", *flags, "--out"]
    for module in (rdpm, script):
        monkeypatch.setattr(module, "autocast", lambda device: torch.autocast("cpu", enabled=False))
    run(script, *flags, "--out", tmp_path / "one")
    if stage == "vq":
        assert [rank.returncode for rank in on_two_ranks(*command, tmp_path / "two")] == [0, 0]
    else:
        shell("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *command, tmp_path / "two")
    assert records(tmp_path / "two")[0]["world"] == 2
    close(logged(tmp_path / "two"), logged(tmp_path / "one"), 1e-5)
    close(logged(tmp_path / "two", "grad_norm"), logged(tmp_path / "one", "grad_norm"), 1e-3)
    if stage == "vq":
        close(logged(tmp_path / "two", "psnr"), logged(tmp_path / "one", "psnr"), 1e-3)
        return
    # One of two ranks hears a signal: both stop after the same log line, and go on as if nothing had been.
    command[2] = "signal"
    ranks = on_two_ranks(*command, tmp_path / "stopped", "--log-every", 5)
    assert [rank.returncode for rank in ranks] == [75, 75] and "saved after step 10" in ranks[0].stderr
    command[2] = "none"
    ranks = on_two_ranks(*command, tmp_path / "stopped", "--resume")
    assert same(state(tmp_path / "stopped")["parts"], state(tmp_path / "two")["parts"])


def test_two_ranks_sample_as_one(shapes, on_two_ranks, tmp_path):
    """Seven images in batches of two: the last batch of rank 1 is the only one that is not full."""
    flags = ["--ckpt", shapes / "gen/model.pt", "--num", 7, "--batch", 2, "--device", "cpu"]
    run(sample, *flags, "--npz", tmp_path / "1.npz", "--out", tmp_path / "1.png")
    ranks = on_two_ranks("sample.py", *flags, "--npz", tmp_path / "2.npz", "--out", tmp_path / "2.png")
    assert [rank.returncode for rank in ranks] == [0, 0] and not ranks[1].stdout
    for name in ("arr_0", "arr_1"):
        assert np.array_equal(*(np.load(tmp_path / file)[name] for file in ("1.npz", "2.npz")))
    assert np.array_equal(*(Image.open(tmp_path / file) for file in ("1.png", "2.png")))
    assert not list(tmp_path.glob("*part*"))


# sample.py ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def draw(shapes):
    """sample.py on the codebook-head checkpoint: runs it, and returns the images of its picture, (N, 32, 32, 3)."""
    def draw(out: Path, *flags, ckpt=shapes / "gen/model.pt"):
        # One image a batch: bf16 products of another batch size may differ in their last bit.
        run(sample, "--ckpt", ckpt, "--device", "cpu", "--seed", 5, "--out", out / "a.png", "--batch", 1, *flags)
        grid = np.array(Image.open(out / "a.png").convert("RGB"))[::3, ::3]
        if len(grid) == 32:  # a single image has no frame
            return grid[None]
        rows, columns = (length // 33 for length in grid.shape[:2])
        return np.stack([grid[1 + 33 * r:33 + 33 * r, 1 + 33 * c:33 + 33 * c]
                         for r in range(rows) for c in range(columns)])
    return draw


@pytest.fixture
def ref(tmp_path) -> Path:
    rdpm.Shapes(32, train=True)[8][0].save(tmp_path / "ref.png")
    return tmp_path / "ref.png"


def test_sampling_writes_picture_npz_and_folder(shapes, tmp_path):
    arrays = np.load(shapes / "a.npz")
    assert arrays["arr_0"].shape == (13, 32, 32, 3) and arrays["arr_0"].dtype == np.uint8
    assert arrays["arr_1"].tolist() == [*range(10), 0, 1, 2]
    assert Image.open(shapes / "a.png").size == (10 * 33 * 3 + 3, 2 * 33 * 3 + 3)
    model, tokenizer, _, defaults = rdpm.load_generator(shapes / "gen/model.pt")
    assert defaults == Sampling()
    common = ["--ckpt", shapes / "gen/model.pt", "--num", 4, "--device", "cpu", "--classes", "ring", 3, "--seed", 5]
    run(sample, *common, "--tau", 2, "--guidance", 3, "--guidance-schedule", "constant", "--out", tmp_path / "images",
        "--npz", tmp_path / "a.npz")
    arrays, labels = dict(np.load(tmp_path / "a.npz")), torch.tensor([6, 3, 6, 3])
    assert arrays["arr_1"].tolist() == labels.tolist()
    with rdpm.autocast(torch.device("cpu")):
        images = rdpm.sample(model, tokenizer, labels, 5, range(4), Sampling(3.0, "constant", tau=2.0))
    assert np.array_equal(arrays["arr_0"], rdpm.to_uint8(images).permute(0, 2, 3, 1).numpy())
    for i, image in enumerate(arrays["arr_0"]):
        assert np.array_equal(np.array(Image.open(tmp_path / f"images/{i:06d}.png")), image)
    run(sample, *common, "--no-gumbel", "--out", tmp_path / "images")
    assert not np.array_equal(np.array(Image.open(tmp_path / "images/000000.png")), arrays["arr_0"][0])


def test_layout_goes_from_plain_samples_to_the_reconstruction(draw, ref, shapes, tmp_path):
    plain = [draw(tmp_path, "--num", 1, "--classes", name)[0] for name in ("ring", "disc")]
    model, tokenizer, _, _ = rdpm.load_generator(shapes / "gen/model.pt")
    original = np.array(Image.open(ref))
    with rdpm.autocast(torch.device("cpu")), torch.no_grad():
        v = tokenizer.encoder(rdpm.to_float(torch.from_numpy(original).permute(2, 0, 1)[None]))
        z_sum = tokenizer.quantizer(v, noise(tokenizer, 5, [0])).z_sum
        reconstruction = rdpm.to_uint8(tokenizer.decoder(z_sum))[0].permute(1, 2, 0).numpy()
    cells = draw(tmp_path, "--layout", ref, "--layout-steps", 0, 2, 3, "--classes", "ring", "disc").reshape(
        3, 3, 32, 32, 3)
    # bfloat16 rounds otherwise in another batch: nearly all pixels are equal.
    assert (cells[:, 0] == original).all() and (cells[0, 1:] == plain).mean() > 0.9
    assert (cells[2, 1:] == reconstruction).mean() > 0.9 and (cells[1, 1:] == reconstruction).mean() < 0.5


def test_edit_redraws_the_mask_and_nothing_else(draw, ref, tmp_path):
    mask = np.zeros((32, 32), np.uint8)
    mask[9:17, 3:30] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    original, inside = np.array(Image.open(ref)), mask > 0
    nobody, ring = (draw(tmp_path, "--edit", ref, "--mask", tmp_path / "mask.png", "--num", 2, *flags)
                    for flags in ((), ("--classes", "ring")))
    for cells in (nobody, ring):
        assert np.array_equal(cells[0], original) and (cells[1][inside] == 128).all()
        assert all(np.array_equal(image[~inside], original[~inside]) for image in cells[1:])
        assert not np.array_equal(cells[2], cells[3])
    assert not np.array_equal(nobody, ring)


def test_strips_and_animations_end_with_the_sample(draw, shapes, folder, tmp_path):
    plain = draw(tmp_path, "--num", 2)
    strip = draw(tmp_path, "--num", 2, "--show-steps").reshape(2, 2, 3, 32, 32, 3)  # image, raw or preview, t
    assert np.array_equal(strip[:, 0, -1], plain) and np.array_equal(strip[:, 1, -1], plain)
    assert not np.array_equal(strip[:, 0, 0], strip[:, 1, 0])
    run(sample, "--ckpt", shapes / "gen/model.pt", "--num", 2, "--seed", 5, "--batch", 1, "--out", tmp_path / "a.gif")
    with Image.open(tmp_path / "a.gif") as animation:
        assert animation.n_frames >= 3
        animation.seek(animation.n_frames - 1)
        last = np.array(animation.convert("RGB"))[3:99:3, 3:99:3]
    assert np.abs(last - plain[0].astype(float)).mean() < 8  # of 255: a GIF has 256 colours
    linear = {"ckpt": folder / "gen/model.pt"}  # has no previews
    strip = draw(tmp_path, "--num", 2, "--show-steps", **linear)
    assert np.array_equal(strip[2::3], draw(tmp_path, "--num", 2, **linear))


# Bad input: one clear line, exit code 2, nothing overwritten ----------------------------------------------------------


def fails(capfd, script, *flags) -> str:
    """The one line that a script ends with."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        rdpm.run_main(lambda: run(script, *flags))
    assert stop.value.code == 2
    *before, line = capfd.readouterr().err.splitlines()
    assert "error: " in line and "Traceback" not in "".join(before)
    return line


@pytest.fixture
def failing(capfd, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    return lambda *command: fails(capfd, *command)


@pytest.fixture(scope="module")
def rubbish(folder, shapes, tmp_path_factory) -> Path:
    """What people give by mistake, or by malice, beside a good data/, vq.pt and gen.pt."""
    out = tmp_path_factory.mktemp("rubbish")
    for name, target in (("data", "data"), ("vq.pt", "vq/model.pt")):
        (out / name).symlink_to(folder / target)
    (out / "gen.pt").symlink_to(shapes / "gen/model.pt")
    (out / "cut.pt").write_bytes((out / "vq.pt").read_bytes()[:-30])
    torch.save({"kind": "generator", "config": Hostile(out / "appeared")}, out / "hostile.pt")
    torch.save([1, 2], out / "list.pt")
    (out / "nothing").mkdir()
    (out / "hollow/class").mkdir(parents=True)
    (out / "few/class").mkdir(parents=True)
    Image.new("RGB", (32, 32)).save(out / "few/class/1.png")
    for name, colour in (("black.png", 0), ("white.png", 255)):
        Image.new("L", (32, 32), colour).save(out / name)
    (out / "cut.png").write_bytes((out / "white.png").read_bytes()[:60])
    Image.fromarray(np.ones((9, 9), np.float32)).save(out / "float.tiff")
    draw_folder(out / "torn", 60)
    for file in (out / "torn").rglob("*.png"):
        file.write_bytes(file.read_bytes()[:60])
    return out


BAD_INPUT = {
    "train_vq --data nowhere": "--data nowhere: no such folder; give one with",
    "train_vq --data nothing": "nothing: no image in it; give each class a folder",
    "train_vq --data hollow": "hollow: no image in class",
    "train_vq --data few": "--data few: 1 images; give at least 20",
    "train_vq --data torn --workers 1": r"torn/\w+/\d+.png: not a readable image .*; repair or remove it",
    "train_vq --batch 0": "argument --batch: 0 is not a number above 0",
    "train_vq --lr nan": "argument --lr: nan is not a number above 0",
    "train_vq --seed -1": "argument --seed: -1 is not a number from 0 up",
    "train_vq --phi 2": "--phi 2.0: must be at most 1",
    "train_vq --image-size 30": "--image-size 30: must be a multiple of 4",
    "train_vq --image-size 4": "--image-size 4: must be .* at least 8",
    "train_vq --image-size 16 --gan 1": "--image-size 16: PatchGAN needs at least 24",
    "train_vq --K 1000000000 --dim 1000": "memory",
    "train_vq --accum 5 --data data": "--batch 4: must give each of 1 devices as many, --accum or more",
    "train_gen --data data --tokenizer vq.pt --patch 3": "--patch 3: does not divide the tokenizer's 8 x 8 tokens",
    "train_gen --data data": "--tokenizer runs/shapes-vq/model.pt: no such file; python train_vq.py",
    "train_gen --data data --tokenizer gen.pt": "gen.pt: holds a generator, not a tokenizer",
    "train_gen --data data --tokenizer vq.pt --fid-ref no.npz --fid-num 9": "--fid-num 9: N = 9",
    "sample --ckpt no.pt": "no.pt: not a checkpoint, or damaged .FileNotFound",
    "sample --ckpt list.pt": "list.pt: holds something else, not a generator",
    "sample --ckpt cut.pt": "cut.pt: not a checkpoint, or damaged",
    "sample --ckpt hostile.pt": "hostile.pt: not a checkpoint, or damaged",
    **{f"sample --ckpt gen.pt {flags}": message for flags, message in {
        "--classes 10": "class 10: not a class of this checkpoint; it has arrow, bar",
        "--classes=-1": "class -1: not a class", "--num 4300000000": "argument --num: 4300000000 is not a number",
        "--out a.txt": "a.txt: must end in .*.png", "--out no/a.png": "no/a.png: .* folder that can be written into",
        "--edit white.png --mask black.png": "--mask black.png: all black",
        "--edit white.png": "--edit needs --mask",
        "--layout white.png --layout-steps 0 4": "--layout-steps 0 4: each must be 0 ... 3",
        "--layout white.png --layout-steps 1 --num 3": "--num: does nothing beside --layout",
        "--edit white.png --mask black.png --guidance 3": "--guidance: does nothing beside --edit",
        "--show-steps --out a.gif": "a.gif: must end in .png .jpg .webp",
        "--edit cut.png --mask white.png": "cut.png: not a readable image",
        "--edit float.tiff --mask white.png": "float.tiff: not a readable image .mode F, of which black and white are unknown",
        "--layout no.png --layout-steps 1": "no.png: not a readable image"}.items()},
}


@pytest.mark.parametrize("command", BAD_INPUT)
def test_bad_input_gets_one_line(command, rubbish, failing, monkeypatch):
    monkeypatch.chdir(rubbish)
    before = set(rubbish.rglob("*"))
    script, *flags = command.split()
    common = {"train_vq": VQ, "train_gen": GEN, "sample": ["--device", "cpu"]}[script]
    line = failing(globals()[script], *common, *flags)
    assert re.search(BAD_INPUT[command], line), line
    assert not [file for file in set(rubbish.rglob("*")) - before if file.is_file() and file.name != "log.jsonl"]


def test_what_imagenet_holds_is_read(tmp_path):
    """CMYK, grey, palette, 16 bits, a PNG by another name, EXIF rotation, 75 x 75 and 5,000 x 30 pixels."""
    colour = Image.fromarray(np.linspace(0, 255, 48 * 32 * 3).astype(np.uint8).reshape(32, 48, 3))
    grey = np.array(colour.convert("L"))
    data = tmp_path / "train/class"
    data.mkdir(parents=True)
    for mode, kind in {"CMYK": "jpg", "L": "JPEG", "P": "png", "RGBA": "png", "I;16": "png", "1": "png"}.items():
        path = data / f"{mode[:2]}.{kind}"
        image = Image.fromarray(grey.astype(np.uint16) * 257) if mode == "I;16" else colour.convert(mode)
        image.save(path, format="PNG" if kind == "JPEG" else None, quality=100)
        expected = {"CMYK": colour, "RGBA": colour, "P": image.convert("RGB"), "1": image.convert("RGB")}.get(
            mode, Image.fromarray(grey).convert("RGB"))
        read = rdpm.read_image(path)
        assert read.mode == "RGB" and np.abs(np.array(read, int) - np.array(expected, int)).max() <= 6, mode
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 270 degrees to see it upright
    colour.transpose(Image.Transpose.ROTATE_90).save(data / "turned.jpg", exif=exif, quality=100)
    assert np.abs(np.array(rdpm.read_image(data / "turned.jpg"), int) - np.array(colour, int)).mean() < 3
    for name, size in (("small", (75, 75)), ("wide", (5000, 30))):
        colour.resize(size).save(data / f"{name}.jpg")
    shutil.copytree(data, tmp_path / "val/class")
    (data / "loop").symlink_to(data)
    for hidden in (data / ".thumbnails", tmp_path / "train/.cache"):
        hidden.mkdir()
        colour.save(hidden / "1.png")
    images = rdpm.load_data(str(tmp_path), 256, train=True)
    assert len(images) == 9 and images.classes == ["class"]
    assert all(images[i][0].shape == (3, 256, 256) for i in range(9))


def test_a_second_run_in_the_same_folder_is_refused(training, tmp_path, failing, folder):
    """At once, while the first has saved nothing yet; and a finished run is not overwritten."""
    args = argparse.Namespace(out=tmp_path / "a", batch=4, accum=1, resume=True)
    first = rdpm.Log(args)
    for stage in ("vq", "gen"):
        script, flags = training(stage)
        line = failing(script, *flags, "--out", args.out, "--resume")
        assert f"--out {args.out}: another run is writing there" in line
        before = {file: file.read_bytes() for file in (folder / stage).iterdir()}
        assert f"--out {folder / stage} already holds a run" in failing(script, *flags, "--out", folder / stage)
        assert {file: file.read_bytes() for file in (folder / stage).iterdir()} == before
    first.file.close()


def test_a_full_disk_loses_nothing(tmp_path):
    """What is there stays whole, and nothing is left beside it."""
    path = tmp_path / "a.pt"
    path.write_text("before")
    message = "a.pt: cannot be written .*No space.*; what was there is untouched"
    with pytest.raises(UserError, match=message), rdpm.replacing(path) as part:
        part.write_text("half of it")
        raise OSError(28, "No space left on device")
    assert [file.read_text() for file in tmp_path.iterdir()] == ["before"]
    with rdpm.replacing(path) as part:
        part.write_text("after")
    assert [file.read_text() for file in tmp_path.iterdir()] == ["after"]


def test_a_dead_worker_is_an_error(failing, monkeypatch):
    draw = rdpm.Shapes.__getitem__
    monkeypatch.setattr(rdpm.Shapes, "__getitem__", lambda self, i: os._exit(1) if i % 20 == 3 else draw(self, i))
    assert "DataLoader worker" in failing(train_vq, *VQ, "--workers", 1, "--steps", 99)


def test_no_network_for_weights_and_data(failing, monkeypatch, tmp_path):
    def no_network(*_, **__):
        raise urllib.error.URLError("no route")

    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    file = tmp_path / "hub/checkpoints/397923af-vgg16-397923af.pth"
    flags = [*VQ, "--perceptual", 1]
    line = failing(train_vq, *flags)
    assert f"cannot download {rdpm.VGG16[0]}" in line and f"put the file at {file}" in line
    file.parent.mkdir(parents=True)
    file.write_bytes(b"not these weights")
    assert f"{file}: its sha256 is not 397923af; remove it" in failing(train_vq, *flags)
    assert not (tmp_path / "runs").exists()
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", no_network)
    assert "--data cifar10: cannot be downloaded into data/" in failing(train_vq, *VQ, "--data", "cifar10")


# README ---------------------------------------------------------------------------------------------------------------


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


# fid.py: against the packages that define these numbers, and the mistakes users make ----------------------------------


@pytest.fixture(scope="session")
def inception():
    """Random weights with batch norms that do something, unlike freshly made ones."""
    inception, rng = fid.load_inception(True), np.random.RandomState(1)
    for name, w in inception.net.state_dict().items():
        if name.endswith(("bn.weight", "bn.bias", "fc.bias")):
            w += torch.from_numpy(rng.uniform(-0.1, 0.1, tuple(w.shape))).float()
    inception.weights = "random-test"
    return inception


@pytest.fixture(scope="session")
def torch_fidelity_inception(inception):
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "load_state_dict_from_url", lambda *args, **kwargs: inception.net.state_dict())
        return module.FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"])


def bytes_of(*shape, seed=0):
    return torch.from_numpy(np.random.RandomState(seed).randint(0, 256, shape, np.uint8))


def near(x, y, tolerance=1e-4):
    assert (x - y).abs().max() <= tolerance * y.abs().max(), (x - y).abs().max() / y.abs().max()


def test_inception_equals_torch_fidelity(inception, torch_fidelity_inception):
    """pool_3, logits, and sFID's spatial features: their layer, channels and layout."""
    seen = []
    handle = torch_fidelity_inception.Mixed_6d.branch1x1.register_forward_hook(lambda m, i, o: seen.append(o))
    x = bytes_of(2, 3, 40, 32)
    theirs = torch_fidelity_inception(x)
    handle.remove()
    pool, spatial, logits = inception(x)
    near(pool, theirs[0])
    near(logits, theirs[1])
    assert spatial.shape == (2, 2023)
    near(spatial, torch.tensor([[seen[0][b, c, h, w] for h in range(17) for w in range(17) for c in range(7)]
                                for b in range(2)]))


def test_inception_equals_pytorch_fid(inception, monkeypatch):
    module = pytest.importorskip("pytorch_fid.inception")
    monkeypatch.setattr(module, "load_state_dict_from_url", lambda *args, **kwargs: inception.net.state_dict())
    x = bytes_of(2, 3, 299, 299)  # at 299 neither resizes
    theirs = module.InceptionV3(resize_input=False).eval()((x.float() - 128) / 256 + 0.5)[0].flatten(1)
    near(inception(x)[0], theirs)


@pytest.mark.parametrize("height, width", [(28, 28), (40, 26), (256, 299), (640, 333)])
def test_resize_is_tensorflows(height, width):
    module = pytest.importorskip("torch_fidelity.interpolate_compat_tensorflow")
    x = bytes_of(1, 3, height, width).float()
    ours = fid.resize_matrix(height) @ x @ fid.resize_matrix(width).T
    theirs = module.interpolate_bilinear_2d_like_tensorflow1x(x, (299, 299), align_corners=False)
    assert (ours - theirs).abs().max() < 1e-3
    assert (fid.resize_matrix(height) != 0).sum(1).max() <= 2


def test_float32_under_autocast_and_random_weights_are_the_same_everywhere(inception):
    x = bytes_of(1, 3, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        after = inception(x)
    assert all(a.dtype == torch.float32 and torch.equal(a, b) for a, b in zip(after, inception(x), strict=True))
    first = inception.net.state_dict()["Conv2d_1a_3x3.conv.weight"].flatten()[:3]
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
    # The trace of the root is also the sum of singular values of the centred features' product.
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


def streamed(data, batch, keep=0):
    """What fid.measure makes of these features, which come in batches, the last one first."""
    images, *answers = data
    coming = iter(parts := torch.arange(len(images)).split(batch)[::-1])

    def given(_):
        numbers = next(coming)
        return [x[numbers] for x in answers]
    given.device = torch.device("cpu")
    return fid.measure(((part.tolist(), images[part]) for part in parts), len(images), given, keep)


def moments(x):
    return x.double().numpy().mean(0), np.cov(x.double().numpy(), rowvar=False)


def test_streamed_moments():
    data = features(57)
    s = streamed(data, 10, keep=20)
    for pair, x in ((s.pool, data[1]), (s.spatial, data[2])):
        for ours, by_hand in zip(pair, moments(x), strict=True):
            np.testing.assert_allclose(ours, by_hand, rtol=1e-12, atol=1e-11)
    np.testing.assert_allclose(s.means, data[0].double().mean((0, 2, 3)).numpy())
    assert torch.equal(s.kept, data[1][np.random.RandomState(2020).permutation(57)[:20]])


def test_inception_score_equals_torch_fidelity_and_the_formula(monkeypatch):
    module = pytest.importorskip("torch_fidelity.metric_isc")
    assert fid.SPLIT == 5000                                     # ADM's
    data, label = features(203), torch.arange(203) * 20 // 203   # sorted by class: file order would give nonsense
    logits = data[3] + 12 * torch.nn.functional.one_hot(label, 1008)
    for n, split in ((200, 20), (203, 50)):
        monkeypatch.setattr(fid, "SPLIT", split)
        ours = streamed((*(x[:n] for x in data[:3]), logits[:n]), 16).score
        p = logits[:n].double().softmax(1)[np.random.RandomState(2020).permutation(n)]
        scores = [(part * (part / part.mean(0)).log()).sum(1).mean().exp() for part in p.split(split)]
        assert ours == pytest.approx(np.mean(scores), rel=1e-9)
        if n == 10 * split:  # torch-fidelity always makes ten
            theirs, in_file_order = (module.isc_features_to_metric(logits[:n], shuffle=shuffle)["inception_score_mean"]
                                     for shuffle in (True, False))
            assert ours == pytest.approx(theirs, rel=1e-9) and in_file_order < 0.3 * ours


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
        on_unit = metrics.structural_similarity(a / 255, b / 255, channel_axis=2, data_range=1)  # as fid.py says
        assert theirs == pytest.approx(on_unit, abs=1e-9)
    assert fid.ssim(x, x).tolist() == [1] * 4


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """A folder with sets of images, good and bad, a small tokenizer and a small generator."""
    root = tmp_path_factory.mktemp("pictures")

    def folder(name, images, ending="png", **how):
        (root / name).mkdir(parents=True)
        for i, image in enumerate(images):
            Image.fromarray(image).save(root / name / f"{i:06}.{ending}", **how)

    x = bytes_of(9, 24, 24, 3).numpy()
    colour = np.array([90, 40, 10], np.uint8) + bytes_of(9, 24, 24, 3, seed=2).numpy() // 8
    sets = {"good": x, "rgb": colour, "bgr": colour[..., ::-1], "larger": bytes_of(9, 48, 60, 3, seed=1).numpy(),
            "mixed": [*x[:4], x[4, :20]], "rgba": np.concatenate([x, x[..., :1]], axis=3), "gap": x, "twice": x,
            "deep": x[..., 0].astype(np.uint16) * 256, "broken": x, "tree/train/a": x[:5], "tree/train/b": x[5:]}
    for name, images in sets.items():
        folder(name, images)
    folder("tree/test/a", x[::2], "jpg")
    folder("tree/test/b", colour, "jpg")
    folder("renamed", x, format="JPEG")
    (root / "gap/000003.png").unlink()
    Image.fromarray(x[0]).save(root / "twice/2.png")
    (root / "broken/000005.png").write_bytes((root / "good/000005.png").read_bytes()[:100])
    arrays = {"good": x, "one": x[:1], "many": np.zeros((2047, 8, 8, 3), np.uint8), "float": x / np.float32(127.5) - 1,
              "wide": x.repeat(2, axis=2), "nothing": x[:0],
              "objects": np.array([1, "a", None], object)}
    for name, array in arrays.items():
        np.savez(root / f"{name}.npz", arr_0=array)
    np.savez_compressed(root / "compressed.npz", arr_0=x)
    (root / "truncated.npz").write_bytes((root / "good.npz").read_bytes()[:5000])
    mu, sigma, weights = np.zeros(2048), np.eye(2048), "random-test"
    np.savez(root / "statistics.npz", mu=mu, sigma=sigma, weights=weights)
    np.savez(root / "adm.npz", mu=mu, sigma=sigma)
    np.savez(root / "half.npz", mu=mu, weights=weights)
    np.savez(root / "nan_mu.npz", mu=mu * np.nan, sigma=sigma, weights=weights)
    torch.manual_seed(0)
    tokenizer = Tokenizer(TokenizerConfig(24, 8, multipliers=(1, 1, 1), res_blocks=1, d=4, K=16, T=3))
    vq, gen = rdpm.inference_state(tokenizer), rdpm.inference_state(toy_generator(tokenizer))
    torch.save({"kind": "tokenizer"} | vq, root / "vq.pt")
    torch.save({"kind": "generator", "tokenizer": vq, "classes": ["a", "b", "c"],
                "sampling": asdict(rdpm.Sampling())} | gen, root / "gen.pt")
    return root


def complete(flags, pictures):
    """Words of a command line, with their place where there is such a file."""
    return [pictures / word if (pictures / word).exists() else word for word in flags.split()]


@pytest.fixture
def run_fid(pictures, inception, monkeypatch, capsys, tmp_path):
    """Runs fid.py with these flags. Returns what it printed and wrote."""
    def run_fid(flags, load=lambda *args: inception):
        monkeypatch.setattr(fid, "load_inception", load)
        monkeypatch.chdir(tmp_path)
        run(fid, *complete(flags, pictures))
        written = tmp_path / "fid.json"
        return capsys.readouterr().out, json.loads(written.read_text()) if written.exists() else {}
    return run_fid


MISTAKES = {  # of `--ref good --samples X --allow-small`, or of these flags
    "one.npz": r"one.npz: N = 1, but 2048 features need as many images \(4, ",
    "mixed": r"000004.png: \(3, 20, 24\), not \(3, 24, 24\); .*--size N",
    "larger": r"larger: \(3, 48, 60\), not \(3, 24, 24\); .*--size N",
    "float.npz": r"float.npz: arr_0 is float32 \(9, 24, 24, 3\), but must be uint8 RGB",
    "nothing.npz": r"arr_0 is uint8 \(0, 24, 24, 3\), but",
    "statistics.npz": r"statistics.npz: arr_0 is float64 \(0,\), but",
    "objects.npz": r"objects.npz: not a readable .npz \(Object arrays",
    "truncated.npz": "truncated.npz: not a readable .npz",
    "rgba": "000000.png: is PNG of mode RGBA, but samples must be uint8 RGB PNGs",
    "deep": "000000.png: is PNG of mode I;16, but",
    "renamed": "000000.png: is JPEG of mode RGB, but",
    "broken": "000005.png: not a readable image",
    "gap": "gap: images are missing or there twice, first number 3;",
    "twice": "twice: images are missing or there twice, first number 2;",
    "nowhere": "nowhere: no such file, or no images in it",
    "shapes": "shapes: give the size .*--size N",
    "--ref good --samples many.npz": "many.npz: N = 2047, .*--allow-small",
    "--ref good --ckpt gen.pt --num 9": "--num 9: N = 9, .*--allow-small",
    "--ref wide.npz --ckpt gen.pt --num 9 --allow-small": r"samples: \(3, 24, 24\), not \(3, 24, 48\);",
    "--ref half.npz --samples good --allow-small": "half.npz: mean and covariance must be finite",
    "--ref nan_mu.npz --samples good --allow-small": "nan_mu.npz: mean and covariance must be finite",
    "--ref adm.npz --samples good --allow-small": "adm.npz: of the network 6726825d, not random-t; use --make-ref",
}


@pytest.mark.parametrize("flags, message", MISTAKES.items())
def test_mistakes_get_one_line(run_fid, flags, message):
    if "--" not in flags:
        flags = f"--ref good --samples {flags} --allow-small"
    with pytest.raises(UserError, match=message) as error:
        run_fid(flags)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("flags, message", {
    "--ref good": "give two sets", "good": "give two sets", "good good --ckpt gen.pt": "give two sets",
    "--ref good --samples good --num 2": "give two sets",
    "--tokenizer vq.pt --data tree --ref good": "rFID compares with their own reconstructions",
    "good good --out nowhere/a.json": "--out nowhere/a.json: .* a folder that can be written into",
    "--make-ref good": "--out fid.json: must end in .npz", "good good --out good.npz": "good.npz: must end in .json",
}.items())
def test_flags_are_checked_before_any_work(run_fid, flags, message):
    with pytest.raises(UserError, match=message):
        run_fid(flags, load=lambda *args: pytest.fail("work began"))


def test_statistics_only_reference(run_fid):
    """N in the name; precision, recall and sFID refused, with the reason; never called FID."""
    out, report = run_fid("statistics.npz compressed.npz --allow-small")
    values = report["values"]
    assert values.pop("FD-random-9") > 0 and report["N"] == 9 and "FID" not in out
    assert values == {"sFD-random-9": None, "precision-random": None, "recall-random": None}
    assert re.search(r"(?s)sFD-random-9 unavailable: .* mu_s.*precision, recall unavailable: .* statistics only", out)


def test_reference_file(run_fid, pictures, tmp_path):
    """--make-ref writes what the folder itself gives; ADM's layout; the split and the crop it says."""
    assert "N = 9" in run_fid("--make-ref tree --size 24 --out ref.npz --allow-small")[0]
    with np.load(tmp_path / "ref.npz") as file:
        assert {name: file[name].shape for name in ("mu", "sigma", "mu_s", "sigma_s", "arr_0")} == {
            "mu": (2048,), "sigma": (2048, 2048), "mu_s": (2023,), "sigma_s": (2023, 2023), "arr_0": (9, 24, 24, 3)}
        assert (file["arr_0"] == np.load(pictures / "good.npz")["arr_0"]).all()
    said, direct = run_fid("good rgb --allow-small")
    _, report = run_fid(f"--ref {tmp_path}/ref.npz --samples rgb --allow-small")
    assert report["values"] == pytest.approx(direct["values"], rel=1e-6) and None not in report["values"].values()
    assert report["weights"] == "random-test" and "fid.py" in report["command"] and report["versions"]["torch"]
    assert direct["values"]["FD-random-9"] > 0 and "BGR" not in said
    assert "BGR" in run_fid("--ref rgb --samples bgr --allow-small")[0]  # their channel means say so
    assert run_fid("--ref larger --samples good --size 24 --allow-small")[1]["N"] == 9
    assert run_fid("--ref tree --samples tree --size 24 --allow-small")[1]["N"] == 14  # against the held-out split
    assert run_fid("rgb good.npz --allow-small")[1]["values"] == run_fid("rgb good --allow-small")[1]["values"]


def test_reference_folder_is_read_as_training_reads_it(tmp_path):
    """16 bits are scaled, not clipped, and EXIF's rotation is done, also without --size."""
    deep = (np.arange(24 * 24).reshape(24, 24) * 113).astype(np.uint16)
    Image.fromarray(deep).save(tmp_path / "a.png")
    exif = Image.Exif()
    exif[0x0112] = 6                                             # Orientation: turn by 90 degrees
    for name in ("b.jpg", "c.jpg", "d.jpg"):
        Image.fromarray(bytes_of(24, 24, 3).numpy()).save(tmp_path / name, exif=exif)
    data = fid.open_images(str(tmp_path), False, None, False, True)
    for i, path in enumerate(sorted(tmp_path.iterdir())):
        assert np.array_equal(data[i][0].permute(1, 2, 0), np.array(rdpm.read_image(path)))
    assert np.array_equal(data[0][0][0], deep // 257)
    assert np.array_equal(data[1][0].permute(1, 2, 0), np.rot90(np.array(Image.open(tmp_path / "b.jpg")), -1))


def test_generator_equals_its_samples(run_fid, pictures, tmp_path):
    """Sampling and evaluating in one pass gives what writing the images and reading them gives."""
    _, report = run_fid("--ref rgb --ckpt gen.pt --num 9 --allow-small --seed 5 --tau 2 --fast")
    model, tokenizer, _, defaults = rdpm.load_generator(pictures / "gen.pt")
    sampling = asdict(defaults) | {"tau": 2.0, "skip": 0, "guidance_from": 3}  # T = 3
    assert report["sampling"] == sampling and report["seed"] == 5
    with rdpm.autocast(torch.device("cpu")):
        x = rdpm.sample(model, tokenizer, torch.tensor([0, 1, 2] * 3), 5, list(range(9)), rdpm.Sampling(**sampling))
    assert len(x.unique(dim=0)) == 9
    np.savez(tmp_path / "samples.npz", arr_0=rdpm.to_uint8(x).permute(0, 2, 3, 1).numpy())
    _, written = run_fid(f"--ref rgb --samples {tmp_path}/samples.npz --allow-small")
    assert report["values"] == pytest.approx(written["values"], rel=1e-9)


def test_tokenizer(run_fid, pictures, inception):
    """rFID, PSNR, SSIM, latent error and code usage are those of a plain loop over the held-out images."""
    values = run_fid("--tokenizer vq.pt --data tree --allow-small --seed 3")[1]["values"]
    tokenizer, data = rdpm.load_tokenizer(pictures / "vq.pt"), rdpm.load_data(str(pictures / "tree"), 24, train=False)
    originals, reconstructions = torch.stack([data[i][0] for i in range(14)]), []
    errors, codes = [], [[] for _ in range(3)]
    for i, x in enumerate(originals):
        with torch.inference_mode():
            x_rec, v, quantized = tokenizer(x[None] / 127.5 - 1, tokenizer.noise(rdpm.ImageStreams(3, [i], "cpu")))
        reconstructions.append(rdpm.to_uint8(x_rec)[0])
        errors.append(((v - quantized.z_sum) ** 2).mean().item())
        for used, now in zip(codes, quantized.codes, strict=True):
            used += now.flatten().tolist()
    for name in ("psnr", "ssim"):
        by_hand = getattr(fid, name)(originals, torch.stack(reconstructions)).mean().item()
        assert values[name] == pytest.approx(by_hand, abs=1e-4)
    assert values["latent_error"] == pytest.approx(np.mean(errors), rel=1e-4)
    assert values["usage"] == len({code for used in codes for code in used}) / 16
    assert values["usage_t"] == [len(set(used)) / 16 for used in codes]
    shares = [np.bincount(used, minlength=16) / len(used) for used in codes]
    assert values["perplexity_t"] == pytest.approx([np.prod(p ** -p) for p in shares])
    both = [moment for x in (originals, torch.stack(reconstructions)) for moment in moments(inception(x)[0])]
    assert values["rFD-random-14"] == pytest.approx(fid.frechet_distance(*both), rel=1e-3)
    without = fid.evaluate_tokenizer(tokenizer, data, torch.device("cpu"), 3)  # as train_vq.py calls it
    assert without == {name: value for name, value in values.items() if name != "rFD-random-14"}


def test_tokenizer_num_covers_all_classes(run_fid, monkeypatch):
    labels = []
    monkeypatch.setattr(fid, "evaluate_tokenizer", lambda _, data, *args: labels.extend(y for _, y in data) or {})
    assert run_fid("--tokenizer vq.pt --data tree --num 8 --allow-small")[1]["N"] == 8
    assert sorted(labels) == [0] * 4 + [1] * 4                   # of 5 and 9


def test_comparison_by_hand(inception, monkeypatch):
    """With the official weights: the names of a paper, each value from its own features."""
    monkeypatch.setattr(fid, "SHA256", inception.weights)
    (images, pool, *others), y = features(40, 1), features(30, 2)
    x = images, pool * 0.9, *others
    s, reference = streamed(x, 16, keep=40), streamed(y, 16, keep=30)
    values = fid.compare(s, reference, inception)["values"]
    assert list(values) == ["FID-40", "sFID-40", "IS", "precision", "recall"]
    for name, i in (("FID-40", 1), ("sFID-40", 2)):
        assert values[name] == pytest.approx(fid.frechet_distance(*moments(x[i]), *moments(y[i])), rel=1e-6)
    assert values["IS"] == s.score
    both = fid.precision_recall(reference=y[1], samples=x[1])
    assert (values["precision"], values["recall"]) == both and both[0] != both[1]


def test_training_logs_the_fid_of_the_ema_weights(folder, inception, monkeypatch, tmp_path):
    np.savez(tmp_path / "ref.npz", mu=np.zeros(2048), sigma=np.eye(2048), weights=inception.weights)
    monkeypatch.setattr(fid, "load_inception", lambda *args: inception)
    run(train_gen, *GEN, "--data", folder / "data", "--tokenizer", folder / "vq/model.pt", "--steps", 3, "--ema", 0.5,
        "--lr", 0.02, "--warmup", 0, "--out", tmp_path / "gen", "--fid-ref", tmp_path / "ref.npz", "--fid-every", 2,
        "--fid-num", 4, "--random-features")
    logged = [record for record in records(tmp_path / "gen") if "FD-random-4" in record]
    assert [record["step"] for record in logged] == [2, 3]
    model, _, _, sampling = rdpm.load_generator(tmp_path / "gen/model.pt")
    model.load_state_dict(torch.load(tmp_path / "gen/state.pt", weights_only=True)["parts"]["ema"])
    reference = fid.load_reference(str(tmp_path / "ref.npz"), inception, keep=0)
    tokenizer = rdpm.load_tokenizer(folder / "vq/model.pt")
    result = fid.fid_of_generator(model, tokenizer, sampling, reference, inception, 4)
    assert logged[1]["FD-random-4"] == pytest.approx(result["values"]["FD-random-4"], rel=1e-6)
    assert logged[0]["FD-random-4"] != logged[1]["FD-random-4"]


@pytest.mark.parametrize("flags", ["--ckpt gen.pt --num 9 --ref good.npz", "--tokenizer vq.pt --data tree"])
def test_two_ranks_equal_one(flags, run_fid, pictures, on_two_ranks, tmp_path, monkeypatch):
    """Batches of 4, so that both have some images; random weights as if the official ones, so that IS is there too."""
    (script := tmp_path / "small_batches.py").write_text(
        f"import sys\nsys.path.insert(0, {str(HERE)!r})\nimport fid, rdpm\n"
        "fid.BATCH, fid.SHA256 = 4, 'random-0'\nrdpm.run_main(fid.main)\n")
    monkeypatch.setattr(fid, "BATCH", 4)
    monkeypatch.setattr(fid, "SHA256", "random-0")
    flags += " --random-features --allow-small --device cpu --out "
    run_fid(flags + "one.json", load=fid.load_inception)
    ranks = on_two_ranks(script, *complete(flags, pictures), tmp_path / "two.json")
    assert [rank.returncode for rank in ranks] == [0, 0], ranks
    one, two = (json.loads((tmp_path / name).read_text())["values"] for name in ("one.json", "two.json"))
    assert list(two) == list(one) and ("IS" in one) == ("gen.pt" in flags)
    for name, value in one.items():
        assert two[name] == pytest.approx(value, rel=1e-6), name
