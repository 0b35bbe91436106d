"""Every command of the README and of docs/ runs on tiny data and models.

python -m pytest tests/test_readme.py
"""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from core.cli import compose
from core.paths import ROOT
from datagen.dataset.targets import minilm_wheel
from models.export import runtimes
from tests import tiny_captioners, tiny_published, tiny_sd2
from tests.effects import command_module

GLYPHS = ["renderer=glyphs", "num=24", "shard_size=12", "workers=1", "renderer.size=32", "curate.dedup_threshold=null"]
FILE = [*GLYPHS, "curate.min_tokens=3", "prompts.path=prompts.csv", "prompts.column=prompt"]
SD2 = ["prompts=grammar", "num=4", "force=true", "renderer.size=32", "renderer.steps=2"]
SD2 += ["curate.dedup_threshold=null", "split.val_fraction=0.5"]
TINY_SD2 = [*SD2, "renderer.model={sd2}", "renderer.render_size=64", "renderer.batch_size=2"]
LOCAL = ["prompts=grammar", *GLYPHS, "shard_size=2", "engine=local", "ray_address=null", "out=data/many"]
TINY_TRAIN = ["model.backbone=test_vit", "model.weights=random", "model.size=null", "model.freeze=0", "epochs=1"]
TINY_TRAIN += ["batch_size=2", "wandb=off", "scale.workers=0", "scale.accelerator=cpu"]
MINE = [*TINY_TRAIN, "dataset=data/mine"]
PROBE = ["probe.heads=[ridge,linear]", "probe.lrs=[1e-3]", "probe.epochs=1"]
COCO = [*GLYPHS, "curate.min_tokens=3", "prompts.sources.coco.weight=1", "prompts.sources.coco.prompts.records=null"]
COCO += ["prompts.sources.coco.prompts.path=prompts.csv", "prompts.sources.coco.prompts.column=prompt"]
COCO += [f"~prompts.sources.{name}" for name in ("diffusiondb", "gustavosta", "vizwiz", "flickr30k", "narratives")]
PUBLISHED = ["split.kind=image", "encoder=null", "curate.dedup_threshold=null", "num=null"]

