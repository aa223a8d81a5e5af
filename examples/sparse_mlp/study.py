#!/usr/bin/env python3
"""Sparse training of the tutorial's network: all methods, several seeds, one table and one picture.

    python3 examples/sparse_mlp/study.py --jobs 2

Results go to a file of JSON lines, one a run; the same command continues an interrupted study. The
last row is a random search among static masks: the one of highest accuracy on validation images
among --masks; with more --seeds than these the mean over all such choices. The picture needs
matplotlib (Debian: python3-matplotlib).
"""
import argparse
import pathlib
import statistics
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import study  # noqa: E402  # beside the folder of this file

METHODS = ("static", "set", "rigl", "srigl", "sampled", "neuron", "small_dense", "dense")
# After Okabe and Ito, which all readers tell apart.
COLOURS = {"static": "#999999", "set": "#D55E00", "rigl": "#0072B2", "srigl": "#56B4E9",
           "sampled": "#009E73", "neuron": "#CC79A7", "topkast": "#E69F00", "nm_dst": "#0072B2"}


def key_of(result):
    return result["dst"], result["seed"]


def percent(values):
    mean, error = study.mean_and_error(values)
    return f"{100 * mean:.2f}" + (f" ±{100 * error:.2f}" if len(values) > 1 else "")


def seeds_of(arguments, method):
    """A static run for each mask of the random search, too."""
    return max(arguments.seeds, arguments.masks) if method == "static" else arguments.seeds


def print_results(arguments, results):
    rows = [["--dst", "weights", "accuracy %", "after update", "best epoch", "all test images",
             "ever active", "s a run"]]
    for method in arguments.methods:
        runs = [results[method, seed] for seed in range(arguments.seeds)]
        after = [run["last_after"] for run in runs if run["last_after"] is not None]
        rows.append([method, f"{runs[0]['weights']:,}", percent([run["last"] for run in runs]),
                     percent(after) if after else "-", percent([run["best"] for run in runs]),
                     percent([run["last_all"] for run in runs]),
                     f"{statistics.fmean(run['itop_rate'] for run in runs):.3f}",
                     f"{statistics.fmean(run['seconds'] for run in runs):.0f}"])
    if "static" in arguments.methods:
        runs = [results["static", seed] for seed in range(seeds_of(arguments, "static"))]
        scores = [run["last_validation"] for run in runs]
        best = {name: study.expected_best([run[name] for run in runs], scores, arguments.masks)
                for name in ("last", "best", "last_all")}
        rows.append([f"best of {arguments.masks} static", f"{runs[0]['weights']:,}"]
                    + [f"{100 * best[name]:.2f}" if name else "-"
                       for name in ("last", None, "best", "last_all")]
                    + [f"{runs[0]['itop_rate']:.3f}",
                       f"{arguments.masks * statistics.fmean(r['seconds'] for r in runs):.0f}"])
        lasts = [100 * run["last"] for run in runs]
    print(f"\naccuracy: mean of the last 5 epochs, before updates; {arguments.seeds} seed(s), with "
          "standard errors")
    study.print_table(rows)
    if "static" in arguments.methods and len(lasts) > 1:
        print(f"\n{len(lasts)} static masks: {statistics.fmean(lasts):.2f} % on average, standard "
              f"deviation {statistics.stdev(lasts):.2f}, best {max(lasts):.2f} %")
        for method in arguments.methods:
            if method == "static":
                continue
            gains = [results[method, seed]["last_all"] - results["static", seed]["last_all"]
                     for seed in range(arguments.seeds)]
            gain, error = study.mean_and_error([100 * value for value in gains])
            verdict = ("beats static" if gain > error else "is worse than static"
                       if gain < -error else "is level with static")
            print(f"* {method} {verdict}: {gain:+.2f} ±{error:.2f} points on all test images")


