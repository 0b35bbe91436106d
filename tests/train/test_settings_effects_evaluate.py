"""Every setting of the commands that evaluate, compare and export has an effect, or is refused with a reason.

python -m pytest tests/train/test_settings_effects_evaluate.py
"""

import csv
import io
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from datagen.dataset.targets import TargetEncoder, write_missing_targets
from models.export.config import ExportSettings
from models.regressor import make
from models.runtime.decode import BadImage
from tests import small_dataset, tiny_captioners, training
from tests.effects import Command, Entries, Entry, Result, cases, complete, refused, shows, slow, without_gpu
from train.config import EvaluateSettings
from train.demo.app import DemoSettings
from train.tools.hard_examples import HardSettings
from train.tools.interpolation import InterpolateSettings
from train.tools.run_report import ReportSettings
from train.tools.runs_table import RunsSettings

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.allow_hosts(["127.0.0.1", "127.0.0.2"]),
]

UNUSED = "has no effect "
MINILM = "all-MiniLM-L6-v2"
ACCELERATOR = without_gpu(refused("accelerator: gpu, but torch finds none", "accelerator=gpu"))


@pytest.fixture(scope="module", autouse=True)
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Files that the entries name: two datasets with MiniLM's vectors, two runs, captioners and files of prompts."""
    root = tmp_path_factory.mktemp("places")
    paths: dict[str, Path] = {"runs": root / "runs"}
    for seed, name in enumerate(("data", "data2")):
        paths[name] = small_dataset.write(root / name, train=16, val=6, seed=seed)
        write_missing_targets(paths[name], TargetEncoder(MINILM))
    for name, overrides in (("run", ("save_initial=true",)), ("run2", ("seed=1", "epochs=1"))):
        paths[name] = paths["runs"] / name
        assert training.train(paths["data"], paths[name], f"encoder={MINILM}", *overrides) == 0
    paths["vit_weights"] = root / "vit.safetensors"
    torch.manual_seed(5)
    state = make("test_vit", "random", 32, 384).backbone.state_dict()
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, paths["vit_weights"])
    for name in ("blip", "blip2", "coca", "clip"):
        for seed, copy in enumerate((name, f"other_{name}")):
            paths[copy] = getattr(tiny_captioners, name)(root / copy, seed=seed)
    paths["words"] = tiny_captioners.words(root / "words")
    paths["few_words"] = _fewer(paths["words"], root / "few_words")
    paths["files"] = _prompts(root / "files")
    paths["images"] = _images(root / "images")
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        paths["free"] = Path(str(opened.getsockname()[1]))
    for command in COMMANDS:
        command.places = paths
    for name, run in (("evaluated", "run"), ("evaluated2", "run2")):
        paths[name] = EVALUATE.run(root / name, (f"run={paths[run]}",)).folder / "evaluation"
    return paths


# ------------------------------------------------------------------------------------------------------------ evaluate


def table(result: Result) -> str:
    return result.stdout


def predictions(result: Result) -> dict[str, str]:
    return result.digest("evaluation/predictions/*")


def texts(result: Result) -> dict[str, str]:
    return result.digest("evaluation/texts/*")


def names(result: Result) -> list[str]:
    return result.names("*")


def batches(result: Result) -> list[int]:
    return [len(args[1]) for args, _ in result.of("embed", "features")]


def threads(result: Result) -> list[Any]:
    return [args for args, _ in result.of("ThreadPoolExecutor")]


def exact(result: Result) -> list[Any]:
    return [kwargs.get("exact") for _, kwargs in result.of("Index.__init__")]


def of_loader(result: Result) -> list[Any]:
    return [kwargs["num_workers"] for _, kwargs in result.of("ResumableLoader.__init__")]


EVALUATE = Command(
    "train.evaluate",
    "evaluate",
    (
        *("run={run}", "out={here}/evaluation", "accelerator=cpu", "workers=0", "knn.neighbours=5", "batch_size=4"),
        *("embedders=[mean,knn,ridge,regressor,retrieve,blend,ensemble]", "ensemble.folds=2", "retrieve.neighbours=5"),
        *("captions.blip={blip}", "captions.blip2={blip2}", "captions.coca={coca}", "captions.clip={clip}"),
        *("captions.term_lists={words}", "captions.mode=fast"),
    ),
    spied=(
        "models.regressor:Regressor.embed",
        "train.data.loader:ResumableLoader.__init__",
        "train.evaluate.prediction_cache:ThreadPoolExecutor",
        "models.retrieval.vector_index:Index.__init__",
    ),
    own_cache=True,
)


