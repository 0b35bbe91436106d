"""Nearest neighbours on frozen features: the similarity-weighted mean of the targets of the k nearest pictures.

B pictures, n pictures of the bank, D feature width, E target width.
"""

import torch
from torch.nn.functional import normalize

from models.preprocess import fit
from models.regressor import Regressor


class Knn:
    """
    Args:
        model: whose backbone gives the features; its head is not used.
        features_nD: of the bank's pictures.
        target_nE: of the bank's pictures.
        k: neighbours.
    """

    def __init__(self, model: Regressor, features_nD: torch.Tensor, target_nE: torch.Tensor, k: int = 20) -> None:
        self._model = model.eval()
        self._centre_D = features_nD.float().mean(0)  # pooled features share a large mean, which would hide the rest
        self._bank_nD = normalize(features_nD.float() - self._centre_D, dim=-1)
        self._target_nE = target_nE.float()
        self._k = min(k, len(features_nD))

    @torch.inference_mode()
    def embed(self, images: list[torch.Tensor]) -> torch.Tensor:
        image_BCHW = torch.stack([fit(image, self._model.spec.size) for image in images])
        features_BD = self._model.features(image_BCHW.to(self._model.device)).float().cpu()
        return self.from_features(features_BD)

    def from_features(self, features_BD: torch.Tensor) -> torch.Tensor:
        query_BD = normalize(features_BD.float() - self._centre_D, dim=-1)
        near_Bk, rows_Bk = (query_BD @ self._bank_nD.T).topk(self._k, dim=1)
        return normalize((near_Bk.clamp(min=0)[..., None] * self._target_nE[rows_Bk]).sum(1), dim=-1)
