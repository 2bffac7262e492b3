"""A base is opened with its notes; what a tuning could not export or keep is refused at once."""

import contextlib
import dataclasses
import shutil
from types import SimpleNamespace
from typing import Any

import jax
import pytest

from mixtral_jax.checkpoint.weights import Weights
from mixtral_jax.cli.tune_flags import parse_tuning_flags
from mixtral_jax.config import ConfigError
from mixtral_jax.parallel.mesh import resolve_mesh
from mixtral_jax.parallel.processes import Processes
from mixtral_jax.runs import checkup, tune
from mixtral_jax.runs.base import Base, open_named_base
from mixtral_jax.runs.checkup import count_bytes, fit_base
from mixtral_jax.runs.pretrain import pretrain
from mixtral_jax.runs.stop import StopSignal
from mixtral_jax.runs.upcycle import open_dense, plan_dense
from mixtral_jax.training.assemble import make_training
from tests.cases import make_run, mesh_of, small_config
from tests.checkpoint.folders import architecture_of, in_memory
from tests.checkpoint.side_folders import CHATML, write
from tests.data.chat_cases import good_line, train_tokenizer
from tests.data.test_vocabulary import train
from tests.finetune.test_upcycling import DENSE, WEIGHTS


@pytest.mark.parametrize("changes", [{"model_type": "unigram"}, {"byte_fallback": False}])
def test_a_base_whose_tokenizer_cannot_be_exported_is_refused(changes, tmp_path):
    write(tmp_path, {})
    config = small_config(finetune={"base": str(tmp_path)})
    assert open_named_base(config, is_shown=False).folder == tmp_path
    train(**changes).save(tmp_path / "tokenizer.model")
    with pytest.raises(ConfigError, match="tokenizer cannot be written for Hugging Face"):
        open_named_base(config, is_shown=False)


@pytest.mark.parametrize(("bos_id", "words"), [(None, None), (1, None), (3, "with 3: name the")])
def test_a_tokenizer_that_the_config_names_must_begin_texts_as_the_base_does(
    bos_id, words, tmp_path
):
    write(tmp_path, {"added_tokens.json": CHATML}, bos_token_id=bos_id)
    named = shutil.move(tmp_path / "tokenizer.model", tmp_path / "other.model")
    config = small_config(finetune={"base": str(tmp_path)}, data__tokenizer=str(named))
    if words is None:
        tokenizer = open_named_base(config, is_shown=False).tokenizer
        assert [tokenizer.control_id(text) for text in CHATML] == list(CHATML.values())
    else:
        with pytest.raises(ConfigError, match=words):
            open_named_base(config, is_shown=False)


@pytest.mark.parametrize("index", [0, 1])
def test_each_way_to_open_a_base_prints_its_notes_in_one_process(index, tmp_path, capsys):
    write(tmp_path, {"generation_config.json": {"temperature": 0.6}})
    tuning = small_config(finetune={"base": str(tmp_path)})
    run = make_run(small_config(upcycle={"base": str(tmp_path)}), mesh_of(), tmp_path)
    run = dataclasses.replace(run, processes=Processes(index))
    stop: Any = None
    for open_it in (
        lambda: tune.find_base(tuning, tmp_path, run.processes, stop),
        lambda: fit_base(tuning, [], is_shown=run.is_writer),
        lambda: open_dense(run),
    ):
        with contextlib.suppress(ConfigError):  # It is no dense model.
            open_it()
        assert capsys.readouterr().err.count("temperature=0.6") == (index == 0)


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize(
    ("flags", "unused"),
    [
        (["model.num_layers=7", "data.tokenizer=mixtral"], "model.num_layers, data.tokenizer"),
        (
            ["router.num_experts_per_token=1", "model.granularity=2"],
            "router.num_experts_per_token, model.granularity",
        ),
        (["finetune.pretrain.num_steps=3", "model.dtype=float32"], "finetune.pretrain.num_steps"),
        (["model.remat=none", "train.num_steps=3", "data.path=x"], None),
    ],
)
def test_keys_that_a_named_base_makes_void_are_named(tmp_path, capsys, flags, unused, index):
    write(tmp_path, {})
    arguments = [f"--config.{flag}" for flag in (*flags, f"finetune.base={tmp_path}")]
    read = parse_tuning_flags(arguments, description="", default_config="instruct/tiny.py")
    nothing: Any = None
    tune.find_base(read.run.config, tmp_path, Processes(index), nothing, read.run.named_keys)
    said = [line for line in capsys.readouterr().err.splitlines() if "without effect" in line]
    expected = f"note: {unused}: without effect, since the base has its own"
    assert said == ([expected] if unused and index == 0 else [])


