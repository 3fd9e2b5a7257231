"""What runs must share to be compared, and the runs of several machines and files that share it."""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

_MACHINE = ("device", "threads", "power_limit", "torch", "triton")


def machine_of(environment: dict) -> dict:
    """What of its description two machines, and the software on them, must share."""
    return {key: environment.get(key) for key in _MACHINE}


def conditions(record: dict) -> dict:
    """What two runs share that differ in variant and seed only: plan, data, scale, machine and how it computes."""
    data = record["data"]
    return {
        "plan": record["plan"],
        "data": f"{data['name']} {data['fingerprint']}, {data['train']:,} training and {data['test']:,} test images",
        "width": record["width"],
        "epochs": record["epochs_factor"],
        "kernels": record["kernels"]["name"],
        "dtype": record["dtype"],
        "graph": record["graph"],
        "deterministic": record["deterministic"],
        **machine_of(record["environment"]),
    }


def same_recipe(a: dict, b: dict) -> bool:
    """Whether two runs trained the same recipe for as many steps."""
    return a["recipe"] == b["recipe"] and a["budget"] == b["budget"]


def pair_of(record: dict) -> tuple[str, int]:
    """(machine, seed): what two runs share of which one may be subtracted from the other."""
    return json.dumps(machine_of(record["environment"])), record["seed"]


@dataclass(frozen=True)
class Pool:
    """Runs of one table. shared: their `conditions` but for the machine; by_file: in order of appearance, each once."""

    shared: dict
    by_file: dict[str, list[dict]] = field(default_factory=dict)

    @property
    def runs(self) -> list[dict]:
        return [run for runs in self.by_file.values() for run in runs]

    def takes(self, runs: list[dict]) -> bool:
        """Whether none of these is of another recipe or budget than the pool's run of the same variant."""
        known = {run["variant"]: run for run in self.runs}
        return all(same_recipe(known.get(run["variant"], run), run) for run in runs)


def pooled(files: Iterable[tuple[str, list[dict]]], note: Callable[[str], None]) -> list[Pool]:
    """The runs of (name, records) of files in pools, in order of appearance: machines may differ, recipes may not.

    Of a run that is in two files that of the first counts, which `note` is told. All runs of a file under the same
    conditions stay together, so that a variant is compared with the first one as it was then.
    """
    pools: list[Pool] = []
    for name, records in files:
        again = 0
        for shared, runs in _alike(records):
            free = {key: value for key, value in shared.items() if key not in _MACHINE}
            pool = next((pool for pool in pools if pool.shared == free and pool.takes(runs)), None)
            if pool is None:
                pools.append(pool := Pool(free))
            known = {(pair_of(run), run["variant"]) for run in pool.runs}
            new = [run for run in runs if (pair_of(run), run["variant"]) not in known]
            again += len(runs) - len(new)
            if new:
                pool.by_file.setdefault(name, []).extend(new)
        if again:
            note(f"{name}: {again} of its runs are in a file before it too; the first counts")
    return pools


def _alike(records: Iterable[dict]) -> list[tuple[dict, list[dict]]]:
    """The records in groups that share their conditions, in order of appearance."""
    groups: dict[str, tuple[dict, list[dict]]] = {}
    for record in records:
        shared = conditions(record)
        groups.setdefault(json.dumps(shared), (shared, []))[1].append(record)
    return list(groups.values())
