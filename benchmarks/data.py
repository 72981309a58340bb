"""Time and memory of drawing a batch, over the number of images: both are flat.

    python benchmarks/data.py [--rows 1000 100000 10000000]

Makes memory-mapped Arrow files of 8x8 grey images (10 million take 0.8 GB of disk, in TMPDIR), in
record batches as large as those of the decoder, and writes benchmarks/results/data.json: seconds
for a batch of 128 after a warm-up, and by how much this process's own memory (RssAnon: without the
page cache, which belongs to the machine) grew from before the set was opened until after the
batches and the fingerprint.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa

from ddpm_hf.data import CHUNK_ROWS, ImageStream
from ddpm_hf.images import ImageSet

HERE = Path(__file__).parent
BATCH_SIZE, BATCHES = 128, 300


def write_images(path: Path, rows: int) -> None:
    """An Arrow file of random images as the decoder writes it, batch by batch."""
    rng = np.random.default_rng(0)
    kinds = dict(channels="int8", height="int32", width="int32", deep="int8")
    features = {name: datasets.Value(kind) for name, kind in kinds.items()}
    features = datasets.Features(pixels=datasets.Value("large_binary"), **features)
    with pa.ipc.new_stream(path, features.arrow_schema) as writer:
        for first in range(0, rows, CHUNK_ROWS):
            count = min(CHUNK_ROWS, rows - first)
            bounds = pa.py_buffer(np.arange(0, 64 * count + 1, 64))
            pixels = pa.py_buffer(rng.integers(0, 256, 64 * count, np.uint8))
            pixels = pa.Array.from_buffers(pa.large_binary(), count, [None, bounds, pixels])
            shape = [
                np.full(count, *pair) for pair in zip((1, 8, 8, 0), kinds.values(), strict=True)
            ]
            batch = pa.record_batch([pixels, *map(pa.array, shape)], list(features))
            writer.write_batch(batch.cast(features.arrow_schema))


def own_memory() -> int:
    """Bytes of this process's memory that are not the page cache's."""
    return 1024 * int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def measure(path: Path) -> dict:
    """A row of the results, in a process of its own."""
    before = own_memory()
    images = ImageSet(datasets.Dataset.from_file(str(path)), (8, 8), 1)
    stream = ImageStream(images, seed=0, global_batch_size=BATCH_SIZE, flip=True)
    stream.batch(0)
    started = time.perf_counter()
    for step in range(1, BATCHES + 1):
        stream.batch(step)
    seconds = (time.perf_counter() - started) / BATCHES
    started = time.perf_counter()
    images.fingerprint()
    fingerprint = time.perf_counter() - started
    return {
        "images": len(images),
        "seconds_per_batch": round(seconds, 6),
        "fingerprint_seconds": round(fingerprint, 3),
        "memory_growth_mb": round((own_memory() - before) / 1e6, 1),
    }


def main() -> None:
    """Measure every size in a fresh process and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000, 100_000, 10_000_000])
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure)))
        return
    results = []
    for rows in args.rows:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "images.arrow"
            write_images(path, rows)
            command = [sys.executable, __file__, "--measure", path]
            results.append(json.loads(subprocess.check_output(command)))
            print(results[-1])
    hardware = f"1 of {os.cpu_count()} cores, numpy {np.__version__}, pyarrow {pa.__version__}"
    out = {
        "hardware": hardware,
        "batch_size": BATCH_SIZE,
        "image": "8x8 grey",
        "flip": True,
        "rows": results,
    }
    (HERE / "results" / "data.json").write_text(json.dumps(out, indent=2) + "\n")


if __name__ == "__main__":
    main()
