"""Recipes, and the units that sources are made of."""

import hashlib
import json
import os
import pickle

import pytest

from dsv3_jax.data import readers, sources
from dsv3_jax.data.readers import RawDocument
from dsv3_jax.data.sources import Source, list_units

RECIPE = """
[[source]]
name = "english"
paths = ["english", "/elsewhere/*.jsonl", "hf:c4:en", "installed"]
weight = 3
kind = "text"
language = "en"
licence = "CC0-1.0"

[[source]]
name = "code"
paths = ["code"]
weight = 0.5
kind = "code"
language = "python"
text_field = "content"
"""


def source(*paths, **changes):
    return Source(**{"name": "s", "paths": tuple(map(str, paths)), "weight": 1.0, "kind": "text",
                     "language": "en"} | changes)  # fmt: skip


def test_recipe_names_sources_below_its_own_directory(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE)
    english, code = sources.load_recipe(path)
    assert english == Source(
        name="english",
        paths=(str(tmp_path / "english"), "/elsewhere/*.jsonl", "hf:c4:en", "installed"),
        weight=3.0,
        kind="text",
        language="en",
        text_field="text",
        licence="CC0-1.0",
    )
    assert (code.weight, code.text_field, code.licence) == (0.5, "content", "")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('name = "code"', 'name = "co de"', r"recipe .*, source 2: source name='co de'"),
        ('name = "code"', 'name = "english"', r"source names=\['english'\]"),
        ("weight = 0.5", "weight = -1", r"source 2: source 'code' weight=-1.0"),
        ("weight = 0.5", "weight = nan", r"weight=nan"),
        ("weight = 0.5", 'weight = "much"', r"source 2 weight='much': must be a number"),
        ("weight = 0.5", "", r"source 2 fields=\['weight'\]: are missing"),
        ('paths = ["code"]', "paths = []", r"'code' paths=\[\]"),
        ('paths = ["code"]', 'paths = [""]', r"'code' paths=\[''\]"),
        ('paths = ["code"]', 'paths = "code"', r"paths='code': must be a list of strings"),
        ('kind = "code"', 'kind = ""', r"'code' kind=''"),
        ('kind = "code"', "kind = 7", r"source 2 kind=7: must be a string"),
        ('language = "python"', 'langauge = "python"', r"fields=\['langauge'\]: are unknown; there are name"),
        ("[[source]]", "[[sources]]", r"recipe .* keys=\['sources'\]"),
        ("[[source]]", "[source", r"recipe .*: not TOML"),
    ],
)
def test_recipe_errors_name_file_table_field_and_value(tmp_path, old, new, message):
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE.replace(old, new))
    with pytest.raises(ValueError, match=message):
        sources.load_recipe(path)


def test_weights_that_sum_to_zero_and_empty_recipes_are_refused(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE.replace("weight = 3", "weight = 0").replace("weight = 0.5", "weight = 0"))
    with pytest.raises(ValueError, match=r"weights=\[0.0, 0.0\]: sum to 0"):
        sources.load_recipe(path)
    path.write_text("")
    with pytest.raises(ValueError, match=r"write one \[\[source\]\] table"):
        sources.load_recipe(path)
    with pytest.raises(ValueError, match=r"none\.toml': is no file"):
        sources.load_recipe(tmp_path / "none.toml")


@pytest.fixture
def tree(tmp_path):
    root = tmp_path / "tree"
    files = (
        "a.txt",
        "deep/b.md",
        "deep/c.py",
        "deep/MAIN.C",
        "rows.jsonl",
        "ignored.bin",
        "__pycache__/d.py",
        ".git/e.txt",
    )
    for name in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(json.dumps({"text": name}))
    (root / "broken.txt").symlink_to("nowhere")
    return root


def names(*paths):
    return [unit.name for unit in list_units(source(*paths))]


