"""The page of trainings: that it stands alone, tells what the files tell and believes no name; what it does without."""

import json
import os
import re
import shutil
import sys
from html.parser import HTMLParser
from itertools import pairwise

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from blink.__main__ import main
from blink.inference.classifier import load
from blink.reporting import curves, page, pictures, trainings
from blink.training import gallery
from tests.kept import CLASSES, keep, own_cache, tree

VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """What a browser would make of it: tags with attributes, text by the tag that it stands in; all that is opened is
    closed.
    """

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tags, self.texts = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if data.strip():
            self.texts.append((self.open[-1] if self.open else None, " ".join(data.split())))

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]

    def text_in(self, *tags):
        return [text for tag, text in self.texts if tag in tags]

    @property
    def words(self):
        return " ".join(text for tag, text in self.texts if tag != "style")


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A folder with two trainings: one/ and two/."""
    folder = tmp_path_factory.mktemp("kept")
    with own_cache(folder / "cache"):
        data = tree(folder / "pictures")
        keep(data, folder / "one")
        keep(data, folder / "two", "--stem", "none", "--seed", "5")
    return folder


@pytest.fixture
def report(tmp_path, capsys):
    """(exit code, page or None, stdout, stderr) of `blink report` with these inputs."""
    capsys.readouterr()

    def make(*inputs):
        out = tmp_path / "report.html"
        code = main(["report", *map(str, inputs), "-o", str(out)])
        captured = capsys.readouterr()
        return code, Page(out.read_text()) if out.exists() else None, captured.out, captured.err

    return make


def test_a_page_of_one_training(kept, report):
    code, found, out, err = report(kept / "one")
    assert (code, err) == (0, "") and out.startswith("wrote ") and out.count("\n") == 1
    content = json.loads((kept / "one" / "summary.json").read_text())
    accuracy = content["summary"]["accuracy"]
    assert f"{100 * accuracy['mean']:.2f} ± {100 * accuracy['ci95']:.2f} %" in found.words
    for part in (
        content["data"]["fingerprint"],
        content["environment"]["device"],
        content["environment"]["torch"],
        content["started"][:10],
        "9 steps of 8 images",
        "blink train --data",
        "network.conv_groups.2.channels",
        "start-up: data",
        "hlb on pictures",
    ):
        assert part in found.words, part
    for run in content["runs"]:
        assert f"{100 * run['accuracy']:.2f}" in found.text_in("td")
    headings = ["Curves", "Seconds", "hlb", "Runs", "confused", "mistakes", "layer", "Augmented", "made", "card"]
    shown = " ".join(found.text_in("h2", "h3"))
    assert all(heading in shown for heading in headings)
    # the whitening filters, four test images and what the stem makes of each, all mistakes, the augmented images
    first = gallery.read(kept / "one" / "hlb-seed0.gallery.safetensors")
    assert len(found.all("img")) == 12 + 2 * 4 + len(first.mistakes) + 12 + len(first.views)


def test_it_stands_alone_and_runs_nothing(kept, report):
    _, found, *_ = report(kept / "one", kept / "two")
    names = {tag for tag, _ in found.tags}
    assert not names & {"script", "link", "iframe", "object", "embed", "base", "form"}
    for tag, attributes in found.tags:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("href", "src", "xlink:href", "action", "data", "poster"):
                assert value.startswith(("#", "data:image/png;base64,")), (tag, value)
            assert "http" not in (value or ""), (tag, name, value)
            assert "url(" not in (value or "") or "url(#" in value
    styles = " ".join(found.text_in("style"))
    assert "@import" not in styles and "url(" not in styles and "prefers-color-scheme: dark" in styles
    policy = next(a["content"] for a in found.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def test_it_can_be_heard(kept, report):
    """Every picture has words, every table its heads, every reference its target, headings leave no level out."""
    _, found, *_ = report(kept / "one", kept / "two")
    ids = [attributes["id"] for _, attributes in found.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for tag, attributes in found.tags:
        for name in ("aria-labelledby", "href", "xlink:href"):
            if name in attributes:
                assert attributes[name].removeprefix("#") in ids, (tag, attributes)
        for target in re.findall(r"url\(#([^)]*)\)", " ".join(v or "" for v in attributes.values())):
            assert target in ids
    assert all(image["alt"].strip() for image in found.all("img"))
    assert all(svg["role"] == "img" and svg["aria-labelledby"] in ids for svg in found.all("svg"))
    assert all(head["scope"] in ("row", "col") for head in found.all("th"))
    levels = [int(tag[1]) for tag, _ in found.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(b <= a + 1 for a, b in pairwise(levels))
    assert found.all("html") == [{"lang": "en"}]


def test_no_name_is_believed(kept, report):
    """The parser sees classes' names as text and attributes, in the matrix, below the mistakes and in the card."""
    _, found, *_ = report(kept / "one")
    # the last is no text
    names = {name.replace("\udce9", "?") for name in CLASSES}
    assert names <= set(found.text_in("th"))
    assert any(CLASSES[0] in image["alt"] for image in found.all("img"))
    assert any(CLASSES[0] in text for text in found.text_in("pre"))


