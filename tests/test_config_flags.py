"""The command line: typed values, mistyped names, what --help shows."""

import pathlib
import subprocess
import sys

import pytest
from absl import flags

from dsv3_jax import config_flags
from dsv3_jax.config import RopeScaling, settings

CONFIG = str(pathlib.Path(__file__).parents[1] / "configs" / "tiny.py")
MAIN = """
from dsv3_jax import config_flags
config_flags.define()
config_flags.run(lambda: print(config_flags.resolve()))
"""


@pytest.fixture
def parse(monkeypatch):
    """Returns a function from command line arguments to the resolved configuration, on flags of its own."""
    values = flags.FlagValues()
    monkeypatch.setattr(flags, "FLAGS", values)
    for name in ("DEFINE", "DEFINE_string", "DEFINE_enum"):
        original = getattr(flags, name)
        monkeypatch.setattr(
            flags, name, lambda *args, original=original, **kw: original(*args, flag_values=values, **kw)
        )
    config_flags.define()

    def resolve(*arguments):
        values(["train.py", *arguments])
        return config_flags.resolve()

    return resolve


@pytest.mark.parametrize(
    ("argument", "path", "value"),
    [
        ("train.seed=5", "train.seed", 5),
        ("train.constant_tokens=14.8e12", "train.constant_tokens", 14_800_000_000_000),
        ("train.constant_tokens=1_000_000_000", "train.constant_tokens", 10**9),
        ("train.learning_rate=1e-3", "train.learning_rate", 1e-3),
        ("model.norm_topk_prob=false", "model.norm_topk_prob", False),
        ("model.norm_topk_prob=1", "model.norm_topk_prob", True),
        ("model.q_lora_rank=none", "model.q_lora_rank", None),
        ("model.q_lora_rank=48", "model.q_lora_rank", 48),
        ("data.corpus=none", "data.corpus", "none"),  # a directory may be called so
        ("model.rope_scaling=yarn", "model.rope_scaling", RopeScaling()),
        ("model.rope_scaling=none", "model.rope_scaling", None),
        ("model.rope_scaling.factor=8", "model.rope_scaling", RopeScaling(factor=8.0)),
    ],
)
def test_value_takes_the_settings_type(parse, argument, path, value):
    found = parse(f"--config={CONFIG}", f"--config.{argument}")
    for name in path.split("."):
        found = getattr(found, name)
    assert found == value and type(found) is type(value)


def test_what_is_not_given_comes_from_the_file(parse):
    assert parse(f"--config={CONFIG}", "--config.train.seed=5").model == config_flags.load(CONFIG).model


@pytest.mark.parametrize("argument", ["train.seed=x", "train.seed=1.5", "model.norm_topk_prob=maybe", "train.seed=none",
                                      "train.learning_rate=fast"])  # fmt: skip
def test_value_of_another_type_is_refused(parse, argument):
    name, _, value = argument.partition("=")
    with pytest.raises(flags.IllegalFlagValueError) as error:
        parse(f"--config={CONFIG}", f"--config.{argument}")
    assert name in str(error.value) and value in str(error.value)


def test_mistyped_name_is_refused_with_a_suggestion(parse):
    with pytest.raises(flags.UnrecognizedFlagError, match=r"config\.train\.num_step'\. Did you mean") as error:
        parse(f"--config={CONFIG}", "--config.train.num_step=5")
    assert "config.train.num_steps" in str(error.value)


def test_value_that_validation_refuses_names_the_field(parse):
    with pytest.raises(ValueError, match=r"model\.topk_group=5: must be at most n_group=4"):
        parse(f"--config={CONFIG}", "--config.model.topk_group=5")


def test_config_files_that_cannot_serve(parse, tmp_path):
    with pytest.raises(ValueError, match="--config is missing"):
        parse()
    with pytest.raises(ValueError, match="no such file"):
        parse(f"--config={tmp_path / 'absent.py'}")
    for text, message in (("x = 1", "defines no get_config"), ("get_config = lambda: 3", "returns int")):
        (tmp_path / "broken.py").write_text(text)
        with pytest.raises(ValueError, match=message):
            parse(f"--config={tmp_path / 'broken.py'}")


def _run(*arguments):
    return subprocess.run([sys.executable, "-c", MAIN, *arguments], capture_output=True, text=True, check=False)


def test_help_shows_every_setting():
    text = _run("--helpfull").stdout
    for setting in settings():
        assert f"--config.{setting.path}:" in text or f"--[no]config.{setting.path}:" in text, setting.path


def test_error_ends_with_one_line_and_exit_code_1():
    process = _run(f"--config={CONFIG}", "--config.model.topk_group=5")
    assert process.returncode == 1
    assert process.stderr.strip().splitlines()[-1].startswith("error: model.topk_group=5: ")
    assert "Traceback" not in process.stderr
