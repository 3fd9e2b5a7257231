"""Several ranks on this machine, as a launcher starts them that keeps them alive when one fails."""

import os
import socket
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from blink.training import peers
from tests import forked, processes


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def become(rank: int, size: int, port: int) -> None:
    """In a process of its own: it is this rank, and soon dead to the others when it does not answer."""
    here = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
    # other than torchrun's own 1, so that each keeps its one thread, as the process that it is compared with
    here |= {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": 2}
    os.environ.update({name: str(value) for name, value in here.items()})
    torch.set_num_threads(1)
    peers.BEAT, peers.DEAD_AFTER, peers.LOOK = 0.1, 2.0, 0.05


def _command(rank: int, size: int, port: int, environment: dict[str, str], *rest) -> None:
    become(rank, size, port)
    os.environ.update(environment)
    processes._run(*rest)


def started(size: int, arguments: list, output: Path, **environment: str) -> list[BaseProcess]:
    """`blink ARGUMENTS` on each of so many ranks; rank r prints to the files `output`-r.out and .err."""
    port, words = free_port(), list(map(str, arguments))
    return [
        forked.started(_command, rank, size, port, environment, words, Path(f"{output}-{rank}"), "", "utf-8", None)
        for rank in range(size)
    ]


def ended(ranks: list[BaseProcess]) -> list[int]:
    """Their exit codes."""
    for rank in ranks:
        rank.join(60)
    assert all(rank.exitcode is not None for rank in ranks), "one has not ended"
    return [rank.exitcode for rank in ranks]


def together(size: int, function, *arguments) -> None:
    """function(rank, size, port, *arguments) of a module of tests/ on each rank; all must succeed."""
    port = free_port()
    assert ended([forked.started(function, rank, size, port, *arguments) for rank in range(size)]) == [0] * size
