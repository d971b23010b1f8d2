"""Tests: identities against plain code written here from the paper. Run `pytest -q test_rdpm.py`."""

import argparse
import contextlib
import copy
import itertools
import json
import math
import multiprocessing
import operator
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
    for weight in tokenizer.quantizer.bias.parameters() if tokenizer.config.bias else ():
        nn.init.normal_(weight, std=0.15)
    return tokenizer


def toy_generator(tokenizer: Tokenizer, depth: int = 1, **changes) -> RDPM:
    """A generator whose weights are all random, so that no gate is closed and every input matters."""
    torch.manual_seed(1)
    model = RDPM(GeneratorConfig(depth, CLASSES, **changes), tokenizer)
    for weight in [*model.parameters(), model.mean, model.axes]:
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


# Tokenizer: schedules, noise, Alg. 1, Eqs. (2) to (5) -----------------------------------------------------------------

def alpha_by_hand(schedule: str, t: int, T: int) -> float:
    return {"sin": math.sin(math.pi * t / (2 * T)), "linear": t / T, "pow": 0.75 ** (T - t)}[schedule]


def test_schedules_by_hand():
    for schedule, T in itertools.product(("sin", "linear", "pow"), (1, 2, 10)):
        q = toy_tokenizer(schedule=schedule, T=T).quantizer
        close(q.alpha, [alpha_by_hand(schedule, t, T) for t in range(1, T + 1)])
        close(q.alpha**2 + q.beta**2, torch.ones(T))
        assert q.alpha[-1] == 1 and q.beta[-1] == 0 and (q.alpha.diff() > 0).all()
    close(rdpm.alpha_schedule("pow", 3, 0.5), [0.25, 0.5, 1])
    assert Sampling(1.5, "constant").lambdas(3) == [1.5, 1.5, 1.5]
    assert Sampling(1.5, "linear").lambdas(4) == [0, 0.5, 1.0, 1.5] and Sampling(1.5, "linear").lambdas(1) == [0]
    assert Sampling(1.5, "linear", guidance_from=2, guidance_to=3).lambdas(4) == [0, 0.5, 1.0, 0]
    for warmup, final, rates in ((4, 1.0, [0.5, 1, 1.5, 2, 2, 2, 2, 2]), (0, 1.0, [2] * 8),
                                 (4, 0.1, [0.5, 1, 1.5, 2, 2, 1.55, 1.1, 0.65])):
        close([rdpm.learning_rate(step, 8, 2.0, warmup, final) for step in range(8)], rates)
    sample.add_sampling_flags(parser := argparse.ArgumentParser())
    for T, draft, steps, strength in ((10, 1.2, (6, 7), 35 / 3), (3, 0, (2, 3), 3 / 2 * 3), (1, 0, (1, 1), 0)):
        fast = sample.sampling_from(parser.parse_args(["--fast", "--tau=2", "--guidance=6"]), Sampling(draft=draft), T)
        assert fast == Sampling(pytest.approx(strength), "constant", *steps, 2.0, True, T // 2, draft or 1.0)


def test_noise_of_an_image_is_its_own():
    tokenizer = toy_tokenizer()
    for seed, numbers in ((3, [8, 5]), (3, [5]), (2**32 + 3, [2**33])):
        assert torch.equal(tokenizer.noise(ImageStreams(seed, numbers, "cpu")), noise(tokenizer, seed, numbers))
    every = torch.cat([ImageStreams(seed, range(100), "cpu").draw(torch.randn, 8) for seed in range(25)])
    assert len(every.unique(dim=0)) == 2500 and scipy.stats.kstest(every.flatten().numpy(), "norm").pvalue > 1e-3


def nearest_by_hand(codebook, rows):
    return torch.stack([(rows - entry).square().sum(-1) for entry in codebook]).argmin(0)


def lookup_by_hand(q, codes):
    """Entries (B, n, d) plus the 3 x 3 bias convolution (zero padding): nine shifted grids, each times a matrix."""
    out = e = q.codebook[codes]
    if q.bias is not None:
        out = out + q.bias.bias
        grid = F.pad(e.view(-1, q.side, q.side, e.shape[-1]), (0, 0, 1, 1, 1, 1))
        for i, j in itertools.product(range(3), range(3)):
            shifted = grid[:, i:i + q.side, j:j + q.side].reshape(e.shape)
            out = out + shifted @ q.bias.weight[:, :, i, j].T
    return out


def algorithm_1(q, schedule, weight, stop, v, eps):
    """The paper's Algorithm 1 line by line, and Eq. (4). Returns C_t, z'_T, the loss, mean squares of z_t."""
    z, vq, z_sum = v, 0, 0                                                      # line 1
    all_codes, loss, residual = [], 0, []
    for t in range(1, q.T + 1):                                                 # line 2
        alpha = alpha_by_hand(schedule, t, q.T)
        z = z - (vq.detach() if stop and t > 1 else vq)                         # line 3
        v_t = alpha * z + math.sqrt(1 - alpha**2) * eps[t - 1]                  # line 4
        all_codes.append(nearest_by_hand(q.codebook.detach(), v_t.detach()))
        vq = lookup_by_hand(q, all_codes[-1])                                   # line 5
        z_sum = z_sum + vq                                                      # line 6
        error = (v_t - vq).square().mean()                                      # Eq. (4)
        if stop:                                                                # VQ-VAE's two terms
            error = (v_t.detach() - vq).square().mean() + 0.25 * (v_t - vq.detach()).square().mean()
        loss = loss + (alpha if weight else 1) * error
        residual.append(z.square().mean().item())
    return torch.stack(all_codes), z_sum, loss, residual


@pytest.mark.parametrize(("schedule", "bias", "weight", "stop"), [
    ("sin", True, True, False), ("linear", True, False, False), ("pow", False, True, False), ("pow", True, True, True),
    ("sin", False, False, True)])
def test_quantiser_is_algorithm_1_and_its_loss_and_gradients_are_eq_4(schedule, bias, weight, stop):
    tokenizer = toy_tokenizer(schedule=schedule, bias=bias, weight=weight, stop_gradients=stop, image_size=8)
    q, exact, (v, eps) = tokenizer.quantizer, copy.deepcopy(tokenizer.quantizer).double(), latents(tokenizer, 2)
    v_exact = v.double().requires_grad_()
    codes, z_sum, loss, residual = algorithm_1(exact, schedule, weight, stop, v_exact, eps.double())
    found = q(v.requires_grad_(), eps)
    assert torch.equal(found.codes, codes)
    error = ((q.gamma if weight else 1) * found.error).sum() * (1.25 if stop else 1)
    for ours, by_hand in ((found.z_sum, z_sum), (found.loss, loss), (error, loss), (found.residual, residual)):
        close(ours, by_hand)
    found.loss.backward()
    loss.backward()
    for ours, by_hand in zip([v, *q.parameters()], [v_exact, *exact.parameters()], strict=True):
        assert by_hand.grad.abs().sum() > 0
        close(ours.grad, by_hand.grad)


def test_nearest_is_a_naive_search_in_every_chunk():
    q, rows = toy_tokenizer(K=1000).quantizer, torch.randn(5, 500, 4)
    assert torch.equal(q.nearest(rows), nearest_by_hand(q.codebook.double(), rows.double()))


def test_training_input_is_the_samplers_state_whatever_autocast_says():
    tokenizer = toy_tokenizer(K=512, d=8)
    q, t = tokenizer.quantizer, torch.tensor([3, 1, 5, 2, 5, 1, 4])
    v, eps = latents(tokenizer, len(t))
    expected = q(v, eps)
    with torch.autocast("cpu", torch.bfloat16):
        found, (z_sum, target) = q(v, eps), q.training_input(v, eps, t)
        sums = list(itertools.accumulate(map(q.lookup, expected.codes), initial=torch.zeros_like(v)))
    assert torch.equal(found.codes, expected.codes) and torch.equal(found.z_sum, expected.z_sum)
    assert torch.equal(sums[-1], expected.z_sum)
    for i, t_i in enumerate(t):
        close(z_sum[i], sums[t_i - 1][i])
        assert torch.equal(target[i], expected.codes[t_i - 1, i])


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


def test_residual_stream_codebook_head_and_argmax_are_float32(monkeypatch):
    """Under autocast too: bfloat16 logits of a linear head have ties, which would decide what an argmax takes."""
    tokenizer, y, logits, seen = toy_tokenizer(K=4096), torch.zeros(2, dtype=torch.long), [], []
    monkeypatch.setattr(rdpm, "argmax", lambda x: logits.append(x) or x.argmax(-1))
    for head in ("linear", "codebook"):
        model = toy_generator(tokenizer, depth=2, head=head)
        for module in (*model.blocks, model.head):
            module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
        with torch.autocast("cpu", torch.bfloat16):
            logits.append(model(*some_inputs(tokenizer))[0])
            list(rdpm.sample_steps(model, tokenizer, y, 0, range(2), Sampling(gumbel=False)))
        ties = [(x == x.amax(-1, keepdim=True)).sum(-1).gt(1).sum() for x in logits[-6:]]
        assert (ties[0] > 3) == (head == "linear") and sum(ties[1:]) == 0
    assert set(seen) == {torch.float32}


def test_tokens_lie_row_by_row():
    tokenizer = toy_tokenizer(image_size=32)
    x, z = torch.zeros(2, 3, 32, 32), torch.zeros(2, 16, 16, 4)
    x[1, :, :4, -4:], z[1, :2, -2:] = 1, 3
    v, x_rec = tokenizer.encoder(x).view(2, 16, 16, 4), tokenizer.decoder(z.flatten(1, 2))
    for change, c in (((v[0] - v[1]).square().sum(-1), 6), ((x_rec[0] - x_rec[1]).square().sum(0), 8)):
        assert change[:c, -c:].mean() > 3 * max(change[:c, :c].mean(), change[-c:, -c:].mean())


def test_decoders_gradient_goes_straight_through():
    tokenizer = toy_tokenizer()
    x_rec, v, quantized = tokenizer(torch.rand(2, 3, 16, 16), latents(tokenizer, 2)[1])
    z_sum = quantized.z_sum.detach().requires_grad_()
    decoded = tokenizer.decoder(z_sum)
    close(x_rec, decoded, 1e-4)
    expected, = torch.autograd.grad(decoded.square().sum(), z_sum)
    found, unused = torch.autograd.grad(x_rec.square().sum(), (v, tokenizer.quantizer.codebook), allow_unused=True)
    close(found, expected, 1e-3)
    assert unused is None


def test_lpips_is_the_lpips_package(monkeypatch):
    """With the same random VGG16, less the 120 million weights of its last layers, and the package's linear weights."""
    def small_vgg16(**_):
        network = nn.Module()
        network.features = torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs["D"])
        return network
    lpips = pytest.importorskip("lpips")
    monkeypatch.setattr(torchvision.models, "vgg16", small_vgg16)
    torch.manual_seed(0)
    theirs = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
    for weight in theirs.net.parameters():
        if weight.ndim > 1:
            nn.init.kaiming_normal_(weight)  # deep features must differ too
    vgg16 = {"features." + key.split(".", 1)[1]: weight for key, weight in theirs.net.state_dict().items()}
    linear = torch.load(Path(lpips.__file__).parent / "weights/v0.1/vgg.pth", "cpu", weights_only=True)
    ours, (x, y) = rdpm.LPIPS(vgg16, linear), torch.rand(2, 2, 3, 40, 36) * 2 - 1
    close(ours(x, y) / theirs(x, y).mean(), 1)
    assert ours(x, y) > 0 and ours(x, x) == 0


# Transformer and sampler: Eqs. (6) to (8), Alg. 2, guidance, known codes ----------------------------------------------

