"""The net of Krizhevsky, Sutskever and Hinton, NIPS 2012."""

from .description import LRN, Conv, FullyConnected, Gaussian, Pool, Preset

POOL = Pool("max", 3, stride=2)  # overlapping (paper, 3.4)
PLAIN, ONES = Gaussian(0.01), Gaussian(0.01, bias=1.0)  # paper, 5

PAPER = Preset(
    name="paper",
    title="the two-column net of the paper",
    source="Krizhevsky, Sutskever, Hinton: ImageNet Classification with Deep Convolutional Neural Networks, NIPS 2012",
    # where the paper leaves a choice
    differences=(
        "224 pixels do not fit 55 windows of 11 at stride 4: the last window extends 3 pixels beyond the right and "
        "bottom edge and reads zeros there, as in the 2012 source; the same rule holds for any input size.",
        "The order is convolution, ReLU, LRN, pooling, as in the text (the 2012 source puts LRN before ReLU in layer "
        "1).",
        "LRN stays within a column, as when each column lived on its own GPU.",
    ),
    input_size=224,
    columns=2,
    lrn=LRN(),
    lrn_reads="own column",
    convs=(
        Conv("conv1", 96, 11, PLAIN, stride=4, ceil=True, then=("relu", "lrn", POOL)),
        Conv("conv2", 256, 5, ONES, padding=2, reads="own column", then=("relu", "lrn", POOL)),
        Conv("conv3", 384, 3, PLAIN, padding=1, reads="all columns"),
        Conv("conv4", 384, 3, ONES, padding=1, reads="own column"),
        Conv("conv5", 256, 3, ONES, padding=1, reads="own column", then=("relu", POOL)),
    ),
    fully_connected=(
        FullyConnected("fc6", 4096, ONES, dropout="of output"),
        FullyConnected("fc7", 4096, ONES, dropout="of output"),
        FullyConnected("fc8", None, PLAIN, activation=None),
    ),
)
