"""The model card, read by the hub's own reader, and the metadata, as Kaggle's client checks it."""

import json
import re
from typing import Any

import pytest
from huggingface_hub import ModelCard

from core.errors import UserError
from models.export import model_card
from models.export.kaggle_metadata import dataset_metadata, metadata_problems
from models.export.model_card import CardDetails
from models.leakage_counts import LeakageCounts

NONE = LeakageCounts(810, 0, 0, 0, 0)
SCORE = {"mean": 0.68093, "low": 0.6733, "high": 0.6887, "images": 810, "leakage": NONE.to_json()}
DATASET = {"path": "/place/somebody/data/quickstart", "sha256": "64" * 32, "splits": {"train": 7190, "val": 810}}
SETTINGS = {
    "epochs": 3.0,
    "batch_size": 32,
    "seed": 7,
    "precision": "bf16",
    "fold": None,
    "init_from": "/place/somebody/checkpoints/first/best",
    "dataset": ["/place/somebody/data/quickstart"],
    "model": {
        "backbone": "vit_huge_patch14_clip_224.laion2b",
        "weights": "/place/somebody/weights.safetensors",
        "freeze": 14,
        "head": "wide",
        "head_width": 2048,
        "head_init": "ridge",
        "lora": {"blocks": 4, "rank": 16},
    },
    "loss": {"mse": 0.01, "contrastive": 0.0, "hard_fraction": 0.5},
    "optim": {"name": "adamw", "lr": 4e-5, "head_lr": 4e-4, "layer_decay": 0.9, "schedule": "cosine", "warmup": 500,
              "weight_decay": 0.01, "grad_clip_norm": 1.0, "ema": 0.9998},
    "data": {"crop": 0.9, "flip": True, "jitter": 0.1, "erase": 0.0},
}  # fmt: skip


def member(name: str, backbone: str, weight: float = 1.0, **facts: Any) -> dict[str, Any]:
    return {
        "name": name, "file": f"model-{name}.safetensors", "weight": weight, "flip": False, "sizes": [224],
        "backbone": backbone, "size": 224, "width": 1280, "mean": [0.5] * 3, "std": [0.5] * 3, "head": "linear",
        "head_width": 0, "facts": {"score": SCORE, "dataset": [DATASET], "step": 600, "steps": 672, **facts},
    }  # fmt: skip


def config(*members: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "format": 2, "kind": "bundle", "encoder": "all-MiniLM-L6-v2", "target_width": 384, "precision": "fp16",
        "members": list(members), "facts": {}, "graphs": {}, "versions": {"torch": "2.15.0", "timm": "1.0.31"}, **more,
    }  # fmt: skip


ONE = config(member("model", "vit_huge_patch14_clip_224.laion2b", weights="pretrained"))
TWO = config(
    member("a", "vit_huge_patch14_clip_224.laion2b", 0.75, weights="pretrained"),
    member("b", "tf_efficientnet_lite0", 0.25, weights="pretrained"),
    facts={
        "score": {"name": "ensemble", "mean": 0.7, "low": 0.69, "high": 0.71, "leakage": NONE.to_json()},
        "images": 1234,
        "folds": 5,
    },
)
GRAPHS = {
    "onnx": {"file": "graphs/model.onnx", "pictures": 500, "mean_distance": 4e-9, "max_distance": 3.4e-7},
    "openvino_int8": {
        "file": "graphs/openvino-int8.xml", "pictures": 500, "mean_distance": 0.0012, "max_distance": 0.0345,
    },
}  # fmt: skip
FILES = {"predict.py": 50_000, "model.safetensors": 1_264_000_000, "wheels/a.whl": 400, "wheels/b.whl": 199}


def front_matter(text: str) -> dict[str, Any]:
    return ModelCard(text).data.to_dict()


def row(text: str, first: str) -> list[str]:
    found = [line for line in text.splitlines() if line.startswith(f"| {first} |")]
    assert len(found) == 1, first
    return [cell.strip() for cell in found[0].strip("|").split("|")]


def test_hub_reads_the_front_matter() -> None:
    data = front_matter(model_card.render_card(ONE, CardDetails(licence="apache-2.0")))
    assert data["license"] == "apache-2.0"
    assert data["pipeline_tag"] == "image-feature-extraction"
    assert data["library_name"] == "sentence-transformers"
    assert data["base_model"] == ["timm/vit_huge_patch14_clip_224.laion2b"]  # as timm records it


