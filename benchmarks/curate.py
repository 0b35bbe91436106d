# ruff: noqa: T201
"""Near-duplicates among prompts, against brute force. `python -m benchmarks.curate [--json FILE] [--num N]`, minutes.

The 86 k real prompts of ../shared/data/prompts, each with two small edits (words swapped or left out, typing errors,
tags appended; seeded), 259 k in all, in random order. Their vectors are encoded once and cached, so the first run takes
longer. Ours is `datagen.curation.near_duplicates.distinct`, as curation calls it: exact up to 50,000 distinct vectors,
an inverted file beyond. The peer is greedy deduplication by blocks of fp32 matrix products: it drops each row at cosine
≥ 0.9 to an earlier row that it has not dropped. Each measurement runs in its own process with one thread, and reports
CPU time (the machine may be shared) and peak memory.

recall: fraction of the rows dropped by brute force that ours drops. left: fraction of our remaining rows with an
earlier near-duplicate among them. growth: CPU time for all rows over that for a quarter of them, 5 at most; medians of
alternating rounds. purge_recall: of the rows that brute force finds at cosine ≥ 0.7 to the first tenth, as a similarity
split finds training prompts near validation prompts, the fraction that ours finds.
"""

import argparse
import hashlib
import json
import os
import random
import resource
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.harness import finish, timed
from core.paths import ROOT, cache_folder
from core.progress import progress

TARGET, GROWTH, RECALL = 2.0, 5.0, 0.99
THRESHOLD, PURGE_AT, ROUNDS = 0.9, 0.7, 3
FILES = ("user_a", "user_b", "competition_style")
FOLDER = ROOT.parent / "shared" / "data" / "prompts"
BLOCK, CHUNK = 1024, 50_000
TAGS = (
    "highly detailed",
    "4k",
    "8k",
    "trending on artstation",
    "digital art",
    "octane render",
    "by greg rutkowski",
    "cinematic lighting",
    "sharp focus",
    "unreal engine",
    "concept art",
    "matte painting",
    "in the style of studio ghibli",
    "oil on canvas",
    "black and white",
)


def edited(text: str, rng: random.Random) -> str:
    """Apply one or two small edits: two words swapped, a letter changed, a word left out, a tag appended."""
    for _ in range(rng.choice((1, 1, 2))):
        words = text.split()
        kind = rng.randrange(4)
        if kind == 0 and len(words) > 1:
            i = rng.randrange(len(words) - 1)
            words[i], words[i + 1] = words[i + 1], words[i]
            text = " ".join(words)
        elif kind == 1:
            i = rng.randrange(len(text))
            text = text[:i] + rng.choice("abcdefghijklmnopqrstuvwxyz") + text[i + 1 :]
        elif kind == 2 and len(words) > 3:
            del words[rng.randrange(len(words))]
            text = " ".join(words)
        else:
            text = f"{text}, {rng.choice(TAGS)}"
    return text


def prompts() -> list[str]:
    """Real prompts in random order, each followed by two edits."""
    texts = [(FOLDER / f"{name}.txt").read_text(encoding="utf-8").splitlines() for name in FILES]
    lines = [line for text in texts for line in text if line.strip()]
    rng = random.Random("curate")
    rng.shuffle(lines)
    return [text for line in lines for text in (line, edited(line, rng), edited(line, rng))]


def encoded(texts: list[str]) -> Path:
    """Encode prompts to a .npy of vectors [N, E], or take it from the cache; a stopped run resumes."""
    from datagen.dataset.targets import TargetEncoder

    name = hashlib.blake2b("\n".join(texts).encode(), digest_size=8).hexdigest()
    path = cache_folder() / f"benchmark-curate-{name}.npy"
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    encoder = TargetEncoder("all-MiniLM-L6-v2", fast=True)
    part, rows = path.with_suffix(".part"), path.with_suffix(".rows")
    done = int(rows.read_text()) if part.exists() and rows.exists() else 0
    width = encoder.encode(["width"]).shape[1]
    vectors = np.memmap(part, np.float32, "r+" if done else "w+", shape=(len(texts), width))
    with progress(len(texts), "text", "encode, once", done) as bar:
        for start in range(done, len(texts), 8192):
            vectors[start : start + 8192] = encoder.encode(texts[start : start + 8192])
            vectors.flush()
            rows.write_text(str(min(start + 8192, len(texts))))
            bar.update(len(texts[start : start + 8192]))
    np.save(path.with_suffix(".whole.npy"), vectors)
    path.with_suffix(".whole.npy").replace(path)
    part.unlink()
    rows.unlink()
    return path


