"""Page of an evaluation: agrees with the folder, opens in a browser, and makes no external requests."""

import html
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.metrics.pairwise import cosine_similarity

from core.cli import compose
from core.errors import UserError
from core.paths import ROOT
from core.settings import settings
from datagen.dataset.reader import Dataset
from models.metrics import bootstrap
from tests import evaluated, small_dataset
from train.config import EvaluateSettings
from train.evaluate import report
from train.evaluate.evaluate import evaluate
from train.evaluate.results import kinds_of, read_evaluation, trend

if TYPE_CHECKING:
    from tests.browser import Opened

pytest_plugins = ["tests.browser", "tests.tiny_run"]

JUDGED = 60
HOSTILE = '<script>alert("x")</script>'
SHARES = {"regressor": 0.7, "blip": 0.5}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """60 validation images, of prompts of one to twelve words; those of training are hostile."""
    root = small_dataset.write(tmp_path_factory.mktemp("data") / "squares", train=20, val=JUDGED, size=32)
    plan = pq.read_table(root / "prompts.parquet")
    prompts = [
        f"{HOSTILE} {text}" if split == "train" else " ".join([f"image{i}", *["word"] * (i % 12)])
        for i, (text, split) in enumerate(zip(plan["prompt"].to_pylist(), plan["split"].to_pylist(), strict=True))
    ]
    pq.write_table(plan.set_column(2, "prompt", pa.array(prompts)), root / "prompts.parquet")
    return Dataset(root, small_dataset.ENCODER)


def write(folder: Path, dataset: Dataset, **more: Any) -> Path:
    """Write an evaluation of a regressor, BLIP with hostile captions, and the mean."""
    rng = np.random.default_rng(3)
    vectors = {
        name: evaluated.at([dataset], np.clip(rng.normal(share, 0.15, JUDGED), -1, 1), seed)
        for seed, (name, share) in enumerate(SHARES.items())
    }
    vectors["mean"] = evaluated.at([dataset], 0.3, 9)
    nearest = [None, *rng.uniform(0.2, 0.9, JUDGED - 1).round(6).tolist()]
    texts = {"blip": [f"{HOSTILE} said {n}" for n in range(JUDGED)]}
    return evaluated.write(folder, [dataset], vectors, nearest=nearest, texts=texts, **more)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, dataset: Dataset) -> Path:
    weights = {"regressor": 0.75, "blip": 0.25}
    told = {"members": list(weights), "weights": weights, "folds": 5, "single": {"regressor": 0.7, "blip": 0.5}}
    return write(tmp_path_factory.mktemp("evaluation") / "scores", dataset, ensemble=told)


