"""Generate images (Alg. 2), and see what else the sampler can do.

    python sample.py                                        # the demo checkpoint: writes samples.png
    python sample.py --ckpt runs/imagenet-gen/model.pt --classes 207 282 --num 16
    torchrun --nproc_per_node=8 -- sample.py --num 50000 --npz samples.npz     # see --npz
    python sample.py --show-steps --num 4                   # two rows an image: z'_1 ... z'_T decoded, and previews
    python sample.py --num 1 --classes 7 --out ref/         # single PNGs; any picture will do as a reference:
    python sample.py --layout ref/000000.png --layout-steps 0 4 6 8 10     # its first k steps, then another class
    python sample.py --edit ref/000000.png --mask mask.png  # what is white in the mask is drawn anew

What is not given comes from the checkpoint's own defaults. Image i depends on --seed, i and its class
alone (where bfloat16 rounds, a code may change with --batch; another kind of device draws other noise).
"""

import argparse
import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import rdpm
from rdpm import UserError

PICTURES = (".png", ".jpg", ".webp")
MODES = ("show_steps", "layout", "edit")


def parse_args() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    demo = Path(__file__).parent / "assets" / "demo.pt"
    add("--ckpt", default=demo, help="A generator's model.pt [the demo].")
    add("--list-classes", action="store_true", help="Print the checkpoint's classes, and end.")
    add("--classes", nargs="+", help="Names or indices [all, balanced; for --edit no class].")
    add("--num", type=rdpm.positive_int, help="Images [100; 4 of --show-steps, 8 of --edit].")
    add("--seed", type=rdpm.natural_int, default=0, help="Of all that is drawn [0].")
    rdpm.add_sampling_flags(p)
    add("--show-steps", action="store_true", help="Draw all z'_t of some images, clean previews below.")
    add("--layout", type=Path, metavar="REF", help="Force the first steps to those of a picture.")
    add("--layout-steps", type=int, nargs="+", metavar="K", help="How many; a row of the picture each.")
    add("--edit", type=Path, metavar="REF", help="Redraw a part of a picture, guided by --classes alone.")
    add("--mask", type=Path, help="A picture of the reference's size, white where it is redrawn.")
    add("--out", default="samples.png", help="A picture of 100 images, or a new folder/ [samples.png].")
    add("--npz", type=Path, help="Also write arr_0 uint8 (N, H, W, 3), arr_1 labels, classes.")
    add("--batch", type=rdpm.positive_int, default=20, help="Images drawn at once by each process [20].")
    add("--device", help="cuda, mps or cpu [the best there is].")
    args = p.parse_args()
    check_flags(args)
    return args


def check_flags(args: argparse.Namespace) -> None:
    """UserError for flags that contradict each other, or files that cannot be written, before any work."""
    modes = [name for name in MODES if getattr(args, name)]
    args.mode = modes[0] if modes else None
    useless = modes[1:]
    if args.mode and args.npz:
        useless.append("npz")
    if args.layout and args.num:
        useless.append("num")
    for name in useless:
        text = f"--{name}: does nothing beside --{args.mode}; leave it out"
        raise UserError(text.replace("_", "-"))
    layout_alone = (args.layout is None) != (args.layout_steps is None)
    edit_alone = (args.edit is None) != (args.mask is None)
    if layout_alone or edit_alone:
        raise UserError("--layout needs --layout-steps, and --edit needs --mask")
    args.as_folder = args.out.endswith("/") or not Path(args.out).suffix
    args.out = Path(args.out)
    fits = not args.mode if args.as_folder else args.out.suffix in PICTURES
    taken = args.out.exists() and args.out.is_dir() != args.as_folder
    if not fits or taken:
        raise UserError(f"--out {args.out}: must end in {' '.join(PICTURES)}, or in / for a folder of samples")
    if args.as_folder and rdpm.image_files(args.out):
        raise UserError(f"--out {args.out}: already holds images; choose another folder, since one is for one run")
    if args.npz and args.npz.suffix != ".npz":
        raise UserError(f"--npz {args.npz}: must end in .npz")
    for path in (args.out, args.npz):
        if path and not os.access(path.parent, os.W_OK):
            raise UserError(f"{path}: {path.parent} is no folder that can be written into")


