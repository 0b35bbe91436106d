# ruff: noqa: T201
"""Search of the 20 nearest of a million prompts. `python -m benchmarks.knn [--json FILE] [--tiny]`, minutes.

The index holds the 86 k real prompts of ../shared/data/prompts (20 k prompts of the grammar where that folder is
missing) without 1,000 of them, and synthetic prompts up to a million: the vector of a real prompt plus two vector
differences between a prompt and its edit by `benchmarks.curate.edited`. The queries, in one batch: `held`, the 1,000
prompts left out; `predicted`, the same vectors rotated towards another prompt to a cosine of .65, about that of a good
regressor's predictions. Prompts and edits are encoded once and cached, so the first run takes longer.

Ours is `models.retrieval.vector_index.Index`, approximate, built and saved in one process and loaded in others; the
peer is a matrix product and `topk` by torch over blocks of the vectors. Each measurement runs in its own process with
two threads; rounds alternate, medians are compared. The exit status is 1 where the wall time exceeds 2 s or the recall
is below .95, so nothing else may run on the two cores; CPU time is reported too. recall@20: fraction of brute force's
20 rows that ours finds. Memory: `own` is that of the process without mapped files, `peak` includes the mapped vectors.
"""

import argparse
import importlib
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks import curate
from benchmarks.harness import finish
from core.paths import ROOT

TARGET, RECALL, SECONDS = 4.0, 0.95, 2.0
ROWS, QUERIES, K, ROUNDS = 1_000_000, 1000, 20, 3
TINY = (20_000, 100)
THREADS = 2
PREDICTED_AT = 0.65
BLOCK = 65_536

Floats = NDArray[np.float32]


def texts(tiny: bool) -> list[str]:
    """Prompts, each followed by two edits."""
    if curate.FOLDER.is_dir() and not tiny:
        return curate.prompts()
    from datagen.prompts.grammar import lines

    rng = random.Random("knn")
    many = 500 if tiny else 20_000
    prompts = list(dict.fromkeys(line.prompt for line in itertools.islice(lines(0), 2 * many)))[:many]
    return [text for line in prompts for text in (line, curate.edited(line, rng), curate.edited(line, rng))]


def unit(vectors: NDArray[Any]) -> Floats:
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def write(folder: Path, triples: Path, rows: int, queries: int) -> None:
    """Write vectors.npy [rows, E], held.npy and predicted.npy [queries, E] from vectors of prompts and edits."""
    originals, *edits = np.load(triples).reshape(-1, 3, 384).swapaxes(0, 1)
    differences = np.concatenate([edit - originals for edit in edits])
    rng = np.random.default_rng(0)
    originals = unit(rng.permutation(originals))
    held, base = originals[:queries], originals[queries:]
    vectors = np.lib.format.open_memmap(folder / "vectors.npy", "w+", np.float32, (rows, originals.shape[1]))
    count = min(len(base), rows)
    vectors[:count] = base[:count]
    for start in range(count, rows, BLOCK):
        block = vectors[start : start + BLOCK]
        two = sum(differences[rng.integers(0, len(differences), len(block))] for _ in range(2))
        block[:] = unit(base[rng.integers(0, len(base), len(block))] + two)
    other = base[rng.integers(0, len(base), queries)]
    aside = unit(other - (other * held).sum(1, keepdims=True) * held)
    np.save(folder / "held.npy", held)
    np.save(folder / "predicted.npy", unit(PREDICTED_AT * held + (1 - PREDICTED_AT**2) ** 0.5 * aside))


def brute(vectors: Floats, query: Floats) -> NDArray[np.int64]:
    """Peer: brute force."""
    import torch

    cosine, row = torch.empty(len(query), 0), torch.empty(len(query), 0, dtype=torch.long)
    for start in range(0, len(vectors), BLOCK):
        near, at = (torch.from_numpy(query) @ torch.from_numpy(vectors[start : start + BLOCK]).T).topk(K)
        cosine, best = torch.cat([cosine, near], 1).topk(K)
        row = torch.cat([row, at + start], 1).gather(1, best)
    return row.numpy()


def memory_mb() -> dict[str, float]:
    """Memory of this process as the kernel reports it; empty where it does not."""
    status = Path("/proc/self/status")
    if not status.exists():
        return {}
    fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
    return {
        name: int(fields[key].split()[0]) * 1024 / 1e6
        for name, key in (("own_mb", "RssAnon"), ("peak_mb", "VmHWM"))
        if key in fields
    }


