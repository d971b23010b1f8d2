"""Generate images (Alg. 2), and see what else the sampler can do.

    python sample.py                                        # the demo checkpoint: writes samples.png
    python sample.py --ckpt runs/imagenet-gen/model.pt --classes 207 282 --num 16
    python sample.py --num 50000 --npz samples.npz          # for an evaluator: arr_0 uint8 (N, H, W, 3), arr_1 labels
    torchrun --nproc_per_node=8 -- sample.py --num 50000 --npz samples.npz
    python sample.py --fast                                 # fewer network passes
    python sample.py --steps --num 4                        # two rows an image: z'_1 ... z'_T decoded, and previews
    python sample.py --out samples.gif                      # z'_1 ... z'_T as an animation
    python sample.py --num 1 --classes 7 --out ref.png      # any picture will do as a reference:
    python sample.py --layout ref.png --layout-steps 0 4 6 8 10   # its first k steps, then another class
    python sample.py --edit ref.png --mask mask.png         # what is white in the mask is drawn anew
    python sample.py --interpolate 3 8                      # from class to class, with one noise
    python sample.py --reconstruct ref.png                  # the tokenizer, step by step

What is not given comes from the checkpoint's own defaults. Image i depends on --seed, i and its class alone (where
bfloat16 rounds, a code may change with --batch or --compile).
"""

import argparse
import itertools
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import fid
import rdpm
from rdpm import UserError


def parse_args() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--ckpt", default=str(Path(__file__).parent / "assets" / "demo.pt"), help="a generator's model.pt")
    p.add_argument("--classes", nargs="+", help="names or indices (default: all, balanced; of --edit: no class)")
    p.add_argument("--num", type=int, help="images (default 100; --steps 4, --edit 8, --interpolate 10)")
    p.add_argument("--seed", type=int, default=0)
    rdpm.add_sampling_flags(p)
    p.add_argument("--steps", action="store_true", help="show all z'_t of the first 8 images, clean previews below")
    p.add_argument("--layout", metavar="REF", help="force the first steps to those of a reference picture")
    p.add_argument("--layout-steps", type=int, nargs="+", metavar="K", help="how many; a row of the picture each")
    p.add_argument("--edit", metavar="REF", help="redraw a part of a reference picture; --classes steers")
    p.add_argument("--mask", help="the part: a picture of the reference's size, white where it is redrawn")
    p.add_argument("--interpolate", nargs=2, metavar="CLASS", help="from one class to another, with one noise")
    p.add_argument("--reconstruct", nargs="+", metavar="IMAGE", help="z'_1 ... z'_T of pictures, PSNR and bits a pixel")
    p.add_argument("--out", default="samples.png", help="the picture (the first 100 images), or .gif: an animation")
    p.add_argument("--npz", help="also write all images and labels here")
    p.add_argument("--batch", type=int, default=100)
    p.add_argument("--device", help="cuda, mps or cpu; the best there is by default")
    p.add_argument("--benchmark", type=int, metavar="DEPTH",
                   help="measure the speed of an untrained ImageNet model of this depth; needs no files, writes none")
    args = p.parse_args()
    rdpm.check_numbers(args, positive=("num", "batch", "benchmark"), others=("seed", "guidance", "tau"))
    for flag, path, kinds in (("--out", args.out, ".png .jpg .webp .gif"), ("--npz", args.npz, ".npz")):
        if path and Path(path).suffix not in kinds.split():
            raise UserError(f"{flag} {path}: must end in {kinds.replace(' ', ' or ')}")
        if path and not Path(path).parent.is_dir():
            raise UserError(f"{path}: there is no folder {Path(path).parent} to write into")
    if sum(map(bool, (args.layout, args.edit, args.interpolate, args.reconstruct))) > 1:
        raise UserError("give only one of --layout, --edit, --interpolate and --reconstruct")
    for path in filter(None, [args.layout, args.edit, args.mask, *(args.reconstruct or [])]):
        if not Path(path).is_file():
            raise UserError(f"{path}: no such picture")
    unused = {"layout": ("num", "steps"), "edit": ("steps",), "interpolate": ("classes", "steps"),
              "reconstruct": ("classes", "num", "steps", "fast", "compile")}
    for mode, names in unused.items():
        for name in names:
            if getattr(args, mode) and getattr(args, name):
                raise UserError(f"--{name}: does nothing beside --{mode}; leave it out")
    if args.steps and args.out.endswith(".gif"):
        raise UserError(f"--out {args.out}: --steps draws a still picture, and a .gif shows the steps without it")
    if bool(args.layout) != bool(args.layout_steps) or bool(args.edit) != bool(args.mask):
        raise UserError("--layout needs --layout-steps, and --edit needs --mask")
    return args


