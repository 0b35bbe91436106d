"""HTML report of a dataset: images, prompt sources, dropped prompts, splits, and rendering speed.

    python -m datagen.report out=data/sd2

Reads `dataset.json`, the plan, the index, the log next to the dataset, and the images that it shows. Sections without
data, as for an indexed dataset or one of an older version, are left out.
"""

import logging
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from core.paths import Place, beside, located
from core.renamed_settings import DATASET_FILES, with_new_names, with_new_names_in_text
from datagen.config import ReportSettings
from datagen.dataset.format import FAULTY, LEFT_OUT, CorruptImage
from datagen.dataset.reader import Dataset, missing_shards, read_notes, read_plan
from datagen.prompts.clip_tokenizer import CONTEXT, token_counts
from report.inputs import decodable, duration, read_log, require_packages

if TYPE_CHECKING:
    from report import Page

log = logging.getLogger(__name__)

_SPLITS = {"train": "Training", "val": "Validation", FAULTY: "Faulty", LEFT_OUT: "Left out of training"}
_NOTES = {
    "redrawn": ("Drawn again", "black, constant or NaN at first, good when drawn again at higher precision"),
    "constant": ("Constant", "one colour at the highest precision too, and kept"),
    "redraw": ("Not drawn again", "for want of memory, though NaN or constant"),
    "batch_size": ("Smaller batches", "for want of memory: float sums differ from the other images'"),
    "fault": ("Faulty", "NaN at the highest precision too, or broken where it came from: in no split"),
}
"""Renderer note → heading and explanation."""


class _Prompts:
    """Prompts of the plan, looked up by id or sampled."""

    def __init__(self, root: Place) -> None:
        plan = read_plan(root)
        # Rows of one prompt_id, one per image, are one prompt.
        self._ids, firsts = np.unique(plan["prompt_id"].to_numpy(), return_index=True)
        self._texts = plan["prompt"].take(firsts)
        self._sources = plan["source"].take(firsts)

    def __len__(self) -> int:
        return len(self._ids)

    def texts(self, prompt_ids: NDArray[np.int64]) -> list[str]:
        return self._texts.take(np.searchsorted(self._ids, prompt_ids)).to_pylist()

    def sample(self, count: int, seed: int) -> list[str]:
        rows = np.random.default_rng(seed).permutation(len(self._ids))[:count]
        return self._texts.take(np.sort(rows)).to_pylist()

    def by_source(self) -> dict[str, int]:
        return {row["values"]: row["counts"] for row in self._sources.value_counts().to_pylist()}


@dataclass(frozen=True)
class Work:
    """Timing of the rendering from the log of S shards; the clock stops between runs."""

    starts: NDArray[np.float64]
    """Second of work at which each shard started, [S]."""
    ends: NDArray[np.float64]
    """Second of work at which each shard was done, [S]."""
    images: NDArray[np.int64]
    """Number of images of each shard, [S]."""
    resumed: list[float]
    """Seconds of work at which a run resumed after a pause."""
    notes: dict[str, dict[int, int]]
    """Note → shard → number of images with it."""
    failed: dict[int, str]
    """Failed shard → its last error."""

    @property
    def seconds(self) -> float:
        return float(self.ends.max(initial=0))

    @property
    def rate(self) -> float:
        """Images per second."""
        return float(self.images.sum()) / self.seconds if self.seconds else 0.0


