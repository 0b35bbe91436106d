"""Pictures → submission.csv, with no network and nothing but torch, timm, safetensors, Pillow and numpy.

    python predict.py --images test/images --out submission.csv

The file belongs beside model.safetensors and config.json, as python -m models.export writes them. Each picture gives E
rows `<imgId>_<0…E-1>,val`. A picture that cannot be read gets the mean vector of the training targets, with a warning.
B pictures of a batch, E target width.
"""

import argparse
import itertools
import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from models.heads import make_head  # export puts the text of these files here
from models.preprocess import BadImage, decode, fit
from models.towers import tower

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp"}


class Predictor:
    """The exported model: decoded uint8 pictures of any size → unit vectors.

    Args:
        folder: that of model.safetensors and config.json.
        device: a torch device; None takes a GPU where there is one. On a GPU it runs in fp16, else in fp32.
    """

    def __init__(self, folder: Path, device: str | None = None) -> None:
        config = json.loads((folder / "config.json").read_text())
        tensors = load_file(folder / "model.safetensors")
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.size = config["size"]
        self.mean_E = tensors.pop("mean_E")
        head = make_head(
            config.get("head", "linear"), config["width"], config["target_width"], config.get("head_width", 0)
        )
        head.load_state_dict(_part("head.", tensors))
        self._head = head.eval().to(self.device)
        backbone = tower(config["backbone"], self.size)
        backbone.load_state_dict(_part("backbone.", tensors))
        self._backbone = backbone.eval().to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._mean, self._std = (
            255 * torch.tensor(config[k]).view(1, 3, 1, 1).to(self.device) for k in ("mean", "std")
        )

    @torch.inference_mode()
    def embed(self, images: list[torch.Tensor]) -> torch.Tensor:
        """B decoded uint8 pictures [3, H, W] → unit z_BE, fp32, on the CPU."""
        image_BCHW = torch.stack([fit(image, self.size) for image in images]).to(self.device)
        normal_BCHW = ((image_BCHW - self._mean) / self._std).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cuda", torch.float16, enabled=self.device.type == "cuda"):
            features_BD = self._backbone(normal_BCHW)
            features_BD = features_BD[0] if isinstance(features_BD, tuple) else features_BD
            z_BE = self._head(features_BD)
        return torch.nn.functional.normalize(z_BE.float(), dim=-1).cpu()


def _part(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def find(folder: Path) -> list[Path]:
    """The pictures below `folder`, sorted by name; a name without its suffix is the imgId.

    Raises:
        SystemExit: there is none, or two share an imgId.
    """
    if not folder.is_dir():
        sys.exit(f"error: no folder {folder}")
    files = sorted((p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES), key=lambda p: p.stem)
    if not files:
        sys.exit(f"error: no picture ({', '.join(sorted(SUFFIXES))}) in {folder}")
    twice = [str(a) for a, b in itertools.pairwise(files) if a.stem == b.stem]
    if twice:
        sys.exit(f"error: several files share an imgId with {', '.join(twice[:3])}; rename or remove one of each")
    return files


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--images", type=Path, required=True, help="folder of pictures, searched to the bottom")
    parser.add_argument("--out", type=Path, default=Path("submission.csv"), help="CSV to write [%(default)s]")
    parser.add_argument("--device", help="torch device [a GPU where there is one]")
    parser.add_argument("--batch-size", type=int, default=32, help="pictures a batch [%(default)s]")
    options = parser.parse_args()
    if options.batch_size < 1:
        parser.error(f"--batch-size {options.batch_size} is below 1")
    files = find(options.images)
    predictor = Predictor(Path(__file__).resolve().parent, options.device)
    part = options.out.with_name(f".{options.out.name}.part-{os.getpid()}")
    bad, began, told = 0, time.monotonic(), 0.0
    try:
        with part.open("w") as out:
            out.write("imgId_eId,val\n")
            for start in range(0, len(files), options.batch_size):
                batch = files[start : start + options.batch_size]
                vectors = predictor.mean_E.repeat(len(batch), 1)
                images = {}
                for i, file in enumerate(batch):
                    try:
                        images[i] = decode(file.read_bytes())
                    except (BadImage, OSError) as error:
                        bad += 1
                        sys.stderr.write(f"warning: {file}: {error}; it gets the mean vector\n")
                if images:
                    vectors[list(images)] = predictor.embed(list(images.values()))
                for file, vector in zip(batch, vectors.numpy().astype(np.float32), strict=True):
                    out.writelines(f"{file.stem}_{e},{value:.9g}\n" for e, value in enumerate(vector.tolist()))
                done, seconds = start + len(batch), time.monotonic() - began
                if done == len(files) or seconds - told > 5:
                    told = seconds
                    left = seconds / done * (len(files) - done)
                    sys.stderr.write(
                        f"{done:,} of {len(files):,} pictures, {done / seconds:.0f}/s, {left:.0f} s left\n"
                    )
        part.replace(options.out)
    except OSError as error:
        sys.exit(f"error: cannot write {options.out}: {error.strerror}")
    finally:
        part.unlink(missing_ok=True)
    sys.stderr.write(f"{options.out}: {len(files):,} pictures, {bad} of them unreadable\n")


if __name__ == "__main__":
    main()
