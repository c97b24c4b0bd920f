"""Training recipes: functions that return a complete, validated TrainConfig."""

from collections.abc import Callable
from typing import Any

from orchestrator.config.train import TrainConfig, make_config


def digits() -> TrainConfig:
    """A slim two-column net on the 1,797 digits bundled with scikit-learn; one worker per column.

    Source: the paper's net at a quarter of its width, on 64 pixels; no published result to compare with.
    Command: python jobs/train.py
    Cost: 0:57 on two cores of a Sapphire Rapids Xeon (2026-11-26), about half of it start-up.
    Result: 1.94 % top-1 error on the 360 digits of val at the end, 0.83 % at best, on that Xeon, where it repeats: the
    seed is fixed. On an AMD EPYC the same run ends at 1.11 % (2026-11-25).

    Differs from the paper: initialisation and pixel scale as in `imagenette`; less dropout for the slimmer layers; no
    mirroring, which would change the characters; no colour augmentation of grey images.
    """
    return make_config(
        data="digits",
        width=0.25,
        input_size=64,
        init="he",
        pixel_scale=1 / 64,
        dropout=0.2,
        flip=False,
        color_noise="none",
        epochs=30,
        global_batch_size=64,
        lr_patience=3,
        workers=2,
        layout="columns",
        device="cpu",  # the net is so small that a GPU would mostly wait
        precision="fp32",
    )


def imagenette() -> TrainConfig:
    """The full net of the paper on 9,469 photographs of 10 classes at 224 pixels.

    Source: the paper's net and rates; the data is Imagenette (fast.ai), ten classes of ImageNet.
    Command: python jobs/prepare.py --source imagenette --output shards/imagenette && python jobs/train.py imagenette
    Cost: with --epochs 10 --precision bf16 35 minutes on two cores of an AMD EPYC with AVX-512, 62 images/s, beside
    other work (2026-11-26); 2.7 minutes per epoch and 65 images/s in bf16 on those of a Sapphire Rapids Xeon
    (2026-11-21). 90 epochs would take 4 to 5 hours.
    Result: 28.2 % top-1 and 4.1 % top-5 error after these 10 epochs, training loss 0.857; 54.4 % after 2. The loss
    falls below ln(10) = 2.30 within 25 steps.

    Differs from the paper, because the dataset is 135 times smaller: weights are scaled by fan-in (init he, no biases
    of 1) and pixels to a standard deviation of about 1 (pixel_scale 1/64). With the paper's initialisation (--init
    paper --pixel-scale 1 --epochs 1, same machine and day) the net still guesses after an epoch of 74 steps: validation
    loss 2.3027, top-1 error 90 %; the run warns of it.
    """
    return make_config(data="shards/imagenette", init="he", pixel_scale=1 / 64)


def imagenet() -> TrainConfig:
    """The paper's run: 1.28 million photographs of 1,000 classes, 90 epochs (paper, 5).

    Source: paper, sections 3 to 5; its manual learning-rate schedule is a plateau rule here.
    Command: python jobs/prepare.py --source ILSVRC2012 --output shards/imagenet && python jobs/train.py imagenet
    Cost: 90 epochs of 1.28 million images at 4.4 GFLOP each are 0.5 EFLOP; the paper took 5 to 6 days on two GTX 580.
    Not run in full here: neither the data nor a GPU was available.
    Result: expected as published, 40.7 % top-1 and 18.2 % top-5 error on ILSVRC-2012 val with ten crops (Table 2, one
    CNN); this recipe measures the centre crop, 1 to 1.5 points worse (Table 1's text).
    """
    return make_config(data="shards/imagenet")


def imagenet_1024() -> TrainConfig:
    """Eight workers' batch of 1,024 by the paper's own rule, its rate eight times as high.

    Source: Krizhevsky 2014, "One weird trick for parallelizing convolutional neural networks", arXiv 1404.5997: theory
    asks for the square root of 8, but 8 worked better.
    Command: python jobs/train.py imagenet-1024 --data shards/imagenet --workers 8 --layout hybrid
    Cost: the arithmetic of 90 epochs of 1.28 million images. Not run here: neither the data nor eight GPUs were
    available.
    Result: not reproduced here; published is 1 % more error than with batches of 128 (as Goyal et al. 2017, arXiv
    1706.02677, sum it up).

    Differs from its source: the net is torchvision's version of the one described there; logistic units and their loss
    are softmax and cross-entropy here; the rate drops at plateaus and not at fixed epochs; colours as in the paper of
    2012.
    """
    return imagenet().changed(preset="torchvision", global_batch_size=1024, lr=0.08)


def imagenet_lars_4096() -> TrainConfig:
    """Caffe's AlexNet with batches of 4,096 and LARS, in parts of 512, so that one GPU has room for it.

    Source: You, Gitman and Ginsburg 2017, "Large Batch Training of Convolutional Networks", arXiv 1708.03888, with the
    rates of the solver that its authors published (github.com/borisgin/nvcaffe, models/bvlc_alexnet/solver.prototxt).
    Command: python jobs/train.py imagenet-lars-4096 --data shards/imagenet
    Cost: 100 epochs of 1.28 million images. Not run here: neither the data nor a GPU was available.
    Result: not reproduced here; published is no loss in accuracy up to batches of 8,192 (abstract), where their
    baseline has 42.4 % top-1 error; with linear scaling alone it is 46.9 % at 4,096 and 55.2 % at 8,192.

    For 8,192 they have the same rate: --global-batch-size 8192 --accumulate 16; for 512, --lr 2 --accumulate 1. Their
    32,768 is of AlexNet-BN, with batch normalisation in the place of LRN: another net, which is not among the presets.

    Differs from its source: the rate drops at plateaus, where theirs falls to 0 as a polynomial of power 2; the warm-up
    is linear from near 0, theirs quadratic from 1; biases are not adapted (alexnet/lars.py says why), where theirs are.
    """
    return imagenet().changed(
        preset="caffe",
        color_noise="none",
        optimizer="lars",
        global_batch_size=4096,
        accumulate=8,
        lr=10.0,
        warmup_epochs=4.0,
        epochs=100,
    )


RECIPES: dict[str, Callable[[], TrainConfig]] = {
    "digits": digits,
    "imagenette": imagenette,
    "imagenet": imagenet,
    "imagenet-1024": imagenet_1024,
    "imagenet-lars-4096": imagenet_lars_4096,
}


def adapted(recipe: TrainConfig, given: dict[str, Any]) -> TrainConfig:
    """The recipe, ready to be changed by what the user gave: its layout is for its own net, and with another preset it
    is chosen, unless the user names one."""
    is_another = given.get("preset", recipe.preset) != recipe.preset
    return recipe.changed(layout="auto") if is_another and "layout" not in given else recipe
