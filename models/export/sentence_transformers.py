"""What makes a bundle a model of sentence-transformers: the two files that it looks for, beside im2emb.py.

SentenceTransformer("bundle", trust_remote_code=True).encode(["a.png"])
"""

import json


def st_files() -> dict[str, str]:
    """File name → text. They are the same for every bundle: what differs is in its own config.json."""
    module = {"idx": 0, "name": "0", "path": "", "type": "im2emb.ImageEncoder"}
    model = {
        "default_prompt_name": None,
        "model_type": "SentenceTransformer",
        "prompts": {},
        "requirements": {
            "sentence-transformers": {"reason": "images came with version 6", "specifier": ">=6"},
        },
        "similarity_fn_name": "cosine",
    }
    return {"config_sentence_transformers.json": _text(model), "modules.json": _text([module])}


def _text(value: object) -> str:
    return json.dumps(value, indent=2, sort_keys=True) + "\n"