def only(*embedders: str) -> tuple[str]:
    return (f"embedders=[{','.join(embedders)}]",)


BY_TEXT = (*only("knn", "mean"), "knn.backbone=local-dir:{clip}", "knn.prompt_index={files}/bank.txt")
INTERROGATOR = only("clip_interrogator")
KNN, REGRESSOR, RETRIEVE, MEAN = only("knn"), only("regressor"), only("retrieve"), only("mean")
ENSEMBLE = only("mean", "knn", "regressor", "ensemble")
EVALUATE_SETTINGS: Entries = {
    "run": shows(predictions, "run={run2}"),
    "checkpoint": [
        shows(predictions, "checkpoint={run2}/best", given=REGRESSOR),
        refused(f"checkpoint: {UNUSED}without blend or regressor", "checkpoint={run2}/best", *only("mean")),
    ],
    "dataset": shows(predictions, "dataset={data2}", given=REGRESSOR),
    "split": shows(predictions, "split=train", given=REGRESSOR),
    "embedders": shows(table, *only("mean", "regressor")),
    "tta.*.flip": [
        shows(predictions, "tta.regressor.flip=true", given=REGRESSOR),
        refused("tta.mean: only checkpoints, ensembles", "+tta.mean.flip=true"),
    ],
    "tta.*.sizes": shows(predictions, "tta.regressor.sizes=[48]", given=REGRESSOR),
    "knn.neighbours": [
        shows(predictions, "knn.neighbours=1", given=KNN),
        refused(f"knn.neighbours: {UNUSED}without knn", "knn.neighbours=1", *only("mean")),
    ],
    "knn.similarity_exponent": [
        shows(predictions, "knn.similarity_exponent=5", given=KNN),
        refused(f"knn.similarity_exponent: {UNUSED}without knn", "knn.similarity_exponent=5", *only("mean")),
    ],
    "knn.backbone": [
        shows(predictions, "knn.backbone=test_vit2", given=(*KNN, "knn.weights=random")),
        refused(f"knn.backbone: {UNUSED}without knn or ridge", "knn.backbone=test_vit2", *only("mean")),
    ],
    "knn.weights": [
        shows(predictions, "knn.weights={vit_weights}", given=KNN),
        refused(f"knn.weights: {UNUSED}without ridge", "knn.weights=random", given=BY_TEXT),
    ],
    "knn.prompt_index": [
        shows(predictions, "knn.prompt_index={files}/other.txt", given=BY_TEXT),
        refused(
            f"knn.prompt_index: {UNUSED}without knn",
            "knn.prompt_index={files}/bank.txt",
            "knn.backbone=local-dir:{clip}",
            *only("ridge"),
        ),
    ],
    "knn.exact": [
        shows(exact, "knn.exact=true", given=KNN),
        refused(f"knn.exact: {UNUSED}without knn", "knn.exact=true", *only("mean")),
    ],
    "retrieve.neighbours": [
        shows(predictions, "retrieve.neighbours=1", given=RETRIEVE),
        refused(f"retrieve.neighbours: {UNUSED}without blend or retrieve", "retrieve.neighbours=1", *only("mean")),
    ],
    "retrieve.similarity_exponent": [
        shows(predictions, "retrieve.similarity_exponent=9", given=RETRIEVE),
        refused(
            f"retrieve.similarity_exponent: {UNUSED}without blend or retrieve",
            "retrieve.similarity_exponent=9",
            *only("mean"),
        ),
    ],
    "retrieve.blend_weight": [
        shows(predictions, "retrieve.blend_weight=0.9", given=only("blend")),
        refused(
            f"retrieve.blend_weight: {UNUSED}without blend", "retrieve.blend_weight=0.9", *only("regressor", "retrieve")
        ),
    ],
    "captions.blip": [
        slow(shows(texts, "captions.blip={other_blip}", given=only("blip"))),
        refused(f"captions.blip: {UNUSED}without blip or clip_interrogator", "captions.blip={other_blip}"),
    ],
    "captions.blip2": [
        slow(shows(texts, "captions.blip2={other_blip2}", given=only("blip2"))),
        refused(f"captions.blip2: {UNUSED}without blip2", "captions.blip2={other_blip2}"),
    ],
    "captions.coca": [
        slow(shows(texts, "captions.coca={other_coca}", given=only("coca"))),
        refused(f"captions.coca: {UNUSED}without coca", "captions.coca={other_coca}"),
    ],
    "captions.clip": [
        slow(shows(texts, "captions.clip={other_clip}", given=INTERROGATOR)),
        refused(f"captions.clip: {UNUSED}without clip_interrogator", "captions.clip={other_clip}"),
    ],
    "captions.mode": [
        slow(shows(texts, "captions.mode=classic", given=INTERROGATOR)),
        refused(f"captions.mode: {UNUSED}without clip_interrogator", "captions.mode=classic"),
    ],
    "captions.term_lists": [
        slow(shows(texts, "captions.term_lists={few_words}", given=INTERROGATOR)),
        refused(f"captions.term_lists: {UNUSED}without clip_interrogator", "captions.term_lists={few_words}"),
    ],
    "ensemble.members": [
        shows(predictions, "ensemble.members=[mean,regressor]", given=ENSEMBLE),
        refused(f"ensemble.members: {UNUSED}without ensemble", "ensemble.members=[mean,knn]", *only("mean", "knn")),
    ],
    "ensemble.folds": [
        shows(predictions, "ensemble.folds=3", given=ENSEMBLE),
        refused(f"ensemble.folds: {UNUSED}without ensemble", "ensemble.folds=3", *only("mean", "knn")),
    ],
    "prompt_index": shows(predictions, "prompt_index={files}/bank.txt", given=RETRIEVE),
    "column": [
        shows(predictions, "column=other", given=(*RETRIEVE, "prompt_index={files}/bank.csv")),
        refused(f"column: {UNUSED}without a file of columns", "column=other"),
    ],
    "out": shows(names, "out={here}/elsewhere", given=MEAN),
    "report": shows(names, "report={here}/page.html", given=MEAN),
    "batch_size": shows(batches, "batch_size=3", given=REGRESSOR),
    "workers": [shows(threads, "workers=2", given=REGRESSOR), slow(shows(of_loader, "workers=1", given=KNN))],
    "accelerator": ACCELERATOR,
}


