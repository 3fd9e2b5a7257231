"""The race: peers are recognized, fed, launched with their run count changed, read, and compared block by block.

The scripts here are stand-ins that print what the published ones print; none of theirs is in this project.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from blink.__main__ import main as blink
from blink.errors import UserError
from blink.experiments import records
from blink.experiments.race import command as race
from blink.experiments.race import data, table
from blink.experiments.race.contest import visible
from blink.experiments.race.launch import lent_to
from blink.experiments.race.peers import PEERS, Rows, find_script, with_runs, without_warm_up
from blink.training.data.dataset import assemble
from tests.small import small_dataset

ROOT = Path(race.__file__).resolve().parent.parent.parent

AIRBENCH = """
import sys
with open(sys.argv[0]) as f:
    code = f.read()
import torch

def zeropower_via_newtonschulz5(G):
    return G

@torch.compile(fullgraph=True)
def work(images):
    return (images / 255).float().mean()

columns = ["run   ", "epoch", "train_acc", "val_acc", "tta_val_acc", "time_seconds"]

def main(run):
    data = torch.load("cifar10/train.pt", map_location=torch.device("cuda"))
    images, labels = data["images"].half().cuda(), data["labels"]
    assert images.shape[1:] == (12, 12, 3) and len(data["classes"]) == 10
    torch.empty(3, dtype=torch.half, device="cuda").fill_(1)
    starter, ender = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    seconds = 0.0
    for epoch in range(3):
        starter.record()
        work(images)
        ender.record()
        torch.cuda.synchronize()
        seconds += 1e-3 * starter.elapsed_time(ender)
        print("|  %s  |  %d  |  0.5000  |  0.4000  |    |  %.4f  |" % (run if epoch == 0 else "", epoch, seconds))
    print("|    |  eval  |  0.5000  |  0.4000  |  %s  |  %.9f  |" % (ACCURACY, seconds))
    print("-" * 20)

ACCURACY = "0.6000"
if __name__ == "__main__":
    model = torch.nn.Linear(2, 2).cuda().half()
    assert model.weight.dtype == torch.bfloat16
    print("-" * 20)
    print("|  " + "  |  ".join(columns) + "  |")
    print("-" * 20)
    main("warmup")
    for run in range(200):
        main(run)
    END
