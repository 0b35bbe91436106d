"""Settings: conf files compose, convert strictly, and report all errors at once."""

import dataclasses
import importlib
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from core.cli import compose
from core.errors import UserError
from core.paths import ROOT
from core.settings import Values, settings
from tests.commands import run
from tests.test_readme import COMMANDS as DOCUMENTED
from tests.test_readme import CONFIGS


@dataclass(frozen=True)
class Inner:
    share: float

    def validate(self) -> list[str]:
        return [] if 0 <= self.share <= 1 else [f"share: {self.share} is outside 0 to 1"]


@dataclass(frozen=True)
class Outer:
    folder: Path
    count: int
    flag: bool
    kind: Literal["a", "b"]
    size: int | Literal["dataset"] | None
    rates: tuple[float, ...]
    inner: Inner
    rest: dict[str, int] = dataclasses.field(default_factory=dict)
    shares: dict[str, float] = dataclasses.field(default_factory=dict)
    parts: dict[str, Inner] = dataclasses.field(default_factory=dict)

    def validate(self) -> list[str]:
        return [] if self.count > 0 else [f"count: {self.count} is below 1"]


GOOD: dict[str, Any] = {
    "folder": "some/where",
    "count": 3,
    "flag": True,
    "kind": "b",
    "size": "dataset",
    "rates": [1, 0.5],
    "inner": {"share": 1},
}


def test_values_are_converted_to_class_types() -> None:
    made = settings(Outer, GOOD)
    assert made == Outer(Path("some/where"), 3, True, "b", "dataset", (1.0, 0.5), Inner(1.0))
    assert isinstance(made.inner.share, float)
    assert settings(Outer, {**GOOD, "size": None}).size is None
    assert settings(Outer, {**GOOD, "size": 64}).size == 64


def test_every_type_mismatch_is_reported_at_once() -> None:
    wrong = {**GOOD, "count": "three", "flag": 1, "kind": "c", "size": "big", "rates": [1, "x"], "inner": 3, "typo": 1}
    del wrong["folder"]
    with pytest.raises(UserError) as error:
        settings(Outer, wrong)
    text = str(error.value)
    for part in (
        "typo: unknown key; known here: folder, count",
        "folder: missing",
        "count: expected int, got 'three'",
        "flag: expected bool, got 1",
        "kind: 'c' is not one of a, b",
        "size: ",
        "rates[1]: expected float, got 'x'",
        "inner: expected a group of keys, got 3",
    ):
        assert f"\n  {part}" in text
    assert len(text.splitlines()) == 9


def test_free_keys_have_types() -> None:
    made = settings(Outer, {**GOOD, "shares": {"a": 1}, "parts": {"x": {"share": 0}}})
    assert (made.shares, made.parts) == ({"a": 1.0}, {"x": Inner(0.0)})
    assert isinstance(made.shares["a"], float)
    with pytest.raises(UserError) as error:
        settings(Outer, {**GOOD, "rest": {"n": "x"}, "shares": [1], "parts": {"x": {"shar": 1}, "y": 3}})
    for part in (
        "rest.n: expected int, got 'x'",
        "shares: expected a group of keys, got [1]",
        "parts.x.shar: unknown key; known here: share",
        "parts.x.share: missing",
        "parts.y: expected a group of keys, got 3",
    ):
        assert f"\n  {part}" in str(error.value)
    with pytest.raises(UserError, match=r"parts\.x\.share: 1\.5 is outside 0 to 1"):
        settings(Outer, {**GOOD, "parts": {"x": {"share": 1.5}}})


def test_booleans_are_not_numbers() -> None:
    with pytest.raises(UserError, match="count: expected int, got True"):
        settings(Outer, {**GOOD, "count": True})


def test_every_bound_is_reported_at_once() -> None:
    with pytest.raises(UserError) as error:
        settings(Outer, {**GOOD, "count": 0, "inner": {"share": 1.5}})
    assert "count: 0 is below 1" in str(error.value)
    assert "inner.share: 1.5 is outside 0 to 1" in str(error.value)


