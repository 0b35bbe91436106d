"""datagen/dataset/prompt_normal_form.py: which prompts are the same but for their writing."""

import pytest

from datagen.dataset.prompt_normal_form import normal_form

VARIANTS = [
    "A red fox",
    "a red fox.",
    "A  RED\tFOX ",
    "a red, fox!",
    "“a red fox”",
    "ａ ｒｅｄ ｆｏｘ",  # full width
    "a red\u00a0fox",
    "a red\u200b fox",
    "a-red-fox…",
    "a red´ fox",
    "a red\u02bc fox",
    "a red fox\ufe0f",
]


@pytest.mark.parametrize("variant", VARIANTS)
def test_case_punctuation_space_and_unicode_form_do_not_count(variant: str) -> None:
    assert normal_form(variant) == normal_form("a red fox")


def test_composed_and_decomposed_accents_are_equal() -> None:
    assert normal_form("caf\u00e9") == normal_form("CAFE\u0301")


@pytest.mark.parametrize(
    ("a", "b"), [("a red fox", "a red box"), ("!!!", "???"), ("🦊", "🐺"), ("café", "cafe"), ("猫", "犬")]
)
def test_other_prompts_differ(a: str, b: str) -> None:
    assert normal_form(a) != normal_form(b)


def test_prompt_normal_form_is_its_own_normal_form() -> None:
    for text in ["Straße ẞ", "ǆ ͅ", "Ⅷ ﬁne ㌔", "İstanbul", *VARIANTS]:
        assert normal_form(normal_form(text)) == normal_form(text)
