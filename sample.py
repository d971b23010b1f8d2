"""Generate images (Alg. 2).

    python sample.py                                        # the demo checkpoint: writes samples.png
    python sample.py --ckpt runs/imagenet-gen/model.pt --classes 207 282 --num 16
    python sample.py --num 50000 --npz samples.npz          # for an evaluator: arr_0 uint8 (N, H, W, 3), arr_1 labels
    python sample.py --steps --num 8                        # one row per image: z'_1 ... z'_T decoded

Table 3: raw is --guidance 0 --no-gumbel; then --guidance-schedule constant, linear, and --gumbel with --tau.
What is not given comes from the checkpoint's own defaults. Image i depends on --seed, i and its class alone.
"""

import argparse
import math
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import rdpm


def parse_args() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--ckpt", default=str(Path(__file__).parent / "assets" / "demo.pt"), help="a generator's model.pt")
    p.add_argument("--classes", nargs="+", help="names or indices (default: all, balanced)")
    p.add_argument("--num", type=int, default=100, help="number of images")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--guidance", type=float, help="strength lambda; 0 is none")
    p.add_argument("--guidance-schedule", choices=("constant", "linear"))
    p.add_argument("--tau", type=float, help="inverse temperature, Eq. (8)")
    p.add_argument("--gumbel", action=argparse.BooleanOptionalAction, help="draw codes, Eq. (8), or take the likeliest")
    p.add_argument("--steps", action="store_true", help="show all z'_t of an image in a row")
    p.add_argument("--out", default="samples.png", help="the picture (the first 100 images)")
    p.add_argument("--npz", help="also write all images and labels here")
    p.add_argument("--batch", type=int, default=100)
    p.add_argument("--device", help="cuda, mps or cpu; the best there is by default")
    return p.parse_args()


def class_index(name: str, classes: list[str]) -> int:
    """A class by name or by index."""
    if name in classes:
        return classes.index(name)
    if name.isdecimal() and int(name) < len(classes):
        return int(name)
    raise rdpm.UserError(f"--classes {name}: not a class of this checkpoint; it has 0 ... {len(classes) - 1}: "
                         + ", ".join(classes[:20]) + (", ..." if len(classes) > 20 else ""))


def main() -> None:
    args = parse_args()
    if args.num < 1 or args.batch < 1 or not 0 <= args.seed < 2**32:
        raise rdpm.UserError(f"--num {args.num}, --batch {args.batch}, --seed {args.seed}: num and batch must be at "
                             "least 1, the seed 0 ... 2^32 - 1")
    for flag, value in (("--guidance", args.guidance), ("--tau", args.tau)):
        if value is not None and not 0 <= value < math.inf:
            raise rdpm.UserError(f"{flag} {value}: must be a number from 0 up")
    for path in filter(None, (args.out, args.npz)):
        if not Path(path).parent.is_dir():
            raise rdpm.UserError(f"{path}: there is no folder {Path(path).parent} to write into")
    if Path(args.out).suffix.lower() not in (".png", ".jpg", ".webp"):
        raise rdpm.UserError(f"--out {args.out}: must end in .png, .jpg or .webp")
    if args.npz and Path(args.npz).suffix != ".npz":
        raise rdpm.UserError(f"--npz {args.npz}: must end in .npz")
    _, _, device = rdpm.launch(args.device)
    model, tokenizer, info = rdpm.load_generator(args.ckpt, device)
    chosen = [class_index(name, info["classes"]) for name in args.classes or map(str, range(len(info["classes"])))]
    labels = torch.tensor([chosen[i] for i in rdpm.balanced_labels(args.num, len(chosen))], device=device)
    given = {name: getattr(args, name) for name in ("guidance", "guidance_schedule", "tau", "gumbel")}
    sampling = info["sampling"] | {name: value for name, value in given.items() if value is not None}

    images = []
    with tqdm(total=args.num, unit="img") as bar, rdpm.autocast(device), torch.inference_mode():
        for numbers in torch.arange(args.num).split(args.batch):
            y = labels[numbers]
            steps = list(rdpm.sample_steps(model, tokenizer, y, args.seed, numbers.tolist(), **sampling))
            shown = torch.stack(steps if args.steps else steps[-1:], dim=1)                # (B, shown, n, d)
            images.append(rdpm.to_uint8(tokenizer.decode(shown.flatten(0, 1))).cpu())
            bar.update(len(numbers))
    images = torch.cat(images)
    columns = tokenizer.config.T if args.steps else min(10, args.num)
    rdpm.save_grid(images[:columns * 10], Path(args.out), columns)
    print(f"wrote {args.out}: " + ", ".join(f"{name} {value}" for name, value in sampling.items()))
    if args.npz:
        final = images[columns - 1::columns] if args.steps else images
        np.savez(args.npz, arr_0=final.permute(0, 2, 3, 1).numpy(), arr_1=labels.cpu().numpy())
        print(f"wrote {args.npz}: {len(final)} images")


if __name__ == "__main__":
    rdpm.run_main(main)