def read_work(records: Sequence[Mapping[str, Any]], shard_count: int) -> Work:
    """Convert log records of any number of runs and parallel jobs into `Work`.

    A shard's work starts at its end minus its seconds; time without work on any shard does not count. Records before a
    run with all `shard_count` shards to do belong to an earlier dataset of the same name.
    """
    done: dict[int, Mapping[str, Any]] = {}
    failed: dict[int, str] = {}
    for record in records:
        if record.get("event") == "began" and record["shards"] == shard_count:
            done, failed = {}, {}
        elif record.get("event") == "shard":
            done[record["shard"]] = record  # rendered again: the last record counts
            failed.pop(record["shard"], None)
        elif record.get("event") == "failed":
            failed[record["shard"]] = (record["error"].splitlines() or [""])[-1]
    records_done = sorted(done.values(), key=lambda record: record["time"] - record["seconds"])
    start_S = np.array([record["time"] - record["seconds"] for record in records_done])
    end_S = np.array([record["time"] for record in records_done])
    idle_S = np.zeros(len(records_done))
    resumed = []
    if len(records_done):
        latest_S = np.maximum.accumulate(end_S)
        gap_S = np.concatenate([[start_S[0]], np.maximum(start_S[1:] - latest_S[:-1], 0)])
        idle_S = np.cumsum(gap_S)
        # Between two shards of one run a moment passes; a pause is longer than any such moment.
        pause = max(60.0, float(np.median(end_S - start_S)))
        resumed = (start_S - idle_S)[1:][gap_S[1:] > pause].tolist()
    notes: dict[str, dict[int, int]] = defaultdict(dict)
    for number, record in sorted(done.items()):
        for note, count in record.get("notes", {}).items():
            notes[note][number] = count
    images_S = np.array([record["pictures"] for record in records_done], np.int64)
    return Work(start_S - idle_S, end_S - idle_S, images_S, resumed, dict(notes), failed)


def write_report(cfg: ReportSettings) -> Path:
    """Write the page, log its absolute path and return it.

    Raises:
        UserError: the dataset is missing or damaged, or a package is missing.
    """
    require_packages("wordcloud")
    from report import Page

    root = located(cfg.out)
    dataset = Dataset(root, whole=False, partial=True)
    prompts = _Prompts(root)
    info = dataset.info
    log_path = beside(root, ".log.jsonl")
    records = read_log(log_path, "remove it, or fix the line") if log_path.exists() else []
    work = read_work(records, info["shards"]) if records else None
    shards_done = info["shards"] - len(missing_shards(root, info))

    page = Page(f"Dataset {_name(root)}", _subtitle(info))
    page.facts(_headline(dataset, prompts, work, shards_done))
    if shards_done < info["shards"]:
        page.note(
            f"{shards_done:,} of {info['shards']:,} shards are done: the page shows what is rendered so far, and the "
            f"prompts of the whole plan."
        )
    _images(page, cfg, dataset, prompts)
    _lengths_and_words(page, cfg, prompts, info.get("curation", {}))
    _sources(page, prompts, info.get("curation", {}))
    _dropped(page, info.get("curation", {}))
    if left_out := info.get("curation", {}).get("pictures_left_out"):
        page.section("Images left out", "What of the published set is not here, and why.")
        page.table(["Reason", "Images"], _by_count(left_out))
    _splits(page, info)
    if work and len(work.starts):
        _rate(page, work)
    _faults(page, cfg, dataset, prompts, work)
    if work and work.failed:
        page.section("Failed shards", "Their last errors; the command that rendered the others tries them again.")
        page.table(["Shard", "Error"], [[f"{n:06d}", error] for n, error in sorted(work.failed.items())])
    page.section("Settings", "All that decided the dataset.")
    origin = {"prompt sources": info["provenance"]} if info.get("provenance") else {}
    batch = {"batch_size": info["batch_size"]} if "batch_size" in info else {}
    page.settings({**with_new_names(DATASET_FILES, info.get("settings", {})), **batch, **origin})
    path = page.write(cfg.page or beside(root, ".report.html"))
    log.info("report: %s", path)
    return path


def _name(root: Place) -> str:
    return root.absolute().name if isinstance(root, Path) else root.name  # "." has no name


def _subtitle(info: Mapping[str, Any]) -> str:
    settings = info.get("settings", {})
    renderer = settings.get("renderer", {})
    if renderer:
        size = f", {renderer['size']} px" if "size" in renderer else ""
        return f"{renderer.get('name', 'rendered')}{size}"
    if "published" in settings:
        return f"the published set {settings['published']}"
    origin = settings.get("index")
    return f"indexed from {next(iter(origin.values()))}" if origin else ""