def draw(arguments, results, path):
    try:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        print("\nno picture: matplotlib is not here (Debian: python3-matplotlib)")
        return
    moving = [m for m in arguments.methods if results[m, 0]["steps"]]
    figure, axes = plt.subplots(2, 2, layout="constrained", figsize=(10, 7))
    steps_per_epoch = arguments.train_images // 40

    for method in arguments.methods:
        curves = [results[method, seed]["accuracy"] for seed in range(arguments.seeds)]
        mean = [100 * statistics.fmean(values) for values in zip(*curves)]
        width = max(1, len(mean) // 40)  # a moving mean: single epochs jump by a point
        smooth = [statistics.fmean(mean[max(0, i - width + 1):i + 1]) for i in range(len(mean))]
        axes[0][0].plot(range(1, len(mean) + 1), smooth, label=method, linewidth=1.4,
                        color=COLOURS.get(method, "#000000"),
                        linestyle="--" if method == "small_dense" else "-")
    axes[0][0].set_title("accuracy on the test images, %", loc="left", fontsize=11)
    axes[0][0].set_ylim(bottom=66)

    for place, name, title in ((axes[0][1], "overlap", "active weights that were active first"),
                               (axes[1][1], "churn", "share that an update drops")):
        for method in moving:
            run = results[method, 0]
            layers = len(run["density"])
            epochs = [step / steps_per_epoch for step in run["steps"]]
            for layer, style in ((0, ":"), (1, "-"), (layers - 1, "--")):
                place.plot(epochs, run[name][layer::layers], color=COLOURS.get(method, "#000000"),
                           linestyle=style, linewidth=1.3)
        for layer, style in ((1, ":"), (2, "-"), (layers, "--")):
            place.plot([], [], color="#000000", linestyle=style, linewidth=1.3,
                       label=f"layer {layer}")
        place.set_title(title + " (one seed)", loc="left", fontsize=11)
        place.set_ylim(0, 1 if name == "overlap" else None)
    sparse = [m for m in arguments.methods if results[m, 0]["density"]]
    for i, method in enumerate(sparse):
        density = results[method, 0]["density"]
        axes[1][0].bar([layer + 1 + (i - len(sparse) / 2 + .5) * .8 / len(sparse)
                        for layer in range(len(density))], density, width=.8 / len(sparse),
                       color=COLOURS.get(method, "#000000"), label=method)
    axes[1][0].set_yscale("log")
    axes[1][0].set_xticks(range(1, 5))
    axes[1][0].set_xlabel("layer")
    axes[1][0].set_title("density of each layer", loc="left", fontsize=11)
    for place in axes.flat:
        place.spines[["top", "right"]].set_visible(False)
        if place is axes[0][0]:
            place.legend(frameon=False, fontsize=8, ncols=2, loc="lower right")
        else:
            place.legend(frameon=False, fontsize=8)
        if place is not axes[1][0]:
            place.set_xlabel("epoch")
    figure.savefig(path, dpi=110)
    print(f"\n{path}")


def parse():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), help="values of --dst")
    parser.add_argument("--seeds", type=study.positive, default=5,
                        help="0 to N-1 (default: %(default)s)")
    parser.add_argument("--masks", type=study.positive, default=10,
                        help="of the random search (default: %(default)s)")
    parser.add_argument("--epochs", type=study.positive, default=400)
    parser.add_argument("--train-images", type=study.positive, default=2000)
    parser.add_argument("--test-images", type=study.positive, default=1000)
    parser.add_argument("--jobs", type=study.positive, default=1, help="runs at a time")
    parser.add_argument("--results", default="sparse_mlp.jsonl", help="(default: %(default)s)")
    parser.add_argument("-o", "--output", default="sparse_mlp.png", help="(default: %(default)s)")
    parser.add_argument("--program", default=study.find_program("sparse_mlp"),
                        help="(default: %(default)s)")
    parser.add_argument("--data", help="as of sparse_mlp")
    return parser.parse_args()


def main():
    arguments = parse()

    def run(key):
        method, seed = key
        command = [arguments.program, "--dst", method, "--seed", str(seed), "--epochs",
                   str(arguments.epochs), "--train-images", str(arguments.train_images),
                   "--test-images", str(arguments.test_images)]
        return study.run_program(command + (["--data", arguments.data] if arguments.data else []))[1]

    path = pathlib.Path(arguments.results)
    fields = {"epochs": arguments.epochs, "train_images": arguments.train_images}
    keys = [(method, seed) for method in arguments.methods
            for seed in range(seeds_of(arguments, method))]
    try:
        results = study.run_missing(keys, path, study.load(path, fields, key_of), run,
                                    arguments.jobs, lambda result: f"{100 * result['last']:.2f} %")
        print_results(arguments, results)
        draw(arguments, results, arguments.output)
    except OSError as error:
        study.fail(error)


if __name__ == "__main__":
    main()
