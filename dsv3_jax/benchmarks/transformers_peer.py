"""Measures transformers' DeepseekV3 on the workloads of `ours`, called in the same way.

The peer's best settings: grouped expert products, SDPA attention, fused AdamW on GPU. On GPU its weights, gradients and
moments are BF16, which is less precise than the report's recipe and moves fewer bytes.
"""

import json
import os
import resource
import sys
import time

import torch
import transformers

from dsv3_jax.benchmarks.networks import DECODE_BATCHES, NEW_TOKENS, PROMPT_LENGTH, WORKLOADS, Workload
from dsv3_jax.config import ModelConfig

WARMUP_STEPS, STEPS = 2, 6
SHARED_FIELDS = (
    "vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers",
    "num_attention_heads", "n_shared_experts", "n_routed_experts", "routed_scaling_factor", "kv_lora_rank",
    "q_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "n_group", "topk_group",
    "num_experts_per_tok", "first_k_dense_replace", "norm_topk_prob", "max_position_embeddings", "rms_norm_eps",
)  # fmt: skip


def train_step(workload: Workload, device: str) -> list[dict]:
    """Times forward, backward, clipping and AdamW on random tokens; nothing waits for a GPU before the last step."""
    model = build(workload.model, device)
    model.train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-6, betas=(0.9, 0.95), weight_decay=0.1, fused=True if device == "cuda" else None
    )
    generator = torch.Generator().manual_seed(0)
    shape = (workload.batch_size, workload.sequence_length)

    def run(steps):
        for _ in range(steps):
            tokens = torch.randint(0, workload.model.vocab_size, shape, generator=generator).to(device)
            loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return loss.item()

    run(WARMUP_STEPS)
    start = time.perf_counter()
    last_loss = run(STEPS)
    step_s = (time.perf_counter() - start) / STEPS
    return [{"step_s": step_s, "loss": last_loss, "peak_gb": _peak(device) / 1e9}]


def decode(workload: Workload, device: str) -> list[dict]:
    """Times greedy `generate` on random prompts, one result per batch size."""
    model = build(workload.model, device)
    model.eval()
    generator = torch.Generator().manual_seed(0)

    def continue_prompts(prompts, new_tokens):
        start = time.perf_counter()
        with torch.no_grad():
            model.generate(prompts, max_new_tokens=new_tokens, do_sample=False, eos_token_id=None, pad_token_id=0)
        _synchronize(device)
        return time.perf_counter() - start

    results = []
    for batch in DECODE_BATCHES:
        prompts = torch.randint(2, workload.model.vocab_size, (batch, PROMPT_LENGTH), generator=generator).to(device)
        continue_prompts(prompts, 2)
        first_s, all_s = continue_prompts(prompts, 1), continue_prompts(prompts, NEW_TOKENS)
        tokens_per_s = batch * (NEW_TOKENS - 1) / (all_s - first_s)
        results.append({"batch": batch, "first_token_s": first_s, "decode_tokens_per_s": tokens_per_s})
    return results


def build(config: ModelConfig, device: str) -> transformers.DeepseekV3ForCausalLM:
    """Returns a freshly initialised model in the workload's precision."""
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scaling is not None:
        scaling = ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
        rope |= {"rope_type": "yarn"} | {name: getattr(config.rope_scaling, name) for name in scaling}
    peer_config = transformers.DeepseekV3Config(
        **{name: getattr(config, name) for name in SHARED_FIELDS},
        num_key_value_heads=config.num_attention_heads,
        tie_word_embeddings=False,
        rope_parameters=rope,
    )
    torch.manual_seed(0)
    with torch.device(device):
        return transformers.DeepseekV3ForCausalLM._from_config(
            peer_config,
            dtype=torch.bfloat16 if config.precision == "bf16" else torch.float32,
            attn_implementation="sdpa",
            experts_implementation="grouped_mm",
        )


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _peak(device: str) -> int:
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    suite, workload_name = sys.argv[1:]
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    measured_on = "cuda" if torch.cuda.is_available() else "cpu"
    print(json.dumps({"train_step": train_step, "decode": decode}[suite](WORKLOADS[workload_name], measured_on)))
