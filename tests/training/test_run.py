"""Whole runs on a tiny base: they learn, continue bit for bit, and end in an adapter."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from model_adapter.checkpoints import load_gguf, read_adapter
from model_adapter.training import __main__ as command
from model_adapter.training import checkpoint as checkpoints
from model_adapter.training import corpus as corpora
from model_adapter.training import run as runs
from model_adapter.training.ahead import Ahead
from model_adapter.training.batch import Batch
from model_adapter.training.errors import CheckpointMismatchError, SettingsError
from model_adapter.training.settings import RECIPES, Settings, read_settings
from tests.support.training_sets import tiny_settings

CONFIGS = Path(runs.__file__).parent / "configs"


def _train(settings: Settings) -> None:
    runs.train(runs.prepare(settings), runs.Journal(settings.run / "log.jsonl", settings.steps, 1))


def _log(settings: Settings) -> list[dict[str, float]]:
    return [json.loads(line) for line in (settings.run / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("recipe", list(RECIPES))
def test_a_run_learns(tmp_path: Path, recipe: str) -> None:
    settings = tiny_settings(tmp_path, recipe=recipe, steps="24", evaluate_every="24")
    _train(settings)
    steps = [entry for entry in _log(settings) if "layers" in entry]
    assert [entry["step"] for entry in steps] == list(range(1, 25))
    first = sum(entry["layers"] for entry in steps[:5])
    last = sum(entry["layers"] for entry in steps[-5:])
    assert last < first * 0.95
    assert {"answer", "hits", "queries", "tokens_per_s"} <= steps[0].keys()
    (held,) = [entry["held_out"] for entry in _log(settings) if "held_out" in entry]
    assert isinstance(held, dict) and 0 <= held["mean@1"] <= held["mean@5"] <= held["mean@10"] <= 1


def test_a_run_continues_bit_for_bit(tmp_path: Path) -> None:
    straight = tiny_settings(tmp_path, run=str(tmp_path / "straight"))
    _train(straight)
    torch.rand(3)  # nothing depends on the global generator
    broken = tiny_settings(tmp_path, run=str(tmp_path / "broken"))
    run = runs.prepare(broken)

    class Killed(Exception):
        """Stands for a kill."""

    class Killing(runs.Journal):
        def step(self, step: int, values: dict[str, object]) -> None:
            if step == 5:
                raise Killed

    with pytest.raises(Killed):
        runs.train(run, Killing(broken.run / "log.jsonl", 6, 1))
    newest = checkpoints.latest(broken.run)
    assert newest is not None and checkpoints.load(newest).step == 4
    _train(broken)
    for folder in (straight.run, broken.run):
        assert len(list(folder.glob("step-*"))) == checkpoints.KEPT
    ends = [checkpoints.latest(folder) for folder in (straight.run, broken.run)]
    one, other = (checkpoints.load(path) for path in ends if path is not None)
    assert one.step == other.step == 6
    assert one.tensors.keys() == other.tensors.keys()
    for name, tensor in one.tensors.items():
        assert torch.equal(tensor, other.tensors[name]), name


def test_batches_made_by_processes_are_the_same(tmp_path: Path) -> None:
    threads = tiny_settings(tmp_path, steps="3")
    processes = tiny_settings(tmp_path, steps="3", batch_processes="1")
    assert threads.fingerprint == processes.fingerprint
    found: list[list[Batch]] = []
    for settings in (threads, processes):
        run = runs.prepare(settings)
        ahead = Ahead(run.corpus, settings, run.prompts, run.base.sha256, run.device)
        found.append(list(ahead.batches(1)))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one.documents.ids_T, other.documents.ids_T)
        assert torch.equal(one.positive_QD, other.positive_QD)
        assert torch.equal(one.targets_A, other.targets_A)
    assert len(found[0]) == 2


def test_what_was_prepared_is_read_and_never_stale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = tiny_settings(tmp_path, steps="1")
    first = runs.prepare(settings).corpus
    (made,) = (settings.cache / "training").iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(corpora, "read_set", None)  # nothing is read from the sets again
        again = runs.prepare(tiny_settings(tmp_path, steps="2", rank="2")).corpus
    assert again.documents == first.documents and again.tokens == first.tokens
    assert again.queries == first.queries and again.held_out == first.held_out
    assert (again.pools, again.asked_N, again.report) == (first.pools, first.asked_N, first.report)
    assert runs.prepare(tiny_settings(tmp_path, seed="2")).corpus.queries == first.queries
    assert runs.prepare(tiny_settings(tmp_path, sets_seed="2")).corpus.queries != first.queries
    with (settings.data / "eval_other.questions.jsonl").open("a") as file:
        file.write('{"question": "In which year was the lamp behind the mill put up?"}\n')
    cleaned = runs.prepare(settings).corpus
    assert len(list(made.parent.iterdir())) == 3
    asked = [len(corpus.queries) + len(corpus.held_out) for corpus in (first, cleaned)]
    assert asked[1] < asked[0], "the question that an evaluation set asks is gone"


def test_checkpoints_of_something_else_are_refused(tmp_path: Path) -> None:
    settings = tiny_settings(tmp_path, steps="2")
    _train(settings)
    with pytest.raises(CheckpointMismatchError, match="other settings"):
        runs.export(tiny_settings(tmp_path, seed="2", steps="2"), tmp_path / "a.safetensors")
    with pytest.raises(CheckpointMismatchError, match="other settings"):
        runs.restore(runs.prepare(tiny_settings(tmp_path, seed="2", steps="2")))
    path = checkpoints.latest(settings.run)
    assert path is not None
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(CheckpointMismatchError, match="damaged"):
        runs.export(settings, tmp_path / "a.safetensors")
    path.unlink()
    with pytest.raises(CheckpointMismatchError, match="no checkpoint"):
        runs.export(settings, tmp_path / "a.safetensors")
    assert not list(tmp_path.glob("*.safetensors"))


def test_the_command_trains_exports_and_refuses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = tiny_settings(tmp_path)
    config = ["--config", str(tmp_path / "config.toml"), "--set", "steps=2"]
    early = tmp_path / "early.safetensors"
    first = ["--stop-after", "0", "--adapter", str(early)]
    assert command.main([*config, *first]) == command.EXIT_STOPPED
    assert read_adapter(early).header.training.steps == 1, "each checkpoint has its adapter"
    assert [path.name for path in settings.run.glob("step-*")] == ["step-00000001.safetensors"]
    path, later = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    assert command.main([*config, "--adapter", str(path)]) == 0
    assert command.main([*config, "--export", str(later)]) == 0
    adapter, again = read_adapter(path), read_adapter(later)
    assert (again.header, again.digest) == (adapter.header, adapter.digest)
    model = load_gguf(Path(settings.base), "bf16", adapter=adapter)
    assert model.config.msa.routed_layers == (1, 2)
    training = adapter.header.training
    assert (training.steps, training.seed) == (2, 1)
    assert [source.name for source in training.sources] == ["train_places", "generated_dialogues"]
    assert training.sources[0].licence == "CC-BY-4.0" and training.sources[0].documents == 64
    assert json.loads(training.recipe)["routed_layers"] == [1, 2]
    assert command.main([*config, "--evaluate"]) == 0
    capsys.readouterr()
    (tmp_path / "data" / "train_places.questions.jsonl").write_text("{\n")
    assert command.main([*config, "--set", f"run={tmp_path / 'other'}"]) == 2
    assert "DataError" in capsys.readouterr().err
    assert command.main([*config, "--adapter", str(tmp_path / "no" / "a.safetensors")]) == 2
    assert "no directory" in capsys.readouterr().err
    assert command.main([*config, "--set", "base=nowhere"]) == 2
    assert "CheckpointNotFoundError" in capsys.readouterr().err
    assert command.main(["--config", str(tmp_path / "none.toml")]) == 2
    assert not list((tmp_path / "other").glob("step-*"))


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("recipe", "magic", "none of paper, tried"),
        ("router_init", "zero", "router_init"),
        ("steps", "0", "steps is below 1"),
        ("steps", "1.5", "not int"),
        ("rank", "-1", "rank is negative"),
        ("stepz", "3", "unknown key 'stepz'"),
        ("query_reduce", "sum", "none of max, mean, last"),
        ("routed_layers", "3", "not a list"),
        ("routed_layers", '["a"]', "not int"),
        ("sources", "[]", r"no \[\[sources\]\]"),
        ("sources", "[1]", "not a table"),
        ("sources", '[{name = "x"}]', "licence is missing"),
        ("teacher", "1", "not bool"),
        ("words", "1.5", "not between 0 and 1"),
    ],
)
def test_settings_that_are_refused(tmp_path: Path, key: str, value: str, match: str) -> None:
    with pytest.raises(SettingsError, match=match):
        tiny_settings(tmp_path, **{key: value})


def test_a_set_that_may_not_be_shipped_stops_a_run(tmp_path: Path) -> None:
    settings = tiny_settings(tmp_path)
    config = tmp_path / "config.toml"
    config.write_text(config.read_text().replace("CC-BY-4.0", "CC-BY-NC-4.0"))
    with pytest.raises(SettingsError, match="may not be shipped"):
        runs.prepare(read_settings(config, {}))
    assert not list(settings.run.glob("*"))


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.toml")), ids=lambda path: path.stem)
def test_committed_configurations_are_sound(path: Path) -> None:
    settings = read_settings(path, {})
    assert all(source.name.startswith("train_") for source in settings.sources)
    assert {"eval_*", "mem_*", "bank_*", "conv_*"} <= set(settings.evaluation)


def test_rates_rise_and_fall(tmp_path: Path) -> None:
    settings = tiny_settings(tmp_path, steps="100", warm_up_steps="10")
    rates = [runs.rate_at(step, settings) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == rates[10] == 1.0
    assert rates[:10] == sorted(rates[:10]) and rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(0.03, abs=0.02)


def test_training_needs_neither_lmdb_nor_grpc() -> None:
    blocked = "import sys; sys.modules.update(lmdb=None, grpc=None, sqlalchemy=None); "
    code = f"{blocked}import model_adapter.training.run, model_adapter.training.__main__"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
