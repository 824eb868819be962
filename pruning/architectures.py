"""The small networks of this package: LeNets, and the ResNet and VGG for 32x32 images.

Every activation is a module of its own and none works in place, so that a hook sees each map as the network
computed it.
"""

from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor, nn

from .errors import UserError


class LeNet(nn.Module):
    """Caffe's LeNet-5: two 5x5 convolutions without padding and two linear layers.

    A ReLU follows conv1, conv2 and fc1, as in Network Trimming (Hu et al. 2016, arXiv 1607.03250); Caffe's
    own has only the last of the three. With the default widths and 1x28x28 images: 431,080 parameters.

    Args:
        classes: Number of outputs, 1 or more.
        in_channels: Channels of an image.
        image_size: Height and width of an image in pixels, 16 or more.
        widths: Outputs of conv1, conv2 and fc1.

    Raises:
        UserError: `widths` is not three positive numbers, or the image is too small.
    """

    def __init__(
        self,
        classes: int = 10,
        in_channels: int = 1,
        image_size: int = 28,
        widths: Sequence[int] = (20, 50, 500),
    ) -> None:
        super().__init__()
        if len(widths) != 3 or min(widths) < 1:
            raise UserError(f"widths must be three positive numbers (conv1, conv2, fc1), but got {widths}")
        if image_size < 16:
            raise UserError(f"LeNet needs images of 16x16 or more, but got {image_size=}; enlarge the images")
        first, second, hidden = widths
        side = ((image_size - 4) // 2 - 4) // 2  # each 5x5 convolution takes 4 pixels, each pool halves
        self.conv1 = nn.Conv2d(in_channels, first, 5)
        self.relu1 = nn.ReLU()
        self.pool1 = nn.MaxPool2d(2)
        self.conv2 = nn.Conv2d(first, second, 5)
        self.relu2 = nn.ReLU()
        self.pool2 = nn.MaxPool2d(2)
        self.flatten = nn.Flatten()
        self.fc1 = nn.Linear(second * side * side, hidden)
        self.relu3 = nn.ReLU()
        self.fc2 = nn.Linear(hidden, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (N, classes) of images (N, C, H, W)."""
        maps = self.pool1(self.relu1(self.conv1(images)))
        maps = self.pool2(self.relu2(self.conv2(maps)))
        return self.fc2(self.relu3(self.fc1(self.flatten(maps))))  # (N, C, H, W) -> (N, C*H*W) -> logits


class LeNet300(nn.Module):
    """LeNet-300-100: three linear layers on the flattened image (266,610 parameters on 1x28x28).

    Args:
        classes: Number of outputs.
        in_channels: Channels of an image.
        image_size: Height and width of an image in pixels.
        widths: Outputs of fc1 and fc2.

    Raises:
        UserError: `widths` is not two positive numbers.
    """

    def __init__(
        self,
        classes: int = 10,
        in_channels: int = 1,
        image_size: int = 28,
        widths: Sequence[int] = (300, 100),
    ) -> None:
        super().__init__()
        if len(widths) != 2 or min(widths) < 1:
            raise UserError(f"widths must be two positive numbers (fc1, fc2), but got {widths}")
        self.flatten = nn.Flatten()
        self.fc1 = nn.Linear(in_channels * image_size * image_size, widths[0])
        self.relu1 = nn.ReLU()
        self.fc2 = nn.Linear(widths[0], widths[1])
        self.relu2 = nn.ReLU()
        self.fc3 = nn.Linear(widths[1], classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (N, classes) of images (N, C, H, W)."""
        hidden = self.relu1(self.fc1(self.flatten(images)))  # (N, C, H, W) -> (N, C*H*W) -> (N, 300)
        return self.fc3(self.relu2(self.fc2(hidden)))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut, which is a 1x1 convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu2 = nn.ReLU()
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(outputs))

    def forward(self, maps: Tensor) -> Tensor:
        """Map (N, inputs, H, W) to (N, outputs, H / stride, W / stride)."""
        inner = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(maps)))))
        return self.relu2(inner + self.downsample(maps))


class CifarResNet(nn.Module):
    """The CIFAR ResNet of He et al. (2016, arXiv 1512.03385, section 4.2), with 1x1 shortcuts.

    Args:
        blocks: Basic blocks in each of the three stages; the depth is 6 * blocks + 2.
        classes: Number of outputs.
        in_channels: Channels of an image, which may have any size from 4x4 on.
        widths: Channels of the three stages; the stem has those of the first.

    Raises:
        UserError: `widths` is not three positive numbers.
    """

    def __init__(
        self, blocks: int, classes: int = 10, in_channels: int = 3, widths: Sequence[int] = (16, 32, 64)
    ) -> None:
        super().__init__()
        if len(widths) != 3 or min(widths) < 1:
            raise UserError(f"widths must be three positive numbers, one for each stage, but got {widths}")
        first, second, third = widths
        self.conv1 = nn.Conv2d(in_channels, first, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(first)
        self.relu = nn.ReLU()
        self.layer1 = _stage(first, first, blocks, stride=1)
        self.layer2 = _stage(first, second, blocks, stride=2)
        self.layer3 = _stage(second, third, blocks, stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(third, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (N, classes) of images (N, C, H, W)."""
        maps = self.relu(self.bn1(self.conv1(images)))
        maps = self.layer3(self.layer2(self.layer1(maps)))
        return self.fc(self.flatten(self.avgpool(maps)))  # (N, C, H, W) -> (N, C) -> logits


def _stage(inputs: int, outputs: int, blocks: int, stride: int) -> nn.Sequential:
    """Chain `blocks` basic blocks, the first of which changes width and resolution."""
    rest = [BasicBlock(outputs, outputs, 1) for _ in range(blocks - 1)]
    return nn.Sequential(BasicBlock(inputs, outputs, stride), *rest)


class CifarVgg16(nn.Module):
    """VGG-16 for small images: 13 convolutions with batch norm and one linear layer.

    The convolutions have no bias, as the batch norm behind each would absorb it. They are called
    `features.conv1_1` to `features.conv5_3`, the last layer `classifier`.

    Args:
        classes: Number of outputs.
        in_channels: Channels of an image, which may have any size from 32x32 on.
        widths: Outputs of the 13 convolutions.

    Raises:
        UserError: `widths` is not 13 positive numbers.
    """

    def __init__(
        self,
        classes: int = 10,
        in_channels: int = 3,
        widths: Sequence[int] = (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512),
    ) -> None:
        super().__init__()
        if len(widths) != 13 or min(widths) < 1:
            raise UserError(f"widths must be 13 positive numbers, one for each convolution, but got {widths}")
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        outputs = iter(widths)
        inputs = in_channels
        for stage, depth in enumerate((2, 2, 3, 3, 3), start=1):
            for place in range(1, depth + 1):
                width = next(outputs)
                layers[f"conv{stage}_{place}"] = nn.Conv2d(inputs, width, 3, 1, 1, bias=False)
                layers[f"bn{stage}_{place}"] = nn.BatchNorm2d(width)
                layers[f"relu{stage}_{place}"] = nn.ReLU()
                inputs = width
            layers[f"pool{stage}"] = nn.MaxPool2d(2)
        self.features = nn.Sequential(layers)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.classifier = nn.Linear(inputs, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (N, classes) of images (N, C, H, W)."""
        return self.classifier(self.flatten(self.avgpool(self.features(images))))
