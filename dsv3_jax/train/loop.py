"""A training run, from a configuration to a finished workdir. The same call again continues where the run stopped.

Several processes train as one: each calls `train` alike, reads its own rows and writes its own part of the
checkpoints; the first alone writes everything else.

Order of what happens after step n, so that a kill at any moment repeats steps but loses and doubles nothing: moving
average, metrics of every step up to n, held-out evaluation, checkpoint of step n.
"""

import contextlib
import dataclasses
import functools
import math
import shutil
import signal
from pathlib import Path

import jax

from dsv3_jax.checkpoint.training import (
    TrainingCheckpoints,
    newest_step,
    read_run,
    require_same_run,
    saved_items,
    settings_of,
)
from dsv3_jax.config import RunConfig, require
from dsv3_jax.data import Corpus, Tokenizer, TrainBatches, heldout_windows, open_corpus
from dsv3_jax.data.prepared import TOKENIZER
from dsv3_jax.sharding.mesh import make_mesh
from dsv3_jax.sharding.processes import ALONE, Processes, is_first
from dsv3_jax.train import schedule
from dsv3_jax.train.activation_memory import activation_lines, exchange_lines
from dsv3_jax.train.batches import next_batch
from dsv3_jax.train.ema import host_structs, init_ema, update_ema
from dsv3_jax.train.evaluate import Score, heldout_batch_size, make_score_tokens, score_sources, total
from dsv3_jax.train.metrics import NoLog, RunLog, Screen, SilentScreen, Throughput, fetch, progress_line, step_record
from dsv3_jax.train.plots import write_plots
from dsv3_jax.train.requests import Requests
from dsv3_jax.train.state import TrainState, abstract_state, fresh_state, init_state, state_shardings
from dsv3_jax.train.step import make_train_step, training_work


@dataclasses.dataclass
class Progress:
    """Where a run stands, in numbers that outgrow the device's int32. Saved with every checkpoint."""

    step: int = 0  # optimizer steps finished, skipped ones included
    tokens: int = 0  # trained, skipped steps included
    position: int = 0  # windows of the corpus consumed
    corpus: str = ""  # fingerprint of the corpus


