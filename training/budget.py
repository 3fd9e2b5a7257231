"""How a data set is cut into steps."""

import math
from dataclasses import dataclass

from blink.errors import UserError
from blink.training.data.dataset import Dataset
from blink.training.recipes import Recipe

# fewer steps than this an epoch leave the schedule too coarse to learn from a small data set
MIN_STEPS_PER_EPOCH = 16
# above, a number is taken for a slip of the pen
MOST_STEPS = 1_000_000_000


@dataclass(frozen=True)
class Budget:
    """batch_size: images a step; total_steps: of a whole run, the last epoch may be cut short; micro_batch: images of a
    step that are on the device at a time; None: all.
    """

    batch_size: int
    steps_per_epoch: int
    total_steps: int
    micro_batch: int | None = None

    @property
    def at_a_time(self) -> int:
        """How many images of a step are on the device at a time."""
        return min(self.micro_batch or self.batch_size, self.batch_size)

    @property
    def epochs(self) -> int:
        return math.ceil(self.total_steps / self.steps_per_epoch)

    def steps_of(self, epoch: int) -> range:
        """The steps of epoch 0, 1, ..., counted over the whole run."""
        first = epoch * self.steps_per_epoch
        return range(first, min(first + self.steps_per_epoch, self.total_steps))


def plan_budget(
    recipe: Recipe, images: int, batch_size: int | None = None, epochs: float | None = None, steps: int | None = None,
    micro_batch: int | None = None,
) -> Budget:  # fmt: skip
    """The batch size is clamped to the images that an epoch takes: a stated one to their number, the recipe's own to 16
    steps an epoch.
    """
    images = max(1, round(recipe.keep * images))
    if batch_size is None:
        roomy = 2 ** int(math.log2(max(1, images // MIN_STEPS_PER_EPOCH)))
        batch_size = min(recipe.batch_size, max(roomy, min(images, 2)))
    batch_size = min(batch_size, images)
    per_epoch = images // batch_size
    total = steps if steps is not None else max(1, round((epochs or recipe.epochs) * per_epoch))
    if total > MOST_STEPS:
        raise UserError(f"a run of {total:,} steps is above {MOST_STEPS:,}; set fewer --epochs or --steps")
    return Budget(batch_size, per_epoch, total, micro_batch)


def check_batch(recipe: Recipe, dataset: Dataset, budget: Budget, ranks: int = 1) -> None:
    """Batch normalization needs two values per channel after the last pooling, and each rank an image. Raises
    UserError.
    """
    if budget.batch_size < ranks:
        raise UserError(
            f"a batch of {budget.batch_size} images cannot be shared by {ranks} processes; start fewer, or give more "
            "images (--batch-size)"
        )
    poolings = 2 ** len(recipe.network.conv_groups)
    _, *whole = dataset.image_shape
    height, width = min(recipe.image_sizes(tuple(whole)))
    lost = recipe.network.minimum_image_size - poolings
    # the last part of a step may be smaller than the others
    smallest = (budget.batch_size % budget.at_a_time or budget.at_a_time) // ranks
    if smallest == 1 and ((height - lost) // poolings) * ((width - lost) // poolings) == 1:
        raise UserError(
            f"batches of 1 image of {height}x{width}{' a process' if ranks > 1 else ''} leave 1 value per channel, "
            f"which has no variance to normalize with; expected at least 2: use --batch-size {2 * ranks} (or "
            f"--micro-batch {2 * ranks}) and {2 * ranks} training images or more, or larger images"
        )
