"""Folder of the project, and the type of a path that may be a URL."""

from pathlib import Path

from upath import UPath as Location

__all__ = ["ROOT", "Location"]
"""`Location` is a local path or an fsspec URL (s3://, gs://, hf://), with pathlib's interface."""

ROOT = Path(__file__).resolve().parents[1]