@dataclass(frozen=True)
class Curve:
    kind: Literal["flat", "steep"]
    slope: float | None
    rounded: bool

    def validate(self) -> list[str]:
        return [] if self.slope is None or self.slope > 0 else [f"slope: {self.slope} is not above 0"]

    def unused(self) -> dict[str, str]:
        return dict.fromkeys(("slope", "rounded"), "with kind=flat") if self.kind == "flat" else {}


@dataclass(frozen=True)
class Curves:
    first: Curve
    more: dict[str, Curve]
    count: int

    def unused(self) -> dict[str, str]:
        return {"more": "with count=1"} if self.count == 1 else {}


FLAT = {"kind": "flat", "slope": -1.0, "rounded": True}
STEEP = {**FLAT, "kind": "steep", "slope": 1.0}


def test_a_key_without_effect_is_refused_where_the_user_wrote_it() -> None:
    values = {"first": FLAT, "more": {"a": STEEP}, "count": 1}
    with pytest.raises(UserError) as error:
        settings(Curves, Values(values, ["first.slope", "first.rounded", "more.a.kind", "count"]))
    assert str(error.value).splitlines()[1:] == [
        "  first.slope: -1.0 is not above 0",
        "  first.rounded: has no effect with kind=flat; leave it out",
        "  first.slope: has no effect with kind=flat; leave it out",
        "  more.a.kind: has no effect with count=1; leave it out",
    ]


def test_a_key_without_effect_is_accepted_from_a_file() -> None:
    values = {"first": {**FLAT, "slope": 1.0}, "more": {"a": {**FLAT, "slope": 1.0}}, "count": 2}
    assert settings(Curves, values) == settings(Curves, Values(values, ["first.kind", "count"]))
    with pytest.raises(UserError, match=r"more\.a\.slope: has no effect with kind=flat; leave it out"):
        settings(Curves, Values(values, ["more.a.slope"]))


def test_written_keys_of_command_line() -> None:
    overrides = [
        *("optim.warmup=5", "+experiment=vith14", "loss={mse: 0.1, contrastive: 1}", "val=[a,b]"),
        *("init_from=null", "save_initial=false", "+data.sources={coco: 2}", "++scale.workers=0"),
    ]
    written = compose("train", overrides, by_user=True).written  # type: ignore[attr-defined]
    keys = {"optim.warmup", "experiment", "loss.mse", "loss.contrastive", "val", "data.sources.coco", "scale.workers"}
    assert written == keys, "null and false ask for nothing"


def test_the_command_refuses_settings_without_effect() -> None:
    done = run("train", "+experiment=vith14", "optim.schedule=onecycle", "optim.warmup=500", "loss.temperature=0.1")
    assert done.returncode == 2
    assert done.stderr == (
        "error: settings that cannot be used:\n"
        "  loss.temperature: has no effect with loss.contrastive=0: no other part of the loss has one; leave it out\n"
        "  optim.warmup: has no effect with optim.schedule=onecycle, whose own warm-up is three tenths of the run; "
        "leave it out\n"
    )


def names(group: str) -> list[str]:
    return sorted(p.stem for p in (ROOT / "conf" / group).glob("*.yaml"))


RUN = "run=checkpoints/x"
COMMANDS = [
    *(
        ("datagen", "datagen.config.DatagenSettings", [f"renderer={r}", f"prompts={p}", *more])
        for r in names("renderer")
        for p, more in ((p, ["prompts.path=x.txt"] if p in ("file", "openprompts") else []) for p in names("prompts"))
    ),
    ("train", "train.config.TrainSettings", []),
    *(("train", "train.config.TrainSettings", [f"+experiment={name}"]) for name in names("experiment")),
    ("evaluate", "train.config.EvaluateSettings", []),
    ("demo", "train.demo.app.DemoSettings", []),
    ("report", "train.tools.run_report.ReportSettings", [RUN]),
    ("runs", "train.tools.runs_table.RunsSettings", []),
    ("hard", "train.tools.hard_examples.HardSettings", [RUN]),
    ("interpolate", "train.tools.interpolation.InterpolateSettings", ["a=x", "b=y", "out=z"]),
    ("probe", "train.tools.probe_settings.ProbeSettings", []),
    ("export", "models.export.config.ExportSettings", []),
    ("index", "datagen.config.IndexSettings", ["out=x", "tars=y/*.tar"]),
    ("published", "datagen.config.PublishedSettings", ["name=sd2_4m", "out=x"]),
    ("targets", "datagen.config.TargetsSettings", ["out=x"]),
    ("verify", "datagen.config.VerifySettings", ["out=x"]),
    ("datagen_report", "datagen.config.ReportSettings", ["out=x"]),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "cls", "overrides"), COMMANDS, ids=[" ".join((n, *o)) for n, _, o in COMMANDS])
