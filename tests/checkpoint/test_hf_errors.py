"""What cannot be read or written stops with one message that says what to mend."""

import json
import shutil

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from random_models import BASE, FP8, random_params

from dsv3_jax.checkpoint import hf

SHARD = "model-00001-of-000001.safetensors"
INDEX = "model.safetensors.index.json"
EXPERT = "model.layers.1.mlp.experts.2.up_proj.weight"


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    directory = tmp_path_factory.mktemp("hf") / "exported"
    hf.save(directory, BASE, random_params(BASE), dtype="float32")
    return directory


@pytest.fixture
def directory(exported, tmp_path):
    return shutil.copytree(exported, tmp_path / "copy")


def change_tensors(directory, change):
    """Rewrites the only shard and its index."""
    tensors = safetensors.numpy.load_file(directory / SHARD)
    change(tensors)
    safetensors.numpy.save_file(
        {name: np.ascontiguousarray(values) for name, values in tensors.items()}, directory / SHARD
    )
    (directory / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(tensors, SHARD)}))


def change_json(file, **values):
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def load(directory):
    return hf.load_params(directory, hf.read_config(directory), dtype="float32")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(EXPERT), [EXPERT, "missing"]),
        (lambda t: t.pop("model.layers.3.enorm.weight"), ["model.layers.3.enorm.weight", "missing"]),
        (lambda t: t.update({"model.layers.0.extra": t["model.norm.weight"]}), ["model.layers.0.extra", "not part"]),
        (lambda t: t.update({EXPERT: t[EXPERT].T}), [EXPERT, "(24, 8)", "(8, 24)", SHARD]),
        (lambda t: t.update({EXPERT: t[EXPERT].astype(np.int32)}), [EXPERT, "I32", "F32"]),
        (lambda t: t.update({EXPERT: t[EXPERT].astype(np.float16)}), [EXPERT, "F16", "BF16"]),
        (lambda t: t.update({"lm_head.weight_scale_inv": np.ones((1, 1), np.float32)}), ["lm_head.weight_scale_inv"]),
        (lambda t: t.update({"model.layers.3.embed_tokens.weight": t["model.embed_tokens.weight"] + 1}),
         ["model.layers.3.embed_tokens.weight", "embed_tokens"]),
    ],
)  # fmt: skip
def test_wrong_tensor_is_named(directory, change, words):
    change_tensors(directory, change)
    with pytest.raises(ValueError) as error:
        load(directory)
    assert all(word in str(error.value) for word in words), error.value


def test_mtp_copies_may_be_absent_and_no_module_means_none(directory):
    change_tensors(
        directory, lambda t: [t.pop(f"model.layers.3.{n}") for n in ("embed_tokens.weight", "shared_head.head.weight")]
    )
    assert "mtp_layers" in load(directory)
    change_tensors(directory, lambda t: [t.pop(name) for name in list(t) if name.startswith("model.layers.3.")])
    assert hf.read_config(directory).num_nextn_predict_layers == 0
    assert "mtp_layers" not in load(directory)


def test_weights_with_more_mtp_modules_than_config_json_are_refused(directory):
    change_json(directory / "config.json", num_nextn_predict_layers=0)
    with pytest.raises(ValueError, match="num_nextn_predict_layers=0: the weights hold 1"):
        hf.read_config(directory)


def test_truncated_file_is_refused(directory):
    content = (directory / SHARD).read_bytes()
    for length in (0, 7, 100, len(content) - 1):
        (directory / SHARD).write_bytes(content[:length])
        with pytest.raises(ValueError, match=f"{SHARD}.*{length}"):
            load(directory)


def test_file_that_is_not_safetensors_is_refused(directory):
    (directory / SHARD).write_bytes(b"\x40\0\0\0\0\0\0\0" + b"not json" * 20)
    with pytest.raises(ValueError, match=f"{SHARD}.*header"):
        load(directory)


