#!/usr/bin/env bash
# datasets.map + Pillow's in-place calls: the edit is thrown away, or the picture is JPEG-compressed again.
# Expected: map(f) stores the picture f returns; a picture returned untouched is stored bit for bit.
# Seen: (1) pictures from files: after thumbnail((64,64)) / paste(black box) in f, the mapped dataset holds the
#   ORIGINAL 256x256 picture without the box. resize() and copy() work. (2) the same pictures held as bytes:
#   the edit is kept, but f = "return it unchanged" re-encodes each one as JPEG quality 75 (saved at 95).
#   No error and no warning in any of the cases.
# Why (datasets 5.2.0, features/image.py): encode_pil_image() stores only image.filename when Pillow still
#   has one, and in-place calls keep it; image_to_bytes() otherwise calls image.save(format=image.format)
#   with the codec's default quality, and an opened JPEG still says format "JPEG".
# Instead: return a new image, e.g. im = im.copy() before an in-place call (no filename, no format: PNG).
# Output: file thumbnail (256, 256), resize (64, 64); untouched bytes: PSNR 28.3 dB to the input, 16770 -> 7536 bytes.
set -euo pipefail
d=$(mktemp -d); trap 'rm -rf "$d"' EXIT
python3 -m venv "$d/v"
"$d/v/bin/pip" install -q datasets==5.2.0 pillow==13.0.0 numpy==2.4.6
cat > "$d/t.py" <<'PY'
import math, sys
import datasets, numpy as np, PIL
from PIL import Image
datasets.disable_progress_bars()
root = sys.argv[1]
rng = np.random.default_rng(0)
picture = np.kron(rng.integers(0, 256, (32, 32, 3)), np.ones((8, 8, 1))).astype("uint8")
path = root + "/a.jpg"
Image.fromarray(picture).save(path, quality=95)
original = np.asarray(Image.open(path)).astype(float)

feature = datasets.Features(image=datasets.Image())
files = datasets.Dataset.from_dict({"image": [path]}, features=feature)
blobs = datasets.Dataset.from_dict({"image": [{"bytes": open(path, "rb").read(), "path": None}]}, features=feature)

def thumbnail(ex): ex["image"].thumbnail((64, 64)); return {"image": ex["image"]}
def box(ex): ex["image"].paste((0, 0, 0), (0, 0, 128, 128)); return {"image": ex["image"]}
def resize(ex): return {"image": ex["image"].resize((64, 64))}
def copied_box(ex): im = ex["image"].copy(); im.paste((0, 0, 0), (0, 0, 128, 128)); return {"image": im}
def untouched(ex): return {"image": ex["image"]}

def run(ds, f):
    out = ds.map(f, keep_in_memory=True, load_from_cache_file=False)
    raw = out.cast_column("image", datasets.Image(decode=False))[0]["image"]["bytes"]
    im = out[0]["image"]
    return im.size, np.asarray(im).astype(float), len(raw or b"")

print("datasets", datasets.__version__, "pillow", PIL.__version__)
corner = lambda a: a[:120, :120].mean()
res = {(n, f.__name__): run(ds, f) for n, ds in (("file", files), ("bytes", blobs))
       for f in (thumbnail, resize, box, copied_box, untouched)}
for (n, f), (size, a, _) in res.items():
    print(f"{n:5s} {f:10s} size {size}", f"corner mean {corner(a):.1f} (black box: 0)" if "box" in f else "")
a = res["bytes", "untouched"][1]
psnr = 10 * math.log10(255**2 / max(((a - original) ** 2).mean(), 1e-9))
print(f"bytes, returned untouched: PSNR {psnr:.1f} dB to the input (expected: identical), "
      f"{res['bytes', 'untouched'][2]} bytes against {len(open(path, 'rb').read())}")
assert res["file", "resize"][0] == (64, 64) and corner(res["file", "copied_box"][1]) < 1, "control"
assert res["file", "thumbnail"][0] == (256, 256) and corner(res["file", "box"][1]) > 100, "edits now survive"
assert res["bytes", "thumbnail"][0] == (64, 64) and corner(res["bytes", "box"][1]) < 1
assert psnr < 40, "an untouched picture is no longer compressed again"
PY
HF_HUB_OFFLINE=1 HF_HOME="$d/hf" "$d/v/bin/python" "$d/t.py" "$d"
