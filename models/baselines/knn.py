"""k nearest neighbours: the mean of the targets of the k nearest training images or prompts, weighted by similarity.

Knn      nearest training images, by features of one frozen backbone
ClipKnn  nearest prompts, by CLIP's text tower for the prompts and its image tower for the image

B images, n training images or prompts, D feature width, J width of CLIP's joint space, E target width.
"""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from core.cache import cached_rows
from core.chunk_cache import identity_hash
from core.errors import UserError
from models.baselines.clip import Clip
from models.regressor import Regressor
from models.retrieval.vector_index import Floats, Index, Rows, cached_index, index_identity, weighted_mean
from models.runtime.preprocess import resize_and_crop

_FORMAT = 1  # of the cached features
_TINY = 1e-12  # shortest length of a feature; shorter ones stay almost zero, and the index refuses them


class Knn:
    """k nearest training images by features of a frozen backbone, centred on their mean.

    Args:
        model: Regressor whose backbone gives the features; its head is not used.
        features_nD: Features of the training images; copied once.
        target_nE: Target vectors of the training images; fp32 is not copied.
        k: Number of neighbours.
        power: Exponent of the cosine similarities; the higher, the more the nearest counts.
        exact: Search mode, as in `models.retrieval.vector_index.Index`.

    Raises:
        UserError: A feature is not finite, or equals the mean of all.
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
        # pooled features share a large mean, which would dominate the cosine
        self._centre_D = features_nD.float().mean(0)
        unit_nD = features_nD.float() - self._centre_D
        # in place: a copy of a large training set takes gigabytes
        unit_nD /= torch.linalg.vector_norm(unit_nD, dim=-1, keepdim=True).clamp_min_(_TINY)
        self._index = Index(unit_nD.numpy(), exact=exact)
        self._target_nE = target_nE.float().numpy()
        self._k, self._power = k, power

    @torch.inference_mode()
    def embed(self, images: list[torch.Tensor]) -> torch.Tensor:
        image_BCHW = torch.stack([resize_and_crop(image, self._model.spec.preprocessing) for image in images])
        features_BD = self._model.features(image_BCHW.to(self._model.device)).float().cpu()
        return self.from_features(features_BD)

    def from_features(self, features_BD: torch.Tensor) -> torch.Tensor:
        """Embed images by their features, as unit vectors z_BE.

        Raises:
            UserError: A feature is not finite, of another width, or equals the mean of the training features.
        """
        if features_BD.shape[1:] != self._centre_D.shape:
            raise UserError(
                f"features {list(features_BD.shape)}, but those of the training images are {len(self._centre_D)} wide"
            )
        cosine_Bk, row_Bk = self._index.search((features_BD.float() - self._centre_D).numpy(), self._k)
        return torch.from_numpy(weighted_mean(self._target_nE, cosine_Bk, row_Bk, self._power))


class ClipKnn:
    """k nearest prompts by CLIP: the mean of the targets of the k prompts that fit an image best.

    Nothing is loaded before the first image; the CLIP features of the prompts are computed once and cached.

    Args:
        clip: Both towers of a CLIP model.
        texts: Returns the prompts of some rows of the prompt index.
        target_nE: Returns the target vectors of all prompts, fp32 and of unit length.
        count: Number of prompts, n.
        prompt_identity: What prompts and target vectors depend on, as plain JSON; its key `prompts` identifies the
            texts alone.
        cache: Folder for cached features.
        k: Number of neighbours.
        power: Exponent of the cosine similarities between image and prompts. CLIP's similarities differ by little; a
            high exponent separates near from far.
        exact: Search mode, as in `models.retrieval.vector_index.Index`.
    """

    def __init__(
        self,
        clip: Clip,
        texts: Callable[[Rows | range], list[str]],
        target_nE: Callable[[], Floats],
        count: int,
        prompt_identity: Mapping[str, Any],
        cache: Path,
        k: int = 20,
        *,
        power: float = 1.0,
        exact: bool | None = None,
    ) -> None:
        self._clip, self._texts, self._target_nE, self._count = clip, texts, target_nE, count
        self._prompt_identity, self._cache = dict(prompt_identity), cache
        self._k, self._power, self._exact = k, power, exact

    def identity(self) -> dict[str, Any]:
        """All that the vectors depend on, as plain JSON; no model is loaded. Errors as for `Clip.identity`."""
        return {
            "clip": self._clip.identity(),
            "bank": self._prompt_identity,
            "index": index_identity(self._count, self._exact),
            "k": self._k,
            "power": self._power,
        }

    def embed(self, images: list[torch.Tensor]) -> torch.Tensor:
        return self.describe(images)[0]

    def describe(self, images: list[torch.Tensor]) -> tuple[torch.Tensor, list[str]]:
        """Return the vectors z_BE, and for each image the prompt that fits it best.

        Raises:
            UserError: The model cannot be loaded, or the disk is full.
        """
        image_BJ = torch.stack([self._clip.embed_image(image) for image in images])
        cosine_Bk, row_Bk = self._index.search(image_BJ.cpu().numpy(), self._k)
        z_BE = weighted_mean(self._target_nE(), cosine_Bk, row_Bk, self._power)
        return torch.from_numpy(z_BE), self._texts(row_Bk[:, 0])

    @functools.cached_property
    def _index(self) -> Index:
        """Index over the CLIP features [n, J] of the prompts."""
        key = {"format": _FORMAT, "clip": self._clip.identity(), "prompts": self._prompt_identity["prompts"]}
        folder = self._cache / "clip" / identity_hash(key)
        text_nJ = cached_rows(folder, self._count, self._features, "prompt", "CLIP")
        return cached_index(folder, text_nJ, exact=self._exact)

    def _features(self, start: int, stop: int) -> Floats:
        return self._clip.texts(self._texts(range(start, stop))).cpu().numpy()
