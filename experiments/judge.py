"""Judge samples by small classifiers that this script trains on the real images.

    python experiments/judge.py --data cifar10 --samples a.npz b.npz --ckpt assets/demo.pt
    python experiments/judge.py --data shapes --samples a.npz --steps 500 --no-cas --no-flip

--samples are files of `sample.py --npz`. Classifiers that agree on real images may differ on samples, so there are
three (--judges), of --seed, --seed + 1, ...; a cell holds their mean and range. Take other seeds for the last word than
for choosing between models. Each set of images has a row:

    recognised         share of images to which a judge gives the class that was asked for
    relative FD        Frechet distance of a judge's 128 features to those of half of the test images, over the total
                       variance of the latter (trace of their covariance): it does not depend on the features' scale
    precision, recall  Kynkaanniemi et al. 2019 on these features, of equal numbers of images
    spread             standard deviation of a pixel within a class, of 255, mean over pixels and classes
    CAS                classification accuracy score, Ravuri & Vinyals 2019: test accuracy of a student of the set

Beside the samples stand the other half of the test images and, with --ckpt, their reconstructions by its tokenizer. The
students of these two learn as many training images as the smallest set has samples, or the reconstructions of these.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision import transforms
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))
import fid  # noqa: E402
import rdpm  # noqa: E402


def read_samples(path: str, size: int, classes: int) -> tuple[Tensor, Tensor]:
    """Images (N, 3, H, W) and the labels that were asked for. UserError if they are anything else."""
    with fid.open_npz(Path(path)) as file:
        x = file.get("arr_0", np.zeros(0))
        y = file.get("arr_1", np.zeros(0))
    if x.dtype != np.uint8 or x.shape != (len(x), size, size, 3) or len(x) < 4:
        raise rdpm.UserError(
            f"{path}: arr_0 is {x.dtype} {x.shape}, but must be uint8 RGB (N, {size}, {size}, 3), "
            "N at least 4; give another --size, or write it again")
    if y.dtype.kind not in "iu" or y.shape != (len(x),) or not np.isin(y, range(classes)).all():
        raise rdpm.UserError(
            f"{path}: arr_1 is {y.dtype} {y.shape}, but must be {len(x)} integers from 0 to "
            f"{classes - 1}, the classes of --data; of one-hot labels write the argmax")
    return torch.from_numpy(x).permute(0, 3, 1, 2), torch.from_numpy(y.astype(np.int64))


def load(images: rdpm.Images) -> tuple[Tensor, Tensor]:
    """All images as bytes, and their labels, in a fixed order that mixes the classes."""
    order = rdpm.balanced_subset(images.labels, len(images))
    x = [images[i][0] for i in tqdm(order, desc="reading", unit="img")]
    return torch.stack(x), torch.from_numpy(images.labels[order])


@torch.inference_mode()
def reconstruct(tokenizer: rdpm.Tokenizer, images: Tensor, device: torch.device) -> Tensor:
    chunks = []
    numbers = torch.arange(len(images)).split(100)
    for chunk in tqdm(numbers, desc="reconstructing", unit_scale=100, unit="img"):
        x = rdpm.to_float(images[chunk].to(device))
        with rdpm.autocast(device):
            eps = tokenizer.noise(rdpm.ImageStreams(0, chunk.tolist(), device))
            x_rec, _, _ = tokenizer(x, eps)
        chunks.append(rdpm.to_uint8(x_rec).cpu())
    return torch.cat(chunks)


class Residual(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


def classifier(classes: int) -> nn.Sequential:
    """A ResNet for images (B, 3, H, W) in [-1, 1]. Its last layer is linear, on 128 features."""
    def conv(c_in: int, c_out: int) -> nn.Sequential:
        layer = nn.Conv2d(c_in, c_out, 3, padding=1, bias=False)
        return nn.Sequential(layer, nn.BatchNorm2d(c_out), nn.ReLU())

    return nn.Sequential(
        conv(3, 32),
        conv(32, 64),
        nn.MaxPool2d(2),
        Residual(conv(64, 64), conv(64, 64)),
        conv(64, 128),
        nn.MaxPool2d(2),
        Residual(conv(128, 128), conv(128, 128)),
        nn.AdaptiveMaxPool2d(1),
        nn.Flatten(),
        nn.Linear(128, classes))


def train(x: Tensor, y: Tensor, classes: int, seed: int, args: argparse.Namespace) -> nn.Sequential:
    """A classifier of bytes (N, 3, H, W): one cycle of SGD in batches of 128."""
    torch.manual_seed(seed)
    net = classifier(classes).to(args.device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(net.parameters(), momentum=0.9, nesterov=True, weight_decay=5e-4)
    shift = transforms.RandomCrop(args.size, padding=4)
    mirror = transforms.RandomHorizontalFlip(0.5 if args.flip else 0)
    for step in tqdm(range(args.steps), desc=f"training a classifier, seed {seed}", unit="step"):
        optimizer.param_groups[0]["lr"] = np.interp(step, [-1, 0.2 * args.steps, args.steps], [0, 0.1, 0])
        chosen = torch.randint(len(x), (128,))
        batch = torch.stack([mirror(shift(image)) for image in x[chosen]])
        batch = rdpm.to_float(batch.to(args.device))
        with rdpm.autocast(args.device):
            logits = net(batch)
        answers = y[chosen].to(args.device)
        loss = F.cross_entropy(logits.float(), answers, label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net.eval()


def load_judge(path: str | Path, classes: list[str]) -> nn.Sequential:
    """A classifier that --network has kept."""
    kept = torch.load(path, "cpu", weights_only=True)
    if kept.get("classes") != classes:  # also what an earlier version wrote
        raise rdpm.UserError(f"{path}: not of the classes of --data; give another --network")
    net = classifier(len(classes))
    net.load_state_dict(kept["model"])
    return net.eval()


@torch.inference_mode()
def features(net: nn.Sequential, images: Tensor) -> tuple[Tensor, Tensor]:
    """The 128 features and the predicted classes of bytes (N, 3, H, W)."""
    device = net[-1].weight.device
    x = torch.cat([net[:-1](rdpm.to_float(chunk.to(device))) for chunk in images.split(500)])
    return x.cpu(), net[-1](x).argmax(1).cpu()


def scores(judge: nn.Sequential, x: Tensor, y: Tensor, real: Tensor) -> list[float]:
    """What one judge, to whom the reference looks like `real` (M, 128), says of images: the first four columns."""
    def moments(z: Tensor) -> tuple[np.ndarray, np.ndarray]:
        return z.double().mean(0).numpy(), z.double().T.cov().numpy()

    found, predicted = features(judge, x)
    recognised = 100 * (predicted == y).double().mean().item()
    distance = fid.frechet_distance(*moments(found), *moments(real))
    variance = real.double().var(0).sum().item()
    n = min(len(found), len(real))
    precision, recall = fid.precision_recall(reference=real[:n], samples=found[:n])
    return [recognised, distance / variance, precision, recall]


def parse_args() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    switch = argparse.BooleanOptionalAction
    add("--data", required=True, help="shapes, mnist, cifar10, or a folder, as for the trainers")
    add("--samples", nargs="*", default=[], help=".npz files of images and labels")
    add("--ckpt", help="a generator, whose tokenizer reconstructs the test images")
    add("--size", type=rdpm.positive_int, default=32, help="of the images")
    add("--flip", action=switch, default=True, help="mirror training images")
    add("--pad", action="store_true", help="pad smaller images, as the mnist preset does")
    add("--judges", type=rdpm.positive_int, default=3, help="classifiers; each is trained in minutes")
    add("--steps", type=rdpm.positive_int, default=2000, help="of 128 images, to train a classifier")
    add("--cas", action=switch, default=True, help="train a student for each row")
    add("--network", help="keep the judges in NETWORK0.pt, NETWORK1.pt, ..., by their seeds (for a "
                          "folder end with /); those that are there are used as they are")
    add("--seed", type=rdpm.natural_int, default=0, help="of the first judge, and of the students")
    args = p.parse_args()
    args.device = rdpm.launch(None)
    return args


def main() -> None:
    args = parse_args()
    test = rdpm.load_data(args.data, args.size, train=False, pad=args.pad)
    classes = len(test.classes)
    samples = {path: read_samples(path, args.size, classes) for path in args.samples}

    # Of each class every other test image is a reference; the others are the first row.
    x_train, y_train = load(rdpm.load_data(args.data, args.size, train=True, pad=args.pad))
    x_test, y_test = load(test)
    is_reference = torch.zeros(len(y_test), dtype=torch.bool)
    for label in range(classes):
        is_reference[(y_test == label).nonzero()[1::2]] = True
    reference = x_test[is_reference]
    x = x_test[~is_reference]
    y = y_test[~is_reference]
    rows = {"test images": (x, y)}
    n = min([len(labels) for _, labels in samples.values()], default=len(reference))
    lessons = samples | {"test images": (x_train[:n], y_train[:n])}  # of the students
    if args.ckpt:
        tokenizer = rdpm.load_generator(args.ckpt, args.device)[1]
        rows["reconstructions"] = reconstruct(tokenizer, x, args.device), y
        if args.cas:
            x_rec = reconstruct(tokenizer, x_train[:n], args.device)
            lessons["reconstructions"] = x_rec, y_train[:n]

    judges = []
    for seed in range(args.seed, args.seed + args.judges):
        path = Path(f"{args.network}{seed}.pt")
        if args.network and path.is_file():
            judges.append(load_judge(path, test.classes).to(args.device))
            continue
        judges.append(train(x_train, y_train, classes, seed, args))
        if args.network:
            path.parent.mkdir(parents=True, exist_ok=True)
            with rdpm.replacing(path) as unfinished:
                torch.save({"classes": test.classes, "model": judges[-1].state_dict()}, unfinished)

    reals = [features(judge, reference)[0] for judge in judges]
    print("| set | images | recognised, % | relative FD | precision | recall | spread | CAS, % |")
    print("|" + " --- |" * 8)
    for name, (x, y) in (rows | samples).items():
        judged = [scores(judge, x, y, real) for judge, real in zip(judges, reals, strict=True)]
        cells = [f"{of.mean():.3g} ({of.min():.3g}-{of.max():.3g})" for of in np.transpose(judged)]
        by_class = [x[y == label].float() for label in y.unique()]
        spread = torch.stack([z.std(0).mean() for z in by_class if len(z) > 1]).mean()
        cas = "-"
        if args.cas:
            student = train(*lessons[name], classes, args.seed, args)
            _, predicted = features(student, x_test)
            accuracy = (predicted == y_test).double().mean()
            cas = f"{100 * accuracy:.1f}"
        print("|", " | ".join([name, str(len(x)), *cells, f"{spread:.1f}", cas]), "|", flush=True)


if __name__ == "__main__":
    rdpm.run_main(main)
