"""CLIP's tokenizer against open_clip's own, on texts of every kind that prompts are made of.

pytest tests/datagen/prompts/test_clip_tokenizer.py
"""

import importlib.util
import itertools
import random
import subprocess
import sys
import time
from typing import Any

import numpy as np
import pytest

from core.errors import UserError
from core.paths import ROOT
from datagen.prompts import clip_tokenizer as ct
from datagen.prompts.clip_tokenizer import clean, clip_tokenizer, token_counts

PLAIN = """
a photo of a cat
a red cat
an oil painting of two dogs in the sea, highly detailed
ramen carved out of fractal rose ebony, in the style of hudson river school
ultrasaurus holding a black bean taco in the woods, near an identical cheneosaurus
a thundering retro robot crane inks on parchment with a droopy french bulldog
portrait painting of a shimmering greek hero, next to a loud frill-necked lizard
an astronaut standing on a engaging white rose, in the midst of by ivory cherry blossoms
Kaggle employee Phil ordering all the best donuts, with a speech bubble that proclaims "Donuts. It's what's for dinner!"
wow! such art!! !bang !important!? ¡hola! "quoted!"
hyper realistic photo of very friendly and dystopian crater
it's the dog's, they've we'll I'd you're I'm don't CAN'T O'Brien rock'n'roll 'quoted' ''double''
8k, 4K, UHD, f/1.4, 35mm, ISO100, 1920x1080, 16:9, 3.14159, 1,000,000, 50%, $5, #1, @home, c++, A&B
trending on artstation!!! (((masterpiece))), [best quality], {sharp focus}, <lora:x:0.8>, --ar 16:9 --v 4
under_score, dash-ed, em—dash, en–dash, el...lipsis, semi;colon, back\\slash, pipe|d, til~de, car^et, `tick`
the   many    spaces	and	tabs\t and trailing\x20\x20
MiXeD CaSe ÄÖÜ ß ŒUVRE naïve café façade jalapeño Dvořák Ångström
""".strip("\n").split("\n")

UNICODE = """
"curly" 'quotes', «guillemets», „low“, ‹single›, 「corner」
“curly” ‘quotes’ ‚low’ … – — ― • · § ¶ † ‡ ° ± × ÷ µ ½ ¼ ¾ ² ³ ¹
ﬁne oﬃce ﬂower ﬀ ligatures
ｆｕｌｌ ｗｉｄｔｈ １２３ ！？
Привет мир, Москва ночью
Ελληνικά κείμενο στη θάλασσα
你好，世界 水墨画
日本語のテキスト、浮世絵
한국어 텍스트
שלום עולם
مرحبا بالعالم
हिन्दी पाठ
ไทย ข้อความ
e\u0301 decomposed A\u030a o\u0308 n\u0303 and composed é Å ö ñ
no\u00a0break thin\u2009space zero\u200bwidth line\u2028separator ideographic\u3000space bom\ufeffmark
soft\u00adhyphen, control\x07bell, escape\x1b[31mred\x1b[0m, nul\x00byte
İstanbul ıIiİ ΟΔΟΣ ΣΊΣΥΦΟΣ Ǆ ǅ ẞ
😀 😂🔥 👩‍🚀 👨‍👩‍👧‍👦 🇬🇧 🏳️‍🌈 ❤️ ✨ 1️⃣ 🧑🏽‍🎨 emoji
≠ ≤ ≥ ∞ ∑ √ π Ω € £ ¥ ₽ ™ © ® ← → ↑ ↓ ★ ☆ ♥ ♪ █ ░
cafÃ© mojibake: donâ€™t, sÃ£o paulo, naÃ¯ve, â€œquotedâ€\x9d, Ã¼ber
٣٤٥ Ⅷ ① ⅓ ৪ numbers of other scripts
""".strip("\n").split("\n")

ENTITIES = """
rock &amp; roll, R&amp;B, AT&T, a & b, &amp;amp; twice
&lt;b&gt;bold&lt;/b&gt; &quot;quoted&quot; &#39;single&#39; &nbsp; space &copy; &hearts; &eacute;
<i>tags</i> &amp; entities together, &#x1F600; &notanentity; &amp
""".strip("\n").split("\n")


def _texts() -> list[str]:
    """About 400 texts: those above, edge cases, and mixtures of their words from a fixed seed."""
    texts = [
        *PLAIN,
        *UNICODE,
        *ENTITIES,
        "",
        " ",
        "\n\t",
        "a",
        "'",
        "'s",
        "!",
        "!!!!",
        "x" * 300,
        "cat " * 100,
        "。" * 40,
    ]
    words = list(itertools.chain.from_iterable(text.split() for text in [*PLAIN, *UNICODE, *ENTITIES]))
    rng = random.Random(0)
    return texts + [" ".join(rng.choices(words, k=rng.randint(1, 90))) for _ in range(350)]