@pytest.mark.parametrize(
    ("weight_map", "words"),
    [
        ({"lm_head.weight": "model-00009-of-000009.safetensors"}, [INDEX, "model-00009-of-000009.safetensors"]),
        ({"model.unheard_of.weight": SHARD}, [SHARD, "model.unheard_of.weight", INDEX]),
    ],
)
def test_index_that_does_not_match_is_refused(directory, weight_map, words):
    there = json.loads((directory / INDEX).read_text())["weight_map"]
    change_json(directory / INDEX, weight_map=there | weight_map)
    with pytest.raises(ValueError) as error:
        load(directory)
    assert all(word in str(error.value) for word in words), error.value


def test_missing_weights_index_or_config_are_refused(directory):
    (directory / INDEX).write_text("[]")
    with pytest.raises(ValueError, match=INDEX):
        load(directory)
    (directory / INDEX).unlink()
    with pytest.raises(ValueError, match=f"neither {INDEX} nor model.safetensors"):
        load(directory)
    (directory / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: not JSON"):
        load(directory)
    (directory / "config.json").unlink()
    with pytest.raises(ValueError, match=r"no config\.json"):
        load(directory)


def test_fp8_scales_are_checked(tmp_path):
    hf.save(tmp_path / "fp8", FP8, random_params(FP8), dtype="fp8")
    index = tmp_path / "fp8" / INDEX
    content = (tmp_path / "fp8" / SHARD).read_bytes()
    name = b"layers.0.self_attn.o_proj.weight_scale_inv"
    (tmp_path / "fp8" / SHARD).write_bytes(content.replace(name, name[:-1] + b"w"))
    index.write_text(index.read_text().replace(name.decode(), name.decode()[:-1] + "w"))
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.o_proj\.weight_scale_inv: missing"):
        load(tmp_path / "fp8")


def test_fp8_export_needs_whole_blocks_of_experts(tmp_path):
    with pytest.raises(ValueError, match=r"moe_intermediate_size=8.*vLLM.*128"):
        hf.save(tmp_path / "out", BASE, random_params(BASE), dtype="fp8")
    assert not (tmp_path / "out").exists()


def test_existing_output_is_left_alone(directory):
    before = sorted(file.stat().st_mtime_ns for file in directory.iterdir())
    with pytest.raises(ValueError, match="not empty"):
        hf.save(directory, BASE, random_params(BASE), dtype="float32")
    assert sorted(file.stat().st_mtime_ns for file in directory.iterdir()) == before


def test_failed_export_leaves_nothing(tmp_path):
    params = random_params(FP8)
    params["mtp_layers"]["block"]["self_attn"]["o_proj"][0, 0, 0, 0] = np.nan
    with pytest.raises(ValueError, match=r"model\.layers\.3\.self_attn\.o_proj\.weight.*not finite"):
        hf.save(tmp_path / "out", FP8, params, dtype="fp8")
    assert not list(tmp_path.iterdir())


def test_full_disk_and_missing_tokenizer_are_refused_before_writing(tmp_path, monkeypatch):
    params = random_params(BASE)
    with pytest.raises(ValueError, match=r"no tokenizer\.json"):
        hf.save(tmp_path / "out", BASE, params, dtype="float32", tokenizer_directory=tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000))
    with pytest.raises(ValueError, match="GB free"):
        hf.save(tmp_path / "out", BASE, params, dtype="float32")
    assert not list(tmp_path.iterdir())


def test_parameters_of_another_configuration_are_refused(tmp_path):
    params = random_params(BASE)
    params["norm"] = params["norm"][:-1]
    with pytest.raises(ValueError, match=r"norm=\(23,\).*\(24,\)"):
        hf.save(tmp_path / "out", BASE, params, dtype="float32")
    del params["norm"]
    with pytest.raises(ValueError, match="norm=None"):
        hf.save(tmp_path / "out", BASE, params, dtype="float32")


def test_bfloat16_directory_of_another_writer_loads(directory):
    """All BF16, router bias included, as transformers writes after `.bfloat16()`."""
    change_tensors(directory, lambda t: t.update({name: v.astype(ml_dtypes.bfloat16) for name, v in t.items()}))
    loaded = load(directory)
    expected = random_params(BASE)["moe_layers"]["mlp"]["e_score_correction_bias"].astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(loaded["moe_layers"]["mlp"]["e_score_correction_bias"], expected.astype(np.float32))
