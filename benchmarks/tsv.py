"""How fast a big TSV is indexed, opened and read by index.

    python benchmarks/tsv.py --folder /tmp/tsv --gigabytes 20

writes a file like RefCOCO's (id, picture id, text, box, 40 kB of base64) of that size into the folder, measures, prints a
table (``--json``: one document), and deletes the file (``--keep``: leaves it). Opening is measured in a fresh process: the
library is imported first, the clock covers opening alone, and the peak is that of the whole process. Rows are read twice:
after the system was asked to drop the file from its cache ("cold"), and after the file was read once ("cached", which is
that only where it fits into memory). The disk of a virtual machine may have a cache of its own that nothing here drops.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from pituning.data.tsv import TsvFile

PICTURES = 256  # different pictures; the file repeats them
PICTURE_BYTES = 30_000
NAME = "synthetic.tsv"

OPEN = """
import json, random, re, sys, time
from pituning.data.tsv import TsvFile
path, rows, seed, name = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
start = time.perf_counter(); file = TsvFile(path); opened = time.perf_counter() - start
# not ru_maxrss: that of a child begins with its parent's
def peak(): return int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]) / 1024
after_opening = peak()
chosen = random.Random(seed).choices(range(len(file)), k=rows)
start = time.perf_counter()
for row in chosen[:1000]: file.cells(row, (0, 2, 3))
after_1000 = peak()
for row in chosen[1000:]: file.cells(row, (0, 2, 3))
text = time.perf_counter() - start
after_text = peak()
chosen = random.Random(seed + 1).choices(range(len(file)), k=rows // 4)  # others: those just read are cached
start = time.perf_counter()
for row in chosen: file.cells(row, (0, 2, 3)); file.image(row, 4)
picture = time.perf_counter() - start
print(json.dumps({f"{name}_open_s": opened, f"{name}_open_peak_mb": after_opening, f"{name}_1000_rows_peak_mb": after_1000,
                  f"{name}_text_rows_per_s": rows / text, f"{name}_text_peak_mb": after_text,
                  f"{name}_picture_rows_per_s": len(chosen) / picture, f"{name}_end_peak_mb": peak()}))
"""
INDEX = "import sys; from pituning.data.tsv import TsvFile; print(len(TsvFile(sys.argv[1])))"


def write(path: Path, size: int) -> int:
    """Write rows until the file has the size; returns their number."""
    rng = random.Random(0)
    pictures = [base64.urlsafe_b64encode(rng.randbytes(PICTURE_BYTES)) for _ in range(PICTURES)]
    rows = written = 0
    with path.open("wb", buffering=1 << 24) as file:
        while written < size:
            text = b"%d\t%d\tthe thing number %d\t%d.5,2.25,60.0,80.75\t" % (rows, rows // 3, rows * 7919, rows % 50)
            written += file.write(text) + file.write(pictures[rows % PICTURES]) + file.write(b"\n")
            rows += 1
    return rows


def forget(path: Path) -> None:
    """Ask the system to drop the file from its cache."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def index_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.index")


def read(path: Path) -> None:
    """Read the file from the beginning to the end."""
    with path.open("rb", buffering=0) as file:
        while file.read(1 << 24):
            pass


def indexed(path: Path) -> float:
    """Seconds to index the file from nothing."""
    shutil.rmtree(index_of(path), ignore_errors=True)
    start = time.perf_counter()
    TsvFile(path)
    return time.perf_counter() - start


def rows_read(path: Path, reads: int, seed: int, name: str) -> dict[str, Any]:
    """What a fresh process needs to open the indexed file and to read random rows of it."""
    command = [sys.executable, "-c", OPEN, str(path), str(reads), str(seed), name]
    found: dict[str, Any] = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
    return found


def killed(path: Path, rows: int) -> dict[str, Any]:
    """Kill an indexing run half-way, then start again: is the index right, and nothing left over?"""
    whole = sum(p.stat().st_size for p in index_of(path).glob("ends.*"))
    shutil.rmtree(index_of(path))
    process = subprocess.Popen([sys.executable, "-c", INDEX, str(path)], stdout=subprocess.DEVNULL)

    def made() -> int:
        return sum(p.stat().st_size for p in path.parent.glob("*.partial/ends.*"))

    while made() < whole / 2 and process.poll() is None:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    cut = process.wait() == -signal.SIGKILL and not index_of(path).exists()
    share = made() / whole
    right = len(TsvFile(path)) == rows
    left = {p.name for p in path.parent.iterdir() if p.name.startswith(path.name)} - {path.name, index_of(path).name}
    return {"killed_at_share": share, "killed_rows_right": cut and right, "killed_left_over": len(left)}


def measure(path: Path, gigabytes: float, reads: int) -> dict[str, Any]:
    """Write the file, index it, open it and read rows of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    rows = write(path, int(gigabytes * 1e9))
    result: dict[str, Any] = {
        "rows": rows,
        "gigabytes": path.stat().st_size / 1e9,
        "write_s": time.perf_counter() - start,
    }
    megabytes = path.stat().st_size / 1e6
    forget(path)
    start = time.perf_counter()
    read(path)
    result["plain_read_mb_per_s"] = megabytes / (time.perf_counter() - start)
    forget(path)
    seconds = indexed(path)
    result |= {"index_mb_per_s": megabytes / seconds, "index_s": seconds}
    result["index_again_mb_per_s"] = megabytes / indexed(path)
    forget(path)
    result |= rows_read(path, reads, 0, "cold")
    read(path)
    return result | rows_read(path, reads, 2, "cached")


def remove(path: Path) -> None:
    """Remove the file and its index, finished or not."""
    path.unlink(missing_ok=True)
    for folder in path.parent.glob(f"{path.name}.index*"):
        shutil.rmtree(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--gigabytes", type=float, default=20.0)
    parser.add_argument("--reads", type=int, default=20_000)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--keep", action="store_true")
    arguments = parser.parse_args()
    path = arguments.folder / NAME
    try:
        result = measure(path, arguments.gigabytes, arguments.reads)
        result |= killed(path, result["rows"])
    finally:
        if not arguments.keep:
            remove(path)
    if arguments.json:
        print(json.dumps(result, indent=1))
        return
    for name, value in result.items():
        print(f"{name:<24} {value:,.3f}" if isinstance(value, float) else f"{name:<24} {value:,}")


if __name__ == "__main__":
    main()