def _headline(dataset: Dataset, prompts: _Prompts, work: Work | None, shards_done: int) -> dict[str, tuple[str, str]]:
    info, splits = dataset.info, dataset.splits
    planned = info["pictures"]
    complete = shards_done == info["shards"]
    shown = (f"{planned:,}", "") if complete else (f"{len(dataset):,}", f"of {planned:,} planned")
    facts = {"Images": shown, "Prompts": (f"{len(prompts):,}", _seeds(planned, len(prompts)))}
    sides = [(_SPLITS.get(name, name), f"{splits[name]:,}") for name in _in_order(splits) if name != LEFT_OUT]
    if sides:
        (first, count), *others = sides
        facts[first] = (count, ", ".join(f"{other} for {name.lower()}" for name, other in others))
    if LEFT_OUT in splits:
        facts["Left out of training"] = (f"{splits[LEFT_OUT]:,}", f"{_percent(splits[LEFT_OUT], len(dataset))} of all")
    leaks = {pair: counts["affected"] for pair, counts in info.get("leakage", {}).items() if counts["affected"]}
    if leaks:
        facts["Leakage"] = (f"{sum(leaks.values()):,}", "images with a prompt or bytes of another split")
    curation = info.get("curation", {})
    if curation.get("drawn"):
        dropped = sum(curation.get("dropped", {}).values())
        facts["Prompts dropped"] = (_percent(dropped, curation["drawn"]), f"{dropped:,} of {curation['drawn']:,} drawn")
    if work and work.rate:
        facts["Rate"] = (f"{work.rate:.3g} /s", f"{duration(work.seconds)} of work")
    if work or FAULTY in splits:
        noted = {note: sum(counts.values()) for note, counts in work.notes.items()} if work else {}
        bad = splits.get(FAULTY, 0)
        redrawn, constant = noted.get("redrawn", 0), noted.get("constant", 0)
        meant = f"{redrawn:,} redrawn, {constant:,} constant, {bad:,} faulty" if redrawn + constant + bad else ""
        facts["Black or broken"] = (f"{redrawn + constant + bad:,}", meant)
    return facts


def _by_count(counts: Mapping[str, int]) -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


def _percent(part: int, whole: int) -> str:
    share = 100 * part / whole if whole else 0.0
    return f"{share:.1f} %" if share >= 1 or not share else f"{share:.2g} %"


def _in_order(splits: Iterable[str]) -> list[str]:
    """Sort split names, training first, without the faulty images."""
    return sorted((name for name in splits if name != FAULTY), key=lambda name: (name != "train", name))


def _seeds(images: int, prompts: int) -> str:
    if not prompts or images == prompts:
        return ""
    if images > prompts:
        return f"{images / prompts:.3g} images of each"
    return f"{prompts / images:.3g} an image"


