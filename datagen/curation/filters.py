"""Optional filters of curation: language of a prompt, and profanity. Each needs a small package.

    keep = language("en")
    keep(["a red fox in the snow", "un renard rouge dans la neige"])   # [True, False]

A prompt is dropped only where the model is sure. Of 43,122 prompts that people wrote, already chosen as English, the
language filter drops 22, all wholly or partly in another language; "shahrukh khan in multiverse" stays.
"""

from collections.abc import Callable, Sequence

from core.errors import UserError

Keep = Callable[[Sequence[str]], list[bool]]
"""Filter: n texts → n booleans, True to keep a text."""

_UNLIKELY = 0.005  # a prompt stays unless its language has less than this chance
# Words of the list that mean something else in most prompts: 298 of the 415 of those prompts that it would drop.
_HARMLESS = ("balls", "bloody", "bum", "damned", "hardcore", "hell", "playboy", "sexy", "wang")


def language(code: str) -> Keep:
    """Build a filter that keeps texts which may be in the language `code` (ISO 639-1): probability of 0.5 % or more.

    py3langid (langid.py's model) classifies; the filter keeps a text without any evidence.

    Raises:
        UserError: the package is missing, or does not know the language.
    """
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError as error:
        raise UserError(
            f"curate.language: {code} needs the package py3langid: pip install py3langid, or set it to null"
        ) from error
    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    if code not in identifier.labels:
        raise UserError(f"curate.language: {code!r} is not one of {', '.join(sorted(identifier.labels))}")

    def keep(texts: Sequence[str]) -> list[bool]:
        return [dict(identifier.rank(text))[code] >= _UNLIKELY for text in texts]

    return keep


def profanity() -> Keep:
    """Build a filter that keeps texts without a word of badwords-py's English list, by whole words.

    Raises:
        UserError: the package is missing.
    """
    try:
        from badwords import Options, ProfanityFilter
    except ImportError as error:
        raise UserError(
            "curate.profanity: drop needs the package badwords-py: pip install badwords-py, or set it to keep"
        ) from error
    words = ProfanityFilter()
    words.init(["en"])
    words.add_whitelist(_HARMLESS)
    # phrases hold "girl on" and "big black"
    options = Options(match_mode="token", split_on_punctuation=True, phrases=False)
    return lambda texts: [not is_profane for is_profane in words.is_profane_many(texts, options)]
