"""CLIP's byte-pair tokenizer, built without a download from the vocabulary in the open_clip package.

    from datagen.prompts.clip_tokenizer import token_counts
    token_counts(["a photo of a cat"])  # array([7]): five words, start and end

Stable Diffusion 2 reads 77 tokens of a prompt, start and end included, and drops the rest. Lengths are counted in these
tokens because prompts cut at 77 characters lost a team most of their text.

`clean` does what open_clip does to a text before tokenization (ftfy, HTML entities, white space, lower case), so that
`ids of clean(text)` are the ids that the host's script fed to the text encoder. transformers' own cleaning is only NFC,
white space and lower case: without `clean`, mojibake, entities, curly quotes, ligatures and full-width letters differ.
Two texts still differ, on purpose: open_clip reads a literal `<start_of_text>` or `<end_of_text>` in a prompt as a
special token, this tokenizer reads `<|startoftext|>` or `<|endoftext|>` so.
"""

import gzip
import html
import importlib.util
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from core.errors import UserError

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

CONTEXT = 77  # tokens that the text encoder reads, start and end included
START, END = "<|startoftext|>", "<|endoftext|>"  # transformers' names; open_clip writes <start_of_text>, <end_of_text>
VOCABULARY_SIZE = 49408
MERGES = VOCABULARY_SIZE - 2 * 256 - 2  # the file holds more lines; the rest is every byte twice and two special tokens
CHUNK = 8192  # texts at a time: bounds the memory that the words of a large list take


def clean(text: str) -> str:
    """Clean a text as open_clip does: ftfy, entities resolved twice, single spaces, lower case."""
    # ftfy takes most of the time, and has nothing to fix in printable ASCII without an entity.
    if not (text.isascii() and text.isprintable() and "&" not in text):
        import ftfy

        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split()).lower()


@lru_cache(maxsize=4)
def clip_tokenizer(pad_token: str = "!") -> "CLIPTokenizer":
    """Build transformers' `CLIPTokenizer` with CLIP's 49,408 tokens; give it texts from `clean`.

    Args:
        pad_token: Stable Diffusion 2 pads with "!" (id 0), as open_clip does; the first CLIP with the end token.

    Raises:
        UserError: open_clip, which holds the vocabulary, is not installed.

    The tokenizer is shared between callers of one `pad_token`; calls with `padding` or `truncation` set them again.
    Saved and loaded again it differs: transformers then makes a special token of the padding, see below.
    """
    from transformers import CLIPTokenizer

    merges = _merges()
    alphabet = _byte_alphabet()
    tokens = [*alphabet, *(a + "</w>" for a in alphabet), *("".join(pair) for pair in merges), START, END]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if len(vocabulary) != VOCABULARY_SIZE:
        raise UserError(
            f"open_clip's vocabulary gives {len(vocabulary)} tokens, not {VOCABULARY_SIZE}: "
            f"its file {_vocabulary_path()} is not CLIP's; reinstall open_clip_torch 3."
        )
    # Without model_max_length a long prompt would pass untruncated and overflow the 77 learned positions.
    # The annotation of `merges` forgets pairs, which the class takes.
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=cast(Any, merges), model_max_length=CONTEXT)
    # Not `pad_token=` above: that makes a special token of it, and each "!" written in a prompt would become id 0, the
    # padding, where open_clip reads "!</w>" (id 256), and "!!!" as one token.
    tokenizer.pad_token = pad_token
    return tokenizer


def token_counts(texts: list[str]) -> NDArray[np.int64]:
    """Count the CLIP tokens of each text, start and end included, untruncated: int64 [N]. SD 2 reads up to 77.

    Texts are cleaned as open_clip cleans them; the empty text counts 2.

    Raises:
        UserError: open_clip, which holds the vocabulary, is not installed.
    """
    counter = _counter()
    # No token spans white space, so a text's count is the sum of its words', and the words of 100,000 prompts are few:
    # 0.9 s in place of 5.3 for 100,000 of 35 words.
    pieces: dict[str, int] = {}
    counts = np.empty(len(texts), np.int64)
    for start in range(0, len(texts), CHUNK):
        words = [clean(text).split() for text in texts[start : start + CHUNK]]
        new = list({word for text in words for word in text} - pieces.keys())
        pieces.update(zip(new, map(len, counter.encode_batch_fast(new, add_special_tokens=False)), strict=True))
        counts[start : start + len(words)] = [2 + sum(map(pieces.__getitem__, text)) for text in words]
    return counts


@lru_cache(maxsize=1)
def _counter() -> Any:
    """Build a separate `tokenizers.Tokenizer` for counting: the shared one may have truncation or padding set."""
    from tokenizers import Tokenizer

    counter = Tokenizer.from_str(clip_tokenizer().backend_tokenizer.to_str())
    counter.no_truncation()
    counter.no_padding()
    return counter


def _vocabulary_path() -> Path:
    # find_spec does not run the package: importing open_clip would import torch, timm and torchvision.
    spec = importlib.util.find_spec("open_clip")
    if spec is None or spec.origin is None:
        raise UserError(
            "CLIP's vocabulary comes with the package open_clip_torch, which is not installed. "
            "Install the extra that you need: pip install -e '.[sd]' or '.[clip]'."
        )
    path = Path(spec.origin).parent / "bpe_simple_vocab_16e6.txt.gz"
    if not path.is_file():
        raise UserError(f"open_clip carries no vocabulary at {path}: reinstall open_clip_torch 3.")
    return path


def _merges() -> list[tuple[str, str]]:
    """Read CLIP's merges, most frequent first. The file's first line is a version, and CLIP does not use its tail."""
    with gzip.open(_vocabulary_path(), "rt", encoding="utf-8") as lines:
        header = next(lines)
        if "#version: 0.2" not in header:
            raise UserError(
                f"unknown vocabulary {header.strip()!r} in {_vocabulary_path()}: reinstall open_clip_torch 3."
            )
        pairs = [tuple(line.split()) for line, _ in zip(lines, range(MERGES), strict=False)]
    return [(left, right) for left, right in pairs]


def _byte_alphabet() -> list[str]:
    """List a printable character for each of the 256 bytes, in the order of their ids: printable bytes come first."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [*map(chr, printable), *(chr(256 + i) for i in range(256 - len(printable)))]