def train(config: RunConfig, workdir: str | Path, *, processes: Processes = ALONE,
          time_limit_s: float = math.inf) -> signal.Signals | None:  # fmt: skip
    """Trains until the configured end, or until SIGTERM or SIGINT; the last step is saved either way.

    SIGUSR1 saves and goes on. A signal to one process is one to all.

    Writes into the workdir: config.json, tokenizer/, checkpoints/, metrics.jsonl, tensorboard/, loss.png,
    expert_load.png.

    Args:
      config: the run.
      workdir: a directory that all processes share.
      processes: those of `join`.
      time_limit_s: after so many seconds of training the run ends as by SIGTERM.

    Returns:
      The signal that ended the run early, None at its end; the same in all processes.

    Raises:
      ValueError: a setting, corpus, mesh or workdir that cannot work, or in which the processes differ, before anything
        is written.
      OSError: a checkpoint could not be written.
      FloatingPointError: `train.max_bad_steps` steps in a row were skipped.
    """
    require_same_run(workdir, config)
    mesh = make_mesh(config.mesh, work=training_work(config))
    train_step = make_train_step(config, mesh)
    corpus = open_usable_corpus(config)
    require_same_tokenizer(workdir, corpus)
    progress = read_progress(workdir, config, corpus)
    batches = TrainBatches(corpus, config.data, seed=config.train.seed, position=progress.position)
    evaluate = _make_heldout_evaluation(config, mesh, corpus)
    processes.require_agreement(run_facts(config, workdir, corpus))
    make_shared(workdir, processes)
    screen = Screen() if is_first() else SilentScreen()
    requests = Requests(mesh, time_limit_s=time_limit_s)
    with jax.set_mesh(mesh), screen, requests, contextlib.closing(batches):
        checkpoints = TrainingCheckpoints(workdir, config)
        if is_first():
            copy_tokenizer(workdir, corpus)
        state, ema = _start_or_resume(config, mesh, checkpoints, workdir, screen)
        reporter = _Reporter(config, workdir, progress.step, screen, batches, num_devices=mesh.size)
        for line in source_lines(batches) + activation_lines(config, mesh) + exchange_lines(config, mesh):
            screen.say(line)
        is_saved, is_evaluated = newest_step(workdir) == progress.step, progress.step > 0

        while not is_finished(config, progress) and not requests.stop:
            settings = schedule.at(config.train, step=progress.step, tokens=progress.tokens)
            tokens_ABT = next_batch(config, mesh, batches, batch_size=settings.batch_size)
            state, metrics = train_step(state, tokens_ABT, settings)
            requests.exchange()
            progress.step += 1
            progress.tokens += settings.batch_size * config.data.sequence_length
            progress.position = batches.position
            if is_due(progress.step, config.train.ema_every_steps) and config.train.ema_decay:
                ema = update_ema(config, ema, state.params, is_good=metrics["is_good"])
            reporter.report(dataclasses.replace(progress), settings, metrics)

            is_evaluated = is_due(progress.step, config.train.eval_every_steps)
            is_saved = requests.take_save() or is_due(progress.step, config.train.checkpoint_every_steps)
            if is_evaluated or is_saved:
                reporter.flush()
            if is_evaluated:
                reporter.report_heldout(progress, evaluate(state.params))
            if is_saved:
                save(checkpoints, state, ema, progress)

        reporter.flush()
        if evaluate is not None and not is_evaluated and is_finished(config, progress):
            reporter.report_heldout(progress, evaluate(state.params))
        if not is_saved:
            save(checkpoints, state, ema, progress)
        checkpoints.close()
        reporter.close()
        for path in write_plots(workdir) if is_first() else []:
            screen.say(f"wrote {path}")
        screen.say(f"step {progress.step} is saved in {workdir}")
        return requests.stop


def run_facts(config: RunConfig, workdir: str | Path, corpus: Corpus) -> dict[str, object]:
    """Returns what must be the same in all processes of a run, wherever each finds its copy of the corpus."""
    facts = {path: value for path, value in settings_of(config).items() if path != "data.corpus"}
    return facts | {
        "identity of the corpus": corpus.fingerprint,
        "newest checkpoint in the workdir": newest_step(workdir),
        "devices of the process": jax.local_device_count(),
    }


def make_shared(workdir: str | Path, processes: Processes) -> None:
    """Makes the workdir.

    Raises:
      ValueError: another process does not see it.
    """
    if is_first():
        Path(workdir).mkdir(parents=True, exist_ok=True)
    processes.require_agreement({})
    processes.require_agreement({f"a directory {workdir} is there": Path(workdir).is_dir()})


def open_usable_corpus(config: RunConfig) -> Corpus:
    """Opens the run's corpus.

    Raises:
      ValueError: it is damaged, does not fit the model, or has no held-out text although evaluation is asked for.
    """
    require(config.data.corpus != "", "data.corpus", "", "name a directory that launch/prepare_data.py wrote")
    corpus = open_corpus(config.data.corpus)
    corpus.require_fits(config.model)
    require(corpus.num_tokens("heldout") > 0 or not config.train.eval_every_steps, "train.eval_every_steps",
            config.train.eval_every_steps, f"{config.data.corpus} has no held-out documents; prepare a corpus "
            "with some, or set 0")  # fmt: skip
    return corpus


def require_same_tokenizer(workdir: str | Path, corpus: Corpus) -> None:
    """Raises a ValueError when the workdir holds another tokenizer than the corpus was encoded with."""
    directory = Path(workdir) / TOKENIZER
    if directory.exists():
        require(Tokenizer.load(directory).sha256 == corpus.tokenizer.sha256, "data.corpus", str(corpus.directory),
                f"was encoded with another tokenizer than {directory} holds; prepare the corpus with "
                f"--tokenizer={directory}")  # fmt: skip


