"""Run by test_mesh_loading.py: parameters read from a checkpoint onto 8 CPU devices, beside all of them placed.

    python load_on_meshes.py all | process ID PORT

Exits nonzero on a difference, or where more is read or held than devices need.
"""

import collections
import dataclasses
import itertools
import math
import pathlib
import sys
import tempfile

import jax
import numpy as np

from dsv3_jax.checkpoint import hf, hf_stored, stored_params, training
from dsv3_jax.config import DataConfig, MeshConfig, ModelConfig, RunConfig
from dsv3_jax.model import slot_specs
from dsv3_jax.serve import placed_loading, placed_params
from dsv3_jax.sharding.mesh import make_mesh
from dsv3_jax.sharding.rules import split_param
from dsv3_jax.testing.networks import small_config, telling_params

# Axes, redundant experts besides 16, precision, for decoding.
CASES = (
    ({"node": 2, "gpu": 2, "tensor": 2}, 8, "fp8", True),
    ({"node": 2, "gpu": 2, "tensor": 2}, 8, "bf16", False),
    ({"node": 3, "gpu": 2}, 2, "fp32", True),
    ({"replica": 2, "gpu": 2, "tensor": 2}, 0, "fp8", False),
)
NETWORK = small_config(
    num_attention_heads=4, n_routed_experts=16, num_nextn_predict_layers=0, hidden_size=64, intermediate_size=256,
    moe_intermediate_size=32, kv_lora_rank=32, q_lora_rank=48, qk_rope_head_dim=64, qk_nope_head_dim=64, v_head_dim=64,
)  # fmt: skip

RUN = RunConfig(model=NETWORK, data=DataConfig(sequence_length=32))


class Watched:
    """A stored parameter that counts what is read of it, and looks what devices hold meanwhile."""

    def __init__(self, stored, name: str, log: "Log"):
        self.shape, self._stored, self._name, self._log = stored.shape, stored, name, log

    def __getitem__(self, index):
        self._log.reads[self._name, index] += 1
        self._log.look()
        return self._stored[index]


class Log:
    """What was read, and the most bytes that a device held meanwhile."""

    def __init__(self):
        self.reads, self.most_held = collections.Counter(), 0

    def look(self) -> None:
        sizes, held = {}, collections.Counter()
        for array in jax.live_arrays():
            for shard in array.addressable_shards:
                sizes[shard.device, shard.data.unsafe_buffer_pointer()] = shard.data.nbytes
        for (device, _), size in sizes.items():
            held[device] += size
        self.most_held = max([self.most_held, *held.values()])

    def watch(self, stored, name: str = ""):
        if isinstance(stored, dict):
            return {key: self.watch(value, f"{name}/{key}") for key, value in stored.items()}
        return Watched(stored, name, self)


def stored_layer_bytes(config: ModelConfig, mesh: jax.sharding.Mesh, stack: str) -> int:
    """Returns the bytes of a device's part of one layer in float32."""
    numbers = 0
    for spec in jax.tree.leaves(slot_specs(config)[stack]):
        sharding = jax.sharding.NamedSharding(mesh, split_param(mesh, spec.shape, spec.axes).compute)
        numbers += math.prod(sharding.shard_shape(spec.shape)[1:])
    return 4 * numbers


