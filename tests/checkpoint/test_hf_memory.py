"""Peak host memory of export and import, in a process of its own."""

import json
import pathlib
import subprocess
import sys

import pytest

MEASURE = """
import json, resource, sys
import numpy as np
from dsv3_jax.checkpoint import hf
from dsv3_jax.config import ModelConfig
from dsv3_jax.model import param_specs

class Drawn:  # a parameter that is nowhere: its blocks are drawn when asked for
    def __init__(self, spec):
        self.shape = spec.shape
    def __getitem__(self, index):
        return np.random.default_rng(0).standard_normal(self.shape[len(index):], np.float32)

def tree(specs):
    return {name: tree(spec) if isinstance(spec, dict) else Drawn(spec) for name, spec in specs.items()}

def peak_mb():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000

config = ModelConfig(
    vocab_size=4096, hidden_size=1024, intermediate_size=2048, moe_intermediate_size=512, num_hidden_layers=5,
    num_nextn_predict_layers=1, num_attention_heads=8, n_routed_experts=32, n_group=4, topk_group=2,
    num_experts_per_tok=4, first_k_dense_replace=1, kv_lora_rank=128, q_lora_rank=256, max_position_embeddings=1024,
)
what, directory, dtype = sys.argv[1:]
before = peak_mb()
if what == "export":
    hf.save(directory, config, tree(param_specs(config)), dtype=dtype)
else:
    hf.load_params(directory, hf.read_config(directory), dtype=dtype)
print(json.dumps({"before": before, "peak": peak_mb()}))
"""


def grown_mb(*arguments):
    """Returns by how much the peak resident memory of the process grew."""
    printed = subprocess.run([sys.executable, "-c", MEASURE, *map(str, arguments)], check=True, capture_output=True)
    measured = json.loads(printed.stdout)
    return measured["peak"] - measured["before"]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "fp8"])
def test_export_holds_a_few_tensors_and_import_the_parameters_once(tmp_path, dtype):
    """1.2 GB of float32 parameters; the largest tensor, the embedding, is 17 MB."""
    directory = pathlib.Path(tmp_path / "model")
    assert grown_mb("export", directory, dtype) < 150
    assert grown_mb("import", directory, "float32") < 1200 + 150
