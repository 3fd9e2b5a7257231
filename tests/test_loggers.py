"""What follows a run into files and services: what is written and when, and that no run ends for a logger."""

import csv
import json
import math
import sys
import threading
import time
import types

import pytest
import torch

from blink.__main__ import main
from blink.errors import UserError
from blink.training import command, loggers
from blink.training.listener import Listener
from blink.training.results import EpochRow, RunResult

TRAIN = ["--recipe", "hlb", "--batch-size", "8", "--device", "cpu", "--dtype", "fp32", "--validate", "8"]
FACTS = {
    "command": ["blink", "train"], "data": {"name": "shapes"}, "kernels": {"name": "reference"}, "dtype": "fp32",
    "recipe": {"name": "tiny", "summary": "x", "epochs": 2.0, "tta": None, "param_groups": ({"lr": 0.5},)},
    "deterministic": False, "budget": {"batch_size": 8, "total_steps": 4}, "environment": {"device": "a"},
}  # fmt: skip


def row(epoch: int, step: int, **other) -> EpochRow:
    known = dict(train_loss=1.5, train_accuracy=0.25, lr=0.5, accuracy=0.5, ema_accuracy=None, seconds=2.0)
    return EpochRow(epoch, step, **(known | other))


def drive(logger: Listener, seed: int = 3) -> None:
    """Two epochs of two steps."""
    losses = torch.full((2,), math.nan)
    logger.on_start(seed)
    for step in range(4):
        losses[step % 2] = step + 0.5
        logger.on_step(step + 1, losses)
        if step % 2:
            logger.on_epoch(row(1 + step // 2, step + 1))
    logger.on_end(RunResult(seed, 0.75, 4.0, 100.0, [0.5, 1.5, 2.5, 3.5]))


def trained(image_folder, capsys, *arguments):
    code = main(["train", "--data", str(image_folder), *TRAIN, *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def events(folder):
    """(step, value) of each scalar by its name, as TensorBoard reads them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder))
    found.Reload()
    return {name: [(e.step, e.value) for e in found.Scalars(name)] for name in found.Tags()["scalars"]}, found


def test_csv_has_a_row_an_epoch_of_every_run(image_folder, tmp_path, capsys):
    path, summary = tmp_path / "new" / "epochs.csv", tmp_path / "x.json"
    options = ("--steps", "9", "--runs", "2", "--seed", "5", "--csv", path, "--json", summary)
    assert trained(image_folder, capsys, *options)[::2] == (0, "")
    rows = list(csv.DictReader(path.open()))
    names = "run seed epoch step train_loss train_accuracy lr accuracy ema_accuracy seconds"
    assert list(rows[0]) == names.split() and len(rows) == 4
    expected = [
        {"run": number, "seed": run["seed"], **epoch}
        for number, run in enumerate(json.loads(summary.read_text())["runs"], 1)
        for epoch in run["epochs"]
    ]
    assert rows == [{name: "" if v is None else str(v) for name, v in epoch.items()} for epoch in expected]
    # the recipe's average has not begun in the first epoch
    assert rows[0]["ema_accuracy"] == "" and float(rows[1]["ema_accuracy"]) >= 0


def test_csv_is_on_file_when_an_epoch_ends_and_begins_anew_with_a_command(tmp_path):
    path = tmp_path / "x.csv"
    for _ in range(2):
        logger = loggers.Csv(path, FACTS)
        logger.on_start(1)
        logger.on_epoch(row(1, 2))
        assert len(path.read_text().splitlines()) == 2
        logger.on_end(None)
        logger.on_start(2)
        logger.on_end(None)
        assert len(path.read_text().splitlines()) == 2


def test_tensorboard_has_a_run_a_seed(tmp_path):
    logger = loggers.TensorBoard(tmp_path, FACTS)
    hook = threading.excepthook
    drive(logger)
    drive(logger, seed=4)
    assert threading.excepthook is hook
    assert sorted(p.name for p in tmp_path.iterdir()) == ["tiny-seed3", "tiny-seed4"]
    found, reader = events(tmp_path / "tiny-seed3")
    assert found["train/step_loss"] == [(1, 0.5), (2, 1.5), (3, 2.5), (4, 3.5)]
    assert found["train/loss"] == [(2, 1.5), (4, 1.5)] and found["test/accuracy"] == [(2, 0.5), (4, 0.5)]
    assert found["train/lr"] == [(2, 0.5), (4, 0.5)] and "test/ema_accuracy" not in found
    assert found["final/accuracy"] == [(4, 0.75)]
    hparams = str(reader.SummaryMetadata("_hparams_/session_start_info").plugin_data.content)
    assert "param_groups.0.lr" in hparams and "total_steps" in hparams and "tiny" in hparams


def test_tensorboard_shows_the_last_of_two_trainings_in_one_folder(tmp_path):
    drive(loggers.TensorBoard(tmp_path, FACTS))
    first = loggers.TensorBoard(tmp_path, FACTS)
    first.on_start(3)
    first.on_epoch(row(1, 2, train_loss=9.0))
    first.on_end(None)
    assert events(tmp_path / "tiny-seed3")[0]["train/loss"] == [(2, 9.0)]


class Written(loggers.Scalars):
    """Steps and the names written there, in order."""

    def on_start(self, seed):
        super().on_start(seed)
        self.steps = []

    def write(self, step, scalars):
        self.steps.append((step, scalars.get("train/step_loss", "row")))


@pytest.mark.parametrize("left", [2, 0])
def test_a_run_that_goes_on_from_a_checkpoint_is_told_whole(left):
    """With the losses before the checkpoint; also where only the evaluation is left to do."""
    logger, losses = Written(), [1.0, 2.0, 3.0, 4.0]
    guarded = loggers.Guarded("--x", logger)
    guarded.on_start(0)
    guarded.on_resume([row(1, 2), row(2, 4)][: 2 if left == 0 else 1], losses[: 4 - left])
    for done in range(5 - left, 5):
        guarded.on_step(done, torch.tensor(losses[2:]))
    if left:
        guarded.on_epoch(row(2, 4))
    guarded.on_end(RunResult(0, 0.5, 1.0, 1.0, losses))
    assert logger.steps == [(1, 1.0), (2, 2.0), (2, "row"), (3, 3.0), (4, 4.0), (4, "row")]


def test_a_resumed_training_logs_what_an_uninterrupted_one_does(image_folder, capsys, tmp_path, monkeypatch):
    class Interrupting(Listener):
        def on_epoch(self, row):
            if row.epoch == 2:
                raise KeyboardInterrupt

    arguments = ("--steps", "15", "--deterministic", "--csv")
    files = ("--tensorboard", tmp_path / "board", "--out", tmp_path / "out")
    assert trained(image_folder, capsys, *arguments, tmp_path / "a.csv", "--tensorboard", tmp_path / "whole")[0] == 0
    asked = loggers.loggers
    with monkeypatch.context() as patch:
        patch.setattr(loggers, "loggers", lambda *a: [*asked(*a), Interrupting()])
        assert trained(image_folder, capsys, *arguments, tmp_path / "b.csv", *files)[0] == 130
    # TensorBoard reads its files by the second in their names, then by a count as text, where 10 is before 9
    time.sleep(1)
    assert main(["train", "--resume", str(tmp_path / "out")]) == 0
    whole, resumed = (events(tmp_path / name / "hlb-seed0")[0] for name in ("whole", "board"))
    assert whole.keys() == resumed.keys()
    for name in set(whole) - {"seconds", "final/seconds", "final/images_per_second"}:
        assert resumed[name] == whole[name], name
    assert len(whole["train/step_loss"]) == 15 and [step for step, _ in resumed["seconds"]] == [5, 10, 15]
    rows = [[{**r, "seconds": ""} for r in csv.DictReader((tmp_path / f"{n}.csv").open())] for n in "ab"]
    assert rows[0] == rows[1] and len(rows[0]) == 3


class NoReading(torch.Tensor):
    """A tensor of losses that, as on a GPU, nobody may read during a step."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} would wait for the device")


def test_a_step_reads_nothing(tmp_path):
    losses = torch.zeros(4).as_subclass(NoReading)
    for logger in (loggers.Csv(tmp_path / "x", FACTS), loggers.TensorBoard(tmp_path, FACTS)):
        logger.on_start(0)
        for done in range(1, 5):
            logger.on_step(done, losses)
        logger.on_end(None)


@pytest.fixture
def wandb(monkeypatch):
    """A stand-in with the part of wandb's interface that is used; `runs` are those that were begun."""
    fake = types.ModuleType("wandb")
    fake.mode, fake.key, fake.runs = "online", True, []

    class Error(Exception):
        pass

    class Run:
        def __init__(self, options):
            self.options, self.logged, self.summary, self.code = options, [], {}, None

        def log(self, scalars, step):
            assert step >= (self.logged[-1][0] if self.logged else 0)
            self.logged.append((step, scalars))

        def finish(self, exit_code):
            self.code = exit_code

    def login():
        if not fake.key:
            raise Error("No API key configured. Use `wandb login` to log in.\nMore.")

    def init(**options):
        json.dumps(options)
        fake.runs.append(Run(options))
        return fake.runs[-1]

    fake.Error, fake.login, fake.init = Error, login, init
    fake.setup = lambda: types.SimpleNamespace(settings=types.SimpleNamespace(mode=fake.mode))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_wandb_has_a_run_a_seed(wandb, image_folder, capsys):
    assert trained(image_folder, capsys, "--steps", "5", "--runs", "2", "--wandb", "shapes")[::2] == (0, "")
    first, second = wandb.runs
    assert first.options["project"] == "shapes" and first.options["name"] == "hlb-seed0"
    assert first.options["config"]["recipe"]["name"] == "hlb" and second.options["config"]["seed"] == 1
    losses = [(step, scalars) for step, scalars in first.logged if "train/step_loss" in scalars]
    assert [step for step, _ in losses] == [1, 2, 3, 4, 5] and all(len(scalars) == 1 for _, scalars in losses)
    assert [step for step, scalars in first.logged if "test/accuracy" in scalars] == [5]
    assert set(first.summary) == {"final/accuracy", "final/seconds", "final/images_per_second"}
    assert (first.code, second.code) == (0, 0)


def test_wandb_knows_of_a_run_that_was_cut_off(wandb, image_folder, capsys, monkeypatch):
    class Interrupting(Listener):
        def on_epoch(self, row):
            raise KeyboardInterrupt

    asked = command.loggers.loggers
    monkeypatch.setattr(command.loggers, "loggers", lambda *a: [*asked(*a), Interrupting()])
    assert trained(image_folder, capsys, "--steps", "5", "--wandb", "shapes")[0] == 130
    assert wandb.runs[0].code == 1 and wandb.runs[0].summary == {}


def test_wandb_without_an_account_is_told_before_any_work(wandb, monkeypatch, capsys, image_folder):
    monkeypatch.setattr(command, "prepare", None)
    wandb.key = False
    code, _, err = trained(image_folder, capsys, "--wandb", "shapes")
    assert code == 2 and "--wandb: No API key configured" in err and err.count("\n") == 1
    wandb.mode = "offline"
    loggers.check(types.SimpleNamespace(csv=None, tensorboard=None, wandb="shapes"))


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_library_is_told_before_any_work(name, monkeypatch, capsys, image_folder, tmp_path):
    monkeypatch.setattr(command, "prepare", None)
    monkeypatch.setitem(sys.modules, name, None)
    code, _, err = trained(image_folder, capsys, f"--{name}", tmp_path / "x")
    assert code == 2 and err.startswith(f"blink: --{name} needs {name} (") and err.count("\n") == 1
    assert err.endswith(f"pip install {name}\n")


@pytest.mark.parametrize("name", ["csv", "tensorboard"])
def test_an_output_that_cannot_be_written_is_told_before_any_work(name, monkeypatch, capsys, image_folder, tmp_path):
    monkeypatch.setattr(command, "prepare", None)
    (tmp_path / "file").touch()
    code, _, err = trained(image_folder, capsys, f"--{name}", tmp_path / "file" / "x")
    assert code == 2 and "could not make the folder" in err and err.count("\n") == 1


def test_a_full_disk_ends_no_training(image_folder, capsys, tmp_path):
    """/dev/full takes nothing; the summary and the other logger are as ever."""
    other = tmp_path / "board"
    options = ("--steps", "9", "--runs", "2", "--csv", "/dev/full", "--tensorboard", other)
    code, out, err = trained(image_folder, capsys, *options)
    expected = "blink: --csv failed ([Errno 28] No space left on device); the training goes on without it\n"
    assert (code, err) == (0, expected)
    assert "summary" in out and len(list(other.iterdir())) == 2


def test_tensorboards_thread_that_fails_is_one_line(tmp_path, capsys, monkeypatch):
    from tensorboard.summary.writer import record_writer

    def full(self, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(record_writer.RecordWriter, "write", full)
    drive(loggers.Guarded("--tensorboard", loggers.TensorBoard(tmp_path, FACTS)))
    err = capsys.readouterr().err
    assert err == (
        "blink: --tensorboard failed ([Errno 28] No space left on device); the training goes on without it\n"
    )


@pytest.mark.parametrize("method", ["on_start", "on_step", "on_epoch", "on_end"])
def test_a_logger_that_fails_is_one_line_and_then_silent(method, capsys):
    calls = []

    def failing(name):
        def call(*arguments):
            calls.append(name)
            if name == method:
                raise ValueError("no\nreason")

        return call

    names = ("on_start", "on_step", "on_epoch", "on_end")
    logger = loggers.Guarded("--x", Listener(**{name: failing(name) for name in names}))
    drive(logger)
    drive(logger)
    assert capsys.readouterr().err == "blink: --x failed (no reason); the training goes on without it\n"
    # once, and then it is closed
    assert calls.count(method) == 1 and calls.count("on_end") == 1 and calls[-1] == "on_end"


def test_an_interruption_is_no_failure_of_a_logger():
    def interrupted(seed):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        loggers.Guarded("--x", Listener(on_start=interrupted)).on_start(0)


def test_no_logger_where_none_is_asked_for():
    options = types.SimpleNamespace(csv=None, tensorboard=None, wandb=None)
    loggers.check(options)
    assert loggers.loggers(options, FACTS) == []
    with pytest.raises(UserError, match="is a folder"):
        loggers.check(types.SimpleNamespace(csv=loggers.Path("/tmp"), tensorboard=None, wandb=None))
