"""What is refused, for which reason, and that good text of any kind passes unchanged."""

import base64
import json
import pathlib

import numpy as np
import pytest

from dsv3_jax.data import cleaning
from dsv3_jax.data.cleaning import REASONS, Unfit, clean

PROSE = "It is a truth universally acknowledged, that a single man in possession of a good fortune must want a wife.\n"
GOOD = {
    "english": PROSE * 3,
    "code": "def f(x):\n    return [\n        x,\n        x,\n    ]\n\n\nif __name__ == '__main__':\n    f(1)\n",
    "german": "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich.\n",
    "french": "Portez ce vieux whisky au juge blond qui fume; voilà l’été, à bientôt, Noël! ÂGE ÉLEVÉ\n",
    "chinese": "天地玄黄，宇宙洪荒。日月盈昃，辰宿列张。寒来暑往，秋收冬藏。\n",
    "japanese": "いろはにほへと　ちりぬるを　わかよたれそ　つねならむ\n",
    "hindi": "सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता और समानता प्राप्त है।\n",
    "russian": "Съешь же ещё этих мягких французских булок, да выпей чаю.\n",
    "mathematics": r"\begin{align} \int_0^1 x^2 \, dx &= \frac{1}{3}, & \sum_{n=1}^\infty n^{-2} &= \frac{\pi^2}{6}.",
    "proof": "mp2b $p |- ch $= ( ax-mp ) wps wch wph wps ax-mp 2b.1 2b.2 ax-mp 2b.3 $.\n",
    "a long line": "天地玄黄，宇宙洪荒。日月盈昃，辰宿列张。" * 20,
    "short lines that repeat": "".join(f"f{i}:\nreturn 0;\n" for i in range(40)),
    "a link": "See https://example.org/" + "a/long/path" * 20 + " for what is meant.\n",
    "page breaks": "Chapter one, with a form feed behind it.\f\nChapter two follows on the next page.\n",
}


@pytest.mark.parametrize("kind", GOOD)
def test_good_text_passes_unchanged(kind):
    assert clean(GOOD[kind]) == GOOD[kind]


def test_line_ends_marks_and_stray_controls_are_taken_out():
    assert clean("\ufeff" + PROSE.replace("\n", "\r\n") + "old\rmac\n") == PROSE + "old\nmac\n"
    assert clean("\x1b[32;1m" + PROSE + "\x1b[m") == PROSE
    assert clean(PROSE + "a stray \x07 bell\n") == PROSE + "a stray  bell\n"


RNG = np.random.default_rng(0)
BAD = {
    "control_characters": [PROSE + "\0", "".join(f"{word}\x08\x08__ " for word in PROSE.split())],
    "too_short": ["", "x = 1\n", "a b c d e f g h i\n"],
    "mojibake": [
        ("Zwölf Boxkämpfer jagen Viktor über den großen Deich. " * 3).encode().decode("latin-1"),
        ("l’été à l’école “déjà vu” " * 5).encode().decode("cp1252", errors="replace"),
        ("Съешь же ещё этих мягких булок. " * 5).encode().decode("latin-1"),
        "Some text w\ufffdth qu\ufffdte a few characters l\ufffdst.",
    ],
    "few_letters": [
        " ".join(map(str, range(1000))),
        json.dumps(RNG.random(100).tolist()),
        "+---+---+\n|   |   |\n" * 9,
    ],
    "long_words": [base64.b64encode(RNG.bytes(3000)).decode(), "var a=1;" + "function(a){return/b/}" * 50],
    "repeated_lines": ["All rights reserved by us.\n" * 30, "".join(f"line {i % 7} says it all\n" for i in range(70))],
}


@pytest.mark.parametrize(("reason", "text"), [(reason, text) for reason, texts in BAD.items() for text in texts])
def test_what_is_no_text_is_refused_with_its_reason(reason, text):
    assert clean(text) == Unfit(reason)


def test_every_reason_is_explained_and_tested():
    assert set(REASONS) == set(BAD)


def test_cleaning_twice_changes_nothing():
    for text in [*GOOD.values(), "\ufeff" + PROSE.replace("\n", "\r\n"), PROSE + "\x07\r\n"]:
        once = clean(text)
        assert clean(once) == once


def test_our_own_code_is_good_text():
    files = sorted(pathlib.Path(cleaning.__file__).parents[1].rglob("*.py"))
    refused = {path.name: clean(path.read_text("utf-8")) for path in files if path.stat().st_size > 100}
    assert not {name: text for name, text in refused.items() if isinstance(text, Unfit)}
