"""The baselines, against the same thing done by hand with scikit-learn and open_clip."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from sklearn.neighbors import NearestNeighbors
from torch.utils._python_dispatch import TorchDispatchMode

from core import cache
from core.errors import UserError
from models.baselines.clip import CONFIG, WEIGHTS, Clip
from models.baselines.knn import ClipKnn, Knn
from models.baselines.mean import Mean
from models.regressor import Regressor, make
from models.retrieval.vector_index import index_identity
from models.runtime.preprocess import resize_and_crop

N, E, K = 40, 6, 5
CLIP: dict[str, Any] = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}
PREPROCESS = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.25], "interpolation": "bicubic", "resize_mode": "shortest"}


@pytest.fixture(scope="module")
def model() -> Regressor:
    return make("test_vit", "random", 32, E).eval()


def unit(rows: int, width: int, seed: int) -> torch.Tensor:
    drawn = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(drawn + 0.2, dim=-1)


def test_mean_is_the_direction_of_the_mean_target() -> None:
    targets_nE = unit(N, E, 0)
    found = Mean(targets_nE).embed([torch.zeros(3, 9, 9, dtype=torch.uint8)] * 3)
    mean_E = targets_nE.numpy().mean(0)
    np.testing.assert_allclose(found, np.tile(mean_E / np.linalg.norm(mean_E), (3, 1)), atol=1e-6)
    scores = [(unit(1, E, seed) @ targets_nE.T).mean().item() for seed in range(1, 50)]
    assert (found[:1] @ targets_nE.T).mean() > max(scores), "no constant vector scores higher"


def test_knn_weights_neighbours_by_similarity(model: Regressor) -> None:
    bank_nD, targets_nE = unit(N, 64, 0) + 3, unit(N, E, 1)
    query_BD = unit(9, 64, 2) + 3
    centre_D = bank_nD.numpy().mean(0)
    near = NearestNeighbors(n_neighbors=K, metric="cosine").fit(bank_nD.numpy() - centre_D)
    distance_Bk, row_Bk = near.kneighbors(query_BD.numpy() - centre_D)
    expected = (np.maximum(1 - distance_Bk, 0)[..., None] * targets_nE.numpy()[row_Bk]).sum(1)
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    found = Knn(model, bank_nD, targets_nE, K).from_features(query_BD)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    cubed = (np.maximum(1 - distance_Bk, 0)[..., None] ** 3 * targets_nE.numpy()[row_Bk]).sum(1)
    cubed /= np.linalg.norm(cubed, axis=1, keepdims=True)
    np.testing.assert_allclose(Knn(model, bank_nD, targets_nE, K, power=3).from_features(query_BD), cubed, atol=1e-5)
    near = Knn(model, bank_nD, targets_nE, K, exact=False).from_features(query_BD)
    np.testing.assert_allclose(near, expected, atol=1e-5, err_msg="of so few, all cells are looked at")


def test_knn_copies_features_once(model: Regressor) -> None:
    """Of 400,000 images each copy is gigabytes."""
    bank_nD, targets_nE = unit(4000, 64, 0), unit(4000, E, 1)
    before_nD, made = bank_nD.clone(), set()

    class Note(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.numel() >= bank_nD.numel():
                made.add(out.untyped_storage().data_ptr())
            return out

    with Note():
        knn = Knn(model, bank_nD, targets_nE, K)
    assert len(made - {bank_nD.untyped_storage().data_ptr()}) == 1
    assert bank_nD.equal(before_nD)
    assert np.shares_memory(knn._target_nE, targets_nE.numpy())


def test_knn_embeds_by_backbone_features(model: Regressor) -> None:
    generator = torch.Generator().manual_seed(0)
    images = [torch.randint(0, 256, (3, 32 + i, 40), dtype=torch.uint8, generator=generator) for i in range(8)]
    with torch.inference_mode():
        features_nD = model.features(
            torch.stack([resize_and_crop(image, model.spec.preprocessing) for image in images])
        )
    knn = Knn(model, features_nD, unit(8, E, 1), k=1)
    torch.testing.assert_close(knn.embed(images), unit(8, E, 1), msg="each image's nearest is itself")
    assert Knn(model, features_nD, unit(8, E, 1), k=99).embed(images[:2]).shape == (2, E), "a bank smaller than k"


class Prompts:
    """Prompts with random target vectors."""

    def __init__(self, count: int = N) -> None:
        self._texts = [f"a {('red', 'blue', 'old', 'tall')[i % 4]} thing, number {i}" for i in range(count)]
        self.vectors = unit(count, E, 1).numpy()

    def __len__(self) -> int:
        return len(self._texts)

    def texts(self, rows: Any) -> list[str]:
        return [self._texts[row] for row in rows]

    def identity(self) -> dict[str, Any]:
        return {"prompts": self._texts}


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CLIP, as open_clip keeps one in a folder."""
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    tensors = open_clip.CLIP(**CLIP).state_dict()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps({"model_cfg": CLIP, "preprocess_cfg": PREPROCESS}))
    return folder