def test_several_trainings_are_drawn_over_each_other(kept, report):
    code, found, *_ = report(kept / "one", kept / "two", kept / "one")
    # of one recipe, so that the folders tell them apart; the same one is there once
    assert code == 0 and found.text_in("h1") == ["one, two on pictures"]
    assert [text for text in found.text_in("h2") if text in ("one", "two")] == ["one", "two"]
    drawn = [attributes.get("style", "") for _, attributes in found.tags]
    assert any("var(--s0)" in style for style in drawn) and any("var(--s1)" in style for style in drawn)
    assert not any("var(--s2)" in style for style in drawn)
    assert {"●", "■"} <= set(found.text_in("span"))
    assert "trained filters of the first convolution" in found.words and "whitening filters" in found.words
    assert "their accuracies do not compare" not in found.words


def test_other_data_is_said(kept, report, tmp_path):
    content = json.loads((kept / "two" / "summary.json").read_text())
    content["data"] |= {"fingerprint": "0123456789ab", "generated": True}
    (tmp_path / "other.json").write_text(json.dumps(content))
    _, found, *_ = report(kept / "one", tmp_path / "other.json")
    assert "their accuracies do not compare" in found.words and "Generated images, not CIFAR-10" in found.words


def test_a_file_alone_is_a_page_without_what_lies_beside_it(kept, report, tmp_path):
    shutil.copy(kept / "one" / "summary.json", tmp_path / "alone.json")
    code, found, out, err = report(tmp_path / "alone.json")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert len(lines) == 3 and "no gallery" in lines[0] and "no network file" in lines[1]
    assert "No gallery: " in found.words and "No network file: " in found.words and found.all("img") == []
    assert "Curves" in found.words and "confused" not in " ".join(found.text_in("h3"))


def test_a_run_without_its_gallery_is_said(kept, report, tmp_path):
    shutil.copytree(kept / "one", tmp_path / "one")
    (tmp_path / "one" / "hlb-seed0.gallery.safetensors").unlink()
    code, found, out, err = report(tmp_path / "one")
    assert (code, err) == (0, "") and "no gallery of 1 of 2 runs" in out
    assert "the run with seed 1" in found.words and "Test images of 1 run." in found.words


def test_of_the_best_weights_the_files_are_of_the_training(kept, report, tmp_path):
    """--keep best: the network's accuracy is another than the run's."""
    shutil.copytree(kept / "one", tmp_path / "one")
    path = tmp_path / "one" / "summary.json"
    content = json.loads(path.read_text())
    run = content["runs"][0]
    run["kept"], run["balanced_accuracy"] = {"epoch": 1, "accuracy": run["accuracy"]}, 0.875
    run["accuracy"] -= 0.01
    found = gallery.read(tmp_path / "one" / "hlb-seed0.gallery.safetensors")
    about = {"format": 1, "recipe": "hlb", "seed": 0, "accuracy": run["accuracy"]}
    about |= {"fingerprint": found.fingerprint, "classes": found.classes}
    tensors = {name: getattr(found, name) for name in gallery._TENSORS}
    save_file(tensors, tmp_path / "one" / "hlb-seed0.gallery.safetensors", {"blink_gallery": json.dumps(about)})
    path.write_text(json.dumps(content))
    code, page, _, err = report(tmp_path / "one")
    assert (code, err) == (0, "")
    assert f"{100 * run['kept']['accuracy']:.2f}, of epoch 1" in page.text_in("td") and "the last" in page.text_in("td")
    assert "87.50" in page.text_in("td") and "by the weights kept" in page.words


def cut(path):
    path.write_bytes(path.read_bytes()[:-50])


def foreign(path):
    save_file({"x": torch.zeros(2)}, path)


@pytest.mark.parametrize("change", [cut, foreign])
@pytest.mark.parametrize("kind", ["gallery.safetensors", "safetensors"])
def test_a_damaged_file_is_one_line_and_the_page_is_made_without_it(kept, report, tmp_path, kind, change):
    shutil.copytree(kept / "one", tmp_path / "one")
    for seed in (0, 1):
        change(tmp_path / "one" / f"hlb-seed{seed}.{kind}")
    code, found, _, err = report(tmp_path / "one")
    lines = err.splitlines()
    assert code == 2 and len(lines) == 2 and all(line.startswith("blink: ") for line in lines)
    assert f"hlb-seed0.{kind}" in lines[0] and "is no " in lines[0]
    shown = " ".join(found.text_in("h3"))
    assert ("confused" in shown) == (kind == "safetensors") and "Runs" in shown
    assert ("first layer" in shown) == (kind != "safetensors")


