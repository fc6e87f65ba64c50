"""Fill-in-the-middle in its PSM form: a share of the documents is cut in three and the middle comes last (§4.1).

    <bos> <fim_begin> prefix <fim_hole> suffix <fim_end> middle <eos>

Whole documents are cut, before they are packed. Cuts fall between characters (code points), never inside one, and not
only where tokens end: the model also learns to continue from the middle of a word.
"""

import dataclasses
import hashlib

from dsv3_jax.config import require


@dataclasses.dataclass(frozen=True)
class Pieces:
    """A document cut in three: prefix + middle + suffix is its text. The middle is never empty."""

    prefix: str
    middle: str
    suffix: str


def fill_in_the_middle(text: str, *, seed_bytes: bytes, rate: float) -> Pieces | None:
    """Cuts a document in three with probability `rate`, else gives None; a pure function of its arguments.

    Every pair of different cuts between characters, the two ends of the text included, is equally likely.

    Args:
      text: a document. An empty one is never cut.
      seed_bytes: what is drawn depends on these bytes alone; give every document its own.
      rate: share of the documents to cut, in [0, 1].

    Raises:
      ValueError: rate lies outside [0, 1].
    """
    require(0 <= rate <= 1, "fim_rate", rate, "must lie in [0, 1]")
    digest = hashlib.blake2b(seed_bytes, digest_size=24, person=b"fim").digest()
    choice, first, second = (int.from_bytes(digest[i : i + 8], "little") for i in (0, 8, 16))
    if choice >= rate * 2**64 or not text:
        return None
    first = first * (len(text) + 1) >> 64
    second = second * len(text) >> 64
    second += second >= first
    begin, end = sorted((first, second))
    return Pieces(text[:begin], text[begin:end], text[end:])
