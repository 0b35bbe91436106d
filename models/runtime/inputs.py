"""What is to be predicted: the images below a folder, their ids, and the order that a sample submission asks for."""

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

_SHOWN = 5  # of a list, in a message


@dataclass(frozen=True)
class Task:
    """Images as rows 0 … N-1, and the ids to write."""

    folder: Path
    paths: list[str]
    """Of each row, below `folder`."""
    ids: list[str]
    """In the order to write them."""
    rows: list[int]
    """Of each id, its image; -1 where there is none."""
    left_out: int
    """Images whose id the sample does not ask for."""
    sha256: str
    """Of paths, ids, sizes and times of the images."""
    other_files: list[tuple[str, str]]
    """Path below `folder`, and why it is not read, of each other file there."""


def task(folder: Path, by_path: bool, sample: Path | None, width: int) -> Task:
    """The images below `folder`, sorted by id, and the ids of `sample`, or of all images.

    Args:
        by_path: an image's id is its path below `folder`; else its name without the suffix.
        width: E, rows that `sample` has for each id.

    Raises:
        BundleError: there is no image, two have one id, or `sample` is not of that form.
    """
    others: list[tuple[str, str]] = []
    images = _images(folder, others)
    found = sorted((path if by_path else PurePosixPath(path).stem, path, *about) for path, *about in images)
    if not found:
        raise BundleError(f"no image ({', '.join(IMAGE_SUFFIXES)}) in {folder}; {by_reason(others) or 'it is empty'}")
    count, first = len(found), found[0][0]
    ids: list[str] = []
    if sample:
        ids = sample_ids(sample, width)
        wanted = set(ids)
        found = [entry for entry in found if entry[0] in wanted]
        if not found:
            raise BundleError(
                f"no image in {folder} has an id of {sample}: the first ids are {ids[0]!r} there, {first!r} here"
            )
    twice = [f"{a[1]} and {b[1]}" for a, b in itertools.pairwise(found) if a[0] == b[0]]
    if twice:
        raise BundleError(f"images that share an id: {shown(twice)}; rename them, or take --ids path")
    sha256 = hashlib.sha256()
    for entry in found:  # all at once, a million images would take another half GB
        sha256.update(json.dumps(entry).encode())
    if sample:
        row = {entry[0]: number for number, entry in enumerate(found)}
        rows = [row.get(name, -1) for name in ids]
    else:
        ids, rows = [entry[0] for entry in found], list(range(len(found)))
    paths = [entry[1] for entry in found]
    return Task(folder, paths, ids, rows, count - len(found), sha256.hexdigest(), sorted(others))


def shown(items: list[str]) -> str:
    """The first few, and how many more."""
    more = f" and {len(items) - _SHOWN:,} more" if len(items) > _SHOWN else ""
    return ", ".join(items[:_SHOWN]) + more


def by_reason(others: list[tuple[str, str]]) -> str:
    """Numbers of the files that are not read, by reason, as text."""
    counts = Counter(reason for _, reason in others).most_common()
    return ", ".join(f"{count:,} × {reason}" for reason, count in counts)


def _images(folder: Path, others: list[tuple[str, str]]) -> Iterator[tuple[str, int, int]]:
    """Path below `folder`, bytes and time of each, -1 where a link leads nowhere; adds all other files to `others`."""
    if not folder.is_dir():
        raise BundleError(f"no folder {folder}")
    for place, names in _folders(folder):
        for name in names:
            path = Path(place, name)
            below = path.relative_to(folder).as_posix()
            reason = why_not_image(below)
            if reason:
                others.append((below, reason))
                continue
            size = time = -1
            try:
                about = path.stat()
                if not stat.S_ISREG(about.st_mode):
                    others.append((below, "not a regular file"))  # reading a pipe would wait for ever
                    continue
                size, time = about.st_size, about.st_mtime_ns
            except OSError:
                pass  # it is unreadable, as the reader will find
            yield below, size, time


def _folders(top: Path) -> Iterator[tuple[str, list[str]]]:
    """Each folder from `top` on and its names, once: links to folders come after all that is reached without them."""
    seen, tops = set(), [top]
    for start in tops:  # which grows
        for place, folders, names in os.walk(start, onerror=_unlisted):
            here = Path(place).stat()
            if (here.st_dev, here.st_ino) in seen:  # a link to a folder above would never end
                folders.clear()
                continue
            seen.add((here.st_dev, here.st_ino))
            folders.sort()  # of two links to one folder the same is followed everywhere
            tops += [path for name in folders if (path := Path(place, name)).is_symlink()]
            yield place, names


def _unlisted(error: OSError) -> NoReturn:
    raise BundleError(f"cannot list {error.filename}: {error.strerror}")


def sample_ids(file: Path, width: int) -> list[str]:
    """The ids of a sample submission: `imgId_eId,val`, and of each id the rows _0 … _(width-1). Only ids are held.

    Blank lines may stand between ids and at the end.

    Raises:
        BundleError: naming the line and what should stand there.
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
                block = [
                    row[0] if len(row) == 2 else ",".join(row) for row in (first, *itertools.islice(lines, width - 1))
                ]
                asked = [f"{name}_{e}" for e in range(width)]
                if block != asked:
                    _misplaced(file, lines.line_num, block, asked)
                if name in ids:
                    raise BundleError(f"{file}, line {lines.line_num - width + 1}: id {name!r} for the second time")
                ids[name] = None
    except OSError as error:
        raise BundleError(f"cannot read {file}: {error.strerror}") from error
    except csv.Error as error:
        raise BundleError(f"{file} is no CSV: {error}") from error
    if not ids:
        raise BundleError(f"{file} has no row below its header")
    return list(ids)


def _misplaced(file: Path, last_line: int, block: list[str], asked: list[str]) -> NoReturn:
    """Raises for the first row of `block` that is not as `asked`; its last is at `last_line`."""
    at = next((i for i, pair in enumerate(zip(block, asked, strict=False)) if pair[0] != pair[1]), len(block))
    found = repr(block[at]) if at < len(block) else "the end"
    line = last_line - sum(1 + text.count("\n") for text in block[at + 1 :]) + (at == len(block))
    line -= block[at].count("\n") if at < len(block) else 0
    raise BundleError(
        f"{file}, line {line}: {found} where {asked[at]!r} belongs; this bundle's vectors have {len(asked)} numbers, "
        f"so each id takes the rows _0 … _{len(asked) - 1}, in order"
    )
