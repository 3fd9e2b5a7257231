"""The profile as a person reads it, in 80 columns, and as JSON."""

from dataclasses import asdict

from blink.experiments.profile.measure import Comparison, Profile
from blink.tables import number

# of a share of what the roofs allow
_ABOVE = [
    "above 100 %: a convolution of fewer operations than its definition, which are",
    "counted, or work in caches, faster than what the roofs are measured by",
]


def table(profile: Profile) -> list[str]:
    """Lines of at most 80 columns: one for each part and pass, then the totals."""
    head = f"{'part':<22} {'pass':<6} {'ms':>8} {'share':>7} {'MB':>8} {'GFLOP':>8} {'floor ms':>8} {'of it':>6}"
    lines = [head, "-" * len(head)]

    def line(part: str, direction: str, ms: float, moved=None, flops=None, floor=None) -> str:
        share = f"{100 * ms / profile.parts_ms:.1f} %"
        reached = "-" if not floor or not ms else f"{100 * floor / ms:.0f} %"
        return (
            f"{part:<22} {direction:<6} {ms:8.3f} {share:>7} {number(moved, '.1f', 1e6):>8} "
            f"{number(flops or None, '.2f', 1e9):>8} {number(floor, '.3f'):>8} {reached:>6}"
        )

    for row in profile.rows:
        lines.append(line(row.part, row.direction, row.ms, row.bytes, row.flops, row.floor_ms))
    lines.append(line("idle (gaps)", "", profile.idle_ms))
    lines.append("-" * len(head))
    lines.append(line("all parts", "", profile.parts_ms, profile.bytes, profile.flops, profile.floor_ms))
    if any(row.floor_ms and row.floor_ms > row.ms for row in profile.rows):
        lines += _ABOVE
    difference = 100 * (profile.parts_ms / profile.step_ms - 1)
    lines.append(f"a step without the profiler: {profile.step_ms:.3f} ms; the parts differ by {difference:+.1f} %")
    lines.append(
        f"roofs: copy {profile.copy_rate / 1e9:,.0f} GB/s, matrix product in {profile.matmul_dtype} "
        f"{profile.matmul_rate / 1e12:.2f} TFLOP/s"
    )
    return lines


def convolution_table(profile: Profile) -> list[str]:
    """What decides whether own convolution kernels would pay: each pass's rate against the matrix product's."""
    head = f"{'convolution':<22} {'pass':<6} {'ms':>8} {'TFLOP/s':>8} {'of the matrix product':>22}"
    lines = [head, "-" * len(head)]
    rows = [row for row in profile.rows if ".conv" in row.part and row.flops]

    def line(part: str, direction: str, ms: float, flops: int) -> str:
        rate = flops / (ms * 1e-3)
        return f"{part:<22} {direction:<6} {ms:8.3f} {rate / 1e12:8.3f} {100 * rate / profile.matmul_rate:>20.0f} %"

    lines += [line(row.part, row.direction, row.ms, row.flops) for row in rows]
    if not rows:
        return []
    lines.append(line("all", "", sum(row.ms for row in rows), sum(row.flops for row in rows)))
    if any(row.flops > profile.matmul_rate * row.ms * 1e-3 for row in rows):
        lines += _ABOVE
    return lines


def comparison_lines(eager: Comparison) -> list[str]:
    share = eager.eager_convolution_ms / eager.eager_profiled_ms
    gained = (eager.speedup - 1) / (eager.allowed - 1) if eager.allowed > 1 else float("inf")
    return [
        f"against eager PyTorch, alternating, median of {eager.rounds} rounds:",
        f"  {eager.ms:.1f} ms to {eager.eager_ms:.1f} ms a step: {eager.speedup:.2f}x",
        f"  convolutions are {100 * share:.1f} % of eager's step: {eager.allowed:.2f}x without all else,",
        f"  of which gain this is {100 * gained:.0f} %{', as convolutions are faster too' if gained > 1 else ''}",
    ]


def as_dict(profile: Profile, eager: Comparison) -> dict:
    out = asdict(profile) | {"parts_ms": profile.parts_ms}
    # a name that files on record have
    out["race"] = asdict(eager) | {"speedup": eager.speedup, "allowed": eager.allowed}
    return out