def test_files_of_another_training_are_left_out(kept, report, tmp_path):
    shutil.copytree(kept / "one", tmp_path / "one")
    content = json.loads((tmp_path / "one" / "summary.json").read_text())
    for run in content["runs"]:
        run["accuracy"] += 0.001
    (tmp_path / "one" / "summary.json").write_text(json.dumps(content))
    code, found, _, err = report(tmp_path / "one")
    assert code == 2 and err.count("is of another training than") == 4 == len(err.splitlines())
    assert found.all("img") == []


def test_a_network_that_cannot_be_used_is_one_line(kept, report, tmp_path):
    """Its description fits, its weights do not."""
    shutil.copytree(kept / "one", tmp_path / "one")
    path = tmp_path / "one" / "hlb-seed0.safetensors"
    facts, state = trainings.saved.read(path)
    state["head.weight"] = torch.zeros(1, 1)
    save_file(state, path, {"blink": json.dumps(facts)})
    code, found, _, err = report(tmp_path / "one")
    assert code == 2 and "cannot be used here" in err and err.count("\n") == 1
    assert "Model card" not in found.words and "confused" in " ".join(found.text_in("h3"))


def changed(**changes):
    def change(content):
        for name, value in changes.items():
            content[name] = value

    return change


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder, content: None, "there is no"),
        (lambda folder, content: (folder / "x.json").mkdir(), "holds no summary.json"),
        (lambda folder, content: (folder / "x.json").write_text("{"), "is no summary of blink train"),
        (lambda folder, content: (folder / "x.json").write_text('{"a": 1}\n{"a": 2}\n'), "it holds JSON lines"),
        (lambda folder, content: (folder / "x.json").write_text("[1]"), "no JSON object"),
        (lambda folder, content: (folder / "x.json").write_text("{}"), "without 'runs'"),
        (lambda folder, content: (folder / "x.json").write_bytes(b"\xff\xfe"), "it is no text"),
        (lambda folder, content: (folder / "x.json").write_text("[" * 100_000), "is no summary of blink train"),
        (changed(runs=[]), "no run of it has ended"),
        (changed(until={}), "it is of blink until"),
        (changed(data={"name": "x"}), "without 'fingerprint'"),
        (changed(runs=[{"seed": 0}]), "without 'accuracy'"),
        (changed(runs=[3]), "is no summary of blink train"),
        (changed(start_up={"data": float("nan")}), "nan where a number is expected"),
        (changed(recipe={"name": "../../x"}), "'../../x' is no recipe's name"),
        (changed(environment=None), "is no summary of blink train"),
        (changed(started=3), "is no summary of blink train"),
    ],
)
def test_what_is_no_training_is_one_line(kept, report, tmp_path, make, message):
    content = json.loads((kept / "one" / "summary.json").read_text())
    if make.__name__ == "change":
        make(content)
        (tmp_path / "x.json").write_text(json.dumps(content))
    else:
        make(tmp_path, content)
    code, found, out, err = report(tmp_path / "x.json")
    assert (code, found, out) == (2, None, "")
    assert err.startswith("blink: ") and err.count("\n") == 1 and message in err
    assert "expected a folder of blink train --out, or a file of its --json" in err


def test_a_network_is_no_training(kept, report):
    code, _, _, err = report(kept / "one" / "hlb-seed0.safetensors")
    assert code == 2 and "it is no text" in err and err.count("\n") == 1


@pytest.mark.parametrize("library", ["jinja2", "matplotlib"])
def test_a_missing_library_is_one_line(kept, report, monkeypatch, library):
    monkeypatch.setitem(sys.modules, library, None)
    code, found, _, err = report(kept / "one")
    assert (code, found) == (2, None) and err.endswith(f"pip install {library}\n") and err.count("\n") == 1


def test_a_page_that_cannot_be_written_is_one_line(kept, capsys, tmp_path):
    assert main(["report", str(kept / "one"), "-o", str(tmp_path)]) == 2
    assert "is a folder; name a file" in capsys.readouterr().err
    assert main(["report", str(kept / "one"), "-o", "/dev/full"]) == 2
    assert "No space left on device" in capsys.readouterr().err


def test_a_summary_of_an_older_version_is_read_with_its_files_time(kept, tmp_path):
    content = json.loads((kept / "one" / "summary.json").read_text())
    for name in ("started", "peak_bytes", "start_up", "graph"):
        del content[name]
    (tmp_path / "x.json").write_text(json.dumps(content))
    os.utime(tmp_path / "x.json", (0, 86400))
    assert trainings.read(tmp_path / "x.json").started == "file of 1970-01-02 00:00 UTC"


