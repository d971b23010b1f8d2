"""Tests: identities against plain code written here from the paper. Run `pytest -q test_rdpm.py`."""

import argparse
import collections
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
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fid
import rdpm
import sample
import train_gen
import train_vq
from rdpm import RDPM, GeneratorConfig, ImageStreams, Sampling, Tokenizer, TokenizerConfig, UserError

HERE = Path(__file__).parent
TOY = {"image_size": 16, "channels": 8, "multipliers": (1, 2), "res_blocks": 1, "d": 4, "K": 16, "T": 5}
CLASSES = 3
CPU = torch.device("cpu")
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
    config = GeneratorConfig(depth, CLASSES, **({"statistics": True} | changes))
    model = RDPM(config, tokenizer).requires_grad_(False)
    for weight in model.state_dict().values():
        nn.init.normal_(weight, std=0.15)
    return model


def latents(tokenizer: Tokenizer, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """v (B, n, d), normalised like the encoder's, and eps (T, B, n, d)."""
    torch.manual_seed(0)
    c = tokenizer.config
    v = torch.randn(batch, c.side**2, c.d)
    return F.layer_norm(v, (c.d,)), torch.randn(c.T, *v.shape)


def noise(tokenizer: Tokenizer, seed: int, numbers) -> torch.Tensor:
    """eps (T, B, n, d) of these images, from its definition: a stream for each pair of seed and number."""
    c = tokenizer.config
    eps = []
    for number in numbers:
        high, low = np.random.SeedSequence([seed, number]).generate_state(2, np.uint32).tolist()
        stream = torch.Generator().manual_seed((high >> 1) * 2**32 + low)
        eps.append(torch.randn(c.T, c.side**2, c.d, generator=stream))
    return torch.stack(eps, dim=1)


def close(a, b, tolerance=1e-5) -> None:
    a = torch.as_tensor(a).double()
    b = torch.as_tensor(b).double()
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def same(a, b) -> bool:
    """Equal to the last bit: numbers, text, arrays, tensors, and what is nested of these."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return np.array_equal(a, b)


# Tokenizer: schedules, noise, Alg. 1, Eqs. (2) to (5) ---------------------------------------------

def alpha_by_hand(schedule: str, t: int, T: int) -> float:
    return {"sin": math.sin(math.pi * t / (2 * T)), "linear": t / T, "pow": 0.75 ** (T - t)}[schedule]


@pytest.mark.parametrize("schedule", ["sin", "linear", "pow"])
@pytest.mark.parametrize("T", [1, 2, 10])
def test_schedules_by_hand(schedule, T):
    q = toy_tokenizer(schedule=schedule, T=T).quantizer
    close(q.alpha, [alpha_by_hand(schedule, t, T) for t in range(1, T + 1)])
    close(q.alpha**2 + q.beta**2, torch.ones(T))
    assert q.alpha[-1] == 1 and q.beta[-1] == 0 and (q.alpha.diff() > 0).all()
    close(rdpm.alpha_schedule("pow", 3, 0.5), [0.25, 0.5, 1])


def test_guidance_and_learning_rates_by_hand():
    assert Sampling(1.5, "constant").lambdas(3) == [1.5, 1.5, 1.5]
    assert Sampling(1.5, "linear").lambdas(4) == [0, 0.5, 1.0, 1.5]
    assert Sampling(1.5, "linear").lambdas(1) == [0]
    assert Sampling(1.5, "linear", guidance_from=3).lambdas(4) == [0, 0, 1.0, 1.5]
    assert Sampling(1.5, "linear", 2, strengths=[3.0, 0.0]).lambdas(2) == [3, 0]
    for warmup, final, rates in ((4, 1.0, [0.5, 1, 1.5, 2, 2, 2, 2, 2]), (0, 1.0, [2] * 8),
                                 (4, 0.1, [0.5, 1, 1.5, 2, 2, 1.55, 1.1, 0.65])):
        close([rdpm.learning_rate(step, 8, 2.0, warmup, final) for step in range(8)], rates)


@pytest.mark.parametrize(("T", "draft", "strengths"), [
    (10, 1.2, [0] * 5 + [35 / 3, 35 / 3, 0, 0, 0]), (3, 0.0, [0, 4.5, 4.5]), (1, 0.0, [0])])
def test_fast_gives_two_steps_all_the_guidance(T, draft, strengths):
    rdpm.add_sampling_flags(parser := argparse.ArgumentParser())
    args = parser.parse_args(["--fast", "--tau=2", "--guidance=6"])
    fast = rdpm.sampling_from(args, Sampling(draft=draft), T)
    close(fast.lambdas(T), strengths)
    assert replace(fast, strengths=None) == Sampling(6.0, tau=2.0, skip=T // 2, draft=draft or 1.0)


def test_noise_of_an_image_is_its_own():
    tokenizer = toy_tokenizer()
    for seed, numbers in ((3, [8, 5]), (3, [5]), (2**32 + 3, [2**33])):
        assert same(tokenizer.noise(ImageStreams(seed, numbers, "cpu")), noise(tokenizer, seed, numbers))
    every = torch.cat([ImageStreams(seed, range(100), "cpu").draw(torch.randn, 8) for seed in range(25)])
    assert len(every.unique(dim=0)) == 2500
    assert scipy.stats.kstest(every.flatten().numpy(), "norm").pvalue > 1e-3


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
    z = v                                                                       # line 1
    vq = z_sum = loss = 0
    all_codes = []
    residual = []
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
    ("sin", True, True, False), ("linear", True, False, False), ("pow", False, True, False),
    ("pow", True, True, True), ("sin", False, False, True)])
def test_quantiser_is_algorithm_1_and_its_loss_and_gradients_are_eq_4(schedule, bias, weight, stop):
    tokenizer = toy_tokenizer(schedule=schedule, bias=bias, weight=weight, stop_gradients=stop, image_size=8)
    q = tokenizer.quantizer
    exact = copy.deepcopy(q).double()
    v, eps = latents(tokenizer, 2)
    v_exact = v.double().requires_grad_()
    codes, z_sum, loss, residual = algorithm_1(exact, schedule, weight, stop, v_exact, eps.double())
    found = q(v.requires_grad_(), eps)
    assert same(found.codes, codes)
    error = ((q.gamma if weight else 1) * found.error).sum() * (1.25 if stop else 1)
    for ours, by_hand in ((found.z_sum, z_sum), (found.loss, loss), (error, loss), (found.residual, residual)):
        close(ours, by_hand)
    found.loss.backward()
    loss.backward()
    for ours, by_hand in zip([v, *q.parameters()], [v_exact, *exact.parameters()], strict=True):
        assert by_hand.grad.abs().sum() > 0
        close(ours.grad, by_hand.grad)


def test_nearest_is_a_naive_search_in_every_chunk():
    q = toy_tokenizer(K=1000).quantizer
    rows = torch.randn(5, 500, 4)
    assert same(q.nearest(rows), nearest_by_hand(q.codebook.double(), rows.double()))


def test_training_input_is_the_samplers_state_whatever_autocast_says():
    tokenizer = toy_tokenizer(K=512, d=8)
    q = tokenizer.quantizer
    t = torch.tensor([3, 1, 5, 2, 5, 1, 4])
    v, eps = latents(tokenizer, len(t))
    expected = q(v, eps)
    with torch.autocast("cpu", torch.bfloat16):
        found = q(v, eps)
        z_sum, target = q.training_input(v, eps, t)
        sums = list(itertools.accumulate(map(q.lookup, expected.codes), initial=torch.zeros_like(v)))
    assert torch.equal(found.codes, expected.codes) and torch.equal(found.z_sum, expected.z_sum)
    assert torch.equal(sums[-1], expected.z_sum)
    for i, t_i in enumerate(t):
        close(z_sum[i], sums[t_i - 1][i])
        assert same(target[i], expected.codes[t_i - 1, i])


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


@pytest.mark.parametrize("head", ["linear", "codebook"])
def test_residual_stream_codebook_head_and_argmax_are_float32(head, monkeypatch):
    """Under autocast too: bfloat16 logits of a linear head have ties, which would decide what an argmax takes."""
    tokenizer = toy_tokenizer(K=4096)
    model = toy_generator(tokenizer, depth=2, head=head)
    logits = []
    seen = set()
    monkeypatch.setattr(rdpm, "argmax", lambda x: logits.append(x) or x.argmax(-1))
    for module in (*model.blocks, model.head):
        module.register_forward_pre_hook(lambda _, inputs: seen.add(inputs[0].dtype))
    y = torch.zeros(2, dtype=torch.long)
    with torch.autocast("cpu", torch.bfloat16):
        logits.append(model(*some_inputs(tokenizer)))
        rdpm.sample(model, tokenizer, y, 0, range(2), Sampling(gumbel=False))
        list(rdpm.sample_steps(model, tokenizer, y, 0, range(2), Sampling(gumbel=False)))
    ties = [(x == x.amax(-1, keepdim=True)).sum(-1).gt(1).sum() for x in logits]
    assert (ties[0] > 3) == (head == "linear") and len(ties) == 11 and sum(ties[1:]) == 0
    assert seen == {torch.float32}


def test_tokens_lie_row_by_row():
    tokenizer = toy_tokenizer(image_size=32)
    x = torch.zeros(2, 3, 32, 32)
    z = torch.zeros(2, 16, 16, 4)
    x[1, :, :4, -4:] = 1
    z[1, :2, -2:] = 3
    v = tokenizer.encoder(x).view(2, 16, 16, 4)
    x_rec = tokenizer.decoder(z.flatten(1, 2))
    for change, c in (((v[0] - v[1]).square().sum(-1), 6), ((x_rec[0] - x_rec[1]).square().sum(0), 8)):
        assert change[:c, -c:].mean() > 3 * max(change[:c, :c].mean(), change[-c:, -c:].mean())


def test_decoders_gradient_goes_straight_through():
    tokenizer = toy_tokenizer()
    x_rec, v, quantized = tokenizer(torch.rand(2, 3, 16, 16), latents(tokenizer, 2)[1])
    z_sum = quantized.z_sum.detach().requires_grad_()
    decoded = tokenizer.decoder(z_sum)
    close(x_rec, decoded, 1e-4)
    expected, = torch.autograd.grad(decoded.square().sum(), z_sum)
    codebook = tokenizer.quantizer.codebook
    found, unused = torch.autograd.grad(x_rec.square().sum(), (v, codebook), allow_unused=True)
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
    ours = rdpm.LPIPS(vgg16, linear)
    x, y = torch.rand(2, 2, 3, 40, 36) * 2 - 1
    close(ours(x, y) / theirs(x, y).mean(), 1)
    assert ours(x, y) > 0 and ours(x, x) == 0


# Transformer and sampler: Eqs. (6) to (8), Alg. 2, guidance, known codes --------------------------

def some_inputs(tokenizer: Tokenizer, batch: int = 4):
    v, eps = latents(tokenizer, batch)
    t = torch.arange(batch) % tokenizer.config.T + 1
    return eps[0], torch.arange(batch) % (CLASSES + 1), t, v


def test_at_first_bias_and_head_are_zero_and_gates_closed():
    q = Tokenizer(TokenizerConfig(**(TOY | {"K": 4096}))).quantizer
    codes = torch.randint(0, 4096, (2, 64))
    assert torch.equal(q.lookup(codes), q.codebook[codes]) and abs(q.codebook.std() - 1) < 0.05
    tokenizer = toy_tokenizer()
    model = RDPM(GeneratorConfig(2, CLASSES), tokenizer)
    inputs = some_inputs(tokenizer)
    assert (model(*inputs) == 0).all()
    nn.init.normal_(model.head.project.weight)
    before = model(*inputs)
    for name, weight in model.blocks.named_parameters():
        assert (".ada." in name) == bool((weight == 0).all())
        if ".ada." not in name:
            nn.init.normal_(weight)
    assert torch.equal(model(*inputs), before) and before.abs().sum() > 0


@pytest.mark.parametrize("changed", range(4))
def test_every_input_matters(changed):
    tokenizer = toy_tokenizer()
    model = toy_generator(tokenizer)
    inputs = some_inputs(tokenizer)
    others = list(inputs)
    others[changed] = inputs[changed] + 1
    others[1] %= CLASSES + 1
    others[2] = (others[2] - 1) % 5 + 1
    assert ((model(*others) - model(*inputs)).abs().amax((1, 2)) > 1e-4).all()


def turned_by_hand(x, side):
    """2-D rotary positions of one head's x (n, head_dim), pair by pair: half turn by row, half by column."""
    out = torch.empty_like(x)
    pairs = x.shape[1] // 2
    for p, i in itertools.product(range(len(x)), range(pairs)):
        place = p // side if i < pairs // 2 else p % side
        angle = place * 100.0 ** (-2 * (i % (pairs // 2)) / pairs)
        a = x[p, i]
        b = x[p, i + pairs]
        out[p, i] = a * math.cos(angle) - b * math.sin(angle)
        out[p, i + pairs] = a * math.sin(angle) + b * math.cos(angle)
    return out


def normalised(x):
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()


def test_block_by_hand():
    torch.manual_seed(0)
    width, heads, side = 16, 2, 3
    block = rdpm.Block(width, heads).double()
    for weight in block.parameters():
        nn.init.normal_(weight, std=0.5)
    x = torch.randn(2, side**2, width).double()
    c = torch.randn(2, width).double()
    angles = rdpm.rotary_angles(side, width // heads).double()
    found = block(x, c, angles.cos(), angles.sin())
    for image in range(2):
        ada = block.ada.weight @ c[image] + block.ada.bias
        shift1, scale1, gate1, shift2, scale2, gate2 = ada.view(6, width)
        h = normalised(x[image]) * (1 + scale1) + shift1
        qkv = [(h @ w.T).chunk(heads, 1) for w in block.qkv.weight.view(3, width, width)]
        attended = []
        for q, k, v in zip(*qkv, strict=True):
            scores = turned_by_hand(q, side) @ turned_by_hand(k, side).T / math.sqrt(width / heads)
            attended.append(scores.exp() / scores.exp().sum(1, keepdim=True) @ v)
        y = x[image] + gate1 * (torch.cat(attended, 1) @ block.out.weight.T)
        h = normalised(y) * (1 + scale2) + shift2
        gate, up = (h @ w.T for w in block.gate_up.weight.view(2, -1, width))
        close(found[image], y + gate2 * ((gate / (1 + (-gate).exp()) * up) @ block.down.weight.T))


@pytest.mark.parametrize(("depth", "width", "millions"), [(12, 768, 133), (16, 1024, 310), (20, 1280, 602)])
def test_sizes_of_table_1(depth, width, millions):
    with torch.device("meta"):
        model = RDPM(GeneratorConfig(depth), Tokenizer(TokenizerConfig()))
    numbers = sum(weight.numel() for weight in model.parameters())
    assert abs(numbers / 1e6 / millions - 1) < 0.005
    assert model.embed.out_features == width and model.blocks[0].heads == depth == len(model.blocks)


def test_codebook_head_with_the_true_v_gives_the_tokenizers_codes():
    tokenizer = toy_tokenizer()
    config = GeneratorConfig(1, CLASSES, head="codebook", patch=2, statistics=True)
    model = RDPM(config, tokenizer).requires_grad_(False)
    q = tokenizer.quantizer
    t = torch.arange(10) % 5 + 1
    y = t % CLASSES
    doubt = torch.rand(10, 64, 1)
    v, eps = latents(tokenizer, 10)
    z_sum, codes = q.training_input(v, eps, t)
    eps_t = eps[t - 1, torch.arange(10)]
    alpha = q.alpha[t - 1, None, None]
    beta = q.beta[t - 1, None, None]
    mean = model.class_mean
    mean.copy_(torch.randint(-2, 3, mean.shape) / 2)
    start = mean[CLASSES] + beta.double() * (mean[y] - mean[CLASSES])
    needed = torch.cat([v.double() - start, doubt], dim=-1)
    model.head.project.register_forward_hook(lambda *_: rdpm.patchify(needed, 2).float())
    model.head.log_s.fill_(-5)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(eps_t, y, t, z_sum)
        v_hat = rdpm.preview(model, eps_t, y, t, z_sum)
    assert same(logits.argmax(-1), codes)
    close(v_hat, v)
    model.head.log_s.copy_(torch.arange(5) / 4)
    distances = ((alpha * (v - z_sum) + beta * eps_t)[:, :, None] - q.codebook).square().sum(-1)
    by_hand = -distances / 2 / (model.head.log_s[t - 1, None, None] + doubt).exp()
    close(model(eps_t, y, t, z_sum).log_softmax(-1), by_hand.log_softmax(-1), 1e-4)


def test_the_linear_head_sees_noise_and_sum_whole_or_through_d_numbers():
    tokenizer = toy_tokenizer()
    eps, y, t, z_sum = some_inputs(tokenizer)
    whole = toy_generator(tokenizer)
    narrow = toy_generator(tokenizer, bottleneck=True)
    d = tokenizer.config.d
    invisible = torch.linalg.svd(narrow.squeeze.weight).Vh[d:].sum(0)
    other = eps + invisible[:d], y, t, z_sum + invisible[d:]
    close(narrow(*other), narrow(eps, y, t, z_sum), 1e-4)
    assert (whole(*other) - whole(eps, y, t, z_sum)).abs().mean() > 0.01


def test_patches_by_hand():
    x = torch.randn(2, 64, 3)
    grid = x.view(2, 8, 8, 3)
    groups = rdpm.patchify(x, 2)
    for i, j in itertools.product(range(4), range(4)):
        tokens = [grid[:, 2 * i + a, 2 * j + b] for a in range(2) for b in range(2)]
        assert same(groups[:, 4 * i + j], torch.cat(tokens, dim=1))
    assert same(rdpm.unpatchify(groups, 2), x)


def recorded(model: RDPM, logits=None) -> list:
    """The inputs of all the model's calls from now on; with `logits` it answers these."""
    calls = []
    def hook(_, inputs, output):
        calls.append([x.clone() for x in inputs])
        return output if logits is None else logits.expand_as(output)
    model.register_forward_hook(hook)
    return calls


def algorithm_2(model, tokenizer, y, eps, lambdas):
    nobody = torch.full_like(y, CLASSES)
    z_sum = torch.zeros_like(eps[0])
    for t in range(1, tokenizer.config.T + 1):
        step = torch.full_like(y, t)
        cond = model(eps[t - 1], y, step, z_sum)
        uncond = model(eps[t - 1], nobody, step, z_sum)
        codes = (cond + (cond - uncond) * lambdas[t - 1]).argmax(-1)
        z_sum = z_sum + lookup_by_hand(tokenizer.quantizer, codes)
    return tokenizer.decoder(z_sum)


@torch.no_grad()
@pytest.mark.parametrize("head", ["linear", "codebook"])
@pytest.mark.parametrize(("settings", "lambdas"), [
    (Sampling(4.0, "constant"), [4] * 5), (Sampling(4.0), [0, 1, 2, 3, 4]),
    (Sampling(4.0, "constant", 4), [0, 0, 0, 4, 4]), (Sampling(0.0), [0] * 5),
    (Sampling(4.0, strengths=[0.0, 3.0, 0.0, 0.0, 1.0]), [0, 3, 0, 0, 1])])
def test_sample_is_algorithm_2_with_guidance(head, settings, lambdas):
    tokenizer = toy_tokenizer(image_size=8)
    model = toy_generator(tokenizer, head=head)
    calls = recorded(model)
    y = torch.tensor([0, 2, 1])
    numbers = [4, 0, 9]
    images = rdpm.sample(model, tokenizer, y, 5, numbers, replace(settings, gumbel=False))
    seen = [(labels.tolist(), t.unique().tolist()) for _, labels, t, _ in calls]
    assert seen == [([0, 2, 1, 3, 3, 3] if x else [0, 2, 1], [t]) for t, x in enumerate(lambdas, 1)]
    eps = noise(tokenizer, 5, numbers)
    close(images, algorithm_2(model, tokenizer, y, eps, lambdas), 1e-4)
    raw = algorithm_2(model, tokenizer, y, eps, [0] * 5)
    assert ((images - raw).abs().max() > 1e-2) == (lambdas[-1] > 0)


def test_gumbel_draws_follow_eq_8():
    tokenizer = toy_tokenizer(K=5, T=1, bias=False)
    logits = torch.tensor([0.0, 1.0, -0.3, 0.6, 0.2])
    recorded(model := toy_generator(tokenizer), logits)
    taus = (1.0, 3.0)
    for tau in taus:
        (z, _), = rdpm.sample_steps(model, tokenizer, torch.zeros(100).long(), 0, range(100), Sampling(tau=tau))
        hits = (z[:, :, None] == tokenizer.quantizer.codebook).all(-1)
        assert (hits.sum(-1) == 1).all()
        for other in taus:
            expected = 6400 * (other * logits.double()).softmax(0).numpy()
            p = scipy.stats.chisquare(hits.sum((0, 1)).numpy(), expected).pvalue
            assert p > 1e-3 if other == tau else p < 1e-9
        assert len(hits.float().argmax(-1).unique(dim=0)) == 100  # every image draws its own


@torch.no_grad()
@pytest.mark.parametrize("head", ["linear", "codebook"])
@pytest.mark.parametrize(("parts", "skip"), [
    ([0] * 5, 0), ([0] * 5, 2), ([1] * 5, 0), ([1, 0, 0.5, 0.5, 0.5], 0), ([1, 0, 0.5, 0.5, 0.5], 3)])
def test_known_codes_and_skipped_steps_by_hand(head, parts, skip):
    """Where known, codes are Alg. 1's on v; in the first `skip` steps the others are Alg. 1's on the class's draft."""
    tokenizer = toy_tokenizer()
    q = tokenizer.quantizer
    model = toy_generator(tokenizer, head=head)
    y = torch.tensor([0, 2, 1])
    nobody = torch.full_like(y, CLASSES)
    v, _ = latents(tokenizer, 3)
    streams = ImageStreams(5, [4, 0, 9], "cpu")
    eps = tokenizer.noise(streams)
    along = streams.draw(torch.randn, 256)
    draft = model.class_mean[y] + 0.5 * torch.einsum("bk,knd->bnd", along, model.class_axes.view(256, 64, 4))
    known = torch.rand(5, 3, 64) < torch.tensor(parts).view(5, 1, 1)
    given = known if 0.5 in parts else known[..., :1]
    settings = Sampling(1.5, gumbel=False, skip=skip, draft=0.5)
    found = list(rdpm.sample_steps(model, tokenizer, y, 5, [4, 0, 9], settings, v, given, previews=True))
    calls = recorded(model)
    unseen = list(rdpm.sample_steps(model, tokenizer, y, 5, [4, 0, 9], settings, v, given))
    assert [int(t[0]) for _, _, t, _ in calls] == list(range(skip + 1, 6))
    z_sum = torch.zeros_like(v)
    for t, (z_found, v_hat) in enumerate(found, 1):
        inputs = eps[t - 1], y, torch.full_like(y, t), z_sum
        codes, free = (nearest_by_hand(q.codebook, q.alpha[t - 1] * (latent - z_sum) + q.beta[t - 1] * eps[t - 1])
                       for latent in (v, draft))
        expected = draft
        if t > skip:
            cond = model(*inputs)
            uncond = model(eps[t - 1], nobody, *inputs[2:])
            free = (cond + (cond - uncond) * 1.5 * (t - 1) / 4).argmax(-1)
            expected = rdpm.preview(model, *inputs)
        z_sum = z_sum + lookup_by_hand(q, torch.where(known[t - 1], codes, free))
        close(z_found, z_sum)
        assert v_hat is expected is None or (v_hat - expected).abs().max() < 1e-4
        assert same(z_found, unseen[t - 1][0]) and (unseen[t - 1][1] is None) == (t > skip)


@torch.no_grad()
def test_an_image_depends_on_its_seed_and_number_alone():
    tokenizer = toy_tokenizer()
    calls = recorded(model := toy_generator(tokenizer))
    y = torch.tensor([0, 1, 2, 0])
    numbers = [4, 9, 2, 4]
    batch = rdpm.sample(model, tokenizer, y, 3, numbers, Sampling())
    assert same(batch[0], batch[3])
    assert same(torch.stack([eps[:4] for eps, *_ in calls]), noise(tokenizer, 3, numbers))
    for seed, number in ((3, 9), (4, 9), (3, 8)):
        alone, = rdpm.sample(model, tokenizer, y[[1]], seed, [number], Sampling())
        assert ((alone - batch[1]).abs().max() < 1e-4) == ((seed, number) == (3, 9))


@torch.no_grad()
@pytest.mark.parametrize("skip", [0, 2])
def test_draw_images_is_the_decoded_end_of_sample_steps(skip):
    tokenizer = toy_tokenizer()
    model = toy_generator(tokenizer, head="codebook")
    arguments = model, tokenizer, torch.tensor([0, 1]), 3, range(2), Sampling(skip=skip, draft=0.5)
    *_, (z_sum, _) = rdpm.sample_steps(*arguments)
    assert same(rdpm.draw_images(*arguments), tokenizer.decoder(z_sum))


class FakeCuda(TorchDispatchMode):
    """Tensors on "cuda" have no contents, so that nothing can wait for them; those on the CPU are real."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = collections.Counter()
        self.expected = torch.bfloat16  # in products; in the quantiser, the codebook head, before an argmax float32

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        inputs = tree_leaves((args, kwargs))
        devices = {str(x)[:4] for x in inputs if isinstance(x, torch.device)}
        if "cuda" not in devices and not any(isinstance(x, FakeTensor) for x in inputs):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        result = func(*args, **kwargs)  # by FakeTensorMode, which is under this one
        name = func.overloadpacket.__name__
        tensors = [x for x in inputs if isinstance(x, torch.Tensor) and x.ndim > 0]
        used = tree_leaves(result) if name in ("_to_copy", "copy_") else tree_leaves(result) + tensors
        assert {x.device.type for x in used if isinstance(x, torch.Tensor)} <= {"cuda"}, func
        dtypes = {x.dtype for x in tensors if x.is_floating_point()}
        if name in ("convolution", "mm", "addmm", "bmm", "baddbmm"):
            assert dtypes == {self.expected}, func
        if name in ("native_layer_norm", "native_group_norm", "_softmax", "_safe_softmax", "_log_softmax"):
            assert dtypes == {torch.float32}, func
        self.seen[name, self.expected] += 1
        return result

    def exact(self, method):
        def inside(*args):
            before = self.expected
            self.expected = torch.float32
            result = method(*args)
            self.expected = before
            return result
        return inside

    @contextlib.contextmanager
    def precision(self, context, sampling):
        with context:
            self.expected = torch.bfloat16 if sampling.gumbel else torch.float32
            yield
            self.expected = torch.bfloat16

    def attend(self, q, k, v):
        """For the fused kernel: without a GPU, PyTorch would take the plain products, in float32."""
        assert q.dtype == k.dtype == v.dtype == self.expected
        return q + k + v


class FakeStreams:
    """As `ImageStreams`, but torch.Generator("cuda") needs a driver."""

    def __init__(self, seed, numbers, device):
        self.num = len(numbers)

    def draw(self, distribution, *shape):
        return distribution(self.num, *shape, device="cuda")


def test_fake_cuda(monkeypatch):
    """Forward passes on "cuda": devices, dtypes under autocast, and that nothing waits for the GPU."""
    mode = FakeCuda()
    for owner, name in ((rdpm.NoisyResidualQuantizer, "nearest"), (rdpm.NoisyResidualQuantizer, "lookup"),
                        (rdpm.CodebookHead, "forward"), (rdpm.CodebookHead, "predict")):
        monkeypatch.setattr(owner, name, mode.exact(getattr(owner, name)))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
    monkeypatch.setattr("torch.amp.autocast_mode.amp_definitely_not_available", lambda: False, raising=False)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    precision = Sampling.precision
    monkeypatch.setattr(Sampling, "precision", lambda self, device: mode.precision(precision(self, device), self))
    monkeypatch.setattr(rdpm, "ImageStreams", FakeStreams)
    monkeypatch.setattr(rdpm, "adaptive_weight", lambda *_: torch.ones((), device="cuda"))  # gradients need a device
    monkeypatch.setattr(F, "scaled_dot_product_attention", mode.attend)
    device = torch.device("cuda")
    with FakeTensorMode(allow_non_fake_inputs=True), mode, rdpm.autocast(device):
        try:
            torch.conv2d(torch.ones(1, 1, 3, 3, device=device), torch.ones(1, 1, 3, 3, device=device))
        except Exception as error:  # an older PyTorch raises one of many kinds
            pytest.skip(f"fake tensors on cuda do not work here: {error}")
        linear = {f"lin{i}.model.1.weight": torch.rand(1, c, 1, 1) for i, c in enumerate((64, 128, 256, 512, 512))}
        with device:
            vq = Tokenizer(TokenizerConfig(**(TOY | {"image_size": 32})))
            models = [RDPM(GeneratorConfig(1, 3, head=head, statistics=True), vq) for head in ("linear", "codebook")]
            lpips = rdpm.LPIPS(rdpm.torchvision.models.vgg16(init_weights=False).state_dict(), linear).cuda()
            discriminator = rdpm.Discriminator()
        x = torch.rand(2, 3, 32, 32, device=device)
        eps = vq.noise(FakeStreams(0, range(2), device))
        rdpm.tokenizer_losses(vq, x, eps, lpips, 1.0, discriminator, 0.75, vq.decoder.layers[-1].weight)
        v = vq.encoder(x)
        y = torch.zeros(2, dtype=torch.long, device=device)
        known = torch.zeros(len(eps), 2, v.shape[1], dtype=torch.bool, device=device)
        for model in models:
            rdpm.generator_losses(model, vq.quantizer, v, eps, y, torch.tensor([2, 5]))
            for gumbel in (True, False):
                rdpm.sample(model, vq, y, 0, range(2), Sampling(gumbel=gumbel))
                sampling = Sampling(gumbel=gumbel, skip=2, draft=1.0)
                list(rdpm.sample_steps(model, vq, y, 0, range(2), sampling, v, known, previews=True))
    for name in ("convolution", "addmm", "mm"):
        assert mode.seen[name, torch.bfloat16] and mode.seen[name, torch.float32], name


# Data, checkpoints, learning by heart -------------------------------------------------------------

def adm_crop(image: Image.Image, size: int) -> np.ndarray:
    """guided-diffusion's center_crop_arr, in its terms."""
    width, height = image.size
    while width >= 2 * size and height >= 2 * size:
        width = width // 2
        height = height // 2
        image = image.resize((width, height), resample=Image.BOX)
    scale = size / (width if width < height else height)
    array = np.array(image.resize((round(width * scale), round(height * scale)), resample=Image.BICUBIC))
    y = (array.shape[0] - size) // 2
    x = (array.shape[1] - size) // 2
    return array[y:y + size, x:x + size]


@pytest.mark.parametrize("size", [(40, 33), (33, 75), (16, 16), (17, 130), (64, 64), (31, 31), (5, 4), (300, 3)])
def test_center_crop_is_adms(size):
    pixels = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), np.uint8)
    image = Image.fromarray(pixels)
    for found in (rdpm.center_crop(image, 16), rdpm.fit(image, 16, pad=False)):
        assert found.size == (16, 16) and same(found, adm_crop(image, 16))


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


def both_splits(data) -> list:
    return [rdpm.load_data(str(data), 32, train) for train in (True, False)]


def test_folders_with_and_without_a_held_out_one(tmp_path):
    root = draw_folder(tmp_path / "whole", 60)
    files = sorted(root.glob("*/*.png"))
    kept = [i for i in range(60) if i % 20 != 10]
    for images, places in zip(both_splits(root), (kept, [10, 30, 50]), strict=True):
        assert len(images) == len(places) and images.classes == NAMES
        for i, place in enumerate(places):
            picture = np.array(Image.open(files[place])).transpose(2, 0, 1)
            for item, expected in ((i, picture), (len(images) + i, picture[:, :, ::-1])):
                x, y = images[item]
                assert NAMES[y] == files[place].parent.name and same(x, expected)
            assert images.labels[i] == y
    for name in ("val", "test"):
        draw_folder(tmp_path / name / "train", 6)
        file, *_ = sorted(draw_folder(tmp_path / name / name, 3, size=40).glob("arrow/*.png"))
        train, held_out = both_splits(tmp_path / name)
        assert len(train) == 6 and len(held_out) == 3
        assert same(held_out[0][0].permute(1, 2, 0), adm_crop(Image.open(file), 32))


@pytest.mark.parametrize(("counts", "held_out"), [
    ([30, 3, 1], [10]), ([5, 2], [4]), ([1, 2, 2], [2, 4]), ([11, 1, 40], [10, 22, 42]), ([1, 1], []), ([7], [6])])
def test_one_in_twenty_is_held_out_of_each_class_and_never_its_only_image(counts, held_out):
    found = rdpm.held_out_places(np.repeat(np.arange(len(counts)), counts))
    assert np.flatnonzero(found).tolist() == held_out


def test_many_kinds_of_files_are_read_and_the_others_counted(tmp_path):
    picture = Image.linear_gradient("L").resize((32, 32)).convert("RGB")
    names = ["a.jfif", "b.BMP", "c.tif", "d.webp", "e.gif", "f.ppm", "g.jpe", "h.PNG", "i/j/k.jpeg"]
    for name in names + ["zz/l.png"]:
        file = tmp_path / "one" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        picture.save(file, format="JPEG" if file.suffix == ".jfif" else None)
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    for name in ("a.txt", "b.txt", "README", "c.mp4", "d.TXT", ".hidden.png"):
        (tmp_path / "two" / name).write_bytes(b"text")
    train, held_out = both_splits(tmp_path)
    assert str(train) == "18 images of 2 classes (5 other files ignored: .txt 3, no suffix 1, .mp4 1)"
    assert len(held_out) == 2
    for images in (train, held_out):
        for i in range(len(images)):
            assert np.abs(images[i][0].numpy() - np.array(picture, int).transpose(2, 0, 1)).mean() < 6
    found = [os.fsdecode(train.source.path(i)) for i in range(10)]
    assert found == [str(tmp_path / "one" / name) for name in names + ["zz/l.png"]]


def test_shapes_are_ten_classes_always_the_same_and_the_splits_differ():
    train, held_out = both_splits("shapes")
    again, _ = both_splits("shapes")
    assert len(train) == 20_000 and len(held_out) == 2_000 and len(train.classes) == 10
    assert [train[i][1] for i in range(10)] == list(range(10))
    assert same(np.bincount(train.labels), [2000] * 10)
    pictures = [[images[i][0].numpy().tobytes() for i in range(30)] for images in (train, held_out, again)]
    assert len(set(pictures[0] + pictures[1])) == 60 and pictures[2] == pictures[0]


def test_bytes_and_floats():
    x = torch.arange(256).to(torch.uint8)
    assert same(rdpm.to_uint8(rdpm.to_float(x)), x)
    assert rdpm.to_float(x)[[0, 255]].tolist() == [-1, 1]
    assert rdpm.to_uint8(torch.tensor([-9.0, 9.0])).tolist() == [0, 255]


def batches(steps=range(0, 9), flip=True, seed=0):
    return list(rdpm.global_batches(30, 8, steps, seed, flip))


def test_global_batches(monkeypatch):
    whole = batches()
    items = sum(whole, [])
    assert len(whole) == 9 and all(len(batch) == 8 for batch in whole)
    for epoch in (items[:30], items[30:60]):
        assert sorted(i % 30 for i in epoch) == list(range(30))
        assert 5 < sum(i >= 30 for i in epoch) < 25
    assert items[:30] != items[30:60]
    assert batches(range(4, 9)) == whole[4:] and batches(seed=1) != whole
    assert max(sum(batches(flip=False), [])) == 29
    for world in (2, 4):
        monkeypatch.setattr(rdpm, "world_size", lambda world=world: world)
        own = []
        for rank in range(world):
            monkeypatch.setattr(rdpm, "rank", lambda rank=rank: rank)
            own.append(batches())
        assert [sum(parts, []) for parts in zip(*own, strict=True)] == whole


@pytest.mark.parametrize("labels", [np.arange(200) % 10, np.repeat(np.arange(10), 20)])  # of `shapes`, of a folder
def test_balanced_subsets(labels):
    chosen = rdpm.balanced_subset(labels, 37)
    counts = np.bincount(labels[chosen], minlength=10)
    assert len(set(chosen)) == 37 and counts.min() == 3 and counts.max() == 4
    assert chosen == rdpm.balanced_subset(labels, 37) and len(rdpm.balanced_subset(labels, 900)) == 200
    few = np.array([0] * 50 + [1] * 2)
    assert np.bincount(few[rdpm.balanced_subset(few, 10)]).tolist() == [8, 2]


def test_cached_latents_are_the_encoders(tmp_path):
    def cache(data="data"):
        images = rdpm.load_data(str(tmp_path / data), 32, True)
        copies = 1 + tokenizer.config.flip
        torch.save(tokenizer.state_dict(), args.tokenizer)
        latents = train_gen.open_latents(tokenizer, images, args, CPU)
        assert len(latents) == len(images) * copies
        for i in (0, 3, 4, copies * len(images) - 1):
            v, y = latents[i]
            x, label = images[i]
            assert y == label and v.dtype == torch.float16
            assert (v - tokenizer.encoder(rdpm.to_float(x[None]))[0]).abs().mean() < 0.03  # bf16
        return {file.name: file.stat().st_mtime_ns for file in tmp_path.glob("latents-*")}
    args = argparse.Namespace(tokenizer=tmp_path / "vq.pt", latents=None, out=tmp_path, workers=0)
    draw_folder(tmp_path / "data")
    more = draw_folder(tmp_path / "more", 33)
    tokenizer = toy_tokenizer(image_size=32, flip=False).requires_grad_(False)
    files = [cache()]
    tokenizer = toy_tokenizer(image_size=32).requires_grad_(False)
    files += [cache(), cache()]
    tokenizer.decoder.layers[0].bias.data += 1
    files += [cache(), cache("more")]
    Image.new("RGB", (32, 32)).save(sorted(more.rglob("*.png"))[5])
    files.append(cache("more"))
    assert files[1] == files[2] and [len(names) for names in files] == [1, 2, 2, 3, 4, 5]
    for length in (None, 1000, 50, 0):
        for name in files[-1]:
            if length is None:
                np.load(tmp_path / name, mmap_mode="r+")[:] = 0
            else:
                os.truncate(tmp_path / name, length)
        with pytest.raises(UserError, match="latents-[0-9a-f]+.npy: damaged .* remove it"):
            cache("more")


@pytest.mark.parametrize(("num", "rows", "columns"), [(7, 5, 30), (7, 40, 6), (30, 40, 30), (256, 5, 30), (4, 4, 4)])
def test_principal_axes_are_numpys(num, rows, columns):
    x = np.random.default_rng(0).standard_normal((rows, columns)) * np.linspace(3, 1, columns)
    axes = train_gen.principal_axes(torch.from_numpy(x).float(), num).double().numpy()
    values, vectors = np.linalg.eigh(x.T @ x / rows)
    some = np.argsort(-values)[:min(num, rows, columns)]
    assert len(axes) == len(some)
    close(axes.T @ axes, vectors[:, some] * values[some] @ vectors[:, some].T, 1e-4)
    close(axes @ axes.T, np.diag(values[some]), 1e-4)
    assert all(axis[np.abs(axis).argmax()] > 0 for axis in axes)


def test_classes_are_measured(monkeypatch):
    tokenizer = toy_tokenizer()
    model = RDPM(GeneratorConfig(1, CLASSES + 1, statistics=True), tokenizer)  # a class without images
    v = torch.randn(90, 64, 4).half()
    labels = torch.arange(90) % 6 % CLASSES
    train_gen.measure_classes(model, v, labels)
    x = v.double().numpy()
    means = np.stack([x[labels == y].mean(0) for y in range(CLASSES)] + [np.zeros((64, 4)), x.mean(0)])
    close(model.class_mean, means)
    rest = (x - means[labels]).reshape(90, -1)
    close(model.class_axes.T @ model.class_axes, np.cov(rest.T, bias=True), 1e-4)


@pytest.mark.parametrize("head", ["linear", "codebook"])
def test_model_files_round_trip(head, tmp_path):
    rdpm.load_generator(HERE / "assets/demo.pt")
    original = toy_tokenizer()
    torch.save({"kind": "tokenizer"} | rdpm.inference_state(original), tmp_path / "vq.pt")
    tokenizer = rdpm.load_tokenizer(tmp_path / "vq.pt")
    assert tokenizer.config == original.config and not tokenizer.training
    model = toy_generator(tokenizer, head=head)
    contents = {"kind": "generator", "classes": ["a", "b", "c"], "sampling": asdict(Sampling(tau=2.0)),
                "tokenizer": rdpm.inference_state(tokenizer)}
    torch.save(rdpm.inference_state(model, **contents), tmp_path / "gen.pt")
    loaded, its_tokenizer, classes, sampling = rdpm.load_generator(tmp_path / "gen.pt")
    assert classes == ["a", "b", "c"] and sampling == Sampling(tau=2.0)
    assert its_tokenizer.config == original.config and loaded.config == model.config and not loaded.training
    loaded.requires_grad_(False)
    for ours, theirs in ((tokenizer, original), (its_tokenizer, original), (loaded, model)):
        assert same({name: w.detach().half().float() for name, w in theirs.state_dict().items()}, ours.state_dict())
        assert not any(weight.requires_grad for weight in ours.parameters())
    model.load_state_dict(loaded.state_dict())
    assert same(loaded(*some_inputs(tokenizer)), model(*some_inputs(tokenizer)))


@pytest.mark.parametrize("classes", [["a", "b", "c"], ["a", "b", "d"]])
def test_init_takes_weights_and_with_other_classes_starts_the_labels_anew(classes, tmp_path):
    tokenizer = toy_tokenizer()
    given = toy_generator(tokenizer, head="codebook")
    contents = rdpm.inference_state(given, kind="generator", classes=["a", "b", "c"])
    torch.save(contents, tmp_path / "gen.pt")
    model = RDPM(given.config, tokenizer)
    before = copy.deepcopy(model.state_dict())
    rdpm.start_from(model, tmp_path / "gen.pt", "generator", classes)
    for name, weight in model.state_dict().items():
        own = name.startswith("class_") or "embed_y" in name and "d" in classes
        assert same(weight, before[name] if own else contents["model"][name].float()), name


def by_heart(optimizer, loss):
    for _ in range(150):
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_tokenizer_overfits_one_batch():
    tokenizer = toy_tokenizer(T=3, channels=16, K=64)
    images = rdpm.load_data("shapes", 16, True)
    x = rdpm.to_float(torch.stack([images[i][0] for i in range(4)]))
    arguments = tokenizer, x, noise(tokenizer, 0, range(4)), None, 0, None, 0, None
    optimizer = torch.optim.Adam(tokenizer.parameters(), 2e-3, betas=(0.5, 0.9))
    by_heart(optimizer, lambda: rdpm.tokenizer_losses(*arguments)[0])
    assert F.mse_loss(tokenizer(*arguments[1:3])[0], x) < 0.02 < 0.1 < x.var()


@pytest.mark.parametrize(("head", "patch"), [("linear", 1), ("codebook", 2)])
def test_generator_overfits_one_batch(head, patch):
    tokenizer = toy_tokenizer(image_size=8)
    model = RDPM(GeneratorConfig(2, CLASSES, head=head, patch=patch, statistics=head == "codebook"), tokenizer)
    v, eps = latents(tokenizer, 6)
    t = torch.tensor([1, 2, 3, 4, 5, 5])
    arguments = model, tokenizer.quantizer, v, eps, torch.arange(6) % CLASSES, t
    by_heart(torch.optim.AdamW(model.parameters(), 2e-3), lambda: rdpm.generator_losses(*arguments)[0].mean())
    _, right = rdpm.generator_losses(*arguments)
    assert right.tolist() == [1] * 6


# The scripts, end to end --------------------------------------------------------------------------

COMMON = ["--preset", "shapes", "--device", "cpu", "--workers", "0", "--batch", "4", "--log-every", "1"]
VQ = [*COMMON, "--T", "3", "--K", "32"]
GEN = [*COMMON, "--depth", "1"]
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@pytest.fixture(autouse=True)
def signals():
    """A training in this process leaves its handlers behind, and its workers, whose end raises a RuntimeError."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for worker in multiprocessing.active_children():
        worker.kill()
        with contextlib.suppress(RuntimeError):
            worker.join()
    for number, handler in before.items():
        signal.signal(number, handler)


def words(flags) -> list[str]:
    """A command line: text is split at its spaces, paths and numbers are not."""
    return [word for flag in flags for word in (flag.split() if isinstance(flag, str) else [str(flag)])]


def shell(*command) -> str:
    """What a command writes to stdout. Without torchrun, its variables decide nothing."""
    loose = {"OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}
    done = subprocess.run([sys.executable, *words(command)], cwd=HERE, env=os.environ | loose,
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def run(script, *flags) -> None:
    """A script's main() in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{script.__name__}.py", *words(flags)])
        script.main()


def records(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def logged(out: Path, key: str = "loss") -> list:
    return [record[key] for record in records(out) if key in record]


def state(out: Path) -> dict:
    return torch.load(out / "state.pt", weights_only=True)


def modules(out: Path) -> dict:
    return state(out)["modules"]


@pytest.fixture(scope="module")
def shapes(tmp_path_factory) -> Path:
    """Both trainings and the sampler as a user runs them, on the built-in images and on a folder of ten classes."""
    out = tmp_path_factory.mktemp("shapes")
    data = draw_folder(out / "data", 100, classes=10)
    said = shell("train_vq.py", *VQ, "--steps 2 --gan 0.75 --out", out / "vq")
    assert "PSNR" in said and f"next: python train_gen.py --preset shapes --data shapes --tokenizer {out}/vq" in said
    said = shell("train_gen.py", *GEN, "--steps 2 --data", data, "--tokenizer", out / "vq/model.pt",
                 "--out", out / "gen")
    assert f"next: python sample.py --ckpt {out}/gen/model.pt" in said
    said = shell("sample.py --num 13 --batch 5 --device cpu --ckpt", out / "gen/model.pt", "--npz", out / "a.npz",
                 "--out", out / "a.png")
    assert "wrote " in said and "guidance 1.5" in said
    return out


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The same on a folder of images, with mirror images and the other switches, in this process."""
    out = tmp_path_factory.mktemp("folder")
    flags = ["--steps 3 --save-every 2 --data", draw_folder(out / "data"), "--out"]
    run(train_vq, *VQ, "--no-bias --no-weight --flip", *flags, out / "vq")
    run(train_gen, *GEN, "--head linear --bottleneck --tokenizer", out / "vq/model.pt", *flags, out / "gen")
    return out


@pytest.fixture
def training(folder):
    scripts = {"vq": train_vq, "gen": train_gen}
    flags = {"vq": VQ, "gen": [*GEN, "--tokenizer", folder / "vq/model.pt"]}
    return lambda stage, *more: (scripts[stage], words([*flags[stage], "--data", folder / "data", *more]))


@pytest.fixture
def in_float32(monkeypatch):
    """In bfloat16 another batch may round to another code."""
    for module in (rdpm, train_vq, train_gen):
        monkeypatch.setattr(module, "autocast", lambda device: torch.autocast("cpu", enabled=False))


@pytest.mark.parametrize("stage", ["vq", "gen"])
def test_what_trainings_write(stage, shapes, folder):
    names = ["grid-000002.png", "log.jsonl", "model.pt", "state.pt"]
    assert sorted(file.name for file in (shapes / stage).iterdir() if file.suffix != ".npy") == names
    grids = sorted((folder / stage).glob("grid*"))
    assert [file.name for file in grids] == ["grid-000002.png", "grid-000003.png"]
    first, *_ = records(shapes / stage)
    assert first["command"].startswith(f"train_{stage}.py") and first["torch"] == torch.__version__
    assert first["world"] == 1 and first["args"]["batch"] == 4
    assert logged(shapes / stage, "step")[:2] == [1, 2]
    assert all(math.isfinite(x) for key in ("loss", "lr", "grad_norm") for x in logged(shapes / stage, key))


def test_what_the_tokenizers_training_logs(shapes, folder):
    evaluated, = (record for record in records(shapes / "vq") if "psnr" in record)
    assert 0 < evaluated["psnr"] < 50 and len(evaluated["usage_t"]) == 3 and evaluated["latent_error"] > 0
    for record in records(folder / "vq")[1:3]:
        close(record["loss"], record["recon"] + 0.25 * record["quant"])
        close(record["quant"], 1.25 * sum(record["error_t"]))  # --no-weight, two terms
        close(record["residual_t"][0], 1, 1e-2)                # z_1 = v is normalised
        assert len(record["residual_t"]) == len(record["error_t"]) == 3


def test_a_generators_file_holds_statistics_of_classes_where_they_are_used(shapes, folder):
    (cached,) = (shapes / "vq").glob("latents-*.npy")
    v = np.load(cached).astype(float)
    labels = rdpm.load_data(str(shapes / "data"), 32, True).labels
    model, *_ = rdpm.load_generator(shapes / "gen/model.pt")
    assert model.config == GeneratorConfig(1, 10, head="codebook", patch=2, statistics=True) and len(v) == 90
    for row in range(11):
        close(model.class_mean[row], v[labels == row if row < 10 else labels >= 0].mean(0), 2e-3)
    rest = (v - model.class_mean[torch.from_numpy(labels)].numpy()).reshape(90, -1)
    close(model.class_axes.T @ model.class_axes, rest.T @ rest / 90, 3e-3)
    linear = torch.load(folder / "gen/model.pt", weights_only=True)["model"]
    assert not [name for name in linear if name.startswith("class_")]


def test_optimizers_and_averaged_weights(folder):
    """Adam (0.5, 0.9); AdamW (0.9, 0.95) with 0.03 on matrices; model.pt holds the EMA weights."""
    model, tokenizer, classes, _ = rdpm.load_generator(folder / "gen/model.pt")
    assert classes == NAMES and model.config == GeneratorConfig(1, 3, bottleneck=True, patch=2)
    assert tokenizer.quantizer.bias is None and tokenizer.config.weight is False and tokenizer.config.flip is True
    for name in ("optimizer", "optimizer_d"):
        group, = modules(folder / "vq")[name]["param_groups"]
        assert group["betas"] == (0.5, 0.9) and group["weight_decay"] == 0
    gen = modules(folder / "gen")
    matrices, others = gen["optimizer"]["param_groups"]
    assert (matrices["weight_decay"], others["weight_decay"]) == (0.03, 0)
    assert matrices["betas"] == others["betas"] == (0.9, 0.95)
    assert len(matrices["params"]) == sum(weight.ndim > 1 for weight in model.parameters())
    written = torch.load(folder / "gen/model.pt", weights_only=True)["model"]
    assert all(same(written[name], weight.half()) for name, weight in gen["ema"].items())
    assert not same(gen["ema"]["head.project.weight"], gen["model"]["head.project.weight"])


def test_size_and_padding_are_the_tokenizers(tmp_path, capsys):
    """train_gen.py and sample.py take them from its file, whatever their preset; the next command can be pasted."""
    data = draw_folder(tmp_path / "my data", size=12)
    vq = tmp_path / "my run"
    run(train_vq, *VQ, "--preset mnist --image-size 16 --steps 1 --data", data, "--out", vq)
    command = f"next: python train_gen.py --preset mnist --data '{data}' --tokenizer '{vq}/model.pt'\n"
    assert command in capsys.readouterr().out
    run(train_gen, *GEN, "--steps 1 --data", data, "--tokenizer", vq / "model.pt", "--out", tmp_path / "gen")
    cached, = vq.glob("latents-*.npy")
    images = rdpm.load_data(str(data), 12, train=True)
    x = np.stack([np.pad(images[i][0], ((0, 0), (2, 2), (2, 2))) for i in range(len(images))])
    with torch.no_grad():
        v = rdpm.load_tokenizer(vq / "model.pt").encoder(rdpm.to_float(torch.from_numpy(x)))
    assert (v - torch.from_numpy(np.load(cached))).abs().mean() < 0.03
    run(sample, "--num 2 --device cpu --ckpt", tmp_path / "gen/model.pt", "--out", tmp_path / "images")
    assert [Image.open(tmp_path / f"images/00000{i}.png").size for i in (0, 1)] == [(16, 16)] * 2


def test_fresh_and_cached_latents_train_alike(folder, tmp_path):
    flags = [*GEN, "--steps 1 --data", folder / "data", "--tokenizer", folder / "vq/model.pt", "--latents", tmp_path]
    for name in ("fresh", "cached"):
        run(train_gen, *flags, "--out", tmp_path / name)
    assert len(list(tmp_path.glob("latents-*"))) == 1
    assert same(modules(tmp_path / "fresh"), modules(tmp_path / "cached"))


def presets_flags(preset: str) -> tuple[dict, dict]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", "--preset", preset])
        vq = vars(train_vq.parse_args())
        patch.setattr(sys, "argv", ["train.py", "--preset", preset, "--tokenizer", __file__])
        return vq, vars(train_gen.parse_args())


def test_the_imagenet_preset_is_the_papers():
    vq, gen = presets_flags("imagenet")
    assert vq | {"K": 4096, "d": 32, "T": 10, "schedule": "pow", "phi": 0.75, "weight": True, "bias": True,
                 "image_size": 256, "lr": 4e-5, "lr_final": 1.0, "batch": 128, "epochs": 10, "warmup": None,
                 "perceptual": 1.0, "gan": 0.75, "flip": True, "pad": False, "layer_norm": "token"} == vq
    assert gen | {"depth": 12, "lr": 4e-4, "lr_final": 0.1, "batch": 1024, "epochs": 250, "warmup": 1000,
                  "ema": 0.9999, "head": "linear", "patch": 1} == gen
    assert GeneratorConfig().label_drop == 0.1


def test_the_cifar10_preset_is_the_one_of_the_reported_run():
    vq, gen = presets_flags("cifar10")
    assert vq | {"K": 512, "d": 4, "T": 10, "schedule": "sin", "weight": True, "bias": True, "image_size": 32,
                 "channels": 32, "multipliers": (1, 2), "res_blocks": 1, "layer_norm": "image", "flip": True,
                 "pad": False, "lr": 1e-3, "lr_final": 0.02, "batch": 32, "epochs": 6, "warmup": 100,
                 "perceptual": 0.0, "gan": 0.0, "data": "cifar10", "stop_gradients": True} == vq
    assert gen | {"depth": 4, "head": "codebook", "patch": 2, "lr": 1e-3, "lr_final": 0.05, "batch": 128,
                  "epochs": 240, "warmup": 500, "ema": 0.9995, "data": "cifar10"} == gen
    sampling = Sampling(3.5, "constant", 5, skip=4, draft=1.2)
    assert Sampling(**rdpm.PRESETS["cifar10"]["sampling"]) == sampling.scaled(10) == sampling


class Descent(torch.optim.SGD):
    def __init__(self, weights, lr, betas, fused):
        groups = [{"params": group["params"] if isinstance(group, dict) else [group]} for group in weights]
        super().__init__(groups, lr, fused=True)


@pytest.fixture
def preset(monkeypatch):
    """Changes what no flag changes."""
    def change(stage, **values):
        for name, value in values.items():
            monkeypatch.setitem(rdpm.PRESETS["shapes"][stage], name, value)
    return change


def test_steps_with_perceptual_and_adversarial_loss_by_hand(training, tmp_path, monkeypatch, in_float32, preset):
    """SGD moves both networks along Eq. (5)'s gradients, written out here; half an epoch (27 images) of warm-up."""
    seen = []
    losses = rdpm.tokenizer_losses
    def record(net, real, eps, lpips, kappa, discriminator, *args):
        seen.append((real, eps, *copy.deepcopy((net, discriminator))))
        return losses(net, real, eps, lpips, kappa, discriminator, *args)
    monkeypatch.setattr(rdpm, "tokenizer_losses", record)
    monkeypatch.setattr(torch.optim, "Adam", Descent)
    monkeypatch.setattr(rdpm, "pretrained", lambda *_: None)
    monkeypatch.setattr(rdpm, "LPIPS", lambda *_: nn.L1Loss())
    preset("train_vq", warmup=None, lr_final=1.0)
    eta = 0.6
    kappa = 0.3
    script, flags = training("vq", "--lr 0.03 --steps 5 --gan", eta, "--perceptual", kappa)
    run(script, *flags, "--out", tmp_path)
    close(logged(tmp_path, "lr"), [0.01, 0.02, 0.03, 0.03, 0.03])
    x, eps, tokenizer, discriminator = seen[0]
    x_rec, _, quantized = tokenizer(x, eps)
    nll = (x - x_rec).square().mean() + kappa * (x - x_rec).abs().mean()
    fooled = -discriminator(x_rec).mean()
    last = tokenizer.decoder.layers[-1].weight
    norms = [torch.autograd.grad(loss, last, retain_graph=True)[0].norm() for loss in (nll, fooled)]
    loss = nll + 0.25 * quantized.loss + eta * (norms[0] / (norms[1] + 1e-4)) * fooled
    real = discriminator(x)
    fake = discriminator(x_rec.detach())
    hinge = ((1 - real).clamp(min=0).mean() + (1 + fake).clamp(min=0).mean()) / 2
    for before, moved, its_loss in ((tokenizer, seen[1][2], loss), (discriminator, seen[1][3], hinge)):
        gradients = torch.autograd.grad(its_loss, list(before.parameters()))
        for (name, weight), new, gradient in zip(before.named_parameters(), moved.parameters(), gradients, strict=True):
            assert gradient.abs().max() > 0 or "bias" in name
            close((weight - new) / 0.01, gradient, 1e-4)
    close(logged(tmp_path)[0], loss.item(), 1e-4)
    close(logged(tmp_path, "discriminator")[0], hinge.item(), 1e-4)


def test_the_adversarial_weight_is_limited_and_a_number():
    last = torch.ones(2, requires_grad=True)
    weight = rdpm.adaptive_weight(last.sum(), (0 * last).sum(), last)
    assert weight == 1e4 and not weight.requires_grad


def test_clipped_steps_and_their_ema_by_hand(training, tmp_path, monkeypatch, preset):
    """Gradients are clipped to norm 1; the decay is (1 + step) / (10 + step) at first; its weights draw the grid."""
    clip = torch.nn.utils.clip_grad_norm_
    draw = rdpm.draw_images
    seen = []
    drawn = []
    def record(weights, norm):
        weights = list(weights)
        for weight in weights:
            weight.grad *= 1000
        seen.append([(weight.detach().clone(), weight.grad.clone()) for weight in weights])
        return clip(weights, norm)
    def record_drawn(ema, *args):
        drawn.append(ema.head.project.bias.clone())
        return draw(ema, *args)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", record)
    monkeypatch.setattr(rdpm, "draw_images", record_drawn)
    monkeypatch.setattr(torch.optim, "AdamW", Descent)
    preset("train_gen", lr_final=1.0)
    preset("sampling", tau=2.0, skip=4, guidance_from=5)  # of T = 10
    script, flags = training("gen", "--lr 1 --warmup 0 --steps 3 --ema 0.2")
    run(script, *flags, "--out", tmp_path)
    model, _, _, sampling = rdpm.load_generator(tmp_path / "model.pt")
    after = modules(tmp_path)
    totals = [sum(gradient.square().sum() for _, gradient in step).sqrt() for step in seen]
    for name, *steps in zip(dict(model.named_parameters()), *seen, strict=True):
        ema = steps[0][0]
        news = [weight for weight, _ in steps[1:]] + [after["model"][name]]
        for (weight, gradient), total, new, decay in zip(steps, totals, news, (0.1, 2 / 11, 0.2), strict=True):
            close(new, weight - gradient / total)
            ema = decay * ema + (1 - decay) * new
        close(after["ema"][name], ema)
    assert min(totals) > 10 and sampling == Sampling(tau=2.0, skip=1, guidance_from=2)  # T = 3
    assert same(drawn[0], after["ema"]["head.project.bias"])
    assert not same(drawn[0], after["model"]["head.project.bias"])


def test_generator_is_trained_with_the_noise_its_codes_came_from(training, folder, tmp_path, monkeypatch):
    """Eq. (6) gets eps_t and z'_{t-1} of each image's own t, which is uniform; a tenth have no class; Eq. (7)."""
    def calls_of(owner, name):
        calls = []
        function = getattr(owner, name)
        def call(self, *args):
            calls.append((*args, function(self, *args)))
            return calls[-1][-1]
        monkeypatch.setattr(owner, name, call)
        return calls
    passes = calls_of(RDPM, "forward")
    inputs = calls_of(rdpm.NoisyResidualQuantizer, "training_input")
    script, flags = training("gen", "--batch 50 --steps 8 --seed 3")
    run(script, *flags, "--out", tmp_path)
    tokenizer = rdpm.load_tokenizer(folder / "vq/model.pt")
    ts = []
    dropped = 0
    for step, (v, eps, t, (z_sum, codes)) in enumerate(inputs):
        seen_eps, seen_y, seen_t, seen_sum, logits = passes[step]
        first = 2**32 + 50 * step
        assert same(eps, noise(tokenizer, 3, range(first, first + 50)))
        assert same(seen_eps, torch.stack([eps[t[i] - 1, i] for i in range(50)]))
        assert same(seen_t, t) and same(seen_sum, z_sum) and v.shape == (50, 64, 4)
        p = logits.detach().double().softmax(-1).gather(2, codes[..., None])
        close(logged(tmp_path)[step], -p.log().mean(), 1e-4)
        right = (logits.argmax(-1) == codes).double().mean(1)
        for s, accuracy in enumerate(logged(tmp_path, "accuracy_t")[step], 1):
            assert accuracy is None if s not in t else accuracy == pytest.approx(right[t == s].mean().item(), abs=1e-5)
        ts += t.tolist()
        dropped += int((seen_y == CLASSES).sum())
    cached, = folder.glob("vq/latents-*.npy")
    mirrored = torch.from_numpy(np.load(cached)[27:]).float()
    assert 10 < sum((mirrored == x).all(2).all(1).any() for x in v) < 40
    counts = np.bincount(ts, minlength=4)
    assert len(inputs) == 8 and counts[0] == 0 and scipy.stats.chisquare(counts[1:]).pvalue > 1e-3
    assert scipy.stats.binomtest(dropped, 400, 0.1).pvalue > 1e-3


@pytest.mark.parametrize(("stage", "more", "number"), [
    ("vq", "--gan 0.75", signal.SIGTERM), ("vq", "", signal.SIGHUP), ("gen", "", signal.SIGINT),
    ("gen", "--head linear", signal.SIGTERM)])
def test_interrupted_runs_continue_bit_for_bit(stage, more, number, training, tmp_path, monkeypatch, capsys):
    """Four steps; and two, a crash when state.pt is written and model.pt is not, a signal in the third: the same."""
    a = tmp_path / "a"
    b = tmp_path / "b"
    script, flags = training(stage, more, "--steps 4 --save-every 2")
    run(script, *flags, "--out", a)
    flags += ["--out", b, "--resume"]
    replacing = rdpm.replacing
    rate = rdpm.learning_rate
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
    assert signal.getsignal(number) == (signal.SIG_DFL if number == signal.SIGINT else signal.SIG_IGN)
    run(script, *flags)
    assert state(b)["step"] == 4 and same(modules(a), modules(b)) and logged(a) == logged(b)
    for other in ("--T 4", "--flip") if stage == "vq" else ("--depth 2", "--seed 1", "--batch 2"):
        with pytest.raises(UserError, match="was trained with"):
            run(script, *flags, other)
    (grid := b / "grid-000004.png").unlink()
    written = (b / "model.pt").read_bytes()
    for _ in range(2):
        (b / "model.pt").write_bytes(b"of an earlier step")
        run(script, *flags)
        assert "finished: " in capsys.readouterr().out and grid.exists()
        assert same(modules(a), modules(b)) and (b / "model.pt").read_bytes() == written


def test_images_that_have_gone_are_counted_and_other_classes_refused(tmp_path, capfd, failing):
    data = draw_folder(tmp_path / "data", 45)
    flags = [*VQ, "--data", data, "--out", tmp_path / "a", "--resume --steps"]
    run(train_vq, *flags, 1)
    (data / "bar/001.png").unlink()
    capfd.readouterr()
    run(train_vq, *flags, 2)
    said = capfd.readouterr().err
    assert "--resume: 1 images have come or gone" in said and "41 images of 3 classes" in said
    (data / "bar").rename(data / "baz")
    line = failing(train_vq, *flags, 3)
    assert "was trained with classes = ['arrow', 'bar', 'crescent'], not ['arrow', 'baz', 'crescent']" in line


def test_an_unreadable_image_in_the_third_step_costs_no_step(tmp_path, failing):
    data = draw_folder(tmp_path / "data")
    flags = [*VQ, "--data", data, "--steps 4 --out"]
    run(train_vq, *flags, tmp_path / "a")
    *_, third = rdpm.global_batches(27, 4, range(3), 0, False)
    source = rdpm.load_data(str(data), 32, True)
    bad = Path(source.source.path(source.indices[third[1]]))
    good = bad.read_bytes()
    bad.write_bytes(good[:100])
    line = failing(train_vq, *flags, tmp_path / "b")
    assert f"{bad}: not a readable image" in line and state(tmp_path / "b")["step"] == 2
    assert torch.load(tmp_path / "b/model.pt", weights_only=True)["step"] == 2
    bad.write_bytes(good)
    run(train_vq, *flags, tmp_path / "b", "--resume")
    assert same(modules(tmp_path / "a"), modules(tmp_path / "b"))


@pytest.mark.parametrize(("stage", "own"), [("vq", True), ("gen", True), ("gen", False)])
def test_steps_that_are_not_finite_are_skipped(stage, own, training, tmp_path, monkeypatch, preset):
    """NaN in the noise: as if there had been no step. own: optimizers look at found_inf by themselves (MPS' don't)."""
    more = "--warmup 0 --save-every 1 --steps 3 --log-every 2"
    script, flags = training(stage, more, "--gan 0.75" if stage == "vq" else "")
    preset(f"train_{stage}", lr_final=1.0)
    draw = Tokenizer.noise
    states = []
    bad = [1]
    def damaged(self, streams):
        eps = draw(self, streams)
        return eps.index_fill(1, torch.tensor([0]), math.nan) if len(states) in bad else eps
    def keep(self):
        states.append(copy.deepcopy({name: m.state_dict() for name, m in self.modules.items() if name != "ema"}))
    monkeypatch.setattr(Tokenizer, "noise", damaged)
    monkeypatch.setattr(rdpm.Run, "save", keep)
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


def test_a_logged_value_that_is_not_finite_skips_the_step_too(training, tmp_path, monkeypatch):
    """Its gradients may be finite: a loss of a million million, or of a perceptual network that overflows."""
    losses = rdpm.tokenizer_losses
    def damaged(*args):
        loss, values, x_rec = losses(*args)
        return loss, values | {"quant": values["quant"] * (math.inf if len(seen) == 1 else 1)}, x_rec
    seen = []
    step = rdpm.Run.take_step
    monkeypatch.setattr(rdpm, "tokenizer_losses", damaged)
    monkeypatch.setattr(rdpm.Run, "take_step", lambda self, optimizers, *norms: (
        step(self, optimizers, *norms), seen.append(copy.deepcopy(self.modules["tokenizer"].state_dict()))))
    script, flags = training("vq", "--steps 3")
    run(script, *flags, "--out", tmp_path)
    assert same(seen[0], seen[1]) and not same(seen[1], seen[2])
    assert logged(tmp_path, "skipped_steps") == [0, 1, 0]
    assert logged(tmp_path, "quant")[1] is None


def as_rank(rank: str, port: str, command: list[str], out: Path) -> None:
    """`python *command` as one of two ranks, in a new process, with stdout and stderr in files."""
    for kind, stream in (("stdout", 1), ("stderr", 2)):
        os.dup2(os.open(out / (rank + kind), os.O_CREAT | os.O_TRUNC | os.O_WRONLY), stream)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test",
                   "WORLD_SIZE": "2", "RANK": rank, "LOCAL_RANK": rank}
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
        ranks = [context.Process(target=as_rank, args=(rank, port, words(command), tmp_path)) for rank in "01"]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join(100)
            rank.kill()  # if it hangs, or pytest would wait for it
        said = [(tmp_path / f"{rank}stderr").read_text() for rank in "01"]
        assert [rank.exitcode for rank in ranks] == list(codes), said
    return start


DRIVER = f"""
import json, os, pathlib, signal, sys
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
exchanged = []
forward = torch.nn.parallel.DistributedDataParallel.forward
def recorded(self, *inputs):
    exchanged.append(self.require_backward_grad_sync)
    return forward(self, *inputs)
torch.nn.parallel.DistributedDataParallel.forward = recorded
def main():
    script.main()
    out = sys.argv[sys.argv.index("--out") + 1]
    pathlib.Path(out, "exchanged" + os.environ["RANK"]).write_text(json.dumps(exchanged))
rdpm.run_main(main)
"""


@pytest.mark.parametrize("stage", ["vq", "gen"])
def test_chunks_and_two_ranks_train_as_one(stage, training, on_two_ranks, tmp_path, in_float32):
    """Batches of six in one part; in four; and in two on each of two ranks, once through torchrun."""
    (driver := tmp_path / "driver.py").write_text(DRIVER)
    script, flags = training(stage, "--steps 6 --batch 6 --seed 1")
    run(script, *flags, "--out", tmp_path / "one")
    run(script, *flags, "--accum 4 --out", tmp_path / "four")
    command = [driver, script.__name__, "none", *flags, "--accum 2 --out"]
    if stage == "vq":
        on_two_ranks(*command, tmp_path / "two")
    else:
        shell("-m torch.distributed.run --standalone --nproc_per_node=2", *command, tmp_path / "two")
    assert records(tmp_path / "two")[0]["world"] == 2
    for name, key in itertools.product(("four", "two"), ("loss", "grad_norm", "psnr")):
        close(logged(tmp_path / name, key), logged(tmp_path / "one", key), 1e-5 if key == "loss" else 1e-3)
    for rank in "01":  # gradients are exchanged after the second part alone
        assert json.loads((tmp_path / "two" / f"exchanged{rank}").read_text()) == [False, True] * 6


def test_a_signal_to_one_of_two_ranks_stops_both_after_the_same_step(training, on_two_ranks, tmp_path):
    (driver := tmp_path / "driver.py").write_text(DRIVER)
    script, flags = training("gen", "--steps 12 --log-every 5 --out")
    on_two_ranks(driver, script.__name__, "none", *flags, tmp_path / "whole")
    on_two_ranks(driver, script.__name__, "signal", *flags, tmp_path / "stopped", codes=(75, 75))
    assert "saved after step 10" in (tmp_path / "0stderr").read_text()
    on_two_ranks(driver, script.__name__, "none", *flags, tmp_path / "stopped", "--resume")
    assert same(modules(tmp_path / "stopped"), modules(tmp_path / "whole"))


def test_two_ranks_sample_as_one(shapes, on_two_ranks, tmp_path):
    flags = ["--num 7 --batch 2 --device cpu --ckpt", shapes / "gen/model.pt"]
    run(sample, *flags, "--npz", tmp_path / "1.npz", "--out", tmp_path / "1.png")
    on_two_ranks("sample.py", *flags, "--npz", tmp_path / "2.npz", "--out", tmp_path / "2.png")
    on_two_ranks("sample.py", *flags, "--out", tmp_path / "images")
    assert not (tmp_path / "1stdout").read_text() and not list(tmp_path.glob("*unfinished*"))
    one, two = (np.load(tmp_path / file) for file in ("1.npz", "2.npz"))
    assert same(dict(one), dict(two))
    assert same(*(Image.open(tmp_path / file) for file in ("1.png", "2.png")))
    assert same(one["arr_0"], [np.array(Image.open(file)) for file in sorted((tmp_path / "images").iterdir())])


@pytest.fixture
def draw(shapes, tmp_path):
    """sample.py on the codebook-head checkpoint: runs it, and returns the images of its picture, (N, 32, 32, 3)."""
    def draw(*flags, ckpt=shapes / "gen/model.pt"):
        # One image a batch: bf16 products of another batch size may differ in their last bit.
        run(sample, "--device cpu --seed 5 --batch 1 --ckpt", ckpt, "--out", tmp_path / "a.png", *flags)
        grid = np.array(Image.open(tmp_path / "a.png").convert("RGB"))[::3, ::3]
        if len(grid) == 32:  # a single image has no frame
            return grid[None]
        corners = itertools.product(range(1, len(grid), 33), range(1, grid.shape[1], 33))
        return np.stack([grid[row:row + 32, column:column + 32] for row, column in corners])
    return draw


def test_sampling_writes_picture_and_npz(shapes):
    arrays = np.load(shapes / "a.npz")
    model, _, classes, defaults = rdpm.load_generator(shapes / "gen/model.pt")
    assert arrays["arr_0"].shape == (13, 32, 32, 3) and arrays["arr_0"].dtype == np.uint8
    assert arrays["arr_1"].tolist() == [*range(10), 0, 1, 2] and arrays["classes"].tolist() == classes
    assert Image.open(shapes / "a.png").size == (10 * 33 * 3 + 3, 2 * 33 * 3 + 3)
    assert defaults == Sampling()


@pytest.mark.parametrize("gumbel", [True, False])
def test_flags_reach_the_sampler_and_images_a_folder(gumbel, shapes, tmp_path):
    flags = ["--num 4 --device cpu --classes ring 3 --seed 5 --guidance 3 --guidance-schedule constant",
             "--tau 2" if gumbel else "--no-gumbel"]
    run(sample, "--ckpt", shapes / "gen/model.pt", *flags, "--npz", tmp_path / "a.npz", "--out", tmp_path / "images")
    model, tokenizer, *_ = rdpm.load_generator(shapes / "gen/model.pt")
    settings = Sampling(3.0, "constant", tau=2.0 if gumbel else 1.0, gumbel=gumbel)
    with rdpm.autocast(CPU):
        images = rdpm.sample(model, tokenizer, torch.tensor([6, 3, 6, 3]), 5, range(4), settings)
    arrays = np.load(tmp_path / "a.npz")
    assert same(arrays["arr_0"], rdpm.to_uint8(images).permute(0, 2, 3, 1))
    assert arrays["arr_1"].tolist() == [6, 3, 6, 3]
    for i, image in enumerate(arrays["arr_0"]):
        assert same(Image.open(tmp_path / f"images/{i:06d}.png"), image)


def test_classes_are_listed(shapes, capsys):
    run(sample, "--list-classes --device cpu --ckpt", shapes / "gen/model.pt")
    assert capsys.readouterr().out.splitlines() == [f"{i} {name}" for i, name in enumerate(rdpm.SHAPES)]


def test_samplings_beside_each_other_share_no_file_and_leave_none(draw, tmp_path, shapes, monkeypatch):
    """a.png while a.webp is drawn; then an error, and Ctrl-C, in the middle."""
    expected = draw("--num 2")
    images = rdpm.draw_images
    def meanwhile(*args):
        monkeypatch.setattr(rdpm, "draw_images", images)
        assert same(draw("--num 2"), expected)
        return images(*args)
    monkeypatch.setattr(rdpm, "draw_images", meanwhile)
    run(sample, "--device cpu --seed 5 --num 2 --ckpt", shapes / "gen/model.pt", "--out", tmp_path / "a.webp")
    for error in (OSError, KeyboardInterrupt):
        def broken(*_, error=error):
            raise error
        monkeypatch.setattr(rdpm, "draw_images", broken)
        with pytest.raises(error):
            draw("--num 2")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.png", "a.webp"]
    assert len({rdpm.beside("a.png") for _ in range(9)}) == 9


def test_layout_goes_from_samples_to_the_reconstruction(draw, shapes, tmp_path):
    rdpm.Shapes(32, train=True)[8][0].save(ref := tmp_path / "ref.png")
    original = np.array(Image.open(ref))
    plain = [draw("--num 1 --classes", name)[0] for name in ("ring", "disc")]
    _, tokenizer, _, _ = rdpm.load_generator(shapes / "gen/model.pt")
    with rdpm.autocast(CPU), torch.no_grad():
        x = rdpm.to_float(torch.from_numpy(original).permute(2, 0, 1)[None])
        x_rec, _, _ = tokenizer(x, noise(tokenizer, 5, [0]))
    reconstruction = rdpm.to_uint8(x_rec)[0].permute(1, 2, 0).numpy()
    cells = draw("--layout-steps 0 2 3 --classes ring disc --layout", ref).reshape(3, 3, 32, 32, 3)
    # bfloat16 rounds otherwise in another batch: nearly all pixels are equal.
    assert (cells[:, 0] == original).all() and (cells[0, 1:] == plain).mean() > 0.9
    assert (cells[2, 1:] == reconstruction).mean() > 0.9 and (cells[1, 1:] == reconstruction).mean() < 0.5


def test_edit_redraws_the_mask(draw, tmp_path):
    rdpm.Shapes(32, train=True)[8][0].save(ref := tmp_path / "ref.png")
    original = np.array(Image.open(ref))
    mask = np.zeros((32, 32), np.uint8)
    mask[9:17, 3:30] = 255
    inside = mask > 0
    Image.fromarray(mask).save(tmp_path / "mask.png")
    flags = ["--num 2 --edit", ref, "--mask", tmp_path / "mask.png"]
    nobody, ring = (draw(*flags, more) for more in ("", "--classes ring"))
    for cells in (nobody, ring):
        assert same(cells[0], original) and (cells[1][inside] == 128).all()
        assert all(same(image[~inside], original[~inside]) for image in cells[1:])
        assert not same(cells[2], cells[3])
    assert not same(nobody, ring)


def test_strips_end_with_the_sample(draw, folder):
    plain = draw("--num 2")
    strip = draw("--num 2 --show-steps").reshape(2, 2, 3, 32, 32, 3)  # image, raw or preview, t
    assert same(strip[:, 0, -1], plain) and same(strip[:, 1, -1], plain)
    assert not same(strip[:, 0, 0], strip[:, 1, 0])
    linear = {"ckpt": folder / "gen/model.pt"}  # has no previews
    assert same(draw("--num 2 --show-steps", **linear)[2::3], draw("--num 2", **linear))


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


def write_pictures(folder: Path, images, suffix="png", **how) -> None:
    folder.mkdir(parents=True)
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i:06}.{suffix}", **how)


def damage_checkpoints(root: Path) -> None:
    """Copies of vq.pt and gen.pt with one fault each, and files that are none."""
    class Hostile:
        def __reduce__(self):
            return open, (str(root / "appeared"), "w")
    for name, weight, size in (("vq", "quantizer.codebook", "K"), ("gen", "embed.weight", "depth")):
        contents = torch.load(root / f"{name}.pt", weights_only=True)
        stored = contents["model"][weight].numpy().tobytes()
        contents["config"][size] += 1
        torch.save(contents, root / f"misfit-{name}.pt")
        contents["config"][size] -= 1
        sound = copy.deepcopy(contents)
        contents["model"][weight][0, 0] = math.nan if name == "vq" else math.inf
        torch.save(contents, root / f"nan-{name}.pt")
        whole = bytearray((root / f"{name}.pt").read_bytes())
        whole[whole.index(stored) + 9] ^= 1
        (root / f"flipped-{name}.pt").write_bytes(whole)
    (root / "half.pt").write_bytes(whole[:len(whole) // 2])
    (root / "empty.pt").write_bytes(b"")
    torch.save(sound | {"sampling": sound["sampling"] | {"steps": 9}}, root / "unknown.pt")
    del sound["classes"]
    torch.save(sound, root / "bare.pt")
    torch.save({"kind": "generator", "config": Hostile()}, root / "hostile.pt")
    (root / "raw.pt").write_bytes(pickle.dumps({"kind": "tokenizer", "config": Hostile()}, protocol=2))
    torch.save([1, 2], root / "list.pt")


@pytest.fixture(scope="module")
def pictures(folder, shapes, tmp_path_factory) -> Path:
    """Sets of images, and what people give by mistake or by malice, beside good checkpoints."""
    root = tmp_path_factory.mktemp("pictures")
    for name, target in {"data": folder / "data", "vq.pt": folder / "vq/model.pt", "gen.pt": shapes / "gen/model.pt",
                         "linear.pt": folder / "gen/model.pt", "shapes-vq.pt": shapes / "vq/model.pt"}.items():
        (root / name).symlink_to(target)
    damage_checkpoints(root)
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
            "mixed": [*x[:4], x[4, :20]], "rgba": np.concatenate([x, x[..., :1]], axis=3), "gap": x,
            "few/a": x[:1], "few/b": x[:1], "tree/train/a": x[:5], "tree/train/b": x[5:],
            "one/arrow": [*x, *x, *x]}.items():
        write_pictures(root / name, images)
    write_pictures(root / "tree/test/a", x[::2], "jpg")
    write_pictures(root / "tree/test/b", colour, "jpg")
    write_pictures(root / "renamed", x, format="JPEG")
    (root / "gap/000003.png").unlink()
    for name, array in {"good": x, "single": x[:1], "wide": x.repeat(2, 2), "float": x / np.float32(127.5) - 1,
                        "objects": np.array([1, "a"], object)}.items():
        np.savez(root / f"{name}.npz", arr_0=array)
    np.savez_compressed(root / "compressed.npz", arr_0=x)
    mu = np.zeros(2048)
    sigma = np.eye(2048)
    np.savez(root / "statistics.npz", mu=mu, sigma=sigma, weights="random-test")
    np.savez(root / "adm.npz", mu=mu, sigma=sigma)
    np.savez(root / "nan.npz", mu=mu * np.nan, sigma=sigma, weights="random-test")
    return root


BAD_INPUT = r"""
train_vq --data nowhere :: --data nowhere: no such folder; give one with
train_vq --data empty :: empty: no image in it; give each class a folder
train_vq --data few :: --data few: no class has two images; give more
train_vq --data good :: good: its images lie in no class's folder; give each class one
train_vq --data torn --workers 1 :: torn/\w+/\d+.png: not a readable image .*; repair or remove it
train_vq --lr nan :: --lr: nan is not above 0
train_vq --seed -1 :: argument --seed: -1 is not from 0 up
train_vq --K a :: --K: invalid number value: 'a'
train_vq --K 1000000000 :: argument --K: 1000000000 is not above 0, and below 10000000
train_vq --K 9000000 --dim 100000 :: allocate memory
train_vq --phi 2 :: --phi 2.0: must be at most 1
train_vq --image-size 30 :: --image-size: must be a multiple of 4
train_vq --image-size 4 :: at least 8
train_vq --image-size 16 --gan 1 :: --image-size 16: PatchGAN needs at least 24
train_vq --accum 5 --data data :: --batch 4: must give each of 1 devices as many, --accum or more
train_vq --data data --init gen.pt :: gen.pt: holds a generator, not a tokenizer
train_vq --data data --init vq.pt :: --init vq.pt: .* give the flags it had
train_vq --data data --init shapes-vq.pt --no-bias :: --init shapes-vq.pt: .* give the flags it had
train_vq --data data --init nan-vq.pt --no-bias :: nan-vq.pt: there is NaN
train_gen --data data :: --tokenizer runs/shapes-vq/model.pt: no such file; python train_vq.py
train_gen --data data --tokenizer vq.pt --patch 3 :: --patch 3: does not divide the 8 x 8 tokens
train_gen --data data --tokenizer vq.pt --init gen.pt --depth 2 :: --init gen.pt: .* give the flags it had
train_gen --data data --tokenizer vq.pt --fid-ref good.npz --fid-num 9 :: --fid-num 9: N = 9
train_gen --tokenizer gen.pt :: gen.pt: holds a generator, not a tokenizer
train_gen --tokenizer misfit-vq.pt :: misfit-vq.pt: the Tokenizer's weights do not fit its config
train_gen --tokenizer nan-vq.pt :: nan-vq.pt: there is NaN or infinity among the Tokenizer's
train_gen --tokenizer flipped-vq.pt :: flipped-vq.pt: .* is damaged .its CRC-32 is wrong.; copy the file again
train_gen --tokenizer raw.pt :: raw.pt: cannot be read as a checkpoint
train_gen --tokenizer empty.pt :: empty.pt: cannot be read as a checkpoint
train_gen --tokenizer half.pt :: half.pt: cannot be read as a checkpoint
sample --ckpt no.pt :: no.pt: no such file; give the model.pt
sample --ckpt list.pt :: list.pt: holds .*, not a generator
sample --ckpt hostile.pt :: hostile.pt: cannot be read
sample --ckpt misfit-gen.pt :: misfit-gen.pt: the RDPM's weights do not fit
sample --ckpt nan-gen.pt :: nan-gen.pt: there is NaN
sample --ckpt flipped-gen.pt :: flipped-gen.pt: .* is damaged .its CRC-32 is wrong
sample --ckpt bare.pt :: bare.pt: has no classes; train again
sample --ckpt unknown.pt :: unknown.pt: was written by other code .Sampling: steps.; train again
sample --ckpt linear.pt --fast :: --fast: this checkpoint has no class statistics
sample --ckpt gen.pt --device nonsense :: --device nonsense: cannot be used .*; give cuda, mps or cpu
sample --ckpt gen.pt --classes 10 :: class 10: not a class of this checkpoint; it has arrow, bar
sample --ckpt gen.pt --classes=-1 :: class -1: not
sample --ckpt gen.pt --out a.txt :: a.txt: must end in .*.png
sample --ckpt gen.pt --out no/a.png :: no/a.png: .* folder that can be written into
sample --ckpt gen.pt --out good :: --out good: already holds images; choose another folder
sample --ckpt gen.pt --npz a.png :: --npz a.png: must end in .npz
sample --ckpt gen.pt --npz a.npz --show-steps :: --npz: does nothing beside --show-steps; leave it out
sample --ckpt gen.pt --edit white.png --mask black.png :: --mask black.png: must be as large as white.png, white to
sample --ckpt gen.pt --edit white.png :: --edit needs --mask
sample --ckpt gen.pt --edit float.tiff --mask white.png :: float.tiff: not a readable image .mode F, of which black and
sample --ckpt gen.pt --layout white.png --layout-steps 0 4 :: --layout-steps 0 4: each must be 0 ... 3
sample --ckpt gen.pt --skip 3 :: --guidance 1.5: --skip and --guidance-from leave it no step
sample --ckpt gen.pt --fast --skip 1 :: --fast sets --skip
sample --ckpt gen.pt --no-gumbel --tau 2 :: --tau: does nothing beside --no-gumbel
fid good single.npz --allow-small :: single.npz: N = 1, but 2048 features need as many images \(4,
fid good mixed --allow-small :: mixed/000004.png: \(20, 32, 3\), not \(32, 32, 3\); .*--size N
fid good larger --allow-small :: larger: \(48, 60, 3\), not \(32, 32, 3\); .*--size N
fid good float.npz --allow-small :: float.npz: arr_0 is float32 \(9, 32, 32, 3\), but must be uint8 RGB
fid good objects.npz --allow-small :: objects.npz: arr_0 is object \(2,\), but must be uint8 RGB
fid good rgba --allow-small :: 000000.png: is PNG of mode RGBA, but samples must be uint8 RGB PNGs
fid good renamed --allow-small :: is JPEG of mode RGB
fid good gap --allow-small :: gap: images are missing or there twice, first number 3;
fid good shapes --allow-small :: shapes: give the size .*--size N
fid good statistics.npz --allow-small :: statistics.npz: holds mu, sigma, weights, but images are needed
fid good nowhere --allow-small :: no such file, or no images in it
fid good --ckpt gen.pt --num 9 :: --num 9: N = 9, .*--allow-small
fid wide.npz --ckpt gen.pt --num 9 --allow-small :: \(32, 32, 3\), not \(32, 64, 3\);
fid nan.npz good --allow-small :: nan.npz: mean and covariance must be finite
fid adm.npz good --allow-small :: adm.npz: of the network 6726825d, not random-t; use --make-ref
fid good :: give two sets
fid good good --guidance 2 :: do nothing without --ckpt
fid --make-ref good --fast :: do nothing without --ckpt
fid good good --ckpt gen.pt :: give two sets
fid good --tokenizer vq.pt --data tree :: give two sets .* rFID compares with their own reconstructions
fid --make-ref good :: --out fid.json: must end in .npz .* a folder that can be written into
"""


@pytest.mark.parametrize(("command", "message"), [line.split(" :: ") for line in BAD_INPUT.strip().splitlines()])
def test_bad_input_gets_one_line(command, message, pictures, inception, failing, monkeypatch):
    early = "give two" in message or "must end" in message
    monkeypatch.setattr(fid, "load_inception", lambda *_: pytest.fail("work began") if early else inception)
    monkeypatch.chdir(pictures)
    before = set(pictures.rglob("*"))
    script, *flags = command.split()
    common = {"train_vq": VQ, "train_gen": GEN}.get(script, ["--device cpu"])
    line = failing(globals()[script], *common, *flags)
    assert re.search(message, line), line
    new = set(pictures.rglob("*")) - before
    assert not [file for file in new if file.is_file() and file.name != "log.jsonl"]


def test_what_imagenet_holds_is_read(tmp_path):
    colour = Image.fromarray(np.linspace(0, 255, 48 * 32 * 3).astype(np.uint8).reshape(32, 48, 3))
    grey = np.array(colour.convert("L"))
    deep = Image.fromarray(grey.astype(np.uint16) * 257)
    (data := tmp_path / "train/class").mkdir(parents=True)
    for mode, kind in {"CMYK": "jpg", "L": "JPEG", "P": "png", "RGBA": "png", "I;16": "png", "1": "png"}.items():
        image = deep if mode == "I;16" else colour.convert(mode)
        path = data / f"{mode[:2]}.{kind}"
        image.save(path, format="PNG" if kind == "JPEG" else None, quality=100)
        expected = {"CMYK": colour, "I;16": colour.convert("L")}.get(mode, image).convert("RGB")
        read = rdpm.read_image(path)
        assert read.mode == "RGB" and np.abs(np.array(read, int) - np.array(expected, int)).max() <= 6, mode
    reference = fid.open_images(str(data), False, None, False, True)  # fid.py reads as training does
    for path, (x,) in zip(sorted(data.iterdir()), reference, strict=True):
        assert same(x.permute(1, 2, 0), rdpm.read_image(path))
    for name, size in (("small", (75, 75)), ("wide", (5000, 30))):
        colour.resize(size).save(data / f"{name}.jpg")
    shutil.copytree(data, tmp_path / "val/class")
    (data / "loop").symlink_to(data)
    for hidden in (data / ".thumbnails", tmp_path / "train/.cache"):
        hidden.mkdir()
        colour.save(hidden / "1.png")
    images = rdpm.load_data(str(tmp_path), 256, train=True)
    assert images.classes == ["class"] and [images[i][0].shape for i in range(len(images))] == [(3, 256, 256)] * 8


@pytest.mark.parametrize("turn", range(1, 9))
def test_a_camera_that_was_turned(turn, tmp_path):
    colour = Image.fromarray(np.linspace(0, 255, 48 * 32 * 3).astype(np.uint8).reshape(32, 48, 3))
    inverse = {6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}.get(turn, rdpm.UPRIGHT.get(turn))
    seen = colour if inverse is None else colour.transpose(inverse)
    exif = Image.Exif()
    exif[0x0112] = turn
    seen.save(tmp_path / "turned.jpg", exif=exif, quality=100)
    read = np.array(rdpm.read_image(tmp_path / "turned.jpg"), int)
    assert np.abs(read - np.array(colour, int)).mean() < 3


def test_damaged_exif_does_not_make_a_picture_unreadable(tmp_path):
    picture = Image.linear_gradient("L").convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 1
    exif[0x010e] = "a description that is longer than four bytes"
    block = exif.tobytes()
    faults = [block[:n] for n in range(7, len(block), 7)] + [block + os.urandom(50), b"Exif\0\0" + os.urandom(60)]
    faults += [block[:n] + b"\xff\xfe\xfd" + block[n + 3:] for n in range(6, len(block) - 3, 3)]
    for fault in faults:
        for suffix in ("jpg", "png", "webp"):
            picture.save(path := tmp_path / f"a.{suffix}", exif=fault)
            read = rdpm.read_image(path)
            assert sorted(read.size) == sorted(picture.size), fault


def test_a_second_run_in_the_same_folder_is_refused(training, tmp_path, failing, folder):
    code = """if True:
        import argparse, pathlib, sys, time, rdpm
        run = rdpm.Run(argparse.Namespace(out=pathlib.Path(sys.argv[1]), batch=4, accum=1, resume=True), "cpu")
        print("locked", flush=True), time.sleep(100)"""
    first = subprocess.Popen([sys.executable, "-c", code, tmp_path / "a"], cwd=HERE, stdout=subprocess.PIPE)
    assert first.stdout.readline() == b"locked\n"
    for stage in ("vq", "gen"):
        script, flags = training(stage)
        line = failing(script, *flags, "--resume --out", tmp_path / "a")
        assert f"--out {tmp_path / 'a'}: another run is writing there" in line
        before = {file: file.read_bytes() for file in (folder / stage).iterdir()}
        assert f"--out {folder / stage} already holds a run" in failing(script, *flags, "--out", folder / stage)
        assert {file: file.read_bytes() for file in (folder / stage).iterdir()} == before
    first.kill()
    first.wait()


def test_a_full_disk(tmp_path):
    path = tmp_path / "a.pt"
    for text in ("first", "before"):
        with rdpm.replacing(path) as part:
            part.write_text(text)
    message = "a.pt: cannot be written .*No space.*; what was there is untouched"
    with pytest.raises(UserError, match=message), rdpm.replacing(path) as part:
        part.write_text("half of it")
        raise OSError(28, "No space left on device")
    with pytest.raises(KeyboardInterrupt), rdpm.replacing(path) as part:
        part.write_text("half of it")
        raise KeyboardInterrupt
    assert [file.read_text() for file in tmp_path.iterdir()] == ["before"]


def test_no_network(failing, monkeypatch, tmp_path):
    def no_network(*_, **__):
        raise urllib.error.URLError("no route")
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    file = tmp_path / "hub/checkpoints/397923af-vgg16-397923af.pth"
    flags = [*VQ, "--perceptual 1"]
    line = failing(train_vq, *flags)
    assert f"cannot download {rdpm.VGG16[0]}" in line and f"put the file at {file}" in line
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(b"not these weights")
    assert f"{file}: its sha256 is not 397923af; " in failing(train_vq, *flags)
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", no_network)
    assert "--data cifar10: cannot be downloaded into data/" in failing(train_vq, *VQ, "--data cifar10")


def test_data_workers_ignore_signals_and_the_death_of_one_gets_one_line(failing, monkeypatch):
    draw = rdpm.Shapes.__getitem__
    def die(self, i):
        if i % 20 == 3:
            os._exit(1)
        assert all(signal.getsignal(number) == signal.SIG_IGN for number in SIGNALS)
        return draw(self, i)
    monkeypatch.setattr(rdpm.Shapes, "__getitem__", die)
    assert "DataLoader worker" in failing(train_vq, *VQ, "--workers 1 --steps 99")


def test_names_in_the_readmes_paper_and_code_table_exist():
    section = re.search(r"^#+ Paper and code\n(.*?)(?=^#+ |\Z)", (HERE / "README.md").read_text(), re.M | re.S)
    _, _, *rows = [line for line in section[1].splitlines() if line.startswith("|")]
    names = [re.findall(r"`([^`]+)`", row.split("|")[2]) for row in rows]
    assert len(rows) >= 15 and all(names)
    assert all((HERE / name).is_file() or operator.attrgetter(name)(rdpm) is not None for name in sum(names, []))


@pytest.mark.parametrize("config", [TokenizerConfig, GeneratorConfig, Sampling])
def test_no_default_stands_in_for_a_stored_field_that_is_missing(config):
    stored = asdict(config())
    assert rdpm.from_fields(config, stored, "a.pt") == config()
    for name in stored:
        rest = {key: value for key, value in stored.items() if key != name}
        with pytest.raises(UserError, match=rf"a.pt: was written by other code \({config.__name__}: {name}\)"):
            rdpm.from_fields(config, rest, "a.pt")


def test_two_writers_of_one_file_share_no_unfinished_one(tmp_path):
    with rdpm.replacing(tmp_path / "a.npz") as first:
        first.write_text("first")
        with rdpm.replacing(tmp_path / "a.npz") as second:
            second.write_text("second")
        assert (tmp_path / "a.npz").read_text() == "second" and first.read_text() == "first"
    assert [file.read_text() for file in tmp_path.iterdir()] == ["first"]


def test_a_picture_shows_the_first_hundred_images(tmp_path):
    images = bytes_of(103, 8, 8, 3).numpy()
    args = argparse.Namespace(out=tmp_path / "a.png", as_folder=False, npz=None)
    sample.write_samples(argparse.Namespace(args=args, classes=["a"]), images, [0] * 103)
    pixels = np.array(Image.open(tmp_path / "a.png"))[12::12, 12::12]  # each is enlarged twelve times
    cells = pixels.reshape(10, 9, 10, 9, 3)[:, :8, :, :8].swapaxes(1, 2)
    assert same(cells.reshape(100, 8, 8, 3), images[:100])


def test_edit_takes_the_references_codes_outside_the_mask_alone(draw, tmp_path, monkeypatch):
    codes = []
    lookup = rdpm.NoisyResidualQuantizer.lookup
    monkeypatch.setattr(rdpm.NoisyResidualQuantizer, "lookup",
                        lambda q, c: codes.append(c.view(-1, 8, 8)) or lookup(q, c))
    rdpm.Shapes(32, train=True)[8][0].save(ref := tmp_path / "ref.png")
    mask = np.zeros((32, 32), np.uint8)
    mask[9:17, 3:30] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    draw("--num 2 --edit", ref, "--mask", tmp_path / "mask.png")
    assert len(codes) == 6
    for encoded, taken in zip(codes[::2], codes[1::2], strict=True):  # Alg. 1's step, then what is added to z'
        assert same(encoded[:, [0, 1, 5, 6, 7]], taken[:, [0, 1, 5, 6, 7]])
        assert not same(encoded[:, 2:5], taken[:, 2:5])


def test_a_skipped_step_is_in_no_mean():
    means = rdpm.Means()
    for skipped, values in ((0, (2.0, 4.0)), (1, (math.nan, 1.0)), (1, (50.0, 60.0)), (0, (7.0, 9.0))):
        for weight, value in zip((1, 3), values, strict=True):
            means.add(weight, loss=torch.tensor(value), parts=torch.tensor([value, 2 * value]))
        means.end_step(torch.tensor(float(skipped)))
    mean = (2 + 3 * 4 + 7 + 3 * 9) / 8
    assert means.flush() == {"loss": mean, "parts": [mean, 2 * mean]}
    assert means.flush() == {}


def test_latents_lie_in_their_places_in_every_batch(tmp_path):
    """Of more images than a batch of 125 holds, and of their mirror images."""
    tokenizer = toy_tokenizer(T=1).requires_grad_(False)
    images = rdpm.Images(rdpm.Shapes(16, True), slice(130))
    path = tmp_path / "latents.npy"
    train_gen.encode_images(tokenizer, images, path, (260, 64, 4), argparse.Namespace(workers=0), CPU)
    x = rdpm.to_float(torch.stack([images[i][0] for i in range(260)]))
    v = tokenizer.encoder(x)
    distances = (v[:, None] - torch.from_numpy(np.load(path)).float()).abs().mean((2, 3))
    assert same(distances.argmin(1), range(260)) and distances.diag().max() < 0.05


def test_two_ranks_encode_as_one(training, folder, on_two_ranks, tmp_path):
    _, flags = training("gen", "--steps 1 --latents", tmp_path / "two", "--out", tmp_path / "gen")
    on_two_ranks("train_gen.py", *flags)
    file, = (tmp_path / "two").iterdir()
    one, two = (np.load(path).astype(float) for path in (folder / "vq" / file.name, file))
    assert np.abs(one - two).mean((1, 2)).max() < 0.05 < np.abs(one[1:] - one[:-1]).mean((1, 2)).min()


def test_the_adversarial_weight_is_of_all_ranks_gradients(monkeypatch):
    monkeypatch.setattr(rdpm, "world_size", lambda: 2)
    monkeypatch.setattr(rdpm, "sum_over_ranks", lambda x: x.add_(torch.tensor([[3.0, 0.0], [0.0, 2.0]])))  # rank 1's
    last = torch.ones(2, requires_grad=True)
    weight = rdpm.adaptive_weight(last @ torch.tensor([1.0, 2.0]), 2 * last[0], last)
    close(weight, math.hypot(4, 2) / 2 / (math.hypot(2, 2) / 2 + 1e-4), 1e-6)


def test_the_last_evaluation_is_on_all_held_out_images(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(train_vq, "evaluate", lambda _, images, *args: seen.append(images) or {})
    run(train_vq, *VQ, "--steps 2 --save-every 1 --out", tmp_path)
    labels = [images.dataset.labels[images.indices] for images in seen]
    assert [np.bincount(y).tolist() for y in labels] == [[100] * 10, [200] * 10]


def test_a_reference_is_padded_as_its_tokenizer_says(tmp_path):
    picture = bytes_of(10, 12, 3).numpy()
    Image.fromarray(picture).save(tmp_path / "ref.png")
    for pad in (True, False):
        s = object.__new__(sample.Sampler)
        s.device, s.tokenizer = CPU, toy_tokenizer(pad=pad)
        s.config = s.tokenizer.config
        x, _ = s.reference(tmp_path / "ref.png")
        expected = np.pad(picture, ((3, 3), (2, 2), (0, 0))) if pad else adm_crop(Image.fromarray(picture), 16)
        assert same(x.permute(1, 2, 0), expected)


def test_fid_pads_what_a_tokenizer_reconstructs_as_it_was_trained(tmp_path, monkeypatch):
    monkeypatch.setattr(rdpm, "load_tokenizer", lambda *_: toy_tokenizer(pad=True))
    monkeypatch.setattr(fid, "evaluate_tokenizer", lambda _, data, *args: {"seen": data})
    data = str(draw_folder(tmp_path / "data", 100, size=12))
    args = argparse.Namespace(tokenizer="vq.pt", data=data, num=None, allow_small=True, seed=0)
    seen = fid.evaluate(args, None, CPU)["values"]["seen"]
    for (x, _), (small, _) in zip(list(map(seen.__getitem__, range(6))), rdpm.load_data(data, 12, False), strict=False):
        assert same(x, np.pad(small, ((0, 0), (2, 2), (2, 2))))


@torch.no_grad()
def test_a_preview_is_what_the_logits_are_made_of(monkeypatch):
    predict = rdpm.CodebookHead.predict
    seen = []
    monkeypatch.setattr(rdpm.CodebookHead, "predict", lambda *args: seen.append(predict(*args)) or seen[-1])
    tokenizer = toy_tokenizer()
    model = toy_generator(tokenizer, head="codebook", patch=2)
    inputs = some_inputs(tokenizer)
    model(*inputs)
    assert same(rdpm.preview(model, *inputs), seen[0][0]) and seen[0][0].std() > 0.1


# fid.py: against the packages that define these numbers, and the mistakes users make ----------------------------------


@pytest.fixture(scope="session")
def inception():
    """Random weights with batch norms that do something, unlike freshly made ones."""
    inception = fid.load_inception(True)
    rng = np.random.RandomState(1)
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
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    seen = []
    x = bytes_of(2, 3, 40, 32)
    monkeypatch.setattr(module, "load_state_dict_from_url", lambda *args, **kwargs: inception.net.state_dict())
    theirs = module.FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"])
    theirs.Mixed_6d.branch1x1.register_forward_hook(lambda m, i, o: seen.append(o))
    pool, spatial, logits = inception(x)
    for ours, other in zip((pool, logits), theirs(x), strict=True):
        near(ours, other)
    assert spatial.shape == (2, 2023)
    near(spatial, torch.tensor([[seen[0][b, c, h, w] for h in range(17) for w in range(17) for c in range(7)]
                                for b in range(2)]))


def test_inception_equals_pytorch_fid_also_under_autocast(inception, monkeypatch):
    module = pytest.importorskip("pytorch_fid.inception")
    x = bytes_of(2, 3, 299, 299)  # at 299 neither resizes
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
    rng = np.random.RandomState(0)
    d = 128
    mix = rng.standard_normal((d, d)) * np.geomspace(1, 0.01, d)
    x = np.abs(rng.standard_normal((n1, d)) @ mix)
    y = np.abs(rng.standard_normal((n2, d)) @ mix + 0.3)
    stats = x.mean(0), np.cov(x, rowvar=False), y.mean(0), np.cov(y, rowvar=False)
    ours = fid.frechet_distance(*stats)
    assert ours == pytest.approx(module.calculate_frechet_distance(*stats), rel=1e-6)
    assert abs(fid.frechet_distance(*stats[:2], *stats[:2])) < 1e-5 * np.trace(stats[1])


def features(n, seed=0):
    rng = np.random.RandomState(seed)
    pool, spatial, logits = (torch.from_numpy(rng.gamma(1, 1, (n, d))).float() for d in (2048, 2023, 1008))
    return bytes_of(n, 3, 8, 8, seed=seed), pool, spatial, logits


def streamed(data, keep=0):
    """`measure` with a network that answers with the rows that belong to the images it is given."""
    images, *answers = data
    asked = []
    def read(numbers):
        asked.append(numbers)
        return images[numbers]
    def network(batch):
        numbers = asked[-1]
        assert torch.equal(batch, images[numbers])
        return [x[numbers] for x in answers]
    network.device = torch.device("cpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fid, "BATCH", 16)
        return fid.measure(read, len(images), network, keep)


def moments(x):
    return x.double().numpy().mean(0), np.cov(x.double().numpy(), rowvar=False)


def test_inception_score_equals_torch_fidelity_and_the_formula(monkeypatch):
    module = pytest.importorskip("torch_fidelity.metric_isc")
    assert fid.SPLIT == 5000                                     # ADM's
    data = features(203)
    label = torch.arange(203) * 20 // 203                        # sorted by class: file order would give nonsense
    logits = data[3] + 12 * torch.nn.functional.one_hot(label, 1008)
    for n, split in ((200, 20), (203, 50)):
        monkeypatch.setattr(fid, "SPLIT", split)
        some = [x[:n] for x in (*data[:3], logits)]
        ours = streamed(some).score
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
        assert fid.ssim(x, y)[i].item() == pytest.approx(metrics.structural_similarity(a, b, channel_axis=2), abs=1e-5)
    assert fid.ssim(x, x).tolist() == [1] * 4


@pytest.fixture
def run_fid(pictures, inception, monkeypatch, capsys, tmp_path):
    def run_fid(flags, out="fid.json"):
        run(fid, *flags.split(), "--allow-small", "--out", tmp_path / out)
        report = json.loads((tmp_path / out).read_text()) if out.endswith(".json") else {}
        return capsys.readouterr().out, report
    monkeypatch.setattr(fid, "load_inception", lambda *args: inception)
    monkeypatch.chdir(pictures)
    return run_fid


def test_reference_file(run_fid, pictures, tmp_path):
    assert "N = 9" in run_fid("--make-ref tree --size 32", out="ref.npz")[0]
    with np.load(tmp_path / "ref.npz") as file:
        shapes = {name: file[name].shape for name in file if name != "weights"}
        assert shapes == fid.STATISTICS | {"arr_0": (9, 32, 32, 3)}
        assert (file["arr_0"] == np.load(pictures / "good.npz")["arr_0"]).all()
    _, direct = run_fid("good rgb")
    _, report = run_fid(f"{tmp_path}/ref.npz rgb")
    assert report["values"] == pytest.approx(direct["values"], rel=1e-6) and None not in report["values"].values()
    assert report["weights"] == "random-test" and "fid.py" in report["command"] and report["versions"]["torch"]
    assert direct["values"]["FD-random-9"] > 0
    for name in ("larger", "good.npz"):
        assert "N = 9" in run_fid(f"--make-ref {name} --size 32", out=f"{name[:4]}.npz")[0]
    assert np.array_equal(*(np.load(tmp_path / f"{name}.npz")["sigma"] for name in ("good", "ref")))
    assert len(fid.open_images("tree", True, 32, None, True)) == 14  # samples: the held-out split
    out, report = run_fid("statistics.npz compressed.npz")
    assert report["values"].pop("FD-random-9") > 0 and report["N"] == 9 and "FID" not in out
    assert report["values"] == {"sFD-random-9": None, "precision-random": None, "recall-random": None}
    assert re.search(r"(?s)sFD-random-9 unavailable: .* mu_s.*precision, recall unavailable: .* statistics only", out)


def test_generator_equals_its_samples(run_fid, pictures, tmp_path):
    _, report = run_fid("rgb --ckpt gen.pt --num 9 --seed 5 --tau 2 --fast")
    model, tokenizer, *_ = rdpm.load_generator(pictures / "gen.pt")
    half = (0.75 + 1.5) / 2
    sampling = Sampling(tau=2.0, skip=1, draft=1.0, strengths=[0.0, half, half])  # T = 3
    assert report["sampling"] == asdict(sampling) and report["seed"] == 5
    with rdpm.autocast(torch.device("cpu")):
        x = rdpm.draw_images(model, tokenizer, torch.arange(9), 5, list(range(9)), sampling)
    assert len(x.unique(dim=0)) == 9
    np.savez(tmp_path / "samples.npz", arr_0=rdpm.to_uint8(x).permute(0, 2, 3, 1).numpy())
    _, written = run_fid(f"rgb {tmp_path}/samples.npz")
    assert report["values"] == pytest.approx(written["values"], rel=1e-9)


def test_tokenizer(run_fid, pictures, inception, monkeypatch):
    values = run_fid("--tokenizer vq.pt --data tree --seed 3")[1]["values"]
    tokenizer = rdpm.load_tokenizer(pictures / "vq.pt")
    data = rdpm.load_data(str(pictures / "tree"), 32, train=False)
    originals = torch.stack([data[i][0] for i in range(14)])
    reconstructions = []
    errors = []
    codes = [[], [], []]
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
    images, pool, *others = features(40, 1)
    y = features(30, 2)
    x = images, pool * 0.9, *others
    s = streamed(x, keep=40)
    reference = streamed(y, keep=30)
    by_hand = moments(x[1]) + moments(x[2])
    for name, expected in zip(("mu", "sigma", "mu_s", "sigma_s"), by_hand, strict=True):
        np.testing.assert_allclose(s.statistics[name], expected, rtol=1e-12, atol=1e-11)
    assert torch.equal(streamed(x, keep=20).kept, x[1][np.random.RandomState(2020).permutation(40)[:20]])
    assert streamed(x).kept is None
    values = fid.compare(s, reference, inception)["values"]
    assert list(values) == ["FID-40", "sFID-40", "IS", "precision", "recall"]
    for name, i in (("FID-40", 1), ("sFID-40", 2)):
        assert values[name] == pytest.approx(fid.frechet_distance(*moments(x[i]), *moments(y[i])), rel=1e-6)
    both = fid.precision_recall(reference=y[1], samples=x[1])
    assert values["IS"] == s.score and (values["precision"], values["recall"]) == both and both[0] != both[1]


def test_training_logs_the_fid_of_the_ema_weights(training, folder, inception, monkeypatch, tmp_path):
    np.savez(tmp_path / "ref.npz", mu=np.zeros(2048), sigma=np.eye(2048), weights=inception.weights)
    monkeypatch.setattr(fid, "load_inception", lambda *args: inception)
    script, flags = training("gen", "--steps", 5, "--ema", 0.5, "--lr", 0.02, "--warmup", 0, "--out", tmp_path / "gen")
    run(script, *flags, "--fid-ref", tmp_path / "ref.npz", "--save-every", 2, "--fid-every", 2, "--fid-num", 4)
    first, last = (record for record in records(tmp_path / "gen") if "FD-random-4" in record)
    assert (first["step"], last["step"]) == (4, 5) and first["FD-random-4"] != last["FD-random-4"]
    model, _, _, sampling = rdpm.load_generator(tmp_path / "gen/model.pt")
    model.load_state_dict(state(tmp_path / "gen")["modules"]["ema"])
    reference = fid.load_reference(str(tmp_path / "ref.npz"), inception, keep=0)
    tokenizer = rdpm.load_tokenizer(folder / "vq/model.pt")
    result = fid.fid_of_generator(model, tokenizer, sampling, reference, inception, 4)
    assert last["FD-random-4"] == pytest.approx(result["values"]["FD-random-4"], rel=1e-6)


@pytest.mark.parametrize("flags", ["good.npz --ckpt gen.pt --num 5", "--tokenizer vq.pt --data tree"])
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


def test_a_stored_array_is_read_where_it_lies(inception, pictures, tmp_path, monkeypatch):
    """Stored, compressed, with another array before it, transposed: the same images; the first is never loaded."""
    x = np.load(pictures / "good.npz")["arr_0"]
    np.savez(tmp_path / "stored.npz", labels=np.arange(9), arr_0=x)
    np.savez(tmp_path / "transposed.npz", arr_0=np.asfortranarray(x))
    np.savez_compressed(tmp_path / "compressed.npz", arr_0=x)
    results = {}
    for name in ("compressed", "transposed", "stored"):
        if name == "stored":
            monkeypatch.setattr(np.lib.npyio.NpzFile, "__getitem__", lambda *_: pytest.fail("loaded whole"))
        images = fid.open_images(str(tmp_path / f"{name}.npz"), True, None, None, True)
        assert torch.equal(fid.read_batch(images, [8, 0, 3]), torch.from_numpy(x[[8, 0, 3]]).permute(0, 3, 1, 2))
        results[name] = fid.measure(lambda n, images=images: fid.read_batch(images, n), 9, inception, 0).statistics
    for name in ("transposed", "stored"):
        assert all(np.array_equal(results[name][key], results["compressed"][key]) for key in fid.STATISTICS)


def test_more_than_memory_holds_is_said(pictures, monkeypatch):
    def too_large(*_):
        raise MemoryError("Unable to allocate 9.16 GiB")
    monkeypatch.setattr(np.lib.npyio.NpzFile, "__getitem__", too_large)
    with pytest.raises(UserError, match="compressed.npz: larger than memory .Unable.* np.savez, uncompressed"):
        fid.open_images(str(pictures / "compressed.npz"), True, None, None, True)


@pytest.mark.parametrize("generated", [True, False])
def test_a_grid_beside_numbered_samples_is_no_sample(generated, pictures, tmp_path):
    shutil.copytree(pictures / "good", tmp_path / "good")
    shutil.copy(pictures / "white.png", tmp_path / "good/grid.png")  # grey, which samples must not be
    assert len(fid.open_images(str(tmp_path / "good"), generated, None, None, True)) == 9
    Image.fromarray(bytes_of(32, 32, 3).numpy()).save(tmp_path / "good/other.png")
    assert len(fid.open_images(str(tmp_path / "good"), generated, None, None, True)) == 10
    (tmp_path / "lone").mkdir()
    for name in ("a", "b", "c", "grid"):
        shutil.copy(tmp_path / "good/other.png", tmp_path / f"lone/{name}.png")
    assert len(fid.open_images(str(tmp_path / "lone"), generated, None, None, True)) == 4


def test_a_short_last_split_is_said(inception, monkeypatch):
    monkeypatch.setattr(fid, "SHA256", inception.weights)
    monkeypatch.setattr(fid, "SPLIT", 20)
    for n, said in ((41, ["IS: the last split holds 1 images, not 20; it compares with no other"]), (40, [])):
        s = streamed(features(n), keep=n)
        assert fid.compare(s, s, inception)["notes"] == said


def test_a_closed_pipe_loses_nothing(run_fid, tmp_path, monkeypatch):
    read_end, write_end = os.pipe()
    os.close(read_end)
    with os.fdopen(write_end, "w") as closed, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", closed)
        run(fid, "good", "rgb", "--allow-small", "--out", tmp_path / "fid.json")
    assert json.loads((tmp_path / "fid.json").read_text())["N"] == 9


def test_the_report_is_written_before_it_is_printed(run_fid, tmp_path, monkeypatch):
    monkeypatch.setattr(fid, "say", lambda *_: (tmp_path / "fid.json").rename(tmp_path / "there.json"))
    run(fid, "good", "rgb", "--allow-small", "--out", tmp_path / "fid.json")
    assert (tmp_path / "there.json").exists()


def test_named_sets_are_padded_as_their_presets_say(pictures, monkeypatch):
    asked = []
    def load_data(name, size, train, pad):
        asked.append((name, bool(pad)))
        return [0] * 9
    monkeypatch.setattr(rdpm, "load_data", load_data)
    for pad in (None, True):
        for name in ("mnist", "shapes", str(pictures / "tree")):
            fid.open_images(name, True, 32, pad, True)
    assert [pad for _, pad in asked] == [True, False, False, True, True, True]


def test_judge_by_hand(pictures, capsys, monkeypatch, tmp_path):
    """All numbers of each row, by two judges. Of 5 and 9 test images 2 and 4 are the reference."""
    monkeypatch.syspath_prepend(HERE / "experiments")
    monkeypatch.chdir(pictures)
    import judge
    trained, train = [], judge.train
    monkeypatch.setattr(judge, "train", lambda *args: trained.append((args, train(*args))) or trained[-1][1])
    (x, y), (x_train, y_train) = (judge.load(rdpm.load_data("tree", 32, train=split)) for split in (False, True))
    assert y.tolist() == [0, 1] * 5 + [1] * 4
    first, others, drawn = [2, 3, 6, 7, 10, 12], [0, 1, 4, 5, 8, 9, 11, 13], x.roll(5, 3)[:7]
    np.savez(npz := tmp_path / "a.npz", arr_0=drawn.permute(0, 2, 3, 1), arr_1=y[:7])
    flags = ["--data", "tree", "--ckpt", "gen.pt", "--judges", 2, "--seed", 7, "--network", tmp_path / "kept/net"]
    run(judge, *flags, "--steps", 3, "--samples", npz)
    table = [line.strip("| ").split(" | ")[1:] for line in capsys.readouterr().out.splitlines()[2:]]

    nets, students = [net for _, net in trained[:2]], [net for _, net in trained[2:]]
    assert [args[3] for args, _ in trained] == [7, 8, 7, 7, 7]    # seeds: two judges, a student for each row
    for (args, net), file in zip(trained, ("net7.pt", "net8.pt"), strict=False):
        assert torch.equal(args[0], x_train) and torch.equal(args[1], y_train)
        weights = dict(net.state_dict())
        assert same(dict(train(*args).state_dict()), weights)     # the seed is all that it depends on
        assert same(torch.load(tmp_path / "kept" / file), {"classes": ["a", "b"], "model": weights})
    assert not torch.equal(nets[0][-1].weight, nets[1][-1].weight)

    def scaled(images):
        return images / 127.5 - 1

    def accuracy(net, images, labels):
        return 100 * (net(scaled(images)).argmax(1) == labels).double().mean().item()

    tokenizer = rdpm.load_generator("gen.pt")[1]
    with torch.no_grad(), rdpm.autocast(torch.device("cpu")):
        decoded, taught = (rdpm.to_uint8(tokenizer(scaled(z), noise(tokenizer, 0, range(len(z))))[0])
                           for z in (x[others], x_train[:7]))
    sets = ((x[others], y[others], x_train[:7], y_train[:7]), (decoded, y[others], taught, y_train[:7]),
            (drawn, y[:7], drawn, y[:7]))
    for row, (z, labels, lesson, answers), (args, student) in zip(table, sets, trained[2:], strict=True):
        assert torch.equal(args[0], lesson) and torch.equal(args[1], answers)
        judged = []
        for net in nets:
            found, known = (net[:-1](scaled(images)).detach() for images in (z, x[first]))
            distance = fid.frechet_distance(*moments(found), *moments(known)) / np.trace(moments(known)[1])
            both = fid.precision_recall(reference=known, samples=found[:6])
            judged.append([accuracy(net, z, labels), distance, *both])
        for cell, values in zip(row[1:5], zip(*judged, strict=True), strict=True):
            mean, low, high = map(float, re.fullmatch(r"(\S+) \(([^-]+)-(.+)\)", cell).groups())
            close([mean, low, high], [np.mean(values), min(values), max(values)], 6e-3)
        spread = np.mean([z[labels == c].double().std(0).mean() for c in (0, 1)])
        close([float(row[i]) for i in (0, 5, 6)], [len(z), spread, accuracy(student, x, y)], 2e-3)
    assert len(students) == len(table) == 3

    monkeypatch.setattr(judge, "train", lambda *_: pytest.fail("a kept judge was trained again"))
    run(judge, *flags, "--no-cas", "--samples", npz)
    again = [line.strip("| ").split(" | ")[1:] for line in capsys.readouterr().out.splitlines()[2:]]
    assert again == [[*row[:6], "-"] for row in table]


@pytest.mark.parametrize(("images", "labels", "message"), [
    (bytes_of(9, 32, 32, 3) / 255, [0] * 9, r"arr_0 is float32 \(9, 32, 32, 3\), but must be uint8 RGB"),
    (bytes_of(9, 32, 32, 3), np.eye(9), r"arr_1 is float64 \(9, 9\), .* one-hot labels write the argmax"),
    (bytes_of(9, 32, 32, 3), np.eye(9, dtype=int), r"arr_1 is int64 \(9, 9\), but must be 9 integers from 0 to 1"),
    (bytes_of(9, 32, 32, 3), np.zeros(9), r"arr_1 is float64 \(9,\), but must be 9 integers"),
    (bytes_of(9, 32, 32, 3), [0] * 8 + [2], r"arr_1 is int64 \(9,\), but must be 9 integers from 0 to 1, the classes"),
    (bytes_of(9, 32, 32, 3), [0] * 8, r"arr_1 is int64 \(8,\), but must be 9 integers"),
    (bytes_of(9, 48, 48, 3), [0] * 9, r"arr_0 is uint8 \(9, 48, 48, 3\), .*; give another --size"),
    (bytes_of(9, 3, 32, 32), [0] * 9, r"arr_0 is uint8 \(9, 3, 32, 32\), but must be")])
def test_judge_refuses_samples_before_it_trains(images, labels, message, pictures, failing, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(HERE / "experiments")
    monkeypatch.chdir(pictures)
    import judge
    monkeypatch.setattr(judge, "load", lambda *_: pytest.fail("work began"))
    np.savez(tmp_path / "a.npz", arr_0=images, arr_1=labels)
    line = failing(judge, "--data", "tree", "--samples", tmp_path / "a.npz")
    assert re.search("a.npz: " + message, line), line
