"""Map-style torch dataset over dataset folders: decoded images at the model's size, target vectors, weights.

Images of several datasets are numbered consecutively. An unreadable image is left out of its batch and listed.
B images, E target width, S side, N images of all datasets.
"""

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import normalize
from torch.utils.data import Dataset as TorchDataset

from core.encoder_identity import differences
from core.errors import UserError
from datagen.dataset.format import CorruptImage
from datagen.dataset.reader import Dataset
from models.runtime.decode import BadImage, decode
from models.runtime.preprocess import Preprocessing, resize_and_crop

log = logging.getLogger(__name__)

Rows = NDArray[np.int64]

_AT_ONCE = 65_536  # vectors per block: 100 MB


@dataclass
class Batch:
    """Images, targets and weights of one batch, and the images that could not be read."""

    image_BCHW: torch.Tensor  # noqa: N815
    """uint8 [B, 3, S, S]"""
    target_BE: torch.Tensor  # noqa: N815
    """Means of the captions' unit vectors: their dot product with z_BE is the score."""
    row_B: torch.Tensor  # noqa: N815
    """Row numbers of the images in `ImageDataset`."""
    weight_B: torch.Tensor  # noqa: N815
    """Weight of each image in the loss, float32; 1 on average over the training images."""
    bad: list[tuple[str, str]]
    """Label and reason of each unreadable image."""

    def pin_memory(self) -> "Batch":
        return self._each(torch.Tensor.pin_memory)

    def to(self, device: torch.device, non_blocking: bool = False) -> "Batch":
        return self._each(lambda t: t.to(device, non_blocking=non_blocking))

    def _each(self, move: Callable[[torch.Tensor], torch.Tensor]) -> "Batch":
        return Batch(move(self.image_BCHW), move(self.target_BE), move(self.row_B), move(self.weight_B), self.bad)


