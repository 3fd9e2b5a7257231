"""Rows as text at 80 columns, the closing line, and the comparison of two result files."""

import math
from textwrap import wrap

KEYS = ("op", "pass", "case", "dtype")
_WIDTH = 80


def key_of(row: dict) -> tuple:
    return tuple(row[k] for k in KEYS)


def ratio_of(providers: dict) -> float | None:
    """Time of fused over that of the best other provider; None unless both were timed and right."""
    fused = providers.get("fused", {}).get("time")
    others = [p["time"] for name, p in providers.items() if name != "fused" and p.get("time")]
    return fused / min(others) if fused and others else None


def format_row(row: dict) -> str:
    """A headline and one line per provider; what does not fit goes on below."""
    margin = 2 + max(8, *(len(name) + 1 for name in row["providers"])) if row["providers"] else 2
    lines = [f"{row['op']} {row['pass']}  {row['case']}  {row['dtype']}"]
    roof = f"{row['bytes'] / 1e6:.1f} MB, a copy of it takes {_us(row['copy'])}"
    if row["flops"] >= 5e6:
        roof += f"; {row['flops'] / 1e9:.2f} GFLOP"
    lines.append(f"  {roof}")
    for name, p in row["providers"].items():
        if p["status"] == "timed":
            text = f"{_us(p['median'])} [{_us(p['low'])} {_us(p['high'])}]"
            if p["graph"] is not None:
                text += f" graph {_us(p['graph'])}"
            text += f"  {p['gb_s']:.0f} GB/s"
            if p["tflop_s"] >= 0.005:
                text += f" {p['tflop_s']:.2f} TFLOP/s"
            text += f"  {p['roofline']:.0%}"
            if p["peak_bytes"] is not None:
                text += f"  +{p['peak_bytes'] / 2**20:.0f} MiB"
        else:
            text = p["note"]
        lines += _wrapped(f"  {name}".ljust(margin) + text, margin)
    if row["ratio"] is not None:
        lines.append(f"  fused / best other {row['ratio']:.2f}")
    return "\n".join(lines)


def _wrapped(line: str, margin: int) -> list[str]:
    return wrap(line, _WIDTH, subsequent_indent=" " * margin, break_long_words=False, break_on_hyphens=False)


def _us(microseconds: float) -> str:
    if microseconds >= 1e4:
        return f"{microseconds / 1000:.1f}ms"
    return f"{microseconds:.0f}us" if microseconds >= 100 else f"{microseconds:.1f}us"


def first_call_line(rows: list[dict]) -> str:
    """Seconds of each provider's first forward and backward, summed over cases: mostly compilation, never in a time."""
    first = {}
    for row in rows:
        for name, p in row["providers"].items():
            if "first_call_seconds" in p:
                first.setdefault(name, {})[(row["case"], row["op"], row["dtype"])] = p["first_call_seconds"]
    sums = ", ".join(f"{name} {sum(seconds.values()):.1f} s" for name, seconds in first.items())
    return "\n".join(_wrapped(f"first calls, compilation included: {sums}", 2)) if sums else "no provider ran"


def closing_line(rows: list[dict]) -> str:
    ratios = [row["ratio"] for row in rows if row["ratio"] is not None]
    wrong = sum(p["status"] == "wrong" for row in rows for p in row["providers"].values())
    text = f"{len(rows)} rows, {wrong} wrong results"
    if not ratios:
        return text + "; fused was not timed here, so there is no ratio"
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
    slower = sum(ratio > 1 for ratio in ratios)
    return f"{text}; fused / best other: geometric mean {mean:.3f}, slower in {slower} of {len(ratios)} rows"


def compare(before: dict, after: dict, band: float) -> tuple[list[str], int]:
    """Lines of what changed per row and provider, and the number of regressions.

    A regression is slower by more than `band` (a fraction), with quantiles that do not overlap, or a result that turned
    from right to wrong, or a row or provider that vanished or stopped running.
    """
    old = {key_of(row): row for row in before["rows"]}
    new = {key_of(row): row for row in after["rows"]}
    lines, regressions = [], 0
    for key, row in old.items():
        for name, p in row["providers"].items():
            label = f"{' '.join(key)} {name}"
            q = new.get(key, {}).get("providers", {}).get(name)
            if q is None:
                lines.append(f"{label}: gone")
                regressions += 1
            elif p["status"] != q["status"]:
                lines.append(f"{label}: {p['status']} -> {q['status']}")
                regressions += q["status"] == "wrong" or p["status"] == "timed"
            elif p["status"] == "timed":
                change = q["time"] / p["time"] - 1
                apart = q["low"] > p["high"] or (p["graph"] is not None and q["graph"] is not None)
                worse = change > band and apart
                regressions += worse
                lines.append(f"{label}: {_us(p['time'])} -> {_us(q['time'])} ({change:+.1%}){' REGRESSION' * worse}")
    lines += [f"{' '.join(key)}: new" for key in new if key not in old]
    return lines, regressions
