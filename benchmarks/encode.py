"""The cost of `sitkit encode` beyond the autoencoder: its images per second against those of a plain loop.

    python benchmarks/encode.py [--tiny] [--images 256] [--size 64] [--pairs 5] > encode.json

The autoencoder is an AutoencoderKL with random weights and the layout of Stable Diffusion (a factor of eight in each
direction, four channels).  It is narrow, so that a CPU needs minutes only.  The plain loop reads the same PNG files one
after another, encodes each file and its mirror image in batches of the same size, and keeps the posteriors in memory.  It
writes no shards and no digests, and cannot resume.  Both run in this process, in turn.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _shared import machine, parser
from PIL import Image

import sitkit
from sitkit.data.dataset import load_examples


def autoencoder(folder: Path, widths: tuple[int, ...]) -> None:
    """Write an AutoencoderKL with random weights in the format of save_pretrained."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    torch.manual_seed(0)
    down, up = ("DownEncoderBlock2D",) * len(widths), ("UpDecoderBlock2D",) * len(widths)
    settings: dict[str, Any] = {
        "down_block_types": down, "up_block_types": up, "block_out_channels": widths, "layers_per_block": 2,
        "norm_num_groups": 8, "latent_channels": 4, "in_channels": 3, "out_channels": 3,
    }  # fmt: skip
    AutoencoderKL(**settings).save_pretrained(folder)


def pictures(folder: Path, count: int, size: int) -> None:
    """Write PNG files of smooth noise, in two classes."""
    random = np.random.default_rng(0)
    for number in range(count):
        small = Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        path = folder / str(number % 2) / f"{number:05d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        small.resize((size, size), Image.Resampling.BICUBIC).save(path)


def load_network(folder: Path) -> Any:
    """Return the network, ready to encode."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    network: Any = AutoencoderKL.from_pretrained(folder).eval().requires_grad_(False)
    return network.to("cuda" if torch.cuda.is_available() else "cpu")


def plain_loop(folder: Path, network: Any, batch: int) -> list[torch.Tensor]:
    """Return the posteriors of every file and its mirror image, computed by a plain loop."""
    device = next(network.parameters()).device
    posteriors: list[torch.Tensor] = []
    images: list[torch.Tensor] = []

    def flush() -> None:
        posteriors.append(network.encode(torch.stack(images).to(device)).latent_dist.parameters.cpu())
        images.clear()

    for path in sorted(folder.glob("*/*.png")):
        x = torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1).float() / 127.5 - 1
        for side in (x, x.flip(-1)):
            images.append(side)
            if len(images) == batch:
                flush()
    if images:
        flush()
    return posteriors


def measure(count: int, size: int, pairs: int, widths: tuple[int, ...]) -> dict[str, Any]:
    """Measure the seconds of both, in turn."""
    ours: list[tuple[float, float]] = []
    theirs: list[tuple[float, float]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        autoencoder(folder / "vae", widths)
        pictures(folder / "images", count, size)
        encoder = sitkit.autoencoders.create("sd-vae", path=str(folder / "vae"))
        data = sitkit.datasets.create("image-folder", path=str(folder / "images"), size=size)
        # Listing the files, checking their headers and loading the weights are done once and not timed.
        load_examples(data)
        encoder.fingerprint()
        network = load_network(folder / "vae")
        batch = encoder.batch if torch.cuda.is_available() else 1
        for pair in range(pairs):
            load_examples.cache_clear()
            load_examples(data)
            began = time.perf_counter(), time.process_time()
            sitkit.encode(data, autoencoder=encoder, out=folder / f"latents-{pair}")
            ours.append((time.perf_counter() - began[0], time.process_time() - began[1]))
            began = time.perf_counter(), time.process_time()
            plain_loop(folder / "images", network, batch)
            theirs.append((time.perf_counter() - began[0], time.process_time() - began[1]))
    ratios = [a[1] / b[1] for a, b in zip(ours, theirs, strict=True)]
    walls = [a[0] / b[0] for a, b in zip(ours, theirs, strict=True)]
    return {
        "images": count,
        "size": size,
        "at_once": batch,
        "images_per_second": count / statistics.median(wall for wall, _ in ours),
        "baseline_images_per_second": count / statistics.median(wall for wall, _ in theirs),
        "processor_ratio": statistics.median(ratios),
        "processor_ratios": ratios,
        "clock_ratio": statistics.median(walls),
        "clock_ratios": walls,
    }


def main() -> None:
    """Run everything and print JSON."""
    benchmark = parser(__doc__)
    benchmark.add_argument("--images", type=int, default=256)
    benchmark.add_argument("--size", type=int, default=64)
    benchmark.add_argument("--pairs", type=int, default=5)
    options = benchmark.parse_args()
    full = options.images, options.size, options.pairs, (32, 64, 128, 128)
    measured = measure(*((8, 16, 1, (8, 8, 8, 8)) if options.tiny else full))
    print(json.dumps({"machine": machine(), "encode": measured}, indent=2))


if __name__ == "__main__":
    main()