@pytest.fixture(scope="module")
def page(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return report.write(folder, tmp_path_factory.mktemp("page") / "deep" / "report.html")


def sections(page: Path) -> dict[str, str]:
    actual = re.findall(r'<section id="([^"]+)">(.*?)\n</section>', page.read_text(), re.DOTALL)
    return dict(actual)


def cells(section: str) -> list[list[str]]:
    """Sort keys of the rows of a section's tables."""
    return [re.findall(r'data-sort="([^"]*)"', row) for row in re.findall(r"<tr>(.*?)</tr>", section, re.DOTALL)]


@pytest.mark.slow
def test_page_has_every_section(page: Path, folder: Path) -> None:
    info = json.loads((folder / "evaluation.json").read_text())
    parts = sections(page)
    rows = {name: cells(text) for name, text in parts.items()}
    for score in info["scores"]:
        assert [score["name"], *(repr(score[k]) for k in ("mean", "low", "high")), "1.5"] in rows["scores"]
    for pair in info["pairs"]:
        numbers = [repr(pair[k]) for k in ("difference", "low", "high")]
        assert [pair["a"], pair["b"], *numbers, "yes" if pair["low"] > 0 else "no"] in rows["paired-differences"]
    for actual in info["retrieval"]["scores"]:
        assert [actual["name"], *(repr(100 * actual[k]) for k in ("r1", "r5", "r10"))] in rows["retrieval"]
    for kind in ("prompt length", "source"):
        for group in info["breakdown"][kind]:
            means = [repr(group["scores"][name]["mean"]) for name in ("regressor", "blip", "mean")]
            assert [group["name"], repr(float(group["images"])), *means] in rows["breakdown"]
    assert ["blip", "0.25", "0.5"] in rows["ensemble"]
    for name in ("score-by-prompt-length", "score-by-distance-to-training", "prompts", "scores-of-single-images"):
        assert parts[name].count("<svg") == 2, name
    assert "Unknown for 1 images." in parts["score-by-distance-to-training"]
    assert "Unknown for" not in parts["score-by-prompt-length"]
    assert re.search(r'title="\d+">word<', parts["prompts"])
    assert info["datasets"][0]["sha256"] in parts["settings"]


@pytest.mark.slow
def test_differences_are_main_minus_other(folder: Path, tmp_path: Path, dataset: Dataset) -> None:
    """The sign is correct if the other embedder is better."""
    write(tmp_path / "other", dataset, main="blip")
    text = sections(report.write(tmp_path / "other", tmp_path / "report.html"))["paired-differences"]
    mean = {score["name"]: score["mean"] for score in json.loads((folder / "evaluation.json").read_text())["scores"]}
    over = {name: f"{mean['blip'] - mean[name]:+.3f}".replace("-", "−") for name in ("mean", "regressor")}
    assert over["regressor"].startswith("−")
    assert all(text.count(f">{value}</text>") == 2 for value in over.values()), over


def test_similarity_matrix_matches_scikit_learn(page: Path, folder: Path, dataset: Dataset) -> None:
    text = sections(page)["similarity-matrix"]
    shown = json.loads(html.unescape(re.findall(r'class="grid"[^>]*data-values="([^"]*)"', text)[0]))
    names = re.findall(r'<li title="([^"]*)"', text)
    rows = dataset.rows("val").tolist()
    prompts = [dataset.prompts(row)[0] for row in rows]
    sample = [prompts.index(name) for name in names]
    assert len(set(sample)) == 24
    z_NE = np.load(folder / "predictions/regressor.npy")
    expected = cosine_similarity(z_NE[sample], np.stack([dataset.target(rows[n]) for n in sample]))
    np.testing.assert_allclose([[float(v.replace("−", "-")) for v in row] for row in shown], expected, atol=6e-4)


def test_trend_matches_group_means() -> None:
    score_GN = np.random.default_rng(0).normal(size=(5, 20))
    x_GN = np.arange(5.0)[:, None] / 4 + np.linspace(0, 0.1, 20)
    x_G, mean_G, low_G, high_G = trend(x_GN.ravel(), score_GN.ravel(), np.arange(100))
    np.testing.assert_allclose(x_G, x_GN.mean(1))
    np.testing.assert_allclose(mean_G, score_GN.mean(1))
    expected = [bootstrap(score_N) for score_N in score_GN]
    np.testing.assert_allclose(np.transpose([low_G, high_G]), [one[1:] for one in expected])
    at_one_place = trend(np.full(30, 7.0), score_GN.ravel()[:30], np.arange(30))
    assert [part.tolist() for part in at_one_place] == [[7.0], *([value] for value in bootstrap(score_GN.ravel()[:30]))]


def test_the_gallery_has_the_best_the_worst_and_the_widest_gaps(folder: Path) -> None:
    evaluation = read_evaluation(folder, "")
    own, other = (evaluation.scores[name].astype(float) for name in ("regressor", "blip"))
    kinds = kinds_of(evaluation, 8)
    of_kind = {kind: {n for n, names in kinds.items() if kind in names} for names in kinds.values() for kind in names}
    order, gaps = np.argsort(-own), np.argsort(-(own - other))
    assert of_kind == {
        "Best": set(order[:8].tolist()),
        "Middle": set(order[26:34].tolist()),
        "Worst": set(order[-8:].tolist()),
        "Above blip": set(gaps[:4].tolist()),
        "Below blip": set(gaps[-4:].tolist()),
    }


def test_cards_show_every_score_and_text(page: Path, folder: Path, dataset: Dataset) -> None:
    text = sections(page)["best-and-worst-predictions"]
    cards = re.findall(r"<figure data-values.*?</figure>", text, re.DOTALL)
    assert 24 <= len(cards) <= 32
    keys = [dataset.prompts(row)[0] for row in dataset.rows("val").tolist()]
    scores = {name: np.load(folder / f"scores/{name}.npy") for name in ("regressor", "blip", "mean")}
    known = json.loads((folder / "pictures.json").read_text())
    for card in cards:
        n = keys.index(re.findall(r'class="title">([^<]*)<', card)[0])
        values = json.loads(html.unescape(re.findall(r'data-values="([^"]*)"', card)[0]))
        assert values == {
            **{name: pytest.approx(float(score_N[n]), abs=1e-6) for name, score_N in scores.items()},
            "Prompt length, words": known["words"][n],
            "Nearest training prompt, cosine": known["nearest"][n],
        }
        assert f"<b>blip</b> {html.escape(HOSTILE).replace('&quot;', '&#34;')} said {n}<" in card
        assert card.count('class="lead-figure"') == 3 + 3  # systems, nearest prompts
        assert "Nearest other prompts" in card  # those of training, which were not evaluated
        assert "&lt;script&gt;" in card.partition("Nearest other prompts")[2]


def test_prompts_are_escaped_and_page_is_deterministic(page: Path, folder: Path, tmp_path: Path) -> None:
    assert HOSTILE not in page.read_text()
    assert page.read_text().count("<script>") == 1
    assert report.write(folder, tmp_path / "again.html").read_bytes() == page.read_bytes()
    assert page.stat().st_size < 3e6


@pytest.mark.slow
def test_page_of_a_single_embedder(dataset: Dataset, tmp_path: Path) -> None:
    """No pairs, no ensemble, no training prompts, no source twice."""
    evaluated.write(tmp_path / "alone", [dataset], {"regressor": evaluated.at([dataset], 0.6)})
    parts = sections(report.write(tmp_path / "alone", tmp_path / "report.html"))
    assert not {"paired-differences", "ensemble"} & set(parts)
    assert "Unknown for these images." in parts["score-by-distance-to-training"]
    assert "minus" in parts["best-and-worst-predictions"]


@pytest.mark.slow
def test_nearest_prompts_come_from_given_images(folder: Path, dataset: Dataset, tmp_path: Path) -> None:
    known = [(dataset, dataset.rows("val"))]
    text = sections(report.write(folder, tmp_path / "report.html", known))["best-and-worst-predictions"]
    cards = re.findall(r"<figure data-values.*?</figure>", text, re.DOTALL)
    first = re.findall(r'class="title">([^<]*)<', cards[0])[0]
    assert f"<span>{first}</span>" in cards[0].partition("Nearest training prompts")[2]


@pytest.mark.parametrize("missing", ["pairs", "breakdown", "retrieval", "ensemble", "leakage"])
def test_evaluation_of_earlier_format_is_refused(dataset: Dataset, tmp_path: Path, missing: str) -> None:
    old = write(tmp_path / "old", dataset)
    info = json.loads((old / "evaluation.json").read_text())
    del info[missing]
    (old / "evaluation.json").write_text(json.dumps(info))
    with pytest.raises(UserError, match=rf"evaluation.json lacks {missing}; evaluate again: python -m train.evaluate"):
        report.write(old, tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_inconsistent_folder_is_refused(dataset: Dataset, tmp_path: Path) -> None:
    bad = write(tmp_path / "bad", dataset)
    out = tmp_path / "report.html"
    (bad / "texts/blip.json").write_text('["one"]')
    np.save(bad / "scores/mean.npy", np.zeros(59, np.float32))
    with pytest.raises(UserError, match=r"60 keys, but 59 scores of mean, 1 texts of blip; evaluate again"):
        report.write(bad, out)
    (bad / "texts/blip.json").write_text('["one"')
    with pytest.raises(UserError, match=r"blip\.json is not valid JSON"):
        report.write(bad, out)
    (bad / "scores/mean.npy").write_bytes(b"no array")
    with pytest.raises(UserError, match=r"mean\.npy is not a NumPy array"):
        report.write(bad, out)
    good = write(tmp_path / "good", dataset)
    np.save(good / "predictions/regressor.npy", np.ones((JUDGED, 5), np.float32))
    with pytest.raises(UserError, match=r"the predictions are \[5\] wide, the targets of .* 384"):
        report.write(good, out)


@pytest.mark.slow
def test_the_page_opens_and_sorts_in_a_browser(page: Path, folder: Path, dataset: Dataset, opened: "Opened") -> None:
    prompts = [dataset.prompts(row)[0] for row in dataset.rows("val").tolist()]
    scores = {name: dict(zip(prompts, np.load(folder / f"scores/{name}.npy"), strict=True)) for name in SHARES}
    for width, scheme in ((1280, "light"), (390, "dark")):
        tab = opened(page, width, scheme)
        assert tab.evaluate("document.documentElement.scrollWidth") == width  # nothing sticks out
        titles = tab.locator("#best-and-worst-predictions .gallery .title")
        assert titles.all_inner_texts() == sorted(titles.all_inner_texts(), key=lambda p: -scores["regressor"][p])
        tab.locator(".by").select_option("blip")
        tab.locator(".minus").select_option("regressor")
        tab.locator(".order").click()
        gaps = [float(scores["blip"][p] - scores["regressor"][p]) for p in titles.all_inner_texts()]
        assert gaps == sorted(gaps)
        tab.locator(".kind").select_option("Above blip")
        assert tab.locator(".count").inner_text().startswith("4 of ")
        table = tab.locator("#scores table")
        table.locator("thead button").first.click()
        assert table.locator("tbody th").all_inner_texts() == ["blip", "mean", "regressor"]
    assert not opened.errors
    assert {url for url in opened.requests if not url.startswith("data:")} == {page.as_uri()}


@pytest.mark.slow
def test_page_is_written_without_torch() -> None:
    code = (
        "import sys, train.evaluate.report; assert not {'torch', 'matplotlib', 'hydra', 'wordcloud'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.slow
def test_evaluator_writes_all_files_of_the_page(tiny_run: Path, tmp_path: Path) -> None:
    values = compose("evaluate", [f"run={tiny_run}", f"out={tmp_path}", "accelerator=cpu", "workers=0"])
    evaluate(settings(EvaluateSettings, values))
    page = report.write(tmp_path, tmp_path / "again.html")
    assert {row[0] for row in cells(sections(page)["scores"])[1:]} == {"mean", "knn", "ridge", "regressor"}
    assert "Not known" not in sections(page)["score-by-distance-to-training"]
