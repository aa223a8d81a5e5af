#!/usr/bin/env python3
"""Compares files of `train_fashion --dump`: losses and weights.

    compare_dumps.py {max|norm} TOLERANCE REFERENCE OTHER...

max: the largest difference relative to the largest value. norm: the same of 2-norms.
"""
import json
import math
import sys


def load(path):
    with open(path) as file:
        return json.load(file)


def difference(a, b, kind):
    if len(a) != len(b) or not all(map(math.isfinite, a + b)):
        return math.inf
    size = math.hypot if kind == "norm" else lambda *values: max(map(abs, values), default=0)
    return size(*(x - y for x, y in zip(a, b))) / (size(*a) or 1)


kind, tolerance, first, *others = sys.argv[1:]
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
        found = difference(reference[name], other[name], kind)
        verdict = "ok" if found <= float(tolerance) else "TOO LARGE"
        ok = ok and found <= float(tolerance)
        print(f"{path}: {name}: {found:.1e} {verdict}")
sys.exit(0 if ok else 1)
