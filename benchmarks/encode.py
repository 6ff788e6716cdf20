"""What encoding costs beyond the autoencoder: images per second of `sitkit encode` against a bare loop.

    python benchmarks/encode.py [--tiny] [--images 256] [--size 64] [--pairs 5] > encode.json

The autoencoder is an AutoencoderKL with random weights and Stable Diffusion's layout (eight times smaller each way, four
channels), narrow so that a CPU ends in minutes.  The bare loop reads the same PNG files one after another, encodes each and its
mirror image, as many at once as sitkit does, and keeps the posterior in memory: no shards, no digests, nothing to resume by.
Both run in this process, pair by pair.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import sitkit
from sitkit.data.dataset import load_examples
from sitkit.models.encode import encode_dataset


def autoencoder(folder: Path, widths: tuple[int, ...]) -> None:
    """An AutoencoderKL with random weights, as save_pretrained writes it."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    torch.manual_seed(0)
    down, up = ("DownEncoderBlock2D",) * len(widths), ("UpDecoderBlock2D",) * len(widths)
    settings: dict[str, Any] = {
        "down_block_types": down, "up_block_types": up, "block_out_channels": widths, "layers_per_block": 2,
        "norm_num_groups": 8, "latent_channels": 4, "in_channels": 3, "out_channels": 3,
    }  # fmt: skip
    AutoencoderKL(**settings).save_pretrained(folder)


def pictures(folder: Path, count: int, size: int) -> None:
    """PNG files of smooth noise, in two classes."""
    random = np.random.default_rng(0)
    for number in range(count):
        small = Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        path = folder / str(number % 2) / f"{number:05d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        small.resize((size, size), Image.Resampling.BICUBIC).save(path)


def loaded(folder: Path) -> Any:
    """The network, ready to encode."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    network: Any = AutoencoderKL.from_pretrained(folder).eval().requires_grad_(False)
    return network.to("cuda" if torch.cuda.is_available() else "cpu")


def bare(folder: Path, network: Any, at_once: int) -> list[torch.Tensor]:
    """The posteriors of every file and its mirror image, as plainly as it can be written."""
    device = next(network.parameters()).device
    kept: list[torch.Tensor] = []
    waiting: list[torch.Tensor] = []

    def flush() -> None:
        kept.append(network.encode(torch.stack(waiting).to(device)).latent_dist.parameters.cpu())
        waiting.clear()

    for path in sorted(folder.glob("*/*.png")):
        x = torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1).float() / 127.5 - 1
        for side in (x, x.flip(-1)):
            waiting.append(side)
            if len(waiting) == at_once:
                flush()
    if waiting:
        flush()
    return kept


def measure(count: int, size: int, pairs: int, widths: tuple[int, ...]) -> dict[str, Any]:
    """Seconds of both, pair by pair."""
    ours: list[tuple[float, float]] = []
    theirs: list[tuple[float, float]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        autoencoder(folder / "vae", widths)
        pictures(folder / "images", count, size)
        chosen = sitkit.autoencoders.create("sd-vae", path=str(folder / "vae"))
        data = sitkit.datasets.create("image-folder", path=str(folder / "images"), size=size)
        # The listing, the check of the headers and the loading of the weights come once, and are not timed.
        load_examples(data)
        chosen.fingerprint()
        network = loaded(folder / "vae")
        at_once = chosen.batch if torch.cuda.is_available() else 1
        for pair in range(pairs):
            load_examples.cache_clear()
            load_examples(data)
            began = time.perf_counter(), time.process_time()
            encode_dataset(data, chosen, folder / f"latents-{pair}")
            ours.append((time.perf_counter() - began[0], time.process_time() - began[1]))
            began = time.perf_counter(), time.process_time()
            bare(folder / "images", network, at_once)
            theirs.append((time.perf_counter() - began[0], time.process_time() - began[1]))
    ratios = [a[1] / b[1] for a, b in zip(ours, theirs, strict=True)]
    walls = [a[0] / b[0] for a, b in zip(ours, theirs, strict=True)]
    return {
        "images": count,
        "size": size,
        "at_once": at_once,
        "images_per_second": count / statistics.median(wall for wall, _ in ours),
        "baseline_images_per_second": count / statistics.median(wall for wall, _ in theirs),
        "processor_ratio": statistics.median(ratios),
        "processor_ratios": ratios,
        "clock_ratio": statistics.median(walls),
        "clock_ratios": walls,
    }


def main() -> None:
    """Run everything and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tiny", action="store_true", help="seconds instead of minutes, for a smoke test")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--pairs", type=int, default=5)
    asked = parser.parse_args()
    full = asked.images, asked.size, asked.pairs, (32, 64, 128, 128)
    measured = measure(*((8, 16, 1, (8, 8, 8, 8)) if asked.tiny else full))
    machine = {"platform": platform.platform(), "torch": torch.__version__, "threads": torch.get_num_threads()}
    print(json.dumps({"machine": machine, "encode": measured}, indent=2))


if __name__ == "__main__":
    main()
