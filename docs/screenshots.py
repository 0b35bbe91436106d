"""Write the README's images: the evaluation page and the demo of the quickstart's run, in headless Chromium.

    make quickstart NUM=3000
    python docs/screenshots.py      docs/images/evaluation.png, docs/images/demo.png

Needs playwright (extra dev) and Chromium on the PATH.
"""

import contextlib
import io
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

ROOT = Path(__file__).resolve().parents[1]
IMAGES = ROOT / "docs/images"
RUN = ROOT / "checkpoints/quickstart"
SHARD = ROOT / "data/quickstart/shards/000000.tar"
WIDTH, HEIGHT = 1200, 900


def main() -> None:
    """Take both screenshots."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        sys.exit("no Chromium on the PATH")
    IMAGES.mkdir(exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT}, device_scale_factor=1)
        page.goto((RUN / "evaluation/report.html").as_uri())
        _save(page, IMAGES / "evaluation.png")
        with demo() as address:
            page.goto(address)
            page.locator("input[type=file]").first.set_input_files(
                {"name": "image.png", "mimeType": "image/png", "buffer": _image()}
            )
            page.locator("#results .near").wait_for(timeout=300_000)
            page.wait_for_timeout(1000)  # the bars grow
            _save(page, IMAGES / "demo.png")
        browser.close()


@contextlib.contextmanager
def demo() -> Iterator[str]:
    """Address of a demo of the run that serves until the block ends."""
    command = [sys.executable, "-m", "train.demo", f"checkpoint={RUN.relative_to(ROOT)}/best", "port=0"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if address := re.search(r"http://127\.0\.0\.1:\d+", line):
                yield address[0]
                break
        else:
            sys.exit("train.demo ended before it served a page")
    finally:
        process.terminate()
        process.wait()


def _image() -> bytes:
    """The first validation image of the dataset."""
    with tarfile.open(SHARD) as tar:
        names = tar.getnames()
        for name in names:
            if name.endswith(".json") and b'"val"' in (file := tar.extractfile(name) or io.BytesIO()).read():
                file.close()
                image = tar.extractfile(f"{Path(name).stem}.png")
                assert image is not None
                return image.read()
    sys.exit(f"{SHARD} has no validation image")


def _save(page: Page, path: Path) -> None:
    """Screenshot as a PNG of 128 colours: a fifth of the bytes."""
    with Image.open(io.BytesIO(page.screenshot())) as image:
        image.convert("RGB").quantize(128).save(path, optimize=True)


if __name__ == "__main__":
    main()
