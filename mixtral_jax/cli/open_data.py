"""From a config to packed batches of text on the mesh, telling people what was found."""

import dataclasses
import hashlib
import time

from mixtral_jax.cli.start import Run
from mixtral_jax.data.batches import TrainBatches, held_out_batches
from mixtral_jax.data.packing import plan_rows
from mixtral_jax.data.text import prepare_text
from mixtral_jax.evaluate.ngram import measure_ngrams
from mixtral_jax.evaluate.perplexity import Evaluator, TokenBytes, make_evaluator
from mixtral_jax.parallel.rules import AxisRules

# Enough for a bigram model of any vocabulary here, and counted in seconds.
NGRAM_TOKENS = 20_000_000


@dataclasses.dataclass(frozen=True)
class TextData:
    """What a pretraining run reads: rows to train on, a judge of held-out text, and what made both."""

    train_batches: TrainBatches
    evaluate: Evaluator
    fingerprint: str  # of the text, the tokens and the packing together


def open_text(run: Run) -> TextData:
    """Reads, tokenises and packs the text that the config names; prints its size and its n-gram baselines."""
    config, say = run.config, run.console.print
    say(f"reading {config.data.path} (tokenised the first time, then cached) ...")
    start = time.monotonic()
    text = prepare_text(config.data, config.model.vocab_size, run.workdir / "tokenizer.model", is_writer=run.is_writer)
    plan = plan_rows(text.train, config.train.sequence_length)
    layout = {"mesh": run.mesh, "rules": AxisRules()}
    held_out_plan = plan_rows(text.held_out, config.train.sequence_length)
    train_batches = TrainBatches(
        text.train, plan, batch_size=config.train.batch_size,
        gradient_accumulation=config.train.gradient_accumulation, seed=config.train.seed, **layout,
    )  # fmt: skip
    held_out = held_out_batches(
        text.held_out, held_out_plan,
        num_sequences=config.train.eval_sequences, batch_size=config.train.micro_batch_size, **layout,
    )  # fmt: skip
    num_tokens, epochs = len(text.train.tokens), config.train.num_steps * config.train.batch_size / plan.num_rows
    say(
        f"[bold]text[/]        {num_tokens:,} tokens to train on in {plan.num_rows:,} rows, {epochs:.2f} epochs\n"
        f"[bold]held out[/]    {len(text.held_out.tokens):,} tokens; read in {time.monotonic() - start:.0f} s"
    )
    token_bytes = TokenBytes.of(text.tokenizer)
    baselines = {}
    if run.processes.count == 1:  # Fitting them needs every held-out row on this host.
        baselines = measure_ngrams(text.train.tokens[:NGRAM_TOKENS], held_out, token_bytes)
        described = ", ".join(f"{name} {value:.3f}" for name, value in baselines.items())
        say(f"[bold]to beat[/]     {described} bits/byte, on the same tokens")
    else:
        say("[bold]to beat[/]     unigram and bigram models are fitted by runs of one process only")
    fingerprint = hashlib.sha256((plan.fingerprint + held_out_plan.fingerprint).encode()).hexdigest()
    return TextData(train_batches, make_evaluator(held_out, token_bytes, baselines), fingerprint)