@pytest.mark.parametrize("entry", cases(EVALUATE_SETTINGS))
def test_setting_of_evaluate_has_effect_or_is_refused(entry: Entry, tmp_path: Path) -> None:
    EVALUATE.check(entry, tmp_path)


def test_each_setting_of_evaluate_has_an_entry(tmp_path: Path) -> None:
    complete(EvaluateSettings, EVALUATE_SETTINGS)
    looks = (predictions, names, batches, threads, exact)  # at all embedders; an entry runs those that it is about
    EVALUATE.steady({see.__name__: shows(see) for see in looks}, tmp_path)


# ----------------------------------------------------------------------------------------------------- report and runs


def page(result: Result) -> dict[str, str]:
    return result.digest("*.html")


REPORT = Command(
    "train.report", "report", ("run={run}", "evaluation={evaluated}", "out={here}/page.html", "scenes=4", "images=2")
)
REPORT_SETTINGS: Entries = {
    "run": shows(page, "run={run2}"),
    "evaluation": shows(page, "evaluation={evaluated2}"),
    "out": shows(names, "out={here}/other.html"),
    "scenes": shows(page, "scenes=3"),
    "images": shows(page, "images=1"),
    "nearest": shows(page, "nearest=1"),
    "seed": shows(page, "seed=1"),
}
RUNS = Command("train.runs", "runs", ("folder={runs}", "sort=name"))
RUNS_SETTINGS: Entries = {
    "folder": shows(table, "folder={runs}/run"),
    "sort": shows(table, "sort=seed"),
    "csv": shows(names, "csv={here}/runs.csv"),
    "json": shows(names, "json={here}/runs.json"),
}


@pytest.mark.parametrize("entry", cases(REPORT_SETTINGS))
def test_setting_of_report_has_effect_or_is_refused(entry: Entry, tmp_path: Path) -> None:
    REPORT.check(entry, tmp_path)


@pytest.mark.parametrize("entry", cases(RUNS_SETTINGS))
def test_setting_of_runs_has_effect_or_is_refused(entry: Entry, tmp_path: Path) -> None:
    RUNS.check(entry, tmp_path)


def test_each_setting_of_report_and_runs_has_an_entry(tmp_path: Path) -> None:
    complete(ReportSettings, REPORT_SETTINGS)
    REPORT.steady(REPORT_SETTINGS, tmp_path)
    complete(RunsSettings, RUNS_SETTINGS)


# ------------------------------------------------------------------------------------------------ hard and interpolate


def weights(result: Result) -> str:
    return (result.folder / "weights.csv").read_text()


