"""The speed of reading data, compared with the speed of a training step, in images per second.

    python benchmarks/feeding.py [--tiny] [--backbone sit-s/2] [--batch 32] > feeding.json

Three sources are read with 0, 1 and 2 threads that read ahead: an archive in memory; a folder of PNG files, which are
decoded when they are read and not kept; and latents (mapped shards, a new draw from each posterior).  The baseline decodes
the same files one after another in a plain loop.  The need is the speed of sitkit's training step on latents of
4 x 32 x 32 on this machine.  The processor seconds of a read are also reported, because on a CPU the step and the reads
share the cores.  The last measurement is the time until a folder of 100,000 files can be read, beside a plain walk
through the folder.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _shared import machine, parser
from encode import pictures
from PIL import Image
from train import latents, network_of, ours, timed

import sitkit
from sitkit import Examples
from sitkit.data.dataset import load_examples
from sitkit.data.decoding import Pictures, centre_square
from sitkit.data.latents import INDEX, shard_path
from sitkit.data.stream import feed
from sitkit.runtime.files import write_json
from sitkit.runtime.tensors import save_tensors


def written_latents(folder: Path, count: int, per_shard: int = 256) -> Examples:
    """Write random latents to disk in the layout of `sitkit encode`, and load them."""
    values = latents(count).read(np.arange(count))
    rows = [min(per_shard, count - first) for first in range(0, count, per_shard)]
    for number, size in enumerate(rows):
        mean = values[number * per_shard :][:size, None].expand(-1, 2, -1, -1, -1)
        tensors = {"mean": mean, "std": torch.ones_like(mean), "labels": torch.zeros(size, dtype=torch.int64)}
        save_tensors(shard_path(folder, number), tensors, {"number": number})
    index = {
        "shape": list(values.shape[1:]), "rows": rows, "class_names": ["0"], "fingerprint": "made-up",
        "autoencoder": {"fingerprint": "made-up"}, "source": {"data": {"flip": True}},
    }  # fmt: skip
    write_json(folder / INDEX, index)
    return sitkit.datasets.create("latents", path=str(folder)).load()


def in_archive(folder: Path, count: int, size: int) -> Examples:
    """Write random images to an .npz, and load them into memory."""
    images = np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8)
    np.savez(folder / "images.npz", images=images)
    return sitkit.datasets.create("npz", path=str(folder / "images.npz"), flip=True).load()


def in_folder(folder: Path, count: int, size: int) -> Examples:
    """Write images to a folder, and load them as a set that is too large to keep its decoded images."""
    pictures(folder / "images", count, 2 * size)
    data = load_examples(sitkit.datasets.create("image-folder", path=str(folder / "images"), size=size))
    reader = data.reader
    assert isinstance(reader, Pictures)
    return dataclasses.replace(data, reader=Pictures(reader.source, size, 3, flip=True, kept_bytes=0))


def start(folder: Path, count: int) -> dict[str, float]:
    """Return the seconds until a folder of `count` tiny files can be read: with the check of every header, then without."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "png")
    for number in range(count):
        path = folder / str(number % 100) / f"{number:07d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(file.getvalue())
    dataset = sitkit.datasets.create("image-folder", path=str(folder), size=8)
    # The result of a check is cached there; this new cache does not contain the folder.
    os.environ["XDG_CACHE_HOME"] = str(folder.parent / "cache")
    seconds = {}
    for name in ("first", "again"):
        start_time = time.perf_counter(), time.process_time()
        dataset.load()
        seconds[name] = time.perf_counter() - start_time[0]
        seconds[f"{name}_processor"] = time.process_time() - start_time[1]
    start_time = time.perf_counter()
    for _, _, files in os.walk(folder):
        for _ in files:
            pass
    return {"files": count, **seconds, "bare_listing": time.perf_counter() - start_time}


def rate(data: Examples, batch: int, batches: int, workers: int) -> dict[str, float]:
    """Return the images per second, and the processor milliseconds for one image."""
    with feed(data, 0, range(batches + 2), batch, workers=workers) as stream:
        for _ in range(2):
            next(stream)
        start_time = time.perf_counter(), time.process_time()
        for _ in range(batches):
            next(stream)
        wall, cpu = time.perf_counter() - start_time[0], time.process_time() - start_time[1]
    images = batch * batches
    return {"images_per_second": images / wall, "processor_ms_per_image": 1000 * cpu / images}


def plain_loop(folder: Path, size: int) -> float:
    """Return the images per second of a plain loop over the same files."""
    files = sorted((folder / "images").glob("*/*.png"))
    start_time = time.perf_counter()
    for path in files:
        with Image.open(path) as image:
            x = torch.from_numpy(np.asarray(centre_square(image.convert("RGB"), size)).copy())
        _ = x.permute(2, 0, 1).float() / 127.5 - 1
    return len(files) / (time.perf_counter() - start_time)


def need(backbone: str, batch: int, device: torch.device) -> float:
    """Return the images per second of the training step: eager float32 on a CPU, compiled bfloat16 on CUDA."""
    cuda = device.type == "cuda"
    step = ours(network_of(backbone, device), latents(batch), batch, device, cuda, "bf16" if cuda else "fp32")
    timed(step, device, 2)
    return batch / min(timed(step, device, 1) for _ in range(3))


def main() -> None:
    """Run everything and print JSON."""
    cuda = torch.cuda.is_available()
    benchmark = parser(__doc__)
    benchmark.add_argument("--backbone", default="sit-xl/2" if cuda else "sit-s/2")
    benchmark.add_argument("--batch", type=int, default=256 if cuda else 32)
    options = benchmark.parse_args()
    backbone, batch, count, size, batches = options.backbone, options.batch, 2048, 64, 40
    if options.tiny:
        backbone, batch, count, size, batches = "sit-xs/4", 4, 32, 16, 2
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sets: dict[str, Callable[[], Examples]] = {
            "npz": lambda: in_archive(folder, count, size),
            "image-folder": lambda: in_folder(folder, count, size),
            "latents": lambda: written_latents(folder / "latents", count),
        }
        rates: dict[str, Any] = {}
        for kind, make in sets.items():
            data = make()
            rates[kind] = {workers: rate(data, batch, batches, workers) for workers in (0, 1, 2)}
        plain = plain_loop(folder, size)
        seconds_to_start = start(folder / "many", 200 if options.tiny else 100_000)
    needed = need(backbone, batch if cuda else min(batch, 8), torch.device("cuda" if cuda else "cpu"))
    for rows in rates.values():
        for row in rows.values():
            row["over_need"] = row["images_per_second"] / needed
    report = {
        "machine": machine(),
        "batch": batch,
        "size": size,
        "need": {"backbone": backbone, "images_per_second": needed},
        "read_ahead_by_threads": rates,
        "start_of_a_folder": seconds_to_start,
        "bare_loop_over_the_folder": {"images_per_second": plain},
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