def measure(work: str, folder: Path) -> None:
    """Run one measurement in its own process; print seconds and memory."""
    importlib.import_module("torch" if work == "brute" else "faiss")  # which is not timed
    from models.retrieval.vector_index import Index

    vectors, file = np.load(folder / "vectors.npy", mmap_mode="c"), folder / "index.faiss"
    measured: dict[str, Any] = {}

    def timed(name: str, doing: Any) -> Any:
        wall, processor = time.perf_counter(), time.process_time()
        result = doing()
        measured[f"{name}_s"] = time.perf_counter() - wall
        measured[f"{name}_processor_s"] = time.process_time() - processor
        return result

    if work == "build":
        timed("build", lambda: Index(vectors, exact=False)).save(file)
    else:
        index = None if work == "brute" else Index(vectors, exact=True) if work == "exact" else None
        if work == "ours":
            index = timed("load", lambda: Index.load(file, vectors))
        for kind in ("held", "predicted"):
            query = np.load(folder / f"{kind}.npy")
            ask = (lambda q=query: brute(vectors, q)) if index is None else (lambda q=query: index.search(q, K)[1])
            np.save(folder / f"{work}.{kind}.npy", timed(kind, ask))
    print(json.dumps({**measured, **memory_mb()}))


def in_a_process(work: str, folder: Path) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.knn", "--measure", work, str(folder)]
    env = {**os.environ, "OMP_NUM_THREADS": str(THREADS), "MKL_NUM_THREADS": str(THREADS)}
    done = subprocess.run(command, cwd=ROOT, env=env, check=True, stdout=subprocess.PIPE, text=True)
    measured = json.loads(done.stdout.splitlines()[-1])
    print(f"{work}: " + ", ".join(f"{name} {value:,.2f}" for name, value in measured.items()), flush=True)
    return measured


def recall(folder: Path, kind: str) -> float:
    ours, theirs = (np.load(folder / f"{work}.{kind}.npy") for work in ("ours", "brute"))
    return float(np.mean([np.isin(b, a).mean() for a, b in zip(ours, theirs, strict=True)]))


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--tiny", action="store_true", help="20,000 vectors: shows that the script works")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    cfg = options()
    if cfg.measure:
        measure(cfg.measure[0], Path(cfg.measure[1]))
        return 0
    rows, queries = TINY if cfg.tiny else (ROWS, QUERIES)
    triples = curate.encoded(texts(cfg.tiny))
    with tempfile.TemporaryDirectory(dir=triples.parent) as name:
        return run(Path(name), triples, rows, queries, cfg)


def run(folder: Path, triples: Path, rows: int, queries: int, cfg: argparse.Namespace) -> int:
    write(folder, triples, rows, queries)
    build = in_a_process("build", folder)
    rounds: dict[str, list[dict[str, float]]] = {"ours": [], "brute": []}
    for work in ("ours", "brute") * (1 if cfg.tiny else ROUNDS):
        rounds[work].append(in_a_process(work, folder))
    exact = in_a_process("exact", folder)
    middle = {
        work: {name: statistics.median(measured[name] for measured in found) for name in found[0]}
        for work, found in rounds.items()
    }
    figures: dict[str, Any] = {
        "rows": rows,
        "queries": queries,
        "threads": THREADS,
        "recall_held": recall(folder, "held"),
        "recall_predicted": recall(folder, "predicted"),
        **{f"ours_{name}": value for name, value in middle["ours"].items()},
        **{f"brute_{name}": value for name, value in middle["brute"].items()},
        **{f"exact_{name}": value for name, value in exact.items()},
        **{(name if name.startswith("build") else f"build_{name}"): value for name, value in build.items()},
        "index_mb": (folder / "index.faiss").stat().st_size / 1e6,
        "rounds": rounds,
    }
    worst = min(figures["recall_held"], figures["recall_predicted"])
    seconds = max(middle["ours"]["held_s"], middle["ours"]["predicted_s"])
    print(
        f"recall@{K} {worst:.4f} (at least {RECALL}); {queries:,} queries: {seconds:.2f} s by the clock on "
        f"{THREADS} threads (at most {SECONDS})"
    )
    ratio = middle["brute"]["predicted_s"] / middle["ours"]["predicted_s"]
    finish("knn", ratio, TARGET, "torch-brute-force", figures, cfg.json)
    return 0 if cfg.tiny or (worst >= RECALL and seconds <= SECONDS) else 1


if __name__ == "__main__":
    sys.exit(main())
