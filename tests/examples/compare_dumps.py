#!/usr/bin/env python3
"""Compares files of `train_fashion --dump`: losses and weights, relative to the largest value.

    compare_dumps.py TOLERANCE REFERENCE OTHER...
"""
import json
import math
import sys


def load(path):
    with open(path) as file:
        return json.load(file)


def difference(a, b):
    if len(a) != len(b) or not all(map(math.isfinite, a + b)):
        return math.inf
    scale = max(map(abs, a), default=0) or 1
    return max((abs(x - y) for x, y in zip(a, b)), default=0) / scale


tolerance, first, *others = sys.argv[1:]
reference = load(first)
names = [name for name in reference if name not in ("gate", "ranks")]
ok = bool(others) and "losses" in names and any(name.startswith("experts.") for name in names)
for path in others:
    other = load(path)
    ok = ok and other.keys() == reference.keys()
    for name in names:
        if name.endswith(".shape"):
            ok = ok and reference[name] == other[name]
            continue
        found = difference(reference[name], other[name])
        verdict = "ok" if found <= float(tolerance) else "TOO LARGE"
        ok = ok and found <= float(tolerance)
        print(f"{path}: {name}: {found:.1e} {verdict}")
sys.exit(0 if ok else 1)