# Command → the overrides that make it small and keep it off the network; None where another test runs it. This is the
# order in which they run: a command reads what those above it wrote. {names} are folders of the test.
COMMANDS: dict[str, list[str] | None] = {
    "make quickstart": None,  # .ci/run runs it, smaller
    "make test": None,  # is running
    "make install": None,  # has run
    ". .venv/bin/activate": None,
    "pre-commit install": None,
    "make quickstart NUM=300": None,  # is in .ci/run
    "make datagen": TINY_SD2,
    "python -m train +experiment=vith14": TINY_TRAIN,
    "python -m models.export": ["checkpoint=checkpoints/vith14/best"],
    "python bundle/predict.py --images test/images --out submission.csv": [],
    "python -m datagen.index out=data/mine images=photos csv=captions.csv": ["split.val_fraction=0.25"],
    "python -m datagen.index out=data/laion tars='laion/*.tar'": ["tars=data/sd2/shards/*.tar"],
    "python -m train +experiment=quickstart name=mine dataset=data/mine": TINY_TRAIN,
    "python -m datagen.targets out=data/mine encoder=sentence-transformers/all-mpnet-base-v2": ["encoder={minilm}"],
    "python -m train +experiment=quickstart name=mpnet dataset=data/mine "
    "encoder=sentence-transformers/all-mpnet-base-v2": [*TINY_TRAIN, "encoder={minilm}"],
    "python -m datagen.index out=data/near images=photos csv=captions.csv split.kind=similarity": [
        "split.threshold=0.999"  # all captions here are alike
    ],
    "python -m datagen.index out=data/own images=photos csv=captions.csv split_column=split": ["encoder=null"],
    "python -m datagen renderer=glyphs prompts=grammar out=data/glyphs": GLYPHS,
    "python -m datagen.verify out=data/glyphs": [],
    "python -m datagen dry_run=true num=100000": TINY_SD2,
    "python -m datagen renderer=sd2_fast num=100000": [*TINY_SD2, "out=data/fast"],
    "python -m datagen renderer=diffusers renderer.model=stabilityai/stable-diffusion-xl-base-1.0 renderer.steps=30 "
    "out=data/sdxl": [*SD2, "renderer.model={sd2}"],
    "python -m datagen.report out=data/sd2": [],
    "python -m datagen prompts=file prompts.path=prompts.csv out=data/prompts": FILE,
    "python -m datagen prompts=file prompts.path='hf://datasets/owner/name/data/*.parquet' prompts.column=caption "
    "out=data/hub": FILE,
    "python -m datagen prompts.sources.coco.max_prompts=50000 out=data/less_coco": COCO,
    "python -m datagen engine=ray ray_address=auto num=400000 out=s3://bucket/sd2": LOCAL,
    "python -m datagen part=3/8 num=400000 out=s3://bucket/sd2": LOCAL,
    "python -m train +experiment=vith14 dataset=s3://bucket/sd2": [*TINY_TRAIN, "dataset=data/many", "name=many"],
    "python -m datagen.published name=sd2_4m num=100000 out=data/sd2_4m": [*PUBLISHED, "folder=sd2_4m"],
    "python -m datagen.published name=diffusiondb num=100000 out=data/diffusiondb": [*PUBLISHED, "folder=diffusiondb"],
    "python -m train +experiment=vith14 dry_run=true": TINY_TRAIN,
    "python -m train +experiment=vith14_336": [*TINY_TRAIN, "model.size=192"],
    "python -m train.runs": ["folder=checkpoints"],
    "python -m train +experiment=stage1": MINE,
    "python -m train +experiment=stage2": MINE,
    "python -m train +experiment=vith14 name=fold1 fold=1/5": [*MINE, "fold_threshold=1.01"],
    "python -m train.hard run=checkpoints/vith14": ["workers=0", "accelerator=cpu"],
    "python -m train +experiment=vith14 name=again data.sample_weights=checkpoints/vith14/weights.parquet": TINY_TRAIN,
    "python -m train +experiment=vith14 name=kept save_initial=true": MINE,
    "python -m train.interpolate a=checkpoints/kept/first b=checkpoints/kept/best out=checkpoints/kept/wise "
    "dataset=data/sd2": ["dataset=data/mine", "workers=0", "accelerator=cpu"],
    "python -m train.probe +experiment=quickstart": [*MINE, *PROBE],
    "python -m train.evaluate run=checkpoints/quickstart 'embedders=[mean,knn,ridge,regressor,ensemble]'": [
        *("run=checkpoints/mine", "ensemble.folds=2", "workers=0", "accelerator=cpu")
    ],
    "python -m train.evaluate run=checkpoints/vith14 'embedders=[blip,coca,clip_interrogator,retrieve,regressor]'": [
        *("captions.blip={blip}", "captions.coca={coca}", "captions.clip={clip}", "captions.term_lists={words}"),
        *("workers=0", "accelerator=cpu"),
    ],
    "python -m train.evaluate 'embedders=[checkpoints/vith14,checkpoints/vith14_336,ensemble]' out=both": [
        *("ensemble.folds=2", "workers=0", "accelerator=cpu")
    ],
    "python -m train.report run=checkpoints/quickstart": ["run=checkpoints/mine"],
    "python -m train.demo checkpoint=checkpoints/vith14/best": None,
    "python -m train.demo checkpoint=checkpoints/quickstart/best": None,  # tests/train/demo/test_demo.py starts it
    "python -m models.export checkpoint=both/ensemble wheels.python=3.11 out=kaggle": ["wheels.python=null"],
    "python kaggle/predict.py --images test/images --sample-submission sample_submission.csv --time-limit 8h30m "
    "--out submission.csv": [],
    "python -m models.export checkpoint=checkpoints/vith14 precision=fp16 flip=true 'sizes=[224,280]' out=views": [
        "sizes=[160,192]"
    ],
    "python -m models.export 'runtimes=[onnx,openvino,openvino_int8,torch]' check_images=data/sd2 out=served": [
        *("checkpoint=checkpoints/vith14/best", "check_images=photos")
    ],
    "python served/predict.py --images photos --backend openvino_int8 --format npy --out vectors.npy": [],
    "python -m models.export checkpoint=checkpoints/vith14 out=vith14 push=kaggle:user/im2emb-vith14": [],
    "python -m models.export checkpoint=checkpoints/vith14 out=vith14 push=hub:user/im2emb-vith14 licence=mit "
    "dry_run=false": None,  # tests/models/export/test_upload.py sends one
}
CONFIGS = {"datagen": "datagen", "train": "train", "datagen.report": "datagen_report"}


DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
RECIPES = ROOT / "docs/extending.md"  # tests/test_docs.py runs its commands, in a copy of the project that it changes


def commands(document: Path) -> list[str]:
    """Lines of a document's `sh` blocks, without comments."""
    blocks = re.findall(r"```sh\n(.*?)```", document.read_text(), re.DOTALL)
    lines = [line.split("#")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line]