def copy_tokenizer(workdir: str | Path, corpus: Corpus) -> None:
    """Puts the corpus's tokenizer into the workdir, atomically, unless it is there."""
    directory, temporary = Path(workdir) / TOKENIZER, Path(workdir) / f".{TOKENIZER}.tmp"
    if not directory.exists():
        shutil.copytree(corpus.directory / TOKENIZER, temporary, dirs_exist_ok=True)
        temporary.rename(directory)


def read_progress(workdir: str | Path, config: RunConfig, corpus: Corpus) -> Progress:
    """Returns where the newest whole checkpoint stands, the beginning without one; touches nothing.

    Raises:
      ValueError: the checkpoint is damaged, or was trained on another corpus.
    """
    step = newest_step(workdir)
    if step is None or "optimizer" not in saved_items(workdir, step):
        return Progress(corpus=corpus.fingerprint)
    progress = Progress(**read_run(workdir, step)[1])
    require(progress.corpus == corpus.fingerprint, "data.corpus", config.data.corpus,
            "holds other tokens or weights than this run was trained on; name the corpus it began with")  # fmt: skip
    return progress


def is_finished(config: RunConfig, progress: Progress) -> bool:
    """Returns whether no step is left: `train.num_steps` are done, or with 0 the schedule's tokens are used up."""
    if config.train.num_steps:
        return progress.step >= config.train.num_steps
    return progress.tokens >= config.train.schedule_tokens


def is_due(step: int, every: int) -> bool:
    """Returns whether something that happens every so many steps (0: never) happens after this one."""
    return bool(every) and step % every == 0


def save(checkpoints: TrainingCheckpoints, state: TrainState, ema: dict | None, progress: Progress) -> None:
    """Starts writing the checkpoint of the step just finished."""
    trees = {"params": state.params, "optimizer": dataclasses.replace(state, params={})}
    if ema is not None:
        trees["ema"] = ema
    checkpoints.save(progress.step, trees, progress=dataclasses.asdict(progress))


def _start_or_resume(config: RunConfig, mesh: jax.sharding.Mesh, checkpoints: TrainingCheckpoints,
                     workdir: str | Path, screen: Screen) -> tuple[TrainState, dict | None]:  # fmt: skip
    """Returns state and moving average: of the newest whole checkpoint, around its parameters alone, or new ones."""
    step = newest_step(workdir)
    structs = abstract_state(config, mesh)
    if step is not None and "optimizer" in saved_items(workdir, step):
        items = {"params": structs.params, "optimizer": dataclasses.replace(structs, params={})}
        if config.train.ema_decay:
            items["ema"] = host_structs(structs.params)
        restored = checkpoints.restore(step, items)
        screen.say(f"resuming after step {step}")
        return dataclasses.replace(restored["optimizer"], params=restored["params"]), restored.get("ema")
    if step is None:
        state = init_state(config, mesh)
    else:
        params = checkpoints.restore(step, {"params": structs.params})["params"]
        begin = functools.partial(fresh_state, config)
        state = jax.jit(begin, donate_argnums=0, out_shardings=state_shardings(config, mesh))(params)
        screen.say(f"starting from the parameters in {workdir}")
    return state, init_ema(state.params) if config.train.ema_decay else None


def source_lines(batches: TrainBatches) -> list[str]:
    """Says what a run reads: a line per source with its share of the windows and how often it was read so far."""
    shares, epochs = batches.mixture.shares(batches.position), batches.epochs(batches.position)
    return [
        f"source {name}: {share:.2%} of the sequences, {source.num_tokens:,} tokens in {source.num_windows:,} "
        f"sequences and {source.num_unused_tokens:,} more that fill none, read {epochs[name]:.3f} times"
        for (name, source), share in zip(batches.sources.items(), shares)
    ]