def test_every_file_composes_and_converts(name: str, cls: str, overrides: list[str]) -> None:
    module, _, class_name = cls.rpartition(".")
    values = compose(name, overrides)
    made = settings(getattr(importlib.import_module(module), class_name), values)
    settings(type(made), compose(name, overrides, by_user=True))  # what an experiment leaves without effect is accepted
    assert set(values) == {f.name for f in dataclasses.fields(made)}, "a key that only its default knows"


@pytest.mark.slow
def test_no_documented_command_has_a_setting_without_effect() -> None:
    classes = {name: cls for name, cls, _ in COMMANDS}
    for command in (c for c in DOCUMENTED if c.startswith("python -m")):
        module, *given = shlex.split(command)[2:]
        name = CONFIGS.get(module, module.rpartition(".")[2])
        place, _, class_name = classes[name].rpartition(".")
        message = ""
        try:
            settings(getattr(importlib.import_module(place), class_name), compose(name, given, by_user=True))
        except UserError as error:  # of folders that are not here
            message = str(error)
        assert "has no effect" not in message, command


def test_every_conf_file_is_tested() -> None:
    assert {name for name, _, _ in COMMANDS} == set(names(".")) - {"quiet"}


def test_an_unknown_key_of_an_experiment_is_refused() -> None:
    from train.config import TrainSettings

    with pytest.raises(UserError, match=r"optim\.learning_rate: unknown key"):
        settings(TrainSettings, compose("train", ["+experiment=quickstart", "+optim.learning_rate=1"]))


def test_settings_that_contradict_each_other_are_refused() -> None:
    from datagen.config import DatagenSettings, IndexSettings, PublishedSettings

    no_vectors = ("curate.dedup_threshold=null", "split.kind=image")
    for cls, name, overrides, said in (
        (DatagenSettings, "datagen", ["encoder=null"], "encoder: null, but curate.dedup_threshold"),
        (DatagenSettings, "datagen", ["num=0", "seed=-1", "workers=0"], "(?s)num: 0 .*workers: 0 .*seed: -1"),
        (DatagenSettings, "datagen", ["curate.max_tokens=3"], "curate.max_tokens: 3 is below min_tokens=5"),
        (DatagenSettings, "datagen", ["split.val_fraction=nan"], "split.val_fraction: nan is outside 0 to 1"),
        (DatagenSettings, "datagen", ["prompts=grammar", "prompts.objects=[0.5]"], "prompts.objects: the chances"),
        (PublishedSettings, "published", ["name=sd2", "out=x"], "name: 'sd2' is not one of diffusiondb, sd2_4m"),
        (
            PublishedSettings,
            "published",
            ["name=diffusiondb", "out=x", "num=0", "split.kind=holdout", "folder=y", "revision=z", "max_nsfw=-1"],
            "(?s)num: 0 is below 1.*max_nsfw: -1.*folder, revision: y has no.*holdout needs groups",
        ),
        (PublishedSettings, "published", ["name=sd2_4m", "out=x", "encoder=null"], "encoder: null, but curate"),
        (
            PublishedSettings,
            "published",
            ["name=sd2_4m", "out=x", "encoder=null", *no_vectors, "curate.exclude_near=[y]"],
            "encoder: null, but curate",
        ),
        (
            DatagenSettings,
            "datagen",
            ["prompts=file", "prompts.path=x.txt", "split.kind=holdout"],
            "split.kind: holdout needs groups, and prompts has no group_column; similarity needs none",
        ),
        (IndexSettings, "index", ["out=x"], "images, tars: give one of the two"),
        (IndexSettings, "index", ["out=x", "images=y"], "csv: missing"),
        (
            IndexSettings,
            "index",
            ["out=x", "tars=y", "split.kind=holdout"],
            "group_column: missing; split.kind=holdout",
        ),
    ):
        with pytest.raises(UserError, match=said):
            settings(cls, compose(name, overrides))


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ("optim.lr=0", "optim.lr: 0.0 is not above 0"),
        ("optim.lr=-1e-4", "optim.lr: -0.0001 is not above 0"),
        ("optim.lr=nan", "optim.lr: nan is not above 0"),
        ("optim.head_lr=0", "optim.head_lr: 0.0 is not above 0"),
        ("optim.layer_decay=1.5", "optim.layer_decay: 1.5 is not above 0 and at most 1"),
        ("optim.betas=[0.9]", "optim.betas"),
        ("optim.ema=1", "optim.ema: 1.0 is not from 0 to below 1"),
        ("fold=6/5", "fold: '6/5' is not i/n"),
        ("dataset_repeats=[1,2]", "dataset_repeats: 2 numbers for 1 datasets"),
        ("val=[data/sd2]", "val: data/sd2 is trained on, too"),
        ("seed=-1", "seed: -1 is below 0"),
        ("loss.hard_fraction=0", "loss.hard_fraction: 0.0 is not above 0"),
        ("data.crop=0", "data.crop: 0.0 is outside 0.05 to 1"),
        ("scale.micro_batch=0", "scale.micro_batch: 0 is below 1"),
    ],
)
def test_training_settings_out_of_bounds_are_named(wrong: str, words: str) -> None:
    from train.config import TrainSettings

    with pytest.raises(UserError, match=re.escape(words)):
        settings(TrainSettings, compose("train", [wrong]))


