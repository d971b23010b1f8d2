#!/usr/bin/env bash
# SURPRISE: diffusers' EMAModel.save_pretrained writes a Flux2 autoencoder whose BatchNorm running
# mean / variance are back at 0 / 1. Those two buffers ARE the latent statistics by which the
# pipelines normalise latents, so latents from the saved EMA model are scaled by nothing.
# EXPECTED: the folder holds the training model with averaged weights (statistics copied along).
# SEEN: model.save_pretrained keeps mean 0.680 / variance 2.950; EMAModel.save_pretrained gives
#   0.000 / 1.000, although weights, config and step counter are right, and nothing is printed
#   about it. Latents normalised with it: standard deviation 1.72 in place of 1.00.
# WHY: EMAModel (diffusers/training_utils.py) holds parameters only; save_pretrained builds a NEW
#   model by from_config and copies the parameters in, so every buffer has its initial value.
# INSTEAD: ema.store(model.parameters()); ema.copy_to(model.parameters()); model.save_pretrained();
#   ema.restore(model.parameters()) - the model's own buffers are then saved.
# SEEN with torch 2.14.1, diffusers 0.42.1; numbers above.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"; "$work/venv/bin/pip" install -q torch==2.14.1 diffusers==0.42.1 numpy
OMP_NUM_THREADS=1 DIFFUSERS_VERBOSITY=error "$work/venv/bin/python" -W ignore - "$work" <<'PY'
import sys, torch, diffusers
from diffusers import AutoencoderKLFlux2
from diffusers.training_utils import EMAModel
print("torch", torch.__version__, "diffusers", diffusers.__version__)
torch.manual_seed(0)
model = AutoencoderKLFlux2(down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",),
                           block_out_channels=(16,), layers_per_block=1, latent_channels=4,
                           norm_num_groups=4, mid_block_add_attention=False)
latents = 0.7 + 1.72 * torch.randn(4096, model.bn.num_features, 1, 1)
model.bn.train()
for part in latents.split(64):             # the running statistics of these latents
    model.bn(part)
model.eval()
ema = EMAModel(model.parameters(), decay=0.99, model_cls=AutoencoderKLFlux2, model_config=model.config)
for _ in range(3):
    with torch.no_grad():
        for p in model.parameters(): p.add_(0.01 * torch.randn_like(p))
    ema.step(model.parameters())
seen = {}
def report(name, m):
    bn = m.bn
    z = (latents - bn.running_mean.view(1, -1, 1, 1)) / (bn.running_var.view(1, -1, 1, 1) + bn.eps).sqrt()
    seen[name] = (bn.running_mean.mean().item(), bn.running_var.mean().item(), z.std().item())
    print(f"{name:34s} mean {seen[name][0]:.3f}, variance {seen[name][1]:.3f}, normalised latents: std {seen[name][2]:.3f}")
report("in memory", model)
model.save_pretrained(sys.argv[1] + "/plain"); report("model.save_pretrained", AutoencoderKLFlux2.from_pretrained(sys.argv[1] + "/plain"))
ema.save_pretrained(sys.argv[1] + "/ema"); saved = AutoencoderKLFlux2.from_pretrained(sys.argv[1] + "/ema")
report("EMAModel.save_pretrained", saved)
print("averaged weights saved:", all(torch.equal(a, b) for a, b in zip(saved.parameters(), ema.shadow_params)))
ema.store(model.parameters()); ema.copy_to(model.parameters()); model.save_pretrained(sys.argv[1] + "/fix"); ema.restore(model.parameters())
report("copy_to + model.save_pretrained", AutoencoderKLFlux2.from_pretrained(sys.argv[1] + "/fix"))
print("expected: the same statistics in all rows")
same = lambda a, b: all(abs(u - v) < 1e-4 for u, v in zip(seen[a], seen[b]))
assert same("in memory", "model.save_pretrained") and same("in memory", "copy_to + model.save_pretrained")
m, v, s = seen["EMAModel.save_pretrained"]
assert (m, v) == (0.0, 1.0) and s > 1.5, f"behaviour changed: {m} {v} {s}"
print("SEEN: the saved EMA model has lost the latent statistics")
PY
