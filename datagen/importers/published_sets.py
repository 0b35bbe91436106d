"""Import published image sets as datasets: curated, split and resumable; the bytes of the images stay the same.

    python -m datagen.published name=sd2_4m out=data/sd2_4m num=100000
    python -m datagen.published name=diffusiondb out=data/diffusiondb num=100000 folder=/copies/diffusiondb

The plan comes first: prompts from the set's table (diffusiondb) or from its archives (sd2_4m), curated. Then one shard
per archive: download it, decode its images once to check them, write the shard, remove the archive. A run killed at any
moment and started again gives the same bytes. Missing or broken images are in the split "faulty" and listed in
`<out>.log.jsonl`.
"""

import fnmatch
import io
import json
import logging
import shutil
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from core import store
from core.errors import UserError
from core.files import free_bytes, remove_parts, write_json, write_table
from core.paths import beside, located
from core.progress import progress
from core.renamed_settings import DATASET_FILES, with_new_names_in_text
from datagen.config import PublishedSettings
from datagen.curation.curate import Curated, side_of_group
from datagen.dataset.archive_readers import Tar, Zip, opened
from datagen.dataset.format import FAULTY, PLAN
from datagen.dataset.prompt_normal_form import normal_form
from datagen.dataset.reader import Dataset, is_plan_file, missing_shards, read_info, read_plan
from datagen.dataset.splits import leakage, plan_leakage
from datagen.dataset.targets import TargetEncoder, write_missing_targets
from datagen.dataset.writer import write_plan, write_shard
from datagen.engine import plan as plans
from datagen.importers.foreign_images import NO_PROMPT, read_sample
from datagen.prompts import download
from datagen.prompts.captions import clean, read_label
from datagen.prompts.sources import Prompt

log = logging.getLogger(__name__)

TEXTS = pa.schema(
    [
        ("archive", pa.string()),
        ("file", pa.string()),
        ("prompt", pa.string()),
        ("group", pa.string()),
        ("seed", pa.int64()),
    ]
)
"""Schema of the texts table, one row per image: archive, file name in it, and metadata of the set."""

_TEXTS_FORMAT = 2  # format version of the texts tables in the work folder
_CHECKED_AT_ONCE = 64  # images held, decoded in threads
_MARGIN = 1 << 30  # bytes to leave free on the disk
_ABSENT = b"\0"  # placeholder for an image that its archive lacks


@dataclass(frozen=True)
class PublishedSet:
    repo: str
    """Name of the dataset repository on the hub."""
    archives: str
    """Glob pattern of the archives' names."""
    suffix: str
    """Suffix of the image files."""
    table: str | None
    """Parquet file of all prompts; None if only the archives hold them."""


PUBLISHED_SETS = {
    "diffusiondb": PublishedSet("poloclub/diffusiondb", "images/part-*.zip", ".png", "metadata.parquet"),
    "sd2_4m": PublishedSet("jamarju/sd-4.4M", "*/sd-4.4M-*.tar", ".webp", None),
}


def publish(cfg: PublishedSettings) -> None:
    """Create or resume the dataset `cfg.out`."""
    out, work = cfg.out, beside(cfg.out, ".published")
    work = work if cfg.work is None else cfg.work / work.name
    if not store.exists(out / "dataset.json"):
        _plan(cfg, work)
    info = read_info(out)
    _refuse_another(cfg, info)
    remove_parts(out)
    provenance = info["provenance"]
    names = [archive["name"] for archive in provenance["archives"]]
    if cfg.folder is None and provenance["commit"] is None:
        raise UserError(
            f"folder: missing; {out} was started from a local copy of {provenance['repo']}; set folder= to it"
        )
    source = download.Repository(
        provenance["repo"], None if cfg.folder else provenance["commit"], cfg.folder, tuple(names)
    )
    missing = missing_shards(out, info)
    if missing:
        ends = np.cumsum([archive["pictures"] for archive in provenance["archives"]])
        plan = read_plan(out)
        with progress(plan.num_rows, "image", cfg.name) as bar:
            for number, name in enumerate(names):
                rows = plan.slice(int(ends[number - 1]) if number else 0, provenance["archives"][number]["pictures"])
                if number in missing:
                    _write(cfg, source, work, number, name, rows)
                bar.update(rows.num_rows)
    if cfg.encoder is not None:
        write_missing_targets(out, TargetEncoder(cfg.encoder))
    shutil.rmtree(work, ignore_errors=True)
    dataset = Dataset(out)
    splits = dataset.splits
    log.info("%s: %s", out, ", ".join(f"{count:,} {split}" for split, count in splits.items()))
    if FAULTY in splits:
        log.warning("%s faulty images are listed in %s", f"{splits[FAULTY]:,}", beside(cfg.out, ".log.jsonl"))
    _log_equal_images(dataset)


