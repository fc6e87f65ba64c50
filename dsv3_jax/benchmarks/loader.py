"""The data loader: how fast it reads alone, and whether a training step that reads its data waits for it."""

import contextlib
import itertools
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator

import jax
import numpy as np

from dsv3_jax.benchmarks.networks import WORKLOADS, Workload
from dsv3_jax.benchmarks.report import Row
from dsv3_jax.config import DataConfig, RunConfig, override
from dsv3_jax.data import Corpus, TrainBatches, open_corpus
from dsv3_jax.data.prepared import write_corpus
from dsv3_jax.data.tokenizer import MIN_VOCAB_SIZE, train_tokenizer
from dsv3_jax.sharding.mesh import make_mesh
from dsv3_jax.train import schedule
from dsv3_jax.train.metrics import fetch
from dsv3_jax.train.state import init_state
from dsv3_jax.train.step import make_train_step, split_batch

SEQUENCE_LENGTHS = (512, 4096)
BATCH_TOKENS = 2**17
LOADER_TOKENS = 2**25  # read in one measurement
LOADER_REPEATS = 3
BURST_STEPS, BURSTS = 3, 4  # of each kind; the first step of a burst is not counted
WEIGHTS = {"code": 0.5, "english": 0.3, "mathematics": 0.2}  # of the corpus of random tokens
DOCUMENT_TOKENS, NUM_DOCUMENTS = 1024, 2**14  # of each of its sources


def loader_rows(workload_name: str, *, corpus_directory: str | None) -> list[Row]:
    """Measures the loader alone at two lengths, then optimizer steps on batches that lie in memory and that are read.

    Args:
      workload_name: the network whose steps are measured.
      corpus_directory: a prepared corpus; None: one of random tokens, written for the occasion.
    """
    with contextlib.ExitStack() as stack:
        if corpus_directory is None:
            corpus = write_random_corpus(pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory())) / "corpus")
        else:
            corpus = open_corpus(corpus_directory)
        alone = [loader_row(corpus, sequence_length) for sequence_length in SEQUENCE_LENGTHS]
        return alone + step_rows(corpus, WORKLOADS[workload_name], case=f"train_step {workload_name}")


def loader_row(corpus: Corpus, sequence_length: int) -> Row:
    """Measures how fast batches come when nothing else is done."""
    batch_size = BATCH_TOKENS // sequence_length
    batches = TrainBatches(corpus, DataConfig(sequence_length=sequence_length), seed=0)
    rates = []
    with contextlib.closing(batches):
        batches.next(batch_size)
        for _ in range(LOADER_REPEATS):
            start = time.perf_counter()
            for _ in range(LOADER_TOKENS // BATCH_TOKENS):
                batches.next(batch_size)
            rates.append(LOADER_TOKENS / (time.perf_counter() - start))
    return {"case": f"sequences of {sequence_length}", "implementation": "loader alone",
            "tokens/s": statistics.median(rates)}  # fmt: skip


def step_rows(corpus: Corpus, workload: Workload, *, case: str) -> list[Row]:
    """Measures optimizer steps as a run makes them, in turns on batches in memory and on batches that are read."""
    config = override(workload.run_config, {"model.vocab_size": max(workload.model.vocab_size, corpus.vocab_size)})
    batches = TrainBatches(corpus, config.data, seed=0)
    with contextlib.closing(batches):
        in_memory = itertools.cycle([batches.next(workload.batch_size) for _ in range(BURST_STEPS)])
        kinds = {
            "batches in memory": lambda: next(in_memory),
            "batches read": lambda: batches.next(workload.batch_size),
        }
        seconds = {name: [] for name in kinds}
        with _steps(config) as step:
            for _ in range(BURSTS):
                for name, next_batch in kinds.items():
                    seconds[name] += [step(next_batch) for _ in range(BURST_STEPS)][1:]
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return [
        {"case": case, "implementation": name, "tokens/s": workload.tokens / median, "s per step": median,
         "of in memory": median / medians["batches in memory"]}
        for name, median in medians.items()
    ]  # fmt: skip


@contextlib.contextmanager
def _steps(config: RunConfig) -> Iterator[Callable[[Callable[[], np.ndarray]], float]]:
    """Gives a function that fetches a batch, trains on it, and returns the seconds from one finished step to the next.

    Like a run it waits for a step once the next one is under way.
    """
    mesh = make_mesh(config.mesh)
    settings = schedule.at(config.train, step=0, tokens=0)
    with jax.set_mesh(mesh):
        train_step, state, pending = make_train_step(config, mesh), init_state(config, mesh), None
        finished = time.perf_counter()

        def step(next_batch: Callable[[], np.ndarray]) -> float:
            nonlocal state, pending, finished
            state, metrics = train_step(state, split_batch(config, next_batch()), settings)
            if pending is not None:
                fetch(pending)
            before, finished, pending = finished, time.perf_counter(), metrics
            return finished - before

        yield step


def write_random_corpus(directory: pathlib.Path) -> Corpus:
    """Writes a corpus of three sources whose documents are random tokens, and opens it."""
    tokenizer = train_tokenizer([], MIN_VOCAB_SIZE)
    generator = np.random.default_rng(0)
    documents = {}
    for name in WEIGHTS:
        shape = (NUM_DOCUMENTS, DOCUMENT_TOKENS)
        tokens = generator.integers(3, tokenizer.vocab_size, shape, np.uint16)
        tokens[:, 0], tokens[:, -1] = tokenizer.bos_token_id, tokenizer.eos_token_id
        documents[name] = {"train": list(tokens)}
    return write_corpus(directory, tokenizer, documents, weights=WEIGHTS)
