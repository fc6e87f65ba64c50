import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from dsv3_jax.data.prepared import write_corpus
from dsv3_jax.data.tokenizer import train_tokenizer

ROOT = Path(__file__).parents[2]

CONFIG = '''
from dsv3_jax.config import DataConfig, ModelConfig, RunConfig, TrainConfig


def get_config():
    model = ModelConfig(
        vocab_size=320, hidden_size=16, intermediate_size=16, moe_intermediate_size=8, num_hidden_layers=2,
        num_attention_heads=2, n_routed_experts=4, kv_lora_rank=8, q_lora_rank=None, qk_rope_head_dim=4,
        qk_nope_head_dim=4, v_head_dim=4, n_group=2, topk_group=1, num_experts_per_tok=2, first_k_dense_replace=1,
        max_position_embeddings=64, precision="fp32",
    )
    train = TrainConfig(
        num_steps=12, batch_size=4, batch_size_start=2, batch_ramp_tokens=6 * 2 * 16, microbatch_size=2, warmup_steps=2,
        learning_rate=1e-2, init_std=0.1, ema_decay=0.9, eval_sequences=4, eval_every_steps=6,
        checkpoint_every_steps=3, checkpoints_to_keep=2,
    )
    data = DataConfig(sequence_length=16, mixture="0:code=0.75,words=0.25;300:code=0.5,words=0.5")
    return RunConfig(model=model, data=data, train=train)
'''


def write_two_sources(directory: Path, *, num_words: int = 4) -> None:
    """Writes a corpus of much code and of so few words that a run reads them several times."""
    texts = [path.read_text() for path in sorted((ROOT / "dsv3_jax" / "train").glob("*.py"))[:8]]
    tokenizer = train_tokenizer(texts, 300)
    code, words = tokenizer.encode_documents(texts), tokenizer.encode_documents(["zwei Wörter " * num_words] * 2)
    documents = {
        "code": {"train": code[2:], "heldout": code[:2]},
        "words": {"train": words[1:], "heldout": words[:1]},
    }
    write_corpus(directory, tokenizer, documents, weights={"code": 1, "words": 1})


class Launcher:
    """Starts launch/train.py on a small corpus as a user would, every run in a session of its own."""

    def __init__(self, directory: Path):
        self.config = directory / "micro.py"
        self.config.write_text(CONFIG)
        self.corpus = directory / "corpus"
        write_two_sources(self.corpus)
        self._environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(directory / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }

    def start(self, workdir: Path, *arguments: str, num_devices: int = 1) -> subprocess.Popen:
        return self.start_command(*self._train(workdir), *arguments, num_devices=num_devices)

    def start_all(self, workdir: Path, *arguments: str, num_processes: int,
                  own: dict[int, tuple[str, ...]] | None = None) -> list[subprocess.Popen]:  # fmt: skip
        """Starts the processes of one run; `own` holds further arguments of single ones."""
        return self.start_commands(*self._train(workdir), *arguments, num_processes=num_processes, own=own)

    def _train(self, workdir: Path) -> tuple[str, ...]:
        return "train.py", f"--config={self.config}", f"--workdir={workdir}", f"--config.data.corpus={self.corpus}"

    def start_command(self, script: str, *arguments: str, num_devices: int = 1) -> subprocess.Popen:
        """Starts a command of launch/."""
        flags = f"--xla_force_host_platform_device_count={num_devices} --xla_backend_optimization_level=0"
        return subprocess.Popen(
            [sys.executable, ROOT / "launch" / script, *arguments], env=self._environment | {"XLA_FLAGS": flags},
            start_new_session=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def start_commands(self, script: str, *arguments: str, num_processes: int,
                       own: dict[int, tuple[str, ...]] | None = None) -> list[subprocess.Popen]:  # fmt: skip
        """Starts processes that work as one; `own` holds further arguments of single ones."""
        with socket.create_server(("", 0)) as probe:
            address = f"localhost:{probe.getsockname()[1]}"
        own = own if own is not None else {}
        return [
            self.start_command(script, *arguments, f"--coordinator_address={address}",
                               f"--num_processes={num_processes}", f"--process_id={process}", *own.get(process, ()))
            for process in range(num_processes)
        ]  # fmt: skip

    def finish(self, workdir: Path, *arguments: str, num_devices: int = 1) -> tuple[int, str]:
        """Returns exit code and output of a run left alone."""
        process = self.start(workdir, *arguments, num_devices=num_devices)
        output, _ = process.communicate(timeout=600)
        return process.returncode, output


@pytest.fixture(scope="session")
def launcher(tmp_path_factory) -> Launcher:
    return Launcher(tmp_path_factory.mktemp("resume"))


@pytest.fixture(scope="session")
def uninterrupted(launcher, tmp_path_factory) -> Path:
    """The workdir of a run that nobody stopped."""
    workdir = tmp_path_factory.mktemp("uninterrupted") / "run"
    code, output = launcher.finish(workdir)
    assert code == 0, output
    return workdir
