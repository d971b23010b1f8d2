#!/usr/bin/env bash
# SURPRISE: EMA.forward_eval ("no grad + eval" by its comment) of ema-pytorch does not switch to
# evaluation: on a VQ autoencoder each validation pass has dropout on AND rewrites the averaged
# model's codebook with the validation data, so the averaged model drifts by being measured.
# EXPECTED: forward_eval = forward in eval mode; twice the same input, twice the same output.
# SEEN: two calls with one input differ by 0.83; 22 passes over a validation batch move the EMA's
#   codebook by 50 % of its norm and its loss falls, 1.738 -> 1.694 (0.0 % and 1.813 with ema.eval()).
# WHY: ema_pytorch/ema_pytorch.py, forward_eval stores ema_model.training, calls the model and
#   restores the flag, and nothing between them calls eval(); a fresh copy is in train mode, and
#   VectorQuantize updates its codebook in every training-mode forward, under no_grad as well.
# INSTEAD: ema.ema_model.eval() once after construction (and again after any ema.train()).
# SEEN with torch 2.14.1, ema-pytorch 0.8.3, vector-quantize-pytorch 1.32.0; numbers above.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"; "$work/venv/bin/pip" install -q torch==2.14.1 ema-pytorch==0.8.3 vector-quantize-pytorch==1.32.0
OMP_NUM_THREADS=1 "$work/venv/bin/python" -W ignore - <<'PY'
import importlib.metadata as md, torch
from torch import nn
from ema_pytorch import EMA
from vector_quantize_pytorch import VectorQuantize
print("torch", torch.__version__, *(f"{p} {md.version(p)}" for p in ("ema-pytorch", "vector-quantize-pytorch")))
class Auto(nn.Module):
    def __init__(self):
        super().__init__()
        self.enc, self.drop, self.vq, self.dec = nn.Linear(16, 8), nn.Dropout(0.1), VectorQuantize(dim=8, codebook_size=64), nn.Linear(8, 16)
    def forward(self, x):
        z, _, extra = self.vq(self.enc(x))
        return self.dec(self.drop(z)), extra.sum()
def run(eval_first):
    torch.manual_seed(0)
    model = Auto(); ema = EMA(model, beta=0.99, update_after_step=10, update_every=1)
    opt = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(200):
        x = torch.randn(8, 16, 16); out, extra = model(x)
        opt.zero_grad(); ((out - x).square().mean() + extra).backward(); opt.step(); ema.update()
    if eval_first:
        ema.eval()
    book = ema.ema_model.vq.codebook.clone()
    val = torch.randn(8, 16, 16) + 1.0                          # validation data of another kind
    first, second = ema.forward_eval(val)[0], ema.forward_eval(val)[0]
    loss = [(ema.forward_eval(val)[0] - val).square().mean().item() for _ in range(20)]
    moved = ((ema.ema_model.vq.codebook - book).norm() / book.norm()).item()
    return (first - second).abs().max().item(), moved, loss[0], loss[-1]
res = {e: run(e) for e in (False, True)}
for e, (diff, moved, a, b) in res.items():
    print(f"ema.eval() before: {str(e):5s} | two calls differ by {diff:.3f} | codebook moved by {moved:.1%} | validation loss {a:.4f} -> {b:.4f}")
print("expected: 0.000, 0.0 % and a constant loss in both rows")
assert res[True][0] == 0.0 and res[True][1] == 0.0 and res[True][2] == res[True][3]
assert res[False][0] > 0.01 and res[False][1] > 0.05, f"behaviour changed: {res[False]}"
print("SEEN: forward_eval ran in train mode and rewrote the averaged codebook")
PY