def _log_equal_images(dataset: Dataset) -> None:
    """Warn of image bytes that are in both splits: the plan splits by prompts, before any image is read."""
    names, split_of = dataset.split_codes()
    contents = dataset.content_ids
    split_n = [names[code] for code in split_of.tolist()]
    for pair, counts in leakage(split_n, np.arange(len(dataset)), dataset.prompt_hashes(), contents).items():
        if counts["images"]:
            log.warning(
                "leakage: %s image contents with other prompts are in both %s",
                *(f"{counts['images']:,}", pair.replace("/", " and ")),
            )


def _identity(cfg: PublishedSettings) -> dict[str, Any]:
    """Return the settings that decide the bytes of the dataset, under the names in dataset.json.

    The commit of the hub is recorded separately.
    """
    keys = ("num", "seed", "encoder", "curate", "split", "max_nsfw")
    return plans.dataset_settings(cfg, keys, {"published": cfg.name})


def _refuse_another(cfg: PublishedSettings, info: dict[str, Any]) -> None:
    recorded, current = plans.recorded_settings(info), _identity(cfg)
    commit = info.get("provenance", {}).get("commit")
    if cfg.revision is not None and commit is not None and len(cfg.revision) == 40:
        recorded, current = {**recorded, "revision": commit}, {**current, "revision": cfg.revision}
    plans.refuse_another_dataset(cfg.out, recorded, current)


# ------------------------------------------------------------------------------------------------------------ the plan


def _plan(cfg: PublishedSettings, work: Path) -> None:
    """Choose images and their splits, and commit the plan."""
    out = located(cfg.out)
    if isinstance(out, Path) and out.is_dir() and any(not p.name.startswith(".") for p in out.iterdir()):
        unexpected = [p for p in sorted(out.iterdir()) if not is_plan_file(p)]
        if unexpected:
            raise UserError(f"{out} is not empty and holds no dataset ({unexpected[0].name}, …); choose another out=")
    published = PUBLISHED_SETS[cfg.name]
    source = _source(cfg, published, work)
    archives = [name for name in source.names if fnmatch.fnmatch(name, published.archives)]
    if not archives:
        where = cfg.folder or f"the hub's dataset {published.repo}"
        raise UserError(f"{where} holds no {published.archives}, but {download.some(list(source.names))}")
    order = [archives[i] for i in np.random.default_rng([cfg.seed, 4]).permutation(len(archives)).tolist()]
    lost: Counter[str] = Counter()
    if published.table is not None:
        texts = _texts_of_table(cfg, source, published.table, order, work, lost)
    else:
        texts = _texts_of_archives(cfg, source, order, published.suffix, work, lost)
    pairs = dict.fromkeys(zip(texts["prompt"].to_pylist(), texts["group"].to_pylist(), strict=True))
    prompts = (Prompt(text, cfg.name, group) for text, group in pairs)
    origin = {**_identity(cfg), "commit": source.commit, "folder": str(cfg.folder)}
    curated = plans.curate_and_split(cfg, prompts, len(pairs), origin, lambda _: True, work / "curation")
    plan, archives_in_plan = _plan_table(cfg, texts, curated, lost)
    for counts, what in ((+lost, "images"), (curated.dropped, "prompts")):
        for reason, number in counts.most_common():
            shown = with_new_names_in_text(DATASET_FILES, reason)
            log.info("  left out %s %s: %s", f"{number:,}", what, shown)
    prompts = len(plan["prompt_id"].unique())
    log.info("%s of %s images, of %s prompts", *map("{:,}".format, (plan.num_rows, texts.num_rows, prompts)))
    info = {
        "settings": _identity(cfg),
        "shards": len(archives_in_plan),
        "curation": {**curated.report(), "pictures_left_out": dict(sorted((+lost).items()))},
        "provenance": {"repo": published.repo, "commit": source.commit, "archives": archives_in_plan},
        "leakage": plan_leakage(plan),
    }
    write_plan(cfg.out, plan, info)


