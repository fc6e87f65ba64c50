"""A small corpus of generated files, prepared once per session."""

import pytest
from small_text import prepared_in, write_documents

from dsv3_jax.data import open_corpus


@pytest.fixture(scope="session")
def text_directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("text")
    write_documents(directory, num_documents=60, words_per_document=80)
    return directory


@pytest.fixture(scope="session")
def prepared_directory(text_directory, tmp_path_factory):
    directory = tmp_path_factory.mktemp("prepared") / "corpus"
    assert prepared_in(directory, text_directory)
    return directory


@pytest.fixture(scope="session")
def small_corpus(prepared_directory):
    return open_corpus(prepared_directory)
