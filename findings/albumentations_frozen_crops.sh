#!/usr/bin/env bash
# albumentations with DataLoader workers: every epoch repeats the same "random" crops, and workers copy each other.
# Expected: an A.Compose without a seed is random: new crops each epoch, different ones per worker (PyTorch seeds
#   torch, random and numpy in each worker; the old "numpy in workers" trap was closed years ago).
# Seen: with num_workers=2 and the defaults, 3 epochs of 16 crops hold only 8 distinct crops (48 expected): both workers draw
#   the same sequence and each epoch starts it again. torch.manual_seed(epoch) does not help; seed=137 does not
#   either. persistent_workers=True gives new epochs, but the workers are still copies of each other: 24 distinct.
#   num_workers=0: all 48 distinct. Torchvision v2.RandomCrop in the same loader: 47 (one chance hit).
# Why (albumentations 2.0.8, the last one; core/composition.py, set_random_seed): Compose keeps its own
#   np.random.default_rng made in the constructor; forked workers copy it, nothing reseeds it there.
#   (Reported for the successor AlbumentationsX, issue 266, and changed there.)
# Instead: worker_init_fn=lambda i: get_worker_info().dataset.t.set_random_seed(torch.initial_seed() % 2**32).
# Output: distinct crops of 48: 8 default, 8 seed=137, 24 persistent, 48 without workers, 47 torchvision (a chance hit), 48 reseeded.
set -euo pipefail
d=$(mktemp -d); trap 'rm -rf "$d"' EXIT
python3 -m venv "$d/v"
"$d/v/bin/pip" install -q torch==2.14.1 torchvision==0.29.1 albumentations==2.0.8 albucore==0.0.24 opencv-python-headless==5.0.0.93 numpy==2.4.6
cat > "$d/t.py" <<'PY'
import os, warnings
os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
warnings.simplefilter("ignore")
import albumentations as A, numpy as np, torch, torchvision
from torch.utils.data import DataLoader, Dataset, get_worker_info
from torchvision.transforms import v2
EPOCHS, N = 3, 16
picture = np.arange(512 * 512, dtype=np.float32).reshape(512, 512, 1)  # top-left value = crop position

class Crops(Dataset):
    def __init__(self, **kw): self.t = A.Compose([A.RandomCrop(4, 4)], **kw)
    def __len__(self): return N
    def __getitem__(self, i): return int(self.t(image=picture)["image"][0, 0, 0])

class TvCrops(Dataset):
    t = v2.RandomCrop(4)
    def __len__(self): return N
    def __getitem__(self, i): return int(self.t(torch.from_numpy(picture).permute(2, 0, 1))[0, 0, 0])

def reseed(_): get_worker_info().dataset.t.set_random_seed(torch.initial_seed() % 2**32)

def distinct(ds, **kw):
    loader, seen = DataLoader(ds, batch_size=1, multiprocessing_context="fork" if kw.get("num_workers") else None, **kw), []
    for epoch in range(EPOCHS):
        torch.manual_seed(epoch)
        seen += [int(x) for x in loader]
    return len(set(seen))

print("torch", torch.__version__, "albumentations", A.__version__, "- distinct crops of", EPOCHS * N, "(expected: all)")
r = {"workers": distinct(Crops(), num_workers=2), "workers, seed=137": distinct(Crops(seed=137), num_workers=2),
     "persistent workers": distinct(Crops(), num_workers=2, persistent_workers=True), "no workers": distinct(Crops(), num_workers=0),
     "torchvision, workers": distinct(TvCrops(), num_workers=2), "reseeded workers": distinct(Crops(), num_workers=2, worker_init_fn=reseed)}
for k, v in r.items(): print(f"  {k:22s} {v}")
assert min(r["no workers"], r["torchvision, workers"], r["reseeded workers"]) >= 46, "control"
assert r["workers"] <= N // 2 and r["workers, seed=137"] <= N // 2, "workers or epochs now differ"
assert r["persistent workers"] <= EPOCHS * N // 2, "persistent workers now differ from each other"
PY
OMP_NUM_THREADS=1 "$d/v/bin/python" "$d/t.py"