def _source(cfg: PublishedSettings, published: PublishedSet, work: Path) -> download.Repository:
    """Open the repository; an interrupted run keeps the commit and file names that it started with."""
    path = work / "source.json"
    request = {
        "identity": _identity(cfg),
        "texts": _TEXTS_FORMAT,
        "revision": cfg.revision,
        "folder": str(cfg.folder),
    }
    if path.exists():
        recorded = json.loads(path.read_text())
        if recorded["wanted"] == request:
            return download.Repository(published.repo, recorded["commit"], cfg.folder, tuple(recorded["names"]))
        log.info("%s has other settings; starting again", work)
        shutil.rmtree(work)
    source = download.repository(published.repo, cfg.revision, cfg.folder)
    write_json(path, {"wanted": request, "commit": source.commit, "names": source.names})
    return source


def _texts_of_table(
    cfg: PublishedSettings,
    source: download.Repository,
    table_name: str,
    order: list[str],
    work: Path,
    lost: Counter[str],
) -> pa.Table:
    """Read the first `num` rows of diffusiondb's table, archive by archive in `order`."""
    columns = ["image_name", "prompt", "part_id", "seed", "image_nsfw"]
    path = source.fetch(table_name, work / "table")
    try:
        present = pq.read_schema(path).names
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{path} is not a Parquet file: {error}; copy it again") from error
    missing = [column for column in columns if column not in present]
    if missing:
        raise UserError(f"{path} lacks the column {', '.join(missing)}; it has {', '.join(present)}")
    table = pq.read_table(path, columns=columns)
    place_of = {int(Path(name).stem.rpartition("-")[2]): place for place, name in enumerate(order)}
    part = table["part_id"].to_numpy()
    place = np.array([place_of.get(n, -1) for n in range(int(part.max(initial=0)) + 1)])[part]
    shown = np.nan_to_num(table["image_nsfw"].to_numpy()) <= cfg.max_nsfw
    lost["in an archive that is not there"] += int((place < 0).sum())
    rows = np.flatnonzero((place >= 0) & shown)
    lost[f"image_nsfw above {cfg.max_nsfw:g}"] += int((~shown & (place >= 0)).sum())
    rows = rows[np.argsort(place[rows], kind="stable")][: cfg.num]
    selected = table.take(rows)
    return pa.table(
        {
            "archive": pa.array([order[i] for i in place[rows].tolist()], pa.string()),
            "file": selected["image_name"],
            "prompt": pc.fill_null(selected["prompt"], ""),
            "group": pa.array([""] * len(rows), pa.string()),
            "seed": selected["seed"].cast(pa.int64()),
        },
        schema=TEXTS,
    )


def _texts_of_archives(
    cfg: PublishedSettings,
    source: download.Repository,
    order: list[str],
    suffix: str,
    work: Path,
    lost: Counter[str],
) -> pa.Table:
    """Read rows of the archives one after another up to `num`; `work` caches the rows of each archive."""
    tables: list[pa.Table] = []
    row_count = 0
    with progress(len(order), "archive", "prompts") as bar:
        for number, name in enumerate(order):
            path = work / "texts" / f"{number:06d}.parquet"
            if not path.exists():
                with opened(_fetched(source, name, work)) as archive:
                    assert isinstance(archive, Tar)
                    table = _texts_of_tar(archive, name, suffix)
                write_table(path, table)
                if not cfg.hold_archives:
                    source.release(name, work / "archives")
            table = pq.read_table(path)
            lost.update(json.loads(table.schema.metadata[b"lost"]))
            table = table.replace_schema_metadata(None).slice(0, None if cfg.num is None else cfg.num - row_count)
            tables.append(table)
            row_count += table.num_rows
            bar.update()
            if row_count == cfg.num:
                break
    return pa.concat_tables(tables)


def _texts_of_tar(archive: Tar, name: str, suffix: str) -> pa.Table:
    """Read a row for each sample with a prompt and an image; the schema's metadata counts the samples left out."""
    rows: list[dict[str, Any]] = []
    lost = Counter(reason for _, reason in archive.left_out)
    for key, members in archive.samples.items():
        try:
            texts = {s: archive.read(m) for s, m in members.items() if s in (".txt", ".json")}
        except tarfile.TarError:
            lost["sample that is cut off"] += 1
            continue
        sample = read_sample(texts, f"{name}, sample {key}")
        lost.update(f"prompt that is {reason}" for reason in sample.captions.left_out)
        if not sample.captions.texts or suffix not in members:
            if not sample.captions.left_out:
                lost["sample without an image" if sample.captions.texts else sample.problem or NO_PROMPT] += 1
            continue
        cluster = read_label(sample.fields.get("cluster"), "cluster", f"{name}, sample {key}")
        group = f"cluster {cluster}" if cluster else ""
        prompt = sample.captions.texts[0]
        rows.append({"archive": name, "file": f"{key}{suffix}", "prompt": prompt, "group": group, "seed": 0})
    return pa.Table.from_pylist(rows, schema=TEXTS.with_metadata({"lost": json.dumps(lost)}))


