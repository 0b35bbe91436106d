"""A checkpoint → a bundle that predicts anywhere: predict.py, model.safetensors, config.json.

    python -m models.export                                   the newest best checkpoint → bundle/
    python -m models.export checkpoint=checkpoints/vith14/best out=bundle

The bundle is loaded and must give the checkpoint's own probe vectors, or nothing is written.
"""

import ast
import importlib.util
import json
import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from conf import ROOT, UserError, command, settings

log = logging.getLogger(__name__)

_TOLERANCE = 1e-5  # largest difference of a component, in fp32
_CARRIED = ("heads", "preprocess", "towers")  # files of models/ whose text predict.py carries


@dataclass(frozen=True)
class ExportSettings:
    checkpoint: Path | None
    """Checkpoint folder; null takes the newest checkpoints/*/best."""
    out: Path
    """Bundle folder to write."""


def newest() -> Path:
    """The best checkpoint that was written last.

    Raises:
        UserError: there is none.
    """
    found = sorted((ROOT / "checkpoints").glob("*/best/config.json"), key=lambda p: p.stat().st_mtime)
    if not found:
        raise UserError("no checkpoints/*/best: train first (python -m train +experiment=…) or name checkpoint=…")
    return found[-1].parent


def export(checkpoint_folder: Path, out: Path) -> float:
    """Writes the bundle; returns the largest difference of its probe vectors from the checkpoint's.

    Raises:
        UserError: the bundle does not give the checkpoint's vectors, or `out` cannot be written; nothing is.
    """
    from safetensors.torch import load_file, save_file

    from models import checkpoint

    config = checkpoint.read_config(checkpoint_folder)
    mean_E, probes, vectors = checkpoint.load_extras(checkpoint_folder)
    out = out.resolve()
    if out.exists() and not (out / "predict.py").exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out} holds something that is no bundle; choose another out=")
    with checkpoint.replacing(out) as part:
        tensors = load_file(checkpoint_folder / "model.safetensors")
        save_file(
            {k: v for k, v in tensors.items() if not k.startswith("probe_")} | {"mean_E": mean_E},
            part / "model.safetensors",
        )
        (part / "config.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")
        (part / "predict.py").write_text(predict_source())
        predictor = load_bundle(part)
        found = [predictor.embed([probe])[0] for probe in probes]
        difference = max(float((a - b).abs().max()) for a, b in zip(found, vectors, strict=True))
        if not difference <= _TOLERANCE:
            raise UserError(
                f"the bundle of {checkpoint_folder} differs by {difference:.1e} from the checkpoint's probe vectors, "
                f"more than {_TOLERANCE:.0e}; nothing is written. Is timm another version than in training?"
            )
    return difference


def predict_source() -> str:
    """`models/predict.py` as one file: its imports of our files give way to their text."""
    imports: set[str] = set()
    docstring, bodies = "", []
    for name in (*_CARRIED, "predict"):
        text = (ROOT / f"models/{name}.py").read_text()
        nodes = [n for n in ast.parse(text).body if isinstance(n, ast.Import | ast.ImportFrom)]
        docstring = text[: text.index(ast.get_source_segment(text, nodes[0]) or "")]
        imports |= {ast.unparse(n) for n in nodes if not ast.unparse(n).startswith("from models.")}
        bodies.append("".join(text.splitlines(True)[nodes[-1].end_lineno or 0 :]).strip("\n"))
    standard = {line for line in imports if line.split()[1].split(".")[0] in sys.stdlib_module_names}
    ordered = "\n\n".join("\n".join(sorted(group)) for group in (standard, imports - standard))
    return docstring + "\n\n\n".join([f"{ordered}\n\n{bodies[0]}", *bodies[1:]]) + "\n"


def load_bundle(folder: Path, device: str | None = "cpu") -> Any:
    """The `Predictor` of a bundle, by its own predict.py: an Embedder."""
    spec = importlib.util.spec_from_file_location("im2emb_bundle_predict", folder / "predict.py")
    assert spec is not None
    assert spec.loader is not None
    module: ModuleType = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Predictor(folder, device)


def run(values: dict[str, Any]) -> None:
    chosen = settings(ExportSettings, values)
    folder = chosen.checkpoint or newest()
    difference = export(folder, chosen.out)
    log.info("%s → %s: probe vectors equal within %.1e", folder, chosen.out, difference)
    log.info("predict: python %s/predict.py --images FOLDER --out submission.csv", chosen.out)


if __name__ == "__main__":
    command("export", run)
