"""The curves as a picture: what is drawn, where it goes, and what is refused."""

import json

import pytest
from PIL import Image

from blink.__main__ import main
from blink.reporting import curves, trainings
from tests.kept import keep, own_cache, tree


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plot")
    with own_cache(folder / "cache"):
        keep(tree(folder / "pictures"), folder / "one")
    return folder


@pytest.fixture
def two(kept, tmp_path):
    """A second training of another accuracy, with a name that is no formula."""
    content = json.loads((kept / "one" / "summary.json").read_text())
    content["recipe"]["name"] = r"a $\frac{ \udce9 漢"
    for run in content["runs"]:
        run["accuracy"] += 0.25
    (tmp_path / "two.json").write_text(json.dumps(content))
    return tmp_path / "two.json"


def test_a_picture_in_this_folder(kept, two, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    assert main(["plot", str(kept / "one"), str(two)]) == 0
    assert capsys.readouterr() == ("wrote plot.png\n", "")
    with Image.open(tmp_path / "plot.png") as image:
        assert image.format == "PNG" and image.width > 2 * image.height > 400
        # the two colours of the palette, and white paper
        colours = {colour for _, colour in image.convert("RGB").getcolors(10**6)}
    assert {(0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00), (255, 255, 255)} <= colours


@pytest.mark.parametrize(("name", "magic"), [("x.svg", b"<?xml"), ("x.PDF", b"%PDF"), ("new/x.png", b"\x89PNG")])
def test_other_forms(kept, tmp_path, name, magic):
    assert main(["plot", str(kept / "one"), "-o", str(tmp_path / name)]) == 0
    assert (tmp_path / name).read_bytes().startswith(magic)


def test_what_is_drawn(kept, two):
    """Each panel's points are those of the summaries, the star is the final accuracy."""
    from matplotlib.figure import Figure

    found = trainings.read_all([kept / "one", two])
    axes = Figure().subplots()
    curves.draw(axes, curves.PANELS[1], found, "black", "grey", curves.COLOURS)
    content = json.loads((kept / "one" / "summary.json").read_text())
    rows = [run["epochs"] for run in content["runs"]]
    mean = [100 * sum(row["accuracy"] for row in epoch) / 2 for epoch in zip(*rows)]
    # the last epoch of 9 steps is cut short
    steps = content["budget"]["steps_per_epoch"]
    x = [row["step"] / steps for row in rows[0]]
    lines = [line for line in axes.lines if line.get_linestyle() == "-"]
    assert lines[0].get_xdata().tolist() == x and lines[0].get_ydata() == pytest.approx(mean)
    stars = [line for line in axes.lines if line.get_marker() == "*"]
    final = 100 * content["summary"]["accuracy"]["mean"]
    assert [float(star.get_ydata()[0]) for star in stars] == pytest.approx([final, final + 25])
    assert float(stars[0].get_xdata()[0]) == 9 / steps
    # of the weight average, where it has begun
    dashed = [line for line in axes.lines if line.get_linestyle() == "--"]
    averaged = [row["ema_accuracy"] is not None for row in rows[0]]
    assert len(dashed) == 2 and len(dashed[0].get_xdata()) == sum(averaged)


def test_what_cannot_be_drawn_is_one_line(kept, tmp_path, capsys):
    capsys.readouterr()
    for arguments, message in (
        ([kept / "one", "-o", tmp_path / "x.bmp"], "ends in .png, .svg, .pdf"),
        ([tmp_path / "nothing"], "there is no"),
        ([kept / "one", "-o", "/proc/x.png"], "nothing can be written to /proc"),
    ):
        assert main(["plot", *map(str, arguments)]) == 2
        captured = capsys.readouterr()
        assert captured.out == "" and captured.err.count("\n") == 1 and message in captured.err
