"""The replication that came with Caffe, BVLC AlexNet."""

from .description import LRN, Conv, FullyConnected, Gaussian, Pool, Preset

POOL = Pool("max", 3, stride=2, ceil=True)  # Caffe rounds up
ZEROS, TENTHS = Gaussian(0.01), Gaussian(0.01, bias=0.1)

CAFFE = Preset(
    name="caffe",
    title="Caffe's replication, BVLC AlexNet",
    source="https://github.com/BVLC/caffe/blob/master/models/bvlc_alexnet/train_val.prototxt",
    differences=(
        "The input has 227 pixels, which 55 windows of 11 at stride 4 fit without zeros beyond the edge.",
        "LRN runs over the maps of both columns: maps on both sides of their border see each other.",
        "LRN's k is 1, and alpha, 1e-4, is divided by n = 5: here, where it multiplies the plain sum, it is 2e-5.",
        "Biases start at 0.1 where the paper has 1, and weights of fc6 and fc7 with a deviation of 0.005.",
        "Pooling rounds the number of windows up, which makes no difference at 227 pixels.",
        "Its solver trains biases at twice the rate and without decay, and divides the rate by 10 every 100,000 steps; "
        "here the optimizer is that of the settings.",
    ),
    input_size=227,
    columns=2,
    lrn=LRN(k=1.0, n=5, alpha=1e-4 / 5, beta=0.75),
    lrn_reads="all columns",
    convs=(
        Conv("conv1", 96, 11, ZEROS, stride=4, then=("relu", "lrn", POOL)),
        Conv("conv2", 256, 5, TENTHS, padding=2, reads="own column", then=("relu", "lrn", POOL)),
        Conv("conv3", 384, 3, ZEROS, padding=1, reads="all columns"),
        Conv("conv4", 384, 3, TENTHS, padding=1, reads="own column"),
        Conv("conv5", 256, 3, TENTHS, padding=1, reads="own column", then=("relu", POOL)),
    ),
    fully_connected=(
        FullyConnected("fc6", 4096, Gaussian(0.005, bias=0.1), dropout="of output"),
        FullyConnected("fc7", 4096, Gaussian(0.005, bias=0.1), dropout="of output"),
        FullyConnected("fc8", None, ZEROS, activation=None),
    ),
)
