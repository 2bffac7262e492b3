"""From a config to packed batches of text on the mesh; prints what was found."""

import dataclasses
import hashlib
import time
from collections.abc import Iterator, Mapping

from rich.markup import escape

from mixtral_jax.checkpoint.formats.side_files import SideFiles
from mixtral_jax.config import ConfigError, DataConfig, require
from mixtral_jax.data.batches import TrainBatches, held_out_batches
from mixtral_jax.data.field_names import describe_unread
from mixtral_jax.data.packing import LongDocuments, PackPlan, plan_rows
from mixtral_jax.data.sources import describe_files, find_weights, split_sources
from mixtral_jax.data.store import TokenStore
from mixtral_jax.data.text import prepare_text, tokenize_text
from mixtral_jax.data.tokenizer import Tokenizer, check_vocabulary, read_tokenizer
from mixtral_jax.evaluate.ngram import measure_ngrams
from mixtral_jax.evaluate.perplexity import Evaluator, TokenBytes, make_evaluator
from mixtral_jax.parallel.agreement import require_same
from mixtral_jax.parallel.batch import Batch
from mixtral_jax.parallel.rules import AxisRules
from mixtral_jax.runs.run import Run

# Enough for a bigram model of any vocabulary that is used here, and counted within seconds.
MAX_NGRAM_TOKENS = 20_000_000

# The fix to name when processes have read different data.
SAME_DATA = "give all the same text, tokenizer and Python"


@dataclasses.dataclass(frozen=True)
class TrainingData:
    """What a run reads.

    Attributes:
        train_batches: batches to train on.
        evaluate: from a model to its `eval/` figures on what was held out.
        fingerprint: of the documents, the tokenizer and the packing together; of held-out data
            only if they are drawn from `data.path`.
        held_out_fingerprint: of what is held out, and its packing.
    """

    train_batches: TrainBatches
    evaluate: Evaluator
    fingerprint: str
    held_out_fingerprint: str


@dataclasses.dataclass(frozen=True)
class PackedStores:
    """A store to train on and a held-out store, as batches on the mesh.

    Attributes:
        plan: the packing of the store to train on.
        num_epochs: how often the run reads each row that it trains on.
        fingerprint, held_out_fingerprint: as in `TrainingData`.
    """

    train_batches: TrainBatches
    held_out: list[Batch]
    plan: PackPlan
    num_epochs: float
    fingerprint: str
    held_out_fingerprint: str


def open_text(run: Run, tokenizer: Tokenizer | None = None) -> TrainingData:
    """Reads, tokenizes and packs the text that the config names; prints its size and baselines.

    Args:
        tokenizer: of the model that the run starts from; None takes or trains that of the config.

    Raises:
        ConfigError: there is nothing to read, too many bad rows, or no tokenizer that fits.
    """
    config = run.config
    announce_reading(run)
    start = time.monotonic()
    kept = run.workdir / "tokenizer.model"
    if tokenizer is None:
        vocab_size = config.model.vocab_size
        text = prepare_text(config.data, vocab_size, kept, is_writer=run.is_writer)
    else:
        text = tokenize_text(config.data, tokenizer)
        if run.is_writer:
            tokenizer.save(kept)
    say = run.console.print
    packed = pack_stores(run, text.train, text.held_out)
    say(
        f"[bold]text[/]        {len(text.train.tokens):,} tokens to train on in "
        f"{packed.plan.num_rows:,} rows, {packed.num_epochs:.2f} epochs\n"
        f"[bold]held out[/]    {len(text.held_out.tokens):,} tokens; read in "
        f"{time.monotonic() - start:.0f} s"
    )
    if text.unread:
        say(name_unread(text.unread))
    if text.num_shared:
        say(describe_shared(text.num_shared, text.held_out, "documents"))
    token_bytes = TokenBytes.of(text.tokenizer)
    baselines = {}
    if run.processes.count == 1:  # Fitting them needs every held-out row on this host.
        tokens = text.train.tokens[:MAX_NGRAM_TOKENS]
        baselines = measure_ngrams(tokens, packed.held_out, token_bytes)
        described = ", ".join(f"{name} {value:.3f}" for name, value in baselines.items())
        say(f"[bold]to beat[/]     {described} bits/byte, on the same tokens")
    else:
        say("[bold]to beat[/]     unigram and bigram models are fitted by runs of one process only")
    evaluate = make_evaluator(packed.held_out, token_bytes, baselines)
    return TrainingData(
        packed.train_batches, evaluate, packed.fingerprint, packed.held_out_fingerprint
    )