@pytest.fixture(scope="module")
def images() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 256, (3, 40 + 9 * i, 64), dtype=torch.uint8, generator=generator) for i in range(4)]


def clip_knn(clip: Clip, prompts: Prompts, cache: Path, k: int, **keywords: Any) -> ClipKnn:
    return ClipKnn(clip, prompts.texts, lambda: prompts.vectors, len(prompts), prompts.identity(), cache, k, **keywords)


def by_hand(folder: Path, images: list[torch.Tensor], bank: Prompts, power: float) -> tuple[np.ndarray, list[str]]:
    """With open_clip's own preprocess and tokenizer, and scikit-learn's neighbours."""
    made: Any = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    clip, _, preprocess = made
    pil_images = [preprocess(Image.fromarray(image.permute(1, 2, 0).numpy())) for image in images]
    with torch.inference_mode():
        image_BJ = clip.eval().encode_image(torch.stack(pil_images))
        text_nJ = clip.encode_text(open_clip.get_tokenizer(f"local-dir:{folder}")(bank.texts(range(len(bank)))))
    near = NearestNeighbors(n_neighbors=K, metric="cosine").fit(text_nJ.double().numpy())
    distance_Bk, row_Bk = near.kneighbors(image_BJ.double().numpy())
    z_BE = (np.maximum(1 - distance_Bk, 0)[..., None] ** power * bank.vectors[row_Bk]).sum(1)
    return z_BE / np.linalg.norm(z_BE, axis=1, keepdims=True), bank.texts(row_Bk[:, 0])


@pytest.mark.parametrize("power", [1, 4])
def test_clip_knn_finds_matching_prompts(
    clip_folder: Path, images: list[torch.Tensor], tmp_path: Path, power: float
) -> None:
    knn = clip_knn(Clip(str(clip_folder)), Prompts(), tmp_path, K, power=power)
    z_BE, texts = knn.describe(images)
    wanted, nearest = by_hand(clip_folder, images, Prompts(), power)
    np.testing.assert_allclose(z_BE, wanted, atol=1e-4)
    assert texts == nearest
    torch.testing.assert_close(knn.embed(images), z_BE, rtol=0, atol=0)
    torch.testing.assert_close(knn.embed(images[:1]), z_BE[:1], rtol=0, atol=1e-6)


@pytest.mark.slow
def test_prompt_features_are_cached_in_parts(
    clip_folder: Path, images: list[torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "PART", 16)
    asked: list[int] = []
    encode = Clip.texts

    def stopping(self: Clip, texts: Sequence[str]) -> torch.Tensor:
        asked.append(len(texts))
        if len(asked) == 2:
            raise KeyboardInterrupt
        return encode(self, texts)

    monkeypatch.setattr(Clip, "texts", stopping)
    with pytest.raises(KeyboardInterrupt):
        clip_knn(Clip(str(clip_folder)), Prompts(), tmp_path, K).embed(images)
    found = clip_knn(Clip(str(clip_folder)), Prompts(), tmp_path, K).embed(images)
    assert asked == [16, 16, 16, 8], "the first part is not encoded again"
    again = clip_knn(Clip(str(clip_folder)), Prompts(), tmp_path, K).embed(images)
    assert len(asked) == 4
    np.testing.assert_array_equal(again, found)
    np.testing.assert_allclose(found, by_hand(clip_folder, images, Prompts(), 1)[0], atol=1e-4)


def test_clip_knn_identity_loads_no_model(clip_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr(open_clip, "create_model", never)
    clip = Clip(str(clip_folder))
    made = [
        clip_knn(clip, Prompts(), tmp_path, K),
        clip_knn(clip, Prompts(9), tmp_path, K),
        clip_knn(clip, Prompts(), tmp_path, K + 1),
        clip_knn(clip, Prompts(), tmp_path, K, power=2),
        clip_knn(clip, Prompts(), tmp_path, K, exact=False),
    ]
    identities = {json.dumps(knn.identity(), sort_keys=True) for knn in made}
    assert len(identities) == len(made)
    assert json.dumps(clip_knn(clip, Prompts(), tmp_path / "x", K).identity(), sort_keys=True) in identities
    told = made[0].identity()
    assert told["clip"]["open_clip_torch"] == open_clip.__version__
    assert told["index"] == index_identity(N)
    assert made[-1].identity()["index"] == index_identity(N, exact=False)


def test_degenerate_features_are_refused(model: Regressor) -> None:
    with pytest.raises(UserError, match="8 of 8 vectors are zero or not finite, the first is row 0: of an index"):
        Knn(model, torch.ones(8, 64), unit(8, E, 1))
    bank_nD = unit(N, 64, 0)
    knn = Knn(model, bank_nD, unit(N, E, 1), K)
    with pytest.raises(UserError, match="1 of 2 vectors are zero or not finite, the first is row 1"):
        knn.from_features(torch.stack([bank_nD[0], torch.full((64,), torch.nan)]))
    with pytest.raises(UserError, match=r"features \[2, 32\], but those of the training images are 64 wide"):
        knn.from_features(unit(2, 64, 0)[:, :32])
