"""Generate images (Alg. 2), and see what else the sampler can do.

    python sample.py                                        # the demo checkpoint: writes samples.png
    python sample.py --ckpt runs/imagenet-gen/model.pt --classes 207 282 --num 16
    torchrun --nproc_per_node=8 -- sample.py --num 50000 --npz samples.npz     # arr_0 uint8 (N, H, W, 3), arr_1 labels
    python sample.py --fast                                 # fewer network passes
    python sample.py --show-steps --num 4                   # two rows an image: z'_1 ... z'_T decoded, and previews
    python sample.py --out samples.gif                      # z'_1 ... z'_T as an animation
    python sample.py --num 1 --classes 7 --out ref/         # single PNGs; any picture will do as a reference:
    python sample.py --layout ref/000000.png --layout-steps 0 4 6 8 10     # its first k steps, then another class
    python sample.py --edit ref/000000.png --mask mask.png  # what is white in the mask is drawn anew
    python sample.py --interpolate 3 8                      # from class to class, with one noise
    python sample.py --reconstruct ref/000000.png           # the tokenizer, step by step

What is not given comes from the checkpoint's own defaults. Image i depends on --seed, i and its class alone (where
bfloat16 rounds, a code may change with --batch; another kind of device draws other noise).
"""

import argparse
import math
import os
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import rdpm
from rdpm import RANK, WORLD_SIZE, Sampling, UserError


def add_sampling_flags(p: argparse.ArgumentParser) -> None:
    """What sample.py and fid.py can say of the sampler; `sampling_from` reads it."""
    p.add_argument("--guidance", type=rdpm.natural_float, help="strength lambda; 0 is none")
    p.add_argument("--guidance-schedule", choices=("constant", "linear"))
    p.add_argument("--tau", type=rdpm.natural_float, help="inverse temperature, Eq. (8)")
    p.add_argument("--gumbel", action=argparse.BooleanOptionalAction, help="draw codes, Eq. (8), or take the likeliest")
    p.add_argument("--fast", action="store_true", help="half the network passes (Sampling.skip, .guidance_from)")