@pytest.fixture(scope="module")
def simple() -> Any:
    """open_clip's tokenizer alone: the whole package takes seconds to import, and torchvision with it."""
    spec = importlib.util.find_spec("open_clip")
    assert spec is not None
    assert spec.submodule_search_locations
    file = importlib.util.spec_from_file_location(
        "open_clip_tokenizer", f"{spec.submodule_search_locations[0]}/tokenizer.py"
    )
    assert file is not None
    assert file.loader is not None
    module = importlib.util.module_from_spec(file)
    file.loader.exec_module(module)
    return module.SimpleTokenizer()


def test_token_ids_match_open_clip(simple: Any) -> None:
    """All of them: `clean` fixes, unescapes and lowers as open_clip does. Only literal special tokens are left out."""
    texts = _texts()
    assert len(texts) >= 200
    ours = clip_tokenizer()([clean(t) for t in texts], padding="max_length", truncation=True, max_length=77)[
        "input_ids"
    ]
    theirs = simple(texts).tolist()
    wrong = [text for text, a, b in zip(texts, ours, theirs, strict=True) if a != b]
    assert not wrong


def test_plain_texts_need_no_cleaning(simple: Any) -> None:
    """transformers' own cleaning is NFC, white space and lower case; ftfy and entities are open_clip's alone."""

    def differs(text: str) -> bool:
        return clip_tokenizer()(text)["input_ids"][1:-1] != simple.encode(text)

    assert not any(map(differs, PLAIN))
    assert all(map(differs, [ENTITIES[0], UNICODE[2], "cafÃ© “curly”"]))


def test_reference_ids_of_sd2_test_match_open_clip(simple: Any) -> None:
    from tests.datagen.renderers.test_sd2 import IDS, PROMPTS

    assert [[49406, *simple.encode(p), 49407] for p in PROMPTS] == IDS


def test_special_tokens_and_padding() -> None:
    tokenizer = clip_tokenizer()
    assert len(tokenizer) == ct.VOCABULARY_SIZE
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (49406, 49407)
    assert tokenizer.model_max_length == 77
    assert tokenizer.padding_side == "right"
    sd2, first = (
        clip_tokenizer(pad)("a cat", padding="max_length", max_length=77)["input_ids"] for pad in ("!", "<|endoftext|>")
    )
    assert sd2 == [49406, 320, 2368, 49407] + [0] * 73
    # a written "!" is a word of its own, not padding
    assert clip_tokenizer()("a cat!")["input_ids"] == [49406, 320, 2368, 256, 49407]
    assert first == [49406, 320, 2368] + [49407] * 74


def test_token_counts_match_untruncated_open_clip(simple: Any, caplog: pytest.LogCaptureFixture) -> None:
    texts = _texts()
    # left in the state that would truncate and pad the counts
    clip_tokenizer()(["a"], padding="max_length", truncation=True, max_length=77)
    counts = token_counts(texts)
    assert counts.dtype == np.int64
    assert counts.tolist() == [2 + len(simple.encode(t)) for t in texts]
    assert counts.max() > 77
    assert not caplog.records
    assert token_counts([]).shape == (0,)


def test_ascii_fast_path_gives_same_ids() -> None:
    import html

    import ftfy

    rng = random.Random(1)
    printable = [chr(c) for c in range(32, 127)]
    texts = ["".join(rng.choices(printable, k=rng.randint(0, 60))) for _ in range(2000)] + _texts()
    for text in texts:
        assert clean(text) == " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split()).lower()


def test_counting_is_fast() -> None:
    rng = random.Random(2)
    words = " ".join(PLAIN).replace("“", "").split()
    texts = [" ".join(rng.choices([w for w in words if w.isascii()], k=35)) for _ in range(20_000)]
    token_counts(texts[:10])  # builds the tokenizer
    start = time.perf_counter()
    token_counts(texts)
    # 0.2 s on two quiet cores, 1.1 s text by text; the bound leaves room for a busy machine
    assert time.perf_counter() - start < 5


def test_without_open_clip_the_hint_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ct.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"open_clip_torch.*pip install -e '\.\[sd\]'"):
        clip_tokenizer(pad_token="a</w>")  # a padding that no cache holds


def test_import_loads_no_heavy_package() -> None:
    code = (
        "import sys, datagen.prompts.clip_tokenizer\n"
        "sys.exit(', '.join({'torch', 'transformers', 'open_clip', 'ftfy'} & sys.modules.keys()) or 0)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)
