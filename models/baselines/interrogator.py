"""CLIP Interrogator: a caption followed by the terms of long lists that CLIP finds most similar to the image.

    ClipInterrogator("ViT-L-14/openai", Blip(), "cuda", cache=folder).caption(images)

Lists and rules are those of the package clip-interrogator 0.6.0 (https://github.com/pharmapsychotic/clip-interrogator),
except for the differences listed below. The package's code is not run: with open_clip 3 it loads OpenAI's weights into
a model with another activation and only warns; it downloads features of its terms from another site; and its output can
depend on Python's random order of sets.

z_D is the vector of an image, z_WD those of the terms: W terms, D width of CLIP's space, n some of the terms.
"""

import hashlib
import importlib.util
import json
import math
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import numpy as np
import torch

from core.cache import cached_rows
from core.errors import UserError
from models.baselines.clip import Clip
from models.embedder import Captioner

Mode = Literal["fast", "classic", "best"]

LISTS = ("artists", "flavors", "mediums", "movements")
"""Names of the files NAME.txt, one term per line, in a folder of term lists."""
SITES = (
    *("Artstation", "behance", "cg society", "cgsociety", "deviantart", "dribble", "flickr", "instagram", "pexels"),
    *("pinterest", "pixabay", "pixiv", "polycount", "reddit", "shutterstock", "tumblr", "unsplash", "zbrush central"),
)
TERMS = {"fast": 32, "classic": 3, "best": 32}
"""Largest number of terms after the caption, by mode: all terms of fast, flavors of classic, steps of best."""
LEAST = 8
"""Number of steps of the chain that are taken even if they lower the similarity to the image."""
SHORTLIST = 2048
"""Number of terms that the chain chooses from, and number of terms ranked at once."""

_FORMAT = 1  # version of the rules; part of the key of cached predictions


class Identified(Captioner, Protocol):
    """Captioner with an identity."""

    def identity(self) -> dict[str, Any]:
        """All that the captions depend on, as plain JSON."""
        ...


