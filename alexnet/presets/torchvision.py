"""torchvision's AlexNet: one column, from "One weird trick" (Krizhevsky 2014)."""

from .description import AdaptivePool, Conv, FullyConnected, Pool, Preset, UniformByFanIn

POOL = Pool("max", 3, stride=2)
UNIFORM = UniformByFanIn()

TORCHVISION = Preset(
    name="torchvision",
    title="torchvision's, of one column and without LRN",
    source="torchvision.models.alexnet, after Krizhevsky: One weird trick for parallelizing convolutional neural "
    "networks, arXiv 1404.5997",
    differences=(
        "One column: every map reads all maps before it.",
        "64, 192, 384, 256 and 256 maps instead of 96, 256, 384, 384 and 256.",
        "No LRN.",
        "conv1 reads 2 pixels of zeros on every side, and no window hangs over the edge.",
        "Averages over 6x6 parts before fc6, which do nothing at 224 pixels, keep fc6's size for any input.",
        "Dropout is of the inputs of fc6 and fc7 instead of their outputs.",
        "Weights and biases start uniformly within 1 / sqrt(fan_in), PyTorch's default.",
    ),
    input_size=224,
    convs=(
        Conv("conv1", 64, 11, UNIFORM, stride=4, padding=2, then=("relu", POOL)),
        Conv("conv2", 192, 5, UNIFORM, padding=2, then=("relu", POOL)),
        Conv("conv3", 384, 3, UNIFORM, padding=1),
        Conv("conv4", 256, 3, UNIFORM, padding=1),
        Conv("conv5", 256, 3, UNIFORM, padding=1, then=("relu", POOL, AdaptivePool(6))),
    ),
    fully_connected=(
        FullyConnected("fc6", 4096, UNIFORM, dropout="of input"),
        FullyConnected("fc7", 4096, UNIFORM, dropout="of input"),
        FullyConnected("fc8", None, UNIFORM, activation=None),
    ),
)
