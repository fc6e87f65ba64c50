"""From text files to batches of tokens: corpus, tokenizer, prepare, prepared, pipeline."""

from dsv3_jax.data.pipeline import EvaluationBatch, TrainBatches, evaluation_windows, heldout_windows
from dsv3_jax.data.prepared import Corpus, open_corpus
from dsv3_jax.data.tokenizer import Tokenizer

__all__ = [
    "Corpus",
    "EvaluationBatch",
    "Tokenizer",
    "TrainBatches",
    "evaluation_windows",
    "heldout_windows",
    "open_corpus",
]
