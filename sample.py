"""Generate images (Alg. 2), and see what else the sampler can do.

    python sample.py                                        # the demo checkpoint: writes samples.png
    python sample.py --ckpt runs/imagenet-gen/model.pt --classes 207 282 --num 16
    torchrun --nproc_per_node=8 -- sample.py --num 50000 --npz samples.npz     # arr_0 uint8 (N, H, W, 3), arr_1 labels
    python sample.py --show-steps --num 4                   # two rows an image: z'_1 ... z'_T decoded, and previews
    python sample.py --num 1 --classes 7 --out ref/         # single PNGs; any picture will do as a reference:
    python sample.py --layout ref/000000.png --layout-steps 0 4 6 8 10     # its first k steps, then another class
    python sample.py --edit ref/000000.png --mask mask.png  # what is white in the mask is drawn anew

What is not given comes from the checkpoint's own defaults. Image i depends on --seed, i and its class alone (where
bfloat16 rounds, a code may change with --batch; another kind of device draws other noise).
"""

import argparse
import os
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
    p.add_argument("--guidance-from", type=rdpm.positive_int, help="no guidance before this step")
    p.add_argument("--guidance-to", type=rdpm.positive_int, help="the last step with guidance")
    p.add_argument("--tau", type=rdpm.natural_float, help="inverse temperature, Eq. (8)")
    p.add_argument("--gumbel", action=argparse.BooleanOptionalAction, help="draw codes, Eq. (8), or take the likeliest")
    p.add_argument("--draft", type=rdpm.natural_float, help="scale of the draft's noise; 0 is the class's mean")
    p.add_argument("--skip", type=rdpm.natural_int, help="first steps that take the draft, not the network")
    p.add_argument("--fast", action="store_true", help="10 steps in 7 passes: five take the draft, two are guided")


def sampling_from(args: argparse.Namespace, defaults: Sampling, T: int) -> Sampling:
    """The flags that were given, and a checkpoint's defaults for the others."""
    given = {name: value for name, value in vars(args).items() if name in asdict(defaults) and value is not None}
    sampling, half, end = replace(defaults, **given), T // 2, min(T // 2 + 2, T)
    if args.fast:  # the first half of the steps take the draft, and the next two all the guidance of the second half
        if {"skip", "guidance_from", "guidance_to"} & given.keys():
            raise UserError("--fast sets --skip, --guidance-from and --guidance-to; leave them out")
        sampling = replace(sampling, skip=half, draft=sampling.draft or 1.0, guidance_from=half + 1, guidance_to=end,
                           guidance=sum(sampling.lambdas(T)[half:]) / (end - half), guidance_schedule="constant")
    if sampling.guidance and T > 1 and not any(sampling.lambdas(T)[sampling.skip:]):
        raise UserError(f"--guidance {sampling.guidance}: --skip, --guidance-from and --guidance-to leave it no step")
    return sampling


def parse_args() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--ckpt", default=str(Path(__file__).parent / "assets" / "demo.pt"), help="a generator's model.pt")
    p.add_argument("--classes", nargs="+", help="names or indices (default: all, balanced; of --edit: no class)")
    p.add_argument("--num", type=rdpm.positive_int, help="images (default 100; in the other modes fewer)")
    p.add_argument("--seed", type=rdpm.natural_int, default=0)
    add_sampling_flags(p)
    mode = p.add_mutually_exclusive_group()
    mode.add_argument("--show-steps", action="store_true", help="all z'_t of 4 images, clean previews below")
    mode.add_argument("--layout", type=Path, metavar="REF", help="force the first steps to those of a picture")
    mode.add_argument("--edit", type=Path, metavar="REF", help="redraw a part of a picture; guided by --classes alone")
    p.add_argument("--layout-steps", type=int, nargs="+", metavar="K", help="how many; a row of the picture each")
    p.add_argument("--mask", type=Path, help="the part: a picture of the reference's size, white where it is redrawn")
    p.add_argument("--out", type=Path, default=Path("samples.png"), help="a picture of 100 images, or a folder/")
    p.add_argument("--npz", type=Path, help="also write all images and labels here")
    p.add_argument("--batch", type=rdpm.positive_int, default=20)
    p.add_argument("--device", help="cuda, mps or cpu; the best there is by default")
    args = p.parse_args()
    args.mode = next((name for name in ("show_steps", "layout", "edit") if getattr(args, name)), None)
    for name in {None: (), "show_steps": ["npz"], "layout": ["npz", "num"], "edit": ["npz"]}[args.mode]:
        if getattr(args, name) is not None:
            raise UserError(f"--{name}: does nothing beside --{args.mode}; leave it out".replace("_", "-"))
    if bool(args.layout) != bool(args.layout_steps) or bool(args.edit) != bool(args.mask):
        raise UserError("--layout needs --layout-steps, and --edit needs --mask")
    kinds = (".png", ".jpg", ".webp") if args.mode else (".png", ".jpg", ".webp", "")
    for path, suffixes in ((args.out, kinds), (args.npz or Path("a.npz"), (".npz",))):  # before what takes long
        taken = path.is_dir() if path.suffix else path.is_file() or not path.name
        if path.suffix not in suffixes or taken or not os.access(path.parent, os.W_OK):
            raise UserError(f"{path}: must end in {' '.join(suffixes)} and lie in a folder that can be written into")
    return args


