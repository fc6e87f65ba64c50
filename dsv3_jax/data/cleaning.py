"""What a document must be to be trained on: a few rules that hold for prose, code and mathematics in any language.

Line ends become \\n; a byte order mark, stray control characters and the colours of terminals go; nothing else of a
text is changed. A document that a rule refuses is dropped whole, with the reason. The limits are wide: they are for
what is no text at all (binary data, dumps, encoded data, wrongly decoded bytes), not for what is badly written.
"""

import dataclasses
import re
import string

MIN_CHARACTERS = 20  # that are not white space
MAX_CONTROL_SHARE = 0.005  # of characters
MAX_MOJIBAKE_SHARE = 0.005  # of characters
MIN_LETTER_SHARE = 0.25  # of the characters that are not white space
LONG_WORD = 100  # characters; minified and encoded data have such words; of ASCII, no links
MAX_LONG_WORD_SHARE = 0.3  # of the characters that are not white space
MIN_REPEATED_LINES = 20  # a shorter document may repeat itself
MAX_REPEATED_SHARE = 0.6  # of the characters in lines of MIN_LINE_CHARACTERS or more
MIN_LINE_CHARACTERS = 10  # shorter ones, such as closing brackets, repeat in good code

_LINE_ENDS = re.compile("\r\n?")
_TERMINAL_SEQUENCES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_CONTROLS = re.compile("[\x01-\x08\x0b\x0e-\x1f\x7f-\x9f\ufeff\ufffe\uffff]")
_MOJIBAKE = re.compile("\ufffd|[\u00c2\u00c3][\u0080-\u00bf]|\u00e2[\u0080\u20ac]|[\u00d0\u00d1][\u0080-\u00bf]")
_LETTERS = re.compile(r"[^\W\d_]+")
_ASCII = bytes(range(128))
_ASCII_CONTROLS = bytes(byte for byte in range(128) if _CONTROLS.match(chr(byte)))


@dataclasses.dataclass(frozen=True)
class Unfit:
    """Says why a text is not trained on."""

    reason: str  # a key of REASONS


def clean(text: str) -> str | Unfit:
    """Returns the text to train on, or the first rule that refuses it.

    Raises:
      UnicodeEncodeError: the text has a lone surrogate, which no UTF-8 spells.
    """
    text = _LINE_ENDS.sub("\n", text) if "\r" in text else text
    text = _TERMINAL_SEQUENCES.sub("", text) if "\x1b" in text else text
    counts = _Counts(text)
    if _MOJIBAKE.search(counts.beyond_ascii) and _total_length(_MOJIBAKE, text) > MAX_MOJIBAKE_SHARE * len(text):
        return Unfit("mojibake")
    num_controls = counts.ascii(_ASCII_CONTROLS) + _total_length(_CONTROLS, counts.beyond_ascii)
    if "\0" in text or num_controls > max(1, MAX_CONTROL_SHARE * len(text)):
        return Unfit("control_characters")
    text = _CONTROLS.sub("", text) if num_controls else text
    num_visible = len(text) - counts.ascii(string.whitespace.encode())
    if num_visible < MIN_CHARACTERS:
        return Unfit("too_short")
    num_letters = counts.ascii(string.ascii_letters.encode()) + _total_length(_LETTERS, counts.beyond_ascii)
    if num_letters < MIN_LETTER_SHARE * num_visible:
        return Unfit("few_letters")
    lines = text.split("\n")
    if _length_of_long_words(lines) > MAX_LONG_WORD_SHARE * num_visible:
        return Unfit("long_words")
    return Unfit("repeated_lines") if _repeats_itself(lines) else text


class _Counts:
    """Counts characters, the ASCII ones as bytes: a hundred times as fast as looking at each."""

    def __init__(self, text: str):
        self._data = text.encode("utf-8")
        self.beyond_ascii = "" if text.isascii() else self._data.translate(None, _ASCII).decode("utf-8")

    def ascii(self, characters: bytes) -> int:
        return len(self._data) - len(self._data.translate(None, characters))


def _length_of_long_words(lines: list[str]) -> int:
    words = [word for line in lines if len(line) >= LONG_WORD for word in line.split() if len(word) >= LONG_WORD]
    return sum(len(word) for word in words if word.isascii() and "://" not in word)  # Chinese lines are words, too


def _repeats_itself(lines: list[str]) -> bool:
    lines = [line for line in map(str.strip, lines) if len(line) >= MIN_LINE_CHARACTERS]
    if len(lines) < MIN_REPEATED_LINES:
        return False
    num_characters = sum(map(len, lines))
    return num_characters - sum(map(len, set(lines))) > MAX_REPEATED_SHARE * num_characters


def _total_length(pattern: re.Pattern, text: str) -> int:
    return sum(map(len, pattern.findall(text)))


REASONS = {
    "control_characters": f"a NUL, or more than {MAX_CONTROL_SHARE:.1%} control characters: binary data",
    "too_short": f"fewer than {MIN_CHARACTERS} visible characters",
    "mojibake": f"more than {MAX_MOJIBAKE_SHARE:.1%} of it are signs of a wrong decoding",
    "few_letters": f"less than {MIN_LETTER_SHARE:.0%} of its visible characters are letters: numbers, dumps, drawings",
    "long_words": f"more than {MAX_LONG_WORD_SHARE:.0%} of it are words of {LONG_WORD} characters or more: encoded or "
    "minified data",
    "repeated_lines": f"more than {MAX_REPEATED_SHARE:.0%} of it are lines that stood before",
}
