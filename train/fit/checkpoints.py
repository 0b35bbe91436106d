"""Write checkpoints of a run, with the mean training vector and eight validation images for parity checks."""

import itertools
from collections.abc import Mapping
from typing import Any

import torch

from datagen.dataset.encoder_identity import encoder_name
from datagen.dataset.reader import Dataset
from models import checkpoint
from models.leakage_counts import LeakageCounts
from models.metrics import Interval
from models.regressor import Regressor
from train.config import TrainSettings
from train.data.datamodule import ImageDataModule
from train.fit.module import Training
from train.scale.devices import is_rank_zero


class Saver:
    """Write checkpoints: `Saver(…)(module, "best")` writes `<out>/best`. Every rank calls it; rank 0 writes.

    `leakage`, the overlap of each validation set with the training data, is stored with the score.
    """

    def __init__(
        self, cfg: TrainSettings, datasets: list[Dataset], data: ImageDataModule, leakage: Mapping[str, LeakageCounts]
    ) -> None:
        self._cfg, self._datasets, self._data, self._leakage = cfg, datasets, data, leakage
        self._plain: Regressor | None = None
        self._extras: tuple[torch.Tensor, list[torch.Tensor]] | None = None

    def __call__(self, module: Training, name: str) -> None:
        state = module.export_state()
        if not is_rank_zero():
            return
        with torch.inference_mode(False):  # validation may run in inference mode, whose tensors cannot be updated later
            plain = self._plain = self._plain or checkpoint.rebuild(module.model.description())
            plain.load_state_dict(state)
        self.write(plain.eval(), name, module.score, module.global_step, self._data.steps)

    def write(self, plain: Regressor, name: str, score: Interval | None, step: int, steps: int) -> None:
        """Write `<out>/<name>` from a regressor on the CPU, trained for `step` of `steps`."""
        if self._extras is None:
            self._extras = self._data.images.mean_target(self._data.train_rows), self._probes()
        facts = {
            "encoder": encoder_name(self._cfg.encoder),
            "encoder_identity": self._datasets[0].encoder_identity,
            "dataset": [
                {"path": str(dataset.root), "sha256": dataset.fingerprint(), "splits": dataset.splits}
                for dataset in self._datasets
            ],
            "score": None if score is None else {**score._asdict(), **self._score_facts()},
            "step": step,
            "steps": steps,
            "weights": str(self._cfg.init_from or self._cfg.model.weights),
            "versions": {"torch": torch.__version__},
        }
        checkpoint.save(self._cfg.out / name, plain, *self._extras, facts)

    def _score_facts(self) -> dict[str, Any]:
        """Number of images of the first validation set, and their overlap with training."""
        leakage = self._leakage.get(self._data.val_names[0])
        return {"images": len(self._data.val_sets[0]), "leakage": None if leakage is None else leakage.to_json()}

    def _probes(self) -> list[torch.Tensor]:
        rows = self._data.val_rows if len(self._data.val_rows) else self._data.train_rows
        decoded = map(self._data.images.decoded_or_reason, rows.tolist())
        return list(itertools.islice((image for image in decoded if not isinstance(image, str)), checkpoint.PROBES))
