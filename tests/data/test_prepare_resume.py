"""A preparation that was stopped continues where it was, and its corpus is the one that was never stopped."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
from small_text import contents, preparation, prepared_in, write_documents

from dsv3_jax.data import open_corpus, prepare
from dsv3_jax.data.runner import SerialRunner
from dsv3_jax.data.sources import load_recipe

SCRIPT = pathlib.Path(__file__).parents[2] / "launch" / "prepare_data.py"
FLAGS = ("--vocab_size=400", "--heldout_fraction=0.2", "--fim_rate=0.3", "--boundary_split_share=0.5")
NUM_SOURCES = 5


@pytest.fixture
def recipe(tmp_path):
    tables = []
    for number in range(NUM_SOURCES):
        write_documents(tmp_path / f"text{number}", num_documents=40, words_per_document=400, seed=number)
        tables.append(f'[[source]]\nname = "s{number}"\npaths = ["text{number}"]\nweight = 1\nkind = "text"\n'
                      'language = "mixed"\n')  # fmt: skip
    path = tmp_path / "recipe.toml"
    path.write_text("\n".join(tables))
    return path


def test_killed_at_any_stage_it_continues_with_other_workers(tmp_path, recipe):
    directory, partial = tmp_path / "corpus", tmp_path / "corpus.partial"
    whole = {}
    moments = ("collected/*.tmp", "selection.npz", "encoded/*.tmp", "merged/*.json")
    for number, moment in enumerate(moments):
        command = [sys.executable, str(SCRIPT), f"--recipe={recipe}", f"--output={directory}", *FLAGS]
        process = subprocess.Popen([*command, f"--workers={1 + number % 2}"], start_new_session=True)
        wait_until(lambda moment=moment: any(partial.glob(moment)), process)
        if number % 2:
            os.kill(process.pid, signal.SIGKILL)  # its workers end by themselves
        else:
            os.killpg(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert not directory.exists()
        with pytest.raises(ValueError, match=r"data\.corpus"):
            open_corpus(partial)
        now = {path: path.stat().st_mtime_ns for path in partial.rglob("*.npz")}
        assert whole.items() <= now.items()  # what was whole was not made again
        whole = now
    finished = subprocess.run([*command, "--workers=2"], capture_output=True, text=True, check=True)
    corpus = open_corpus(directory)
    assert f"{corpus.num_tokens('train'):,} tokens" in finished.stdout
    assert not partial.exists()
    prepared_in(
        tmp_path / "undisturbed",
        sources=load_recipe(recipe),
        recipe=str(recipe),
        max_broken_share=0.01,
        tokenizer_bytes=100_000_000,
    )
    assert contents(directory) == contents(tmp_path / "undisturbed")


def wait_until(condition, process) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.0005)


class Stopped(Exception):
    pass


def stop_at(stage, directory, *paths, **changes):
    def on_progress(current, done_bytes, total_bytes):
        if current == stage:
            raise Stopped

    with pytest.raises(Stopped):
        prepare.prepare(preparation(*paths, **changes), directory, runner=SerialRunner(), on_progress=on_progress)


@pytest.mark.parametrize("stage", ["deduplicating", "encoding"])
def test_other_arguments_do_not_continue(tmp_path, text_directory, stage):
    directory = tmp_path / "corpus"
    stop_at(stage, directory, text_directory)
    with pytest.raises(ValueError, match=r"unfinished corpus with fim_rate=0\.3 \(asked: 0\.1\); use those"):
        prepared_in(directory, text_directory, fim_rate=0.1)
    stages = []
    arguments = preparation(text_directory)
    prepare.prepare(arguments, directory, runner=SerialRunner(), on_progress=lambda name, *_: stages.append(name))
    assert stages[0] == stage
    assert open_corpus(directory).num_tokens("train") > 0


def test_a_source_that_changes_meanwhile_is_noticed(tmp_path):
    write_documents(tmp_path / "text", num_documents=5, words_per_document=40)

    def change(stage, done_bytes, total_bytes):
        if done_bytes:
            raise Stopped

    with pytest.raises(Stopped):
        prepare.prepare(preparation(tmp_path / "text"), tmp_path / "corpus", runner=SerialRunner(), on_progress=change)
    with (tmp_path / "text" / "document_3.txt").open("a") as file:
        file.write("more")
    with pytest.raises(ValueError, match=r"sources='text/document_3\.txt': changed since .* remove .*corpus\.partial"):
        prepared_in(tmp_path / "corpus", tmp_path / "text")


def test_a_corpus_renamed_just_before_the_end_is_whole(tmp_path, text_directory, monkeypatch):
    def stopped(path):
        raise Stopped

    with monkeypatch.context() as context, pytest.raises(Stopped):
        context.setattr(prepare.shutil, "rmtree", stopped)
        prepared_in(tmp_path / "corpus", text_directory)
    assert open_corpus(tmp_path / "corpus") and (tmp_path / "corpus.partial").exists()
    assert not prepared_in(tmp_path / "corpus", text_directory)
    assert not (tmp_path / "corpus.partial").exists()


def test_a_foreign_partial_directory_is_left_alone(tmp_path, text_directory):
    (tmp_path / "corpus.partial").mkdir()
    (tmp_path / "corpus.partial" / "mine").touch()
    with pytest.raises(ValueError, match=r"corpus\.partial': is not an unfinished corpus"):
        prepared_in(tmp_path / "corpus", text_directory)
    (tmp_path / "corpus.partial").rename(tmp_path / "away")
    prepared_in(tmp_path / "corpus", text_directory)
    (tmp_path / "away").rename(tmp_path / "corpus.partial")
    assert not prepared_in(tmp_path / "corpus", text_directory)
    assert (tmp_path / "corpus.partial" / "mine").exists()
