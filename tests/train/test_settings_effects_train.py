"""Every setting of `train` and `train.probe` has an effect, is refused with a reason, or needs a GPU to show it.

python -m pytest tests/train/test_settings_effects_train.py
"""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from datagen.dataset.writer import write_targets
from models import checkpoint
from models.regressor import make
from tests import listed_dataset, small_dataset, training
from tests.effects import (
    Command,
    Entries,
    Entry,
    Result,
    cases,
    complete,
    only_on_gpu,
    refused,
    shows,
    slow,
    without_gpu,
)
from tests.listed_dataset import Row
from train.config import TrainSettings
from train.tools.probe_settings import ProbeSettings

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

UNUSED = "has no effect "


@pytest.fixture(scope="module", autouse=True)
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Files that the entries name: datasets, weights and checkpoints, all tiny."""
    root = tmp_path_factory.mktemp("places")
    paths = {
        "data": small_dataset.write(root / "data", train=16, val=6),
        "data2": small_dataset.write(root / "data2", train=12, val=6, seed=1),
        "seeds": _seeds(root / "seeds"),
        "wide": _wide(root / "wide"),
        "vit_weights": root / "vit.safetensors",
        "vit": _checkpoint(root / "vit", "test_vit"),
        "efficientnet": _checkpoint(root / "efficientnet", "test_efficientnet"),
        "weights": root / "weights.csv",
    }
    write_targets(paths["data"], {"name": "other", "width": 384}, _other_vectors, lambda _: None)
    torch.manual_seed(5)
    state = make("test_vit", "random", 32, 384).backbone.state_dict()
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, paths["vit_weights"])
    keys = [f"{n:06d}" for n in range(22)]
    pyarrow.csv.write_csv(pa.table({"key": keys, "weight": [1.0 + n % 3 for n in range(22)]}), paths["weights"])
    TRAIN.places = PROBE.places = paths
    return paths


def weights(result: Result) -> dict[str, str]:
    return result.digest("out/last/model.safetensors")


def log(result: Result) -> list[dict[str, Any]]:
    return result.records("out/log.jsonl")


def steps(result: Result) -> int:
    return max(record["step"] for record in log(result))


def rates(result: Result) -> list[float]:
    return [record["train/lr"] for record in log(result) if "train/lr" in record]


def losses(result: Result) -> list[float]:
    return [record["train/loss"] for record in log(result) if "train/loss" in record]


def validations(result: Result) -> list[int]:
    return [record["step"] for record in log(result) if "val/cosine" in record]


def files(result: Result) -> list[str]:
    return result.names("out/*")


def of_loader(result: Result) -> list[int]:
    """Number of decoding processes of each loader."""
    return [kwargs["num_workers"] for _, kwargs in result.of("ResumableLoader.__init__")]


def introduction(result: Result) -> list[str]:
    """Log lines of the run about model, steps and devices."""
    return result.lines(" → ") + result.lines("training images") + result.lines("micro-batches")


TRAIN = Command(
    "train",
    "train",
    (*training.OVERRIDES, "dataset={data}", "out={here}/out"),
    spied=("lightning.pytorch:Trainer.save_checkpoint", "train.data.loader:ResumableLoader.__init__"),
)
LORA = ("model.lora.blocks=1", "model.lora.rank=4")
WIDE = ("model.head=wide", "model.head_width=16")
EFFICIENTNET = ("model.backbone=test_efficientnet", "init_from={efficientnet}", "optim.lr=1e-2")
SEEDS = ("dataset={seeds}", "encoder=texts")

TRAIN_SETTINGS: Entries = {
    "name": shows(files, "name=other", given=("out={here}/out/${name}",)),
    "out": shows(lambda r: r.names("*"), "out={here}/elsewhere"),
    "dataset": shows(weights, "dataset={data2}"),
    "dataset_repeats": shows(steps, "dataset_repeats=[2]"),
    "val": shows(lambda r: {key for record in log(r) for key in record}, "val=[{data2}]"),
    "fold": shows(files, "fold=1/3", "fold_threshold=0.99"),
    "fold_threshold": [
        shows(lambda r: r.lines("left out"), "fold_threshold=0.99", given=("fold=1/3", "fold_threshold=0.9")),
        refused(f"fold_threshold: {UNUSED}without fold", "fold_threshold=0.5"),
    ],
    "encoder": shows(weights, "encoder=other"),
    "init_from": [
        shows(weights, "init_from={vit}"),
        refused(f"head_init: {UNUSED}with init_from=", "init_from={vit}", "model.head_init=ridge"),
    ],
    "seed": shows(weights, "seed=1"),
    "epochs": [
        shows(steps, "epochs=1"),
        refused(f"epochs: {UNUSED}with max_steps=3", "epochs=4", "max_steps=3"),
    ],
    "max_steps": shows(steps, "max_steps=3"),
    "batch_size": shows(steps, "batch_size=4"),
    "validate_every": shows(validations, "validate_every=2"),
    "save_every": shows(lambda r: len(r.of("save_checkpoint")), "save_every=1"),
    "log_every": shows(lambda r: len(losses(r)), "log_every=2"),
    "save_initial": shows(files, "save_initial=true"),
    "wandb": slow(shows(files, "wandb=offline")),
    "dry_run": shows(lambda r: r.names(), "dry_run=true"),
    "model.backbone": shows(weights, "model.backbone=test_vit2"),
    "model.weights": shows(weights, "model.weights={vit_weights}"),
    "model.size": shows(weights, "model.size=48"),
    "model.resize_mode": shows(weights, "model.resize_mode=squash", given=("dataset={wide}",)),
    "model.interpolation": shows(weights, "model.interpolation=bilinear", given=("dataset={wide}",)),
    "model.crop_pct": shows(weights, "model.crop_pct=0.5", given=("dataset={wide}",)),
    "model.head": shows(weights, "model.head=wide"),
    "model.head_width": [
        shows(weights, "model.head_width=8", given=WIDE),
        refused(f"model.head_width: {UNUSED}with model.head=linear", "model.head_width=8"),
    ],
    "model.head_init": shows(weights, "model.head_init=random"),
    "model.head_fit_images": [
        shows(weights, "model.head_fit_images=4"),
        refused(
            f"head_fit_images: {UNUSED}with model.head_init=random", "model.head_fit_images=4", "model.head_init=random"
        ),
    ],
    "model.text_tower": [
        refused("nowhere", "model.text_tower=open_clip:ViT-B-32/nowhere", given=("model.head_init=text",)),
        refused("text_tower: .* serves head_init=text", "model.text_tower=open_clip:ViT-B-32/openai"),
    ],
    "model.freeze": [
        shows(weights, "model.freeze=1"),
        refused(f"optim.lr: {UNUSED}with model.freeze=all", "model.freeze=all", "optim.lr=1e-3"),
        refused(f"optim.layer_decay: {UNUSED}with model.freeze=all", "model.freeze=all", "optim.layer_decay=0.5"),
        refused(
            f"optim.head_warmup_epochs: {UNUSED}with model.freeze=all", "model.freeze=all", "optim.head_warmup_epochs=1"
        ),
    ],
    "model.freeze_bn_stats": [
        shows(weights, "model.freeze_bn_stats=false", given=EFFICIENTNET),
        refused(
            f"freeze_bn_stats: {UNUSED}with model.weights=random", "model.freeze_bn_stats=true", "model.weights=random"
        ),
        refused(
            f"freeze_bn_stats: {UNUSED}with model.freeze=all",
            *("model.freeze_bn_stats=true", "model.freeze=all"),
            given=("model.weights={vit_weights}",),
        ),
        shows(lambda r: r.lines("has no batch norm"), "model.freeze_bn_stats=false"),
    ],
    "model.lora.blocks": [
        shows(weights, *LORA),
        refused(f"model.lora.rank: {UNUSED}with model.lora.blocks=0", "model.lora.rank=4"),
    ],
    "model.lora.rank": shows(weights, "model.lora.rank=2", given=LORA),
    "model.lora.alpha": shows(weights, "model.lora.alpha=64", given=LORA),
    "model.lora.dropout": shows(weights, "model.lora.dropout=0.5", given=LORA),
    "loss.mse": shows(weights, "loss.mse=1"),
    "loss.contrastive": shows(weights, "loss.contrastive=1"),
    "loss.temperature": [
        shows(weights, "loss.temperature=0.5", given=("loss.contrastive=1",)),
        refused(f"loss.temperature: {UNUSED}with loss.contrastive=0", "loss.temperature=0.5"),
    ],
    "loss.hard_fraction": shows(weights, "loss.hard_fraction=0.5"),
    "optim.name": shows(weights, "optim.name=lion"),
    "optim.lr": shows(weights, "optim.lr=1e-3"),
    "optim.head_lr": shows(weights, "optim.head_lr=1e-3"),
    "optim.layer_decay": shows(weights, "optim.layer_decay=0.5"),
    "optim.weight_decay": shows(weights, "optim.weight_decay=0.5"),
    "optim.betas": [
        shows(weights, "optim.betas=[0.5,0.9]"),
        refused(f"optim.betas: {UNUSED}with optim.name=madgrad", "optim.betas=[0.5,0.9]", "optim.name=madgrad"),
    ],
    "optim.schedule": shows(rates, "optim.schedule=constant"),
    "optim.warmup": [
        shows(rates, "optim.warmup=0", given=("epochs=10",)),
        refused(f"optim.warmup: {UNUSED}with optim.schedule=onecycle", "optim.warmup=1", "optim.schedule=onecycle"),
    ],
    "optim.grad_clip_norm": shows(weights, "optim.grad_clip_norm=1e-3"),
    "optim.head_warmup_epochs": shows(weights, "optim.head_warmup_epochs=1"),
    "optim.head_warmup_lr": [
        shows(weights, "optim.head_warmup_lr=1e-2", given=("optim.head_warmup_epochs=1",)),
        refused("head_warmup_lr: .* needs .* head_warmup_epochs above 0", "optim.head_warmup_lr=1e-2"),
    ],
    "optim.ema": shows(weights, "optim.ema=0.9"),
    "data.one_image_per_prompt": shows(steps, "data.one_image_per_prompt=false", given=SEEDS),
    "data.sources": [
        shows(weights, "+data.sources={real: 5}", given=SEEDS),
        refused("nobody", "+data.sources={nobody: 5}"),
    ],
    "data.sample_weights": shows(weights, "data.sample_weights={weights}"),
    "data.crop": shows(weights, "data.crop=0.3"),
    "data.flip": shows(weights, "data.flip=true", given=("dataset={wide}",)),
    "data.jitter": shows(weights, "data.jitter=0.5"),
    "data.erase": shows(weights, "data.erase=1"),
    "scale.accelerator": without_gpu(refused("scale.accelerator: gpu, but torch finds none", "scale.accelerator=gpu")),
    "scale.devices": shows(introduction, "scale.devices=2", given=("dry_run=true",)),
    "scale.nodes": shows(introduction, "scale.nodes=2", given=("dry_run=true",)),
    "scale.strategy": refused("adamw8bit does not support", "scale.strategy=fsdp", given=("optim.name=adamw8bit",)),
    "scale.precision": shows(weights, "scale.precision=bf16"),
    "scale.micro_batch": shows(introduction, "scale.micro_batch=4"),
    "scale.activation_checkpointing": shows(
        lambda r: r.lines("activation checkpointing"), "scale.activation_checkpointing=full"
    ),
    "scale.compile": only_on_gpu("compiling takes a minute on a CPU: test_export_trained.py[compiled], slow"),
    "scale.workers": slow(shows(of_loader, "scale.workers=1")),
}


@pytest.mark.parametrize("entry", cases(TRAIN_SETTINGS))
def test_setting_of_train_has_effect_or_is_refused(entry: Entry, tmp_path: Path) -> None:
    TRAIN.check(entry, tmp_path)


def test_each_setting_of_train_has_an_entry(tmp_path: Path) -> None:
    complete(TrainSettings, TRAIN_SETTINGS)
    TRAIN.steady(TRAIN_SETTINGS, tmp_path)


# --------------------------------------------------------------------------------------------------------------- probe


def scores(result: Result) -> list[dict[str, Any]]:
    return [{k: v for k, v in head.items() if k != "seconds"} for head in result.json("out/probe.json")["heads"]]


PROBE = Command(
    "train.probe",
    "probe",
    (
        *("dataset={data}", "out={here}/out", f"encoder={small_dataset.ENCODER}", "model.backbone=test_vit"),
        *("model.weights=random", "model.size=32", "model.head_width=16", "optim.warmup=2", "scale.workers=0"),
        *("scale.accelerator=cpu", "probe.heads=[ridge,linear,wide]", "probe.penalties=[0.1,1]", "probe.lrs=[1e-2]"),
        *("probe.epochs=3", "probe.batch_size=8"),
    ),
    spied=("train.data.loader:ResumableLoader.__init__", "models.regressor:Regressor.features"),
    own_cache=True,
)
RIDGE = ("probe.heads=[ridge]",)
NOT_OF_A_SEARCH = {
    "epochs": 2,
    "max_steps": 3,
    "validate_every": 2,
    "save_every": 1,
    "log_every": 1,
    "save_initial": "true",
    "wandb": "online",
    "dry_run": "true",
    "model.head": "wide",
    "model.head_fit_images": 4,
    "model.freeze": 1,
    "model.freeze_bn_stats": "true",
    "model.lora.blocks": 1,
    "model.lora.rank": 4,
    "model.lora.alpha": 4,
    "model.lora.dropout": 0.1,
    "optim.lr": 1e-3,
    "optim.head_lr": 1e-3,
    "optim.layer_decay": 0.5,
    "optim.head_warmup_epochs": 1,
    "optim.ema": 0.9,
    "data.crop": 0.5,
    "data.flip": "true",
    "data.jitter": 0.5,
    "data.erase": 1,
    "scale.devices": 2,
    "scale.nodes": 2,
    "scale.strategy": "fsdp",
    "scale.precision": "bf16",
    "scale.micro_batch": 4,
    "scale.activation_checkpointing": "full",
    "scale.compile": "true",
}
OF_STEPS = {
    "optim.name": "lion",
    "optim.weight_decay": 5.0,
    "optim.betas": "[0.5,0.9]",
    "optim.schedule": "constant",
    "optim.grad_clip_norm": 1e-3,
    "loss.mse": 1,
    "loss.contrastive": 1,
    "loss.hard_fraction": 0.5,
    "probe.lrs": "[1e-3]",
    "probe.epochs": 2,
    "probe.batch_size": 4,
    "dataset_repeats": "[2]",
    "model.head_init": "random",
}
PROBE_SETTINGS: Entries = {
    **{key: refused(rf"{key}: {UNUSED}in a search", f"{key}={value}") for key, value in NOT_OF_A_SEARCH.items()},
    **{
        key: [
            shows(scores, f"{key}={value}"),
            refused(rf"{key}: {UNUSED}with probe.heads=\[ridge\]", f"{key}={value}", given=RIDGE),
        ]
        for key, value in OF_STEPS.items()
    },
    "optim.warmup": [
        shows(scores, "optim.warmup=0", given=("probe.epochs=10",)),  # of a short search a tenth is no step
        refused(rf"optim.warmup: {UNUSED}with probe.heads=\[ridge\]", "optim.warmup=1", given=RIDGE),
    ],
    "model.text_tower": refused("model.head_init: text is not supported in a search", "model.head_init=text"),
    "optim.head_warmup_lr": refused(
        f"optim.head_warmup_lr: {UNUSED}in a search", "optim.head_warmup_lr=1", "optim.head_warmup_epochs=1"
    ),
    "name": shows(files, "name=other", given=("out={here}/out/${name}",)),
    "out": shows(lambda r: r.names("*"), "out={here}/elsewhere"),
    "dataset": shows(scores, "dataset={data2}"),
    "val": shows(scores, "val=[{data2}]"),
    "fold": shows(scores, "fold=1/3", "fold_threshold=0.99"),
    "fold_threshold": [
        shows(lambda r: r.lines("left out"), "fold_threshold=0.99", given=("fold=1/3", "fold_threshold=0.9")),
        refused(f"fold_threshold: {UNUSED}without fold", "fold_threshold=0.5"),
    ],
    "encoder": shows(scores, "encoder=other"),
    "init_from": shows(scores, "init_from={vit}"),
    "seed": shows(scores, "seed=1"),
    "batch_size": shows(lambda r: [len(args[1]) for args, _ in r.of("features")], "batch_size=5"),
    "model.backbone": shows(scores, "model.backbone=test_vit2"),
    "model.weights": shows(scores, "model.weights={vit_weights}"),
    "model.size": shows(scores, "model.size=48"),
    "model.resize_mode": shows(scores, "model.resize_mode=squash", given=("dataset={wide}",)),
    "model.interpolation": shows(scores, "model.interpolation=bilinear", given=("dataset={wide}",)),
    "model.crop_pct": shows(scores, "model.crop_pct=0.5", given=("dataset={wide}",)),
    "model.head_width": [
        shows(scores, "model.head_width=8"),
        refused(f"model.head_width: {UNUSED}in a search", "model.head_width=8", given=RIDGE),
    ],
    "loss.temperature": [
        shows(scores, "loss.temperature=0.5", given=("loss.contrastive=1",)),
        refused(f"loss.temperature: {UNUSED}with loss.contrastive=0", "loss.temperature=0.5"),
    ],
    "data.one_image_per_prompt": shows(scores, "data.one_image_per_prompt=false", given=SEEDS),
    "data.sources": shows(scores, "+data.sources={real: 5}", given=SEEDS),
    "data.sample_weights": shows(scores, "data.sample_weights={weights}"),
    "scale.accelerator": without_gpu(refused("scale.accelerator: gpu, but torch finds none", "scale.accelerator=gpu")),
    "scale.workers": slow(shows(of_loader, "scale.workers=1")),
    "probe.heads": shows(scores, "probe.heads=[ridge,linear]"),
    "probe.penalties": [
        shows(scores, "probe.penalties=[10]"),
        refused(f"probe.penalties: {UNUSED}without ridge", "probe.penalties=[10]", "probe.heads=[linear]"),
    ],
}


@pytest.mark.parametrize("entry", cases(PROBE_SETTINGS))
def test_setting_of_probe_has_effect_or_is_refused(entry: Entry, tmp_path: Path) -> None:
    PROBE.check(entry, tmp_path)


def test_each_setting_of_probe_has_an_entry(tmp_path: Path) -> None:
    complete(ProbeSettings, PROBE_SETTINGS)
    PROBE.steady(PROBE_SETTINGS, tmp_path)


# ------------------------------------------------------------------------------------------------ what the entries name


def _seeds(root: Path) -> Path:
    """Two images of each of eight training prompts, of two sources."""
    rows = [Row(f"prompt {n}", source="real" if n < 4 else "made") for n in range(8) for _ in range(2)]
    return listed_dataset.write(root, [*rows, *(Row(f"other {n}", split="val") for n in range(4))])


def _wide(root: Path) -> Path:
    """Images twice as wide as high, each with another colour on the left than on the right."""

    def image(text: str, size: int) -> bytes:
        numbers = [int(word) for word in text.split() if word.isdigit()]
        image_HWC = np.empty((size, 2 * size, 3), np.uint8)
        image_HWC[:, :size], image_HWC[:, size:] = numbers[:3], numbers[3:6]
        file = io.BytesIO()
        Image.fromarray(image_HWC).save(file, "png")
        return file.getvalue()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(small_dataset, "image", image)
        return small_dataset.write(root, train=16, val=6)


def _other_vectors(texts: list[str]) -> Any:
    return small_dataset.encode(texts)[:, ::-1].copy()


def _checkpoint(folder: Path, backbone: str) -> Path:
    torch.manual_seed(9)
    model = make(backbone, "random", 32, small_dataset.WIDTH).eval()
    mean_E = torch.nn.functional.normalize(torch.rand(small_dataset.WIDTH), dim=0)
    probes = [torch.randint(0, 256, (3, 40, 40), dtype=torch.uint8) for _ in range(2)]
    checkpoint.save(folder, model, mean_E, probes, {"encoder": small_dataset.ENCODER})
    return folder