HARD = Command(
    "train.hard",
    "hard",
    ("run={run}", "out={here}/weights.csv", "accelerator=cpu", "workers=0", "batch_size=7"),
    spied=("models.regressor:Regressor.features", "train.data.loader:ResumableLoader.__init__"),
)
HARD_SETTINGS: Entries = {
    "run": shows(weights, "run={run2}"),
    "checkpoint": shows(weights, "checkpoint={run2}/best"),
    "keep": shows(weights, "keep=0.5"),
    "weight": shows(weights, "weight=3"),
    "drop": shows(weights, "drop=true"),
    "out": shows(names, "out={here}/other.csv"),
    "batch_size": shows(batches, "batch_size=5"),
    "workers": slow(shows(of_loader, "workers=1")),
    "accelerator": ACCELERATOR,
}


def mixed(result: Result) -> dict[str, str]:
    return result.digest("out/*/model.safetensors")


INTERPOLATE = Command(
    "train.interpolate",
    "interpolate",
    (
        *("a={run}/first", "b={run}/best", "out={here}/out", "alpha=[0.5]", "dataset={data}", "accelerator=cpu"),
        *("workers=0", "batch_size=4"),
    ),
    spied=("models.regressor:Regressor.features", "train.data.loader:ResumableLoader.__init__"),
)
UNSCORED = ("dataset=null",)
INTERPOLATE_SETTINGS: Entries = {
    "a": shows(mixed, "a={run2}/best"),
    "b": shows(mixed, "b={run2}/best"),
    "alpha": shows(mixed, "alpha=[0.25]"),
    "out": shows(names, "out={here}/elsewhere"),
    "dataset": shows(table, "dataset={data2}"),
    "split": [shows(table, "split=train"), refused(f"split: {UNUSED}without dataset", "split=train", given=UNSCORED)],
    "batch_size": [
        shows(batches, "batch_size=3"),
        refused(f"batch_size: {UNUSED}without dataset", "batch_size=3", given=UNSCORED),
    ],
    "workers": [
        slow(shows(of_loader, "workers=1")),
        refused(f"workers: {UNUSED}without dataset", "workers=1", given=UNSCORED),
    ],
    "accelerator": ACCELERATOR,
}


@pytest.mark.parametrize("entry", cases(HARD_SETTINGS))
def test_setting_of_hard_has_effect_or_is_refused(entry: Entry, tmp_path: Path) -> None:
    HARD.check(entry, tmp_path)


@pytest.mark.parametrize("entry", cases(INTERPOLATE_SETTINGS))
def test_setting_of_interpolate_has_effect_or_is_refused(entry: Entry, tmp_path: Path) -> None:
    INTERPOLATE.check(entry, tmp_path)


def test_each_setting_of_hard_and_interpolate_has_an_entry(tmp_path: Path) -> None:
    complete(HardSettings, HARD_SETTINGS)
    HARD.steady(HARD_SETTINGS, tmp_path / "hard")
    complete(InterpolateSettings, INTERPOLATE_SETTINGS)
    INTERPOLATE.steady(INTERPOLATE_SETTINGS, tmp_path / "interpolate")


# ---------------------------------------------------------------------------------------------------------------- demo


def served(demo: Any, words: Any, port: Any, *, most_bytes: int, browser: bool) -> dict[str, Any]:
    """Replacement of the blocking server: results for a small and a large image."""
    outcome: dict[str, Any] = {"words": words, "host": port.getsockname()[0], "most": most_bytes, "browser": browser}
    for side in (40, 400):
        file = io.BytesIO()
        Image.new("RGB", (side, side), "teal").save(file, "png")
        try:
            look = demo.explain(file.getvalue())
            outcome[f"{side} px"] = [look.nearest, [(part.name, round(part.share, 5)) for part in look.parts]]
        except BadImage as error:
            outcome[f"{side} px"] = str(error)
    return {"page": outcome, "port": port.getsockname()[1]}


def visit(result: Result) -> Any:
    return [seen["page"] for _, seen in result.of("serve")]


def port(result: Result) -> list[int]:
    return [seen["port"] for _, seen in result.of("serve")]


DEMO = Command(
    "train.demo",
    "demo",
    ("checkpoint={run}/best", "baselines=[mean,retrieve]", "accelerator=cpu", "port=0"),
    replaced={"train.demo.page:serve": served},
    spied=("train.demo.page:open_port",),
)
DEMO_SETTINGS: Entries = {
    "checkpoint": shows(visit, "checkpoint={run2}/best"),
    "run": [
        shows(visit, "run={run2}", given=("baselines=[mean,knn]",)),
        refused(f"run: {UNUSED}with checkpoint, prompt_index", "run={run2}", "prompt_index={files}/bank.txt"),
    ],
    "prompt_index": shows(visit, "prompt_index={files}/bank.txt"),
    "baselines": shows(visit, "baselines=[mean]"),
    "neighbours": shows(visit, "neighbours=3"),
    "host": shows(visit, "host=127.0.0.2"),
    "port": shows(port, "port={free}"),
    "max_upload_mb": shows(visit, "max_upload_mb=1"),
    "max_pixels": shows(visit, "max_pixels=10000"),
    "accelerator": ACCELERATOR,
    "browser": shows(visit, "browser=true"),
}


