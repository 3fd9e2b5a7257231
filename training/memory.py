"""Out of memory: what would have fitted, which another process tries out.

python -m blink.training.memory      reads what `refusal` writes, prints each number of images that fits
"""

import os
import pickle
import subprocess
import sys
from dataclasses import replace

import torch

from blink.command import python_path
from blink.errors import UserError, is_exhausted
from blink.model import backend as backends
from blink.training.data.dataset import Dataset
from blink.training.job import Job
from blink.training.trainer import Trainer


def refusal(job: Job) -> UserError:
    """What a person can do about a batch that did not fit: the largest of 2, 4, 8, ... images of which a step does.

    They are tried in a process of their own, whose memory is in one piece. No trainer of the job may be alive.
    """
    if job.setting.device.type == "cuda":
        torch.cuda.empty_cache()
    setting, tried = job.setting, job.budget.at_a_time
    # to a process of this program, from nobody else
    told = pickle.dumps(
        (job.recipe, job.budget, job.dataset.image_shape, job.dataset.classes, setting.device, setting.backend.name,
         setting.compute, torch.get_num_threads())
    )  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "blink.training.memory"], input=told, capture_output=True,
        env=os.environ | {"PYTHONPATH": python_path()},
    )  # fmt: skip
    fitting = done.stdout.split()
    if not fitting:
        return UserError(
            f"out of memory with {tried} images at a time, and with 2 as well; use smaller images (--size), fewer "
            "(--limit) or a smaller network"
        )
    size = int(fitting[-1])
    return UserError(
        f"out of memory with {tried} images at a time; {size} fit: use --micro-batch {size}, which keeps the batch of "
        f"{job.budget.batch_size}, or --batch-size {size}"
    )


def main() -> None:
    recipe, budget, image_shape, classes, device, backend, compute, threads = pickle.load(sys.stdin.buffer)
    torch.set_num_threads(threads)
    channels, *sides = image_shape
    size = 2
    while size < budget.at_a_time:
        # what is in the images takes no memory
        images = torch.randint(256, (budget.batch_size, *sides, channels), dtype=torch.uint8, device=device)
        labels = torch.zeros(len(images), dtype=torch.int64, device=device)
        half, ones = (images, labels), torch.ones(channels, device=device)
        dataset = Dataset("trial", "", classes, *half, *half, mean=ones / 2, std=ones)
        own = replace(budget, micro_batch=size, steps_per_epoch=1, total_steps=1)
        try:
            _step(Trainer(replace(recipe, keep=1.0), dataset, own, backends.select(backend, device), compute, False))
        except Exception as error:
            if is_exhausted(error):
                return
            raise
        print(size, flush=True)
        size *= 2


def _step(trainer: Trainer) -> None:
    """Of whole images; not whitened: what that takes does not depend on the batch."""
    trainer.restart(0)
    trainer.network.train()
    trainer.start_epoch(0, torch.Generator(trainer.device).manual_seed(0))
    phase = trainer.phase_at(0)
    trainer.rehearse(replace(phase, size=trainer.batches.size))
    if trainer.device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
