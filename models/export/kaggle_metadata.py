"""Kaggle's dataset-metadata.json for a bundle, within the bounds that Kaggle's client checks.

dataset_metadata(config, CardDetails(licence="apache-2.0"))
"""

import re
from collections.abc import Mapping
from typing import Any

from core.errors import UserError
from models.export.model_card import TITLE, CardDetails, card_body, card_title, encoder_name, length_problems

SLUG = (6, 50)
"""Shortest and longest slug of a dataset, characters."""
SUBTITLE = (20, 80)
"""Shortest and longest subtitle, characters."""
OWNER_PLACEHOLDER = "INSERT_USERNAME"
"""Owner in the metadata of a bundle, as `kaggle datasets init` writes it; `upload.push` replaces it."""
# Kaggle's names of licences, from the documentation of its client; the hub's names are the same in lower case
_KAGGLE_LICENCES = (
    "CC0-1.0", "CC-BY-3.0", "CC-BY-4.0", "CC-BY-SA-3.0", "CC-BY-SA-4.0", "CC-BY-NC-4.0", "CC-BY-NC-SA-4.0",
    "CC-BY-ND-4.0", "CC-BY-NC-ND-4.0", "CDLA-Permissive-1.0", "CDLA-Sharing-1.0", "ODbL-1.0", "ODC-BY-1.0", "PDDL",
    "GPL-2.0", "GPL-3.0", "LGPL-3.0", "AGPL-3.0", "apache-2.0", "unknown", "other",
)  # fmt: skip


def dataset_metadata(config: Mapping[str, Any], details: CardDetails) -> dict[str, Any]:
    """Build dataset-metadata.json with `OWNER_PLACEHOLDER` as owner.

    Raises:
        UserError: Title, licence or author are invalid.
    """
    title = card_title(config, details)
    known = {name.lower(): name for name in _KAGGLE_LICENCES}
    slug = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
    if len(slug) < SLUG[0]:  # the title has few Latin letters
        slug = f"im2emb-{slug}".strip("-") + "-bundle" * (not slug)
    metadata = {
        "title": title,
        "id": f"{OWNER_PLACEHOLDER}/{slug[: SLUG[1]].strip('-')}",
        "subtitle": f"Images to {config['target_width']}-d {encoder_name(config)} vectors"[: SUBTITLE[1]],
        "description": card_body(config, details),
        "licenses": [{"name": known.get(details.licence or "other", "other")}],
        "keywords": ["computer vision", "deep learning"],
    }
    problems = metadata_problems(metadata)
    if problems:
        raise UserError("the metadata cannot be written:\n" + "\n".join(f"  {problem}" for problem in problems))
    return metadata


def metadata_problems(metadata: Mapping[str, Any]) -> list[str]:
    """Problems for which Kaggle's client would refuse a dataset-metadata.json, one line each."""
    missing = [f"{key}: missing" for key in ("title", "id", "licenses") if not metadata.get(key)]
    if missing:
        return missing
    owner, _, slug = str(metadata["id"]).partition("/")
    problems = length_problems("title", metadata["title"], TITLE) + length_problems("id", slug, SLUG)
    if not owner:
        problems.append(f"id: {metadata['id']!r} is not USER/SLUG")
    if len(metadata["licenses"]) != 1:
        problems.append(f"licenses: {len(metadata['licenses'])} licences, but exactly one is required")
    elif metadata["licenses"][0].get("name") not in _KAGGLE_LICENCES:
        problems.append(
            f"licenses: {metadata['licenses'][0].get('name')!r} is not one of {', '.join(_KAGGLE_LICENCES)}"
        )
    if metadata.get("subtitle"):
        problems += length_problems("subtitle", metadata["subtitle"], SUBTITLE)
    return problems