@pytest.mark.parametrize(
    ("keys", "refused"),
    [
        (["data.tokenizer", "model.num_layers"], "data.tokenizer"),
        (["upcycle.pretrain.path", "train.num_steps"], "upcycle.pretrain.path"),
        (
            ["upcycle.pretrain.num_steps", "upcycle.method", "data.tokenizer"],
            "upcycle.pretrain.num_steps, data.tokenizer",
        ),
        (["model.num_layers", "upcycle.method", "data.path"], None),
        ([], None),
    ],
)
@pytest.mark.parametrize("has_tokenizer", [True, False])
def test_keys_that_a_named_dense_model_makes_void_are_refused(
    tmp_path, monkeypatch, capsys, keys, refused, has_tokenizer
):
    tokenizer = train_tokenizer()
    parameters = in_memory(WEIGHTS, DENSE)
    own = tokenizer if has_tokenizer else None
    base = Base(tmp_path, Weights(architecture_of(DENSE, 1), parameters, own, "x"), tokenizer)
    monkeypatch.setattr("mixtral_jax.runs.upcycle.open_base", lambda *_, **__: base)
    run = make_run(small_config(upcycle={"base": str(tmp_path)}), mesh_of(), tmp_path)
    if not has_tokenizer:  # Then the key gives the dense model its tokenizer.
        refused = refused and refused.removesuffix("data.tokenizer").removesuffix(", ")
    if refused:
        with pytest.raises(ConfigError, match=f"decides {refused}, which would have no effect"):
            open_dense(run, keys)
        return
    assert open_dense(run, keys) is base
    # A config file that names a tokenizer cannot leave it out.
    note = f"data.tokenizer={run.config.data.tokenizer} is not used"
    assert (note in capsys.readouterr().err) == has_tokenizer


def test_a_disk_without_room_for_checkpoints_and_export_is_refused(tmp_path, monkeypatch):
    config = small_config(finetune={"lora": {"rank": 2}}, checkpoint__keep=2)
    training = make_training(resolve_mesh(config, 1), "cpu")
    with jax.set_mesh(mesh_of()):
        state = count_bytes(jax.tree.leaves(training.abstract_state()))
        export = count_bytes(jax.tree.leaves(jax.eval_shape(training.make_base)))
        # The tuned model has the frozen parameters of its checkpoints, which have adapters too.
        assert 0 < export < state < 2 * export
        for saved, num_to_come in (("", 3), ("4", 2), ("8", 1), ("12", 0)):
            (tmp_path / "checkpoints" / saved).mkdir(parents=True)
            for missing in (0, 1):
                free = num_to_come * state + export - missing
                monkeypatch.setattr(checkup, "free_bytes", lambda folder, free=free: free)
                assert len(checkup.check_disk(training, tmp_path)) == missing
        # Of a run that is trained, the export alone is to come.
        with pytest.raises(ConfigError, match=r"for an export of .*: free some"):
            checkup.require_disk(training, tmp_path, mesh_of())


@pytest.mark.parametrize("settings", [{}, {"upcycle": {"method": "copy"}}, {"finetune": {}}])
def test_each_run_asks_for_room_before_it_reads_or_trains(tmp_path, monkeypatch, settings):
    run = make_run(small_config(data__path="nowhere", **settings), mesh_of(), tmp_path)
    for free, words in ((0, f"too little space in {tmp_path}: .* free some"), (2**40, "nowhere")):
        monkeypatch.setattr(checkup, "free_bytes", lambda folder, free=free: free)
        with pytest.raises(ConfigError, match=words):
            if "finetune" in settings:
                base: Any = SimpleNamespace(tokenizer=train_tokenizer())
                tune.tune(run, base, StopSignal(run.processes))
            else:
                pretrain(run, StopSignal(run.processes))


@pytest.mark.parametrize("path", ["gs://bucket/x", "nowhere", "nowhere:2,configs"])
@pytest.mark.parametrize("section", ["upcycle", "finetune"])
def test_text_to_pretrain_on_is_named_as_it_was_given(tmp_path, monkeypatch, section, path):
    def start(config, workdir, processes):
        return make_run(config, mesh_of(), workdir)

    def start_dense(run):
        return start(plan_dense(run.config), run.workdir / "base", run.processes)

    monkeypatch.setattr(tune, "start_run", start)
    monkeypatch.setattr("mixtral_jax.runs.pretrain.start_dense", start_dense)
    settings = {"pretrain": {"path": path}} | ({"method": "copy"} if section == "upcycle" else {})
    chats = tmp_path / "chats.jsonl"
    chats.write_bytes(good_line(0))
    config = small_config(data__path=str(chats), data__tokenizer="train:90", **{section: settings})
    run = make_run(config, mesh_of(), tmp_path / "run")
    stop = StopSignal(run.processes)
    with pytest.raises(ConfigError, match=rf"^{section}\.pretrain\.path={path.split(':2')[0]}"):
        if section == "upcycle":
            pretrain(run, stop)
        else:
            tune.find_base(config, tmp_path / "run", run.processes, stop)


def test_room_for_a_tuning_is_asked_for_before_its_base_is_pretrained(tmp_path, monkeypatch):
    monkeypatch.setattr(checkup, "free_bytes", lambda folder: 0)
    config = small_config(finetune={}, data__path=str(tmp_path), data__tokenizer="train:90")
    (tmp_path / "chats.jsonl").write_bytes(good_line(0))
    run = make_run(config, mesh_of(), tmp_path / "run" / "base")
    with pytest.raises(ConfigError, match=r"run: .* for checkpoints of .* and an export of"):
        tune._check_tuning(config, tmp_path / "run", run)
