# ruff: noqa: T201
"""Scenes per second of one core at 128 px. `python -m benchmarks.glyphs [--json FILE]`, about half a minute.

The peer is Pillow writing the very same images as PNG files in memory: a dataset of scenes pays for both, so their
ratio shows which of the two limits it. Rounds of the two alternate, and medians are compared.
"""

import io
import itertools
import statistics

from PIL import Image

from benchmarks.harness import finish, options, timed
from datagen.prompts.grammar import lines
from datagen.renderers.glyphs.renderer import Glyphs

TARGET = 0.5
SIZE, ROUND, ROUNDS = 128, 250, 7


def main() -> None:
    cfg = options(__doc__)
    renderer = Glyphs(SIZE)
    prompts = [line.prompt for line in itertools.islice(lines(0), ROUND * (ROUNDS + 4))]
    cold = timed(lambda: renderer.render(prompts[: 4 * ROUND], list(range(4 * ROUND))))  # fills the caches
    ours, peers = [], []
    for k in range(ROUNDS):
        part = prompts[(4 + k) * ROUND : (5 + k) * ROUND]
        seeds = list(range(k, k + ROUND))
        ours.append(ROUND / timed(lambda part=part, seeds=seeds: renderer.render(part, seeds)))
        images = [Image.fromarray(image) for image in renderer.render(part, seeds)]
        peers.append(ROUND / timed(lambda images=images: [p.save(io.BytesIO(), "PNG") for p in images]))
        print(f"round {k}: {ours[-1]:.0f} scenes/s, {peers[-1]:.0f} PNG/s")
    rate, peer = statistics.median(ours), statistics.median(peers)
    figures = {
        "scenes_per_s": rate,
        "png_per_s": peer,
        "cold_scenes_per_s": 4 * ROUND / cold,
        "size": SIZE,
        "rounds": {"scenes_per_s": ours, "png_per_s": peers},
    }
    finish("glyphs", rate / peer, TARGET, "pillow-png", figures, cfg.json)


if __name__ == "__main__":
    main()