class Drawing:
    """A checkpoint, and what the flags say of it."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.device = args, rdpm.launch(args.device)
        self.model, self.tokenizer, self.classes, defaults = rdpm.load_generator(args.ckpt, self.device)
        self.config = self.tokenizer.config
        self.sampling = sampling_from(args, defaults, self.config.T)
        names = [*self.classes, *map(str, range(len(self.classes)))]
        if wrong := [name for name in args.classes or () if name not in names]:
            raise UserError(f"class {wrong[0]}: not a class of this checkpoint; it has {', '.join(self.classes[:20])}")
        chosen = args.classes or self.classes[:10 if args.layout else None]
        self.chosen = [names.index(name) % len(self.classes) for name in chosen]

    def labels(self, num: int) -> list[int]:
        return [self.chosen[i % len(self.chosen)] for i in range(num)]

    def reference(self, path: Path) -> tuple[Tensor, Tensor]:
        """A picture as bytes (3, H, W), cropped as ADM does if it has another size, and its latent v (1, n, d)."""
        x = torch.from_numpy(np.array(rdpm.center_crop(rdpm.read_image(path), self.config.image_size))).permute(2, 0, 1)
        with rdpm.autocast(self.device):
            return x, self.tokenizer.encoder(rdpm.to_float(x[None].to(self.device)))

    def steps(self, labels: list[int], numbers: list[int] | range, *kept: Tensor) -> list[tuple]:
        y = torch.tensor(labels, device=self.device)
        with rdpm.autocast(self.device):
            return list(rdpm.sample_steps(self.model, self.tokenizer, y, self.args.seed, numbers, self.sampling, *kept))

    def decode(self, *latents: Tensor) -> Tensor:
        """Latents (B, n, d) of some steps -> bytes (B, steps, 3, H, W)."""
        with rdpm.autocast(self.device):
            return torch.stack([rdpm.to_uint8(self.tokenizer.decoder(latent)).cpu() for latent in latents], dim=1)


def show_steps(d: Drawing) -> tuple[Tensor, int]:
    """Two rows an image: D(z'_1) ... D(z'_T), and the draft or the head's previews, and the sample last."""
    z_sums, v_hats = zip(*d.steps(d.labels(d.args.num or 4), range(d.args.num or 4)), strict=True)
    rows = [d.decode(*z_sums)] + ([d.decode(*v_hats[:-1], z_sums[-1])] if v_hats[-1] is not None else [])
    return torch.stack(rows, dim=1).flatten(0, 2), d.config.T