def test_holdout_takes_prompts_that_have_groups() -> None:
    from datagen.config import DatagenSettings

    mixture = ["split.kind=holdout", "+prompts@prompts.sources.scenes.prompts=grammar", "prompts.sources.coco.weight=0"]
    mixture += ["+prompts.sources.scenes.weight=0.15", "prompts.sources.vizwiz.prompts.group_column=image_id"]
    with pytest.raises(UserError, match=r"split\.kind: holdout needs groups, and .* have no group_column") as error:
        settings(DatagenSettings, compose("datagen", mixture))
    names = [f"prompts.sources.{name}.prompts" for name in ("diffusiondb", "gustavosta", "flickr30k", "narratives")]
    assert f"and {', '.join(names)} have" in str(error.value)
    for good in (
        ["prompts=grammar"],
        ["prompts=file", "prompts.path=x.csv", "prompts.group_column=subject"],
        mixture + [f"{name}.group_column=id" for name in names],
    ):
        assert settings(DatagenSettings, compose("datagen", [*good, "split.kind=holdout"])).split.kind == "holdout"


def test_printing_settings_is_quick_and_loads_no_torch() -> None:
    done = run("train", "+experiment=vith14", "--cfg", "job", "--resolve", PYTHONPROFILEIMPORTTIME="1")
    assert done.returncode == 0
    assert "vit_huge_patch14_clip_224" in done.stdout
    assert "out: checkpoints/vith14" in done.stdout
    loaded = set(re.findall(r"\| +([\w.]+)$", done.stderr, re.MULTILINE))
    assert "train.config" in loaded
    assert not {m.partition(".")[0] for m in loaded} & {"torch", "lightning", "timm", "numpy"}


def test_missing_command_line_keys_are_named() -> None:
    # hard's `out` is interpolated from the `run` that is missing
    code = "from core.cli import command; command('hard', print)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: missing on the command line: run=…\n"


def test_foreign_packages_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from core import cli

    cli._refuse_foreign_packages()
    for kind in ("package", "namespace"):
        (tmp_path / kind / "models").mkdir(parents=True)
    (tmp_path / "package" / "models" / "__init__.py").touch()
    for kind in ("package", "namespace"):
        with monkeypatch.context() as patch:
            patch.syspath_prepend(tmp_path / kind)
            for name in [m for m in sys.modules if m == "models" or m.startswith("models.")]:
                patch.delitem(sys.modules, name)
            patch.setattr(sys, "path", [p for p in sys.path if Path(p).resolve() != ROOT])
            with pytest.raises(SystemExit, match=f"'models' comes from {tmp_path / kind / 'models'}, not from"):
                cli._refuse_foreign_packages()
