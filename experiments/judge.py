"""Judge samples by a small classifier that this script trains on the real images.

    python experiments/judge.py --data cifar10 --samples a.npz b.npz --ckpt assets/demo.pt
    python experiments/judge.py --data shapes --samples a.npz --steps 500 --no-cas

--samples are files that `sample.py --npz` wrote. The classifier is a ResNet of 0.6 million parameters; with --network it
is kept in a file and trained only once. Use another --seed for the last word than for choosing between models.

A row for each set of images
    recognised  share of images to which the classifier gives the class that was asked for
    FD          Frechet distance of the classifier's 128 features (not FID's) to those of half of the test images
    precision, recall   Kynkaanniemi et al. 2019 on the same features, between equal numbers of images
    spread      standard deviation of a pixel within a class, of 255, mean over pixels and classes
    CAS         classification accuracy score (Ravuri & Vinyals 2019): test accuracy of a classifier trained on the set

Beside the samples stand the other half of the test images and, with --ckpt, their reconstructions by its tokenizer. The
CAS of these two rows is that of as many training images as there are samples, and of their reconstructions.
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
    """A classifier of bytes (N, 3, H, W): SGD in one cycle, on images shifted by up to 4 pixels, with --flip mirrored."""
    torch.manual_seed(args.seed)
    net = classifier(classes).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(net.parameters(), momentum=0.9, nesterov=True, weight_decay=5e-4)
    for step in tqdm(range(args.steps), desc="training a classifier", unit_scale=128, unit="img"):
        for group in optimizer.param_groups:
            group["lr"] = 0.2 * min((step + 1) / (0.2 * args.steps), (args.steps - step) / (0.8 * args.steps))
        chosen = torch.randint(len(images), (128,))
        x, size = F.pad(rdpm.to_float(images[chosen]), (4, 4, 4, 4), value=-1.0), images.shape[-1]
        top, left = torch.randint(0, 9, (2, len(x)))
        rows, columns = (shift[:, None] + torch.arange(size) for shift in (top, left))
        x = x.permute(0, 2, 3, 1)[torch.arange(len(x))[:, None, None], rows[:, :, None], columns[:, None]]
        if args.flip:
            x = torch.where(torch.rand(len(x), 1, 1, 1) < 0.5, x, x.flip(2))
        with rdpm.autocast(device):
            logits = net(x.permute(0, 3, 1, 2).to(device))
        F.cross_entropy(logits.float(), labels[chosen].to(device), label_smoothing=0.05).backward()
        optimizer.step()
        optimizer.zero_grad()
    return net.eval()


@torch.inference_mode()
def features(net: nn.Sequential, images: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """The 128 features and the predicted classes of bytes (N, 3, H, W)."""
    x = torch.cat([net[:-1](rdpm.to_float(part.to(device))).cpu() for part in images.split(500)])
    return x, torch.cat([net[-1](part.to(device)).argmax(1).cpu() for part in x.split(500)])


@torch.inference_mode()
def reconstruct(tokenizer: rdpm.Tokenizer, images: Tensor, device: torch.device) -> Tensor:
    parts = []
    for numbers in tqdm(torch.arange(len(images)).split(100), desc="reconstructing", unit_scale=100, unit="img"):
        with rdpm.autocast(device):
            x = rdpm.to_float(images[numbers].to(device))
            parts.append(rdpm.to_uint8(tokenizer(x, tokenizer.noise(0, numbers.tolist(), device))[0]).cpu())
    return torch.cat(parts)


def load(images: rdpm.Images) -> tuple[Tensor, Tensor]:
    """All images as bytes, and their labels, in an order that mixes the classes and is always the same."""
    order = np.random.default_rng(0).permutation(len(images)).tolist()
    loader = torch.utils.data.DataLoader(torch.utils.data.Subset(images, order), 500, num_workers=2)
    x, y = zip(*tqdm(loader, desc="reading", unit_scale=500, unit="img"), strict=True)
    return torch.cat(x), torch.cat(y)


def moments(x: Tensor) -> tuple[np.ndarray, np.ndarray]:
    return x.double().mean(0).numpy(), np.cov(x.double().numpy(), rowvar=False)


def spread(images: Tensor, labels: Tensor) -> float:
    """Standard deviation of a pixel within a class, mean over pixels and classes."""
    return torch.stack([images[labels == y].float().std(0).mean() for y in labels.unique()]).mean().item()


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", required=True, help="shapes, mnist, cifar10, or a folder, as for the trainers")
    p.add_argument("--samples", nargs="*", default=[], help=".npz files of images and labels")
    p.add_argument("--ckpt", help="a generator, whose tokenizer reconstructs the test images")
    p.add_argument("--size", type=int, default=32, help="of the images")
    p.add_argument("--flip", action=argparse.BooleanOptionalAction, default=True, help="mirror training images")
    p.add_argument("--pad", action="store_true", help="pad smaller images, as the mnist preset does")
    p.add_argument("--steps", type=int, default=2000, help="of 128 images, to train a classifier")
    p.add_argument("--cas", action=argparse.BooleanOptionalAction, default=True, help="a classifier for each row")
    p.add_argument("--network", type=Path, help="keep the classifier here; if the file is there, use it")
    p.add_argument("--seed", type=int, default=0)
    args = p.parse_args()
    device = rdpm.launch().device
    x_test, y_test = load(rdpm.load_data(args.data, args.size, train=False, pad=args.pad))
    x_train, y_train = None, None
    classes = int(y_test.max()) + 1
    if args.cas or not (args.network and args.network.is_file()):
        x_train, y_train = load(rdpm.load_data(args.data, args.size, train=True, pad=args.pad))
    if args.network and args.network.is_file():
        net = classifier(classes).to(device).eval()
        net.load_state_dict(torch.load(args.network, device, weights_only=True))
    else:
        net = train(x_train, y_train, classes, args, device)
        if args.network:
            torch.save(net.state_dict(), args.network)

    half = len(x_test) // 2
    files = [np.load(path) for path in args.samples]
    sets = [(path, *(torch.from_numpy(file[key]) for key in ("arr_0", "arr_1"))) for path, file in
            zip(args.samples, files, strict=True)]
    sets = [(path, x.permute(0, 3, 1, 2), y) for path, x, y in sets]
    n = min([len(x) for _, x, _ in sets], default=half)
    taught = {"test images": (x_train[:n], y_train[:n])} if args.cas else {}
    rows = [("test images", x_test[half:], y_test[half:])]
    if args.ckpt:
        tokenizer = rdpm.load_generator(args.ckpt, device)[1]
        rows.append(("reconstructions", reconstruct(tokenizer, x_test[half:], device), y_test[half:]))
        if args.cas:
            taught["reconstructions"] = reconstruct(tokenizer, x_train[:n], device), y_train[:n]
    reference, _ = features(net, x_test[:half], device)
    print("| set | images | recognised, % | FD | precision | recall | spread | CAS, % |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for name, x, y in rows + sets:
        found, predicted = features(net, x, device)
        n = min(len(found), len(reference))
        precision, recall = fid.precision_recall(reference=reference[:n], samples=found[:n])
        cas = "-"
        if args.cas:
            student = train(*taught.get(name, (x, y)), classes, args, device)
            cas = f"{100 * (features(student, x_test, device)[1] == y_test).double().mean():.1f}"
        print(f"| {name} | {len(x)} | {100 * (predicted == y).double().mean():.1f} | "
              f"{fid.frechet_distance(*moments(found), *moments(reference)):.3f} | {precision:.3f} | {recall:.3f} | "
              f"{spread(x, y):.1f} | {cas} |", flush=True)


if __name__ == "__main__":
    rdpm.run_main(main)
