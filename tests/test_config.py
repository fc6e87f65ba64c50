"""Every setting: validation that names field, value and fix; overriding; JSON."""

import dataclasses
import json
import pathlib

import pytest

from dsv3_jax import config
from dsv3_jax.config import RopeScaling, RunConfig, from_json, override, settings, to_json

# settings -> the field that the message names, the value it shows, and a piece of the fix.
REFUSED = [
    ({"model.vocab_size": 0}, "model.vocab_size=0", "greater than 0"),
    ({"model.hidden_size": -1}, "model.hidden_size=-1", "greater than 0"),
    ({"model.n_shared_experts": -1}, "model.n_shared_experts=-1", "not be negative"),
    ({"model.num_nextn_predict_layers": -1}, "model.num_nextn_predict_layers=-1", "not be negative"),
    ({"model.q_lora_rank": 0}, "model.q_lora_rank=0", "greater than 0"),
    ({"model.qk_rope_head_dim": 63}, "model.qk_rope_head_dim=63", "even"),
    ({"model.first_k_dense_replace": 62}, "model.first_k_dense_replace=62", "at most num_hidden_layers=61"),
    ({"model.n_group": 7}, "model.n_group=7", "divide n_routed_experts=256"),
    ({"model.n_group": 256}, "model.n_group=256", "at most 128 groups"),
    ({"model.topk_group": 9}, "model.topk_group=9", "at most n_group=8"),
    ({"model.num_experts_per_tok": 129}, "model.num_experts_per_tok=129", "128 experts that topk_group=4"),
    ({"model.bos_token_id": 129280}, "model.bos_token_id=129280", "[0, vocab_size=129280)"),
    ({"model.eos_token_id": -1}, "model.eos_token_id=-1", "[0, vocab_size=129280)"),
    ({"model.precision": "fp16"}, "model.precision='fp16'", "bf16"),
    ({"model.remat_policy": "some"}, "model.remat_policy='some'", "report"),
    ({"model.rope_scaling.type": "linear"}, "model.rope_scaling.type='linear'", "yarn"),
    ({"model.rope_scaling.factor": 0.5}, "model.rope_scaling.factor=0.5", "at least 1"),
    ({"model.rope_scaling.beta_fast": 1.0}, "model.rope_scaling.beta_fast=1.0", "exceed beta_slow=1.0"),
    ({"model.rope_scaling.beta_slow": 0.0}, "model.rope_scaling.beta_slow=0.0", "greater than 0"),
    ({"mesh.gpu": 0}, "mesh.gpu=0", "-1 for what is left"),
    ({"mesh.pipe": 2}, "mesh.pipe=2", "use 1"),
    ({"mesh.tensor": 0}, "mesh.tensor=0", "-1 for what is left"),
    ({"model.exchange_capacity": 0.0}, "model.exchange_capacity=0.0", "greater than 0"),
    ({"model.n_redundant_experts": -1}, "model.n_redundant_experts=-1", "not be negative"),
    ({"model.n_redundant_experts": 32}, "model.n_redundant_experts=32", "num_nextn_predict_layers=0"),
    ({"data.sequence_length": 0}, "data.sequence_length=0", "greater than 0"),
    ({"data.sequence_length": 163841}, "data.sequence_length=163841", "model.max_position_embeddings=163840"),
    ({"data.sequence_length": 1}, "data.sequence_length=1", "exceed model.num_nextn_predict_layers=1"),
    ({"data.reader_threads": -1}, "data.reader_threads=-1", "not be negative"),
    ({"train.batch_size": 0}, "train.batch_size=0", "greater than 0"),
    ({"train.learning_rate": 0.0}, "train.learning_rate=0.0", "greater than 0"),
    ({"train.warmup_steps": -1}, "train.warmup_steps=-1", "not be negative"),
    ({"train.adam_b2": 1.0}, "train.adam_b2=1.0", "below 1"),
    ({"train.adam_b2": 0.999}, "train.adam_b2=0.999", "train.adam_moments=fp32"),
    ({"train.adam_moments": "fp8"}, "train.adam_moments='fp8'", "bf16"),
    ({"train.ema_decay": 1.5}, "train.ema_decay=1.5", "below 1"),
    ({"train.batch_size_start": 20000}, "train.batch_size_start=20000", "at most batch_size=15360"),
    ({"train.microbatch_size": 1000}, "train.batch_size=15360", "multiple of the 1000 sequences"),
    ({"train.spike_factor": 0.9}, "train.spike_factor=0.9", "exceed 1"),
]


@pytest.mark.parametrize(("values", "field_and_value", "fix"), REFUSED, ids=lambda case: str(case))
def test_refusal_names_field_value_and_fix(values, field_and_value, fix):
    with pytest.raises(ValueError) as error:
        override(RunConfig(), values)
    assert str(error.value).startswith(f"{field_and_value}: "), str(error.value)
    assert fix in str(error.value)