class ClipInterrogator:
    """Captioner that writes prompts in the style of Stable Diffusion users. Models are loaded at the first image.

    Modes, as in the package:

    * fast: caption, then the 32 terms of all lists most similar to the image.
    * classic: caption, most similar medium (unless the caption begins with it) and artist, site, movement, three
      flavors.
    * best: a greedy chain. It begins with the caption and adds the term, of the 2,048 most similar ones, whose prompt
      is most similar to the image. It stops when no term improves the prompt (after 8 steps or more), after 32 steps,
      or when the prompt fills CLIP's context. The result is the best of the caption, classic with 32 flavors, fast,
      and the chain's best prompt.

    Classic and fast stop at the first term that would fill CLIP's context. Term vectors are rounded to half precision.
    Terms are ranked in parts of 2,048, and each part contributes equally many (37 for about 111,000 terms), so that the
    chain chooses from slightly fewer than 2,048.

    Differences from the package: captions come from `captioner`; ties are broken by the order of the lists, and the
    chain tries terms in the order of their similarity; blank lines of the lists are skipped; an empty caption leaves no
    comma; on a GPU similarities are summed in fp32; images go through CLIP one by one, so that a prompt does not depend
    on its batch; the chain stops when it has used all terms.

    Args:
        clip: Name for `models.baselines.clip.Clip`: `ViT-L-14/openai` has the text encoder of Stable Diffusion 1,
            `ViT-H-14/laion2b_s32b_b79k` that of Stable Diffusion 2.
        captioner: Captioner for the first part of a prompt; the package uses BLIP.
        device: Device of CLIP; half precision on a GPU.
        cache: Folder for the term vectors, 4 D bytes per term.
        mode: fast, classic or best.
        words: Folder with artists.txt, flavors.txt, mediums.txt, movements.txt; None: the package's lists.

    Raises:
        UserError: Lists all problems: unknown mode, missing or empty term lists, unknown CLIP model.
    """

    def __init__(
        self,
        clip: str,
        captioner: Identified,
        device: torch.device | str = "cpu",
        *,
        cache: Path,
        mode: Mode = "best",
        words: Path | None = None,
    ) -> None:
        problems = []
        if mode not in get_args(Mode):
            problems.append(f"captions.mode={mode}: use one of {', '.join(get_args(Mode))}")
        try:
            self._lists = _lists(words)
        except UserError as error:
            problems.append(str(error))
        try:
            self._clip = Clip(clip, device)
        except UserError as error:
            problems.append(str(error))
        if problems:
            raise UserError("\n".join(problems))
        self._captioner, self._mode, self._cache = captioner, mode, cache
        self._words = [word for terms in self._lists.values() for word in terms]

    def identity(self) -> dict[str, Any]:
        """All that the prompts depend on, as plain JSON; no model is loaded.

        Raises:
            UserError: The weights of CLIP or of the captioner are missing.
        """
        return {
            "interrogator": _FORMAT,
            "mode": self._mode,
            "clip": self._clip.identity(),
            "captioner": self._captioner.identity(),
            "words": _hash(self._lists),
        }

    def caption(self, images: list[torch.Tensor]) -> list[str]:
        """Write a prompt for each decoded uint8 image [3, H, W] of any size.

        Raises:
            UserError: Weights are missing or of another model, or the term vectors cannot be written to the disk.
        """
        captions = self._captioner.caption(images)
        return [self._prompt(image, text.strip()) for image, text in zip(images, captions, strict=True)]

    def _prompt(self, image: torch.Tensor, caption: str) -> str:
        z_D = self._clip.embed_image(image)
        cosine_W = (self._vectors @ z_D).cpu()
        if self._mode == "fast":
            return self._fast(cosine_W, caption)
        if self._mode == "classic":
            return self._classic(cosine_W, caption, TERMS["classic"])
        terms = [self._words[i] for i in nearest(cosine_W, SHORTLIST)]
        candidates = [
            caption,
            self._classic(cosine_W, caption, TERMS["best"]),
            self._fast(cosine_W, caption),
            self._chain(z_D, caption, terms),
        ]
        candidates = [prompt for prompt in candidates if prompt]
        return candidates[int(self._cosines(z_D, candidates).argmax())]

    def _fast(self, cosine_W: torch.Tensor, caption: str) -> str:
        terms = [self._words[i] for i in nearest(cosine_W, TERMS["fast"])]
        return self._truncate([caption, *terms])

    def _classic(self, cosine_W: torch.Tensor, caption: str, flavors: int) -> str:
        sizes = [len(terms) for terms in self._lists.values()]
        cosines = dict(zip(self._lists, cosine_W.split(sizes), strict=True))

        def top(kind: str, count: int = 1) -> list[str]:
            return [self._lists[kind][i] for i in nearest(cosines[kind], count)]

        (medium,), (artist,), (site,), (movement,) = (top(k) for k in ("mediums", "artists", "sites", "movements"))
        begin = [f"{caption} {artist}"] if caption.startswith(medium) else [caption, f"{medium} {artist}"]
        return self._truncate([*begin, site, movement, *top("flavors", flavors)])

    def _chain(self, z_D: torch.Tensor, caption: str, terms: Sequence[str]) -> str:
        remaining = list(dict.fromkeys(terms))
        current = caption or remaining.pop(int(self._cosines(z_D, remaining).argmax()))
        best, (cosine,) = current, self._cosines(z_D, [current])
        best_cosine = cosine
        for step in range(TERMS["best"]):
            if not remaining:
                break
            cosine_n = self._cosines(z_D, [f"{current}, {term}" for term in remaining])
            at = int(cosine_n.argmax())  # the first in a tie
            if cosine_n[at] <= cosine and step >= LEAST:
                break
            current, cosine = f"{current}, {remaining.pop(at)}", cosine_n[at]
            if cosine > best_cosine:
                best, best_cosine = current, cosine
            if self._clip.fills(current):
                break
        return best

    def _cosines(self, z_D: torch.Tensor, texts: Sequence[str]) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Cosine similarity of the image to each text."""
        return (self._clip.texts(texts) @ z_D).cpu().numpy()

    def _truncate(self, parts: Sequence[str]) -> str:
        """Join the parts with commas, up to the one that would fill CLIP's context.

        As in the package, the text is split at every comma with a space, and a part is measured without its comma.
        """
        prompt, *others = ", ".join(part for part in parts if part).split(", ")
        for part in others:
            if self._clip.fills(prompt + part):
                break
            prompt = f"{prompt}, {part}"
        return prompt

    @cached_property
    def _vectors(self) -> torch.Tensor:
        """Vectors z_WD of all terms, rounded to half precision, on the device; computed once and cached on disk."""
        words = self._words

        def encode(start: int, stop: int) -> np.ndarray[Any, np.dtype[np.float32]]:
            return self._clip.texts(words[start:stop]).half().float().cpu().numpy()

        folder = self._cache / _hash([_FORMAT, self._clip.identity(), words])
        z_WD = np.array(cached_rows(folder, len(words), encode, "term", "CLIP's vectors of words"))
        return torch.from_numpy(z_WD).to(self._clip.device)


def nearest(cosine_n: torch.Tensor, count: int, part: int = SHORTLIST) -> list[int]:
    """Indices of the `count` largest values, largest first, ties in order.

    More than `part` values are ranked in runs of `part`, each of which contributes equally many candidates, together
    about `part`; the result may have fewer than `count` indices.
    """

    def order(values_n: torch.Tensor) -> torch.Tensor:
        return values_n.argsort(descending=True, stable=True)

    if len(cosine_n) <= part:
        return order(cosine_n)[:count].tolist()
    per_run = max(part // math.ceil(len(cosine_n) / part), 1)
    indices = torch.cat([part * run + order(run_p)[:per_run] for run, run_p in enumerate(cosine_n.split(part))])
    return indices[order(cosine_n[indices])][:count].tolist()


def _lists(words: Path | None) -> dict[str, list[str]]:
    """Read the terms by kind, in the order of the package's merged table.

    Raises:
        UserError: Lists all missing or empty files.
    """
    folder = _packaged() if words is None else words
    missing = [f"{name}.txt" for name in LISTS if not (folder / f"{name}.txt").is_file()]
    if missing:
        raise UserError(f"captions.term_lists: {folder} lacks {', '.join(missing)}; each file needs one term per line")
    raw = {name: _terms(folder / f"{name}.txt") for name in LISTS}
    empty = [f"{name}.txt" for name, terms in raw.items() if not terms]
    if empty:
        raise UserError(
            f"captions.term_lists: {', '.join(empty)} in {folder} hold no term; each file needs one term per line"
        )
    sites = [begin + site + end for begin, end in _SITE_PHRASES for site in SITES]
    artists = [f"{begin} {artist}" for begin in ("by", "inspired by") for artist in raw["artists"]]
    return {**raw, "artists": artists, "sites": sites}


_SITE_PHRASES = (("", ""), ("trending on ", ""), ("featured on ", ""), ("", " contest winner"))


def _terms(path: Path) -> list[str]:
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    return [line.strip() for line in lines if line.strip()]


def _packaged() -> Path:
    """Folder of the term lists of clip-interrogator, found without importing the package and its dependencies."""
    spec = importlib.util.find_spec("clip_interrogator")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    if not folders:
        raise UserError(
            "captions.term_lists: the lists of CLIP Interrogator are in another package: pip install "
            f"'im2emb[captioners]', or name a folder with {', '.join(f'{name}.txt' for name in LISTS)}"
        )
    return Path(folders[0]) / "data"


def _hash(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).hexdigest()
