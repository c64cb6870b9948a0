"""Measure loading a model of real size: peak resident memory and time, compared with the file's size and plain reading.

Random weights of the real configuration are written once (SDXL in bf16: 7 GB), as a folder and as a single file, then
loaded in a new process, with the files in the system's page cache.

    python tools/measure_loading.py /tmp/loading --family sd15 --family sdxl
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

CHILD = """
import json, resource, sys, time
import torch
import ldm.latent_diffusion as module
def peak(): return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) * 1024
open("/proc/self/clear_refs", "w").write("5")
before, start = peak(), time.perf_counter()
model = module.LatentDiffusion.from_pretrained(sys.argv[1], verify=sys.argv[2] == "yes")
loaded = time.perf_counter() - start
for network in model.modules().values():
    for p in network.parameters():
        p.detach().view(-1)[:: 2048 // p.element_size()].float().sum()  # touches every page
print(json.dumps({"seconds": loaded, "seconds_all_pages": time.perf_counter() - start, "peak": peak() - before}))
"""


def write(root: Path, family: str) -> list[Path]:
    """Write random weights of the family in bf16, as a folder and as a single file, unless they exist."""
    import torch

    from ldm.families import FAMILIES
    from ldm.latent_diffusion import LatentDiffusion
    from ldm.weights.components import build

    paths = [root / family, root / f"{family}.safetensors"]
    if not all(path.exists() for path in paths):
        with torch.device("meta"):
            parts = build(FAMILIES[family])
        generator = torch.Generator().manual_seed(0)
        for module in parts.modules().values():
            state = {
                name: torch.empty(p.shape, dtype=torch.bfloat16).uniform_(-0.05, 0.05, generator=generator)
                for name, p in module.named_parameters()
            }
            module.load_state_dict(state, assign=True)
        model = LatentDiffusion.of(parts)
        for path in paths:
            if not path.exists():
                model.save_pretrained(path)
    return paths


def weights(path: Path) -> list[Path]:
    return sorted(path.rglob("*.safetensors")) if path.is_dir() else [path]


def read_seconds(path: Path, digest: bool) -> float:
    """Seconds to read the files in large pieces and, with `digest`, to hash them: the least time of loading."""
    start = time.perf_counter()
    for file in weights(path):
        sha = hashlib.sha256()
        with file.open("rb") as raw:
            while piece := raw.read(2**22):
                if digest:
                    sha.update(piece)
    return time.perf_counter() - start


def load(path: Path, verify: bool) -> dict[str, float]:
    """Peak memory and seconds of one load in a fresh process."""
    command = [sys.executable, "-c", CHILD, str(path), "yes" if verify else "no"]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def main() -> None:
    """Print a line for each family, layout and way of loading, and all numbers as JSON at the end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder for the models (20 GB for both families)")
    parser.add_argument("--family", action="append", choices=["sd15", "sd2-v", "sdxl", "sdxl-refiner"])
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for family in options.family or ["sd15", "sdxl"]:
        for path in write(options.folder, family):
            size = sum(file.stat().st_size for file in weights(path))
            read_seconds(path, digest=False)  # fill the page cache
            for verify in (True, False):
                runs = [load(path, verify) for _ in range(options.runs)]
                row = {
                    "source": path.name,
                    "verify": verify,
                    "file_gb": size / 1e9,
                    "peak_over_file": max(run["peak"] for run in runs) / size,
                    "load_s": median(run["seconds"] for run in runs),
                    "load_and_touch_s": median(run["seconds_all_pages"] for run in runs),
                    "read_s": median(read_seconds(path, False) for _ in range(3)),
                    "read_and_hash_s": median(read_seconds(path, True) for _ in range(3)),
                }
                rows.append(row)
                print(
                    "  ".join(f"{k} {v:.2f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()),
                    flush=True,
                )
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