def class_index(name: str, classes: list[str]) -> int:
    """A class by name or by index."""
    index = classes.index(name) if name in classes else int(name) if name.isdecimal() else len(classes)
    if index < len(classes):
        return index
    raise UserError(f"class {name}: not a class of this checkpoint; it has 0 ... {len(classes) - 1}: "
                    + ", ".join(classes[:20]) + (", ..." if len(classes) > 20 else ""))


def reference(path: str, size: int) -> Tensor:
    """A picture as bytes (3, size, size); of another size it gets ADM's resize and centre crop.

    One that `rdpm.image_grid` has enlarged is what it was before.
    """
    image = rdpm.read_image(path)
    pixels, times = np.array(image), max(1, image.width // size)
    before = pixels[::times, ::times]
    if np.array_equal(before.repeat(times, 0).repeat(times, 1), pixels):
        image = Image.fromarray(before)
    if image.size != (size, size):
        print(f"{path}: {image.width} x {image.height} resized and cropped to {size} x {size}")
    return torch.from_numpy(np.array(rdpm.center_crop(image, size))).permute(2, 0, 1)


def read_mask(path: str, ref: str, size: int) -> Tensor:
    """Where to redraw, (size, size) bool; cropped like its reference."""
    mask, image = rdpm.read_image(path), rdpm.read_image(ref)
    if mask.size != image.size:
        raise UserError(f"--mask {path}: {mask.size}, but {ref} is {image.size}; make it that size")
    mask = torch.from_numpy(np.array(rdpm.center_crop(mask, size).convert("L"))) > 127
    if mask.all() or not mask.any():
        raise UserError(f"--mask {path}: is all {'white: nothing is kept' if mask.all() else 'black: nothing to do'} "
                        f"at {size} x {size}; paint white where to redraw, black where to keep")
    return mask


def mix_classes(model: rdpm.RDPM, a: int, b: int, num: int) -> None:
    """Make `num` mixtures, from class a to class b, the model's classes."""
    def mixed(table: Tensor) -> Tensor:
        share = torch.linspace(0, 1, num, device=table.device).view(-1, *[1] * (table.ndim - 1))
        return torch.cat([torch.lerp(table[a], table[b], share), table[-1:]])

    model.embed_y = torch.nn.Embedding.from_pretrained(mixed(model.embed_y.weight))
    model.mean, model.config.num_classes = mixed(model.mean), num


def plan(args: argparse.Namespace, model: rdpm.RDPM, config: rdpm.TokenizerConfig, names: list[str]) -> tuple:
    """Each image's label and number (equal numbers are equal noise), what is known of its codes, --edit's mask."""
    chosen = [class_index(name, names) for name in args.interpolate or args.classes or map(str, range(len(names)))]
    if args.reconstruct:
        N = len(args.reconstruct)
        return [0] * N, [0] * N, torch.ones(config.T, N, 1, dtype=torch.bool), None
    if args.interpolate:
        N = args.num or 10
        mix_classes(model, *chosen, N)
        return list(range(N)), [0] * N, None, None
    if args.layout:
        if not all(0 <= k <= config.T for k in args.layout_steps):
            raise UserError(f"--layout-steps {' '.join(map(str, args.layout_steps))}: each must be 0 ... {config.T}")
        k = torch.tensor(args.layout_steps).repeat_interleave(len(chosen))
        return chosen * len(args.layout_steps), [0] * len(k), (torch.arange(config.T)[:, None] < k)[..., None], None
    N = args.num or (8 if args.edit else 4 if args.steps else 100)
    labels = [chosen[i] for i in rdpm.balanced_labels(N, len(chosen))]
    if args.edit:
        mask = read_mask(args.mask, args.edit, config.image_size)
        free = torch.max_pool2d(mask[None].float(), config.downsampling).flatten() > 0
        return labels if args.classes else [len(names)] * N, list(range(N)), ~free.expand(config.T, N, -1), mask
    return labels, list(range(N)), None, None


def picture(args: argparse.Namespace, x: Tensor | None, mask: Tensor | None, raw: Tensor, clean: Tensor) -> tuple:
    """What to show (N, 3, H, W), and in how many columns. raw, clean (N, T or 1, 3, H, W): decoded z'_t, previews."""
    final = raw[:, -1]
    if args.layout:         # the reference to the left of every row
        rows = final.unflatten(0, (len(args.layout_steps), -1))
        return torch.cat([x.expand_as(rows[:, :1]), rows], dim=1).flatten(0, 1), rows.shape[1] + 1
    if args.edit:           # first the reference, and what is kept of it
        return torch.cat([x, torch.where(mask, 128, x), final]), min(10, len(final) + 2)
    if args.reconstruct:    # the original to the left of every row
        return torch.cat([x[:, None], raw], dim=1).flatten(0, 1), raw.shape[1] + 1
    if args.steps:          # previews below
        return torch.stack([raw, clean], dim=1)[:8].flatten(0, 2), raw.shape[1]
    return final[:100], min(10, len(final))


def gather(own: list) -> list:
    """What the ranks did in turn, rank 0 the first, rank 1 the second, ...: on rank 0 in that order."""
    if not dist.is_initialized():
        return own
    shares: list = [None] * dist.get_world_size()
    dist.gather_object(own, shares if dist.get_rank() == 0 else None)
    return [item for turn in itertools.zip_longest(*filter(None, shares)) for item in turn if item is not None]


@torch.inference_mode()
def benchmark(args: argparse.Namespace, device: torch.device) -> None:
    """Print speed with random weights, and the share of the matrix-product peak, after a run to count and warm up."""
    tokenizer = rdpm.frozen(rdpm.Tokenizer(rdpm.TokenizerConfig()), device)
    model = rdpm.RDPM(rdpm.GeneratorConfig(args.benchmark), tokenizer).eval().requires_grad_(False).to(device)
    sampling, num = rdpm.SAMPLING | rdpm.sampling_flags(args, T=10), args.num or 4
    images = model, tokenizer, torch.zeros(num, dtype=torch.long, device=device), args.seed, range(num)
    with rdpm.autocast(device):
        flops = rdpm.count_flops(lambda: rdpm.sample(*images, **sampling))
        rdpm.prepare_sampling(model, device, args.compile)
        for _ in range(2 if args.compile else 0):  # the second records the CUDA graphs
            list(rdpm.sample_steps(*images, **sampling))
        start = time.perf_counter()
        list(rdpm.sample_steps(*images, **sampling))[-1][0].sum().item()  # waits for the device
        network = time.perf_counter() - start
        rdpm.sample(*images, **sampling).sum().item()
        seconds = time.perf_counter() - start - network
    share, peak = flops / seconds / rdpm.matrix_peak(device), rdpm.matrix_peak(device) / 1e9
    print(f"{num} images in {seconds:.3g} s ({network:.3g} s without the decoder), {flops / 1e9 / num:.4g} GFLOP each: "
          f"{share:.0%} of the matrix-product peak, {peak:.4g} GFLOP/s")


def main() -> None:
    args = parse_args()
    rank, world, device = rdpm.launch(args.device)
    if args.benchmark:
        return benchmark(args, device)
    model, tokenizer, info = rdpm.load_generator(args.ckpt, device)
    rdpm.prepare_sampling(model, device, args.compile)
    config, paths = tokenizer.config, args.reconstruct or [path for path in (args.layout, args.edit) if path]
    labels, numbers, known, mask = plan(args, model, config, info["classes"])
    x = torch.stack([reference(path, config.image_size) for path in paths]) if paths else None
    sampling = info["sampling"] | rdpm.sampling_flags(args, config.T)
    if args.edit and not args.classes:  # nothing to guide the null class to
        sampling["guidance"] = 0.0

    def decode(latents: list[Tensor]) -> Tensor:
        return torch.stack([rdpm.to_uint8(tokenizer.decode(z)).cpu() for z in latents], dim=1)  # (B, shown, 3, H, W)

    every, raw, clean = args.steps or args.reconstruct or args.out.endswith(".gif"), [], []
    batches = torch.arange(len(labels)).split(args.batch)[rank::world]
    with (tqdm(total=sum(map(len, batches)), unit="img", disable=rank > 0) as bar, rdpm.autocast(device),
          torch.inference_mode()):
        v = tokenizer.encode(rdpm.to_float(x.to(device))) if paths else None
        for i in batches:
            images = model, tokenizer, torch.tensor(labels, device=device)[i], args.seed, [numbers[j] for j in i]
            clamp = {"v": v if len(v) == 1 else v[i], "known": known[:, i].to(device)} if paths else {}
            settings = sampling | clamp
            steps = list(rdpm.sample_steps(*images, **settings))
            raw.append(decode([z_sum for z_sum, _ in (steps if every else steps[-1:])]))
            if args.steps:
                for t, (z_sum, v_hat) in enumerate(steps[:-1], 1):
                    if v_hat is None:  # the linear head has no preview: finish with the likeliest codes
                        *_, (v_hat, _) = rdpm.sample_steps(*images, **settings | {"gumbel": False}, after=(t, z_sum))
                    steps[t - 1] = v_hat
                clean.append(decode([*steps[:-1], steps[-1][0]]))
            bar.update(len(i))
    raw, clean = gather(raw), gather(clean)
    if rank > 0:
        return
    raw = torch.cat(raw)
    if args.edit:  # what was not to be redrawn is the reference's, to the pixel
        raw = torch.where(mask, raw, x[:, None])
    if args.reconstruct:
        bits = math.log2(config.K) * config.tokens / config.image_size**2
        for t in range(1, config.T + 1):
            print(f"t = {t}: {t * bits:.3f} bits a pixel, PSNR", *(f"{p:.2f}" for p in fid.psnr(x, raw[:, t - 1])))
    shown, columns = picture(args, x, mask, raw, torch.cat(clean) if args.steps else raw)
    if args.out.endswith(".gif"):
        frames = [rdpm.image_grid(images, min(10, len(raw))) for images in raw[:100].transpose(0, 1)]
        frames[0].save(args.out, save_all=True, append_images=frames[1:] + frames[-1:] * 9, duration=300, loop=0)
    else:
        rdpm.image_grid(shown, columns).save(args.out)
    print(f"wrote {args.out}: " + ", ".join(f"{name} {value}" for name, value in sampling.items()))
    if args.npz:  # -1 for what is of no class
        of_no_class = args.interpolate or args.reconstruct or args.edit and not args.classes
        np.savez(args.npz, arr_0=raw[:, -1].permute(0, 2, 3, 1).numpy(),
                 arr_1=np.full(len(raw), -1) if of_no_class else np.array(labels))
        print(f"wrote {args.npz}: {len(raw)} images")


if __name__ == "__main__":
    rdpm.run_main(main)
