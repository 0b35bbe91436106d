# ruff: noqa: T201
"""Submission on two cores, from images to CSV. `python -m benchmarks.predict [--json FILE]`, half an hour.

Ours is the quickstart's bundle, or, where `checkpoints/quickstart` is not there, the same backbone with random weights:
`python predict.py --images … --out …`. The peer is what one would write with timm: one process, Pillow,
timm.data.create_transform, batches of 32, the same weights eager in fp32 on torch's own number of threads, and
pandas' to_csv. Both are whole commands, by the clock, from the start of Python to the end of the CSV; rounds alternate,
medians are compared.

The images are 512 px PNGs of about 400 KB, as the competition's are: noise of all sizes, falling as in photographs.
500 are distinct, and hard links give them 16,000 names; all are in the page cache. Memory is that of all processes of
a run at once, sampled: pss counts a shared page once, rss in each process. At last a run is killed when it is half
done, and started again: the CSV must have the same bytes.

With few images (`--images 300 --rounds 1`) the starting of Python counts: that shows that the script works.
"""

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.harness import finish
from core.paths import ROOT

TARGET, GIGABYTES = 1.8, 2.0
COUNT, DISTINCT, ROUNDS, SIDE = 16_000, 500, 3, 512
BATCH, CORES, WIDTH = 32, 2, 384
QUICKSTART = ROOT / "checkpoints/quickstart/best"


def image(seed: int) -> "NDArray[np.uint8]":
    """Random image [512, 512, 3]: octaves of noise, with less weight for finer ones."""
    import torch

    random = torch.Generator().manual_seed(seed)
    image_BCHW, weight = torch.full((1, 3, SIDE, SIDE), 128.0), 60.0
    for side in (4, 8, 16, 32, 64, 128, 256, 512):
        noise_BCHW = torch.randn(1, 3, side, side, generator=random)
        image_BCHW += weight * torch.nn.functional.interpolate(noise_BCHW, (SIDE, SIDE), mode="bicubic")
        weight *= 0.63
    return image_BCHW[0].clamp(0, 255).byte().permute(1, 2, 0).numpy()


def make_images(folder: Path, count: int) -> float:
    """Write random images; return their mean size, bytes."""
    from PIL import Image

    folder.mkdir()
    for i in range(count):
        if i < DISTINCT:
            Image.fromarray(image(i)).save(folder / f"{i:06d}.png")
        else:
            (folder / f"{i:06d}.png").hardlink_to(folder / f"{i % DISTINCT:06d}.png")
    return statistics.mean((folder / f"{i:06d}.png").stat().st_size for i in range(min(count, DISTINCT)))


def make_bundle(folder: Path) -> None:
    import torch

    from models import checkpoint
    from models.export import export
    from models.regressor import make

    source = QUICKSTART
    if not QUICKSTART.is_dir():
        source = folder / "random"
        model = make("tf_efficientnet_lite0", "random", 112, WIDTH).eval()
        mean_E = torch.nn.functional.normalize(torch.ones(WIDTH), dim=0)
        checkpoint.save(source, model, mean_E, [torch.zeros(3, 112, 112, dtype=torch.uint8)], {"encoder": "none"})
    export.export(source, folder / "bundle")


def peer(bundle: Path, images: Path, out: Path) -> None:
    """Peer: a straightforward loop in this process."""
    import json

    import pandas as pd
    import timm
    import torch
    from PIL import Image
    from safetensors.torch import load_file
    from timm.data.transforms_factory import create_transform

    member_config = json.loads((bundle / "config.json").read_text())["members"][0]
    tensors = load_file(bundle / member_config["file"])

    def part(name: str) -> dict[str, torch.Tensor]:
        return {key.removeprefix(name): value for key, value in tensors.items() if key.startswith(name)}

    backbone = timm.create_model(member_config["backbone"], num_classes=0)
    backbone.load_state_dict(part("backbone."))
    head = torch.nn.Linear(member_config["width"], WIDTH)
    head.load_state_dict(part("head."))
    model = torch.nn.Sequential(backbone, head).eval()
    transform: Any = create_transform(
        (3, member_config["size"], member_config["size"]),
        interpolation="bicubic",
        mean=member_config["mean"],
        std=member_config["std"],
        crop_pct=member_config["crop_pct"],
    )
    files = sorted(images.iterdir())
    vectors = []
    with torch.inference_mode():
        for start in range(0, len(files), BATCH):
            batch = [transform(Image.open(file).convert("RGB")) for file in files[start : start + BATCH]]
            vectors.append(torch.nn.functional.normalize(model(torch.stack(batch)), dim=-1))
    names = [f"{file.stem}_{e}" for file in files for e in range(WIDTH)]
    pd.DataFrame({"imgId_eId": names, "val": torch.cat(vectors).flatten().numpy()}).to_csv(out, index=False)


