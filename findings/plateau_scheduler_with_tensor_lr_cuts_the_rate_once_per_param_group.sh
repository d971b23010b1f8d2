#!/usr/bin/env bash
# SURPRISE: with a tensor learning rate (the form recommended for a compiled optimizer step) and
# the usual two groups "decay / no decay", ReduceLROnPlateau(factor=0.5) divides the rate by 4 per
# plateau, by 8 with three groups; and LambdaLR with one lambda per group gives all groups the LAST.
# EXPECTED: a tensor lr gives the same schedule as the float of the same value.
# SEEN: after two plateaus 2.5e-4 (float) against 2.5e-4 / 6.25e-5 / 1.56e-5 (tensor; 1/2/3 groups);
#   lambdas (1.0, 0.1): 1e-3 and 1e-4 as a float, 1e-4 and 1e-4 as a tensor.
# WHY: Optimizer.add_param_group puts the SAME default tensor into every group (setdefault, no
#   copy) and the schedulers write a tensor lr in place (_update_param_group_val, fill_, in
#   torch/optim/lr_scheduler.py); plateau reads each group's rate after the last group's write.
# INSTEAD: give every group a tensor of its own: dict(params=..., lr=torch.tensor(1e-3)).
# SEEN with torch 2.14.1; numbers above.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"; "$work/venv/bin/pip" install -q torch==2.14.1 numpy
OMP_NUM_THREADS=1 "$work/venv/bin/python" - <<'PY'
import torch
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau
print("torch", torch.__version__)
def optimizer(n, lr, own=False):
    groups = [dict(params=[torch.nn.Parameter(torch.zeros(3))], weight_decay=0.1 * i) for i in range(n)]
    if own:
        groups = [dict(g, lr=lr.clone()) for g in groups]
    return torch.optim.AdamW(groups, lr=lr)
def plateau(n, lr, own=False):
    opt = optimizer(n, lr, own)
    sched = ReduceLROnPlateau(opt, factor=0.5, patience=0)
    for loss in (1.0, 1.0, 1.0):          # first value, then two plateaus
        sched.step(loss)
    return [round(float(g["lr"]), 9) for g in opt.param_groups]
def lambdas(lr, own=False):
    opt = optimizer(2, lr, own)
    sched = LambdaLR(opt, [lambda t: 1.0, lambda t: 0.1])
    for _ in range(3):
        opt.step(); sched.step()
    return [round(float(g["lr"]), 9) for g in opt.param_groups]
res = {}
for n in (1, 2, 3):
    res[n] = [plateau(n, 1e-3), plateau(n, torch.tensor(1e-3)), plateau(n, torch.tensor(1e-3), own=True)]
    print(f"plateau x2, {n} group(s): float {res[n][0][0]:.3g} | tensor {res[n][1][0]:.3g} | own tensors {res[n][2][0]:.3g}")
lam = [lambdas(1e-3), lambdas(torch.tensor(1e-3)), lambdas(torch.tensor(1e-3), own=True)]
print("lambdas 1.0 / 0.1 : float", lam[0], "| tensor", lam[1], "| own tensors", lam[2])
print("expected: tensor columns equal to the float column")
near = lambda a, b: abs(a / b - 1) < 1e-3
assert all(near(res[n][0][0], 2.5e-4) and near(res[n][2][0], 2.5e-4) for n in (1, 2, 3))
assert near(res[1][1][0], 2.5e-4)
assert near(lam[0][0], 1e-3) and near(lam[2][0], 1e-3)
for n in (2, 3):
    assert near(res[n][1][0], 1e-3 * 0.5 ** (2 * n)), f"behaviour changed: {res[n]}"
assert near(lam[1][0], 1e-4), f"behaviour changed: {lam}"
print("SEEN: a shared tensor lr is cut once per group, and per-group lambdas collapse to the last")
PY
