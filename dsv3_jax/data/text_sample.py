"""Samples of text, bounded in bytes: what a tokenizer is trained on and compared on."""

import hashlib
import heapq
from collections.abc import Callable, Iterator, Sequence

from dsv3_jax.config import require
from dsv3_jax.data import cleaning, readers, sources
from dsv3_jax.data.readers import Rejected
from dsv3_jax.data.sources import Source

MAX_BROKEN_SHARE = 0.01  # of a source's documents; more, and the source is not what it is taken for

OnProgress = Callable[[str, int, int], None]  # (source, bytes of its files read, bytes of its files)


class TextSample:
    """Keeps the documents whose ids hash lowest, as many as fit into a number of bytes, in whatever order they come.

    Attributes:
      num_bytes: UTF-8 bytes of the documents kept.
      num_documents: how many they are.
      num_offered: documents that were added, kept or not.
    """

    def __init__(self, *, max_bytes: int, seed: int):
        """Makes an empty sample.

        Args:
          max_bytes: UTF-8 bytes of text to hold at most.
          seed: another seed chooses other documents.
        """
        self.num_bytes = self.num_offered = 0
        self._max_bytes = max_bytes
        self._seed = seed
        self._kept = []  # heap of (minus the hash, id, text): the highest hash is on top
        self._limit = 2**64  # the lowest hash that was too high; without it the order of arrival would matter

    @property
    def num_documents(self) -> int:
        return len(self._kept)

    def add(self, document_id: str, text: str) -> None:
        """Offers a document. One that is larger than the whole sample is never kept."""
        name = f"{self._seed}\0{document_id}".encode("utf-8", "surrogatepass")
        rank = int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little")
        num_bytes = len(text.encode())
        self.num_offered += 1
        if rank >= self._limit or num_bytes > self._max_bytes:
            return
        heapq.heappush(self._kept, (-rank, document_id, text))
        self.num_bytes += num_bytes
        while self.num_bytes > self._max_bytes:
            rank, _, dropped = heapq.heappop(self._kept)
            self.num_bytes -= len(dropped.encode())
            self._limit = -rank

    def texts(self) -> Iterator[str]:
        """Gives the documents kept, the lowest hash first."""
        return (text for _, _, text in sorted(self._kept, reverse=True))


def sample_sources(
    chosen: Sequence[Source],
    *,
    max_bytes: Sequence[int],
    max_document_bytes: int,
    seed: int,
    on_progress: OnProgress,
) -> dict[str, TextSample]:
    """Reads and cleans sources and keeps a sample of each; no more than the samples is held in memory.

    Args:
      chosen: sources.
      max_bytes: of each source's sample, UTF-8.
      max_document_bytes: larger documents are left out.
      seed: chooses the documents.
      on_progress: called often.

    Returns:
      The samples by the names of their sources.

    Raises:
      ValueError: a source that matches no file, or of which too much is broken; or no text is left.
      OSError: a file that was named itself cannot be read.
    """
    sources.require_usable(chosen)
    samples = {}
    for source, budget in zip(chosen, max_bytes, strict=True):
        samples[source.name] = TextSample(max_bytes=budget, seed=seed)
        _read(source, samples[source.name], max_document_bytes, on_progress)
    names = [source.name for source in chosen]
    require(any(sample.num_documents for sample in samples.values()), "sources", names,
            f"have no document that fits into {max(max_bytes):,} bytes; enlarge the sample or name others")  # fmt: skip
    return samples


def weighted_budgets(chosen: Sequence[Source], max_bytes: int) -> list[int]:
    """Divides bytes among sources by their weights."""
    total = sum(source.weight for source in chosen)
    return [int(max_bytes * source.weight / total) for source in chosen]


def _read(source: Source, sample: TextSample, max_document_bytes: int, on_progress: OnProgress) -> None:
    units = sources.list_units(source)
    total = sum(unit.num_bytes for unit in units)
    num_rows = num_broken = done = 0
    examples = []
    for unit in units:
        for document in readers.read_unit(unit, max_document_bytes=max_document_bytes):
            num_rows += 1
            if isinstance(document, Rejected):
                if document.reason in readers.BROKEN:
                    num_broken += 1
                    examples = [*examples, document][:3]
                continue
            text = cleaning.clean(document.text)
            if not isinstance(text, cleaning.Unfit):
                sample.add(document.id, text)
        done += unit.num_bytes
        on_progress(source.name, done, total)
    readers.require_mostly_whole(source.name, num_rows=num_rows, num_broken=num_broken, examples=examples,
                                 max_broken_share=MAX_BROKEN_SHARE)  # fmt: skip