def test_a_curve_over_runs_by_hand():
    found = curves.over_runs([[(1.0, 1.0), (2.0, 5.0)], [(1.0, 3.0), (2.0, None)]])
    assert found.x == [1.0, 2.0] and found.mean == [2.0, 5.0]
    # the 0.975 quantile of Student's t with 1 degree of freedom, times std / sqrt(n) = 1
    assert found.half == [pytest.approx(12.7062, abs=1e-4), None]


def small_gallery(confusion: torch.Tensor) -> gallery.Gallery:
    none, classes = torch.zeros(0, 4, 4, 3).byte(), len(confusion)
    labels = torch.zeros(0).long()
    names = tuple(f"class {i}" for i in range(classes))
    return gallery.Gallery(
        "x", 0, 0.5, "f", names, confusion.int(), none, labels, labels, torch.zeros(0), none, labels, none, labels, {}
    )


def test_the_matrix_of_all_runs():
    one, two = torch.tensor([[8, 2], [1, 3]]), torch.tensor([[9, 1], [0, 4]])
    found = page.confused([small_gallery(one), small_gallery(two)])
    assert [[cell["text"] for cell in row["cells"]] for row in found["matrix"]] == [["85.0", "15.0"], ["12.5", "87.5"]]
    assert [cell["right"] for cell in found["matrix"][1]["cells"]] == [False, True]
    assert found["balanced"] == "86.25" and found["runs"] == 2


def test_many_classes_are_pairs_and_the_worst():
    counts = 10 * torch.eye(40)
    counts[3, 7], counts[3, 3], counts[20, 0] = 6, 2, 4
    # a class without test images
    counts[39] = 0
    found = page.confused([small_gallery(counts)])
    assert found["matrix"] is None
    assert [(p["true"], p["taken_for"], p["count"]) for p in found["pairs"]] == [
        ("class 3", "class 7", "6"), ("class 20", "class 0", "4"),
    ]  # fmt: skip
    assert found["pairs"][0]["share"] == "75.0"
    assert [(row["name"], row["accuracy"]) for row in found["worst"][:2]] == [("class 3", "25.0"), ("class 20", "71.4")]
    assert "class 39" not in [row["name"] for row in found["worst"]]


def test_tiles_stand_apart():
    tiles = np.arange(9, dtype=np.uint8)[:, None, None] * np.ones((1, 2, 3), np.uint8)
    sheet = pictures.sheet(tiles)
    assert sheet.shape == (2 * 3 - 1, 8 * 4 - 1, 4)
    assert (sheet[:2, 4:7, :3] == 1).all() and (sheet[3:, :3, :3] == 8).all() and (sheet[:2, :3, 3] == 255).all()
    assert (sheet[:, 3] == 0).all() and (sheet[2] == 0).all() and (sheet[3:, 4:] == 0).all()


def test_filters_and_features_are_the_networks(kept):
    classifier = load(kept / "one" / "hlb-seed0.safetensors", "cpu", "reference")
    what, filters = pictures.filters(classifier)
    weight = classifier.network.stem.whiten.weight
    assert what == "whitening filters" and filters.shape == (12, 2, 2, 3)
    largest = weight.abs().amax((1, 2, 3), keepdim=True)
    expected = (127.5 + 127.5 * weight / largest).permute(0, 2, 3, 1).numpy()
    assert np.abs(filters - expected).max() <= 0.5
    found = gallery.read(kept / "one" / "hlb-seed0.gallery.safetensors")
    maps = pictures.features(classifier, found.test)
    stem = classifier.network.stem(found.test.permute(0, 3, 1, 2), None, torch.float32)
    assert maps.shape == tuple(stem.shape) == (4, 32, 11, 11)
    for channel in (0, 31):
        values = stem[:, channel]
        low, high = values.min(), torch.tensor(np.quantile(values.numpy(), 0.99))
        expected = (255 * (values - low) / (high - low)).clamp(0, 255)
        assert np.abs(maps[:, channel] - expected.numpy()).max() <= 1
    with pytest.raises(ValueError, match="for a network that takes"):
        pictures.features(classifier, found.test[:, :10])


def test_of_a_filter_and_its_negative_one_is_shown(kept, tmp_path):
    with own_cache(kept / "cache"):
        keep(kept / "pictures", tmp_path / "air", "--set", "network.stem_channels=None")
    what, filters = pictures.filters(load(tmp_path / "air" / "hlb-seed0.safetensors", "cpu", "reference"))
    assert "the negative of each" in what and filters.shape == (12, 2, 2, 3)
