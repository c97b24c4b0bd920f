"""Convert a trained net to one file, or the weights of others to a net that can be used here.

    python jobs/convert.py RUN --to net.safetensors
    python jobs/convert.py RUN --to net.onnx --softmax
    python jobs/convert.py alexnet.pth --to net.safetensors --classes imagenet.txt

MODEL is the name of a run or a search, its folder, a checkpoint, runs:/RUN_ID/model or models:/NAME@ALIAS in MLflow, or
a file: .safetensors of this program, .pth or .safetensors of torchvision's AlexNet, .caffemodel of BVLC AlexNet. The
format of FILE is one of
    safetensors   the weights, with the classes and the mean image, which every command reads as a MODEL
    torchvision   a state dict for torchvision.models.alexnet, of preset torchvision
    caffemodel    weights for Caffe, of preset caffe
    onnx          a graph from pixels to scores; compared with the net where onnxruntime is installed
"""

import argparse
import tempfile
from pathlib import Path

from alexnet import weights
from alexnet.onnx_graph import Differs
from orchestrator.base.environment import default_output
from orchestrator.base.exits import JobError, one_line
from orchestrator.base.shown import count_of, quoted
from orchestrator.cli.flags import Parser, run
from orchestrator.models.find import find_model


def parser() -> Parser:
    flags = Parser("convert", __doc__)
    flags.add_argument("model", metavar="MODEL", help="a trained net, or a file of weights")
    flags.add_argument("--to", required=True, metavar="FILE", help="the file to write")
    flags.add_argument("--as", dest="format", choices=tuple(dict.fromkeys(weights.FORMATS.values())),
                       help="its format (default: by the extension of FILE)")  # fmt: skip
    flags.add_argument("--classes", metavar="FILE", help="names of the classes, one a line, in the order of the "
                       "outputs; the files of others have none")  # fmt: skip
    flags.add_argument("--softmax", action="store_true", help="with onnx: end in probabilities instead of scores")
    flags.add_argument("--overwrite", action="store_true", help="replace FILE")
    return flags


def main(flags: Parser, args: argparse.Namespace) -> int:
    with tempfile.TemporaryDirectory(prefix="models-") as into:
        try:
            file = _output(args)
            if args.softmax and weights.format_of(file, args.format) != "onnx":
                raise ValueError("--softmax: only --as onnx has it, the other formats are weights alone")
            found = find_model(args.model, Path(into), default_output())
            trained = found.load()
            if args.classes:
                trained = weights.with_classes(trained, _classes(args.classes, trained.net.num_classes))
            remarks = weights.write(trained, file, args.format, softmax=args.softmax)
        except ValueError as error:
            flags.error(str(error))
        except Differs as error:
            raise JobError(f"{file}: not written: {error}") from None
        except OSError as error:
            raise JobError(f"--to {args.to}: {error.strerror or error}") from None
    net = trained.net
    print(one_line(f"{found.name}: preset {net.preset.name}, {count_of(net.num_classes, 'class', 'classes')}, "
                   f"{net.input_size} pixels"))  # fmt: skip
    print(f"  wrote {one_line(str(file))}, {file.stat().st_size / 1e6:.1f} MB")
    if not trained.description.classes:
        print("  it has no names of its classes, which other commands compare with the data's: give --classes FILE")
    for remark in remarks:
        print(f"  it {one_line(remark)}")
    return 0


def _output(args: argparse.Namespace) -> Path:
    """The file to be written. Raises ValueError of one line where that cannot be."""
    if "://" in args.to:
        raise ValueError(f"--to {args.to}: give a file on this machine, without ://")
    file = Path(args.to).absolute()
    weights.format_of(file, args.format)
    if file.is_dir() or not file.parent.is_dir():
        raise ValueError(f"--to {file}: {'is a folder' if file.is_dir() else f'there is no folder {file.parent}'}")
    if file.exists() and not args.overwrite:
        raise ValueError(f"--to {file}: is already there; choose another name, or pass --overwrite")
    return file


def _classes(file: str, number: int) -> list[str]:
    """The lines of a file. Raises ValueError of one line where they are not names for so many classes."""
    try:
        lines = Path(file).read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is no text in UTF-8"
        raise ValueError(f"--classes {file}: {reason}") from None
    if empty := [place for place, line in enumerate(lines, 1) if not line.strip()]:
        raise ValueError(f"--classes {file}: line {empty[0]} is empty")
    if len(lines) != number:
        raise ValueError(f"--classes {file}: has {count_of(len(lines), 'line')}, the net has {number} outputs")
    names = [line.strip() for line in lines]
    if twice := [(place, name) for place, name in enumerate(names, 1) if name in names[: place - 1]]:
        place, name = twice[0]
        first = names.index(name) + 1
        where = f"lines {first} and {place}"
        raise ValueError(f"--classes {file}: {quoted(name)} is on {where}; each class has a name of its own")
    return names


def script() -> int:
    """Called by start.py: returns the exit status."""
    return run(parser, main)