def some_inputs(tokenizer: Tokenizer, batch: int = 4):
    v, eps = latents(tokenizer, batch)
    t = torch.arange(batch) % tokenizer.config.T + 1
    return eps[0], torch.arange(batch) % (CLASSES + 1), t, v


def test_at_first_gates_are_closed_and_bias_and_head_zero():
    q = Tokenizer(TokenizerConfig(**(TOY | {"K": 4096}))).quantizer
    codes, tokenizer = torch.randint(0, 4096, (2, 64)), toy_tokenizer()
    assert torch.equal(q.lookup(codes), q.codebook[codes]) and abs(q.codebook.std() - 1) < 0.05
    model, inputs = RDPM(GeneratorConfig(2, CLASSES), tokenizer), some_inputs(tokenizer)
    assert (model(*inputs)[0] == 0).all()
    nn.init.normal_(model.head.weight)
    before = model(*inputs)[0]
    for block in model.blocks:
        for name, weight in block.named_parameters():
            assert name.startswith("ada") == bool((weight == 0).all())
            if not name.startswith("ada"):
                nn.init.normal_(weight)
    assert torch.equal(model(*inputs)[0], before) and before.abs().sum() > 0
    model, (eps, y, t, z_sum) = toy_generator(tokenizer), inputs
    for i, other in enumerate((eps + 1, (y + 1) % (CLASSES + 1), t % 5 + 1, z_sum + 1)):
        changed = [other if i == j else value for j, value in enumerate(inputs)]
        assert ((model(*changed)[0] - model(*inputs)[0]).abs().amax((1, 2)) > 1e-4).all()