def _plan_table(
    cfg: PublishedSettings, texts: pa.Table, curated: Curated, lost: Counter[str]
) -> tuple[pa.Table, list[dict[str, Any]]]:
    """Build the plan, and the list of archives with their number of images in it, one shard each.

    A key joins the names of the archive and the image. Curation treats prompts that differ only in case, punctuation or
    spaces as one, so they are in one split; each image keeps its own text. With holdout, an image whose group is in
    another split than its prompt is left out and counted in `lost`.
    """
    side_of = {normal_form(text): s for s in ("train", "val") for text in getattr(curated, s)["prompt"].to_pylist()}
    by_group = cfg.split.kind == "holdout"
    side_of_groups = cache(lambda group: side_of_group(group, cfg.split.val_fraction, cfg.seed))
    ids: dict[str, int] = {}
    columns: dict[str, list[Any]] = {name: [] for name in PLAN.names}
    archives: list[dict[str, Any]] = []
    for batch in texts.to_batches(8192):
        for row in batch.to_pylist():
            prompt = clean(row["prompt"])
            split = side_of.get(normal_form(prompt))
            if split is None:
                continue
            if by_group and side_of_groups(row["group"]) != (split == "val"):
                lost["group on another side than its prompt"] += 1
                continue
            if not archives or archives[-1]["name"] != row["archive"]:
                archives.append({"name": row["archive"], "pictures": 0})
            values = {
                "key": f"{Path(row['archive']).stem}/{row['file'].rpartition('.')[0]}",
                "prompt_id": ids.setdefault(prompt, len(ids)),
                "prompt": prompt,
                "source": cfg.name,
                "group": row["group"],
                "split": split,
                "seed": row["seed"],
            }
            archives[-1]["pictures"] += 1
            for name, value in values.items():
                columns[name].append(value)
    return pa.table(columns, schema=PLAN), archives


# ---------------------------------------------------------------------------------------------------------- the shards


def _fetched(source: download.Repository, name: str, work: Path) -> Path:
    """Download an archive, if necessary, and return its local path.

    Raises:
        UserError: the download fails, or the disk has no room for it.
    """
    folder = work / "archives"
    if source.folder is None and not (folder / name).exists():
        need, free = source.sizes([name])[name], free_bytes(folder)
        if need + _MARGIN > free:
            raise UserError(
                f"{folder}: {name} needs {need / 1e9:.2f} GB and {_MARGIN / 1e9:.1f} GB of reserve, but only "
                f"{free / 1e9:.2f} GB are free. Make room, set work=… to another folder, lower num=…, or set "
                f"hold_archives=false to hold one archive at a time; the same command resumes."
            )
    return source.fetch(name, folder)


def _write(
    cfg: PublishedSettings, source: download.Repository, work: Path, number: int, name: str, rows: pa.Table
) -> None:
    """Write the shard of one archive; remove the archive if it was downloaded."""
    suffix = PUBLISHED_SETS[cfg.name].suffix
    with opened(_fetched(source, name, work)) as archive:
        names = [f"{key.partition('/')[2]}{suffix}" for key in rows["key"].to_pylist()]
        write_shard(cfg.out, number, rows, _images(cfg, archive, name, names), suffix)
    source.release(name, work / "archives")


def _images(
    cfg: PublishedSettings, archive: Tar | Zip, where: str, names: Sequence[str]
) -> Iterator[tuple[bytes, dict[str, str]]]:
    """Yield the bytes of each image, with a note of its fault if it has one."""
    with ThreadPoolExecutor() as pool:
        for first in range(0, len(names), _CHECKED_AT_ONCE):
            part = names[first : first + _CHECKED_AT_ONCE]
            read = [archive.image(name) for name in part]
            for name, data, fault in zip(part, read, pool.map(_fault, read), strict=True):
                if fault is not None:
                    _log(cfg, archive=where, file=name, fault=fault)
                yield data or _ABSENT, {} if fault is None else {"fault": fault}


def _fault(data: bytes | None) -> str | None:
    """Return the reason why an image cannot be used, or None. Pillow decodes without the GIL."""
    from PIL import Image

    if not data:
        return "not in its archive, or damaged there"
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
    except Exception as error:  # Pillow's decoders raise errors of many classes
        return f"cannot be decoded: {type(error).__name__}"
    return None


def _log(cfg: PublishedSettings, **values: str) -> None:
    with beside(cfg.out, ".log.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"event": "fault", **values}) + "\n")
