"""Two kinds of picture: what share of the memory roof each row reaches, and the providers' times per op."""

from pathlib import Path

# Okabe and Ito's palette, distinguishable with any colour vision; hatches and markers repeat the distinction
STYLE = {
    "fused": ("#0072B2", "", "o"),
    "eager": ("#E69F00", "//", "s"),
    "compile": ("#009E73", "..", "^"),
    "torchvision": ("#CC79A7", "xx", "D"),
    "optim-foreach": ("#D55E00", "\\\\", "v"),
    "optim-fused": ("#56B4E9", "--", "P"),
    "optim-muon": ("#F0E442", "||", "X"),
}


def draw(rows: list[dict], title: str, folder: Path) -> list[Path]:
    """Write roofline.png and <op>.png; returns what was written. Rows without a timed provider are left out."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    written = []
    rows = [row for row in rows if any(p["status"] == "timed" for p in row["providers"].values())]

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    roof = sorted({(row["bytes"], row["bytes"] / row["copy"] / 1e3) for row in rows})
    axes.plot(*zip(*roof), color="black", label="copy of the same bytes")
    for name, (color, _, marker) in STYLE.items():
        points = [(r["bytes"], r["providers"][name]["gb_s"]) for r in rows
                  if r["providers"].get(name, {}).get("status") == "timed"]  # fmt: skip
        if points:
            axes.scatter(*zip(*points), color=color, marker=marker, label=name, alpha=0.8)
    axes.set(
        xscale="log", yscale="log", title=title, xlabel="bytes the op must move", ylabel="counted bytes / time, GB/s"
    )
    axes.grid(True, which="both", alpha=0.3)
    axes.legend()
    written.append(folder / "roofline.png")
    figure.savefig(written[-1], dpi=120)
    plt.close(figure)

    for op in dict.fromkeys(row["op"] for row in rows):
        own = [row for row in rows if row["op"] == op]
        names = [n for n in STYLE if any(r["providers"].get(n, {}).get("status") == "timed" for r in own)]
        figure, axes = plt.subplots(figsize=(8, 1.2 + 0.8 * len(own)), layout="constrained")
        height = 0.8 / len(names)
        for i, name in enumerate(names):
            color, hatch, _ = STYLE[name]
            times = [r["providers"].get(name, {}).get("time") or 0 for r in own]
            places = [row + (i - (len(names) - 1) / 2) * height for row in range(len(own))]
            bars = axes.barh(places, times, height, color=color, hatch=hatch, edgecolor="white", label=name)
            axes.bar_label(bars, [f" {t:.0f}" if t else "" for t in times], fontsize=8)
        axes.set_yticks(range(len(own)), [f"{r['pass']} {r['case']}\n{r['dtype']}" for r in own], fontsize=8)
        axes.invert_yaxis()
        axes.margins(x=0.1)
        axes.set(xlabel="microseconds (shorter is better)", title=f"{op}\n{title}")
        axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
        written.append(folder / f"{op}.png")
        figure.savefig(written[-1], dpi=120)
        plt.close(figure)
    return written