def sampling_from(args: argparse.Namespace, defaults: Sampling, T: int) -> Sampling:
    """The flags that were given, and a checkpoint's defaults for the others."""
    fast = {"skip": 3 * T // 10, "guidance_from": 7 * T // 10 + 1} if args.fast else {}
    given = {name: value for name, value in vars(args).items() if name in asdict(defaults) and value is not None}
    return replace(defaults, **given, **fast)


# Flags that say nothing in a mode.
UNUSED = {"show_steps": ("npz",), "layout": ("npz", "num"), "edit": ("npz",), "interpolate": ("npz", "classes"),
          "reconstruct": ("npz", "classes", "num", "fast", "guidance", "guidance_schedule", "tau", "gumbel")}


def parse_args() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--ckpt", default=str(Path(__file__).parent / "assets" / "demo.pt"), help="a generator's model.pt")
    p.add_argument("--classes", nargs="+", help="names or indices (default: all, balanced; of --edit: no class)")
    p.add_argument("--num", type=rdpm.positive_int, help="images (default 100; in the other modes fewer)")
    p.add_argument("--seed", type=rdpm.natural_int, default=0)
    add_sampling_flags(p)
    mode = p.add_mutually_exclusive_group()
    mode.add_argument("--show-steps", action="store_true", help="all z'_t of up to 8 images, clean previews below")
    mode.add_argument("--layout", type=Path, metavar="REF", help="force the first steps to those of a reference picture")
    mode.add_argument("--edit", type=Path, metavar="REF", help="redraw a part of a reference picture; --classes steers")
    mode.add_argument("--interpolate", nargs=2, metavar="CLASS", help="from one class to another, with one noise")
    mode.add_argument("--reconstruct", type=Path, metavar="REF", help="z'_1 ... z'_T of a picture, PSNR, bits a pixel")
    p.add_argument("--layout-steps", type=int, nargs="+", metavar="K", help="how many; a row of the picture each")
    p.add_argument("--mask", type=Path, help="the part: a picture of the reference's size, white where it is redrawn")
    p.add_argument("--out", type=Path, default=Path("samples.png"),
                   help="a picture (of the first 100 images), an animation.gif, or a folder/ for single PNGs")
    p.add_argument("--npz", type=Path, help="also write all images and labels here")
    p.add_argument("--batch", type=rdpm.positive_int, default=20)
    p.add_argument("--device", help="cuda, mps or cpu; the best there is by default")
    args = p.parse_args()
    args.mode = next((name for name in UNUSED if getattr(args, name)), None)
    unused = UNUSED.get(args.mode, ())
    if args.mode == "edit" and not args.classes:
        unused += ("guidance", "guidance_schedule")  # there is nothing to guide the null class to
    for name in unused:
        if getattr(args, name) not in (None, False):
            raise UserError(f"--{name}: does nothing beside --{args.mode}; leave it out".replace("_", "-"))
    if bool(args.layout) != bool(args.layout_steps) or bool(args.edit) != bool(args.mask):
        raise UserError("--layout needs --layout-steps, and --edit needs --mask")
    kinds = (".png", ".jpg", ".webp") if args.mode else ("", ".png", ".jpg", ".webp", ".gif")
    for path, suffixes in ((args.out, kinds), (args.npz or Path("a.npz"), (".npz",))):  # before anything that takes long
        if path.suffix not in suffixes or not os.access(path.parent, os.W_OK):
            raise UserError(f"{path}: must end in {' '.join(suffixes)} and lie in a folder that can be written into")
    return args


class Drawing:
    """A checkpoint, and what the flags say of it."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.device = args, rdpm.launch(args.device)
        self.model, self.tokenizer, self.classes, defaults = rdpm.load_generator(args.ckpt, self.device)
        self.config = self.tokenizer.config
        self.sampling = sampling_from(args, defaults, self.config.T)
        self.chosen = [self.label(name) for name in args.interpolate or args.classes or self.classes]

    def label(self, name: str) -> int:
        """A class by name or by index."""
        label = self.classes.index(name) if name in self.classes else int(name) if name.isdecimal() else -1
        if not 0 <= label < len(self.classes):
            raise UserError(f"class {name}: not a class of this checkpoint; it has 0 ... {len(self.classes) - 1}: "
                            + ", ".join(self.classes[:20]))
        return label

    def labels(self, num: int) -> list[int]:
        """The chosen classes in turn."""
        return [self.chosen[i % len(self.chosen)] for i in range(num)]

    def reference(self, path: Path) -> tuple[Tensor, Tensor]:
        """A picture as bytes (3, H, W), cropped as ADM does if it has another size, and its latent v (1, n, d)."""
        x = torch.from_numpy(np.array(rdpm.center_crop(rdpm.read_image(path), self.config.image_size))).permute(2, 0, 1)
        with torch.inference_mode(), rdpm.autocast(self.device):
            return x, self.tokenizer.encoder(rdpm.to_float(x[None].to(self.device)))

    @torch.inference_mode()
    def batches(self, labels: list[int], numbers: list[int] | range, v: Tensor | None = None,
                known: Tensor | None = None) -> Iterator[tuple[Tensor, list[tuple[Tensor, Tensor | None]]]]:
        """This rank's batches: places among the labels, and `rdpm.sample_steps` of them."""
        batches = torch.arange(len(labels)).split(self.args.batch)[RANK::WORLD_SIZE]
        with tqdm(total=sum(map(len, batches)), unit="img", disable=RANK > 0) as bar, rdpm.autocast(self.device):
            for i in batches:
                y, own = torch.tensor(labels, device=self.device)[i], None if known is None else known[:, i].to(self.device)
                yield i, list(rdpm.sample_steps(self.model, self.tokenizer, y, self.args.seed, [numbers[j] for j in i],
                                                self.sampling, v, own))
                bar.update(len(i))

    @torch.inference_mode()
    def decode(self, latents: list[Tensor]) -> Tensor:
        """Latents (B, n, d) of several steps -> bytes (B, steps, 3, H, W)."""
        with rdpm.autocast(self.device):
            return torch.stack([rdpm.to_uint8(self.tokenizer.decoder(latent)).cpu() for latent in latents], dim=1)

    def last(self, *args, **more) -> Tensor:
        """D(z'_T) of all `batches`, (N, 3, H, W)."""
        return torch.cat([self.decode([steps[-1][0]])[:, 0] for _, steps in self.batches(*args, **more)])

    def every(self, *args, **more) -> Tensor:
        """D(z'_1) ... D(z'_T) of all `batches`, (N, T, 3, H, W)."""
        return torch.cat([self.decode([z for z, _ in steps]) for _, steps in self.batches(*args, **more)])


def show_steps(d: Drawing) -> tuple[Tensor, int]:
    """Two rows an image: D(z'_1) ... D(z'_T), and the codebook head's previews, with the sample in their last place."""
    rows, num = [], min(d.args.num or 4, 8)
    for _, steps in d.batches(d.labels(num), range(num)):
        raw = d.decode([z for z, _ in steps])
        clean = raw[:, :0] if steps[0][1] is None else d.decode([*[v_hat for _, v_hat in steps[:-1]], steps[-1][0]])
        rows.append(torch.cat([raw, clean], dim=1).flatten(0, 1))
    return torch.cat(rows), d.config.T


def layout(d: Drawing) -> tuple[Tensor, int]:
    """A row for each number of steps that are the reference's, which stands on the left."""
    x, v = d.reference(d.args.layout)
    if not all(0 <= k <= d.config.T for k in d.args.layout_steps):
        raise UserError(f"--layout-steps {' '.join(map(str, d.args.layout_steps))}: each must be 0 ... {d.config.T}")
    k = torch.tensor(d.args.layout_steps).repeat_interleave(len(d.chosen))
    known = (torch.arange(d.config.T)[:, None] < k)[..., None]                                     # (T, N, 1)
    images = d.last(d.chosen * len(d.args.layout_steps), [0] * len(k), v, known)
    rows = images.unflatten(0, (len(d.args.layout_steps), -1))
    return torch.cat([x.expand_as(rows[:, :1]), rows], dim=1).flatten(0, 1), rows.shape[1] + 1


def edit(d: Drawing) -> tuple[Tensor, int]:
    """The reference, what is kept of it, and what is drawn anew; the rest is the reference's, to the pixel."""
    (x, v), mask, num = d.reference(d.args.edit), d.reference(d.args.mask)[0].float().mean(0) > 127, d.args.num or 8
    if mask.all() or not mask.any():
        raise UserError(f"--mask {d.args.mask}: is all {'white' if mask.any() else 'black'}; paint white what to redraw")
    free = torch.max_pool2d(mask[None].float(), d.config.downsampling).flatten() > 0               # (n,)
    if not d.args.classes:
        d.sampling = replace(d.sampling, guidance=0.0)
    labels = d.labels(num) if d.args.classes else [len(d.classes)] * num
    images = torch.where(mask, d.last(labels, range(num), v, ~free.expand(d.config.T, num, -1)), x)
    return torch.cat([x[None], torch.where(mask, 128, x)[None], images]), min(10, num + 2)


def interpolate(d: Drawing) -> tuple[Tensor, int]:
    """From one class to the other, with one noise: mixtures of the two become the model's classes."""
    num, (a, b) = d.args.num or 10, d.chosen

    def mixed(table: Tensor) -> Tensor:
        share = torch.linspace(0, 1, num, device=table.device).view(-1, *[1] * (table.ndim - 1))
        return torch.cat([torch.lerp(table[a], table[b], share), table[-1:]])

    d.model.embed_y = torch.nn.Embedding.from_pretrained(mixed(d.model.embed_y.weight))
    d.model.mean, d.model.config.num_classes = mixed(d.model.mean), num
    return d.last(list(range(num)), [0] * num), min(10, num)


def reconstruct(d: Drawing) -> tuple[Tensor, int]:
    """The picture, then z'_1 ... z'_T decoded; prints PSNR and the bits of the codes so far."""
    import fid  # here, because fid.py takes the sampler's flags from this file

    x, v = d.reference(d.args.reconstruct)
    images = d.every([0], [0], v, torch.ones(d.config.T, 1, 1, dtype=torch.bool))[0]
    bits = math.log2(d.config.K) / d.config.downsampling**2
    for t, decibels in enumerate(fid.psnr(x.expand_as(images), images), 1):
        print(f"t = {t}: {t * bits:.3f} bits a pixel, PSNR {decibels:.2f}")
    return torch.cat([x[None], images]), d.config.T + 1


def plain(d: Drawing) -> None:
    """Alg. 2 for --num images, each rank its share, into one memory-mapped file; --out and --npz are made of it."""
    num, out, npz, size = d.args.num or 100, d.args.out, d.args.npz, d.config.image_size
    part = (npz or out).with_suffix(".part")
    if RANK == 0:
        np.lib.format.open_memmap(part, "w+", np.uint8, (num, size, size, 3)).flush()
    rdpm.barrier()
    images = np.lib.format.open_memmap(part, "r+")
    for i, steps in d.batches(d.labels(num), range(num)):
        images[i] = d.decode([steps[-1][0]])[:, 0].permute(0, 2, 3, 1)
    images.flush()
    rdpm.barrier()
    if not out.suffix:
        out.mkdir(exist_ok=True)
        for i in range(RANK, num, WORLD_SIZE):
            Image.fromarray(images[i]).save(out / f"{i:06d}.png")
    if RANK == 0:
        if out.suffix:
            save(rdpm.image_grid(torch.from_numpy(images[:100]).permute(0, 3, 1, 2), min(10, num)), out)
        if npz:
            with rdpm.replacing(npz) as path:
                np.savez(path, arr_0=images, arr_1=np.array(d.labels(num)))
            print(f"wrote {npz}: {num} images")
        part.unlink()


def save(picture: Image.Image, out: Path, **how) -> None:
    with rdpm.replacing(out) as path:
        picture.save(path, **how)


def main() -> None:
    args = parse_args()
    d = Drawing(args)
    if WORLD_SIZE > 1 and (args.mode or args.out.suffix == ".gif"):
        raise UserError("torchrun: several processes only draw plain samples; start this one with python")
    if args.mode:
        images, columns = globals()[args.mode](d)
        save(rdpm.image_grid(images, columns), args.out)
    elif args.out.suffix == ".gif":
        num = min(args.num or 100, 100)
        frames = [rdpm.image_grid(images, min(10, num)) for images in d.every(d.labels(num), range(num)).transpose(0, 1)]
        save(frames[0], args.out, save_all=True, append_images=frames[1:] + frames[-1:] * 9, duration=300, loop=0)
    else:
        plain(d)
    if RANK == 0:
        print(f"wrote {args.out}: " + ", ".join(f"{name} {value}" for name, value in asdict(d.sampling).items()))


if __name__ == "__main__":
    rdpm.run_main(main)