@pytest.mark.parametrize(
    ("backbone", "weights"),
    [
        ("vit_huge_patch14_clip_224.laion2b", "random"),
        ("vit_huge_patch14_clip_224.laion2b", "/a/file.safetensors"),
        ("tf_efficientnet_lite0", "pretrained"),
    ],
)
def test_unknown_base_model_is_omitted(backbone: str, weights: str) -> None:
    assert "base_model" not in front_matter(
        model_card.render_card(config(member("model", backbone, weights=weights)), CardDetails())
    )


def test_open_clip_base_model_is_its_repository() -> None:
    open_clip = pytest.importorskip("open_clip", reason="open_clip is not installed: pip install -e '.[clip]'")
    known = open_clip.get_pretrained_cfg("ViT-H-14", "laion2b_s32b_b79k")["hf_hub"].strip("/")
    bundle_config = config(member("model", "open_clip:ViT-H-14/laion2b_s32b_b79k", weights="pretrained"))
    assert front_matter(model_card.render_card(bundle_config, CardDetails()))["base_model"] == [known]


def test_missing_licence_is_stated() -> None:
    text = model_card.render_card(ONE, CardDetails())
    assert front_matter(text)["license"] == "other"
    assert "no licence was given" in text
    assert "licence=apache-2.0" in text
    assert dataset_metadata(ONE, CardDetails())["licenses"] == [{"name": "other"}]


@pytest.mark.parametrize(
    ("licence", "kaggle"),
    [("apache-2.0", "apache-2.0"), ("cc0-1.0", "CC0-1.0"), ("cc-by-nc-4.0", "CC-BY-NC-4.0"), ("openrail", "other")],
)
def test_kaggle_names_of_licences(licence: str, kaggle: str) -> None:
    metadata = dataset_metadata(ONE, CardDetails(licence=licence))
    assert metadata["licenses"] == [{"name": kaggle}]
    assert f"Weights: {licence}." in metadata["description"]


def test_members_and_score() -> None:
    text = model_card.render_card(TWO, CardDetails())
    assert "Mean cosine on 1,234 held-out images: **0.700**, 95 % interval 0.690 – 0.710" in text
    assert "ensemble weights by 5-fold cross-validation" in text
    backbone = "`vit_huge_patch14_clip_224.laion2b`"
    assert row(text, "a") == ["a", backbone, "linear", "224", "no", "0.750", "0.681", "0.673 – 0.689", "810", "none"]
    assert row(text, "b")[5] == "0.250"
    assert row(text, "quickstart") == ["quickstart", "7,190", "810", f"`{'64' * 32}`"]


def test_model_without_evaluation_has_no_score() -> None:
    text = model_card.render_card(config(member("ridge", "tf_efficientnet_lite0", score=None)), CardDetails())
    assert "Mean cosine on" not in text
    assert "No score on held-out images is known" in text
    assert "The score is" not in text
    assert "The score is of held-out images" in model_card.render_card(ONE, CardDetails())
    assert row(text, "ridge")[-4:] == ["–", "–", "–", "–"]


def test_only_scores_without_leakage_are_held_out() -> None:
    clean = {"mean": 0.61, "low": 0.6, "high": 0.62, "images": 400}
    near = LeakageCounts(810, 0, 0, 5, 5)
    cases: list[tuple[LeakageCounts | None, str]] = [
        (NONE, "Leakage, images and prompts shared with training: none of 810 images."),
        (near, "training: 5 of 810 images (5 with a prompt at cosine ≥ 0.9 to a training prompt)."),
        (LeakageCounts(810, 10, 0, 0, 10), "10 of 810 images (10 with the bytes of a training image)."),
        (LeakageCounts(810, 0, 400, 410, 410, clean=clean), "training prompt). Mean cosine on the other 400: 0.610."),
        (LeakageCounts(810, 0, 0, 0, 0, ("checkpoints/gone",)), "none of 810 images. More may be shared: not all"),
        (
            LeakageCounts(810, None, None, None, None, ("no run",)),
            "Leakage: unknown, whether",
        ),
        (
            None,
            "Leakage: unknown, whether",
        ),  # an older version
    ]
    for leakage, words in cases:
        score = {**SCORE, "leakage": None if leakage is None else leakage.to_json()}
        text = model_card.render_card(config(member("one", "tf_efficientnet_lite0", score=score)), CardDetails())
        assert words in text
        held_out = leakage in (NONE, near)
        assert ("Mean cosine on 810 held-out images" in text) is held_out, leakage
        assert ("The score is of held-out images" in text) is held_out, leakage
        assert ("No score on held-out images is known" in text) is not held_out, leakage
        assert row(text, "one")[-1] == ("not known" if leakage is None else leakage.short())
    both = config(
        member("a", "tf_efficientnet_lite0"),
        member("b", "tf_efficientnet_lite0", score={**SCORE, "leakage": None}),
        facts={"score": {**SCORE, "name": "ensemble", "leakage": None}, "images": 810, "folds": 5},
    )
    text = model_card.render_card(both, CardDetails())
    assert "Mean cosine on 810 images: " in text
    assert "Not every score above is of held-out images" in text


