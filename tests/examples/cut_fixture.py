#!/usr/bin/env python3
"""Cuts the fixture out of Fashion-MNIST: the first 256 training and 64 test images.

    cut_fixture.py /usr/share/datasets/fashion-mnist tests/examples/fashion-mnist
"""
import gzip
import struct
import sys

source, target = sys.argv[1:]
for part, count in (("train", 256), ("t10k", 64)):
    for kind, dims, item in (("images-idx3", 3, 784), ("labels-idx1", 1, 1)):
        name = f"{part}-{kind}-ubyte.gz"
        with gzip.open(f"{source}/{name}") as file:
            header = file.read(4 + 4 * dims)
            values = file.read(count * item)
        header = header[:4] + struct.pack(">I", count) + header[8:]
        with open(f"{target}/{name}", "wb") as raw, gzip.GzipFile(
            filename="", mode="wb", compresslevel=9, fileobj=raw, mtime=0
        ) as file:
            file.write(header + values)
