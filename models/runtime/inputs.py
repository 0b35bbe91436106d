"""Inputs of predict.py: the images below a folder, their ids, and the order of a sample submission."""

import csv
import hashlib
import itertools
import json
import os
import stat
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NoReturn

from .image_files import IMAGE_SUFFIXES, why_not_image
from .model import BundleError

HEADER = ["imgId_eId", "val"]

_SHOWN = 5  # items of a list in a message


@dataclass(frozen=True)
class Task:
    """Images as rows 0 … N-1, and the ids to write."""

    folder: Path
    """Folder of the images."""
    paths: list[str]
    """Path of each row, relative to `folder`."""
    ids: list[str]
    """Ids in the order of the output."""
    rows: list[int]
    """Row of each id; -1 for an id without an image."""
    not_requested: int
    """Number of images whose id is not in the sample submission."""
    sha256: str
    """Hash of the images' paths, ids, sizes and modification times."""
    other_files: list[tuple[str, str]]
    """Path relative to `folder`, and reason, of each file that is not an image."""


def read_task(folder: Path, by_path: bool, sample: Path | None, width: int) -> Task:
    """List the images below a folder, sorted by id, and read the ids of a sample submission.

    Args:
        folder: folder of images, searched recursively.
        by_path: the id of an image is its path relative to `folder`; otherwise its name without the suffix.
        sample: sample submission; None: the ids of all images.
        width: E, the number of rows per id in `sample`.

    Raises:
        BundleError: no image is found, two images share an id, or `sample` is malformed.
    """
    others: list[tuple[str, str]] = []
    images = _images(folder, others)
    entries = sorted((path if by_path else PurePosixPath(path).stem, path, size, time) for path, size, time in images)
    if not entries:
        raise BundleError(
            f"no image ({', '.join(IMAGE_SUFFIXES)}) in {folder}; {count_by_reason(others) or 'it is empty'}"
        )
    count, first = len(entries), entries[0][0]
    ids: list[str] = []
    if sample:
        ids = sample_ids(sample, width)
        requested = set(ids)
        entries = [entry for entry in entries if entry[0] in requested]
        if not entries:
            raise BundleError(
                f"no image in {folder} has an id of {sample}: the first ids are {ids[0]!r} in the sample, {first!r} in "
                "the folder"
            )
    duplicates = [f"{a[1]} and {b[1]}" for a, b in itertools.pairwise(entries) if a[0] == b[0]]
    if duplicates:
        raise BundleError(f"images that share an id: {abbreviate(duplicates)}; rename them, or use --ids path")
    sha256 = hashlib.sha256()
    for entry in entries:  # one JSON text of a million images would take another half GB
        sha256.update(json.dumps(entry).encode())
    if sample:
        row = {entry[0]: number for number, entry in enumerate(entries)}
        rows = [row.get(name, -1) for name in ids]
    else:
        ids, rows = [entry[0] for entry in entries], list(range(len(entries)))
    paths = [entry[1] for entry in entries]
    return Task(folder, paths, ids, rows, count - len(entries), sha256.hexdigest(), sorted(others))


def abbreviate(items: list[str]) -> str:
    """Join the first few items, and count the rest."""
    more = f" and {len(items) - _SHOWN:,} more" if len(items) > _SHOWN else ""
    return ", ".join(items[:_SHOWN]) + more


def count_by_reason(others: list[tuple[str, str]]) -> str:
    """Count skipped files by reason, as text: "3 × suffix .txt, 1 × system file"."""
    counts = Counter(reason for _, reason in others).most_common()
    return ", ".join(f"{count:,} × {reason}" for reason, count in counts)


def _images(folder: Path, others: list[tuple[str, str]]) -> Iterator[tuple[str, int, int]]:
    """Yield relative path, bytes and modification time (ns) of each image, -1 for a dangling link.

    `others` receives relative path and reason of each other file.
    """
    if not folder.is_dir():
        raise BundleError(f"no folder {folder}")
    for parent, names in _folders(folder):
        for name in names:
            path = Path(parent, name)
            relative = path.relative_to(folder).as_posix()
            reason = why_not_image(relative)
            if reason:
                others.append((relative, reason))
                continue
            size = time = -1
            try:
                status = path.stat()
                if not stat.S_ISREG(status.st_mode):
                    others.append((relative, "not a regular file"))  # reading a pipe would wait for ever
                    continue
                size, time = status.st_size, status.st_mtime_ns
            except OSError:
                pass  # unreadable: decoding reports it
            yield relative, size, time


def _folders(top: Path) -> Iterator[tuple[str, list[str]]]:
    """Walk the folders below `top`, each once, with their file names; links to folders come after real folders."""
    seen, tops = set(), [top]
    for start in tops:  # grows in the loop
        for parent, folders, names in os.walk(start, onerror=_refuse_unlisted):
            status = Path(parent).stat()
            if (status.st_dev, status.st_ino) in seen:  # a link to a folder above would never end
                folders.clear()
                continue
            seen.add((status.st_dev, status.st_ino))
            folders.sort()  # the same one of two links to a folder is followed on every machine
            tops += [path for name in folders if (path := Path(parent, name)).is_symlink()]
            yield parent, names


def _refuse_unlisted(error: OSError) -> NoReturn:
    raise BundleError(f"cannot list {error.filename}: {error.strerror}")


def sample_ids(file: Path, width: int) -> list[str]:
    """Read the ids of a sample submission with columns `imgId_eId,val` and rows _0 … _(width-1) per id.

    Blank lines are allowed between ids and at the end. Memory holds ids only.

    Raises:
        BundleError: names the line and what is expected there.
    """
    ids: dict[str, None] = {}
    try:
        with file.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as opened:
            lines = csv.reader(opened)
            header = next(lines, [])
            if header != HEADER:
                raise BundleError(f"{file}: the header is {','.join(header)!r}, not {','.join(HEADER)!r}")
            for first in lines:
                if not first:
                    continue
                name = first[0].rpartition("_")[0]
                rows = (first, *itertools.islice(lines, width - 1))
                block = [row[0] if len(row) == 2 else ",".join(row) for row in rows]
                expected = [f"{name}_{e}" for e in range(width)]
                if block != expected:
                    _refuse_block(file, lines.line_num, block, expected)
                if name in ids:
                    raise BundleError(f"{file}, line {lines.line_num - width + 1}: duplicate id {name!r}")
                ids[name] = None
    except OSError as error:
        raise BundleError(f"cannot read {file}: {error.strerror}") from error
    except csv.Error as error:
        raise BundleError(f"{file} is not a CSV: {error}") from error
    if not ids:
        raise BundleError(f"{file} has no row below its header")
    return list(ids)


def _refuse_block(file: Path, last_line: int, block: list[str], expected: list[str]) -> NoReturn:
    """Raise for the first id of a block, up to `last_line`, that differs from the expected ids."""
    at = next((i for i, pair in enumerate(zip(block, expected, strict=False)) if pair[0] != pair[1]), len(block))
    actual = repr(block[at]) if at < len(block) else "the end of the file"
    line = last_line - sum(1 + text.count("\n") for text in block[at + 1 :]) + (at == len(block))
    line -= block[at].count("\n") if at < len(block) else 0
    raise BundleError(
        f"{file}, line {line}: expected {expected[at]!r}, got {actual}; this bundle's vectors have {len(expected)} "
        f"components, so each id needs the rows _0 … _{len(expected) - 1} in order"
    )