"""
PEER = PEERS["airbench94_muon"]


def script(folder, ending="pass", accuracy="0.6000", text=AIRBENCH):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "airbench94_muon.py"
    path.write_text(text.replace("END", ending).replace('"0.6000"', f'"{accuracy}"'))
    return path


def test_only_the_number_of_runs_is_changed(tmp_path):
    path = script(tmp_path)
    text = path.read_text()
    changed = with_runs(PEER, text, 7, path)
    assert changed == text.replace("range(200)", "range(7)") and "range(3)" in changed
    hlb = PEERS["hlb-v0.3.0"]
    assert "range(8)" in with_runs(hlb, 'if __name__ == "__main__":\n    for run_num in range(25):\n', 7, path)


def test_a_warm_up_is_left_out(tmp_path):
    text = script(tmp_path).read_text()
    for call in ('main("warmup")', 'main("warmup", model)'):
        with_call = text.replace('main("warmup")', call)
        assert without_warm_up(with_call, tmp_path) == text.replace('    main("warmup")\n', "")
    for other in (text.replace("warmup", "rehearsal"), text + '    main("warmup")\n'):
        with pytest.raises(UserError, match="no single call of main for a warm-up"):
            without_warm_up(other, tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace("tta_val_acc", "accuracy"), "is not airbench94_muon as it was published"),
        (lambda text: "_zeropower_via_newtonschulz5 =" + text, "is not airbench94_muon as it was published"),
        (lambda text: text.replace("range(200)", "range(count)"), "no single loop over its runs"),
    ],
)
def test_a_checkout_that_is_not_the_peer_is_refused(tmp_path, change, message):
    path = script(tmp_path, text=change(AIRBENCH))
    with pytest.raises(UserError, match=message):
        find_script(PEER, tmp_path)
    with pytest.raises(UserError, match="holds no readable"):
        find_script(PEER, tmp_path / "nowhere")
    assert path.is_file()


def test_rows_are_read_as_the_peers_print_them():
    rows = Rows(PEERS["hiverge"])
    lines = ["-----", "|  run     |  epoch  |  tta_val_acc  |  time_seconds  |", "-----"]
    lines += ["|  warmup  |   eval  |       0.1000  |        9.0000  |", "-----", "compiling"]
    lines += ["|       1  |   eval  |       0.9401  |        2.0150  |", "-----"]
    lines += ["Mean accuracy after 1 runs: 0.9 | Mean time: 2.0s\r|  2  |  eval  |  0.9402  |  2.0100  |", "-----", ""]
    assert [r for line in lines for r in rows.read(line)] == [(0.1, 9.0), (0.9401, 2.015), (0.9402, 2.01)]
    # hlb prints every epoch, and the average's accuracy only where there is one
    rows = Rows(PEERS["hlb-v0.3.0"])
    lines = ["---", "|  epoch  |  ema_val_acc  |  total_time_seconds  |", "---"]
    lines += ["|  0  |    |  1.0  |", "|  1  |  0.9400  |  2.0  |", "---"]
    assert [r for line in lines for r in rows.read(line)] == [(0.94, 2.0)]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["|  epoch  |  accuracy  |"], "reports epoch, accuracy; expected time_seconds and tta_val_acc"),
        (["|  tta_val_acc  |  time_seconds  |", "|  none  |  1.0  |", "---"], "holds no results"),
    ],
)
def test_an_unknown_report_is_refused(lines, message):
    rows = Rows(PEER)
    with pytest.raises(UserError, match=message):
        [r for line in lines for r in rows.read(line)]


@pytest.fixture(scope="module")
def dataset():
    return small_dataset(40, 20, side=12)


def test_data_files_hold_our_images_in_our_order(tmp_path, dataset):
    cpu = torch.device("cpu")
    for kind in ("airbench", "hlb-integer", "hlb-one-hot"):
        data.write(kind, dataset, tmp_path / kind, cpu)
    for half, images, labels in (
        ("train", dataset.train_images, dataset.train_labels),
        ("test", dataset.test_images, dataset.test_labels),
    ):
        own = torch.load(tmp_path / "airbench" / "cifar10" / f"{half}.pt", weights_only=True)
        assert torch.equal(own["images"], images) and torch.equal(own["labels"], labels)
        assert own["classes"] == list(dataset.classes)
        pixels = images.permute(0, 3, 1, 2).double() / 255
        train = dataset.train_images.permute(0, 3, 1, 2).double() / 255
        published = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
        for kind, mean, std in (
            ("hlb-integer", *(torch.tensor(v, dtype=torch.float64) for v in published)),
            ("hlb-one-hot", train.mean((0, 2, 3)), train.std((0, 2, 3))),
        ):
            content = torch.load(tmp_path / kind / "data.pt", weights_only=True)["eval" if half == "test" else half]
            want = (pixels - mean[:, None, None]) / std[:, None, None]
            assert content["images"].dtype == torch.float16 and (content["images"] - want).abs().max() < 2e-3
            if kind == "hlb-integer":
                assert torch.equal(content["targets"], labels)
            else:
                assert content["targets"].dtype == torch.float16 and torch.equal(content["targets"].argmax(1), labels)


def test_the_first_images_hold_every_class():
    """Peers whiten by their first 960 or 5,000 images, so the order must mix the classes, as ours does."""
    labels = torch.arange(10).repeat_interleave(5000).numpy()
    images = labels[:, None, None, None].repeat(3, 3).astype("uint8")
    made = assemble("ordered", tuple("abcdefghij"), images, labels, images[:100], labels[:100])
    for count in (960, 5000):
        counts = made.train_labels[:count].bincount(minlength=10)
        assert counts.min() > 0.7 * count / 10


def launch(folder, path, runs, out):
    command = [
        sys.executable,
        "-m",
        "blink.experiments.race.launch",
        "airbench94_muon",
        str(path),
        str(runs),
        str(out),
        "cpu",
    ]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)


def test_a_script_is_launched_on_the_cpu_with_our_clock_beside_its_own(tmp_path, dataset):
    path, out, folder = script(tmp_path / "checkout"), tmp_path / "out.jsonl", tmp_path / "scratch"
    data.write("airbench", dataset, folder, torch.device("cpu"))
    before = path.read_text()
    done = launch(folder, path, 2, out)
    assert done.returncode == 0, done.stderr
    *runs, last = records.read(out)
    assert [run["accuracy"] for run in runs] == [0.6, 0.6] and last["peak_bytes"] is None
    # where nothing is compiled there is no run that nobody counts
    assert done.stdout.count("eval") == 2 and "warmup" not in done.stdout
    for run in runs:
        # the stand-in's event is our clock here, so that both measured the same
        assert run["seconds"] == pytest.approx(run["our_seconds"], rel=1e-3) and run["seconds"] > 0
    assert path.read_text() == before


def test_only_the_script_finds_the_timed_event(tmp_path, dataset):
    """Not what it imports, nor what autotunes beside it: that would be counted as its own seconds."""
    head = """
