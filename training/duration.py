"""How long a budget that may never end would take, told before it begins."""

import time
from dataclasses import replace

import torch

from blink.training.job import Job

# below, nobody need be warned
LONG_STEPS, _LONG_SECONDS = 10_000, 6 * 3600
_UNITS = (("years", 365.25 * 86400), ("days", 86400.0), ("hours", 3600.0))


def warning(job: Job) -> str | None:
    """A line on how long a run of the job takes, from a step that is timed here; None for one that is soon done."""
    steps = job.budget.total_steps
    if steps < LONG_STEPS:
        return None
    seconds = steps * _seconds_of_a_step(job)
    if seconds < _LONG_SECONDS:
        return None
    unit, length = next((name, length) for name, length in _UNITS if seconds >= 2 * length or name == "hours")
    return f"a run of {steps:,} steps takes about {seconds / length:,.0f} {unit} here; --epochs or --steps set fewer"


def _seconds_of_a_step(job: Job) -> float:
    """Of whole images, the second of two."""
    trainer = job.trainer(replace(job.budget, total_steps=1))
    trainer.restart(0)
    trainer.network.train()
    trainer.start_epoch(0, torch.Generator(trainer.device).manual_seed(0))
    phase = replace(trainer.phase_at(0), size=trainer.batches.size)
    for _ in range(2):
        began = time.perf_counter()
        trainer.rehearse(phase)
        if trainer.device.type == "cuda":
            torch.cuda.synchronize()
    return time.perf_counter() - began
