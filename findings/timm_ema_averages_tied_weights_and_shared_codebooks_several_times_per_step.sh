#!/usr/bin/env bash
# SURPRISE: timm's ModelEma / V2 / V3 apply the decay once per NAME, not once per tensor: a tied
# embedding + head is averaged twice per update (decay d*d), the one codebook of a shared-codebook
# ResidualVQ with 8 layers eight times (d**8: 0.9999 acts as 0.9992, a memory of 1250 steps and
# not 10000), while all other weights keep d. The same model in bfloat16 is averaged once.
# EXPECTED: one decay for all parameters, as ema-pytorch, torch and diffusers do (parameters()).
# SEEN: share of the new weights after 1000 updates of 0.9999: codebook 0.551 (should be 0.095);
#   after 50 updates of 0.99: tied head 0.634 in float32, 0.395 in bfloat16 (should be 0.395).
# WHY: timm/utils/model_ema.py walks state_dict().values(), which lists a shared tensor under
#   each of its names, and lerps in place each time; the bfloat16 path (stochastic rounding)
#   computes all results from the old values before it writes them back.
# INSTEAD: an average over named_parameters() (torch AveragedModel, ema-pytorch), or tie after.
# SEEN with torch 2.14.1, timm 1.0.31, vector-quantize-pytorch 1.32.0; numbers above.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"; "$work/venv/bin/pip" install -q torch==2.14.1 timm==1.0.31 vector-quantize-pytorch==1.32.0
OMP_NUM_THREADS=1 "$work/venv/bin/python" - <<'PY'
import timm, torch, importlib.metadata as md
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from timm.utils import ModelEma, ModelEmaV2, ModelEmaV3
from vector_quantize_pytorch import ResidualVQ
print("torch", torch.__version__, "timm", timm.__version__, "vector-quantize-pytorch", md.version("vector-quantize-pytorch"))
class Tokens(nn.Module):                    # embedding and output head share one matrix
    def __init__(self):
        super().__init__()
        self.embed, self.body, self.head = nn.Embedding(100, 8), nn.Linear(8, 8, bias=False), nn.Linear(8, 100, bias=False)
        self.head.weight = self.embed.weight
def share(make_ema, model, pick, updates):  # EMA starts at 0, the model stands at 1
    inner = lambda e: e.module if hasattr(e, "module") else e.ema
    ema = make_ema(model)
    with torch.no_grad():
        for t in list(inner(ema).parameters()) + list(inner(ema).buffers()):
            if t.is_floating_point(): t.zero_()
        for t in list(model.parameters()) + list(model.buffers()):
            if t.is_floating_point(): t.fill_(1.0)
    if isinstance(ema, AveragedModel): ema.n_averaged += 1
    for _ in range(updates):
        getattr(ema, "update_parameters" if isinstance(ema, AveragedModel) else "update")(model)
    return pick(inner(ema)).float().mean().item()
tied, free = (lambda m: m.head.weight), (lambda m: m.body.weight)
want = 1 - 0.99 ** 50
got = {}
for C in (ModelEma, ModelEmaV2, ModelEmaV3):
    got[C.__name__] = share(lambda m: C(m, decay=0.99), Tokens(), tied, 50)
    other = share(lambda m: C(m, decay=0.99), Tokens(), free, 50)
    print(f"{C.__name__:10s} float32: tied {got[C.__name__]:.3f}, untied {other:.3f} (expected {want:.3f})")
    assert abs(other - want) < 1e-3
bf16 = share(lambda m: ModelEmaV3(m, decay=0.99), Tokens().bfloat16(), tied, 50)
ref = share(lambda m: AveragedModel(m, multi_avg_fn=get_ema_multi_avg_fn(0.99)), Tokens(), tied, 50)
rvq = lambda shared: nn.Sequential(nn.Linear(8, 8), ResidualVQ(dim=8, codebook_size=32, num_quantizers=8, shared_codebook=shared))
book = {s: share(lambda m: ModelEmaV3(m, decay=0.9999), rvq(s), lambda m: m[1].layers[0]._codebook.embed, 1000) for s in (False, True)}
print(f"ModelEmaV3 bfloat16: tied {bf16:.3f}; torch AveragedModel: tied {ref:.3f}")
print(f"ResidualVQ, 8 layers, decay 0.9999 x 1000: own codebooks {book[False]:.3f}, shared {book[True]:.3f} (expected {1 - 0.9999 ** 1000:.3f})")
assert abs(ref - want) < 1e-3 and abs(bf16 - want) < 5e-3 and abs(book[False] - (1 - 0.9999 ** 1000)) < 1e-3
assert all(abs(v - (1 - 0.99 ** 100)) < 1e-3 for v in got.values()), f"behaviour changed: {got}"
assert abs(book[True] - (1 - 0.9999 ** 8000)) < 1e-3, f"behaviour changed: {book}"
print("SEEN: tied weights get d**2, the shared codebook d**8 per update")
PY