import tuner, torch._dynamo.device_interface, torch._dynamo.variables.user_defined as dynamo
OWN = torch.cuda.streams.Event
assert torch.cuda.Event is not OWN and getattr(torch.cuda, "Event") is torch.cuda.Event
assert tuner.made() is tuner.Event is torch._dynamo.device_interface.CudaInterface.Event is OWN
assert OWN in dynamo.UserDefinedClassVariable._in_graph_classes()
def looked_up():
    from torch.cuda import Event
    return Event
assert looked_up() is torch.cuda.Event
"""
    path, out, folder = script(tmp_path / "checkout"), tmp_path / "out.jsonl", tmp_path / "scratch"
    path.write_text(path.read_text().replace("import torch\n", "import torch\n" + head, 1))
    (path.parent / "tuner.py").write_text(
        "import torch\nfrom torch.cuda import Event\ndef made():\n    return torch.cuda.Event\n"
    )
    data.write("airbench", dataset, folder, torch.device("cpu"))
    done = launch(folder, path, 1, out)
    assert done.returncode == 0, done.stderr
    assert [run["accuracy"] for run in records.read(out)[:-1]] == [0.6]


class Lent:
    pass


def test_a_lent_event_is_taken_back():
    own = torch.cuda.Event
    with pytest.raises(ZeroDivisionError), lent_to(globals(), Lent):
        assert torch.cuda.Event is Lent
        assert torch._dynamo.device_interface.CudaInterface.Event is own
        # compiled code that asks torch.cuda is traced as ever
        compiled = torch.compile(lambda x: x - 1 if torch.cuda.is_available() else x, backend="eager", fullgraph=True)
        assert compiled(torch.ones(2)).tolist() == ([0, 0] if torch.cuda.is_available() else [1, 1])
        _ = 1 / 0
    assert torch.cuda.Event is own


@pytest.fixture
def arena(tmp_path, image_folder, monkeypatch):
    """Races on the test's images in a folder of its own: (exit code, the records)."""
    monkeypatch.chdir(tmp_path)
    own_options = race.own_options
    quick = ("--steps", "2", "--batch-size", "10", "--dtype", "fp32")
    monkeypatch.setattr(race, "own_options", lambda options: own_options(options) + quick)

    def call(*peers, runs=2, blocks=2, options=()):
        own = ["--data", str(image_folder), "--recipe", "air", "--kernels", "reference", "--device", "cpu"]
        own += ["--runs", str(runs), "--blocks", str(blocks), "--no-cold", *options]
        return blink(["race", *peers, *own]), records.read(tmp_path / "runs" / "race" / "race.jsonl")

    return call


def test_blocks_alternate_and_a_crash_keeps_what_others_did(arena, tmp_path, capsys):
    script(tmp_path / "good", ending="raise AttributeError('after its last run')")
    code, found = arena(f"airbench94_muon={tmp_path / 'good'}", blocks=2)
    assert code == 0
    assert [(r["contestant"], r["block"]) for r in found] == [
        ("blink", 0), ("airbench94_muon", 0), ("airbench94_muon", 1), ("blink", 1),
    ]  # fmt: skip
    assert all(len(r["runs"]) == 2 and r["process_seconds"] > 0 and r["error"] is None for r in found)
    assert [r["seed"] for r in found] == [0, None, None, 2]
    assert all(r["command"][:2] == ["blink", "race"] and "--no-cold" in r["command"] for r in found)
    out = capsys.readouterr().out
    assert "airbench94_muon on a CPU: CUDA turned to the CPU" in out and "60.00 +-0.00" in out

    # the same file again: the next blocks, one of a script that dies in its second counted run
    script(
        tmp_path / "good",
        text=AIRBENCH.replace("        main(run)", "        main(run) if run == 0 else sys.exit('boom')"),
    )
    code, found = arena(f"airbench94_muon={tmp_path / 'good'}", blocks=1)
    assert code == 2 and [r["block"] for r in found[4:]] == [2, 2]
    assert [len(r["runs"]) for r in found[4:]] == [2, 1]
    err = capsys.readouterr().err
    assert "airbench94_muon ended with exit code 1 after 1 of 2 runs: boom" in err and err.count("\n") == 1


