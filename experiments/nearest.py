"""Does the generator copy? The nearest training images of its samples, in pixels and in a classifier's features.

    python experiments/nearest.py --data cifar10 --samples a.npz --network judge.pt --out nearest.png

--samples is a file that `sample.py --npz` wrote, --network a classifier that judge.py kept. The picture has a column
for each of twelve samples: the sample, its two nearest training images in pixels (mirror images too), its two nearest
in features. Printed are the distances (of pixels the root mean square, of 255) of all samples to their nearest training
image, and of at most as many test images: a copy would lie nearer than test images do.
"""

import argparse
import sys
from pathlib import Path

import judge
import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
import rdpm  # noqa: E402


def nearest(x: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor]:
    """Distances (N, 2) of x (N, D) to the two nearest of candidates (M, D), and their indices (N, 2)."""
    found = [torch.cdist(part, candidates).topk(2, largest=False) for part in x.split(50)]
    return torch.cat([part.values for part in found]), torch.cat([part.indices for part in found])


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", required=True, help="shapes, mnist, cifar10, or a folder, as for the trainers")
    p.add_argument("--samples", required=True, help=".npz file of images and labels")
    p.add_argument("--network", required=True, help="a classifier that judge.py --network has kept")
    p.add_argument("--pad", action="store_true", help="pad smaller images, as the mnist preset does")
    p.add_argument("--out", type=Path, default=Path("nearest.png"))
    args = p.parse_args()
    samples = torch.from_numpy(np.load(args.samples)["arr_0"]).permute(0, 3, 1, 2)
    sets = [rdpm.load_data(args.data, samples.shape[-1], train=train, pad=args.pad) for train in (True, False)]
    (train, _), (test, _) = map(judge.load, sets)
    test = test[:len(samples)]
    net = judge.classifier(len(sets[0].classes)).eval()
    net.load_state_dict(torch.load(args.network, "cpu", weights_only=True))
    features = [judge.features(net, x, torch.device("cpu"))[0] for x in (samples, test, train)]
    train = torch.cat([train, train.flip(3)])  # features are of the images as they are
    pixels = [x.flatten(1).float() for x in (samples, test, train)]
    rows = [samples[:12]]
    for name, (of_samples, of_test, of_train), scale in (("pixels", pixels, pixels[0].shape[1] ** 0.5),
                                                         ("features", features, 1.0)):
        distances, places = nearest(of_samples, of_train)
        real, _ = nearest(of_test, of_train)
        rows += [train[places[:12, i]] for i in (0, 1)]
        for whose, found in (("samples", distances), ("test images", real)):
            low, middle = (found[:, 0] / scale).quantile(torch.tensor([0.01, 0.5])).tolist()
            print(f"{name}: nearest training image of {len(found)} {whose}: 1 % within {low:.2f}, median {middle:.2f}")
    with rdpm.replacing(args.out) as path:
        rdpm.image_grid(torch.cat(rows), columns=len(rows[0])).save(path)


if __name__ == "__main__":
    rdpm.run_main(main)
