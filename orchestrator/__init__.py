from alexnet import __version__ as __version__
