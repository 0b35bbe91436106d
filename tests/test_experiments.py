"""Every experiment on the meta device: size, parameters, blocks, and trainable parts.

The expected numbers come from the architectures' published widths and depths, written out here, and for whole towers
from open_clip, too.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch

from core.cli import compose
from core.paths import ROOT
from core.settings import settings
from datagen.dataset.reader import Dataset
from models.backbones.layer_groups import blocks, layers
from models.backbones.registry import build
from models.backbones.specs import own_spec
from models.text_head import tower_of
from tests import small_dataset
from train.config import TrainSettings
from train.fit import setup

TARGETS = 384
RENDERED = 112  # px of `make quickstart`
FILES = sorted((ROOT / "conf" / "experiment").glob("*.yaml"))


def vit_block(width: int, feed_forward: int) -> int:
    """Two norms, attention with biases, two linear layers."""
    return 4 * width + 4 * width**2 + 4 * width + 2 * width * feed_forward + feed_forward + width


def eva_block(width: int, feed_forward: int) -> int:
    """Parameters of an EVA block: a ViT's, with SwiGLU's third matrix, two inner norms, and no bias on keys."""
    return 6 * width + 4 * width**2 + 3 * width + 3 * width * feed_forward + 4 * feed_forward + width


def convnext_block(channels: int) -> int:
    """A 7 × 7 depthwise convolution, a norm, two linear layers, a layer scale."""
    return 50 * channels + 2 * channels + 8 * channels**2 + 5 * channels + channels


def vit(width: int, feed_forward: int, depth: int, patch: int, size: int, *, norm: int, bias: int, token: int) -> int:
    """A tower without a pooling head: `norm` norms beside the blocks', patches with `bias`, `token` class tokens."""
    stem = 3 * patch**2 * width + bias * width + ((size // patch) ** 2 + token) * width + token * width
    return stem + depth * vit_block(width, feed_forward) + 2 * norm * width


def mbconv(width: int, out: int, kernel: int) -> int:
    """Size of an MBConv block without biases: 1 × 1 to six times the width, depthwise, 1 × 1, each with a norm."""
    wide = 6 * width
    return width * wide + kernel**2 * wide + wide * out + 2 * (wide + wide + out)


def adapters(*layers_: tuple[int, int], rank: int = 16) -> int:
    """Parameters of one block's adapters: two matrices for each linear layer of (in, out)."""
    return sum(rank * (i + o) for i, o in layers_)


H, L, SO, G, XS = (1280, 5120), (1024, 4096), (1152, 4304), (1408, 6144), (256, 1024)
EVA = (1024, 1024 * 4 * 2 // 3)
# SigLIP pools by attention: one query, its four matrices, a norm and feed-forward layers
SIGLIP_POOL = vit_block(*SO) - 2 * SO[0] + SO[0]


@dataclass(frozen=True)
class Expected:
    size: int
    tower: int
    """Parameters of the backbone."""
    count: int
    """Blocks."""
    frozen: int
    trained: int
    """Parameters of the backbone that train, adapters among them."""
    adapted: int = 0
    """Parameters of blocks with adapters."""
    head: int = 0


def linear(width: int) -> int:
    return width * TARGETS + TARGETS


def wide(width: int, hidden: int) -> int:
    """A layer, a batch norm, and the linear head."""
    return width * hidden + hidden + 2 * hidden + linear(hidden)


# EfficientNet-Lite0's blocks after the first: width, out, kernel
LITE0 = [
    *((16, 24, 3), (24, 24, 3)),
    *((24, 40, 5), (40, 40, 5)),
    *((40, 80, 3), (80, 80, 3), (80, 80, 3)),
    *((80, 112, 5), (112, 112, 5), (112, 112, 5)),
    *((112, 192, 5), (192, 192, 5), (192, 192, 5), (192, 192, 5)),
    (192, 320, 3),
]
LITE0_TOP = 320 * 1280 + 2 * 1280  # a last 1 × 1 convolution and its norm
VITH14 = Expected(
    224, vit(*H, 32, 14, 224, norm=2, bias=0, token=1), 32, 14, 18 * vit_block(*H) + 2 * H[0], 0, linear(H[0])
)
TABLE = {
    "vith14": VITH14,
    "stage1": VITH14,
    "stage2": VITH14,
    "vith14_336": Expected(336, VITH14.tower + (24**2 - 16**2) * H[0], 32, 14, VITH14.trained, 0, VITH14.head),
    "vitl14_336": Expected(
        336, vit(*L, 24, 14, 336, norm=2, bias=0, token=1), 24, 2, 22 * vit_block(*L) + 2 * L[0], 0, linear(L[0])
    ),
    "convnext_xxl_256": Expected(
        256,
        49 * 384  # the stem's 4 × 4 convolution with its bias
        + 2 * 384
        + sum(n * convnext_block(c) for n, c in ((3, 384), (4, 768), (30, 1536), (3, 3072)))
        + sum(2 * c + 4 * c * 2 * c + 2 * c for c in (384, 768, 1536))  # from stage to stage
        + 2 * 3072,
        40,
        16,
        16 * adapters((1536, 4 * 1536), (4 * 1536, 1536))
        + 5 * convnext_block(1536)
        + (2 * 1536 + 8 * 1536**2 + 2 * 1536)
        + 3 * convnext_block(3072)
        + 2 * 3072,
        16,
        wide(3072, 2048),
    ),
    "eva02_l_clip_336": Expected(
        336,
        3 * 14**2 * EVA[0] + EVA[0] + (24**2 + 2) * EVA[0] + 24 * eva_block(*EVA) + 2 * EVA[0],
        24,
        6,
        18 * eva_block(*EVA) + 2 * EVA[0],
        0,
        linear(EVA[0]),
    ),
    "siglip2": Expected(
        378,
        vit(*SO, 27, 14, 378, norm=1, bias=1, token=0) + SIGLIP_POOL,
        27,
        9,
        18 * vit_block(*SO) + 2 * SO[0] + SIGLIP_POOL,
        0,
        linear(SO[0]),
    ),
    "blip2_vision": Expected(
        224,
        vit(*G, 39, 14, 224, norm=1, bias=1, token=1),
        39,
        15,
        16 * adapters((G[0], 3 * G[0]), (G[0], G[0]), G, (G[1], G[0])) + 8 * vit_block(*G) + 2 * G[0],
        16,
        linear(G[0]),
    ),
    "quickstart": Expected(
        RENDERED,
        (27 * 32 + 2 * 32)  # the stem
        + (9 * 32 + 2 * 32 + 32 * 16 + 2 * 16)  # the first block widens nothing
        + sum(mbconv(*block) for block in LITE0)
        + LITE0_TOP,
        16,
        8,
        sum(mbconv(*block) for block in LITE0[7:]) + LITE0_TOP,
        0,
        linear(1280),
    ),
    "debug": Expected(
        64,
        vit(*XS, 10, 16, 64, norm=2, bias=0, token=1),
        10,
        2,
        4 * adapters((XS[0], 3 * XS[0]), (XS[0], XS[0]), XS, (XS[1], XS[0]), rank=4) + 4 * vit_block(*XS) + 2 * XS[0],
        4,
        wide(XS[0], 64),
    ),
}


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Images as large as the quickstart's."""
    root = small_dataset.write(tmp_path_factory.mktemp("rendered") / "data", train=1, val=0, size=RENDERED)
    return Dataset(root, small_dataset.ENCODER)


def count(parameters: Any) -> int:
    return sum(p.numel() for p in parameters)


@pytest.mark.slow
@pytest.mark.parametrize("name", TABLE)
def test_experiments_match_their_table(name: str, rendered: Dataset) -> None:
    expected = TABLE[name]
    cfg = settings(TrainSettings, compose("train", [f"+experiment={name}"]))
    model = setup.build_on_meta(cfg, [rendered])
    parts = blocks(model.backbone)
    own = {n: p for n, p in model.backbone.named_parameters() if ".lora_" not in n}
    assert (model.spec.size, count(own.values()), len(parts)) == (expected.size, expected.tower, expected.count)
    assert count(p for p in model.backbone.parameters() if p.requires_grad) == expected.trained
    assert count(p for p in model.head.parameters() if p.requires_grad) == expected.head
    assert not any(own[n].requires_grad for n in layers(model.backbone)[0]), "the stem is frozen with its embeddings"

    def state(part: Any) -> str:
        trains = {n: p.requires_grad for n, p in part.named_parameters()}
        if not any(trains.values()):
            return "frozen"
        if all(".lora_" in n for n, on in trains.items() if on):
            return "adapted"
        return "all" if all(trains.values()) else "some"

    top = expected.count - expected.frozen - expected.adapted
    assert [state(part) for part in parts] == ["frozen"] * expected.frozen + ["adapted"] * expected.adapted + [
        "all"
    ] * top
    assert cfg.model.lora.blocks == expected.adapted
    image_BCHW = torch.zeros(2, 3, expected.size, expected.size, dtype=torch.uint8, device="meta")
    assert model(image_BCHW).shape == (2, TARGETS)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "twin", "projection"),
    [
        ("vith14", "ViT-H-14/laion2b_s32b_b79k", 1280 * 1024),
        ("vitl14_336", "ViT-L-14-336-quickgelu/openai", 1024 * 768),
        ("convnext_xxl_256", "convnext_xxlarge/laion2b_s34b_b82k_augreg_soup", 3072 * 1024),
        ("siglip2", "ViT-SO400M-14-SigLIP2-378/webli", 0),
        ("eva02_l_clip_336", "EVA02-L-14-336/merged2b_s6b_b61k", 1024 * 768 + 768),
    ],
)
def test_clip_tower_has_parameter_count_of_open_clip(name: str, twin: str, projection: int) -> None:
    with torch.device("meta"):
        module, spec = build(f"open_clip:{twin}", "random")
    assert (count(module.parameters()) - projection, spec.size) == (TABLE[name].tower, TABLE[name].size)
    assert open_clip.get_pretrained_cfg(*twin.split("/"))


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(TABLE.keys() - {"quickstart", "debug", "blip2_vision"}))
def test_clip_weights_and_preprocessing_match_open_clip(name: str) -> None:
    """ImageNet's classifiers have no twin in open_clip. BLIP-2's tower is of EVA-CLIP; debug's weights are random."""
    cfg = settings(TrainSettings, compose("train", [f"+experiment={name}"])).model
    with torch.device("meta"):
        _, spec = build(
            *(cfg.backbone, "random", TABLE[name].size),
            resize_mode=cfg.resize_mode,
            interpolation=cfg.interpolation,
            crop_pct=cfg.crop_pct,
        )
    twin = own_spec(tower_of(cfg.backbone))
    assert spec.preprocessing == twin.preprocessing.at(spec.size)
    assert (spec.mean, spec.std) == (twin.mean, twin.std)


def test_table_lists_every_experiment() -> None:
    assert {file.stem for file in FILES} == set(TABLE)


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES, ids=[file.stem for file in FILES])
def test_experiment_header_has_command_hardware_and_cost(file: Path) -> None:
    text = file.read_text()
    header = text[: text.index("\nname:")]
    assert f"python -m train +experiment={file.stem}" in header
    if file.stem not in ("quickstart", "debug"):
        assert "# Hardware" in header
        assert "# To beat:" in header
        assert re.search(r"# Hours, an estimate: [\d.]+ for|# Hardware and hours: as \+experiment=", header)
    cfg = settings(TrainSettings, compose("train", [f"+experiment={file.stem}"]))
    assert cfg.name == file.stem
    for frozen, of in re.findall(r"freeze: (\d+) +# of (\d+)", text):
        with torch.device("meta"):
            module, _ = build(cfg.model.backbone, "random")
        assert (cfg.model.freeze, len(blocks(module))) == (int(frozen), int(of))
