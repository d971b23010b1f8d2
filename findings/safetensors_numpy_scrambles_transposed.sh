#!/usr/bin/env bash
# safetensors.numpy.save_file stores a transposed array with its values in the wrong places, without an error.
# Expected: a copy in C order as np.save does, or the ValueError that safetensors.torch raises for the same data.
# Seen: shape, dtype and file size are right, the values are permuted. Hits HWC pictures turned to CHW with
#   transpose(2, 0, 1), weights w.T, every second column, and Fortran-order arrays (PCA, whitening matrices).
#   0.7.0 stores all of them correctly: an upgrade from 0.7 to 0.8 is enough.
# Why (safetensors 0.8.0, numpy.py, _flatten): the array is handed over as its data pointer plus nbytes, so
#   memory order is written under the logical shape. The docstring says "contiguous"; nothing checks it.
#   (Also reported upstream in August 2026, issue 825, open when this was written.)
# Instead: {k: np.ascontiguousarray(v) for k, v in arrays.items()} before save or save_file.
# Output: 0.8.0: 4 of 4 arrays wrong (98 to 99 % of the values); 0.7.0: 4 of 4 right.
set -euo pipefail
d=$(mktemp -d); trap 'rm -rf "$d"' EXIT
cat > "$d/t.py" <<'PY'
import sys
import numpy as np, safetensors
from safetensors.numpy import load_file, save_file
rng = np.random.default_rng(0)
hwc = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
w = rng.standard_normal((8, 12)).astype(np.float32)
arrays = {"picture_chw": hwc.transpose(2, 0, 1), "weight_T": w.T, "every_2nd": w[:, ::2], "fortran": np.asfortranarray(w)}
path = sys.argv[1] + "/a.safetensors"
save_file(arrays, path)
back = load_file(path)
print("safetensors", safetensors.__version__, "numpy", np.__version__)
wrong = 0
for k, v in arrays.items():
    assert back[k].shape == v.shape and back[k].dtype == v.dtype
    bad = float((back[k] != v).mean())
    wrong += bad > 0
    print(f"  {k:12s} {100 * bad:5.1f} % of the values differ after save and load (expected 0)")
save_file({k: np.ascontiguousarray(v) for k, v in arrays.items()}, path)
back = load_file(path)
assert all(np.array_equal(back[k], v) for k, v in arrays.items()), "control: ascontiguousarray first"
print("  wrong arrays:", wrong, "of", len(arrays))
assert wrong == int(sys.argv[2]), f"expected {sys.argv[2]} wrong arrays"
PY
for pair in 0.7.0:0 0.8.0:4; do
  python3 -m venv "$d/v${pair%%:*}"
  "$d/v${pair%%:*}/bin/pip" install -q "safetensors==${pair%%:*}" numpy==2.4.6
  "$d/v${pair%%:*}/bin/python" "$d/t.py" "$d" "${pair##*:}"
done
