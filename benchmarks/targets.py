# ruff: noqa: T201
"""Prompts encoded per second in curation. `python -m benchmarks.targets [--json FILE]`, some minutes.

Ours is `TargetEncoder(all-MiniLM-L6-v2, fast=True).encode`; the peer is `SentenceTransformer.encode` with its defaults
(batches of 32, fp32) on the same texts: prompts and captions from ../shared/data, the grammar's where that is missing.
Also reported: the fp32 way, which writes stored targets. One process, one number of threads (OMP_NUM_THREADS sets
it), by the wall clock; rounds alternate, and the median of the rounds' ratios counts. The lowest cosine over all texts
must hold too.
"""

import itertools
import random
import statistics
import time
from importlib.metadata import version
from typing import Any

import numpy as np
import torch

from benchmarks.harness import finish, options
from core.paths import ROOT
from datagen.dataset.targets import MINILM, TargetEncoder
from datagen.dataset.text_encoder import LOWEST_COSINE
from datagen.prompts.grammar import lines

TARGET = 2.5
TEXTS, ROUNDS = 3000, 5
FILES = ("prompts/user_a.txt", "prompts/competition_style.txt", "captions/coco_val2017.txt")


def texts() -> tuple[list[str], str]:
    """Distinct texts in random order, and their origin."""
    paths = [ROOT.parent / "shared" / "data" / name for name in FILES]
    if not all(path.exists() for path in paths):
        return list(dict.fromkeys(line.prompt for line in itertools.islice(lines(0), TEXTS))), "grammar"
    prompts = [line for path in paths for line in path.read_text(encoding="utf-8").splitlines()]
    return random.Random(0).sample(sorted(set(prompts)), TEXTS), "prompts and captions"


def ratio(ours: list[float], peers: list[float]) -> float:
    """Median ratio over rounds; within a round, other load of the machine is about equal for both."""
    return statistics.median(a / b for a, b in zip(ours, peers, strict=True))


def main() -> None:
    cfg = options(__doc__)
    prompts, source = texts()
    fast, exact = TargetEncoder(MINILM, "cpu", fast=True), TargetEncoder(MINILM, "cpu")
    plain = TargetEncoder(MINILM, "cpu").transformer
    work = {
        "fast_per_s": lambda: fast.encode(prompts),
        "fp32_per_s": lambda: exact.encode(prompts),
        "plain_per_s": lambda: plain.encode(prompts, normalize_embeddings=True, show_progress_bar=False),
    }
    for encoder in (fast, exact):
        encoder.encode(prompts[:100])  # loads, checks itself
    rounds: dict[str, list[float]] = {name: [] for name in work}
    vectors: dict[str, Any] = {}
    for k in range(ROUNDS):
        for name, what in work.items():
            start = time.perf_counter()
            vectors[name] = what()
            rounds[name].append(len(prompts) / (time.perf_counter() - start))
        print(f"round {k}: " + ", ".join(f"{name} {rates[-1]:,.0f}" for name, rates in rounds.items()))
    cosines = (vectors["fast_per_s"] * vectors["plain_per_s"]).sum(1)
    print(f"{len(prompts)} texts ({source}), {torch.get_num_threads()} threads; cosine min {cosines.min():.6f}")
    assert cosines.min() >= LOWEST_COSINE
    figures = {
        **{name: statistics.median(rates) for name, rates in rounds.items()},
        "fp32_ratio": ratio(rounds["fp32_per_s"], rounds["plain_per_s"]),
        "fp32_difference": float(np.abs(vectors["fp32_per_s"] - vectors["plain_per_s"]).max()),
        "cosine_min": float(cosines.min()),
        "cosine_mean": float(cosines.mean()),
        "texts": len(prompts),
        "threads": torch.get_num_threads(),
        "rounds": rounds,
    }
    peer = f"sentence-transformers-{version('sentence-transformers')}"
    finish("targets", ratio(rounds["fast_per_s"], rounds["plain_per_s"]), TARGET, peer, figures, cfg.json)


if __name__ == "__main__":
    main()
