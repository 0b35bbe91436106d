"""models/runtime/image_files.py: which files are images, by their names."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from models.runtime.decode import decode
from models.runtime.image_files import IMAGE_SUFFIXES, why_not_image

FORMATS = {".jpg": "JPEG", ".jpeg": "JPEG", ".jpe": "JPEG", ".jfif": "JPEG", ".png": "PNG", ".apng": "PNG"}
FORMATS |= {".webp": "WEBP", ".bmp": "BMP", ".dib": "DIB", ".gif": "GIF", ".tif": "TIFF", ".tiff": "TIFF"}
FORMATS |= {".avif": "AVIF"}


@pytest.mark.parametrize("suffix", IMAGE_SUFFIXES)
def test_every_suffix_is_decoded(suffix: str) -> None:
    if suffix == ".avif" and not features.check("avif"):
        pytest.skip("this Pillow reads no AVIF")
    assert Image.registered_extensions()[suffix] in (FORMATS[suffix], "BMP")
    data = io.BytesIO()
    ramp_HWC = np.stack([np.tile(np.arange(24, dtype=np.uint8) * 10, (16, 1))] * 3, 2)
    Image.fromarray(ramp_HWC).save(data, FORMATS[suffix])
    image_CHW = decode(data.getvalue()).numpy()
    assert image_CHW.shape == (3, 16, 24)
    assert np.abs(image_CHW.astype(int) - ramp_HWC.transpose(2, 0, 1)).max() < 16


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        *((f"a/b.c{suffix.upper()}", "") for suffix in IMAGE_SUFFIXES),
        ("a.heic", "suffix .heic"),
        ("a.png.txt", "suffix .txt"),
        ("a.png/readme", "no suffix"),
        ("a/.png", "no suffix"),
        ("..png", "no suffix"),
        ("._a.png", "system file"),
        ("a/__MACOSX/b.png", "system file"),
        ("__MACOSX/a/b.png", "system file"),
        ("a/.DS_Store", "system file"),
        ("Thumbs.db", "system file"),
        ("a__MACOSX/b.png", ""),
    ],
)
def test_why_not_image_gives_the_reason(path: str, reason: str) -> None:
    assert why_not_image(path) == reason


def test_check_images_cover_every_suffix(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from models.export.check_images import read_check_images

    for n, (suffix, kind) in enumerate(FORMATS.items()):
        if suffix != ".avif":
            Image.new("RGB", (8, 8), (n, 0, 0)).save(tmp_path / f"{n}{suffix}", kind)
    for name in ("a.heic", "b.heic", ".DS_Store"):
        (tmp_path / name).touch()
    with caplog.at_level("INFO"):
        assert len(list(read_check_images(tmp_path, 99))) == len(FORMATS) - 1
    assert "skipped files: 2 × suffix .heic, 1 × system file" in caplog.text