def layout(d: Drawing) -> tuple[Tensor, int]:
    """A row for each number of steps that are the reference's, which stands on the left."""
    x, v = d.reference(d.args.layout)
    if not all(0 <= k <= d.config.T for k in d.args.layout_steps):
        raise UserError(f"--layout-steps {' '.join(map(str, d.args.layout_steps))}: each must be 0 ... {d.config.T}")
    k = torch.tensor(d.args.layout_steps, device=d.device).repeat_interleave(len(d.chosen))
    known = (torch.arange(d.config.T, device=d.device)[:, None] < k)[..., None]                    # (T, N, 1)
    *_, (z_sum, _) = d.steps(d.chosen * len(d.args.layout_steps), [0] * len(k), v, known)
    rows = d.decode(z_sum)[:, 0].unflatten(0, (-1, len(d.chosen)))
    return torch.cat([x.expand_as(rows[:, :1]), rows], dim=1).flatten(0, 1), rows.shape[1] + 1


def edit(d: Drawing) -> tuple[Tensor, int]:
    """The reference, what is kept of it, and what is drawn anew; the rest is the reference's, to the pixel."""
    (x, v), mask, num = d.reference(d.args.edit), d.reference(d.args.mask)[0].float().mean(0) > 127, d.args.num or 8
    if rdpm.read_image(d.args.mask).size != rdpm.read_image(d.args.edit).size or mask.all() or not mask.any():
        raise UserError(f"--mask {d.args.mask}: must be as large as {d.args.edit}, white to redraw and black to keep")
    free = torch.max_pool2d(mask[None].float(), d.config.downsampling).flatten().to(d.device) > 0  # (n,)
    d.sampling.guidance *= bool(d.args.classes)  # no class, no guidance
    labels = d.labels(num) if d.args.classes else [len(d.classes)] * num
    *_, (z_sum, _) = d.steps(labels, range(num), v, ~free.expand(d.config.T, num, -1))
    images = torch.where(mask, d.decode(z_sum)[:, 0], x)
    return torch.cat([x[None], torch.where(mask, 128, x)[None], images]), min(10, num + 2)


def plain(d: Drawing) -> None:
    """Alg. 2 for --num images, each rank its share, into one file, of which --out and --npz are then made."""
    num, out, npz, size = d.args.num or 100, d.args.out, d.args.npz, d.config.image_size
    part = (npz or out).with_suffix(".part")
    if RANK == 0:
        np.lib.format.open_memmap(part, "w+", np.uint8, (num, size, size, 3)).flush()
    rdpm.barrier()
    images, labels = np.lib.format.open_memmap(part, "c"), d.labels(num)
    own = [range(num)[i:i + d.args.batch] for i in range(0, num, d.args.batch)][RANK::WORLD_SIZE]
    with tqdm(total=sum(map(len, own)), unit="img", disable=RANK > 0) as bar, open(part, "r+b") as file:
        for numbers in own:
            *_, (z_sum, _) = d.steps(labels[numbers.start:numbers.stop], numbers)
            file.seek(images.offset + numbers.start * images[0].size)  # through the map, a full disk is a bus error
            file.write(d.decode(z_sum)[:, 0].permute(0, 2, 3, 1).numpy().tobytes())
            bar.update(len(numbers))
    rdpm.barrier()
    if not out.suffix:
        out.mkdir(exist_ok=True)
        for i in range(RANK, num, WORLD_SIZE):
            Image.fromarray(images[i]).save(out / f"{i:06d}.png")
    if RANK == 0:
        if out.suffix:
            with rdpm.replacing(out) as path:
                rdpm.image_grid(torch.from_numpy(images[:100]).permute(0, 3, 1, 2), min(10, num)).save(path)
        if npz:
            with rdpm.replacing(npz) as path:
                np.savez(path, arr_0=images, arr_1=np.array(labels))
        part.unlink()


def main() -> None:
    d = Drawing(parse_args())
    if WORLD_SIZE > 1 and d.args.mode:
        raise UserError(f"torchrun draws plain samples only; start --{d.args.mode.replace('_', '-')} with python")
    if d.args.mode:
        images, columns = {"show_steps": show_steps, "layout": layout, "edit": edit}[d.args.mode](d)
        with rdpm.replacing(d.args.out) as path:
            rdpm.image_grid(images, columns).save(path)
    else:
        plain(d)
    if RANK == 0:
        print(f"wrote {d.args.out}: " + ", ".join(f"{name} {value}" for name, value in asdict(d.sampling).items()))


if __name__ == "__main__":
    rdpm.run_main(main)
