"""CLIP Interrogator on a tiny CLIP: against its rules done slowly by hand, and against the package's own code."""

import itertools
import json
import shutil
import sys
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from core.errors import UserError
from models.baselines.clip import CONFIG, WEIGHTS, Clip
from models.baselines.interrogator import LISTS, ClipInterrogator, Mode, nearest
from models.embedder import CaptionEmbedder
from tests import tiny_captioners

CAPTIONS = [
    "a cat on a mat",
    "",
    "an oil painting of two boats, in fog",
    "a photo of “naïve” café & bar",
    "a painting of a man with a snake skin on his head" + " and a snake skin on his head" * 5,  # all but fills CLIP
]
MODES: tuple[Mode, ...] = ("fast", "classic", "best")


class Told:
    """A captioner that knows the images: their first value says which they are."""

    def caption(self, images: list[torch.Tensor]) -> list[str]:
        return [CAPTIONS[int(image[0, 0, 0])] for image in images]

    def identity(self) -> dict[str, Any]:
        return {"captions": CAPTIONS}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_captioners.clip(tmp_path_factory.mktemp("clip") / "tiny")


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few of the package's terms, and some that a caption begins with, doubled, blank or not ASCII."""
    pytest.importorskip("clip_interrogator", reason="the word lists are in the extra captioners")
    return tiny_captioners.words(tmp_path_factory.mktemp("words") / "few")


@pytest.fixture(scope="module")
def images() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = [torch.randint(0, 256, (3, 30 + 9 * i, 47), dtype=torch.uint8, generator=generator) for i in range(5)]
    for i, image in enumerate(made):
        image[0, 0, 0] = i
    return made


class Slow:
    """The rules by hand: open_clip's own functions on whole texts, plain lists."""

    def __init__(self, folder: Path, words: Path) -> None:
        name = f"local-dir:{folder}"
        made: Any = open_clip.create_model_and_transforms(name)
        self.model, self.preprocess = made[0].eval(), made[2]
        self.tokenizer = open_clip.get_tokenizer(name)
        artists, flavors, mediums, movements = ((words / f"{name}.txt").read_text().split("\n")[:-1] for name in LISTS)
        sites = "Artstation,behance,cg society,cgsociety,deviantart,dribble,flickr,instagram,pexels,pinterest,pixabay"
        sites += ",pixiv,polycount,reddit,shutterstock,tumblr,unsplash,zbrush central"
        self.tables = {
            "artists": [f"by {a}" for a in artists] + [f"inspired by {a}" for a in artists],
            "flavors": flavors,
            "mediums": mediums,
            "movements": movements,
            "sites": [
                *sites.split(","),
                *(f"trending on {site}" for site in sites.split(",")),
                *(f"featured on {site}" for site in sites.split(",")),
                *(f"{site} contest winner" for site in sites.split(",")),
            ],
        }
        self.vectors: dict[str, np.ndarray[Any, Any]] = {}

    def near(self, z: np.ndarray[Any, Any], text: str, half: bool = False) -> float:
        vector = self.vectors[text]
        return float(z @ (vector.astype(np.float16).astype(np.float32) if half else vector))

    def encode(self, texts: Sequence[str]) -> None:
        new = [text for text in texts if text not in self.vectors]
        if new:
            with torch.no_grad():
                found_nD = self.model.encode_text(self.tokenizer(new)).numpy()
            self.vectors |= dict(zip(new, found_nD / np.linalg.norm(found_nD, axis=1, keepdims=True), strict=True))

    def top(self, z: np.ndarray[Any, Any], terms: Sequence[str], count: int) -> list[str]:
        self.encode(terms)
        return sorted(terms, key=lambda term: -self.near(z, term, half=True))[:count]

    def full(self, text: str) -> bool:
        return bool(self.tokenizer([text])[0, -1] != 0)

    def fit(self, prompt: str) -> str:
        parts = prompt.split(", ")
        kept = parts[0]
        for part in parts[1:]:
            if self.full(kept + part):
                return kept
            kept += ", " + part
        return kept

    def prompt(self, image: torch.Tensor, caption: str, mode: str) -> str:
        with torch.no_grad():
            pil_image = self.preprocess(Image.fromarray(image.permute(1, 2, 0).numpy()))
            z = self.model.encode_image(pil_image[None])[0].numpy()
        z /= np.linalg.norm(z)
        every = [term for terms in self.tables.values() for term in terms]
        comma = ", " if caption else ""
        fast = self.fit(caption + comma + ", ".join(self.top(z, every, 32)))
        if mode == "fast":
            return fast
        medium, artist, site, movement = (
            self.top(z, self.tables[kind], 1)[0] for kind in ("mediums", "artists", "sites", "movements")
        )
        flavors = self.top(z, self.tables["flavors"], 32 if mode == "best" else 3)
        begin = caption if caption.startswith(medium) else f"{caption}{comma}{medium}"
        classic = self.fit(f"{begin} {artist}, {site}, {movement}, {', '.join(flavors)}")
        if mode == "classic":
            return classic
        tries = [caption, classic, fast, self.chain(z, caption, self.top(z, every, 2048))]
        self.encode(tries)
        return max((t for t in tries if t), key=lambda text: self.near(z, text))

    def chain(self, z: np.ndarray[Any, Any], prompt: str, terms: list[str]) -> str:
        terms = list(dict.fromkeys(terms))
        if not prompt:
            prompt = max(terms, key=lambda term: self.near(z, term))
            terms.remove(prompt)
        path = [prompt]
        for step in range(32):
            self.encode([path[-1], *(f"{path[-1]}, {term}" for term in terms)])
            term = max(terms, key=lambda term: self.near(z, f"{path[-1]}, {term}"))
            longer = f"{path[-1]}, {term}"
            if step >= 8 and self.near(z, longer) <= self.near(z, path[-1]):
                break
            path.append(longer)
            if self.full(longer):
                break
            terms.remove(term)
        return max(path, key=lambda text: self.near(z, text))


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_each_mode_equals_a_reference_implementation(
    tiny: Path, words: Path, images: list[torch.Tensor], mode: Mode, tmp_path: Path
) -> None:
    slow = Slow(tiny, words)
    expected = [slow.prompt(image, caption, mode) for image, caption in zip(images, CAPTIONS, strict=True)]
    found = ClipInterrogator(str(tiny), Told(), mode=mode, words=words, cache=tmp_path).caption(images)
    assert found == expected
    assert len(set(found)) == len(images)


