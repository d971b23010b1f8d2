"""Does the generator copy? Its samples' nearest training images, in pixels and in a judge's features.

    python experiments/nearest.py --data cifar10 --samples a.npz --network judge0.pt --out nearest.png

--samples is a file that `sample.py --npz` wrote, --network a classifier that judge.py kept. The
picture has a column for each of twelve samples: the sample, its two nearest training images in
pixels (mirror images too), its two nearest in features. Printed are the distances (of pixels the
root mean square, of 255) of all samples to their nearest training image, and of at most as many
test images: a copy would lie nearer than test images do.
"""

import argparse
import sys
from pathlib import Path

import judge
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
import rdpm  # noqa: E402


def nearest(x: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor]:
    """Distances (N, 2) of x (N, D) to the two nearest candidates (M, D), and their indices (N, 2)."""
    found = [torch.cdist(rows, candidates).topk(2, largest=False) for rows in x.split(50)]
    distances, places = zip(*found, strict=True)
    return torch.cat(distances), torch.cat(places)


def report(space: str, whose: str, distances: Tensor) -> None:
    low, middle = distances.quantile(torch.tensor([0.01, 0.5])).tolist()
    print(f"{space}: nearest training image of {len(distances)} {whose}: "
          f"1 % within {low:.2f}, median {middle:.2f}")


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", required=True, help="shapes, mnist, cifar10, or a folder")
    p.add_argument("--samples", required=True, help=".npz file of images and labels")
    p.add_argument("--network", required=True, help="a classifier that judge.py --network has kept")
    p.add_argument("--size", type=rdpm.positive_int, default=32, help="of the images")
    p.add_argument("--pad", action="store_true", help="pad smaller images, as the mnist preset does")
    p.add_argument("--out", type=Path, default=Path("nearest.png"))
    args = p.parse_args()
    train_set = rdpm.load_data(args.data, args.size, train=True, pad=args.pad)
    test_set = rdpm.load_data(args.data, args.size, train=False, pad=args.pad)
    net = judge.load_judge(args.network, train_set.classes)
    samples, _ = judge.read_samples(args.samples, args.size, len(train_set.classes))
    train, _ = judge.load(train_set)
    test = judge.load(test_set)[0][:len(samples)]

    def in_pixels(images: Tensor) -> Tensor:  # distances become root mean squares
        return images.flatten(1).float() / images[0].numel() ** 0.5

    def in_features(images: Tensor) -> Tensor:
        return judge.features(net, images)[0]

    rows = [samples[:12]]
    with_mirrored = torch.cat([train, train.flip(3)])
    for space, describe, candidates in (
            ("pixels", in_pixels, with_mirrored), ("features", in_features, train)):
        known = describe(candidates)
        distances, places = nearest(describe(samples), known)
        report(space, "samples", distances[:, 0])
        report(space, "test images", nearest(describe(test), known)[0][:, 0])
        rows += [candidates[places[:12, 0]], candidates[places[:12, 1]]]
    with rdpm.replacing(args.out) as path:
        rdpm.image_grid(torch.cat(rows), columns=len(rows[0])).save(path)


if __name__ == "__main__":
    rdpm.run_main(main)
