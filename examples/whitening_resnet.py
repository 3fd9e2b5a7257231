"""A whitening stem in front of a torchvision ResNet: `python examples/whitening_resnet.py`, in seconds on a CPU.

The frozen filters take the place of what the first convolution would have to learn of how neighbouring pixels resemble
each other, and read uint8 images as they are. The images here are random, so that nothing is downloaded: neighbouring
pixels are alike, as in photographs, and each class has a tint of its own. Use your own DataLoader of (images, labels).
"""

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from blink.kernels import SGD, Muon, WhiteningConv2d, split_parameters

CLASSES, SIDE, EPOCHS = 4, 16, 3


def random_images(count: int) -> TensorDataset:
    """`count` images [3, SIDE, SIDE] uint8 and their labels."""
    labels = torch.randint(CLASSES, (count,))
    tints = torch.tensor([[40, 0, -40], [-40, 40, 0], [0, -40, 40], [0, 0, 0]])[labels]
    coarse = torch.rand(count, 3, SIDE // 4, SIDE // 4) * 160 + 48
    smooth = F.interpolate(coarse, size=SIDE, mode="bilinear") + tints[:, :, None, None]
    return TensorDataset(smooth.clamp(0, 255).to(torch.uint8), labels)


def whitened_resnet(loader: DataLoader) -> nn.Module:
    """A ResNet of four blocks for small images, whose first convolution sees [B, 12, SIDE - 1, SIDE - 1], whitened."""
    resnet = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=CLASSES)
    stem = WhiteningConv2d(kernel_size=2).fit(loader)
    # a 7x7 convolution of stride 2 and a pooling would leave nothing of so small an image
    resnet.conv1 = nn.Sequential(stem, nn.Conv2d(stem.out_channels, 64, 3, padding=1, bias=False))
    resnet.maxpool = nn.Identity()
    return resnet


def correlation(values: Tensor) -> float:
    """The largest correlation between two of the C values at each position [B, C, positions], without sign."""
    return (values.movedim(1, 0).flatten(1).corrcoef() - torch.eye(values.shape[1])).abs().max().item()


def main() -> None:
    torch.manual_seed(0)
    loader = DataLoader(random_images(128), batch_size=64, shuffle=True)
    model = whitened_resnet(loader)
    images, labels = next(iter(loader))
    stem = model.conv1[0]
    print(f"pixels: mean {stem.mean.tolist()}, standard deviation {stem.std.tolist()}")
    before, after = correlation(F.unfold(images.float(), 2)), correlation(stem(images).flatten(2))
    print(f"largest correlation between two of a patch's 12 values: {before:.2f}, after whitening {after:.2f}")

    matrices, rest = split_parameters(model, exclude=["fc"])
    optimizers = [
        Muon(matrices, lr=0.02, weight_decay=0.01, ns_steps=3),
        SGD(rest, lr=0.02, momentum=0.9, nesterov=True),
    ]
    print(f"{len(matrices)} filters are trained by Muon, {len(rest)} other parameters by SGD, the whitening by none")
    for epoch in range(1, EPOCHS + 1):
        correct = 0
        for images, labels in loader:
            logits = model(images)
            F.cross_entropy(logits, labels).backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            correct += (logits.argmax(1) == labels).sum().item()
        print(f"epoch {epoch}: {correct / len(loader.dataset):.0%} of the training images right")


if __name__ == "__main__":
    main()