class Ordered:
    """In place of the package's set, whose order is another in each process."""

    def __init__(self, items: Sequence[str]) -> None:
        self._items = dict.fromkeys(items)

    def __iter__(self) -> Any:
        return iter(self._items)

    def remove(self, item: str) -> None:
        del self._items[item]


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_each_mode_equals_the_package(
    tiny: Path, words: Path, images: list[torch.Tensor], mode: Mode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from clip_interrogator import clip_interrogator as package

    monkeypatch.setattr(package, "set", Ordered, raising=False)
    config: Any = package.Config(
        clip_model_name="tiny/none",
        caption_model_name=None,
        cache_path=str(tmp_path / "package"),
        download_cache=False,
        data_path=str(words),
        device="cpu",
        quiet=True,
    )
    made: Any = open_clip.create_model_and_transforms(f"local-dir:{tiny}")
    config.clip_model, config.clip_preprocess = made[0].eval(), made[2]
    config.caption_model = torch.nn.Identity()
    shown = [(i, c) for i, c in zip(images, CAPTIONS, strict=True) if c]  # it cannot be told that a caption is empty
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it calls torch's functions of old
        theirs = package.Interrogator(config)
        ask = {"fast": theirs.interrogate_fast, "classic": theirs.interrogate_classic, "best": theirs.interrogate}[mode]
        pil_images = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image, _ in shown]
        expected = [ask(pil_image, caption=caption) for pil_image, (_, caption) in zip(pil_images, shown, strict=True)]
    ours = ClipInterrogator(str(tiny), Told(), mode=mode, words=words, cache=tmp_path)
    assert ours.caption([image for image, _ in shown]) == expected


