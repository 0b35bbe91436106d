"""Folder of the project, and paths that are local or are fsspec URLs (s3://, gs://, hf://)."""

import os
from pathlib import Path
from typing import Any

from upath import UPath as Location

from core.errors import UserError, first_line

__all__ = ["ROOT", "Location", "Place", "beside", "cache_folder", "file_system", "located"]
"""`Location` is a local path or an fsspec URL, with pathlib's interface."""

ROOT = Path(__file__).resolve().parents[1]

Place = Path | Location
"""A local path as a `Path`, an fsspec URL as a `Location`; `located` makes one from either."""

_LOCAL_PROTOCOLS = ("", "file", "local")


def located(place: Place | str) -> Place:
    """Return a local path, also one given as file://, as a `Path`, and any other URL as a `Location`.

    Raises:
        UserError: the protocol is unknown.
    """
    try:
        location = Location(place)
    except ValueError as error:
        raise UserError(f"{place}: {error}; give a local path, or s3://, gs:// or hf://") from error
    is_local = location.protocol in _LOCAL_PROTOCOLS and not isinstance(location, Path)
    return Path(location.path) if is_local else location


def file_system(place: Location) -> Any:
    """Return the fsspec file system of a URL.

    Raises:
        UserError: the package of its protocol is not installed.
    """
    try:
        return place.fs
    except ImportError as error:
        from fsspec.registry import known_implementations

        package = known_implementations[place.protocol]["class"].partition(".")[0]
        raise UserError(f"{place}: {first_line(error)}: pip install {package}") from error


def cache_folder() -> Path:
    """Folder of all caches: `IM2EMB_CACHE`, or ~/.cache/im2emb."""
    return Path(os.environ.get("IM2EMB_CACHE") or Path.home() / ".cache" / "im2emb")


def beside(place: Place, suffix: str) -> Path:
    """Local path next to a dataset folder, named after it; for a URL, in the working folder with the bucket's name."""
    location = located(place)
    if not isinstance(location, Path):  # two buckets may hold datasets of one name
        return Path.cwd() / f"{'-'.join(location.path.strip('/').split('/'))}{suffix}"
    location = location.absolute()  # "." has no name
    return location.with_name(f"{location.name}{suffix}")
