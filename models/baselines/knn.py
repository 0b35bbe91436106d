"""Nearest neighbours: the mean of the targets of the k nearest of a bank, weighted by similarity.

Knn      the bank's images are like the image: features of one frozen backbone
ClipKnn  the bank's prompts fit the image: CLIP's text tower for them, its image tower for the image

B images, n images or prompts of the bank, D feature width, J width of CLIP's joint space, E target width.
"""

import functools
import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from core.cache import stored
from core.errors import UserError
from models.baselines.clip import Clip
from models.regressor import Regressor
from models.retrieval.vector_index import Floats, Index, Prompts, Rows, about, kept, weighted_mean
from models.runtime.preprocess import fit

_FORMAT = 1  # of the features that are kept
_TINY = 1e-12  # of a length: what is shorter stays as good as zero, and is refused


class Knn:
    """
    Args:
        model: whose backbone gives the features; its head is not used.
        features_nD: of the bank's images; they are copied once.
        target_nE: of the bank's images; fp32 is not copied.
        k: neighbours.
        power: of the similarities, which are cosines around the mean feature; the higher, the more the nearest counts.
        exact: how the bank is searched, as in `models.retrieval.vector_index.Index`.

    Raises:
        UserError: a feature is not finite, or is the mean of all.
    """

    def __init__(
        self,
        model: Regressor,
        features_nD: torch.Tensor,
        target_nE: torch.Tensor,
        k: int = 20,
        *,
        power: float = 1.0,
        exact: bool | None = None,
    ) -> None:
        self._model = model.eval()
        self._centre_D = features_nD.float().mean(0)  # pooled features share a large mean, which would hide the rest
        unit_nD = features_nD.float() - self._centre_D
        # in place, for each copy of a large bank is gigabytes
        unit_nD /= torch.linalg.vector_norm(unit_nD, dim=-1, keepdim=True).clamp_min_(_TINY)
        self._index = Index(unit_nD.numpy(), exact=exact)
        self._target_nE = target_nE.float().numpy()
        self._k, self._power = k, power

    @torch.inference_mode()
    def embed(self, images: list[torch.Tensor]) -> torch.Tensor:
        image_BCHW = torch.stack([fit(image, self._model.spec.preprocessing) for image in images])
        features_BD = self._model.features(image_BCHW.to(self._model.device)).float().cpu()
        return self.from_features(features_BD)

    def from_features(self, features_BD: torch.Tensor) -> torch.Tensor:
        """Unit vectors z_BE of images with these features.

        Raises:
            UserError: a feature is not finite, of another width, or is the mean of the bank's.
        """
        if features_BD.shape[1:] != self._centre_D.shape:
            raise UserError(f"features {list(features_BD.shape)}, but the bank's are {len(self._centre_D)} wide")
        cosine_Bk, row_Bk = self._index.search((features_BD.float() - self._centre_D).numpy(), self._k)
        return torch.from_numpy(weighted_mean(self._target_nE, cosine_Bk, row_Bk, self._power))


class ClipKnn:
    """Nothing is loaded before the first image; the prompts' CLIP features are computed once and kept.

    Args:
        clip: both towers of a model.
        bank: prompts with their target vectors.
        cache: a folder, such as the one of all that is cached.
        k: neighbours.
        power: of the cosines between image and prompts, of which CLIP's differ by little: a high one tells near from
            far.
        exact: how the bank is searched, as in `models.retrieval.vector_index.Index`.
    """

    def __init__(
        self, clip: Clip, bank: Prompts, cache: Path, k: int = 20, *, power: float = 1.0, exact: bool | None = None
    ) -> None:
        self._clip, self._bank, self._cache = clip, bank, cache
        self._k, self._power, self._exact = k, power, exact

    def identity(self) -> dict[str, Any]:
        """What the vectors depend on, with no model loaded.

        Raises:
            UserError: as `Clip.identity`.
        """
        return {
            "clip": self._clip.identity(),
            "bank": self._bank.identity(),
            "index": about(len(self._bank), self._exact),
            "k": self._k,
            "power": self._power,
        }

    def embed(self, images: list[torch.Tensor]) -> torch.Tensor:
        """Decoded uint8 images [3, H, W] of any size → unit z_BE, fp32, on the CPU.

        Raises:
            UserError: the model cannot be loaded, or the disk is full.
        """
        return self.describe(images)[0]

    def describe(self, images: list[torch.Tensor]) -> tuple[torch.Tensor, list[str]]:
        """The vectors z_BE, and for each image the prompt that fits it best."""
        cosine_Bk, row_Bk = self._near(images)
        z_BE = weighted_mean(self._bank.vectors, cosine_Bk, row_Bk, self._power)
        return torch.from_numpy(z_BE), self._bank.texts(row_Bk[:, 0])

    def _near(self, images: list[torch.Tensor]) -> tuple[Floats, Rows]:
        image_BJ = torch.stack([self._clip.embed_image(image) for image in images])
        return self._index.search(image_BJ.cpu().numpy(), self._k)

    @functools.cached_property
    def _index(self) -> Index:
        """Over the CLIP features of the bank's prompts [n, J]."""
        made_of = {"format": _FORMAT, "clip": self._clip.identity(), "prompts": self._bank.identity()["prompts"]}
        named = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:16]
        folder = self._cache / "clip" / named
        text_nJ = stored(folder, len(self._bank), self._features, "prompt", "CLIP")
        return kept(folder, text_nJ, exact=self._exact)

    def _features(self, start: int, stop: int) -> Floats:
        return self._clip.texts(self._bank.texts(range(start, stop))).cpu().numpy()