def _images(page: "Page", cfg: ReportSettings, dataset: Dataset, prompts: _Prompts) -> None:
    rng = np.random.default_rng(cfg.seed)
    unreadable: list[str] = []
    page.section("Images", "Drawn at random, with their prompts.")
    if not len(dataset):
        page.note("None is rendered yet.")
    order = _in_order(dataset.splits)
    for name in order:
        rows = dataset.rows(name)
        limit = cfg.images if name == order[0] else -(-cfg.images // 2)
        drawn = rng.permutation(rows).tolist()
        images = decodable(drawn, min(limit, len(rows)), dataset.image_bytes, unreadable, (CorruptImage,))
        captions = [_captions(dataset, prompts, i) for i in images]
        page.contact_sheet(images.values(), captions, f"{_SPLITS.get(name, name)}: {len(images):,} of {len(rows):,}")
        if len(unreadable) > cfg.images:
            break  # the disk may be gone: do not list a million images
    if unreadable:
        page.note(
            f"Not shown, because they could not be read: {len(unreadable)}, such as {unreadable[0]}. "
            f"All of them: python -m datagen.verify out={dataset.root}"
        )


def _captions(dataset: Dataset, prompts: _Prompts, i: int) -> str:
    return " / ".join(prompts.texts(dataset.prompt_ids(i)))


def _lengths_and_words(page: "Page", cfg: ReportSettings, prompts: _Prompts, curation: Mapping[str, Any]) -> None:
    from wordcloud import WordCloud

    from report import plots

    texts = prompts.sample(cfg.counted, cfg.seed)
    sampled = f"{len(texts):,} prompts" + (f" drawn at random of {len(prompts):,}" if len(texts) < len(prompts) else "")
    length_N = token_counts(texts)
    over = int((length_N > CONTEXT).sum())
    page.section("Prompt lengths", f"CLIP tokens of {sampled}, start and end included.")
    low, middle, high = np.quantile(length_N, [0.05, 0.5, 0.95])
    spread = f"Half of the prompts have up to {middle:.0f} tokens, nine in ten {low:.0f} to {high:.0f}."
    over_context = curation.get("over_77_tokens")
    if over_context is not None:
        cut = f"{over_context:,} of the whole plan are"
    else:
        cut = f"{over:,} of these ({_percent(over, len(texts))}) are" if over else "None is"
    page.figure(
        plots.histogram(
            length_N, "CLIP tokens", count_label="Prompts", limit=(CONTEXT, f"{CONTEXT}: the rest is not read")
        ),
        f"{spread} {cut} longer than the {CONTEXT} that the text encoder reads.",
    )
    counts = WordCloud(collocations=False, min_word_length=2).process_text("\n".join(texts))
    if counts:
        page.section("Words", f"The most frequent words of {sampled}; point at one for its count.")
        page.words(counts)


def _sources(page: "Page", prompts: _Prompts, curation: Mapping[str, Any]) -> None:
    from report import plots

    counts_of: Mapping[str, Mapping[str, int]] = curation.get("sources", {})
    if counts_of:
        ranked = sorted(counts_of.items(), key=lambda item: (-item[1]["kept"], item[0]))
        page.section("Prompt sources", "What was drawn of each (grey) and kept (blue).")
        kept, drawn = ([counts[key] for _, counts in ranked] for key in ("kept", "drawn"))
        page.figure(plots.bars([name for name, _ in ranked], kept, drawn, label="Prompts"), "", _spoken(ranked))
        return
    counted = _by_count(prompts.by_source())
    page.section("Prompt sources", "Where the prompts of the plan come from.")
    spoken = ", ".join(f"{name} {count:,}" for name, count in counted)
    page.figure(
        plots.bars([name or "not named" for name, _ in counted], [n for _, n in counted], label="Prompts"), "", spoken
    )


def _spoken(ranked: Iterable[tuple[str, Mapping[str, int]]]) -> str:
    return ", ".join(f"{name}: {counts['kept']:,} kept of {counts['drawn']:,}" for name, counts in ranked)


def _dropped(page: "Page", curation: Mapping[str, Any]) -> None:
    drawn, recorded = curation.get("drawn", 0), curation.get("dropped", {})
    dropped = {with_new_names_in_text(DATASET_FILES, reason): count for reason, count in recorded.items()}
    if not drawn or not dropped:
        return
    from report import plots

    ranked = _by_count(dropped)
    total = sum(dropped.values())
    page.section(
        "Dropped prompts", f"{total:,} of {drawn:,} prompts drawn ({_percent(total, drawn)}) were left out, and why."
    )
    spoken = ", ".join(f"{reason}: {count:,}" for reason, count in ranked)
    page.figure(plots.bars([reason for reason, _ in ranked], [n for _, n in ranked], label="Prompts"), "", spoken)
    examples: Mapping[str, Sequence[str]] = curation.get("examples", {})
    examples = {with_new_names_in_text(DATASET_FILES, reason): texts for reason, texts in examples.items()}
    shown = {
        reason: (f"{len(texts)} of {count:,}", texts) for reason, count in ranked if (texts := examples.get(reason))
    }
    if shown:
        page.lists(shown, opened=1)


def _splits(page: "Page", info: Mapping[str, Any]) -> None:
    """Add the section on images outside the splits and the section on leakage between splits."""
    leaks: Mapping[str, Mapping[str, int]] = info.get("leakage", {})
    if left_out := info.get("left_out"):
        page.section("Images left out of training", "Each is listed in the log beside the dataset, with the reason.")
        page.table(["Reason", "Images"], _by_count(left_out))
    if leaks:
        page.section(
            "Leakage",
            "Prompts (case, punctuation and spaces aside) and image bytes that two splits share, and the images of the "
            "second split that are affected. Only a split of your own can share any.",
        )
        page.table(
            ["Splits", "Prompts", "Image bytes", "Images affected"],
            [
                [pair.replace("/", " and "), counts["prompts"], counts.get("images"), counts["affected"]]
                for pair, counts in leaks.items()
            ],
        )


def _rate(page: "Page", work: Work) -> None:
    from report import plots

    page.section("Rate", "Images per second of working time; pauses between runs are left out.")
    pauses = " Dotted: where a run went on after a pause." if work.resumed else ""
    shards_done = len(work.starts)
    page.figure(
        plots.rate(work.starts, work.ends, work.images, label="Images per second", resumed=work.resumed),
        f"{work.images.sum():,} images in {shards_done:,} shards, {duration(work.seconds)} of work.{pauses}",
    )


def _faults(page: "Page", cfg: ReportSettings, dataset: Dataset, prompts: _Prompts, work: Work | None) -> None:
    """Add the section on renderer notes: counts and example images."""
    splits = dataset.splits
    counts = Counter(
        {note: sum(shards.values()) for note, shards in work.notes.items() if note in _NOTES} if work else {}
    )
    if FAULTY in splits:
        counts["fault"] = splits[FAULTY]  # from the index, which needs no log
    if not counts:
        if work:
            page.section("Black and broken images", "None: no image was black, constant or NaN.")
        return
    page.section("Black and broken images", "What came out black, constant, NaN or damaged, and what became of it.")
    page.table(
        ["What", "Images", "Share", "Meaning"],
        [[_NOTES[n][0], counts[n], _percent(counts[n], len(dataset)), _NOTES[n][1]] for n in _NOTES if counts[n]],
    )
    unreadable: list[str] = []
    for note, numbers in _noted(cfg, dataset, work).items():
        images = decodable(numbers[: 4 * cfg.faults], cfg.faults, dataset.image_bytes, unreadable, (CorruptImage,))
        if images:
            captions = [_captions(dataset, prompts, i) for i in images]
            page.contact_sheet(images.values(), captions, f"{_NOTES[note][0]}: {len(images):,} of {counts[note]:,}")
    if unreadable:
        page.note(f"Not shown, because they could not be read: {len(unreadable)}, such as {unreadable[0]}.")


def _noted(cfg: ReportSettings, dataset: Dataset, work: Work | None) -> dict[str, list[int]]:
    """Find example images of each note, read from the shards that the log names."""
    images_of: dict[str, list[int]] = {note: [] for note in _NOTES}
    shards_of = {note: list(shards) for note, shards in work.notes.items() if note in _NOTES} if work else {}
    if FAULTY in dataset.splits:  # the index names them all
        images_of["fault"] = np.random.default_rng(cfg.seed).permutation(dataset.rows(FAULTY)).tolist()
        shards_of.pop("fault", None)
    number_of: dict[str, int] = {}
    read: dict[int, dict[str, dict[str, Any]]] = {}
    for note, numbers in shards_of.items():
        for number in numbers:
            if len(images_of[note]) >= cfg.faults:
                break
            if number not in read:
                read[number] = read_notes(dataset.root, number)
            if read[number] and not number_of:
                number_of = {key: i for i, key in enumerate(dataset.keys)}
            images_of[note] += [
                number_of[key] for key, notes in read[number].items() if note in notes and key in number_of
            ]
    return images_of
