#!/usr/bin/env bash
# scikit-image's PSNR of [-1, 1] float images: one pixel's sign moves the result by 6.02 dB.
# Expected: peak_signal_noise_ratio(a, b) of float images uses one range for all of them (2 for [-1, 1] data),
#   so pictures with the same error get the same PSNR.
# Seen: a bright picture with no value below 0 is scored with range 1, every other one with range 2. The same
#   noise gives 30.79 dB or 36.81 dB; changing ONE pixel of the first image from +0.001 to -0.001 adds 6.02 dB.
#   Swapping the two arguments can do it too, and the mean over a set depends on how many bright pictures it has.
# Why (scikit-image 0.26.0, metrics/simple_metrics.py): without data_range, the range is dmax when the
#   smallest value of image_true is >= 0 and dmax - dmin when it is not. (structural_similarity refuses to
#   guess for floats and raises; PSNR does not.)
# Instead: always pass data_range=2 for [-1, 1] images (1 for [0, 1]).
# Output: 30.79 / 36.81 dB, one pixel: +6.02 dB, swapped arguments: +6.02 dB, SSIM raises ValueError.
set -euo pipefail
d=$(mktemp -d); trap 'rm -rf "$d"' EXIT
python3 -m venv "$d/v"
"$d/v/bin/pip" install -q scikit-image==0.26.0 numpy==2.4.6
cat > "$d/t.py" <<'PY'
import numpy as np, skimage, warnings
warnings.simplefilter("error")  # a warning would also end the surprise
from skimage.metrics import peak_signal_noise_ratio as psnr, structural_similarity as ssim
rng = np.random.default_rng(0)
bright = rng.uniform(0.001, 0.9, (32, 32, 3)); bright[0, 0, 0] = 0.001
noise = rng.uniform(0.0, 0.05, bright.shape)
dark = -bright
nudged = bright.copy(); nudged[0, 0, 0] = -0.001
noisy = bright + noise; noisy_low = bright - noise       # noisy_low has values below 0
p_bright, p_dark, p_nudged = psnr(bright, noisy), psnr(dark, dark + noise), psnr(nudged, nudged + noise)
swap = psnr(noisy_low, bright) - psnr(bright, noisy_low)
print("scikit-image", skimage.__version__, "numpy", np.__version__)
print(f"same noise: bright picture {p_bright:.2f} dB, its negative {p_dark:.2f} dB (expected: equal)")
print(f"one pixel from +0.001 to -0.001: {p_nudged - p_bright:+.2f} dB (expected: 0)")
print(f"arguments swapped: {swap:+.2f} dB (expected: 0, the error is symmetric)")
fixed = [psnr(x, x + noise, data_range=2.0) for x in (bright, dark, nudged)]
print("with data_range=2:", [f"{v:.2f}" for v in fixed])
try:
    ssim(bright, noisy, channel_axis=-1); refused = False
except ValueError:
    refused = True
print("structural_similarity refuses to guess:", refused)
assert np.ptp(fixed) < 1e-6 and refused, "control"
for gap in (p_dark - p_bright, p_nudged - p_bright, swap):
    assert abs(gap - 20 * np.log10(2)) < 0.01, "the range no longer hangs on the sign of the smallest pixel"
PY
"$d/v/bin/python" "$d/t.py"
