"""Refuse target vectors whose text encoder is not the one that a model or a command expects.

require_same(config, folder, dataset.encoder_identity, "data/sd2")    compares a model with the vectors of a dataset
check_folder("models/my-encoder", datasets)                           compares the folder of encoder= with the datasets
"""

import functools
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from core.encoder_identity import differences, has_settings
from core.errors import UserError
from datagen.dataset.encoder_identity import encoder_folder, encoder_name
from datagen.dataset.reader import Dataset
from datagen.dataset.targets import TargetEncoder

log = logging.getLogger(__name__)

_FILES = ("modules.json", "config.json", "config_sentence_transformers.json")  # one of them makes a folder an encoder


def identity_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Encoder identity in config.json of a checkpoint, ensemble or bundle; an older one has name and width alone."""
    return dict(config.get("encoder_identity") or {"name": config.get("encoder"), "width": config.get("target_width")})


def require_same(config: Mapping[str, Any], model: Path | str, identity: Mapping[str, Any], vectors: str) -> None:
    """Check that a model was trained on vectors of the encoder that wrote the given vectors.

    Args:
        config: config.json of the folder `model`, which the message names.
        identity: identity of the encoder that wrote the vectors; empty where it is unknown, and nothing is checked.
        vectors: folder that holds the vectors, for the message.

    Raises:
        UserError: the encoders or their settings differ.
    """
    if not identity:
        return
    trained_for = identity_of(config)
    lines = differences(trained_for, identity, sides=("model", "vectors"))
    if lines:
        raise UserError(
            f"{model} was trained on vectors of another encoder, or of other settings of it, than those of {vectors}:\n"
            + "\n".join(f"  {line}" for line in lines)
            + "\nIts output does not lie in the space of these vectors: take a model trained on them, or write vectors "
            "of the model's encoder: python -m datagen.targets"
        )
    if has_settings(identity) and not has_settings(trained_for):
        _report_unknown(str(model), encoder_name(str(config.get("encoder"))))


@functools.cache
def _report_unknown(model: str, encoder: str) -> None:
    log.warning(
        "%s does not record the settings of its text encoder %s (an earlier version wrote it): nothing shows whether "
        "it was trained on vectors like those it is compared with",
        *(model, encoder),
    )


def check_folder(encoder: str, datasets: Sequence[Dataset]) -> None:
    """Check that the datasets' vectors are of the encoder whose folder `encoder=` names; other values are not checked.

    Two folders of the same last name have the same name under `targets/`. The encoder is loaded on the CPU.

    Raises:
        UserError: naming each dataset whose vectors are of another encoder, or of other settings.
    """
    folder = encoder_folder(encoder)
    if folder is None or not any((folder / name).is_file() for name in _FILES):
        return
    model = TargetEncoder(encoder, "cpu")
    identity = model.identity()
    model.close()
    problems = []
    for dataset in datasets:
        lines = differences(dataset.encoder_identity, identity, sides=("vectors", "encoder"))
        if lines:
            stored = dataset.root / "targets" / model.name
            problems.append(
                f"{stored} holds vectors of another encoder than {folder}, or of other settings of it:\n"
                + "\n".join(f"  {line}" for line in lines)
                + f"\nTake encoder={model.name} to train on the stored vectors, or remove that folder and "
                f"write vectors of the other encoder: python -m datagen.targets out={dataset.root} encoder={encoder}"
            )
    if problems:
        raise UserError("\n".join(problems))