def test_every_positive_number_is_checked():
    """Every integer of the network that is not a choice of zero or more refuses zero."""
    may_be_zero = {"num_nextn_predict_layers", "n_shared_experts", "first_k_dense_replace", "bos_token_id",
                   "eos_token_id", "n_redundant_experts"}  # fmt: skip
    for setting in settings():
        section, _, name = setting.path.partition(".")
        if section == "model" and setting.type is int and name not in may_be_zero:
            with pytest.raises(ValueError, match=setting.path.replace(".", r"\.") + "=0"):
                override(RunConfig(), {setting.path: 0})


def test_defaults_are_valid_and_frozen():
    run = RunConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        run.model.vocab_size = 1
    assert hash(run.model) == hash(RunConfig().model)


def test_override_replaces_nested_settings_and_nothing_else():
    before = RunConfig()
    after = override(before, {"train.seed": 7, "model.num_hidden_layers": 30, "model.rope_scaling.factor": 2.0})
    assert (after.train.seed, after.model.num_hidden_layers) == (7, 30)
    assert after.model.rope_scaling == RopeScaling(factor=2.0)  # the section was absent: its defaults fill the rest
    assert before == RunConfig()
    restored = override(after, {"train.seed": 0, "model.num_hidden_layers": 61, "model.rope_scaling": None})
    assert restored == before


def test_override_applies_settings_that_are_valid_only_together():
    """Neither order of one-by-one replacement would pass."""
    after = override(RunConfig(), {"model.n_group": 1, "model.topk_group": 1})
    assert (after.model.n_group, after.model.topk_group) == (1, 1)


def test_a_section_and_a_setting_below_it_apply_together():
    values = {"model.rope_scaling": RopeScaling(beta_fast=16.0), "model.rope_scaling.factor": 2.0}
    assert override(RunConfig(), values).model.rope_scaling == RopeScaling(beta_fast=16.0, factor=2.0)


@pytest.mark.parametrize("path", ["train.sede", "trian.seed", "seed", "model.rope_scaling.facto"])
def test_override_refuses_an_unknown_setting(path):
    with pytest.raises(ValueError, match="no such setting"):
        override(RunConfig(), {path: 1})


def test_json_round_trip():
    run = override(RunConfig(), {"model.rope_scaling.factor": 2.0, "model.q_lora_rank": None, "train.seed": 3})
    text = to_json(run)
    assert from_json(text) == run
    leaves = json.loads(text)
    for setting in settings():
        node = leaves
        for key in setting.path.split("."):
            node = node[key]
        assert node is None or isinstance(node, (setting.type, int)), setting.path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda values: values["train"].update(sede=1), "train.sede=1: no such setting"),
        (lambda values: values.update(extra={}), "extra={}: no such setting"),
        (lambda values: values["model"].update(vocab_size=0), "model.vocab_size=0: must be greater than 0"),
    ],
)
def test_json_with_a_wrong_setting_is_refused(change, message):
    values = json.loads(to_json(RunConfig()))
    change(values)
    with pytest.raises(ValueError) as error:
        from_json(json.dumps(values))
    assert message in str(error.value)


def test_text_that_is_not_json_is_refused():
    with pytest.raises(ValueError, match="not a configuration"):
        from_json("{")


def test_settings_list_every_leaf_once_with_its_help():
    listed = settings()
    paths = [setting.path for setting in listed]
    assert len(set(paths)) == len(paths)
    expected = set()
    for section in (config.ModelConfig, config.MeshConfig, config.DataConfig, config.TrainConfig):
        prefix = section.__name__.removesuffix("Config").lower()
        expected |= {f"{prefix}.{field.name}" for field in dataclasses.fields(section)}
    expected.remove("model.rope_scaling")
    expected |= {f"model.rope_scaling.{field.name}" for field in dataclasses.fields(RopeScaling)}
    assert set(paths) == expected
    for setting in listed:
        assert len(setting.help) > 10 and setting.type in (int, float, bool, str), setting
    assert {setting.path for setting in listed if setting.is_optional} == {"model.q_lora_rank"}


def test_no_setting_is_unused():
    """Every setting is read somewhere outside the file that defines it."""
    package = pathlib.Path(config.__file__).parent
    sources = [path.read_text() for path in package.rglob("*.py") if path.name not in ("config.py",)]
    sources += [path.read_text() for path in (package.parent / "launch").glob("*.py")]
    code = "\n".join(sources)
    for setting in settings():
        name = setting.path.rpartition(".")[2]
        assert f".{name}" in code or f'"{name}"' in code or f"self.{name}" in pathlib.Path(config.__file__).read_text()


@pytest.mark.parametrize(
    ("path", "value"),
    [("train.seed", "x"), ("train.seed", True), ("model.vocab_size", 1.5), ("model.rope_scaling", 3),
     ("model.num_hidden_layers", None), ("model.norm_topk_prob", 1), ("data.corpus", 3)],
)  # fmt: skip
def test_a_value_of_another_type_is_refused(path, value):
    with pytest.raises(ValueError, match=f"{path}={value!r}: must be of type"):
        override(RunConfig(), {path: value})


@pytest.mark.parametrize("text", ['"16"', "null", '{"model": 3}', "[]", "{"])
def test_json_that_is_no_configuration_is_refused(text):
    with pytest.raises(ValueError, match=r"configuration|model=3"):
        from_json(text)
