# ruff: noqa: T201
"""Images per second of the input pipeline. `python -m benchmarks.pipeline [--json FILE] [--tiny]`, minutes.

Ours is the loader of a training run: random order over all shards, uint8 batches of 224 px with their target vectors;
the model normalises them on its own device. The first peer is the loop that a user of the same tars would write:
webdataset, decoded by Pillow, Resize (bicubic), CenterCrop, ToTensor, Normalize, batched. The second is webdataset with
our own decoder, giving uint8 batches: what the reading alone is worth. Neither peer reads target vectors, and both
shuffle locally. Reported beside that: ours when the CPU also normalises. All decode in this process, on one thread; the
tars are in the page cache; rounds alternate, and medians are compared.
"""

import statistics
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import normalize
from torchvision import transforms
from webdataset.compat import WebDataset

from benchmarks.harness import finish, options, timed
from benchmarks.reader import IMAGES, SHARD, make
from datagen.dataset.reader import Dataset
from datagen.dataset.writer import write_targets
from models.regressor import Regressor
from models.regressor import make as make_model
from models.runtime.decode import decode
from models.runtime.preprocess import Preprocessing, resize_and_crop
from train.data.images import ImageDataset
from train.data.loader import loader
from train.data.samplers import ShuffledEpochs, TrainBatchSampler, TrainingSubset

TARGET, OWN_DECODER_TARGET = 2.3, 1.15
SIDE, BATCH, ROUNDS, WIDTH = 224, 64, 7, 384

warnings.filterwarnings("ignore", category=ResourceWarning)  # webdataset leaves its tars open


def write_random_targets(root: Path) -> Dataset:
    """Write random unit vectors as targets of the dataset."""

    def encode(texts: list[str]) -> np.ndarray[Any, np.dtype[np.float32]]:
        rows_nE = torch.randn(len(texts), WIDTH, generator=torch.Generator().manual_seed(len(texts)))
        return normalize(rows_nE, dim=-1).numpy()

    write_targets(root, {"name": "random", "width": WIDTH}, encode, lambda _: None)
    return Dataset(root, "random")


def our_batches(images: ImageDataset, seed: int) -> Iterator[torch.Tensor]:
    draws = ShuffledEpochs([TrainingSubset(np.arange(len(images)))], seed)
    for batch in loader(images, TrainBatchSampler(draws, BATCH, len(images) // BATCH), 0):
        yield batch.image_BCHW


def usual_batches(tars: list[str], seed: int, spec: Any) -> Iterator[torch.Tensor]:
    prepare = transforms.Compose(
        [
            transforms.Resize(SIDE, transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(SIDE),
            transforms.ToTensor(),
            transforms.Normalize(spec.mean, spec.std),
        ]
    )
    samples: Any = WebDataset(tars, shardshuffle=len(tars), seed=seed).shuffle(1000).decode("pil")
    yield from _images(samples.to_tuple("jpg", "txt").map_tuple(prepare).batched(BATCH, partial=False))


def own_decoder_batches(tars: list[str], seed: int) -> Iterator[torch.Tensor]:
    def prepare(data: bytes) -> torch.Tensor:
        return resize_and_crop(decode(data), Preprocessing(SIDE))

    samples: Any = WebDataset(tars, shardshuffle=len(tars), seed=seed).shuffle(1000)
    yield from _images(samples.to_tuple("jpg", "txt").map_tuple(prepare).batched(BATCH, partial=False))


def _images(batches: Iterable[Any]) -> Iterator[torch.Tensor]:
    for images, _ in batches:
        yield images


def drain(batches: Iterator[torch.Tensor], model: Regressor | None = None) -> int:
    count = 0
    for image_BCHW in batches:
        assert image_BCHW.shape[1:] == (3, SIDE, SIDE)
        if model is not None:
            model.normalise(image_BCHW)
        count += len(image_BCHW)
    return count


def main() -> None:
    cfg = options(__doc__, tiny="a few images: shows that the script works, measures nothing")
    count, tars_of, times = (2 * BATCH, BATCH, 1) if cfg.tiny else (IMAGES, SHARD, ROUNDS)
    torch.set_num_threads(1)
    model = make_model("vit_tiny_patch16_224", "random", SIDE, WIDTH)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        mean_bytes = make(root, count, tars_of)
        tars = sorted(map(str, root.glob("shards/*.tar")))
        images = ImageDataset([write_random_targets(root)], Preprocessing(SIDE))
        expected = count // BATCH * BATCH
        rounds: dict[str, list[float]] = {}
        for k in range(times):
            work: dict[str, Callable[[], int]] = {
                "images_per_s": lambda k=k: drain(our_batches(images, k)),
                "usual_per_s": lambda k=k: drain(usual_batches(tars, k, model.spec)),
                "own_decoder_per_s": lambda k=k: drain(own_decoder_batches(tars, k)),
                "normalised_per_s": lambda k=k: drain(our_batches(images, k), model),
            }
            if not k:  # warms the page cache, and all give as many images
                assert {what() for what in work.values()} == {expected}
            for name, what in work.items():
                rounds.setdefault(name, []).append(expected / timed(what))
            print(f"round {k}: " + ", ".join(f"{name} {rounds[name][-1]:,.0f}" for name in work))
    medians = {name: statistics.median(rates) for name, rates in rounds.items()}
    own_decoder_ratio = medians["images_per_s"] / medians["own_decoder_per_s"]
    figures = {**medians, "own_decoder_ratio": own_decoder_ratio, "own_decoder_target": OWN_DECODER_TARGET}
    figures |= {"mean_bytes": mean_bytes, "pictures": count, "batch": BATCH}
    ratio = medians["images_per_s"] / medians["usual_per_s"]
    finish("pipeline", ratio, TARGET, f"webdataset-{version('webdataset')}", {**figures, "rounds": rounds}, cfg.json)


if __name__ == "__main__":
    main()
