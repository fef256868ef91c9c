"""What a data set may be, how it may be read, and in which order: names, without the code behind them."""

SOURCE_KINDS = ("auto", "folder", "cifar10", "cifar100", "parquet", "packed", "webdataset", "demo")
BACKENDS = ("auto", "memory", "nvimgcodec", "dali", "torch")
ORDERS = ("permutation", "block")
REMOTE_KINDS = ("auto", "folder", "packed", "webdataset")
"""Kinds that are read from a URI as well as from a folder."""
ORIENTATIONS = ("exif", "tiff")
DEEP_SAMPLES = ("scaled", "clipped")
"""Rules of `dataloading.pixel_rules`."""
