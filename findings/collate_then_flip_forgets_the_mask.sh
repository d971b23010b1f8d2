#!/usr/bin/env bash
# The same torchvision v2 flip turns image AND mask before the DataLoader, but only the image after it.
# Expected: a dataset returns (tv_tensors.Image, tv_tensors.Mask); v2.RandomHorizontalFlip applied to the pair in
#   the dataset or to the collated batch (to do it on the GPU) treats both alike.
# Seen: on the batch, images are flipped and masks are not; no warning. The pairs are silently misaligned. The same
#   for two images (input and target of a restoration or conditional model): the target is left as it was.
#   v2.Resize on the batch resizes the images only; a crop changes image and mask shapes apart.
# Why: DataLoader's default_collate uses torch.stack, whose result is a plain Tensor (torchvision 0.29.1,
#   tv_tensors/_tv_tensor.py, __torch_function__), and in v2/_utils.py/_transform.py a sample with no Image in it has its
#   FIRST plain tensor treated as the image and every later one passed through (_needs_transform_list).
# Instead: wrap again after collating: tv_tensors.Image(x), tv_tensors.Mask(m) (or wrap in collate_fn).
# Output: per sample 8/8 pairs aligned, on the batch 0/8, wrapped again 8/8; two images 0/8.
set -euo pipefail
d=$(mktemp -d); trap 'rm -rf "$d"' EXIT
python3 -m venv "$d/v"
"$d/v/bin/pip" install -q torch==2.14.1 torchvision==0.29.1 numpy==2.4.6
cat > "$d/t.py" <<'PY'
import warnings
warnings.simplefilter("error")   # a warning would end the surprise
import torch, torchvision
from torch.utils.data import DataLoader
from torchvision import tv_tensors as tv
from torchvision.transforms import v2
torch.manual_seed(0)
pics = torch.rand(8, 3, 8, 8)
flip = v2.RandomHorizontalFlip(p=1.0)

class Pairs(torch.utils.data.Dataset):
    def __init__(self, second, transform=None): self.second, self.transform = second, transform
    def __len__(self): return 8
    def __getitem__(self, i):
        # the mask marks the bright pixels of the first channel, so alignment can be checked
        pair = tv.Image(pics[i]), self.second((pics[i, :1] > 0.5).float())
        return self.transform(*pair) if self.transform else pair

def aligned(x, m): return int(((x[:, :1] > 0.5).float() == m).flatten(1).all(1).sum())
def batch(ds): return next(iter(DataLoader(ds, batch_size=8)))

x, m = batch(Pairs(tv.Mask, flip)); sample = aligned(x, m); moved = not torch.equal(x, pics)
x, m = batch(Pairs(tv.Mask)); kinds = type(x).__name__, type(m).__name__
y, n = flip(x, m); on_batch = aligned(y, n)
z, k = flip(tv.Image(x), tv.Mask(m)); wrapped = aligned(z, k)
x2, t2 = batch(Pairs(tv.Image)); two = aligned(*flip(x2, t2))
r, s = v2.Resize(4)(x, m)
print("torch", torch.__version__, "torchvision", torchvision.__version__)
print("types after DataLoader:", kinds, "(put in: Image, Mask)")
print(f"aligned pairs: flip per sample {sample}/8, flip on the batch {on_batch}/8 (expected 8), wrapped again {wrapped}/8")
print(f"image + target image, flip on the batch: {two}/8 (expected 8)")
print("Resize(4) on the batch:", tuple(r.shape), tuple(s.shape), "(expected both 4x4)")
assert moved and sample == 8 and wrapped == 8 and aligned(x, m) == 8, "control"
assert on_batch == 0 and two == 0 and s.shape[-1] == 8, "the batch transform now treats both"
PY
"$d/v/bin/python" "$d/t.py"
