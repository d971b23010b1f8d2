#!/usr/bin/env bash
# SURPRISE: inside one torch.autocast block, swapping the moving average into a model
# does nothing: the second forward still computes with the raw weights, bit for bit.
# EXPECTED: "with ema.average_parameters(): model(x)" evaluates the averaged weights.
# SEEN: raw and EMA outputs differ by exactly 0.0 (truth: 5.3 in the case below), and 5 SGD
#   steps inside one block leave the loss at its first value, to the last digit.
# WHY: autocast caches the bfloat16 copy of each float32 leaf that requires grad, until the
#   OUTERMOST autocast block ends (ATen/autocast_mode.cpp, cached_cast); ema.copy_to writes
#   through .data and the optimizer writes in place, and neither drops that cached copy.
# INSTEAD: one autocast block per forward (or torch.autocast(..., cache_enabled=False)), and
#   the swap outside of it. torch.no_grad() does not help; requires_grad_(False) weights are safe.
# SEEN with torch 2.14.1, torch-ema 0.3: raw/EMA difference 0.0 in one block, not 0 in two.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"; "$work/venv/bin/pip" install -q torch==2.14.1 torch-ema==0.3 numpy
OMP_NUM_THREADS=1 "$work/venv/bin/python" - <<'PY'
import importlib.metadata as md, torch
from torch import nn
from torch_ema import ExponentialMovingAverage
print("torch", torch.__version__, "torch-ema", md.version("torch-ema"))
torch.manual_seed(0)
net = nn.Sequential(nn.Linear(16, 64), nn.SiLU(), nn.Linear(64, 1))
ema = ExponentialMovingAverage(net.parameters(), decay=0.99, use_num_updates=False)
x = torch.randn(256, 16); y = x[:, :1] * x[:, 1:2]
opt = torch.optim.AdamW(net.parameters(), lr=1e-2)
for _ in range(100):                      # ordinary float32 training: raw weights run ahead of the EMA
    opt.zero_grad(); (net(x) - y).square().mean().backward(); opt.step(); ema.update()

def compare(**kw):                        # the usual "validate raw, then validate EMA"
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, **kw):
        raw = net(x).float()
        with ema.average_parameters():
            avg = net(x).float()
    return (raw - avg).abs().max().item()

def two_blocks():
    outs = []
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16): outs.append(net(x).float())
        with ema.average_parameters(), torch.autocast("cpu", torch.bfloat16): outs.append(net(x).float())
    return (outs[0] - outs[1]).abs().max().item()

one, nocache, two = compare(), compare(cache_enabled=False), two_blocks()
print(f"largest |raw - EMA| output: one block {one}, cache_enabled=False {nocache:.3f}, two blocks {two:.3f}")
sgd, losses = torch.optim.SGD(net.parameters(), lr=0.05), []
with torch.autocast("cpu", torch.bfloat16):
    for _ in range(5):
        loss = (net(x).float() - y).square().mean(); losses.append(loss.item())
        sgd.zero_grad(); loss.backward(); sgd.step()
print("loss of 5 SGD steps in one block:", losses)
print("expected: the EMA differs from the raw weights and the loss moves")
assert two > 0.05 and nocache > 0.05, "EMA and raw should differ when asked properly"
assert one == 0.0 and len(set(losses)) == 1, "behaviour changed: the swap is seen inside one autocast block"
print("SEEN: inside one autocast block the swapped-in EMA (and every step) is ignored")
PY