def test_single_view_score_is_labelled() -> None:
    about = member("model", "tf_efficientnet_lite0") | {"flip": True, "sizes": [224, 280]}
    text = model_card.render_card(config(about), CardDetails())
    assert "0.673 – 0.689, with one view per image at 224 px." in text
    assert "| linear | 224, 280 | yes | 1.000 |" in text


def test_recipe_lines() -> None:
    text = model_card.render_card(ONE, CardDetails(recipes={"model": SETTINGS}))
    for words in (
        "3 epochs, 32 images per step, seed 7, bf16; best step 600 of 672",
        "backbone from another checkpoint of the same architecture, its lowest 14 blocks frozen",
        "LoRA of rank 16 in 4 blocks, merged; wide (2048) head of that checkpoint",
        "loss: 1 − cosine + 0.01 × mean squared error, on the 50% with the lowest cosine",
        "adamw, peak learning rates 4e-05 (backbone) and 0.0004 (head), cosine schedule, warm-up of at most 500 steps",
        "layer decay 0.9, gradient norm clipped at 1, EMA of the weights (decay 0.9998)",
        "augmentation: crops of at least 90%, mirrored, brightness and contrast ± 10%",
    ):
        assert words in text
    text = model_card.render_card(ONE, CardDetails(recipes={"model": SETTINGS | {"init_from": None}}))
    assert "backbone from weights of a file, its" in text
    assert "wide (2048) head initialised by ridge\n" in text
    untrained = config(member("model", "vit_huge_patch14_clip_224.laion2b", step=0))
    assert "; the model is the initial one, since none of 672 steps improved the score" in model_card.render_card(
        untrained, CardDetails(recipes={"model": SETTINGS})
    )
    assert "## Recipe" not in model_card.render_card(ONE, CardDetails())
    assert "- 2 epochs" in model_card.render_card(ONE, CardDetails(recipes={"model": {"epochs": 2, "batch_size": 8}}))


def test_each_member_has_its_recipe() -> None:
    other = {
        **SETTINGS,
        "epochs": 5.0,
        "fold": "2/5",
        "init_from": None,
        "model": {"backbone": "x", "weights": "random"},
    }
    text = model_card.render_card(TWO, CardDetails(recipes={"a": SETTINGS, "b": other}))
    first, second = text.partition("## Recipe\n\n### a\n\n")[2].partition("\n\n## ")[0].split("\n\n### b\n\n")
    assert first.startswith("- 3 epochs, ")
    assert second.startswith("- 5 epochs, ")
    assert (
        "- validated on fold 2/5 of the prompts\n- backbone from random weights; linear head initialised by random"
        in second
    )
    assert all(line.startswith("- ") for line in (first + "\n" + second).splitlines())
    assert "## Recipe\n\n### b\n\n- 5 epochs" in model_card.render_card(TWO, CardDetails(recipes={"b": other}))


@pytest.mark.parametrize(
    ("backbone", "packages"),
    [
        ("tf_efficientnet_lite0", "torch, numpy, pillow, safetensors and timm"),
        ("open_clip:ViT-H-14/x", "torch, numpy, open_clip_torch, pillow, safetensors and timm"),
        ("transformers:blip2_vision", "torch, numpy, pillow, safetensors, timm and transformers"),
    ],
)
def test_card_lists_required_packages(backbone: str, packages: str) -> None:
    text = model_card.render_card(config(member("model", backbone), graphs=GRAPHS), CardDetails())
    assert f"\nNeeds {packages}, and no network." in text


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (0.0, "< 1e-7"),
        (-2e-8, "< 1e-7"),
        (9.9e-8, "< 1e-7"),
        (1.2e-7, "1.2e-07"),
        (9e-5, "9.0e-05"),
        (0.0345, "0.0345"),
    ],
)
def test_format_distance(value: float, words: str) -> None:
    assert model_card.format_distance(value) == words