class ImageDataset(TorchDataset):
    """Decoded images of one or more datasets at the model's size, numbered consecutively.

    Raises:
        UserError: the datasets have vectors of different encoders.
    """

    def __init__(self, datasets: Sequence[Dataset], preprocessing: Preprocessing) -> None:
        self.datasets = list(datasets)
        self.preprocessing = preprocessing
        self.weight_N: NDArray[np.float32] | None = None
        """Weight of each image in the loss; None: equal weights."""
        self.offsets = np.cumsum([0, *map(len, self.datasets)])
        """First row number of each dataset; the last entry is the number of all images."""
        self.names = distinct_names(self.datasets)
        _refuse_other_vectors(self.datasets)

    def __len__(self) -> int:
        return int(self.offsets[-1])

    @property
    def width(self) -> int:
        """Width E of the target vectors."""
        return self.datasets[0].width

    def place(self, row: int) -> tuple[Dataset, int]:
        """Dataset of an image, and its row number there."""
        number = self.dataset_of(row)
        return self.datasets[number], int(row - self.offsets[number])

    def dataset_of(self, row: int) -> int:
        """Position in `datasets` of an image's dataset."""
        return int(np.searchsorted(self.offsets, row, side="right")) - 1

    def rows(self, number: int, own: Rows) -> Rows:
        """Row numbers here of the rows `own` of dataset `number`."""
        return own + self.offsets[number]

    def by_dataset(self, rows: Rows) -> list[tuple[int, NDArray[np.bool_], Rows]]:
        """Group `rows` by dataset: its position, a mask over `rows`, and the row numbers there."""
        numbers = np.searchsorted(self.offsets, rows, side="right") - 1
        masks = [(n, numbers == n) for n in np.unique(numbers).tolist()]
        return [(n, mask, rows[mask] - self.offsets[n]) for n, mask in masks]

    def parts(self, rows: Rows) -> list[tuple[Dataset, Rows]]:
        """Datasets that have some of `rows`, each with the row numbers there."""
        return [(self.datasets[number], dataset_rows) for number, _, dataset_rows in self.by_dataset(rows)]

    def key(self, row: int) -> str:
        dataset, dataset_row = self.place(row)
        return dataset.key(dataset_row)

    def label(self, row: int) -> str:
        """Label of an image in lists: its key, preceded by the dataset's name where there are several."""
        name = f"{self.names[self.dataset_of(row)]}/" if len(self.datasets) > 1 else ""
        return f"{name}{self.key(row)}"

    def prompts(self, row: int) -> list[str]:
        dataset, dataset_row = self.place(row)
        return dataset.prompts(dataset_row)

    def decoded(self, row: int) -> torch.Tensor:
        """Decode an image at its own size: uint8 [3, H, W].

        Raises:
            CorruptImage, BadImage: it cannot be read.
        """
        dataset, dataset_row = self.place(row)
        return decode(dataset.image_bytes(dataset_row))

    def decoded_or_reason(self, row: int) -> torch.Tensor | str:
        """Decode an image as `decoded`; where it cannot be read, return the reason."""
        try:
            return self.decoded(row)
        except (CorruptImage, BadImage) as error:
            return str(error)

    def any_readable(self, rows: Iterable[int]) -> bool:
        """Whether one of these images can be read."""
        return any(not isinstance(self.decoded_or_reason(row), str) for row in rows)

    def targets(self, rows: Rows) -> NDArray[np.float32]:
        """Means of the captions' unit vectors of these images, [n, E]."""
        target_nE = np.empty((len(rows), self.width), np.float32)
        for number, mask, dataset_rows in self.by_dataset(rows):
            target_nE[mask] = self.datasets[number].mean_targets(dataset_rows)
        return target_nE

    def mean_target(self, rows: Rows) -> torch.Tensor:
        """Normalised mean of the images' targets, [E]."""
        total_E = np.zeros(self.width)
        for first in range(0, len(rows), _AT_ONCE):
            total_E += self.targets(rows[first : first + _AT_ONCE]).sum(0, dtype=np.float64)
        return normalize(torch.from_numpy(total_E).float(), dim=-1)

    def origins(self, rows: Rows) -> list[dict[str, Any]]:
        """Path, hash and number of `rows` of each dataset, as plain JSON."""
        numbers = np.searchsorted(self.offsets, rows, side="right") - 1
        return [
            {"path": str(dataset.root), "sha256": dataset.fingerprint(), "images": int((numbers == number).sum())}
            for number, dataset in enumerate(self.datasets)
        ]

    def __getitems__(self, rows: Sequence[int]) -> Batch:
        images, good, bad = [], [], []
        for row in rows:
            image_CHW = self.decoded_or_reason(row)
            if isinstance(image_CHW, str):
                bad.append((self.label(row), image_CHW))
            else:
                images.append(resize_and_crop(image_CHW, self.preprocessing))
                good.append(row)
        size = self.preprocessing.size
        image_BCHW = torch.stack(images) if images else torch.zeros(0, 3, size, size, dtype=torch.uint8)
        row_B = np.array(good, np.int64)
        weight_B = np.ones(len(good), np.float32) if self.weight_N is None else self.weight_N[row_B]
        target_BE = torch.from_numpy(self.targets(row_B))
        return Batch(image_BCHW, target_BE, torch.from_numpy(row_B), torch.from_numpy(weight_B), bad)


def distinct_names(datasets: Sequence[Dataset]) -> list[str]:
    """Folder names of the datasets; a repeated name gets a number."""
    names: list[str] = []
    for dataset in datasets:
        plain = name = dataset.root.name or "dataset"
        count = 1
        while name in names:
            count += 1
            name = f"{plain}-{count}"
        names.append(name)
    return names


def _refuse_other_vectors(datasets: Sequence[Dataset]) -> None:
    first, *others = datasets
    problems = []
    for dataset in others:
        if lines := differences(first.encoder_identity, dataset.encoder_identity, strict=True):
            problems.append(f"  {first.root} (first) and {dataset.root} (second):")
            problems += [f"    {line}" for line in lines]
    if problems:
        raise UserError(
            "datasets with vectors of different encoders, or of other settings of one:\n"
            + "\n".join(problems)
            + "\nWhere a value is not recorded, python -m datagen.targets out=… encoder=… checks the vectors and "
            "records it. Where vectors are wrong, remove their folder in targets/ first: it then writes them again."
        )