def test_a_directory_gives_its_files_of_known_kinds_and_a_glob_every_file(tree):
    expected = {
        "tree/a.txt",
        "tree/deep/b.md",
        "tree/deep/c.py",
        "tree/deep/MAIN.C",
        "tree/rows.jsonl",
        "tree/broken.txt",
    }
    assert set(names(tree)) == expected
    assert names(f"{tree}/**/*.bin") == ["tree/ignored.bin"]
    assert names(tree / "ignored.bin") == ["ignored.bin"]
    formats = {unit.name: unit.format for unit in list_units(source(tree))}
    assert {name for name, format in formats.items() if format == "jsonl"} == {"tree/rows.jsonl"}


def test_units_of_a_file_carry_what_a_worker_needs(tree):
    (unit,) = list_units(source(tree / "rows.jsonl"))
    assert unit.is_named
    assert pickle.loads(pickle.dumps(unit)) == unit
    assert list(readers.read_unit(unit, max_document_bytes=100)) == [RawDocument("rows.jsonl@0", "rows.jsonl")]


def test_the_order_is_that_of_the_hashes_of_the_names_on_every_machine(tmp_path):
    for place, indices in (("here", range(20)), ("there", reversed(range(20)))):
        root = tmp_path / place / "text"
        root.mkdir(parents=True)
        for index in indices:
            (root / f"{index:02}.txt").write_text(place)
        expected = sorted(
            (f"text/{i:02}.txt" for i in range(20)), key=lambda name: hashlib.sha256(name.encode()).digest()
        )
        assert names(root) == names(f"{root}/*.txt") == expected


def test_paths_of_a_source_take_turns(tmp_path):
    for name, count in (("one", 5), ("two", 2)):
        (tmp_path / name).mkdir()
        for i in range(count):
            (tmp_path / name / f"{i}.txt").write_text("text")
    directories = [name.split("/")[0] for name in names(tmp_path / "one", tmp_path / "two")]
    assert directories == ["one", "two", "one", "two", "one", "one", "one"]


def test_files_of_one_name_are_told_apart(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text("text")
    assert names(tmp_path / "one/a.txt", tmp_path / "two/a.txt") == ["a.txt", "a.txt~2"]


def test_large_files_of_lines_become_several_units(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "UNIT_BYTES", 100)
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": f"row {i}"}) + "\n" for i in range(40)))
    units = list_units(source(path))
    assert len(units) > 5
    documents = [row.text for unit in units for row in readers.read_unit(unit, max_document_bytes=100)]
    assert documents == [f"row {i}" for i in range(40)]


def test_paths_without_text_are_refused_by_name(tree):
    with pytest.raises(ValueError, match=r"source 's' path='/no/such\*': matches no file"):
        names("/no/such*")
    (tree / "none").mkdir()
    with pytest.raises(ValueError, match=r"none': has no file of text"):
        names(tree / "none")
    with pytest.raises(FileNotFoundError, match=r"broken\.txt"):
        names(tree / "broken.txt")


def test_every_machine_has_a_source():
    units = list_units(sources.source_of_paths([sources.INSTALLED]))
    roots = {"/".join(unit.name.split("/")[:2]) for unit in units}
    assert roots >= {"installed/stdlib", "installed/purelib"}
    assert len({unit.name for unit in units}) == len(units) > 500
    directories = {part for unit in units for part in unit.name.split("/")[:-1]}
    assert not directories & {"test", "tests", "__pycache__"}
    stdlib = os.path.dirname(os.__file__)
    assert all(unit.path.startswith(stdlib) for unit in units if unit.name.startswith("installed/stdlib"))
    assert [unit.name.split("/")[1] for unit in units[:4]] == ["stdlib", "purelib"] * 2


def test_paths_without_a_recipe_make_one_source():
    given = sources.source_of_paths(["a", "b"])
    assert (given.name, given.paths, given.weight) == ("given", ("a", "b"), 1.0)
    with pytest.raises(ValueError, match="paths"):
        sources.source_of_paths([])