class Sampler:
    """A checkpoint, and what the flags say of it."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.device = rdpm.launch(args.device)
        self.model, self.tokenizer, self.classes, defaults = rdpm.load_generator(args.ckpt, self.device)
        self.config = self.tokenizer.config
        self.sampling = rdpm.sampling_from(args, defaults, self.config.T)
        chosen = args.classes or self.classes[:10 if args.layout else None]
        self.chosen = [self.index_of(name) for name in chosen]

    def index_of(self, name: str) -> int:
        """A class by its name, or else by its number."""
        if name in self.classes:
            return self.classes.index(name)
        numbered = any(known.isdecimal() for known in self.classes)  # then a number is never an index
        if name.isdecimal() and not numbered and int(name) < len(self.classes):
            return int(name)
        some = ", ".join(self.classes[:20])
        raise UserError(f"class {name}: not a class of this checkpoint; it has {some}; see --list-classes")

    def labels(self, num: int) -> list[int]:
        return [self.chosen[i % len(self.chosen)] for i in range(num)]

    def reference(self, path: Path) -> tuple[Tensor, Tensor]:
        """A picture as bytes (3, H, W), cropped as ADM does if it has another size, and its latent v (1, n, d)."""
        picture = rdpm.read_image(path)
        picture = rdpm.fit(picture, self.config.image_size, self.config.pad)
        x = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
        real = rdpm.to_float(x[None].to(self.device))
        with rdpm.autocast(self.device):
            v = self.tokenizer.encoder(real)
        return x, v

    def steps(self, labels: list[int], numbers: Sequence[int], *kept: Tensor,
              previews: bool = False) -> list[tuple]:
        """(z'_t, v_hat) of all steps, with a bar."""
        y = torch.tensor(labels, device=self.device)
        with rdpm.autocast(self.device):
            steps = rdpm.sample_steps(
                self.model, self.tokenizer, y, self.args.seed, numbers, self.sampling, *kept,
                previews=previews)
            bar = tqdm(steps, total=self.config.T, unit="step")
            return list(bar)

    def decode(self, *latents: Tensor) -> Tensor:
        """Latents (B, n, d) of some steps -> bytes (B, steps, 3, H, W)."""
        with rdpm.autocast(self.device):
            images = [self.tokenizer.decoder(latent) for latent in latents]
        pictures = rdpm.to_uint8(torch.stack(images, dim=1))
        return pictures.cpu()


def show_steps(s: Sampler) -> tuple[Tensor, int]:
    """A row an image, D(z'_1) ... D(z'_T); with the codebook head a second: draft or previews, the sample."""
    num = s.args.num or 4
    steps = s.steps(s.labels(num), range(num), previews=True)
    z_sums = [z_sum for z_sum, _ in steps]
    v_hats = [v_hat for _, v_hat in steps]
    rows = [s.decode(*z_sums)]
    if v_hats[-1] is not None:
        previews = v_hats[:-1] + z_sums[-1:]
        rows.append(s.decode(*previews))
    cells = torch.stack(rows, dim=1).flatten(0, 2)
    return cells, s.config.T


def layout(s: Sampler) -> tuple[Tensor, int]:
    """A row for each number of steps that are the reference's, which stands on the left."""
    T = s.config.T
    rows = s.args.layout_steps
    columns = len(s.chosen)
    if min(rows) < 0 or max(rows) > T:
        given = " ".join(map(str, rows))
        raise UserError(f"--layout-steps {given}: each must be 0 ... {T}")
    x, v = s.reference(s.args.layout)
    k = torch.tensor(rows, device=s.device).repeat_interleave(columns)
    steps = torch.arange(T, device=s.device)
    known = (steps[:, None] < k)[..., None]                             # (T, N, 1)
    labels = s.chosen * len(rows)
    numbers = [0] * len(labels)  # the same noise in all cells
    z_sum, _ = s.steps(labels, numbers, v, known)[-1]
    cells = s.decode(z_sum).view(len(rows), columns, *x.shape)
    reference = x.expand(len(rows), 1, *x.shape)
    table = torch.cat([reference, cells], dim=1)
    return table.flatten(0, 1), columns + 1


def edit(s: Sampler) -> tuple[Tensor, int]:
    """The reference, what is kept of it, and what is drawn anew; what is kept is the reference's, to the pixel."""
    x, v = s.reference(s.args.edit)
    mask_image, _ = s.reference(s.args.mask)
    mask = mask_image.float().mean(0) > 127
    num = s.args.num or 8
    size = rdpm.read_image(s.args.edit).size
    fits = rdpm.read_image(s.args.mask).size == size
    if not fits or mask.all() or not mask.any():
        raise UserError(f"--mask {s.args.mask}: must be as large as {s.args.edit}, white to redraw and black to keep")
    white = torch.max_pool2d(mask[None].float(), s.config.downsampling)  # (1, h, w)
    known = white.flatten() == 0                                        # (n,)
    known = known.to(s.device)
    labels = s.labels(num)
    if not s.args.classes:  # no class, no guidance
        labels = [len(s.classes)] * num
        s.sampling = replace(s.sampling, guidance=0.0, strengths=None)
    known = known.expand(s.config.T, num, -1)
    z_sum, _ = s.steps(labels, range(num), v, known)[-1]
    drawn = s.decode(z_sum)[:, 0]
    images = torch.where(mask, drawn, x)
    kept = torch.where(mask, 128, x)
    cells = torch.cat([x[None], kept[None], images])
    return cells, min(10, num + 2)


def draw_samples(s: Sampler) -> None:
    """--num images (`rdpm.sample`, Alg. 2, or with --skip `rdpm.sample_steps`), each rank its batches, into one
    file, of which --out and --npz are then made."""
    num = s.args.num or 100
    size = s.config.image_size
    labels = s.labels(num)
    target = s.args.npz or s.args.out
    unfinished = rdpm.from_rank_0(rdpm.beside, target.with_suffix(".npy"))
    try:
        if rdpm.rank() == 0:
            shape = num, size, size, 3
            np.lib.format.open_memmap(unfinished, "w+", np.uint8, shape).flush()
        rdpm.barrier()
        images = np.load(unfinished, mmap_mode="r")
        starts = range(0, num, s.args.batch)  # of the batches
        own = starts[rdpm.rank()::rdpm.world_size()]
        with open(unfinished, "r+b") as file, rdpm.autocast(s.device):
            unit = f" x {s.args.batch} img"
            for start in tqdm(own, unit=unit, disable=rdpm.rank() > 0):
                numbers = range(start, min(start + s.args.batch, num))
                y = torch.tensor([labels[i] for i in numbers], device=s.device)
                x = rdpm.draw_images(s.model, s.tokenizer, y, s.args.seed, numbers, s.sampling)
                x = rdpm.to_uint8(x).cpu()
                x = x.permute(0, 2, 3, 1)
                file.seek(images.offset + start * x[0].numel())  # in a map, a full disk is a bus error
                file.write(x.numpy().tobytes())
        rdpm.barrier()
        write_samples(s, np.load(unfinished, mmap_mode="r"), labels)  # what all ranks have written
        rdpm.barrier()
    finally:
        if rdpm.rank() == 0:
            unfinished.unlink(missing_ok=True)


def write_samples(s: Sampler, images: np.ndarray, labels: list[int]) -> None:
    """The picture or the folder of --out, and --npz."""
    out = s.args.out
    if s.args.as_folder:
        out.mkdir(exist_ok=True)
        for i in range(rdpm.rank(), len(images), rdpm.world_size()):
            picture = Image.fromarray(images[i])
            picture.save(out / f"{i:06d}.png")
    elif rdpm.rank() == 0:
        with rdpm.replacing(out) as path:
            first = torch.from_numpy(images[:100].copy())
            columns = min(10, len(images))
            picture = rdpm.image_grid(first.permute(0, 3, 1, 2), columns)
            picture.save(path)
    if s.args.npz and rdpm.rank() == 0:
        with rdpm.replacing(s.args.npz) as path:
            np.savez(path, arr_0=images, arr_1=labels, classes=s.classes)


def main() -> None:
    s = Sampler(parse_args())
    mode = s.args.mode
    if s.args.list_classes:
        for i, name in enumerate(s.classes):
            print(i, name)
        return
    if mode and rdpm.world_size() > 1:
        raise UserError(f"torchrun draws plain samples only; start --{mode.replace('_', '-')} with python")
    if mode:
        draw = {"show_steps": show_steps, "layout": layout, "edit": edit}[mode]
        images, columns = draw(s)
        with rdpm.replacing(s.args.out) as path:
            rdpm.image_grid(images, columns).save(path)
    else:
        draw_samples(s)
    if rdpm.rank() == 0:
        settings = asdict(s.sampling)
        text = ", ".join(f"{name} {value}" for name, value in settings.items())
        print(f"wrote {s.args.out}: {text}")


if __name__ == "__main__":
    rdpm.run_main(main)
