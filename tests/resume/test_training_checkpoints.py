import dataclasses
import errno
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.checkpoint.training import (
    TrainingCheckpoints,
    newest_step,
    open_params,
    require_same_run,
    save_params,
)
from dsv3_jax.config import ModelConfig, RunConfig, TrainConfig, override
from dsv3_jax.model import param_specs

# A failed read or write leaves TensorStore calling back into an event loop that Orbax has closed.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="module")
def config() -> RunConfig:
    model = ModelConfig(
        vocab_size=16, hidden_size=8, intermediate_size=8, moe_intermediate_size=4, num_hidden_layers=1,
        num_attention_heads=1, n_routed_experts=2, kv_lora_rank=4, q_lora_rank=None, qk_rope_head_dim=2,
        qk_nope_head_dim=2, v_head_dim=2, n_group=1, topk_group=1, num_experts_per_tok=1, first_k_dense_replace=1,
        num_nextn_predict_layers=0,
    )  # fmt: skip
    return RunConfig(model=model, train=TrainConfig(checkpoints_to_keep=2, checkpoint_keep_every_steps=10))


def make_params(config: RunConfig, value: float) -> dict:
    return jax.tree.map(lambda spec: jnp.full(spec.shape, value), param_specs(config.model))


def save(workdir, config, steps, **extra) -> None:
    checkpoints = TrainingCheckpoints(workdir, config)
    for step in steps:
        trees = {"params": make_params(config, step), "optimizer": {"count": jnp.int32(step)}} | extra
        checkpoints.save(step, trees, progress={"step": step, "tokens": 2**50})
    checkpoints.close()


def steps_in(workdir) -> list[int]:
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())


def test_retention_keeps_the_newest_and_the_milestones(config, tmp_path):
    save(tmp_path, config, [5, 10, 15, 20, 25])
    assert steps_in(tmp_path) == [10, 20, 25]


def test_parameters_come_back_from_any_step_and_as_moving_average(config, tmp_path):
    save(tmp_path, config, [1, 2], ema=make_params(config, 0.5))
    for arguments, value in [({}, 2), ({"step": 1}, 1), ({"ema": True}, 0.5)]:
        loaded_config, params = open_params(tmp_path, **arguments)
        assert loaded_config == config
        assert {float(leaf.min()) for leaf in jax.tree.leaves(params)} == {value}
        assert jax.tree.map(jnp.shape, params) == jax.tree.map(lambda spec: spec.shape, param_specs(config.model))
    with pytest.raises(ValueError, match=r"step=3: no such checkpoint .* there are \[1, 2\]"):
        open_params(tmp_path, step=3)


def test_no_moving_average_is_said(config, tmp_path):
    save(tmp_path, config, [1])
    with pytest.raises(ValueError, match=r"no moving average; train with train\.ema_decay > 0"):
        open_params(tmp_path, ema=True)


def test_imported_parameters_start_any_run_of_the_same_model(config, tmp_path):
    save_params(tmp_path / "run", config, make_params(config, 7))
    assert open_params(tmp_path / "run")[0] == config
    require_same_run(tmp_path / "run", override(config, {"train.learning_rate": 1.0}))
    with pytest.raises(ValueError, match=r"model\.kv_lora_rank: 4 in the workdir, 6 here"):
        require_same_run(tmp_path / "run", override(config, {"model.kv_lora_rank": 6}))
    with pytest.raises(ValueError, match="exists and is not empty"):
        save_params(tmp_path / "run", config, make_params(config, 7))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train.seed": 1, "data.sequence_length": 64},
         ["train.seed: 0 in the workdir, 1 here", "data.sequence_length: 4096 in the workdir, 64 here"]),
        ({"model.rope_scaling.factor": 4.0}, ["model.rope_scaling.factor: None in the workdir, 4.0 here"]),
    ],
)  # fmt: skip
def test_another_run_is_refused_by_name_and_both_values(config, tmp_path, changes, words):
    save(tmp_path, config, [1])
    with pytest.raises(ValueError) as error:
        TrainingCheckpoints(tmp_path, override(config, changes))
    assert all(word in str(error.value) for word in words)
    assert open_params(tmp_path)[0] == config


def test_where_and_how_long_a_run_goes_may_change(config, tmp_path):
    save(tmp_path, config, [1])
    changes = {"train.num_steps": 9, "mesh.replica": 2, "data.corpus": "moved", "train.microbatch_size": 64,
               "model.remat_policy": "full", "model.precision": "bf16",
               "model.fp8_attention_cache": "bf16", "train.peak_tflops": 989.0}  # fmt: skip
    require_same_run(tmp_path, override(config, changes))


def test_a_foreign_directory_is_refused(config, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ValueError, match=r"has checkpoints/ but no config\.json"):
        require_same_run(tmp_path, config)
    (tmp_path / "config.json").write_text("{broken")
    with pytest.raises(ValueError, match=r"config\.json: not a configuration"):
        require_same_run(tmp_path, config)


def damage_by_truncation(step_directory) -> None:
    for path in step_directory.rglob("d/*"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def damage_by_removal(step_directory) -> None:
    shutil.rmtree(step_directory / "params")


def damage_by_other_shapes(step_directory) -> None:
    other = override(open_params(step_directory.parents[1])[0], {"model.hidden_size": 6})
    save(step_directory.parents[2] / "other", other, [2])
    shutil.rmtree(step_directory / "params")
    shutil.copytree(step_directory.parents[2] / "other" / "checkpoints" / "2" / "params", step_directory / "params")


@pytest.mark.parametrize("damage", [damage_by_truncation, damage_by_removal, damage_by_other_shapes])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_left(config, tmp_path, damage):
    workdir = tmp_path / "run"
    save(workdir, config, [1, 2])
    damage(workdir / "checkpoints" / "2")
    checkpoints = TrainingCheckpoints(workdir, config)
    structs = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), make_params(config, 0)
    )
    with pytest.raises(ValueError, match=r"run/checkpoints/2'.*remove the directory to go on from the checkpoint"):
        checkpoints.restore(2, {"params": structs})
    checkpoints.close()
    shutil.rmtree(workdir / "checkpoints" / "2")
    assert newest_step(workdir) == 1
    assert float(open_params(workdir)[1]["norm"][0]) == 1


def test_a_full_disk_is_seen_before_anything_is_written(config, tmp_path, monkeypatch):
    save(tmp_path, config, [1])
    monkeypatch.setattr("shutil.disk_usage", lambda path: shutil._ntuple_diskusage(2**20, 2**20 - 100, 100))
    checkpoints = TrainingCheckpoints(tmp_path, config)
    with pytest.raises(OSError, match=r"and 100 are free\. The checkpoint of step 1 is whole; make room") as error:
        checkpoints.save(2, {"params": make_params(config, 2)}, progress={})
    checkpoints.close()
    assert error.value.errno == errno.ENOSPC
    assert steps_in(tmp_path) == [1]


def test_a_failed_write_is_one_message_and_leaves_the_last_checkpoint(config, tmp_path):
    """A limit on file sizes stands in for a full disk: both fail in write(2)."""
    save(tmp_path, config, [1])
    checkpoints = TrainingCheckpoints(tmp_path, config)
    noise = jnp.asarray(np.random.default_rng(0).normal(size=40_000), jnp.float32)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"The checkpoint of step 1 is whole; make room") as error:
            checkpoints.save(2, {"optimizer": {"noise": noise}}, progress={})
            checkpoints.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert error.value.errno == errno.EFBIG
    assert steps_in(tmp_path) == [1]
    assert dataclasses.asdict(open_params(tmp_path)[0]) == dataclasses.asdict(config)