def test_unknown_reports_and_missing_gpus_are_one_line_each(arena, tmp_path, capsys):
    script(tmp_path / "odd", text=AIRBENCH.replace('"time_seconds"', '"minutes"'))
    hlb = tmp_path / "hlb"
    hlb.mkdir()
    loop = "if __name__ == '__main__':\n    for run_num in range(25): 1\n"
    (hlb / "main.py").write_text("'data.pt', 'ema_val_acc'\n" + loop)
    code, found = arena(f"airbench94_muon={tmp_path / 'odd'}", f"hlb-v0.3.0={hlb}", runs=1, blocks=1)
    assert code == 2 and [len(r["runs"]) for r in found] == [1, 0]
    left_out, unknown = capsys.readouterr().err.splitlines()
    assert "hlb-v0.3.0 needs a GPU" in left_out and "expected time_seconds" in unknown
    (tmp_path / "runs" / "race" / "race.jsonl").unlink()
    # alone against nobody is no race
    code, found = arena(f"hlb-v0.3.0={hlb}", runs=1, blocks=1)
    assert code == 2 and not found and "no peer is left to race" in capsys.readouterr().err


def test_a_script_finds_the_chosen_gpu_alone(monkeypatch):
    """As the first of those that it sees, whatever the caller itself sees."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert visible(torch.device("cpu")) == visible(torch.device("cuda")) == {}
    assert visible(torch.device("cuda:1")) == {"CUDA_VISIBLE_DEVICES": "1"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-5e2d,6")
    assert visible(torch.device("cuda:1")) == {"CUDA_VISIBLE_DEVICES": "GPU-5e2d"}


@pytest.mark.parametrize(
    ("peer", "message"),
    [("airbench94_muon", "is no peer; expected NAME=CHECKOUT"), ("resnet=x", "is no peer"),
     ("hiverge=nowhere", "holds no readable cifar10_speedrun.py")],
)  # fmt: skip
def test_mistakes_are_one_line(arena, capsys, peer, message):
    code, found = arena(peer)
    err = capsys.readouterr().err
    assert code == 2 and message in err and err.count("\n") == 1 and not found


def block(name, number, seconds, accuracy=0.94, kind="block", **changes):
    runs = [{"accuracy": accuracy, "seconds": s, "our_seconds": s + 0.1} for s in seconds]
    shared = {"data": "d f", "device": "gpu", "threads": 1, "power_limit": "700 W", "torch": "2", "triton": "3"}
    shared |= {"dtype": "fp16", "kernels": "fused"}
    own = {"contestant": name, "block": number, "kind": kind, "runs": runs, "process_seconds": 60.0, "error": None}
    rest = {"peak_bytes": 2e9, "pflop": 0.2, "images": 1000, "note": None, "environment": {"device_type": "cuda"}}
    return own | rest | {"shared": shared} | changes


def test_ratios_are_of_blocks_that_ran_side_by_side():
    found = [block("blink", 0, [1.0, 1.2]), block("peer", 0, [2.0, 2.2]), block("blink", 1, [1.1, 1.1])]
    found += [block("peer", 1, [3.3, 3.3]), block("peer", 2, [9.0]), block("peer", 0, [2.0], kind="cold")]
    ours, peer = table.rows(found)
    assert ours.name == "blink" and ours.ratio is None and ours.cold is None
    assert peer.accuracy["n"] == 5 and peer.cold == 60.0 and peer.again is None
    assert peer.ratio["n"] == 2 and peer.ratio["mean"] == pytest.approx((2.2 / 1.2 + 3.4 / 1.2) / 2)
    lines = table.text(found)
    assert all(len(line) <= 80 for line in lines[1:]) and "gpu, 700 W" in lines[0]
    assert json.loads(json.dumps(found)) == found
