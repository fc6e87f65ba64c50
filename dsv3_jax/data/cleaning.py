"""What a document must be to be trained on: a few rules that hold for prose, code and mathematics in any language.

Line ends become \\n, a byte order mark and stray control characters go; nothing else of a text is changed. A document
that a rule refuses is dropped whole, with the reason. The limits are wide: they are for what is no text at all
(binary data, dumps, encoded data, wrongly decoded bytes), not for what is badly written.
"""

import dataclasses
import re
from collections.abc import Callable

MIN_CHARACTERS = 20  # that are not white space
MAX_CONTROL_SHARE = 0.001  # of characters
MAX_MOJIBAKE_SHARE = 0.005  # of characters
MIN_LETTER_SHARE = 0.25  # of the characters that are not white space
LONG_WORD = 100  # characters; no language has such words, minified and encoded data have
MAX_LONG_WORD_SHARE = 0.3  # of the characters that are not white space
MIN_REPEATED_LINES = 20  # a shorter document may repeat itself
MAX_REPEATED_SHARE = 0.6  # of the characters in lines of MIN_LINE_CHARACTERS or more
MIN_LINE_CHARACTERS = 10  # shorter ones, such as closing brackets, repeat in good code

_LINE_ENDS = re.compile("\r\n?")
_CONTROLS = re.compile("[\x01-\x08\x0b\x0e-\x1f\x7f-\x9f\ufeff\ufffe\uffff]")
_MOJIBAKE = re.compile("\ufffd|[\u00c2\u00c3][\u0080-\u00bf]|\u00e2[\u0080\u20ac]|[\u00d0\u00d1][\u0080-\u00bf]")
_LETTERS = re.compile(r"[^\W\d_]+")
_LONG_WORDS = re.compile(rf"[!-~]{{{LONG_WORD},}}")


@dataclasses.dataclass(frozen=True)
class Unfit:
    """Says why a text is not trained on."""

    reason: str  # a key of REASONS


def clean(text: str) -> str | Unfit:
    """Returns the text to train on, or the first rule that refuses it."""
    text = _LINE_ENDS.sub("\n", text) if "\r" in text else text
    for reason, refuses in _RULES_FOR_RAW.items():
        if refuses(text):
            return Unfit(reason)
    text = _CONTROLS.sub("", text)
    for reason, refuses in _RULES.items():
        if refuses(text):
            return Unfit(reason)
    return text


def _is_binary(text: str) -> bool:
    return "\0" in text or _total_length(_CONTROLS, text) > max(1, MAX_CONTROL_SHARE * len(text))


def _is_mojibake(text: str) -> bool:
    return not text.isascii() and _total_length(_MOJIBAKE, text) > MAX_MOJIBAKE_SHARE * len(text)


def _is_too_short(text: str) -> bool:
    return len(text) < 10 * MIN_CHARACTERS and _num_visible(text) < MIN_CHARACTERS


def _has_few_letters(text: str) -> bool:
    return _total_length(_LETTERS, text) < MIN_LETTER_SHARE * _num_visible(text)


def _is_of_long_words(text: str) -> bool:
    return _total_length(_LONG_WORDS, text) > MAX_LONG_WORD_SHARE * _num_visible(text)


def _repeats_its_lines(text: str) -> bool:
    lines = [line for line in map(str.strip, text.split("\n")) if len(line) >= MIN_LINE_CHARACTERS]
    if len(lines) < MIN_REPEATED_LINES:
        return False
    num_characters = sum(map(len, lines))
    num_kept = sum(map(len, set(lines)))
    return num_characters - num_kept > MAX_REPEATED_SHARE * num_characters


def _num_visible(text: str) -> int:
    return sum(map(len, text.split()))


def _total_length(pattern: re.Pattern, text: str) -> int:
    return sum(map(len, pattern.findall(text)))


_RULES_FOR_RAW: dict[str, Callable[[str], bool]] = {
    "mojibake": _is_mojibake,
    "control_characters": _is_binary,
}
_RULES: dict[str, Callable[[str], bool]] = {
    "too_short": _is_too_short,
    "few_letters": _has_few_letters,
    "long_words": _is_of_long_words,
    "repeated_lines": _repeats_its_lines,
}

REASONS = {
    "control_characters": f"a NUL, or more than {MAX_CONTROL_SHARE:.1%} control characters: binary data",
    "too_short": f"fewer than {MIN_CHARACTERS} visible characters",
    "mojibake": f"more than {MAX_MOJIBAKE_SHARE:.1%} of it are signs of a wrong decoding",
    "few_letters": f"less than {MIN_LETTER_SHARE:.0%} of its visible characters are letters: numbers, dumps, drawings",
    "long_words": f"more than {MAX_LONG_WORD_SHARE:.0%} of it are words of {LONG_WORD} characters or more: encoded or "
    "minified data",
    "repeated_lines": f"more than {MAX_REPEATED_SHARE:.0%} of it are lines that stood before",
}