def test_fp16_cost() -> None:
    half = {"mean_distance": 2.4e-6, "max_distance": 8.1e-6, "pictures": 1200}
    assert (
        "Cosine distance of fp16 weights from fp32: 2.4e-06 on average, 8.1e-06 at most, on 1,200 images."
        in model_card.render_card(ONE | {"half_distance": half}, CardDetails())
    )
    assert "Cosine distance of fp16" not in model_card.render_card(ONE, CardDetails())


def test_exported_models_and_int8_cost() -> None:
    text = model_card.render_card(ONE | {"graphs": GRAPHS}, CardDetails())
    assert row(text, "`onnx`") == ["`onnx`", "`graphs/model.onnx`", "\\< 1e-7", "3.4e-07", "500"]
    assert "Cosine distance of int8: 0.0012 on average, 0.0345 at most." in text
    assert "`predict.py` runs one on the CPU by `--backend onnx` or `--backend openvino_int8`; this needs" in text
    assert "this needs onnxruntime and openvino." in text
    alone = model_card.render_card(ONE | {"graphs": {"onnx": GRAPHS["onnx"]}}, CardDetails())
    assert "`predict.py` runs it on the CPU by `--backend onnx`; this needs onnxruntime." in alone
    assert "--backend" not in model_card.render_card(ONE | {"graphs": {"torch": GRAPHS["onnx"]}}, CardDetails())
    assert "## Exported models" not in model_card.render_card(ONE, CardDetails())


def test_files_and_sizes() -> None:
    text = model_card.render_card(ONE, CardDetails(files=FILES))
    assert row(text, "`model.safetensors`")[1] == "1.3 GB"
    assert row(text, "`wheels/` (2 files)")[1] == "599 B"
    assert row(text, "`predict.py`")[1] == "50.0 kB"
    assert row(text, "`README.md`") == ["`README.md`", "–", "this card"]
    assert row(text, "`dataset-metadata.json`") == ["`dataset-metadata.json`", "–", "for Kaggle's uploader"]
    assert "## Files" not in model_card.render_card(ONE, CardDetails())


def test_card_is_reproducible_without_paths_and_dates() -> None:
    details = CardDetails(recipes={"model": SETTINGS}, files=FILES)
    for text in (model_card.render_card(ONE, details), json.dumps(dataset_metadata(ONE, details))):
        assert not re.search(r"/place|somebody|20[2-9]\d-", text)
    assert model_card.render_card(ONE, details) == model_card.render_card(json.loads(json.dumps(ONE)), details)


@pytest.mark.parametrize(
    "bundle_config", [ONE, TWO, ONE | {"encoder": "BAAI--bge-small-en-v1.5"}, ONE | {"encoder": "x" * 99}]
)
@pytest.mark.parametrize(
    "title", [None, "Bilder → Sätze", "→→→→→→", "A title of just as many characters as they take.."]
)
def test_metadata_fits_the_bounds_of_the_kaggle_client(bundle_config: dict[str, Any], title: str | None) -> None:
    """Bounds from the client's source; test_upload.py runs the client."""
    metadata = dataset_metadata(bundle_config, CardDetails(title=title))
    assert metadata_problems(metadata) == []
    assert 6 <= len(metadata["title"]) <= 50
    assert 20 <= len(metadata["subtitle"]) <= 80
    owner, slug = metadata["id"].split("/")
    assert owner == "INSERT_USERNAME"
    assert 6 <= len(slug) <= 50
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", slug)
    assert len(metadata["licenses"]) == 1
    assert not metadata["description"].startswith("---")


def test_invalid_details_are_refused() -> None:
    with pytest.raises(UserError) as error:
        model_card.render_card(ONE, CardDetails(title="No", licence="Apache 2.0", author="\n"))
    for words in ("title: 'No' has 2 characters, not 6 to 50", "licence: 'Apache 2.0' is not a short name", "author: "):
        assert words in str(error.value)
    wrong = {"title": "T", "id": "x", "licenses": [{"name": "mine"}], "subtitle": "short"}
    assert [problem.partition(":")[0] for problem in metadata_problems(wrong)] == [
        "title", "id", "licenses", "subtitle",
    ]  # fmt: skip
    assert metadata_problems({}) == ["title: missing", "id: missing", "licenses: missing"]


def test_names_are_escaped_in_tables() -> None:
    text = model_card.render_card(config(member("a|b", "tf_efficientnet_lite0")), CardDetails(author="<script>"))
    assert "| a\\|b |" in text
    assert "By \\<script\\>." in text
