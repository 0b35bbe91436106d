"""CLIP Interrogator: a caption, and the words of long lists that CLIP finds nearest to the image.

    ClipInterrogator("ViT-L-14/openai", Blip(), "cuda", cache=folder).caption(images)

The lists are those of the package clip-interrogator 0.6.0 (https://github.com/pharmapsychotic/clip-interrogator), and
so are the rules, in all that is not said to differ. The package's own code is not run: with open_clip 3 it loads
OpenAI's weights into a model of another activation, and only warns; it fetches features of its words from a place of
its own; and what it tells may depend on Python's random order of sets.

z_D is an image's vector, z_WD those of the words: W words, D width of CLIP's space, n of some of them.
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

from core.cache import PART, cached_rows
from core.errors import UserError
from core.progress import progress
from models.baselines.clip import Clip
from models.embedder import Captioner

Mode = Literal["fast", "classic", "best"]

LISTS = ("artists", "flavors", "mediums", "movements")
"""The files, NAME.txt with a term a line, of a folder of words."""
SITES = (
    *("Artstation", "behance", "cg society", "cgsociety", "deviantart", "dribble", "flickr", "instagram", "pexels"),
    *("pinterest", "pixabay", "pixiv", "polycount", "reddit", "shutterstock", "tumblr", "unsplash", "zbrush central"),
)
TERMS = {"fast": 32, "classic": 3, "best": 32}
"""Terms after the caption at most: all of fast, the flavors of classic, the steps of best's chain."""
LEAST = 8
"""Steps of the chain that are taken even where they make the prompt less like the image."""
SHORTLIST = 2048
"""Terms that the chain chooses from, and terms of a part of the lists when they are ranked."""

_FORMAT = 1  # of the rules: other rules need another number, or old predictions would stand for new ones


class Identified(Captioner, Protocol):
    """A captioner that tells what its captions depend on."""

    def identity(self) -> dict[str, Any]: ...


class ClipInterrogator:
    """Prompts as people wrote them for Stable Diffusion. Nothing is loaded before the first image.

    The modes, as the package has them:

    * fast: caption, then the 32 terms of all lists that are nearest to the image.
    * classic: caption, nearest medium (unless the caption begins with it) and artist, site, movement, three flavors.
    * best: a chain that begins with the caption and adds, of the nearest 2,048 terms, the one whose prompt is nearest
      to the image, and goes on while that is an improvement, for 8 steps at least and 32 at most, or until the
      prompt fills CLIP's tokens; then the nearest of: the caption, classic with 32 flavors, fast, the chain's best.

    Classic and fast leave off at the first term that would fill CLIP's tokens. Vectors of words are rounded to half
    precision. The nearest terms are looked for in parts of 2,048, as many in each (37 of some 111,000 terms), so that
    the chain chooses from a few less than 2,048.

    What differs: captions come from `captioner`; equally near terms stand in the order of the lists, and the chain
    tries them in the order of their nearness; blank lines of the lists are left out; an empty caption leaves no comma
    behind; on a GPU similarities are added up in fp32; one image goes through CLIP at a time, so that its prompt
    does not depend on its companions; the chain ends where it has used all terms.

    Args:
        clip: see `models.baselines.clip.Clip`: `ViT-L-14/openai`, which Stable Diffusion 1 has its text encoder from,
            or `ViT-H-14/laion2b_s32b_b79k`, which Stable Diffusion 2 has.
        captioner: of the first part of a prompt; the package's is BLIP.
        device: of CLIP: half precision on a GPU.
        mode: fast, classic or best.
        words: a folder with artists.txt, flavors.txt, mediums.txt, movements.txt; None is the package's.
        cache: a folder that the vectors of the words are kept in: 4 D bytes a term; None computes them anew each time.

    Raises:
        UserError: an unknown mode, words that are not there or empty, a CLIP that there is not; all at once.
    """

    def __init__(
        self,
        clip: str,
        captioner: Identified,
        device: torch.device | str = "cpu",
        *,
        mode: Mode = "best",
        words: Path | None = None,
        cache: Path | None = None,
    ) -> None:
        problems = []
        if mode not in get_args(Mode):
            problems.append(f"captions.mode={mode}: take one of {', '.join(get_args(Mode))}")
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
        """All that its prompts depend on, as plain JSON; no model is loaded.

        Raises:
            UserError: CLIP's or the captioner's weights are not there.
        """
        return {
            "interrogator": _FORMAT,
            "mode": self._mode,
            "clip": self._clip.identity(),
            "captioner": self._captioner.identity(),
            "words": _hash(self._lists),
        }

    def caption(self, images: list[torch.Tensor]) -> list[str]:
        """Decoded uint8 images [3, H, W] of any size → a prompt for each.

        Raises:
            UserError: weights are not there or not of such a model; the disk refuses the vectors of the words.
        """
        captions = self._captioner.caption(images)
        return [self._prompt(image, text.strip()) for image, text in zip(images, captions, strict=True)]

    def _prompt(self, image: torch.Tensor, caption: str) -> str:
        z_D = self._clip.embed_image(image)
        near_W = (self._vectors @ z_D).cpu()
        if self._mode == "fast":
            return self._fast(near_W, caption)
        if self._mode == "classic":
            return self._classic(near_W, caption, TERMS["classic"])
        terms = [self._words[i] for i in nearest(near_W, SHORTLIST)]
        tries = [
            caption,
            self._classic(near_W, caption, TERMS["best"]),
            self._fast(near_W, caption),
            self._chain(z_D, caption, terms),
        ]
        tries = [prompt for prompt in tries if prompt]
        return tries[int(self._near(z_D, tries).argmax())]

    def _fast(self, near_W: torch.Tensor, caption: str) -> str:
        terms = [self._words[i] for i in nearest(near_W, TERMS["fast"])]
        return self._fitting([caption, *terms])

    def _classic(self, near_W: torch.Tensor, caption: str, flavors: int) -> str:
        near = dict(zip(self._lists, near_W.split([len(terms) for terms in self._lists.values()]), strict=True))

        def top(kind: str, count: int = 1) -> list[str]:
            return [self._lists[kind][i] for i in nearest(near[kind], count)]

        (medium,), (artist,), (site,), (movement,) = (top(k) for k in ("mediums", "artists", "sites", "movements"))
        begin = [f"{caption} {artist}"] if caption.startswith(medium) else [caption, f"{medium} {artist}"]
        return self._fitting([*begin, site, movement, *top("flavors", flavors)])

    def _chain(self, z_D: torch.Tensor, caption: str, terms: Sequence[str]) -> str:
        left = list(dict.fromkeys(terms))
        current = caption or left.pop(int(self._near(z_D, left).argmax()))
        best, (near,) = current, self._near(z_D, [current])
        nearest_yet = near
        for step in range(TERMS["best"]):
            if not left:
                break
            near_n = self._near(z_D, [f"{current}, {term}" for term in left])
            at = int(near_n.argmax())  # the first of equal ones
            if near_n[at] <= near and step >= LEAST:
                break
            current, near = f"{current}, {left.pop(at)}", near_n[at]
            if near > nearest_yet:
                best, nearest_yet = current, near
            if self._clip.fills(current):
                break
        return best

    def _near(self, z_D: torch.Tensor, texts: Sequence[str]) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Cosine of the image to each text."""
        return (self._clip.texts(texts) @ z_D).cpu().numpy()

    def _fitting(self, parts: Sequence[str]) -> str:
        """The parts with commas between, cut before the one that would fill CLIP's tokens.

        As in the package, a part is any run without a comma and a space, and is measured without the comma before it.
        """
        first, *others = ", ".join(part for part in parts if part).split(", ")
        kept = first
        for part in others:
            if self._clip.fills(kept + part):
                break
            kept = f"{kept}, {part}"
        return kept

    @cached_property
    def _vectors(self) -> torch.Tensor:
        """z_WD of all words in half precision's values, on the device: computed once, and kept on disk."""
        words = self._words

        def make(start: int, stop: int) -> np.ndarray[Any, np.dtype[np.float32]]:
            return self._clip.texts(words[start:stop]).half().float().cpu().numpy()

        unit, what = "term", "CLIP's vectors of words"
        if self._cache is not None:
            folder = self._cache / _hash([_FORMAT, self._clip.identity(), words])
            z_WD = np.array(cached_rows(folder, len(words), make, unit, what))
        else:
            parts = []
            with progress(len(words), unit, what) as bar:
                for start in range(0, len(words), PART):
                    parts.append(make(start, min(start + PART, len(words))))
                    bar.update(len(parts[-1]))
            z_WD = np.concatenate(parts)
        return torch.from_numpy(z_WD).to(self._clip.device)