def greedy(vectors: NDArray[np.float32]) -> NDArray[np.int64]:
    """Peer: rows kept by brute force."""
    index = np.empty_like(vectors)
    kept: list[int] = []
    for start in range(0, len(vectors), BLOCK):
        block = vectors[start : start + BLOCK]
        near = np.zeros(len(block), bool)
        for first in range(0, len(kept), CHUNK):
            near |= (block @ index[first : min(first + CHUNK, len(kept))].T).max(1) >= THRESHOLD
        among = block @ block.T >= THRESHOLD
        alive: list[int] = []
        for i in np.flatnonzero(~near).tolist():
            if not among[i, alive].any():
                alive.append(i)
        index[len(kept) : len(kept) + len(alive)] = block[alive]
        kept += [start + i for i in alive]
    return np.array(kept, np.int64)


def ours(vectors: NDArray[np.float32]) -> NDArray[np.int64]:
    from datagen.curation.near_duplicates import NearDuplicateIndex, VectorFile, distinct

    index = NearDuplicateIndex(VectorFile(vectors.shape[1]), THRESHOLD)
    return np.concatenate(
        [start + distinct(vectors[start : start + CHUNK], index)[0] for start in range(0, len(vectors), CHUNK)]
    )


def greedy_purge(vectors: NDArray[np.float32]) -> NDArray[np.int64]:
    """Peer: training rows at cosine 0.7 to none of the first tenth, which validates."""
    val = vectors[: len(vectors) // 10]
    near = [(block @ val.T).max(1) >= PURGE_AT for block in np.split(vectors, range(BLOCK, len(vectors), BLOCK))]
    return np.flatnonzero(~np.concatenate(near))


def our_purge(vectors: NDArray[np.float32]) -> NDArray[np.int64]:
    from datagen.curation.near_duplicates import NearDuplicateIndex, VectorFile

    index = NearDuplicateIndex(VectorFile(vectors.shape[1]), PURGE_AT)
    index.add(vectors[: len(vectors) // 10])
    return np.flatnonzero(index.near(vectors)[0] < 0)


WORK = {"ours": ours, "brute": greedy, "our_purge": our_purge, "brute_purge": greedy_purge}


def shuffled(path: Path, rows: int) -> NDArray[np.float32]:
    """First `rows` vectors, in complete triples and random order, so that a part has as many near-duplicates as all."""
    with path.open("rb") as file:
        np.lib.format.read_magic(file)
        width = np.lib.format.read_array_header_1_0(file)[0][1]
        vectors = np.fromfile(file, np.float32, rows * width).reshape(rows, width)
    np.random.default_rng(0).shuffle(vectors)  # in place: a copy would hide what the work takes of memory
    return vectors


def peak_mb() -> float:
    """Peak memory of this process, mapped files included."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would tell the parent's, if that is more
        return int(status.read_text().partition("VmHWM:")[2].split()[0]) * 1024 / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # bytes on macOS


def measure(name: str, path: Path, rows: int, kept: Path) -> None:
    """Run one measurement in its own process: write the kept rows, print seconds and peak memory."""
    vectors = shuffled(path, rows)
    import datagen.curation.near_duplicates  # noqa: F401 – its import is not timed

    before = peak_mb()
    results: list[NDArray[np.int64]] = []
    measured = {"seconds": timed(lambda: results.append(WORK[name](vectors))), "peak_mb": peak_mb()}
    np.save(kept, results[0])
    print(json.dumps({**measured, "above_vectors_mb": measured["peak_mb"] - before}))


def in_a_process(name: str, path: Path, rows: int, kept: Path) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.curate", "--measure", name, str(path), str(rows), str(kept)]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True, stdout=subprocess.PIPE, text=True
    )
    measured = json.loads(done.stdout)
    print(f"{name}, {rows:,} rows: {measured['seconds']:.1f} s, peak {measured['peak_mb']:,.0f} MB")
    return measured


def dropped(kept: NDArray[np.int64], rows: int) -> NDArray[np.bool_]:
    mask = np.ones(rows, bool)
    mask[kept] = False
    return mask


def left_share(path: Path, rows: int, kept: NDArray[np.int64]) -> float:
    """Fraction of the kept rows with an earlier near-duplicate, by brute force."""
    vectors = shuffled(path, rows)[kept]
    near = 0
    for start in range(0, len(vectors), BLOCK):
        cosines = vectors[start : start + BLOCK] @ vectors[: start + BLOCK].T
        near += int((np.tril(cosines, start - 1) >= THRESHOLD).any(1).sum())
    return near / len(vectors)


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--num", type=int, help="take only so many rows, a first part of all")
    parser.add_argument("--measure", nargs=4, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    cfg = options()
    if cfg.measure:
        name, path, rows, kept = cfg.measure
        measure(name, Path(path), int(rows), Path(kept))
        return
    if not FOLDER.is_dir():
        print(f"skipped: {FOLDER} is not on this machine; it holds the prompts to measure with")
        return
    texts = prompts()
    path = encoded(texts[: cfg.num])
    rows = len(texts[: cfg.num])
    quarter = rows // 4 // 3 * 3
    kept = {name: path.with_suffix(f".{name}.kept.npy") for name in WORK}
    small = path.with_suffix(".small.kept.npy")
    rounds: dict[str, list[dict[str, float]]] = {"ours": [], "quarter": []}
    for _ in range(ROUNDS):
        rounds["quarter"].append(in_a_process("ours", path, quarter, small))
        rounds["ours"].append(in_a_process("ours", path, rows, kept["ours"]))
    peer = {name: in_a_process(name, path, rows, kept[name]) for name in ("brute", "our_purge", "brute_purge")}
    drops = {name: dropped(np.load(file), rows) for name, file in kept.items()}
    small.unlink()
    median = {name: statistics.median(r["seconds"] for r in rounds[name]) for name in rounds}
    figures: dict[str, Any] = {
        "rows": rows,
        "dropped": int(drops["brute"].sum()),
        "recall": float(drops["ours"][drops["brute"]].mean()),
        "left": left_share(path, rows, np.load(kept["ours"])),
        "seconds": median["ours"],
        "brute_seconds": peer["brute"]["seconds"],
        "peak_mb": rounds["ours"][0]["peak_mb"],
        "brute_peak_mb": peer["brute"]["peak_mb"],
        "above_vectors_mb": rounds["ours"][0]["above_vectors_mb"],
        "brute_above_vectors_mb": peer["brute"]["above_vectors_mb"],
        "growth": median["ours"] / median["quarter"],
        "purge_recall": float(drops["our_purge"][drops["brute_purge"]].mean()),
        "purge_seconds": peer["our_purge"]["seconds"],
        "brute_purge_seconds": peer["brute_purge"]["seconds"],
        "rounds": rounds,
    }
    for file in kept.values():
        file.unlink()
    print(f"recall {figures['recall']:.4f} (at least {RECALL}), growth {figures['growth']:.2f} (at most {GROWTH})")
    finish(
        "curate",
        peer["brute"]["seconds"] / median["ours"],
        TARGET,
        "brute-force",
        figures,
        cfg.json,
    )
    if cfg.num is None and (figures["recall"] < RECALL or figures["growth"] > GROWTH):
        sys.exit(1)


if __name__ == "__main__":
    main()