def _make_heldout_evaluation(config: RunConfig, mesh, corpus: Corpus):
    """Builds a function of the parameters that scores each source's held-out text, always the same windows.

    It gives a dict from source to `Score`, without the sources that have no such text. None without any text.
    """
    if not corpus.num_tokens("heldout"):
        return None
    score_tokens = make_score_tokens(
        config.model, mesh, chunk_tokens=config.train.loss_chunk_tokens, segment_masks=config.data.segment_masks
    )

    def evaluate(params: dict) -> dict[str, Score]:
        windows = heldout_windows(
            corpus, sequence_length=config.data.sequence_length, batch_size=heldout_batch_size(config, mesh),
            max_sequences=config.train.eval_sequences,
        )  # fmt: skip
        scores = score_sources(score_tokens, params, windows, num_sources=len(corpus.sources))
        return {name: score for name, score in zip(corpus.sources, scores) if score.num_bytes}

    return evaluate


class _Reporter:
    """Logs each step once the next one is under way, so that the device never waits for the host."""

    def __init__(self, config: RunConfig, workdir: str | Path, start_step: int, screen: Screen, batches: TrainBatches,
                 *, num_devices: int):  # fmt: skip
        self._config = config
        self._screen = screen
        self._batches = batches
        self._log = RunLog(workdir, start_step=start_step) if is_first() else NoLog()
        self._throughput = Throughput(config, num_devices=num_devices)
        self._pending = None

    def report(self, progress: Progress, settings: schedule.StepSettings, metrics: dict) -> None:
        """Takes a step that was just dispatched; logs the one before."""
        self._log_pending()
        self._pending = (progress, settings, metrics)

    def flush(self) -> None:
        """Logs the last step, waiting for it; neither that wait nor the time until the next step is measured."""
        self._throughput.restart()
        self._log_pending()
        self._throughput.restart()

    def report_heldout(self, progress: Progress, scores: dict[str, Score]) -> None:
        """Logs an evaluation of the held-out text: of each source by itself, and of all."""
        score = total(scores.values())
        record = {
            "kind": "heldout", "step": progress.step, "tokens": progress.tokens,
            "bits_per_byte": score.bits_per_byte, "perplexity": score.perplexity,
        }  # fmt: skip
        line = f"step {progress.step}  held-out text: {score.bits_per_byte:.4f} bits per byte"
        if len(scores) > 1:
            record |= {f"bits_per_byte/{name}": source_score.bits_per_byte for name, source_score in scores.items()}
            parts = [f"{name} {source_score.bits_per_byte:.4f}" for name, source_score in scores.items()]
            line += f" ({', '.join(parts)})"
        self._log.write(record)
        self._screen.say(line)

    def close(self) -> None:
        self._log.close()

    def _log_pending(self) -> None:
        if self._pending is None:
            return
        (progress, settings, metrics), self._pending = self._pending, None
        metrics = fetch(metrics)
        is_logged = is_due(progress.step, self._config.train.log_every_steps)
        num_tokens = settings.batch_size * self._config.data.sequence_length
        speed = self._throughput.measure(num_tokens, is_due=is_logged)
        if is_logged or not metrics["is_good"]:
            record = step_record(progress.step, tokens=progress.tokens, settings=settings, metrics=metrics)
            record |= {"tokens_per_second": None, "model_flops_utilization": None} | speed
            record |= {f"epochs/{name}": epochs for name, epochs in self._batches.epochs(progress.position).items()}
            self._log.write(record)
            self._screen.show(progress_line(self._config, record))
        if metrics["bad_steps_in_row"] >= self._config.train.max_bad_steps:
            raise FloatingPointError(
                f"train.max_bad_steps={self._config.train.max_bad_steps}: steps up to {progress.step} were all skipped "
                f"(loss {metrics['loss']:.4g}, gradient norm {metrics['grad_norm']:.4g}); lower train.learning_rate "
                "in a new workdir, or raise train.spike_factor or train.max_bad_steps"
            )