def nearest(near_n: torch.Tensor, count: int, part: int = SHORTLIST) -> list[int]:
    """The places of the `count` highest of `near_n`, highest first, of equal ones the first.

    Of more than `part` numbers, only so many of each run of `part` come into question that all runs together give
    `part` of them; it may be less than `count`.
    """

    def order(values_n: torch.Tensor) -> torch.Tensor:
        return values_n.argsort(descending=True, stable=True)

    if len(near_n) <= part:
        return order(near_n)[:count].tolist()
    kept = max(part // math.ceil(len(near_n) / part), 1)
    places = torch.cat([first + order(run_p)[:kept] for first, run_p in _runs(near_n, part)])
    return places[order(near_n[places])][:count].tolist()


def _runs(values_n: torch.Tensor, length: int) -> list[tuple[int, torch.Tensor]]:
    return [(first, values_n[first : first + length]) for first in range(0, len(values_n), length)]


def _lists(words: Path | None) -> dict[str, list[str]]:
    """Kind → terms, in the order of the package's merged table.

    Raises:
        UserError: files that are absent or empty; all of them.
    """
    folder = _packaged() if words is None else words
    absent = [f"{name}.txt" for name in LISTS if not (folder / f"{name}.txt").is_file()]
    if absent:
        raise UserError(f"captions.term_lists: {folder} lacks {', '.join(absent)}; each holds a term a line")
    raw = {name: _terms(folder / f"{name}.txt") for name in LISTS}
    empty = [f"{name}.txt" for name, terms in raw.items() if not terms]
    if empty:
        raise UserError(f"captions.term_lists: {folder} holds no term in {', '.join(empty)}; each holds a term a line")
    sites = [begin + site + end for begin, end in _ABOUT_SITES for site in SITES]
    artists = [f"{begin} {artist}" for begin in ("by", "inspired by") for artist in raw["artists"]]
    return {**raw, "artists": artists, "sites": sites}


_ABOUT_SITES = (("", ""), ("trending on ", ""), ("featured on ", ""), ("", " contest winner"))


def _terms(path: Path) -> list[str]:
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    return [line.strip() for line in lines if line.strip()]


def _packaged() -> Path:
    """The lists of clip-interrogator, found without importing it: that would import all that it could run."""
    spec = importlib.util.find_spec("clip_interrogator")
    places = list(spec.submodule_search_locations or ()) if spec else []
    if not places:
        raise UserError(
            "captions.term_lists: the lists of CLIP Interrogator are in another package: pip install "
            f"'im2emb[captioners]', or name a folder with {', '.join(f'{name}.txt' for name in LISTS)}"
        )
    return Path(places[0]) / "data"


def _hash(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).hexdigest()
