#!/usr/bin/env python3
"""Draws the runs of `train_fashion --json FILE`: losses, experts used, domains and experts.

    python3 examples/plot_run.py runs.jsonl -o runs.png

Needs matplotlib (Debian: python3-matplotlib). Curves are means over the seeds of a gate, bands
reach from the smallest to the largest. A heat map shows one run: the first of its gate.
"""
import argparse
import json
import math
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  # after the choice of the backend

# One colour a gate, the same in every picture; after Okabe and Ito, which all readers tell apart.
COLOURS = {"single": "#999999", "hash": "#56B4E9", "oracle": "#000000", "topk": "#0072B2",
           "dselectk": "#009E73", "comet": "#D55E00", "dense": "#CC79A7"}
BLIND = ("single", "hash")  # gates that do not look at the image: high losses, nothing to map
FIELDS = ("gate", "seed", "num_experts", "accuracy", "experts_per_token", "domains",
          "domain_expert", "curve_step", "curve_cross_entropy", "curve_experts_per_token")


def load(path):
    """Runs by gate, in the order of the file."""
    gates = {}
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                run = json.loads(line)
                missing = [name for name in FIELDS if name not in run]
            except (ValueError, TypeError) as error:
                sys.exit(f"plot_run: {path}:{number} is no JSON object ({error})")
            if missing:
                sys.exit(f"plot_run: {path}:{number} has no {missing[0]}; "
                         "write the file with: train_fashion --json FILE")
            gates.setdefault(run["gate"], []).append(run)
    if not gates:
        sys.exit(f"plot_run: {path} has no runs")
    return gates


def mean(values):
    return sum(values) / len(values)


def label_ends(axes, ends):
    """Names at the right end of the curves, pushed apart where they would overlap."""
    low, high = axes.get_ylim()
    log = axes.get_yscale() == "log"
    to = math.log if log else float
    back = math.exp if log else float
    gap = (to(high) - to(low)) * .052
    last = None
    for y, gate, text in sorted(ends):
        place = to(y) if last is None else max(to(y), last + gap)
        axes.annotate(text, (1, back(place)), xycoords=("axes fraction", "data"), xytext=(5, 0),
                      textcoords="offset points", va="center", fontsize=9,
                      color=COLOURS.get(gate, "#444444"))
        last = place


def draw_curves(axes, gates, field, title, text, log=False):
    """One line a gate: the mean over seeds, with a band over them."""
    ends = []
    for gate, runs in gates.items():
        steps = runs[0]["curve_step"]
        same = [run[field] for run in runs if run["curve_step"] == steps]
        line = [mean(values) for values in zip(*same)]
        colour = COLOURS.get(gate, "#444444")
        axes.plot(steps, line, color=colour, linewidth=1.6)
        axes.fill_between(steps, [min(v) for v in zip(*same)], [max(v) for v in zip(*same)],
                          color=colour, alpha=.18, linewidth=0)
        ends.append((line[-1], gate, text(gate, line[-1])))
    if log:
        axes.set_yscale("log")
    axes.set_xlim(0, max(run["curve_step"][-1] for runs in gates.values() for run in runs))
    axes.set_title(title, fontsize=11, loc="left")
    axes.set_xlabel("step")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#E5E5E5", linewidth=.8)
    axes.set_axisbelow(True)
    label_ends(axes, ends)


def draw_map(axes, run, show_domains):
    """Mean weight that each domain gives each expert, in per cent; rows sum to 100."""
    experts = run["num_experts"]
    flat = run["domain_expert"]
    table = [[100 * x for x in flat[i:i + experts]] for i in range(0, len(flat), experts)]
    image = axes.imshow(table, cmap="Blues", vmin=0, vmax=60, aspect="auto")
    if experts <= 16:
        for row, values in enumerate(table):
            for column, value in enumerate(values):
                if value >= .5:
                    axes.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=8,
                              color="white" if value > 35 else "#222222")
    axes.set_xticks(range(experts) if experts <= 16 else [0, experts - 1])
    axes.set_yticks(range(len(table)), run["domains"] if show_domains else [])
    axes.tick_params(length=0, labelsize=8)
    axes.spines[:].set_visible(False)
    axes.set_title(f"{run['gate']}: accuracy {run['accuracy']:.3f}, "
                   f"{run['experts_per_token']:.2f} experts", fontsize=10, loc="left",
                   color=COLOURS.get(run["gate"], "#444444"))
    return image


def draw(gates, path):
    maps = [gate for gate in gates if gate not in BLIND] or list(gates)
    columns = min(len(maps), 3)
    rows = -(-len(maps) // columns)
    figure = plt.figure(figsize=(13, 4.6 + 2.3 * rows), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=[4.2, 2.3 * rows + .4])

    left, right = top.subplots(1, 2)
    seeds = max(len(runs) for runs in gates.values())
    note = f" (mean and range of {seeds} seeds)" if seeds > 1 else ""
    draw_curves(left, gates, "curve_cross_entropy", "Training loss: cross-entropy" + note,
                lambda gate, y: f"{gate} {y:.2f}", log=True)
    ticks = [.4, .5, .6, .8, 1, 1.5, 2]
    left.set_yticks(ticks, [f"{tick:g}" for tick in ticks], minor=False)
    left.minorticks_off()
    used = {gate: runs for gate, runs in gates.items() if gate not in BLIND + ("oracle",)} or gates
    draw_curves(right, used, "curve_experts_per_token", "Experts used per image, in training",
                lambda gate, y: f"{gate} {y:.2f}")
    right.set_ylim(bottom=0)

    bottom.suptitle("Weight that each domain gives each expert, in %: one test run", fontsize=11,
                    x=.008, ha="left")
    all_axes = bottom.subplots(rows, columns, squeeze=False)
    for axes in all_axes.flat[len(maps):]:
        axes.set_visible(False)
    for i, gate in enumerate(maps):
        image = draw_map(all_axes.flat[i], gates[gate][0], show_domains=i % columns == 0)
        if i + columns >= len(maps):
            all_axes.flat[i].set_xlabel("expert", fontsize=9)
    bottom.colorbar(image, ax=list(all_axes.flat), shrink=.8, pad=.01, label="%", extend="max")
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", help="file of train_fashion --json")
    parser.add_argument("-o", "--output", default="runs.png",
                        help="picture; its ending says the format (default: %(default)s)")
    arguments = parser.parse_args()
    try:
        draw(load(arguments.runs), arguments.output)
    except OSError as error:
        sys.exit(f"plot_run: {error}")


if __name__ == "__main__":
    main()