def test_nearest_terms_of_long_lists_equal_the_package() -> None:
    package = pytest.importorskip("clip_interrogator.clip_interrogator", reason="it is in the extra captioners")
    vectors_nD = torch.nn.functional.normalize(torch.randn(1000, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    table = package.LabelTable.__new__(package.LabelTable)
    table.config, table.device, table.labels = package.Config(quiet=True), "cpu", [*range(1000)]
    table.embeds = list(vectors_nD.numpy())
    for part, count in ((64, 7), (64, 64), (100, 3), (1000, 20), (5000, 1000)):
        table.chunk_size = part
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = table.rank(vectors_nD[:1], count)
        assert nearest(vectors_nD @ vectors_nD[0], count, part) == expected
    assert nearest(torch.tensor([0.5, 0.7, 0.5, 0.7]), 3) == [1, 3, 0], "of equal ones the first comes first"


def test_all_terms_of_the_package_are_used(tiny: Path, tmp_path: Path) -> None:
    """Without importing the package."""
    pytest.importorskip("clip_interrogator", reason="the word lists are in the extra captioners")
    from clip_interrogator import clip_interrogator as package

    interrogator = ClipInterrogator(str(tiny), Told(), cache=tmp_path)
    read = {name: package.load_list(package.Config().data_path, f"{name}.txt") for name in LISTS}
    assert sum(len(terms) for terms in read.values()) > 100_000
    blank = sum(not term for terms in read.values() for term in terms)
    assert len(interrogator._words) == sum(map(len, read.values())) + len(read["artists"]) + 4 * 18 - blank
    assert not any(tmp_path.iterdir()), "nothing is computed before an image asks for it"


@pytest.mark.slow
def test_prompt_does_not_depend_on_the_batch(
    tiny: Path, words: Path, images: list[torch.Tensor], tmp_path: Path
) -> None:
    interrogator = ClipInterrogator(str(tiny), Told(), cache=tmp_path, mode="best", words=words)
    assert [interrogator.caption([image])[0] for image in images[2:4]] == interrogator.caption(images[2:4])
    assert interrogator.caption([]) == []


def test_text_vectors_equal_open_clip(tiny: Path, words: Path) -> None:
    model: Any = open_clip.create_model(f"local-dir:{tiny}").eval()
    tokenizer = open_clip.get_tokenizer(f"local-dir:{tiny}")
    flavors = (words / "flavors.txt").read_text(encoding="utf-8").split("\n")
    texts = [
        *flavors,
        *(f"a man, {a}, by {b}" for a, b in itertools.pairwise(flavors)),
        ", ".join(flavors),
        *("", ", ", "a,b , c", "don't, won't!,", "x" * 400, "<start_of_text>, a", "a &amp; b, c", "one,  two,\tthree"),
    ]
    clip = Clip(str(tiny))
    torch.testing.assert_close(clip._tokenize(texts), tokenizer(texts), rtol=0, atol=0)
    with torch.no_grad():
        expected = model.encode_text(tokenizer(texts), normalize=True)
    torch.testing.assert_close(clip.texts(texts), expected, rtol=0, atol=2e-6)
    assert [clip.fills(text) for text in texts] == [bool(row[-1] != 0) for row in tokenizer(texts)]


def test_image_vectors_equal_open_clip(tiny: Path, images: list[torch.Tensor]) -> None:
    made: Any = open_clip.create_model_and_transforms(f"local-dir:{tiny}")
    clip, model, preprocess = Clip(str(tiny)), made[0].eval(), made[2]
    for image in images:
        pixels = preprocess(Image.fromarray(image.permute(1, 2, 0).numpy()))
        with torch.no_grad():
            expected = model.encode_image(pixels[None], normalize=True)[0]
        torch.testing.assert_close(clip.embed_image(image), expected)
    strip = torch.zeros(3, 1, 100_000, dtype=torch.uint8)
    strip[:, :, 49_990:50_010] = 255
    assert torch.isfinite(clip.embed_image(strip)).all()


@pytest.mark.slow
def test_term_vectors_are_cached(
    tiny: Path, words: Path, images: list[torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    encode = Clip.texts

    def counted(self: Clip, texts: Sequence[str]) -> torch.Tensor:
        asked.append(len(texts))
        return encode(self, texts)

    monkeypatch.setattr(Clip, "texts", counted)

    def told(folder: Path, mode: Mode = "fast", clip: Path = tiny) -> list[str]:
        asked.clear()
        return ClipInterrogator(str(clip), Told(), mode=mode, words=words, cache=folder).caption(images)

    first = told(tmp_path)
    assert asked
    assert told(tmp_path) == first
    assert not asked, "fast reads the vectors of its words"
    told(tmp_path, "classic")
    assert not asked, "the modes share them"
    (file,) = tmp_path.glob("*/vectors.npy")
    for damage in (b"", file.read_bytes()[:-100], b"no vectors"):
        file.write_bytes(damage)
        assert told(tmp_path) == first
        assert asked, "what is damaged is made anew"
    told(tmp_path, clip=tiny_captioners.clip(tmp_path / "other", seed=1))
    assert asked, "another CLIP has other vectors"
    more = shutil.copytree(words, tmp_path / "more")
    (more / "movements.txt").write_text("cubism\n")
    asked.clear()
    ClipInterrogator(str(tiny), Told(), mode="fast", words=more, cache=tmp_path).caption(images)
    assert asked, "other words too"


def test_identity_covers_everything_that_prompts_depend_on(tiny: Path, words: Path, tmp_path: Path) -> None:
    def identity(clip: Path = tiny, mode: Mode = "best", words: Path = words) -> str:
        return json.dumps(
            ClipInterrogator(str(clip), Told(), cache=tmp_path, mode=mode, words=words).identity(), sort_keys=True
        )

    copied = shutil.copytree(tiny, tmp_path / "copied")
    assert identity() == identity(copied), "a folder's name does not count"
    assert str(CAPTIONS[0]) in identity()
    other = shutil.copytree(words, tmp_path / "words")
    (other / "mediums.txt").write_text("a photo\n")
    tensors = load_file(copied / WEIGHTS)
    tensors["ln_final.bias"][0] += 1
    save_file(tensors, copied / WEIGHTS)
    different = [identity(), identity(mode="fast"), identity(words=other), identity(copied)]
    assert len(set(different)) == 4


def test_caption_embedder_encodes_the_prompt(
    tiny: Path, words: Path, images: list[torch.Tensor], tmp_path: Path
) -> None:
    def encode(texts: list[str]) -> np.ndarray[Any, np.dtype[np.float32]]:
        return np.array([[len(text), 1] for text in texts], np.float32)

    interrogator = ClipInterrogator(str(tiny), Told(), cache=tmp_path, mode="classic", words=words)
    z_BE, texts = CaptionEmbedder(interrogator, encode).describe(images)
    assert texts == interrogator.caption(images)
    np.testing.assert_array_equal(z_BE, encode(texts))


@pytest.mark.parametrize(
    ("name", "repository", "quick"),
    [
        ("ViT-L-14/openai", "timm/vit_large_patch14_clip_224.openai", True),
        ("ViT-H-14/laion2b_s32b_b79k", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K", False),
    ],
)
def test_default_names_exist_on_the_hub(
    name: str, repository: str, quick: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))  # an empty cache
    clip = Clip(name)
    assert clip._tag is not None
    assert (clip._tag.repository, clip._tag.quick_gelu) == (repository, quick)
    with pytest.raises(UserError, match=repository) as caught:
        clip.identity()
    assert "folder" in str(caught.value)


@pytest.mark.slow
def test_cached_hub_weights_use_their_activation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, images: list[torch.Tensor]
) -> None:
    """open_clip's list tells what the weights of a tag were trained with; its model of that name has another."""
    commit = "c0ffee" * 6 + "c0de"
    cache = tmp_path / "models--owner--tiny"
    snapshot = tiny_captioners.clip(cache / "snapshots" / commit)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    held = json.loads((snapshot / CONFIG).read_text())
    about = {**held["preprocess_cfg"], "hf_hub": "owner/tiny/", "quick_gelu": True}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tiny-clip", {"hub": about})
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny-clip", held["model_cfg"])
    clip = Clip("tiny-clip/hub")
    assert clip.identity() == {
        "clip": "tiny-clip/hub",
        "repository": "owner/tiny",
        "commit": commit,
        "precision": "fp32",
        "open_clip_torch": version("open_clip_torch"),
    }
    assert Clip("open_clip:tiny-clip/hub").identity() == clip.identity()
    expected = Clip(str(tiny_captioners.clip(tmp_path / "quick", quick_gelu=True)))
    torch.testing.assert_close(clip.texts(CAPTIONS), expected.texts(CAPTIONS), rtol=0, atol=0)
    torch.testing.assert_close(clip.embed_image(images[0]), expected.embed_image(images[0]), rtol=0, atol=0)
    assert not torch.allclose(clip.texts(CAPTIONS), Clip(str(snapshot)).texts(CAPTIONS), atol=1e-4)


def test_invalid_settings_are_refused(tiny: Path, words: Path, tmp_path: Path) -> None:
    def refused(*parts: str, clip: str = str(tiny), mode: Any = "best", words: Path | None = words) -> None:
        with pytest.raises(UserError) as caught:
            ClipInterrogator(clip, Told(), cache=tmp_path, mode=mode, words=words)
        for part in parts:
            assert part in str(caught.value)

    refused("mode=bets", "fast, classic, best", mode="bets")
    refused("artists.txt, flavors.txt, mediums.txt, movements.txt", words=tmp_path)
    refused("ViT-L-14", "near: ", clip="ViT-L14/openai")
    refused("no weights 'opnai'", "openai", clip="ViT-L-14/opnai")
    refused("text tower is not CLIP's", "ViT-L-14/openai", clip="ViT-B-16-SigLIP/webli")
    refused("a pickle", "folder", clip="ViTamin-S/datacomp1b")
    refused("mode=x", "lacks artists.txt", "no/such", clip="no/such", mode="x", words=tmp_path)
    empty = shutil.copytree(words, tmp_path / "empty")
    (empty / "mediums.txt").write_text("\n \n")
    refused("mediums.txt", "hold no term", words=empty)
    pickled = shutil.copytree(tiny, tmp_path / "pickled")
    (pickled / WEIGHTS).rename(pickled / "open_clip_pytorch_model.bin")
    refused(f"lacks {WEIGHTS}", clip=str(pickled))
    (pickled / WEIGHTS).write_bytes(b"")
    for text, told in {
        "{": "is not JSON",
        "[]": "does not describe a CLIP",
        '{"model_cfg": {"embed_dim": 3}}': "does not describe a CLIP",
    }.items():
        (pickled / CONFIG).write_text(text)
        refused(told, CONFIG, clip=str(pickled))


def test_errors_name_the_setting(tiny: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny, tmp_path / "clip")
    (folder / WEIGHTS).write_bytes(b"")
    names = ("ViT-L14/openai", "open_clip:ViT-L-14/opnai", "ViTamin-S/datacomp1b", "ViT-B-16-SigLIP/webli")
    asked = [lambda name=name: Clip(name, key="knn.backbone") for name in names]
    for ask in (*asked, lambda: Clip(f"open_clip:local-dir:{folder}", key="knn.backbone").texts(["a"])):
        with pytest.raises(UserError, match=r"^knn\.backbone=") as caught:
            ask()
        assert "captions" not in str(caught.value)
    (folder / CONFIG).write_text("[]")
    with pytest.raises(UserError, match=rf"^knn\.backbone={folder}: .* does not describe a CLIP"):
        Clip(f"local-dir:{folder}", key="knn.backbone")


def test_damaged_weights_are_refused(tiny: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny, tmp_path / "clip")
    (folder / WEIGHTS).write_bytes((tiny / WEIGHTS).read_bytes()[:-1000])
    with pytest.raises(UserError, match="cannot be loaded"):
        Clip(str(folder)).texts(["a"])
    save_file({"a": torch.zeros(1)}, folder / WEIGHTS)
    with pytest.raises(UserError, match="cannot be loaded"):
        Clip(str(folder)).texts(["a"])


def test_missing_package_names_its_extra(
    tiny: Path, words: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "clip_interrogator", None)
    with pytest.raises(UserError, match=r"im2emb\[captioners\]"):
        ClipInterrogator(str(tiny), Told(), cache=tmp_path)
    assert ClipInterrogator(str(tiny), Told(), cache=tmp_path, words=words).identity(), "other words do without it"


@pytest.mark.gpu
def test_fp16_vectors_on_a_gpu_are_close(tiny: Path, words: Path, images: list[torch.Tensor], tmp_path: Path) -> None:
    half, whole = Clip(str(tiny), "cuda"), Clip(str(tiny))
    assert (half.identity()["precision"], whole.identity()["precision"]) == ("fp16", "fp32")
    torch.testing.assert_close(half.texts(CAPTIONS).cpu(), whole.texts(CAPTIONS), rtol=0, atol=5e-3)
    torch.testing.assert_close(half.embed_image(images[0]).cpu(), whole.embed_image(images[0]), rtol=0, atol=5e-3)
    interrogator = ClipInterrogator(str(tiny), Told(), "cuda", cache=tmp_path, words=words)
    assert interrogator.caption(images) == interrogator.caption(images)