def check_case(stored: dict, params: dict, config: ModelConfig, axes: dict[str, int], for_decoding: bool) -> None:
    num_devices = int(np.prod(list(axes.values())))
    mesh = make_mesh(MeshConfig(**axes), devices=jax.devices()[:num_devices])
    placement_LS, loads_LE = None, np.random.default_rng(0).gamma(0.5, size=(config.num_moe_layers, 16))
    if config.n_redundant_experts:
        placement_LS = placed_params.balance_experts(config, mesh, loads_LE)
    log = Log()
    log.look()
    held_before = log.most_held
    found = placed_loading.load_placed(config, mesh, log.watch(stored), placement_LS, for_decoding=for_decoding)
    own_bytes = max(sum(leaf.addressable_shards[device].data.nbytes for leaf in jax.tree.leaves(found))
                    for device in range(num_devices))  # fmt: skip

    # Every slot's expert is read once for all devices that have it, and whole layers of the other parameters.
    expert_reads = {key: number for key, number in log.reads.items() if "/experts/" in key[0]}
    slots = config.n_routed_experts + config.n_redundant_experts
    assert sum(expert_reads.values()) == 2 * config.num_moe_layers * slots, "gate and up, and down, of every slot"
    copies_LE = np.ones(loads_LE.shape, int) if placement_LS is None else np.stack(
        [np.bincount(slots_S, minlength=16) for slots_S in placement_LS])  # fmt: skip
    assert all(number == copies_LE[index] for (_, index), number in expert_reads.items())
    # Meanwhile a device held what it keeps, and at most its part of one layer as it is stored.
    one_layer = max(stored_layer_bytes(config, mesh, stack) for stack in ("dense_layers", "moe_layers"))
    held = log.most_held - held_before
    assert own_bytes <= held + one_layer and held <= own_bytes + one_layer, (axes, held, own_bytes, one_layer)

    expected = placed_params.make_placement(config, mesh, for_decoding=for_decoding)(params, placement_LS)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for (path, leaf), wanted in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        name = (axes, jax.tree_util.keystr(path))
        assert leaf.dtype == wanted.dtype and leaf.sharding.is_equivalent_to(wanted.sharding, leaf.ndim), name
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(wanted), err_msg=str(name))


def check_all() -> None:
    params = jax.device_get(telling_params(NETWORK, 0))
    with tempfile.TemporaryDirectory() as folder:
        hf.save(pathlib.Path(folder) / "hf", NETWORK, params, dtype="float32")
        training.save_params(pathlib.Path(folder) / "run", RUN, params)
        from_run = stored_params.open_stored_params(pathlib.Path(folder) / "run")[1]
        from_hf = hf_stored.open_params(pathlib.Path(folder) / "hf", NETWORK)
        for stored, (axes, redundant, precision, for_decoding) in zip(itertools.cycle([from_run, from_hf]), CASES):
            config = dataclasses.replace(NETWORK, n_redundant_experts=redundant, precision=precision)
            check_case(stored, params, config, axes, for_decoding)


def check_process(process_id: str, port: str) -> None:
    """One of two processes, with a node each, reads the experts of its own slots alone; what it holds is right."""
    jax.distributed.initialize(f"localhost:{port}", 2, int(process_id))
    config = dataclasses.replace(NETWORK, n_redundant_experts=8)
    mesh = make_mesh(MeshConfig(node=2, gpu=2, tensor=2))
    params, log = jax.device_get(telling_params(NETWORK, 0)), Log()
    loads_LE = np.random.default_rng(1).gamma(0.5, size=(config.num_moe_layers, 16))
    placement_LS = placed_params.balance_experts(config, mesh, loads_LE)
    found = placed_loading.load_placed(config, mesh, log.watch(params), placement_LS, for_decoding=False)

    own_LS = placement_LS.reshape(config.num_moe_layers, 2, 12)[:, int(process_id)]
    read = [index for name, index in log.reads.elements() if name.endswith("/experts/down_proj")]
    wanted = [(layer, expert) for layer, experts in enumerate(own_LS) for expert in experts]
    assert sorted(read) == sorted(wanted), "others' experts were read"
    experts = found["moe_layers"]["mlp"]["experts"]
    of_slots = {name: np.stack([layer[slots] for layer, slots in zip(values, placement_LS, strict=True)])
                for name, values in params["moe_layers"]["mlp"]["experts"].items()}  # fmt: skip
    params["moe_layers"]["mlp"]["experts"] = of_slots
    del experts[placed_params.SLOTS]
    jax.tree.map(check_own_part, found, params)


def check_own_part(array: jax.Array, expected: np.ndarray) -> None:
    for shard in array.addressable_shards:
        np.testing.assert_array_equal(np.asarray(shard.data), expected[shard.index])


if __name__ == "__main__":
    globals()[f"check_{sys.argv[1]}"](*sys.argv[2:])