def turned_by_hand(x, side):
    """2-D rotary positions of one head's x (n, head_dim), pair by pair: half turn by row, half by column."""
    out, pairs = torch.empty_like(x), x.shape[1] // 2
    for p, i in itertools.product(range(len(x)), range(pairs)):
        place = p // side if i < pairs // 2 else p % side
        angle = place * 100.0 ** (-2 * (i % (pairs // 2)) / pairs)
        a, b = x[p, i], x[p, i + pairs]
        out[p, i] = a * math.cos(angle) - b * math.sin(angle)
        out[p, i + pairs] = a * math.sin(angle) + b * math.cos(angle)
    return out


def test_block_by_hand():
    def normalised(x):
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    torch.manual_seed(0)
    width, heads, side = 16, 2, 3
    block = rdpm.Block(width, heads).double()
    for weight in block.parameters():
        nn.init.normal_(weight, std=0.5)
    x, c = torch.randn(2, side**2, width).double(), torch.randn(2, width).double()
    angles = rdpm.rotary_angles(side, width // heads).double()
    found = block(x, c, angles.cos(), angles.sin())
    for image in range(2):
        ada = block.ada.weight @ c[image] + block.ada.bias
        shift1, scale1, gate1, shift2, scale2, gate2 = ada.view(6, width)
        h = normalised(x[image]) * (1 + scale1) + shift1
        heads_outputs = []
        for q, k, v in zip(*((h @ w.T).chunk(heads, 1) for w in block.qkv.weight.view(3, width, width)), strict=True):
            scores = turned_by_hand(q, side) @ turned_by_hand(k, side).T / math.sqrt(width / heads)
            heads_outputs.append(scores.exp() / scores.exp().sum(1, keepdim=True) @ v)
        y = x[image] + gate1 * (torch.cat(heads_outputs, 1) @ block.out.weight.T)
        h = normalised(y) * (1 + scale2) + shift2
        gate, up = (h @ w.T for w in block.gate_up.weight.view(2, -1, width))
        close(found[image], y + gate2 * ((gate / (1 + (-gate).exp()) * up) @ block.down.weight.T))


@pytest.mark.parametrize(("depth", "width", "millions"), [(12, 768, 133), (16, 1024, 310), (20, 1280, 602)])
def test_sizes_of_table_1(depth, width, millions):
    with torch.device("meta"):
        model = RDPM(GeneratorConfig(depth), Tokenizer(TokenizerConfig()))
    assert abs(sum(weight.numel() for weight in model.parameters()) / 1e6 / millions - 1) < 0.005
    assert model.embed.out_features == width and model.blocks[0].heads == depth and len(model.blocks) == depth


def test_codebook_head_with_the_true_v_gives_the_tokenizers_codes():
    tokenizer = toy_tokenizer()
    model = RDPM(GeneratorConfig(1, CLASSES, head="codebook", patch=2), tokenizer).requires_grad_(False)
    q, t = tokenizer.quantizer, torch.arange(10) % 5 + 1
    y, doubt, (v, eps) = t % CLASSES, torch.rand(10, 64, 1), latents(tokenizer, 10)
    z_sum, codes = q.training_input(v, eps, t)
    eps_t, alpha, beta = eps[t - 1, torch.arange(10)], q.alpha[t - 1, None, None], q.beta[t - 1, None, None]
    model.mean.copy_(torch.randint(-2, 3, model.mean.shape) / 2)
    start = model.mean[CLASSES] + beta.double() * (model.mean[y] - model.mean[CLASSES])
    model.head.register_forward_hook(lambda *_: model.patchify(torch.cat([v.double() - start, doubt], dim=-1)).float())
    model.log_s.fill_(-5)
    with torch.autocast("cpu", torch.bfloat16):
        logits, v_hat = model(eps_t, y, t, z_sum)
    assert torch.equal(logits.argmax(-1), codes)
    close(v_hat, v)
    model.log_s.copy_(torch.arange(5) / 4)
    distances = ((alpha * (v - z_sum) + beta * eps_t)[:, :, None] - q.codebook).square().sum(-1)
    by_hand = -distances / 2 / (model.log_s[t - 1, None, None] + doubt).exp()
    close(model(eps_t, y, t, z_sum)[0].log_softmax(-1), by_hand.log_softmax(-1), 1e-4)


def test_the_linear_head_sees_noise_and_sum_whole_or_through_d_numbers():
    tokenizer = toy_tokenizer()
    whole, narrow = (toy_generator(tokenizer, bottleneck=bottleneck) for bottleneck in (False, True))
    (eps, y, t, z_sum), d = some_inputs(tokenizer), tokenizer.config.d
    invisible = torch.linalg.svd(narrow.squeeze.weight).Vh[d:].sum(0)
    other = eps + invisible[:d], y, t, z_sum + invisible[d:]
    close(narrow(*other)[0], narrow(eps, y, t, z_sum)[0], 1e-4)
    assert (whole(*other)[0] - whole(eps, y, t, z_sum)[0]).abs().mean() > 0.01


def test_patches_by_hand():
    model, x = RDPM(GeneratorConfig(1, CLASSES, patch=2), toy_tokenizer()), torch.randn(2, 64, 3)
    grid, groups = x.view(2, 8, 8, 3), model.patchify(x)
    for i, j in itertools.product(range(4), range(4)):
        tokens = [grid[:, 2 * i + a, 2 * j + b] for a in range(2) for b in range(2)]
        assert torch.equal(groups[:, 4 * i + j], torch.cat(tokens, dim=1))
    assert torch.equal(model.unpatchify(groups), x)


class Recorder(nn.Module):
    def __init__(self, model=None, logits=None):
        super().__init__()
        self.config, self.inner, self.logits, self.calls = GeneratorConfig(1, CLASSES), model, logits, []
        self.mean, self.axes = (model.mean, model.axes) if model else (torch.zeros(CLASSES + 1, 1, 4), None)

    def forward(self, eps, y, t, z_sum):
        self.calls.append((eps.clone(), y.clone(), t.clone(), z_sum.clone()))
        return self.inner(eps, y, t, z_sum) if self.inner else (self.logits.expand(*eps.shape[:2], -1), None)


def algorithm_2(model, tokenizer, y, eps, lambdas):
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
@pytest.mark.parametrize(("settings", "lambdas"), [
    ((4.0, "constant"), [4] * 5), ((4.0, "linear"), [0, 1, 2, 3, 4]), ((4.0, "constant", 4), [0, 0, 0, 4, 4]),
    ((0.0, "constant"), [0] * 5)])
def test_sample_is_algorithm_2_with_guidance(head, settings, lambdas):
    tokenizer, y = toy_tokenizer(image_size=8), torch.tensor([0, 2, 1])
    model, eps = Recorder(toy_generator(tokenizer, head=head)), noise(tokenizer, 5, [4, 0, 9])
    images = rdpm.sample(model, tokenizer, y, 5, [4, 0, 9], Sampling(*settings, gumbel=False))
    close(images, algorithm_2(model.inner, tokenizer, y, eps, lambdas), 1e-4)
    assert [(labels.tolist(), t.unique().tolist()) for _, labels, t, _ in model.calls] == [
        ([0, 2, 1, 3, 3, 3] if strength else [0, 2, 1], [t]) for t, strength in enumerate(lambdas, 1)]
    raw = algorithm_2(model.inner, tokenizer, y, eps, [0] * 5)
    assert ((images - raw).abs().max() > 1e-2) == (lambdas[-1] > 0)


def test_gumbel_draws_follow_eq_8():
    tokenizer, y = toy_tokenizer(K=5, T=1, bias=False), torch.zeros(100).long()
    logits, taus = torch.tensor([0.0, 1.0, -0.3, 0.6, 0.2]), (1.0, 3.0)
    for tau in taus:
        (z, _), = rdpm.sample_steps(Recorder(logits=logits), tokenizer, y, 0, range(100), Sampling(tau=tau))
        hits = (z[:, :, None] == tokenizer.quantizer.codebook).all(-1)
        assert (hits.sum(-1) == 1).all()
        for other in taus:
            expected = 6400 * (other * logits.double()).softmax(0).numpy()
            p = scipy.stats.chisquare(hits.sum((0, 1)).numpy(), expected).pvalue
            assert p > 1e-3 if other == tau else p < 1e-9
        assert len(hits.float().argmax(-1).unique(dim=0)) == 100  # every image draws its own


@torch.no_grad()
@pytest.mark.parametrize("head", ["linear", "codebook"])
@pytest.mark.parametrize(("shares", "skip"), [([0] * 5, 0), ([0] * 5, 2), ([1] * 5, 0), ([1, 0, 0.5, 0.5, 0.5], 0),
                                              ([1, 0, 0.5, 0.5, 0.5], 3)])
def test_known_codes_and_skipped_steps_by_hand(head, shares, skip):
    """Where known, codes are Alg. 1's on v; in the first `skip` steps the others are Alg. 1's on the class's draft."""
    tokenizer, y, nobody = toy_tokenizer(), torch.tensor([0, 2, 1]), torch.full((3,), CLASSES)
    model, q = Recorder(toy_generator(tokenizer, head=head)), tokenizer.quantizer
    (v, _), streams = latents(tokenizer, 3), ImageStreams(5, [4, 0, 9], "cpu")
    eps, steps = tokenizer.noise(streams), streams.draw(torch.randn, 256)
    draft = model.mean[y] + 0.5 * torch.einsum("bk,knd->bnd", steps, model.axes.view(256, 64, 4))
    known = torch.rand(5, 3, 64, generator=torch.Generator().manual_seed(0)) < torch.tensor(shares).view(5, 1, 1)
    given, z_sum = known if 0.5 in shares else known[..., :1], torch.zeros_like(v)
    settings = Sampling(1.5, gumbel=False, skip=skip, draft=0.5)
    found = rdpm.sample_steps(model, tokenizer, y, 5, [4, 0, 9], settings, v, given)
    for t, (z_found, v_found) in enumerate(found, 1):
        step, here = torch.full_like(y, t), known[t - 1]
        encoded, free = (nearest_by_hand(q.codebook, q.alpha[t - 1] * (latent - z_sum) + q.beta[t - 1] * eps[t - 1])
                         for latent in (v, draft))
        (cond, v_hat), (uncond, _) = (model.inner(eps[t - 1], label, step, z_sum) for label in (y, nobody))
        if t <= skip:
            v_hat = torch.where(here[..., None], v, draft)
        else:
            free = (cond + (cond - uncond) * 1.5 * (t - 1) / 4).argmax(-1)
        z_sum = z_sum + lookup_by_hand(q, torch.where(here, encoded, free))
        close(z_found, z_sum)
        assert v_found is v_hat is None or (v_found - v_hat).abs().max() < 1e-4
    assert [int(call[2][0]) for call in model.calls] == list(range(skip + 1, 6))


@torch.no_grad()
def test_an_image_depends_on_its_seed_and_number_alone():
    tokenizer = toy_tokenizer()
    model, y, numbers = Recorder(toy_generator(tokenizer)), torch.tensor([0, 1, 2, 0]), [4, 9, 2, 4]
    batch = rdpm.sample(model, tokenizer, y, 3, numbers, Sampling())
    assert torch.equal(batch[0], batch[3])
    assert torch.equal(torch.stack([call[0][:4] for call in model.calls]), noise(tokenizer, 3, numbers))
    for seed, number in ((3, 9), (4, 9), (3, 8)):
        alone, = rdpm.sample(model, tokenizer, y[[1]], seed, [number], Sampling())
        assert ((alone - batch[1]).abs().max() < 1e-4) == ((seed, number) == (3, 9))


# Data, checkpoints, learning by heart ---------------------------------------------------------------------------------

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
    for found in (rdpm.center_crop(image, 16), rdpm.fit(image, 16, pad=False)):
        assert found.size == (16, 16) and np.array_equal(found, adm_crop(image, 16))


def test_mnist_is_read_padded_and_split(tmp_path, monkeypatch):
    (raw := tmp_path / "data/MNIST/raw").mkdir(parents=True)
    digits = np.random.default_rng(0).integers(0, 255, (3, 28, 28), np.uint8)
    for name, shift in (("train", 0), ("t10k", 1)):
        header = np.array([0x803, 3, 28, 28], ">i4").tobytes()
        (raw / f"{name}-images-idx3-ubyte").write_bytes(header + (digits + np.uint8(shift)).tobytes())
        labels = np.array([0x801, 3], ">i4").tobytes() + bytes([7, 0, 7])
        (raw / f"{name}-labels-idx1-ubyte").write_bytes(labels)
    monkeypatch.chdir(tmp_path)
    for train in (True, False):
        images = rdpm.load_data("mnist", 32, train, pad=True)
        assert len(images) == 3 and len(images.classes) == 10 and images.labels.tolist() == [7, 0, 7]
        x, y = images[2]
        assert y == 7 and x.shape == (3, 32, 32) and (x.numpy() == np.pad(digits[2] + np.uint8(not train), 2)).all()


NAMES = ["arrow", "bar", "crescent"]


def draw_folder(folder: Path, count: int = 30, size: int = 32, classes: int = CLASSES) -> Path:
    shapes = rdpm.Shapes(size, train=True)
    for i in range(count):
        file = folder / shapes.classes[i % classes] / f"{i:03d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        shapes[10 * i + i % classes][0].save(file)
    return folder


def test_folders_with_and_without_a_held_out_one(tmp_path):
    root = draw_folder(tmp_path / "whole", 60)
    train, held_out = (rdpm.load_data(str(root), 32, train) for train in (True, False))
    files = sorted(root.glob("*/*.png"))
    for images, places in ((train, [i for i in range(60) if i % 20]), (held_out, [0, 20, 40])):
        assert len(images) == len(places) and images.classes == NAMES
        for i, place in enumerate(places):
            picture = np.array(Image.open(files[place])).transpose(2, 0, 1)
            for x, y, expected in ((*images[i], picture), (*images[len(images) + i], picture[:, :, ::-1])):
                assert NAMES[y] == files[place].parent.name and np.array_equal(x.numpy(), expected)
            assert images.labels[i] == y
    for name in ("val", "test"):
        draw_folder(tmp_path / name / "train", 6)
        file, *_ = sorted(draw_folder(tmp_path / name / name, 3, size=40).glob("arrow/*.png"))
        train, held_out = (rdpm.load_data(str(tmp_path / name), 32, train) for train in (True, False))
        assert len(train) == 6 and len(held_out) == 3
        assert np.array_equal(held_out[0][0].permute(1, 2, 0).numpy(), adm_crop(Image.open(file), 32))


def test_shapes_are_ten_classes_always_the_same_and_the_splits_differ():
    train, again, held_out = (rdpm.load_data("shapes", 32, train) for train in (True, True, False))
    assert len(train) == 20_000 and len(held_out) == 2_000 and [train[i][1] for i in range(10)] == list(range(10))
    assert np.array_equal(np.bincount(train.labels), [2000] * 10) and len(train.classes) == 10
    pictures = [[images[i][0].numpy().tobytes() for i in range(30)] for images in (train, held_out, again)]
    assert len(set(pictures[0] + pictures[1])) == 60 and pictures[2] == pictures[0]
    x = torch.arange(256).to(torch.uint8)
    assert torch.equal(rdpm.to_uint8(rdpm.to_float(x)), x) and rdpm.to_float(x)[[0, 255]].tolist() == [-1, 1]
    assert rdpm.to_uint8(torch.tensor([-9.0, 9.0])).tolist() == [0, 255]


def test_global_batches_and_balanced_subsets(monkeypatch):
    def batches(steps=range(0, 9), flip=True, seed=0):
        return list(rdpm.global_batches(30, 8, steps, seed, flip))
    whole = batches()
    items = sum(whole, [])
    assert len(whole) == 9 and all(len(batch) == 8 for batch in whole) and batches(range(4, 9)) == whole[4:]
    for epoch in (items[:30], items[30:60]):
        assert sorted(i % 30 for i in epoch) == list(range(30)) and 5 < sum(i >= 30 for i in epoch) < 25
    assert items[:30] != items[30:60] and batches(seed=1) != whole and max(sum(batches(flip=False), [])) == 29
    for world in (2, 4):
        monkeypatch.setattr(rdpm, "WORLD_SIZE", world)
        shares = [monkeypatch.setattr(rdpm, "RANK", rank) or batches() for rank in range(world)]
        assert [sum(parts, []) for parts in zip(*shares, strict=True)] == whole
    for labels in (np.arange(200) % 10, np.sort(np.arange(200) % 10)):  # of `shapes`, and of a folder
        chosen = rdpm.balanced_subset(labels, 37)
        counts = np.bincount(labels[chosen], minlength=10)
        assert len(set(chosen)) == 37 and counts.min() == 3 and counts.max() == 4
        assert chosen == rdpm.balanced_subset(labels, 37) and len(rdpm.balanced_subset(labels, 900)) == 200
    few = np.array([0] * 50 + [1] * 2)
    assert np.bincount(few[rdpm.balanced_subset(few, 10)]).tolist() == [8, 2]


def test_cached_latents_are_the_encoders(tmp_path):
    def cache(data, flip=True):
        images = rdpm.load_data(str(tmp_path / data), 32, True)
        args = argparse.Namespace(tokenizer=tmp_path / "vq.pt", out=tmp_path, flip=flip, pad=False, workers=0)
        torch.save(tokenizer.state_dict(), args.tokenizer)
        latents = train_gen.cache_latents(tokenizer, images, args, torch.device("cpu"))
        for i in (0, 3, 4, (1 + flip) * len(images) - 1):
            (v, y), (x, label) = latents[i], images[i]
            assert y == label and v.dtype == torch.float16 and len(latents) == len(images) * (1 + flip)
            assert (v - tokenizer.encoder(rdpm.to_float(x[None]))[0]).abs().mean() < 0.03  # bf16
        return {file.name: file.stat().st_mtime_ns for file in tmp_path.glob("latents-*")}
    tokenizer, more = toy_tokenizer(image_size=32).requires_grad_(False), draw_folder(tmp_path / "more", 33)
    draw_folder(tmp_path / "data")
    files = [cache("data"), cache("data"), cache("data", flip=False)]
    tokenizer.decoder.layers[0].bias.data += 1
    files += [cache("data"), cache("more")]
    Image.new("RGB", (32, 32)).save(sorted(more.rglob("*.png"))[5])
    files.append(cache("more"))
    assert files[0] == files[1] and [len([*tmp_path.glob("*.npy")]), *map(len, files)] == [5, 1, 1, 2, 3, 4, 5]
    for length in (1000, 50, 0):
        for name in files[-1]:
            os.truncate(tmp_path / name, length)
        with pytest.raises(UserError, match="latents-[0-9a-f]+.npy: damaged .* remove it"):
            cache("more")


def test_model_files_round_trip(tmp_path):
    original, _ = toy_tokenizer(), rdpm.load_generator(HERE / "assets/demo.pt")
    torch.save({"kind": "tokenizer"} | rdpm.inference_state(original), tmp_path / "vq.pt")
    tokenizer = rdpm.load_tokenizer(tmp_path / "vq.pt")
    assert tokenizer.config == original.config and not tokenizer.training
    for head in ("linear", "codebook"):
        model = toy_generator(tokenizer, head=head)
        torch.save({"kind": "generator", "classes": ["a", "b", "c"], "sampling": {"tau": 2.0}, "tokenizer":
                    rdpm.inference_state(tokenizer)} | rdpm.inference_state(model), tmp_path / "gen.pt")
        loaded, its_tokenizer, classes, sampling = rdpm.load_generator(tmp_path / "gen.pt")
        assert classes == ["a", "b", "c"] and sampling == Sampling(tau=2.0)
        assert its_tokenizer.config == original.config and loaded.config == model.config and not loaded.training
        for ours, theirs in ((tokenizer, original), (its_tokenizer, original), (loaded, model)):
            for weight, expected in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
                assert torch.equal(weight, expected.half().float()) and not weight.requires_grad
        model.load_state_dict(loaded.state_dict())
        assert torch.equal(loaded(*some_inputs(tokenizer))[0], model(*some_inputs(tokenizer))[0])


def by_heart(optimizer, loss):
    for _ in range(150):
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_tokenizer_overfits_one_batch():
    tokenizer, images = toy_tokenizer(T=3, channels=16, K=64), rdpm.load_data("shapes", 16, True)
    x, eps = rdpm.to_float(torch.stack([images[i][0] for i in range(4)])), noise(tokenizer, 0, range(4))
    by_heart(torch.optim.Adam(tokenizer.parameters(), 2e-3, betas=(0.5, 0.9)),
             lambda: F.mse_loss((found := tokenizer(x, eps))[0], x) + 0.25 * found[2].loss)
    assert F.mse_loss(tokenizer(x, eps)[0], x) < 0.02 < 0.1 < x.var()


@pytest.mark.parametrize(("head", "patch"), [("linear", 1), ("codebook", 2)])
def test_generator_overfits_one_batch(head, patch):
    tokenizer = toy_tokenizer(image_size=8)
    model = RDPM(GeneratorConfig(2, CLASSES, head=head, patch=patch), tokenizer)
    (v, eps), t = latents(tokenizer, 6), torch.tensor([1, 2, 3, 4, 5, 5])
    z_sum, codes = tokenizer.quantizer.training_input(v, eps, t)
    inputs = eps[t - 1, torch.arange(6)], torch.arange(6) % CLASSES, t, z_sum
    by_heart(torch.optim.AdamW(model.parameters(), 2e-3),
             lambda: F.cross_entropy(model(*inputs)[0].flatten(0, 1), codes.flatten()))
    assert torch.equal(model(*inputs)[0].argmax(-1), codes)


# The scripts, end to end ----------------------------------------------------------------------------------------------

COMMON = ["--preset", "shapes", "--device", "cpu", "--workers", 0, "--batch", 4, "--log-every", 1]
VQ = [*COMMON, "--T", 3, "--K", 32]
GEN = [*COMMON, "--depth", 1]


@pytest.fixture(autouse=True)
def signals():
    """A training in this process leaves its handlers behind, and its workers, whose end raises a RuntimeError."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for worker in multiprocessing.active_children():
        worker.kill()
        with contextlib.suppress(RuntimeError):
            worker.join()
    for number, handler in before.items():
        signal.signal(number, handler)


def shell(*command) -> str:
    done = subprocess.run([sys.executable, *map(str, command)], cwd=HERE, env=os.environ | {"OMP_NUM_THREADS": "1"},
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def run(script, *flags) -> None:
    """A script's main() in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, flags)])
        script.main()


def records(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def logged(out: Path, key: str = "loss") -> list:
    return [record[key] for record in records(out) if key in record]


def state(out: Path) -> dict:
    return torch.load(out / "state.pt", weights_only=True)


def same(a, b) -> bool:
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
    data = draw_folder(out / "data", 100, classes=10)
    said = shell("train_gen.py", *GEN, "--steps", 2, "--data", data, "--tokenizer", out / "vq/model.pt", "--out",
                 out / "gen")
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
    flags = {"vq": VQ, "gen": [*GEN, "--tokenizer", folder / "vq/model.pt"]}
    return lambda stage, *more: ({"vq": train_vq, "gen": train_gen}[stage],
                                 [*flags[stage], "--data", folder / "data", *more])


@pytest.fixture
def in_float32(monkeypatch):
    """In bfloat16 another batch may round to another code."""
    for module in (rdpm, train_vq, train_gen):
        monkeypatch.setattr(module, "autocast", lambda device: torch.autocast("cpu", enabled=False))


def test_what_trainings_write(shapes, folder):
    """Files and log; latents and their means; Adam (0.5, 0.9); AdamW (0.9, 0.95) with 0.03 on matrices; EMA."""
    for stage in ("vq", "gen"):
        names = ["grid-000002.png", "log.jsonl", "model.pt", "state.pt"]
        assert sorted(file.name for file in (shapes / stage).iterdir() if file.suffix != ".npy") == names
        assert [file.name for file in sorted((folder / stage).glob("grid*"))] == ["grid-000002.png", "grid-000003.png"]
        first, *_ = records(shapes / stage)
        assert first["command"].startswith(f"train_{stage}.py") and first["torch"] == torch.__version__
        assert first["world"] == 1 and first["args"]["batch"] == 4 and logged(shapes / stage, "step")[:2] == [1, 2]
        assert all(math.isfinite(x) for key in ("loss", "lr", "grad_norm") for x in logged(shapes / stage, key))
    evaluated, = (record for record in records(shapes / "vq") if "psnr" in record)
    assert 0 < evaluated["psnr"] < 50 and len(evaluated["usage_t"]) == 3 and evaluated["latent_error"] > 0
    for record in records(folder / "vq")[1:3]:
        close(record["loss"], record["recon"] + 0.25 * record["quant"])
        close(record["quant"], 1.25 * sum(record["error_t"]))  # --no-weight, two terms
        close(record["residual_t"][0], 1, 1e-2)                # z_1 = v is normalised
        assert len(record["residual_t"]) == len(record["error_t"]) == 3
    (cached,), labels = (folder / "vq").glob("latents-*.npy"), rdpm.load_data(str(folder / "data"), 32, True).labels
    model, tokenizer, classes, _ = rdpm.load_generator(folder / "gen/model.pt")
    for row in range(CLASSES + 1):
        chosen = np.load(cached).astype(float)[labels == row if row < CLASSES else labels >= 0]
        close(model.mean[row], chosen.mean(0), 1e-3)
    rest = (np.load(cached)[:28].astype(float) - model.mean[torch.from_numpy(labels)].numpy()).reshape(28, -1)
    close(model.axes.T @ model.axes, rest.T @ rest / 28, 2e-3)
    assert classes == NAMES and model.config == GeneratorConfig(1, 3, bottleneck=True, head="linear", patch=2)
    assert tokenizer.quantizer.bias is None and tokenizer.config.weight is False
    vq, gen = (state(folder / stage)["parts"] for stage in ("vq", "gen"))
    for name in ("optimizer", "optimizer_d"):
        group, = vq[name]["param_groups"]
        assert group["betas"] == (0.5, 0.9) and group["weight_decay"] == 0
    matrices, others = gen["optimizer"]["param_groups"]
    assert (matrices["weight_decay"], others["weight_decay"]) == (0.03, 0)
    assert matrices["betas"] == others["betas"] == (0.9, 0.95)
    assert len(matrices["params"]) == sum(weight.ndim > 1 for weight in model.parameters())
    written = torch.load(folder / "gen/model.pt", weights_only=True)["model"]
    assert all(torch.equal(written[name], weight.half()) for name, weight in gen["ema"].items())
    assert not torch.equal(gen["ema"]["head.weight"], gen["model"]["head.weight"])


def test_another_image_size(tmp_path):
    flags = ["--steps", 1, "--data", draw_folder(tmp_path / "data")]
    run(train_vq, *VQ, *flags, "--image-size", 16, "--out", tmp_path / "vq")
    run(train_gen, *GEN, *flags, "--tokenizer", tmp_path / "vq/model.pt", "--out", tmp_path / "gen")
    run(sample, "--ckpt", tmp_path / "gen/model.pt", "--num", 2, "--out", tmp_path / "images", "--device", "cpu")
    assert [Image.open(tmp_path / f"images/00000{i}.png").size for i in (0, 1)] == [(16, 16)] * 2


def test_the_imagenet_preset_is_the_papers(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train_vq.py"])
    vq = vars(train_vq.parse_args())
    monkeypatch.setattr(sys, "argv", ["train_gen.py", "--tokenizer", __file__])
    gen = vars(train_gen.parse_args())
    assert vq | {"K": 4096, "d": 32, "T": 10, "schedule": "pow", "phi": 0.75, "weight": True, "bias": True,
                 "image_size": 256, "lr": 4e-5, "lr_final": 1.0, "batch": 128, "epochs": 10, "warmup": None,
                 "perceptual": 1.0, "gan": 0.75, "gan_start": 0, "flip": True} == vq
    assert gen | {"depth": 12, "lr": 4e-4, "lr_final": 0.1, "batch": 1024, "epochs": 250, "warmup": 1000, "ema": 0.9999,
                  "head": "linear", "patch": 1, "flip": True} == gen and GeneratorConfig().label_drop == 0.1


class Descent(torch.optim.SGD):
    def __init__(self, weights, lr, betas, fused):
        groups = [{"params": group["params"] if isinstance(group, dict) else [group]} for group in weights]
        super().__init__(groups, lr, fused=True)


def test_steps_with_perceptual_and_adversarial_loss_by_hand(training, tmp_path, monkeypatch, in_float32):
    """SGD moves both networks along Eq. (5)'s gradients, written out here; half an epoch (28 images) of warm-up."""
    seen, eta, kappa, losses = [], 0.6, 0.3, train_vq.tokenizer_losses
    def record(net, discriminator, lpips, real, eps, *args):
        seen.append((real, eps, *copy.deepcopy((net, discriminator))))
        return losses(net, discriminator, lpips, real, eps, *args)
    monkeypatch.setattr(train_vq, "tokenizer_losses", record)
    monkeypatch.setattr(torch.optim, "Adam", Descent)
    monkeypatch.setattr(rdpm, "pretrained", lambda *_: None)
    monkeypatch.setattr(rdpm, "LPIPS", lambda *_: nn.L1Loss())
    monkeypatch.setitem(rdpm.PRESETS["shapes"]["train_vq"], "warmup", None)
    script, flags = training("vq", "--gan", eta, "--perceptual", kappa, "--lr", 0.04, "--lr-final", 1, "--steps", 5)
    run(script, *flags, "--out", tmp_path)
    close(logged(tmp_path, "lr"), [0.01, 0.02, 0.03, 0.04, 0.04])
    (x, eps, tokenizer, discriminator), (_, _, *after) = seen[:2]
    x_rec, _, quantized = tokenizer(x, eps)
    nll, fooled = (x - x_rec).square().mean() + kappa * (x - x_rec).abs().mean(), -discriminator(x_rec).mean()
    norms = [torch.autograd.grad(loss, tokenizer.decoder.layers[-1].weight, retain_graph=True)[0].norm()
             for loss in (nll, fooled)]
    loss = nll + 0.25 * quantized.loss + eta * (norms[0] / (norms[1] + 1e-4)) * fooled
    real, fake = discriminator(x), discriminator(x_rec.detach())
    hinge = ((1 - real).clamp(min=0).mean() + (1 + fake).clamp(min=0).mean()) / 2
    for before, moved, its_loss in ((tokenizer, after[0], loss), (discriminator, after[1], hinge)):
        gradients = torch.autograd.grad(its_loss, list(before.parameters()))
        for (name, weight), new, gradient in zip(before.named_parameters(), moved.parameters(), gradients, strict=True):
            assert gradient.abs().max() > 0 or "bias" in name
            close((weight - new) / 0.01, gradient, 1e-4)
    close([logged(tmp_path, key)[0] for key in ("loss", "discriminator")], [loss.item(), hinge.item()], 1e-4)
    weight = train_vq.adaptive_weight((last := torch.ones(2, requires_grad=True)).sum(), (0 * last).sum(), last)
    assert weight == 1e4 and not weight.requires_grad


def test_clipped_steps_and_their_ema_by_hand(training, tmp_path, monkeypatch):
    """Gradients are clipped to norm 1; the decay is (1 + step) / (10 + step) at first; its weights draw the grid."""
    clip, draw, seen, drawn = torch.nn.utils.clip_grad_norm_, rdpm.sample, [], []
    def record(weights, norm):
        weights = list(weights)
        for weight in weights:
            weight.grad *= 1000
        seen.append([(weight.detach().clone(), weight.grad.clone()) for weight in weights])
        return clip(weights, norm)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", record)
    monkeypatch.setattr(torch.optim, "AdamW", Descent)
    monkeypatch.setattr(rdpm, "sample", lambda ema, *args: drawn.append(ema.head.bias.clone()) or draw(ema, *args))
    monkeypatch.setitem(rdpm.PRESETS["shapes"], "sampling", {"tau": 2.0, "skip": 4, "guidance_from": 5})  # of T = 10
    script, flags = training("gen", "--lr", 1, "--lr-final", 1, "--warmup", 0, "--steps", 3, "--ema", 0.2)
    run(script, *flags, "--out", tmp_path)
    parts, totals = state(tmp_path)["parts"], [sum(g.square().sum() for _, g in step).sqrt() for step in seen]
    model, _, _, sampling = rdpm.load_generator(tmp_path / "model.pt")
    for name, *steps in zip(dict(model.named_parameters()), *seen, strict=True):
        ema, news = steps[0][0], [weight for weight, _ in steps[1:]] + [parts["model"][name]]
        for (weight, gradient), total, new, decay in zip(steps, totals, news, (0.1, 2 / 11, 0.2), strict=True):
            close(new, weight - gradient / total)
            ema = decay * ema + (1 - decay) * new
        close(parts["ema"][name], ema)
    assert min(totals) > 10 and sampling == Sampling(tau=2.0, skip=1, guidance_from=2)  # T = 3
    assert torch.equal(drawn[0], parts["ema"]["head.bias"]) and not torch.equal(drawn[0], parts["model"]["head.bias"])


def test_generator_is_trained_with_the_noise_its_codes_came_from(training, folder, tmp_path, monkeypatch):
    """Eq. (6) gets eps_t and z'_{t-1} of each image's own t, which is uniform; a tenth have no class; Eq. (7)."""
    def recorded(owner, name):
        def call(self, *args):
            calls.append((*args, function(self, *args)))
            return calls[-1][-1]
        function, calls = getattr(owner, name), []
        monkeypatch.setattr(owner, name, call)
        return calls
    passes, inputs = recorded(RDPM, "forward"), recorded(rdpm.NoisyResidualQuantizer, "training_input")
    script, flags = training("gen", "--batch", 50, "--steps", 8, "--seed", 3, "--out", tmp_path, "--flip")
    run(script, *flags)
    tokenizer, ts, dropped = rdpm.load_tokenizer(folder / "vq/model.pt"), [], 0
    for step, (v, eps, t, (z_sum, codes)) in enumerate(inputs):
        seen_eps, seen_y, seen_t, seen_sum, (logits, _) = passes[step]
        assert torch.equal(eps, noise(tokenizer, 3, range(2**32 + 50 * step, 2**32 + 50 * step + 50)))
        assert torch.equal(seen_eps, torch.stack([eps[t[i] - 1, i] for i in range(50)]))
        assert torch.equal(seen_t, t) and torch.equal(seen_sum, z_sum) and v.shape == (50, 64, 4)
        p = logits.detach().double().softmax(-1).gather(2, codes[..., None])
        close(logged(tmp_path)[step], -p.log().mean(), 1e-4)
        right = (logits.argmax(-1) == codes).double().mean(1)
        for s, accuracy in enumerate(logged(tmp_path, "accuracy_t")[step], 1):
            assert accuracy is None if s not in t else accuracy == pytest.approx(right[t == s].mean().item(), abs=1e-5)
        ts += t.tolist()
        dropped += int((seen_y == CLASSES).sum())
    mirrored = torch.from_numpy(np.load(max(folder.glob("vq/latents-*.npy"), key=os.path.getsize))[28:]).float()
    assert 10 < sum((mirrored == x).all(2).all(1).any() for x in v) < 40
    counts = np.bincount(ts, minlength=4)
    assert len(inputs) == 8 and counts[0] == 0 and scipy.stats.chisquare(counts[1:]).pvalue > 1e-3
    assert scipy.stats.binomtest(dropped, 400, 0.1).pvalue > 1e-3


@pytest.mark.parametrize(("stage", "more", "number"), [
    ("vq", ["--gan", 0.75], signal.SIGTERM), ("vq", [], signal.SIGINT), ("gen", [], signal.SIGINT),
    ("gen", ["--head", "linear"], signal.SIGTERM)])
def test_interrupted_runs_continue_bit_for_bit(stage, more, number, training, tmp_path, monkeypatch, capsys):
    """Four steps; and two, a crash when state.pt is written and model.pt is not, a signal in the third: the same."""
    script, flags = training(stage, *more, "--steps", 4, "--save-every", 2)
    run(script, *flags, "--out", tmp_path / "a")
    flags, b = [*flags, "--out", tmp_path / "b", "--resume"], tmp_path / "b"
    replacing, rate = rdpm.replacing, rdpm.learning_rate
    def crash(path):
        if path.name == "model.pt":
            raise InterruptedError
        return replacing(path)
    def signalled(step, *args):
        if step == 2:
            signal.raise_signal(number)
        return rate(step, *args)
    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(rdpm, "replacing", crash)
        run(script, *flags)  # nothing there yet: begins
    assert state(b)["step"] == 2 and not (b / "model.pt").exists()
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="75"):
        patch.setattr(rdpm, "learning_rate", signalled)
        run(script, *flags)
    assert "saved after step 3; the same command with --resume" in capsys.readouterr().err
    assert state(b)["step"] == records(b)[-1]["step"] == 3
    assert signal.getsignal(number) == {signal.SIGINT: signal.SIG_DFL, signal.SIGTERM: signal.SIG_IGN}[number]
    run(script, *flags)
    assert state(b)["step"] == 4 and same(state(tmp_path / "a")["parts"], state(b)["parts"])
    assert logged(tmp_path / "a") == logged(b)
    for other in (["--T", 4] if stage == "vq" else ["--depth", 2], ["--seed", 1], ["--batch", 2], ["--flip"]):
        with pytest.raises(UserError, match="was trained with"):
            run(script, *flags, *other)
    (grid := b / "grid-000004.png").unlink()
    for _ in range(2):
        capsys.readouterr()
        run(script, *flags)
        assert "finished: " in capsys.readouterr().out and grid.exists()
    assert same(state(tmp_path / "a")["parts"], state(b)["parts"])


@pytest.mark.parametrize(("stage", "own"), [("vq", True), ("gen", True), ("gen", False)])
def test_steps_that_are_not_finite_are_skipped(stage, own, training, tmp_path, monkeypatch):
    """NaN in the noise: as if there had been no step. own: optimizers look at found_inf by themselves (MPS' don't)."""
    script, flags = training(stage, "--lr-final", 1, "--warmup", 0, "--save-every", 1, "--steps", 3, "--log-every", 2,
                             *(["--gan", 0.75] if stage == "vq" else []))
    draw, states, bad = Tokenizer.noise, [], [1]
    def damaged(self, streams):
        eps = draw(self, streams)
        return eps.index_fill(1, torch.tensor([0]), math.nan) if len(states) in bad else eps
    monkeypatch.setattr(Tokenizer, "noise", damaged)
    monkeypatch.setattr(rdpm, "save_run", lambda out, state, model: states.append(
        copy.deepcopy({name: part for name, part in state["parts"].items() if name != "ema"})))
    if not own:
        monkeypatch.setattr(rdpm, "SKIPS_BY_ITSELF", ())
        step = torch.optim.AdamW.step
        monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: (self.__dict__.pop("found_inf"), step(self)))
    run(script, *flags, "--out", tmp_path / "a")
    assert same(states[0], states[1]) and not any(same(states[1][name], states[2][name]) for name in states[0])
    assert logged(tmp_path / "a", "skipped_steps") == [1, 0]
    bad += range(3, 9)  # the first of two more runs
    for every in (2, 1):
        with pytest.raises(UserError, match="no step after 0 had a finite loss and gradient"):
            run(script, *flags, "--out", tmp_path / f"{every}", "--log-every", every)


def as_rank(rank: str, port: str, command: list[str], out: Path) -> None:
    """`python *command` as one of two ranks, in a new process, with stdout and stderr in files."""
    for kind, stream in (("stdout", 1), ("stderr", 2)):
        os.dup2(os.open(out / (rank + kind), os.O_CREAT | os.O_TRUNC | os.O_WRONLY), stream)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "RANK": rank, "LOCAL_RANK": rank}
    rdpm.RANK, rdpm.WORLD_SIZE = int(rank), 2
    for name in ("fid", "sample", "train_vq", "train_gen"):
        sys.modules.pop(name, None)
    os.chdir(HERE)
    sys.argv[:] = command
    runpy.run_path(command[0], run_name="__main__")


@pytest.fixture
def on_two_ranks(tmp_path):
    """What torchrun, which hides exit codes, starts; forked from a process that has imported PyTorch, for speed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    def start(*command, codes=(0, 0)) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        ranks = [context.Process(target=as_rank, args=(rank, port, list(map(str, command)), tmp_path)) for rank in "01"]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join(100)
            rank.kill()  # if it hangs, or pytest would wait for it
        said = [(tmp_path / f"{rank}stderr").read_text() for rank in "01"]
        assert [rank.exitcode for rank in ranks] == list(codes), said
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
def test_parts_and_two_ranks_train_as_one(stage, training, on_two_ranks, tmp_path, in_float32):
    """Batches of six in one part; in four; and in two on each of two ranks, once through torchrun."""
    (driver := tmp_path / "driver.py").write_text(DRIVER)
    script, flags = training(stage, "--steps", 20, "--batch", 6)
    run(script, *flags, "--out", tmp_path / "one")
    run(script, *flags, "--out", tmp_path / "four", "--accum", 4)
    command = [*flags, "--accum", 2, "--out"]
    if stage == "vq":
        on_two_ranks(driver, script.__name__, "none", *command, tmp_path / "two")
    else:
        shell("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", driver, script.__name__, "none",
              *command, tmp_path / "two")
    assert records(tmp_path / "two")[0]["world"] == 2
    for name, key in itertools.product(("four", "two"), ("loss", "grad_norm", "psnr")):
        close(logged(tmp_path / name, key), logged(tmp_path / "one", key), 1e-5 if key == "loss" else 1e-3)
    if stage == "gen":  # one of two ranks hears a signal: both stop after the same log line, and then go on
        command.append(tmp_path / "stopped")
        on_two_ranks(driver, script.__name__, "signal", *command, "--log-every", 5, codes=(75, 75))
        assert "saved after step 10" in (tmp_path / "0stderr").read_text()
        on_two_ranks(driver, script.__name__, "none", *command, "--resume")
        assert same(state(tmp_path / "stopped")["parts"], state(tmp_path / "two")["parts"])


def test_two_ranks_sample_as_one(shapes, on_two_ranks, tmp_path):
    flags = ["--ckpt", shapes / "gen/model.pt", "--num", 7, "--batch", 2, "--device", "cpu"]
    run(sample, *flags, "--npz", tmp_path / "1.npz", "--out", tmp_path / "1.png")
    on_two_ranks("sample.py", *flags, "--npz", tmp_path / "2.npz", "--out", tmp_path / "2.png")
    assert not (tmp_path / "1stdout").read_text() and not list(tmp_path.glob("*part*"))
    for name in ("arr_0", "arr_1"):
        assert np.array_equal(*(np.load(tmp_path / file)[name] for file in ("1.npz", "2.npz")))
    assert np.array_equal(*(Image.open(tmp_path / file) for file in ("1.png", "2.png")))


@pytest.fixture
def draw(shapes, tmp_path):
    """sample.py on the codebook-head checkpoint: runs it, and returns the images of its picture, (N, 32, 32, 3)."""
    def draw(*flags, ckpt=shapes / "gen/model.pt"):
        # One image a batch: bf16 products of another batch size may differ in their last bit.
        run(sample, "--ckpt", ckpt, "--device", "cpu", "--seed", 5, "--out", tmp_path / "a.png", "--batch", 1, *flags)
        grid = np.array(Image.open(tmp_path / "a.png").convert("RGB"))[::3, ::3]
        if len(grid) == 32:  # a single image has no frame
            return grid[None]
        corners = itertools.product(range(1, len(grid), 33), range(1, grid.shape[1], 33))
        return np.stack([grid[row:row + 32, column:column + 32] for row, column in corners])
    return draw


def test_sampling_writes_picture_npz_and_folder(shapes, tmp_path):
    arrays = np.load(shapes / "a.npz")
    assert arrays["arr_0"].shape == (13, 32, 32, 3) and arrays["arr_0"].dtype == np.uint8
    assert arrays["arr_1"].tolist() == [*range(10), 0, 1, 2]
    assert Image.open(shapes / "a.png").size == (10 * 33 * 3 + 3, 2 * 33 * 3 + 3)
    model, tokenizer, _, defaults = rdpm.load_generator(shapes / "gen/model.pt")
    assert defaults == Sampling()
    for gumbel, flag in ((True, "--gumbel"), (False, "--no-gumbel")):
        run(sample, "--ckpt", shapes / "gen/model.pt", "--num", 4, "--device", "cpu", "--classes", "ring", 3,
            "--tau", 2, "--seed", 5, "--guidance", 3, "--guidance-schedule", "constant", flag,
            "--npz", tmp_path / "a.npz", "--out", tmp_path / "images")
        settings, arrays = Sampling(3.0, "constant", tau=2.0, gumbel=gumbel), dict(np.load(tmp_path / "a.npz"))
        with rdpm.autocast(torch.device("cpu")):
            images = rdpm.sample(model, tokenizer, torch.tensor([6, 3, 6, 3]), 5, range(4), settings)
        assert np.array_equal(arrays["arr_0"], rdpm.to_uint8(images).permute(0, 2, 3, 1).numpy())
        assert arrays["arr_1"].tolist() == [6, 3, 6, 3]
        for i, image in enumerate(arrays["arr_0"]):
            assert np.array_equal(np.array(Image.open(tmp_path / f"images/{i:06d}.png")), image)


def test_layout_goes_from_samples_to_the_reconstruction_and_edit_redraws_the_mask(draw, shapes, tmp_path):
    rdpm.Shapes(32, train=True)[8][0].save(ref := tmp_path / "ref.png")
    mask, original = np.zeros((32, 32), np.uint8), np.array(Image.open(ref))
    plain = [draw("--num", 1, "--classes", name)[0] for name in ("ring", "disc")]
    _, tokenizer, _, _ = rdpm.load_generator(shapes / "gen/model.pt")
    with rdpm.autocast(torch.device("cpu")), torch.no_grad():
        x = rdpm.to_float(torch.from_numpy(original).permute(2, 0, 1)[None])
        reconstruction = rdpm.to_uint8(tokenizer(x, noise(tokenizer, 5, [0]))[0])[0].permute(1, 2, 0).numpy()
    cells = draw("--layout", ref, "--layout-steps", 0, 2, 3, "--classes", "ring", "disc").reshape(3, 3, 32, 32, 3)
    # bfloat16 rounds otherwise in another batch: nearly all pixels are equal.
    assert (cells[:, 0] == original).all() and (cells[0, 1:] == plain).mean() > 0.9
    assert (cells[2, 1:] == reconstruction).mean() > 0.9 and (cells[1, 1:] == reconstruction).mean() < 0.5
    mask[9:17, 3:30] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    inside, flags = mask > 0, ("--mask", tmp_path / "mask.png", "--num", 2)
    nobody, ring = (draw("--edit", ref, *flags, *more) for more in ((), ("--classes", "ring")))
    for cells in (nobody, ring):
        assert np.array_equal(cells[0], original) and (cells[1][inside] == 128).all()
        assert all(np.array_equal(image[~inside], original[~inside]) for image in cells[1:])
        assert not np.array_equal(cells[2], cells[3])
    assert not np.array_equal(nobody, ring)


def test_strips_end_with_the_sample(draw, folder):
    plain = draw("--num", 2)
    strip = draw("--num", 2, "--show-steps").reshape(2, 2, 3, 32, 32, 3)  # image, raw or preview, t
    assert np.array_equal(strip[:, 0, -1], plain) and np.array_equal(strip[:, 1, -1], plain)
    assert not np.array_equal(strip[:, 0, 0], strip[:, 1, 0])
    linear = {"ckpt": folder / "gen/model.pt"}  # has no previews
    assert np.array_equal(draw("--num", 2, "--show-steps", **linear)[2::3], draw("--num", 2, **linear))


@pytest.fixture
def failing(capfd, monkeypatch, tmp_path):
    def failing(script, *flags) -> str:
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            rdpm.run_main(lambda: run(script, *flags))
        assert stop.value.code == 2
        *before, line = capfd.readouterr().err.splitlines()
        assert "error: " in line and "Traceback" not in "".join(before)
        return line
    monkeypatch.chdir(tmp_path)
    return failing


@pytest.fixture(scope="module")
def pictures(folder, shapes, tmp_path_factory) -> Path:
    """Sets of images, and what people give by mistake or by malice, beside a good vq.pt and gen.pt."""
    root = tmp_path_factory.mktemp("pictures")
    def write(name, images, ending="png", **how):
        (root / name).mkdir(parents=True)
        for i, image in enumerate(images):
            Image.fromarray(image).save(root / name / f"{i:06}.{ending}", **how)
    class Hostile:
        def __reduce__(self):
            return open, (str(root / "appeared"), "w")
    for name, target in (("data", folder), ("vq.pt", folder / "vq/model.pt"), ("gen.pt", shapes / "gen/model.pt")):
        (root / name).symlink_to(target / "data" if name == "data" else target)
    for name, share in (("empty", 0.0), ("half", 0.5)):
        (root / f"{name}.pt").write_bytes((whole := (root / "vq.pt").read_bytes())[:int(share * len(whole))])
    for name, weight, size in (("vq", "quantizer.codebook", "K"), ("gen", "embed.weight", "depth")):
        contents = torch.load(root / f"{name}.pt", weights_only=True)
        contents["config"][size] += 1
        torch.save(contents, root / f"misfit-{name}.pt")
        contents["config"][size] -= 1
        contents["model"][weight][0, 0] = math.nan if name == "vq" else math.inf
        torch.save(contents, root / f"nan-{name}.pt")
    torch.save({"kind": "generator", "config": Hostile()}, root / "hostile.pt")
    (root / "raw.pt").write_bytes(pickle.dumps({"kind": "tokenizer", "config": Hostile()}, protocol=2))
    torch.save([1, 2], root / "list.pt")
    for name in ("empty", "torn/class"):
        (root / name).mkdir(parents=True)
    for i in range(40):
        (root / f"torn/class/{i}.png").write_bytes(b"not an image")
    for name, colour in (("black.png", 0), ("white.png", 255)):
        Image.new("L", (32, 32), colour).save(root / name)
    Image.fromarray(np.ones((9, 9), np.float32)).save(root / "float.tiff")
    x = bytes_of(9, 32, 32, 3).numpy()
    colour = np.array([90, 40, 10], np.uint8) + bytes_of(9, 32, 32, 3, seed=2).numpy() // 8
    for name, images in {
            "good": x, "rgb": colour, "bgr": colour[..., ::-1], "larger": bytes_of(9, 48, 60, 3, seed=1).numpy(),
            "mixed": [*x[:4], x[4, :20]], "rgba": np.concatenate([x, x[..., :1]], axis=3), "gap": x, "few/class": x,
            "tree/train/a": x[:5], "tree/train/b": x[5:], "one/arrow": [*x, *x, *x]}.items():
        write(name, images)
    write("tree/test/a", x[::2], "jpg")
    write("tree/test/b", colour, "jpg")
    write("renamed", x, format="JPEG")
    (root / "gap/000003.png").unlink()
    for name, array in {"good": x, "single": x[:1], "wide": x.repeat(2, 2), "float": x / np.float32(127.5) - 1,
                        "objects": np.array([1, "a"], object)}.items():
        np.savez(root / f"{name}.npz", arr_0=array)
    np.savez_compressed(root / "compressed.npz", arr_0=x)
    mu, sigma, weights = np.zeros(2048), np.eye(2048), "random-test"
    np.savez(root / "statistics.npz", mu=mu, sigma=sigma, weights=weights)
    np.savez(root / "adm.npz", mu=mu, sigma=sigma)
    np.savez(root / "nan.npz", mu=mu * np.nan, sigma=sigma, weights=weights)
    return root


BAD_INPUT = {
    "train_vq --data nowhere": "--data nowhere: no such folder; give one with",
    "train_vq --data empty": "empty: no image in it; give each class a folder",
    "train_vq --data few": "--data few: 9 images; give at least 20", "train_vq --lr nan": "--lr: nan is not above 0",
    "train_vq --data torn --workers 1": r"torn/\w+/\d+.png: not a readable image .*; repair or remove it",
    "train_vq --seed -1": "argument --seed: -1 is not from 0 up", "train_vq --K a": "--K: invalid number value: 'a'",
    "train_vq --phi 2": "--phi 2.0: must be at most 1", "train_vq --K 9000000 --dim 100000": "allocate memory",
    "train_vq --image-size 30": "--image-size 30: must be a multiple of 4", "train_vq --image-size 4": "at least 8",
    "train_vq --image-size 16 --gan 1": "--image-size 16: PatchGAN needs at least 24",
    "train_vq --K 1000000000": "argument --K: 1000000000 is not above 0, and below 10000000",
    "train_vq --accum 5 --data data": "--batch 4: must give each of 1 devices as many, --accum or more",
    "train_gen --data data --tokenizer vq.pt --patch 3": "--patch 3: does not divide the tokenizer's 8 x 8 tokens",
    "train_gen --data data": "--tokenizer runs/shapes-vq/model.pt: no such file; python train_vq.py",
    "train_gen --data data --tokenizer vq.pt --fid-ref no.npz --fid-num 9": "--fid-num 9: N = 9",
    **{f"train_gen --tokenizer {file}.pt": f"{file}.pt: {message}" for file, message in {
        "gen": "holds a generator, not a tokenizer", "misfit-vq": "the Tokenizer's weights do not fit its config",
        **dict.fromkeys(["raw", "empty", "half"], "cannot be read as a checkpoint"),
        "nan-vq": "there is NaN or infinity among the Tokenizer's"}.items()},
    **{f"sample --ckpt {file}.pt": f"{file}.pt: {message}" for file, message in {
        "no": "cannot be read as a checkpoint .FileNotFound", "list": "holds something else, not a generator",
        "hostile": "cannot be read", "misfit-gen": "the RDPM's weights do not fit", "nan-gen": "there is NaN"}.items()},
    **{f"sample --ckpt gen.pt {flags}": message for flags, message in {
        "--classes 10": "class 10: not a class of this checkpoint; it has arrow, bar", "--classes=-1": "class -1: not",
        "--out a.txt": "a.txt: must end in .*.png", "--out no/a.png": "no/a.png: .* folder that can be written into",
        "--edit white.png --mask black.png": "--mask black.png: must be as large as white.png, white to",
        "--edit white.png": "--edit needs --mask",
        "--layout white.png --layout-steps 0 4": "--layout-steps 0 4: each must be 0 ... 3",
        "--skip 2 --guidance-to 2": "--guidance 1.5: --skip, .* leave it no", "--fast --skip 1": "--fast sets --skip",
        "--edit float.tiff --mask white.png": "float.tiff: not a readable image .mode F, of which black and"}.items()},
    **{f"fid good {samples} --allow-small": message for samples, message in {
        "single.npz": r"single.npz: N = 1, but 2048 features need as many images \(4, ",
        "mixed": r"000004.png: \(3, 20, 32\), not \(3, 32, 32\); .*--size N",
        "larger": r"larger: \(3, 48, 60\), not \(3, 32, 32\); .*--size N",
        "float.npz": r"float.npz: arr_0 is float32 \(9, 32, 32, 3\), but must be uint8 RGB",
        "objects.npz": r"objects.npz: not a readable .npz \(Object arrays",
        "rgba": "000000.png: is PNG of mode RGBA, but samples must be uint8 RGB PNGs", "renamed": "is JPEG of mode RGB",
        "gap": "gap: images are missing or there twice, first number 3;", "shapes": "shapes: give the size .*--size N",
        "statistics.npz": r"arr_0 is float64 \(0,\), but", "nowhere": "no such file, or no images in it"}.items()},
    "fid --ref good --ckpt gen.pt --num 9": "--num 9: N = 9, .*--allow-small",
    "fid --ref wide.npz --ckpt gen.pt --num 9 --allow-small": r"samples: \(3, 32, 32\), not \(3, 32, 64\);",
    "fid nan.npz good --allow-small": "nan.npz: mean and covariance must be finite",
    "fid adm.npz good --allow-small": "adm.npz: of the network 6726825d, not random-t; use --make-ref",
    "fid good": "give two sets", "fid good good --ckpt gen.pt": "give two sets",
    "fid --tokenizer vq.pt --data tree --ref good": "give two sets .* rFID compares with their own reconstructions",
    "fid --make-ref good": "--out fid.json: must end in .npz .* a folder that can be written into",
}


@pytest.mark.parametrize(("command", "message"), BAD_INPUT.items())
def test_bad_input_gets_one_line(command, message, pictures, inception, failing, monkeypatch):
    early = "give two" in message or "must end" in message
    monkeypatch.setattr(fid, "load_inception", lambda *_: pytest.fail("work began") if early else inception)
    monkeypatch.chdir(pictures)
    before = set(pictures.rglob("*"))
    script, *flags = command.split()
    common = {"train_vq": VQ, "train_gen": GEN}.get(script, ["--device", "cpu"])
    line = failing(globals()[script], *common, *flags)
    assert re.search(message, line), line
    assert not [file for file in set(pictures.rglob("*")) - before if file.is_file() and file.name != "log.jsonl"]


def test_what_imagenet_holds_is_read(tmp_path):
    colour = Image.fromarray(np.linspace(0, 255, 48 * 32 * 3).astype(np.uint8).reshape(32, 48, 3))
    grey = np.array(colour.convert("L"))
    deep, exif = Image.fromarray(grey.astype(np.uint16) * 257), Image.Exif()
    (data := tmp_path / "train/class").mkdir(parents=True)
    for mode, kind in {"CMYK": "jpg", "L": "JPEG", "P": "png", "RGBA": "png", "I;16": "png", "1": "png"}.items():
        image, path = deep if mode == "I;16" else colour.convert(mode), data / f"{mode[:2]}.{kind}"
        image.save(path, format="PNG" if kind == "JPEG" else None, quality=100)
        expected = {"CMYK": colour, "I;16": colour.convert("L")}.get(mode, image).convert("RGB")
        read = rdpm.read_image(path)
        assert read.mode == "RGB" and np.abs(np.array(read, int) - np.array(expected, int)).max() <= 6, mode
    exif[0x0112] = 6  # the camera was turned: rotate by 270 degrees to see it upright
    colour.transpose(Image.Transpose.ROTATE_90).save(data / "turned.jpg", exif=exif, quality=100)
    assert np.abs(np.array(rdpm.read_image(data / "turned.jpg"), int) - np.array(colour, int)).mean() < 3
    reference = fid.open_images(str(data), False, None, False, True)  # fid.py reads as training does
    for path, (x,) in zip(sorted(data.iterdir()), reference, strict=True):
        assert np.array_equal(x.permute(1, 2, 0), rdpm.read_image(path))
    for name, size in (("small", (75, 75)), ("wide", (5000, 30))):
        colour.resize(size).save(data / f"{name}.jpg")
    shutil.copytree(data, tmp_path / "val/class")
    (data / "loop").symlink_to(data)
    for hidden in (data / ".thumbnails", tmp_path / "train/.cache"):
        hidden.mkdir()
        colour.save(hidden / "1.png")
    images = rdpm.load_data(str(tmp_path), 256, train=True)
    assert images.classes == ["class"] and [images[i][0].shape for i in range(len(images))] == [(3, 256, 256)] * 9


def test_a_second_run_in_the_same_folder_is_refused(training, tmp_path, failing, folder):
    code = """if True:
        import argparse, pathlib, sys, time, rdpm
        log = rdpm.Log(argparse.Namespace(out=pathlib.Path(sys.argv[1]), batch=4, accum=1, resume=True))
        print("locked", flush=True), time.sleep(100)"""
    first = subprocess.Popen([sys.executable, "-c", code, tmp_path / "a"], cwd=HERE, stdout=subprocess.PIPE)
    assert first.stdout.readline() == b"locked\n"
    for stage in ("vq", "gen"):
        script, flags = training(stage)
        line = failing(script, *flags, "--out", tmp_path / "a", "--resume")
        assert f"--out {tmp_path / 'a'}: another run is writing there" in line
        before = {file: file.read_bytes() for file in (folder / stage).iterdir()}
        assert f"--out {folder / stage} already holds a run" in failing(script, *flags, "--out", folder / stage)
        assert {file: file.read_bytes() for file in (folder / stage).iterdir()} == before
    first.kill()
    first.wait()


def test_a_full_disk_a_dead_worker_and_no_network(failing, monkeypatch, tmp_path):
    def no_network(*_, **__):
        raise urllib.error.URLError("no route")
    for text in ("first", "before"):
        with rdpm.replacing(path := tmp_path / "a.pt") as part:
            part.write_text(text)
    message = "a.pt: cannot be written .*No space.*; what was there is untouched"
    with pytest.raises(UserError, match=message), rdpm.replacing(path) as part:
        part.write_text("half of it")
        raise OSError(28, "No space left on device")
    assert [file.read_text() for file in tmp_path.iterdir()] == ["before"]
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    file, flags = tmp_path / "hub/checkpoints/397923af-vgg16-397923af.pth", [*VQ, "--perceptual", 1]
    line = failing(train_vq, *flags)
    assert f"cannot download {rdpm.VGG16[0]}" in line and f"put the file at {file}" in line
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(b"not these weights")
    assert f"{file}: its sha256 is not 397923af; remove it" in failing(train_vq, *flags)
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", no_network)
    assert "--data cifar10: cannot be downloaded into data/" in failing(train_vq, *VQ, "--data", "cifar10")
    draw = rdpm.Shapes.__getitem__
    monkeypatch.setattr(rdpm.Shapes, "__getitem__", lambda self, i: os._exit(1) if i % 20 == 3 else draw(self, i))
    assert "DataLoader worker" in failing(train_vq, *VQ, "--workers", 1, "--steps", 99)


def test_names_in_the_readmes_paper_and_code_table_exist():
    section = re.search(r"^#+ Paper and code\n(.*?)(?=^#+ |\Z)", (HERE / "README.md").read_text(), re.M | re.S)
    _, _, *rows = [line for line in section[1].splitlines() if line.startswith("|")]
    names = [re.findall(r"`([^`]+)`", row.split("|")[2]) for row in rows]
    assert len(rows) >= 15 and all(names)
    assert all((HERE / name).is_file() or operator.attrgetter(name)(rdpm) is not None for name in sum(names, []))


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


def bytes_of(*shape, seed=0):
    return torch.from_numpy(np.random.RandomState(seed).randint(0, 256, shape, np.uint8))


def near(x, y, tolerance=1e-4):
    assert (x - y).abs().max() <= tolerance * y.abs().max(), (x - y).abs().max() / y.abs().max()


def test_inception_equals_torch_fidelity(inception, monkeypatch):
    module, seen = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3"), []
    monkeypatch.setattr(module, "load_state_dict_from_url", lambda *args, **kwargs: inception.net.state_dict())
    theirs, x = module.FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"]), bytes_of(2, 3, 40, 32)
    theirs.Mixed_6d.branch1x1.register_forward_hook(lambda m, i, o: seen.append(o))
    pool, spatial, logits = inception(x)
    for ours, other in zip((pool, logits), theirs(x), strict=True):
        near(ours, other)
    assert spatial.shape == (2, 2023)
    near(spatial, torch.tensor([[seen[0][b, c, h, w] for h in range(17) for w in range(17) for c in range(7)]
                                for b in range(2)]))


def test_inception_equals_pytorch_fid_also_under_autocast(inception, monkeypatch):
    module, x = pytest.importorskip("pytorch_fid.inception"), bytes_of(2, 3, 299, 299)  # at 299 neither resizes
    monkeypatch.setattr(module, "load_state_dict_from_url", lambda *args, **kwargs: inception.net.state_dict())
    theirs = module.InceptionV3(resize_input=False).eval()((x.float() - 128) / 256 + 0.5)[0].flatten(1)
    with torch.autocast("cpu", torch.bfloat16):
        pool, spatial, logits = inception(x)
    near(pool, theirs)
    assert pool.dtype == spatial.dtype == logits.dtype == torch.float32
    first = inception.net.state_dict()["Conv2d_1a_3x3.conv.weight"].flatten()[:3]
    near(first, torch.tensor([1.764052, 0.400157, 0.978738]) * (2 / 27) ** 0.5, 1e-5)  # RandomState(0), forever


@pytest.mark.parametrize("height, width", [(28, 28), (40, 26), (256, 299), (640, 333)])
def test_resize_is_tensorflows(height, width):
    module = pytest.importorskip("torch_fidelity.interpolate_compat_tensorflow")
    x = bytes_of(1, 3, height, width).float()
    ours = fid.resize_matrix(height) @ x @ fid.resize_matrix(width).T
    theirs = module.interpolate_bilinear_2d_like_tensorflow1x(x, (299, 299), align_corners=False)
    assert (ours - theirs).abs().max() < 1e-3 and (fid.resize_matrix(height) != 0).sum(1).max() <= 2


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
    assert abs(fid.frechet_distance(*stats[:2], *stats[:2])) < 1e-5 * np.trace(stats[1])


def features(n, seed=0):
    rng = np.random.RandomState(seed)
    pool, spatial, logits = (torch.from_numpy(rng.gamma(1, 1, (n, d))).float() for d in (2048, 2023, 1008))
    return bytes_of(n, 3, 8, 8, seed=seed), pool, spatial, logits


def streamed(data, batch, keep=0):
    images, *answers = data
    coming = iter(parts := torch.arange(len(images)).split(batch)[::-1])
    def given(_):
        numbers = next(coming)
        return [x[numbers] for x in answers]
    given.device = torch.device("cpu")
    return fid.measure(((part.tolist(), images[part]) for part in parts), len(images), given, keep)


def moments(x):
    return x.double().numpy().mean(0), np.cov(x.double().numpy(), rowvar=False)


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
    module, rng = pytest.importorskip("torch_fidelity.metric_prc"), np.random.RandomState(0)
    reference = torch.from_numpy(rng.standard_normal((130, 16))).float()
    samples = torch.from_numpy(0.7 * rng.standard_normal((90, 16)) + 0.2).float()
    theirs = module.prc_features_to_metric(samples, reference, prc_neighborhood=3, prc_batch_size=1000,
                                           save_cpu_ram=False, verbose=False)
    precision, recall = fid.precision_recall(reference=reference, samples=samples, tile=37)
    assert (precision, recall) == pytest.approx((theirs["precision"], theirs["recall"]), abs=1e-7)


def test_psnr_and_ssim_equal_scikit_image():
    metrics, x = pytest.importorskip("skimage.metrics"), bytes_of(4, 3, 33, 40)
    x[1] = 250 + x[1] // 50                                       # bright and flat: where rounding would show
    x[2] = torch.arange(40)[None, None] * 6
    y = (x.int() + bytes_of(4, 3, 33, 40, seed=1) // 16 - 8).clamp(0, 255).byte()
    x[3], y[3] = 65, 255                                          # flat: nothing but the means
    for i in range(4):
        a, b = (z[i].permute(1, 2, 0).numpy() for z in (x, y))
        assert fid.psnr(x, y)[i].item() == pytest.approx(metrics.peak_signal_noise_ratio(a, b), abs=1e-5)
        assert fid.ssim(x, y)[i].item() == pytest.approx(metrics.structural_similarity(a, b, channel_axis=2), abs=1e-5)
    assert fid.ssim(x, x).tolist() == [1] * 4


@pytest.fixture
def run_fid(pictures, inception, monkeypatch, capsys, tmp_path):
    def run_fid(flags, out="fid.json"):
        run(fid, *flags.split(), "--allow-small", "--out", tmp_path / out)
        return capsys.readouterr().out, json.loads((tmp_path / out).read_text()) if out.endswith(".json") else {}
    monkeypatch.setattr(fid, "load_inception", lambda *args: inception)
    monkeypatch.chdir(pictures)
    return run_fid


def test_reference_file(run_fid, pictures, tmp_path):
    assert "N = 9" in run_fid("--make-ref tree --size 32", out="ref.npz")[0]
    with np.load(tmp_path / "ref.npz") as file:
        assert {name: file[name].shape for name in ("mu", "sigma", "mu_s", "sigma_s", "arr_0")} == {
            "mu": (2048,), "sigma": (2048, 2048), "mu_s": (2023,), "sigma_s": (2023, 2023), "arr_0": (9, 32, 32, 3)}
        assert (file["arr_0"] == np.load(pictures / "good.npz")["arr_0"]).all()
    said, direct = run_fid("good rgb")
    _, report = run_fid(f"{tmp_path}/ref.npz rgb")
    assert report["values"] == pytest.approx(direct["values"], rel=1e-6) and None not in report["values"].values()
    assert report["weights"] == "random-test" and "fid.py" in report["command"] and report["versions"]["torch"]
    assert direct["values"]["FD-random-9"] > 0 and "BGR" not in said
    assert "BGR" in run_fid("--ref rgb --samples bgr")[0]  # their channel means say so
    for name in ("larger", "good.npz"):
        assert "N = 9" in run_fid(f"--make-ref {name} --size 32", out=f"{name[:4]}.npz")[0]
    assert np.array_equal(*(np.load(tmp_path / f"{name}.npz")["sigma"] for name in ("good", "ref")))
    assert len(fid.open_images("tree", True, 32, False, True)) == 14  # samples: the held-out split
    out, report = run_fid("statistics.npz compressed.npz")
    assert report["values"].pop("FD-random-9") > 0 and report["N"] == 9 and "FID" not in out
    assert report["values"] == {"sFD-random-9": None, "precision-random": None, "recall-random": None}
    assert re.search(r"(?s)sFD-random-9 unavailable: .* mu_s.*precision, recall unavailable: .* statistics only", out)


def test_generator_equals_its_samples(run_fid, pictures, tmp_path):
    _, report = run_fid("--ref rgb --ckpt gen.pt --num 9 --seed 5 --tau 2 --fast")
    model, tokenizer, *_ = rdpm.load_generator(pictures / "gen.pt")
    sampling = asdict(Sampling((0.75 + 1.5) / 2, "constant", 2, 3, 2.0, True, 1, 1.0))  # T = 3
    assert report["sampling"] == sampling and report["seed"] == 5
    with rdpm.autocast(torch.device("cpu")):
        x = rdpm.sample(model, tokenizer, torch.arange(9), 5, list(range(9)), rdpm.Sampling(**sampling))
    assert len(x.unique(dim=0)) == 9
    np.savez(tmp_path / "samples.npz", arr_0=rdpm.to_uint8(x).permute(0, 2, 3, 1).numpy())
    _, written = run_fid(f"rgb {tmp_path}/samples.npz")
    assert report["values"] == pytest.approx(written["values"], rel=1e-9)


def test_tokenizer(run_fid, pictures, inception, monkeypatch):
    values = run_fid("--tokenizer vq.pt --data tree --seed 3")[1]["values"]
    tokenizer, data = rdpm.load_tokenizer(pictures / "vq.pt"), rdpm.load_data(str(pictures / "tree"), 32, train=False)
    originals, reconstructions, errors, codes = torch.stack([data[i][0] for i in range(14)]), [], [], [[], [], []]
    for i, x in enumerate(originals):
        with torch.inference_mode():
            x_rec, v, quantized = tokenizer(x[None] / 127.5 - 1, noise(tokenizer, 3, [i]))
        reconstructions.append(rdpm.to_uint8(x_rec)[0])
        errors.append(((v - quantized.z_sum) ** 2).mean().item())
        for used, now in zip(codes, quantized.codes, strict=True):
            used += now.flatten().tolist()
    both = originals, torch.stack(reconstructions)
    for name in ("psnr", "ssim"):
        assert values[name] == pytest.approx(getattr(fid, name)(*both).mean().item(), abs=1e-4)
    assert values["latent_error"] == pytest.approx(np.mean(errors), rel=1e-4)
    assert values["usage"] == len(set(sum(codes, []))) / 32
    assert values["usage_t"] == [len(set(used)) / 32 for used in codes]
    shares = [np.bincount(used, minlength=32) / len(used) for used in codes]
    assert values["perplexity_t"] == pytest.approx([np.prod(p ** -p) for p in shares])
    by_hand = fid.frechet_distance(*moments(inception(both[0])[0]), *moments(inception(both[1])[0]))
    assert values["rFD-random-14"] == pytest.approx(by_hand, rel=1e-3)
    without = fid.evaluate_tokenizer(tokenizer, data, torch.device("cpu"), 3)  # as train_vq.py calls it
    assert without == {name: value for name, value in values.items() if name != "rFD-random-14"}
    labels = []  # --num covers all classes
    monkeypatch.setattr(fid, "evaluate_tokenizer", lambda _, data, *args: labels.extend(y for _, y in data) or {})
    assert run_fid("--tokenizer vq.pt --data tree --num 8")[1]["N"] == 8
    assert sorted(labels) == [0] * 4 + [1] * 4                   # of 5 and 9


def test_streamed_moments_and_comparison_by_hand(inception, monkeypatch):
    monkeypatch.setattr(fid, "SHA256", inception.weights)
    (images, pool, *others), y = features(40, 1), features(30, 2)
    x = images, pool * 0.9, *others
    s, reference = streamed(x, 16, keep=40), streamed(y, 16, keep=30)
    for i, pair in ((1, s.pool), (2, s.spatial)):
        for ours, by_hand in zip(pair, moments(x[i]), strict=True):
            np.testing.assert_allclose(ours, by_hand, rtol=1e-12, atol=1e-11)
    np.testing.assert_allclose(s.means, images.double().mean((0, 2, 3)).numpy())
    assert torch.equal(streamed(x, 16, keep=20).kept, x[1][np.random.RandomState(2020).permutation(40)[:20]])
    values = fid.compare(s, reference, inception)["values"]
    assert list(values) == ["FID-40", "sFID-40", "IS", "precision", "recall"]
    for name, i in (("FID-40", 1), ("sFID-40", 2)):
        assert values[name] == pytest.approx(fid.frechet_distance(*moments(x[i]), *moments(y[i])), rel=1e-6)
    both = fid.precision_recall(reference=y[1], samples=x[1])
    assert values["IS"] == s.score and (values["precision"], values["recall"]) == both and both[0] != both[1]


def test_training_logs_the_fid_of_the_ema_weights(training, folder, inception, monkeypatch, tmp_path):
    np.savez(tmp_path / "ref.npz", mu=np.zeros(2048), sigma=np.eye(2048), weights=inception.weights)
    monkeypatch.setattr(fid, "load_inception", lambda *args: inception)
    script, flags = training("gen", "--steps", 3, "--ema", 0.5, "--lr", 0.02, "--warmup", 0, "--out", tmp_path / "gen")
    run(script, *flags, "--fid-ref", tmp_path / "ref.npz", "--fid-every", 2, "--fid-num", 4, "--random-features")
    first, last = (record for record in records(tmp_path / "gen") if "FD-random-4" in record)
    assert (first["step"], last["step"]) == (2, 3) and first["FD-random-4"] != last["FD-random-4"]
    model, _, _, sampling = rdpm.load_generator(tmp_path / "gen/model.pt")
    model.load_state_dict(state(tmp_path / "gen")["parts"]["ema"])
    reference = fid.load_reference(str(tmp_path / "ref.npz"), inception, keep=0)
    tokenizer = rdpm.load_tokenizer(folder / "vq/model.pt")
    result = fid.fid_of_generator(model, tokenizer, sampling, reference, inception, 4)
    assert last["FD-random-4"] == pytest.approx(result["values"]["FD-random-4"], rel=1e-6)


@pytest.mark.parametrize("flags", ["--ckpt gen.pt --num 9 --ref good.npz", "--tokenizer vq.pt --data tree"])
def test_two_ranks_equal_one(flags, pictures, on_two_ranks, tmp_path, monkeypatch):
    """Batches of 4, so that both have some images; random weights as if the official ones, so that IS is there too."""
    (script := tmp_path / "small_batches.py").write_text(
        f"import sys\nsys.path.insert(0, {str(HERE)!r})\nimport fid, rdpm\n"
        "fid.BATCH, fid.SHA256 = 4, 'random-0'\nrdpm.run_main(fid.main)\n")
    monkeypatch.setattr(fid, "BATCH", 4)
    monkeypatch.setattr(fid, "SHA256", "random-0")
    command = [pictures / word if (pictures / word).exists() else word for word in flags.split()]
    command += ["--random-features", "--allow-small", "--device", "cpu", "--out"]
    run(fid, *command, tmp_path / "one.json")
    on_two_ranks(script, *command, tmp_path / "two.json")
    one, two = (json.loads((tmp_path / name).read_text())["values"] for name in ("one.json", "two.json"))
    assert list(two) == list(one) and ("IS" in one) == ("gen.pt" in flags)
    assert all(two[name] == pytest.approx(value, rel=1e-6) for name, value in one.items()), (one, two)


def test_judge_by_hand(pictures, capsys, monkeypatch, tmp_path):
    """All eight numbers of each row. Of 5 and 9 test images 2 and 4 are the reference."""
    monkeypatch.syspath_prepend(HERE / "experiments")
    monkeypatch.chdir(pictures)
    import judge
    trained, train, scaled = [], judge.train, lambda images: images / 127.5 - 1
    monkeypatch.setattr(judge, "train", lambda *args: trained.append((*args[:2], train(*args))) or trained[-1][2])
    (x, y), (x_train, y_train) = (judge.load(rdpm.load_data("tree", 32, train=split)) for split in (False, True))
    first, others, drawn = [0, 1, 2, 3, 5, 7], [4, 6, 8, 9, 10, 11, 12, 13], x.roll(5, 3)[:7]
    np.savez(npz := tmp_path / "a.npz", arr_0=drawn.permute(0, 2, 3, 1), arr_1=y[:7])
    run(judge, "--data", "tree", "--ckpt", "gen.pt", "--steps", 3, "--network", tmp_path / "net.pt", "--samples", npz)
    table = [line.strip("| ").split(" | ")[1:] for line in capsys.readouterr().out.splitlines()[2:]]
    (*_, net), *students = trained
    assert same(torch.load(tmp_path / "net.pt"), dict(net.state_dict()))
    known, tokenizer = net[:-1](scaled(x[first])).detach(), rdpm.load_generator("gen.pt")[1]
    with torch.no_grad(), rdpm.autocast(torch.device("cpu")):
        decoded, taught = (rdpm.to_uint8(tokenizer(scaled(z), noise(tokenizer, 0, range(len(z))))[0])
                           for z in (x[others], x_train[:7]))
    sets = (x[others], x_train[:7], y_train[:7]), (decoded, taught, y_train[:7]), (drawn, drawn, y[:7])
    for row, (z, z_taught, y_taught), (seen, labels, student) in zip(table, sets, students, strict=True):
        assert torch.equal(seen, z_taught) and torch.equal(labels, y_taught)
        found, label = net[:-1](scaled(z)).detach(), y[:7] if z is drawn else y[others]
        right, score = (100.0 * (n(scaled(i)).argmax(1) == j) for n, i, j in ((net, z, label), (student, x, y)))
        both = fid.precision_recall(reference=known, samples=found[:6])
        spread = np.mean([z[label == c].double().std(0).mean() for c in (0, 1)])
        distance = fid.frechet_distance(*moments(found), *moments(known))
        close([float(cell) for cell in row], [len(z), right.mean(), distance, *both, spread, score.mean()], 2e-3)
