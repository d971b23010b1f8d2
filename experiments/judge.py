"""Judge samples by a small classifier that this script trains on the real images.

    python experiments/judge.py --data cifar10 --samples a.npz b.npz --ckpt assets/demo.pt
    python experiments/judge.py --data shapes --samples a.npz --steps 500 --no-cas --no-flip

--samples are files that `sample.py --npz` wrote; --network keeps the classifier in a file. Take another --seed for the
last word than for choosing between models. Each set of images has a row:

    recognised         share of images to which the classifier gives the class that was asked for
    FD-classifier      Frechet distance of the classifier's 128 features to those of half of the test images
    precision, recall  Kynkaanniemi et al. 2019 on the same features, between equal numbers of images
    spread             standard deviation of a pixel within a class, of 255, mean over pixels and classes
    CAS                classification accuracy score, Ravuri & Vinyals 2019: test accuracy if it is trained on the set

Beside the samples stand the other half of the test images and, with --ckpt, their reconstructions by its tokenizer. The
CAS of these two rows is that of as many training images as the smallest set has samples, and of their reconstructions.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))
import fid  # noqa: E402
import rdpm  # noqa: E402


class Residual(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


def classifier(classes: int) -> nn.Sequential:
    """A ResNet for images (B, 3, H, W) in [-1, 1]. Its last layer is linear, on 128 features."""
    def conv(c_in: int, c_out: int) -> list[nn.Module]:
        return [nn.Conv2d(c_in, c_out, 3, padding=1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU()]
    return nn.Sequential(*conv(3, 32), *conv(32, 64), nn.MaxPool2d(2), Residual(*conv(64, 64), *conv(64, 64)),
                         *conv(64, 128), nn.MaxPool2d(2), Residual(*conv(128, 128), *conv(128, 128)),
                         nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(128, classes))


def train(images: Tensor, labels: Tensor, classes: int, args: argparse.Namespace, device: torch.device) -> nn.Module:
    """A classifier of bytes (N, 3, H, W): one cycle of SGD, images shifted by up to 4 pixels, with --flip mirrored."""
    torch.manual_seed(args.seed)
    net = classifier(classes).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(net.parameters(), momentum=0.9, nesterov=True, weight_decay=5e-4)
    for step in tqdm(range(args.steps), desc="training a classifier", unit="step"):
        share = min((step + 1) / (0.2 * args.steps), (args.steps - step) / (0.8 * args.steps))
        optimizer.param_groups[0]["lr"] = 0.1 * share
        chosen, side = torch.randint(len(images), (128,)), images.shape[-1]
        x = F.pad(rdpm.to_float(images[chosen]), (4, 4, 4, 4), value=-1.0).permute(0, 2, 3, 1)
        rows, columns = torch.randint(0, 9, (2, len(x), 1)) + torch.arange(side)
        x = x[torch.arange(len(x))[:, None, None], rows[:, :, None], columns[:, None]].permute(0, 3, 1, 2)
        if args.flip:
            x = torch.where(torch.rand(len(x), 1, 1, 1) < 0.5, x, x.flip(3))
        with rdpm.autocast(device):
            logits = net(x.to(device, memory_format=torch.channels_last))
        F.cross_entropy(logits.float(), labels[chosen].to(device), label_smoothing=0.05).backward()
        optimizer.step()
        optimizer.zero_grad()
    return net.eval()


@torch.inference_mode()
def features(net: nn.Sequential, images: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """The 128 features and the predicted classes of bytes (N, 3, H, W)."""
    x = torch.cat([net[:-1](rdpm.to_float(part.to(device))) for part in images.split(500)])
    return x.cpu(), net[-1](x).argmax(1).cpu()


@torch.inference_mode()
def reconstruct(tokenizer: rdpm.Tokenizer, images: Tensor, device: torch.device) -> Tensor:
    parts = []
    for numbers in tqdm(torch.arange(len(images)).split(100), desc="reconstructing", unit_scale=100, unit="img"):
        with rdpm.autocast(device):
            eps = tokenizer.noise(rdpm.ImageStreams(0, numbers.tolist(), device))
            parts.append(rdpm.to_uint8(tokenizer(rdpm.to_float(images[numbers].to(device)), eps)[0]).cpu())
    return torch.cat(parts)


def load(images: rdpm.Images) -> tuple[Tensor, Tensor]:
    """All images as bytes, and their labels, in an order that mixes the classes and is always the same."""
    subset = torch.utils.data.Subset(images, rdpm.balanced_subset(images.labels, len(images)))
    loader = torch.utils.data.DataLoader(subset, 500, num_workers=2)
    x, y = zip(*tqdm(loader, desc="reading", unit_scale=500, unit="img"), strict=True)
    return torch.cat(x), torch.cat(y)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", required=True, help="shapes, mnist, cifar10, or a folder, as for the trainers")
    p.add_argument("--samples", nargs="*", default=[], help=".npz files of images and labels")
    p.add_argument("--ckpt", help="a generator, whose tokenizer reconstructs the test images")
    p.add_argument("--size", type=int, default=32, help="of the images")
    p.add_argument("--flip", action=argparse.BooleanOptionalAction, default=True, help="mirror training images")
    p.add_argument("--pad", action="store_true", help="pad smaller images, as the mnist preset does")
    p.add_argument("--steps", type=rdpm.positive_int, default=2000, help="of 128 images, to train a classifier")
    p.add_argument("--cas", action=argparse.BooleanOptionalAction, default=True, help="a classifier for each row")
    p.add_argument("--network", type=Path, help="keep the classifier here; a file that is there is used as it is")
    p.add_argument("--seed", type=int, default=0)
    args = p.parse_args()
    device, sets = rdpm.launch(None), []
    for path in args.samples:
        x, y = (torch.from_numpy(fid.read_npz(path, key)[key]) for key in ("arr_0", "arr_1"))
        sets.append((path, x.permute(0, 3, 1, 2), y))
        if x.shape[1:] != (args.size, args.size, 3):
            raise rdpm.UserError(f"{path}: images are {x.shape[1]} x {x.shape[2]}; give --size {x.shape[1]}")
    test = rdpm.load_data(args.data, args.size, train=False, pad=args.pad)
    classes, (x_test, y_test), stored = len(test.classes), load(test), args.network and args.network.is_file()
    if args.cas or not stored:
        x_train, y_train = load(rdpm.load_data(args.data, args.size, train=True, pad=args.pad))
    if stored:
        net = classifier(classes).to(device).eval()
        net.load_state_dict(torch.load(args.network, device, weights_only=True))
    else:
        net = train(x_train, y_train, classes, args, device)
        if args.network:
            args.network.parent.mkdir(parents=True, exist_ok=True)
            torch.save(net.state_dict(), args.network)
    half = 2 * F.one_hot(y_test).cumsum(0).gather(1, y_test[:, None])[:, 0] <= y_test.bincount()[y_test]  # by class
    n = min([len(x) for _, x, _ in sets], default=len(x_test) // 2)
    taught = {"test images": (x_train[:n], y_train[:n])} if args.cas else {}
    rows = [("test images", x_test[~half], y_test[~half])]
    if args.ckpt:
        tokenizer = rdpm.load_generator(args.ckpt, device)[1]
        rows.append(("reconstructions", reconstruct(tokenizer, x_test[~half], device), y_test[~half]))
        if args.cas:
            taught["reconstructions"] = reconstruct(tokenizer, x_train[:n], device), y_train[:n]
    reference, _ = features(net, x_test[half], device)
    print("| set | images | recognised, % | FD-classifier | precision | recall | spread | CAS, % |\n|" + " --- |" * 8)
    for name, x, y in rows + sets:
        found, predicted = features(net, x, device)
        moments = [m for z in (found, reference) for m in (z.double().mean(0).numpy(), np.cov(z.double().numpy().T))]
        spread = torch.stack([x[y == c].float().std(0).mean() for c in range(classes) if (y == c).sum() > 1]).mean()
        precision, recall = fid.precision_recall(reference=reference[:len(x)], samples=found[:len(reference)])
        student = train(*taught.get(name, (x, y)), classes, args, device) if args.cas else None
        cas = f"{100 * (features(student, x_test, device)[1] == y_test).double().mean():.1f}" if student else "-"
        print(f"| {name} | {len(x)} | {100 * (predicted == y).double().mean():.1f} | "
              f"{fid.frechet_distance(*moments):.3f} | {precision:.3f} | {recall:.3f} | "
              f"{spread:.1f} | {cas} |", flush=True)


if __name__ == "__main__":
    rdpm.run_main(main)