class Peak(threading.Thread):
    """Peak memory of a process and all its descendants, GB, sampled a few times per second."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self._pid, self._ended = pid, threading.Event()
        self.pss = self.rss = 0.0

    def run(self) -> None:
        while not self._ended.wait(0.3):
            pss = rss = 0.0
            for pid in _family(self._pid):
                try:
                    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
                except OSError:
                    continue  # it has just ended
                sizes = {line.split(":")[0]: float(line.split()[1]) * 1024 / 1e9 for line in lines}
                pss, rss = pss + sizes.get("Pss", 0.0), rss + sizes.get("Rss", 0.0)
            self.pss, self.rss = max(self.pss, pss), max(self.rss, rss)

    def end(self) -> None:
        self._ended.set()
        self.join()


def _family(pid: int) -> list[int]:
    parents = {}
    for place in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(place.name)] = int((place / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    pids = [pid]
    for member in pids:
        pids += [child for child, parent in parents.items() if parent == member]
    return pids


def start(command: Sequence[object]) -> "subprocess.Popen[bytes]":
    return subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT, stderr=subprocess.DEVNULL)


def measured(command: Sequence[object]) -> tuple[float, Peak]:
    """Measure seconds and memory."""
    began = time.perf_counter()
    process = start(command)
    peak = Peak(process.pid)
    peak.start()
    code = process.wait()
    seconds = time.perf_counter() - began
    peak.end()
    if code:
        raise SystemExit(f"{' '.join(map(str, command))} ended with {code}")
    return seconds, peak


def kill_midway(command: Sequence[object], part: Path, count: int) -> int:
    """Kill a run when half of the images are done; return the number of finished images."""
    process = start(command)
    done = 0
    while done < count / 2:
        time.sleep(0.05)
        states = part / "states"
        done = states.read_bytes().count(3) if states.exists() else 0
        if process.poll() is not None:
            raise SystemExit("it had ended before it could be killed: take more images")
    process.send_signal(signal.SIGKILL)
    process.wait()
    return done


def cosine(ours: Path, theirs: Path) -> float:
    """Mean cosine between two submissions."""
    import pandas as pd

    a, b = (pd.read_csv(path)["val"].to_numpy().reshape(-1, WIDTH) for path in (ours, theirs))
    return float((a * b).sum(1).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--images", type=int, default=COUNT, help="images [%(default)s]")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="[%(default)s]")
    parser.add_argument("--peer", type=Path, nargs=3, help=argparse.SUPPRESS)
    cfg = parser.parse_args()
    if cfg.peer:
        peer(*cfg.peer)
        return
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        mean_bytes = make_images(folder / "images", cfg.images)
        make_bundle(folder)
        program = folder / "bundle/predict.py"

        def ours(out: str) -> list[object]:
            return [program, "--images", folder / "images", "--out", folder / out, "--device", "cpu"]

        theirs = ["-m", "benchmarks.predict", "--peer", folder / "bundle", folder / "images", folder / "peer.csv"]
        rounds: dict[str, list[float]] = {}
        for k in range(cfg.rounds):
            for which, command in (("ours", ours("ours.csv")), ("peer", theirs)):
                seconds, peak = measured(command)
                for figure, value in (("per_s", cfg.images / seconds), ("pss", peak.pss), ("rss", peak.rss)):
                    rounds.setdefault(f"{which}_{figure}", []).append(value)
            print(f"round {k}: " + ", ".join(f"{key} {values[-1]:.3g}" for key, values in rounds.items()), flush=True)
        killed_at = kill_midway(ours("again.csv"), folder / "again.csv.part", cfg.images)
        measured(ours("again.csv"))
        same = (folder / "again.csv").read_bytes() == (folder / "ours.csv").read_bytes()
        figures: dict[str, Any] = {key: statistics.median(values) for key, values in rounds.items() if "per_s" in key}
        figures |= {key: max(values) for key, values in rounds.items() if "per_s" not in key}
        figures["cosine_to_peer"] = cosine(folder / "ours.csv", folder / "peer.csv")
    figures |= {"memory_target": GIGABYTES, "killed_at": killed_at, "same_bytes": int(same), "pictures": cfg.images}
    figures |= {"mean_bytes": mean_bytes, "cores": CORES, "rounds": rounds}
    name = f"timm-{version('timm')}-pillow-{version('pillow')}"
    finish("predict", figures["ours_per_s"] / figures["peer_per_s"], TARGET, name, figures, cfg.json)
    if not same:
        raise SystemExit("the run that was killed and started again gives another CSV")


if __name__ == "__main__":
    main()