def test_command_table_matches_documents() -> None:
    documented = {command for document in DOCUMENTS if document != RECIPES for command in commands(document)}
    assert documented == set(COMMANDS)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_commands_run_in_zsh(document: Path) -> None:
    assert not [command for command in commands(document) if expanded_by_zsh(command)]


@pytest.mark.parametrize("package", ["conf", "datagen", "models", "train"])
def test_commands_of_settings_files_and_docstrings_run_in_zsh(package: str) -> None:
    files = [*(ROOT / package).rglob("*.yaml"), *(ROOT / package).rglob("*.py")]
    lines = [line for file in files for line in file.read_text().splitlines()]
    matches = [re.match(r"[#\s]*(python -m .*?)(?:  .*| #.*)?$", line) for line in lines]
    shown_commands = [match[1] for match in matches if match]
    assert shown_commands
    assert not [command for command in shown_commands if expanded_by_zsh(command)]


def expanded_by_zsh(command: str) -> bool:
    """Whether zsh expands unquoted brackets, braces or wildcards of the command; it stops where no file matches."""
    return bool(re.search(r"[][*?{}~^<>]", re.sub(r"'[^']*'|\"[^\"]*\"", "", command)))


def test_readme_length_is_bounded() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 150
    assert max(map(len, lines)) <= 160


@pytest.mark.parametrize("target", ["install", "quickstart", "datagen", "train", "export", "test", "test-all", "lint"])
def test_makefile_targets(target: str) -> None:
    done = subprocess.run(["make", "-n", "-B", target], cwd=ROOT, capture_output=True, text=True, check=True)
    listed = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert target in listed
    assert ".venv" in done.stdout


@pytest.mark.slow  # minutes: some fifty commands in a row, each on what those before it wrote
def test_every_documented_command_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    # int8 changes a random network more than a trained one; how much depends on the CPU's instructions
    monkeypatch.setattr(runtimes, "INT8_BOUND", 0.5)
    places = {"sd2": tiny_sd2.build(tmp_path / "tiny").folder, "minilm": minilm_wheel()}
    places |= {name: getattr(tiny_captioners, name)(tmp_path / name) for name in ("blip", "coca", "clip", "words")}
    _photos(tmp_path)
    tiny_published.sd2_4m(tmp_path / "sd2_4m")
    tiny_published.diffusiondb(tmp_path / "diffusiondb")
    for command, overrides in COMMANDS.items():
        if overrides is None:
            continue
        small = [o.format(**places) for o in overrides]
        if "/predict.py" in command:
            subprocess.run([sys.executable, *shlex.split(command)[1:]], check=True)
            continue
        words = shlex.split(command.replace("make datagen", "python -m datagen"))
        module, given = words[2], words[3:]
        names = {o.split("=")[0] for o in small}
        given = [o for o in given if o.split("=")[0] not in names]
        main = command_module(module)
        values = compose(CONFIGS.get(module, module.split(".")[1] if "." in module else module), [*given, *small])
        assert not main.run({k: v for k, v in values.items() if k != "hydra"}), command
    assert np.load("vectors.npy").shape == (16, 384)
    assert Path("submission.csv").read_text().count("\n") == 1 + 384 * 4
    assert Path("submission.csv").read_text().splitlines()[1].startswith("t2_0,"), "the sample file's order"
    assert Path("checkpoints/mine/report.html").stat().st_size > 10_000
    assert Path("data/sd2.report.html").stat().st_size > 10_000


def _photos(folder: Path) -> None:
    """Images with captions, images to predict with a sample file, and a prompt file."""
    rng = np.random.default_rng(0)
    (folder / "photos").mkdir()
    (folder / "test/images").mkdir(parents=True)
    rows = ["file,caption,split"]
    for i in range(16):
        image = Image.fromarray(rng.integers(0, 256, (40, 48, 3), np.uint8))
        image.save(folder / f"photos/p{i}.png")
        rows += [f"p{i}.png,a {colour} square number {i},{'val' if i < 4 else 'train'}" for colour in ("red", "noisy")]
        if i < 4:
            image.save(folder / f"test/images/t{i}.png")
    ids = [f"t{i}_{e},0\n" for i in (2, 0, 3, 1) for e in range(384)]
    (folder / "sample_submission.csv").write_text("".join(["imgId_eId,val\n", *ids]))
    (folder / "captions.csv").write_text("\n".join(rows) + "\n")
    prompts = [f"a {c} {o}" for c in ("red", "blue", "green") for o in ("cat", "dog", "sailboat", "piano")]
    (folder / "prompts.csv").write_text("prompt\n" + "\n".join(prompts) + "\n")
