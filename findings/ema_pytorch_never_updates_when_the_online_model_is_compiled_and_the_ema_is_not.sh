#!/usr/bin/env bash
# SURPRISE: ema-pytorch, online model wrapped (torch.compile or DistributedDataParallel) and a
# plain ema_model= passed in: every update() runs without a word and changes nothing, not even the
# first copy. At the end one samples from the weights of the initialisation.
# EXPECTED: the EMA follows (both models have the same tensors in the same order), or an error.
# SEEN: after 200 steps the EMA has moved by exactly 0.0 and its loss is 2.013 (initial: 2.013), against
#   0.012 for the online weights, while ema.step counts to 200 and ema.initted is True.
# WHY: names are collected from ema_model ("0.weight"); get_params_iter (ema_pytorch/ema_pytorch.py)
#   drops every online name that is not among them ("_orig_mod.0.weight", "module.0.weight"), so
#   zip() pairs two lists of which one is empty.
# INSTEAD: EMA(model, ...) with the unwrapped model, torch.compile afterwards (or model.compile()
#   in place); and check once that the EMA moved. Without ema_model= it works, the copy is wrapped too.
# SEEN with torch 2.14.1, ema-pytorch 0.8.3; numbers above.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"; "$work/venv/bin/pip" install -q torch==2.14.1 ema-pytorch==0.8.3 numpy
OMP_NUM_THREADS=1 "$work/venv/bin/python" -W ignore - "$work" <<'PY'
import copy, sys, importlib.metadata as md, torch, torch.distributed as dist
from torch import nn
from ema_pytorch import EMA
print("torch", torch.__version__, "ema-pytorch", md.version("ema-pytorch"))
dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}/store", rank=0, world_size=1)
torch.manual_seed(0)
x = torch.randn(512, 8); y = 1.4 * (x[:, :1] * x[:, 1:2])
start = nn.Sequential(nn.Linear(8, 64), nn.SiLU(), nn.Linear(64, 1))
def compiled(m): return torch.compile(m, backend="eager")
def in_place(m): m.compile(backend="eager"); return m
def run(wrap, pass_ema):
    model = copy.deepcopy(start); online = wrap(model)
    kw = dict(ema_model=copy.deepcopy(start)) if pass_ema else {}
    ema = EMA(online, beta=0.9, update_after_step=0, update_every=1, **kw)
    opt = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(200):
        opt.zero_grad(); (online(x) - y).square().mean().backward(); opt.step(); ema.update()
    moved = max((a - b).abs().max().item() for a, b in zip(ema.ema_model.parameters(), start.parameters()))
    with torch.no_grad():
        loss = [(m(x) - y).square().mean().item() for m in (model, ema.ema_model)]
    return moved, loss, int(ema.step), bool(ema.initted)
with torch.no_grad():
    first = (start(x) - y).square().mean().item()
res = {}
for name, wrap, pass_ema in (("plain model", lambda m: m, True), ("model.compile() in place", in_place, True),
                             ("torch.compile(model), own copy", compiled, False),
                             ("torch.compile(model)", compiled, True), ("DDP(model)", nn.parallel.DistributedDataParallel, True)):
    res[name] = run(wrap, pass_ema)
    moved, loss, step, initted = res[name]
    print(f"{name:31s} EMA moved by {moved:.4f} | loss: start {first:.3f}, online {loss[0]:.3f}, EMA {loss[1]:.3f} | step {step}, initted {initted}")
dist.destroy_process_group()
print("expected: the EMA's loss close to the online loss in every row")
bad = ("torch.compile(model)", "DDP(model)")
assert all(v[0] > 0.05 and v[1][1] < 0.5 * first for k, v in res.items() if k not in bad)
assert all(res[k][0] == 0.0 and res[k][2] == 200 for k in bad), f"behaviour changed: {res}"
print("SEEN: with a wrapped online model and a plain ema_model the average is never updated")
PY