@pytest.mark.parametrize("entry", cases(DEMO_SETTINGS))
def test_setting_of_demo_has_effect_or_is_refused(entry: Entry, tmp_path: Path) -> None:
    DEMO.check(entry, tmp_path)


def test_each_setting_of_demo_has_an_entry(tmp_path: Path) -> None:
    complete(DemoSettings, DEMO_SETTINGS)
    DEMO.steady({k: v for k, v in DEMO_SETTINGS.items() if k != "port"}, tmp_path)  # port=0 takes any


# -------------------------------------------------------------------------------------------------------------- export


def config(result: Result) -> dict[str, Any]:
    return result.json("bundle/config.json")


def card(result: Result) -> str:
    return (result.folder / "bundle/README.md").read_text()


EXPORT = Command("models.export", "export", ("checkpoint={run}/best", "out={here}/bundle"))
ONNX = ("runtimes=[onnx]",)
PUSH = ("push=hub:user/name", "licence=mit")
EXPORT_SETTINGS: Entries = {
    "checkpoint": shows(lambda r: r.digest("bundle/model.safetensors"), "checkpoint={run2}/best"),
    "out": shows(names, "out={here}/elsewhere"),
    "flip": shows(config, "flip=true"),
    "sizes": shows(config, "sizes=[32,48]"),
    "precision": shows(lambda r: (r.folder / "bundle/model.safetensors").stat().st_size, "precision=fp16"),
    "runtimes": shows(lambda r: r.names("bundle/graphs/*"), *ONNX),
    "check_images": [
        shows(lambda r: config(r)["graphs"], "check_images={images}", given=ONNX),
        refused("check_images: .* are for exported models", "check_images={images}"),
    ],
    "wheels.python": refused("python: '3.9' is older than 3.11", "wheels.python=3.9"),
    "wheels.platform": [
        refused("platform: 'win32' is not supported", "wheels.platform=win32", "wheels.python=3.11"),
        refused(f"wheels.platform: {UNUSED}without wheels.python", "wheels.platform=manylinux_2_28_x86_64"),
    ],
    "title": shows(card, "title='A title of ours'"),
    "licence": shows(card, "licence=mit"),
    "author": shows(card, "author=Somebody"),
    "push": shows(lambda r: r.lines("nothing is sent"), *PUSH),
    "dry_run": [
        refused("no token of the hub", "dry_run=false", given=PUSH),
        refused(f"dry_run: {UNUSED}without push", "dry_run=true"),
    ],
    "public": [
        shows(lambda r: r.lines("public") + r.lines("private"), "public=true", given=PUSH),
        refused("public, dry_run: need push=", "public=true"),
    ],
}


@pytest.mark.parametrize("entry", cases(EXPORT_SETTINGS))
def test_setting_of_export_has_effect_or_is_refused(
    entry: Entry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    EXPORT.check(entry, tmp_path)


def test_each_setting_of_export_has_an_entry(tmp_path: Path) -> None:
    complete(ExportSettings, EXPORT_SETTINGS)
    EXPORT.steady(EXPORT_SETTINGS, tmp_path)


COMMANDS = (EVALUATE, REPORT, RUNS, HARD, INTERPOLATE, DEMO, EXPORT)


# ------------------------------------------------------------------------------------------------ what the entries name


def _prompts(folder: Path) -> Path:
    folder.mkdir()
    banks = {
        "bank": [f"a red square number {n} on a blue ground" for n in range(12)],
        "other": [f"an old lighthouse by the sea, painting {n}" for n in range(12)],
    }
    for name, prompts in banks.items():
        (folder / f"{name}.txt").write_text("".join(f"{prompt}\n" for prompt in prompts))
    with (folder / "bank.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("prompt", "other"), *zip(*banks.values(), strict=True)])
    return folder


def _fewer(words: Path, folder: Path) -> Path:
    """The first terms alone of each list."""
    folder.mkdir()
    for path in words.glob("*.txt"):
        (folder / path.name).write_text("\n".join(path.read_text().split("\n")[:2]) + "\n")
    return folder


def _images(folder: Path) -> Path:
    folder.mkdir()
    for n in range(5):
        (folder / f"{n}.png").write_bytes(small_dataset.image(f"square {9 * n} 20 30 on 200 {n} 50", 40))
    return folder