def announce_reading(run: Run) -> None:
    """Prints what is about to be read, and what is not."""
    for line in describe_reading(run.config.data) if run.is_writer else ():
        run.console.print(line, markup=False)


def describe_reading(data: DataConfig) -> Iterator[str]:
    """What is about to be read, and which files are not."""
    held_out = "" if data.held_out is None else f", held out {data.held_out}"
    yield f"reading {data.path}{held_out} (tokenized once, then cached) ..."
    yield from describe_files(data)


def describe_shared(num_shared: int, held_out: TokenStore, what: str) -> str:
    """Says that some of `data.held_out` is trained on too."""
    return (
        f"[bold]trained on[/]  {num_shared:,} of {held_out.num_documents:,} held-out {what} too: "
        "their loss says little about new text"
    )


def name_unread(unread: Mapping[str, int]) -> str:
    """Names the fields that rows fill and nothing reads."""
    return f"[bold]not read[/]    {escape(describe_unread(unread))}"


def name_data(fingerprint: str) -> str:
    """A short name of some data, for people to compare."""
    return f"data {fingerprint[:12]}"


def find_tokenizer(side_files: SideFiles, data: DataConfig, vocab_size: int) -> Tokenizer:
    """The tokenizer that the config names, for a model that came without one.

    Args:
        side_files: of the model, whose added tokens it gets.

    Raises:
        ConfigError: it names none, or one that does not fit the model.
    """
    is_named = data.tokenizer and not data.tokenizer.startswith("train:")
    fix = "name the one it was trained with as data.tokenizer"
    require(is_named, f"the checkpoint came without a tokenizer: {fix}")
    tokenizer = read_tokenizer(data.tokenizer)
    require(
        side_files.bos_id in (None, tokenizer.bos_id),
        f"data.tokenizer={data.tokenizer} begins texts with the id {tokenizer.bos_id}, and the "
        f"checkpoint, which came without a tokenizer, with {side_files.bos_id}: {fix}",
    )
    tokenizer = side_files.add_tokens(tokenizer)
    check_vocabulary(tokenizer, vocab_size)
    return tokenizer


def require_every_source(
    path: str, plan: PackPlan, train: TokenStore, held_out: TokenStore
) -> None:
    """Makes sure that each source with a weight has something to train on.

    Raises:
        ConfigError: one has not; says why.
    """
    for number, source in enumerate(split_sources(path) if find_weights(path) else ()):
        rows, trained, kept = (
            sum(counts[number : number + 1])
            for counts in (
                plan.rows_by_source,
                train.documents_by_source,
                held_out.documents_by_source,
            )
        )
        if rows:
            continue
        reason = "none of what it holds fits a row"
        if not trained:
            reason = f"all that it holds is held out ({kept:,} of its texts or conversations)"
        raise ConfigError(
            f"data.path: {source.path} has a weight, and no row to train on: {reason}: give it "
            "more, leave it out, or name held-out data of your own in data.held_out"
        )


def pack_stores(
    run: Run,
    train: TokenStore,
    held_out: TokenStore,
    *,
    long_documents: LongDocuments = "split",
) -> PackedStores:
    """Packs the stores as the config of the run says.

    Raises:
        ConfigError: a store, or a source with a weight, gives no row; the processes hold out other
            data; or what `plan_rows` raises.
    """
    config = run.config
    mesh, rules, length = run.mesh, AxisRules(), config.train.sequence_length
    plan = plan_rows(train, length, long_documents=long_documents)
    require_every_source(config.data.path, plan, train, held_out)
    held_out_plan = plan_rows(held_out, length, long_documents=long_documents)
    train_batches = TrainBatches(
        train,
        plan,
        batch_size=config.train.batch_size,
        gradient_accumulation=config.train.gradient_accumulation,
        seed=config.train.seed,
        weights=find_weights(config.data.path),
        mesh=mesh,
        rules=rules,
    )
    batches = held_out_batches(
        held_out,
        held_out_plan,
        num_sequences=config.train.eval_sequences,
        batch_size=config.train.micro_batch_size,
        mesh=mesh,
        rules=rules,
    )
    num_epochs = config.train.num_steps * config.train.batch_size / plan.num_rows
    # Data to evaluate on that are not drawn from data.path may change without changing training.
    held_out_fingerprint = held_out_plan.fingerprint
    fingerprints = plan.fingerprint + (held_out_fingerprint if not config.data.held_out else "")
    fingerprint = hashlib.sha256(fingerprints.encode()).hexdigest()
    named = name_data(held_out_fingerprint)
    require_same(run.processes, "held-out data", named, SAME_DATA)
    return PackedStores(train_batches, batches, plan, num_epochs, fingerprint, held_out_fingerprint)
