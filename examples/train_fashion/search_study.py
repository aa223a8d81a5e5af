#!/usr/bin/env python3
"""Does a search over the order of experts save trials when settings are tuned?

    python3 examples/train_fashion/search_study.py --task domains --epochs 2 --jobs 2

Random search over the learning rate and, of gates with switches, their width gamma and the
coefficient lambda of their entropy. A trial is one run of train_fashion, judged by its validation
cross-entropy. Each seed is a random search of its own: settings are drawn from (gate, seed, trial),
and the three searches over orders get the same ones. Results go to a file of JSON lines, one a run;
the same command continues an interrupted study.

The table shows the best loss among n trials: the mean over all choices of n of the trials that were
made, exactly, then mean and standard error over seeds. A trial that diverges counts as guessing,
ln 10. The picture needs matplotlib (Debian: python3-matplotlib).
"""
import argparse
import math
import pathlib
import random
import statistics
import sys

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import study  # noqa: E402  # of the folder above
from study import mean_and_error, positive  # noqa: E402

SEARCHES = ("none", "sinkhorn", "swap")
GATES = {"domains": ("hash", "topk", "dselectk", "comet"), "multi": ("topk", "dselectk", "comet")}
SWITCHES = ("dselectk", "comet")  # gates with gamma and lambda
# Log-uniform, around the defaults of the task.
RANGES = {"domains": {"lr": (1e-3, 3e-2), "gamma": (.1, 10), "entropy-coeff": (.01, 10)},
          "multi": {"lr": (1e-4, 1e-2), "gamma": (.1, 10), "entropy-coeff": (1e-4, 1)}}
GUESSING = math.log(10)
DIVERGED = 79  # exit status of the program
SHOWN = (1, 2, 4, 8, 16, 32)


def settings_of(task, gate, seed, trial):
    """What a trial tries, drawn from these four alone."""
    draw = random.Random(f"{task} {gate} {seed} {trial}")
    names = ["lr"] + (["gamma", "entropy-coeff"] if gate in SWITCHES else [])
    settings = {}
    for name in names:
        low, high = map(math.log, RANGES[task][name])
        settings[name] = float(f"{math.exp(draw.uniform(low, high)):.4g}")
    return settings


def protocol(arguments):
    """What all trials of a file have in common."""
    fields = {"task": arguments.task, "epochs": arguments.epochs, "until": arguments.perm_until,
              "scope": arguments.perm_scope, "interval": arguments.perm_interval}
    if arguments.task == "domains":
        fields["validation_images"] = arguments.validation_images
    if arguments.quick:
        fields["quick"] = True
    return fields


def key_of(result):
    return result["gate"], result["search"], result["seed"], result["trial"]


def score_of(task, run):
    """Validation cross-entropy of a run; of task multi the mean of both in the best epoch."""
    if task == "domains":
        return run["cross_entropy"]
    both = zip(run["validation_cross_entropy_top_left"],
               run["validation_cross_entropy_bottom_right"])
    return min((a + b) / 2 for a, b in both)


def command_of(arguments, gate, search, seed, settings):
    command = [arguments.program, "--task", arguments.task, "--gate", gate, "--seed", str(seed),
               "--threads", "1", "--plain", "--log-interval", "1000000"]
    if arguments.device:
        command += ["--device", arguments.device]
    if arguments.data:
        command += ["--data", arguments.data]
    if arguments.task == "domains":
        command += ["--validation-images", str(arguments.validation_images)]
    if arguments.quick:
        command += ["--train-iters", "6", "--global-batch-size", "32"]
    else:
        command += ["--epochs", str(arguments.epochs)]
    for name, value in settings.items():
        command += ["--" + name, repr(value)]
    if search != "none":
        scope = arguments.perm_scope
        command += ["--perm-search", search, "--perm-scope", scope,
                    "--perm-until", repr(arguments.perm_until)]
    if search == "swap":
        command += ["--perm-interval", str(arguments.perm_interval)]
    return command


def run_trial(arguments, key):
    gate, search, seed, trial = key
    settings = settings_of(arguments.task, gate, seed, trial)
    _, run = study.run_program(command_of(arguments, gate, search, seed, settings), (0, DIVERGED))
    result = {**protocol(arguments), "gate": gate, "search": search, "seed": seed, "trial": trial,
              **settings, "score": score_of(arguments.task, run) if run else None}
    for name in ("seconds", "seconds_per_epoch", "perm_searches", "perm_evaluations", "perm_moves",
                 "perm_changed", "perm_seconds"):
        if name in run:
            result[name] = run[name]
    return result


def run_all(arguments, path):
    keys = [(gate, search, seed, trial)
            for trial in range(arguments.trials) for seed in range(arguments.seeds)
            for gate in arguments.gates for search in SEARCHES]

    def describe(result):
        return "diverged" if result["score"] is None else f"{result['score']:.4f}"
    return study.run_missing(keys, path, study.load(path, protocol(arguments), key_of),
                             lambda key: run_trial(arguments, key), arguments.jobs, describe)


def curves_of(arguments, results, gate, search):
    """Best loss among n = 1, 2, ... trials, for each seed."""
    curves = []
    for seed in range(arguments.seeds):
        scores = [results[gate, search, seed, trial]["score"]
                  for trial in range(arguments.trials)]
        scores = [GUESSING if s is None else min(s, GUESSING) for s in scores]
        curves.append([study.expected_best(scores, [-s for s in scores], n) for n in range(1, arguments.trials + 1)])
    return curves


def mean_curve(curves):
    return [statistics.fmean(values) for values in zip(*curves)]


def trials_to(curve, target):
    """The least n whose mean best loss is at most the target; None if there is none."""
    return next((n for n, loss in enumerate(curve, 1) if loss <= target), None)


def saving(gate, search, with_search, without):
    """What the search saves, in a sentence."""
    trials = len(without[0])
    ours, others = mean_curve(with_search), mean_curve(without)
    gain, error = mean_and_error([b[-1] - a[-1] for a, b in zip(with_search, without)])
    pair = (f"best of {trials}: {ours[-1]:.4f} against {others[-1]:.4f}, "
            f"{'lower' if gain >= 0 else 'higher'} by {abs(gain):.4f}")
    pair += f" ±{error:.4f}" if len(without) > 1 else ""
    if ours[-1] < others[-1]:
        needed = trials_to(ours, others[-1])
        doubt = "; less than two standard errors" if len(without) > 1 and gain < 2 * error else ""
        return (f"{gate}, {search}: {needed} trials reach what {trials} reach without search, a "
                f"factor of {trials / needed:.2g} ({pair}{doubt})")
    needed = trials_to(others, ours[-1])
    return (f"{gate}, {search}: saves no trials; what {trials} trials with it reach, {needed} "
            f"reach without ({pair})")


def print_table(arguments, results):
    shown = [n for n in SHOWN if n <= arguments.trials]
    rows = [["gate", "search"] + [f"n={n}" for n in shown] + ["moved"]]
    sentences = []
    for gate in arguments.gates:
        curves = {search: curves_of(arguments, results, gate, search) for search in SEARCHES}
        for search in SEARCHES:
            cells = []
            for n in shown:
                mean, error = mean_and_error([curve[n - 1] for curve in curves[search]])
                cells.append(f"{mean:.4f}" + (f" ±{error:.4f}" if arguments.seeds > 1 else ""))
            runs = [r for r in results.values() if r["gate"] == gate and r["search"] == search]
            moved = sum(1 for r in runs if sum(r.get("perm_changed", [])) > 0)
            rows.append([gate, search] + cells + [f"{moved}/{len(runs)}"])
            if search != "none":
                sentences.append(saving(gate, search, curves[search], curves["none"]))
    print(f"\nbest validation cross-entropy among n trials, {arguments.seeds} seed(s); "
          "moved: runs whose order is another one at the end")
    study.print_table(rows)
    print()
    for sentence in sentences:
        print("* " + sentence)


def draw(arguments, results, path):
    try:
        import plot_run  # chooses the backend
        plt = plot_run.plt
    except ImportError:
        print("\nno picture: matplotlib is not here (Debian: python3-matplotlib)")
        return
    styles = {"none": ("#222222", "o", "no search"), "sinkhorn": ("#E69F00", "s", "sinkhorn"),
              "swap": ("#0072B2", "^", "swap")}
    shown = [n for n in SHOWN if n <= arguments.trials]
    figure, (upper, lower) = plt.subplots(
        2, len(arguments.gates), squeeze=False, layout="constrained", sharex=True,
        height_ratios=(3, 2), figsize=(3.6 * len(arguments.gates) + .6, 6.4))

    def draw_line(axes, search, curves, shift):
        colour, marker, label = styles[search]
        points = [mean_and_error([curve[n - 1] for curve in curves]) for n in shown]
        # Side by side, so that error bars do not hide each other.
        axes.errorbar([n * shift for n in shown], [mean for mean, _ in points],
                      yerr=[error for _, error in points], color=colour, marker=marker,
                      markersize=4.5, linewidth=1.4, elinewidth=1, capsize=2, label=label)

    for above, below, gate in zip(upper, lower, arguments.gates):
        curves = {search: curves_of(arguments, results, gate, search) for search in SEARCHES}
        for search, shift in zip(SEARCHES, (.97, 1, 1.03)):
            draw_line(above, search, curves[search], shift)
            if search == "none":
                continue
            # Of the same seed and settings, so that their luck is not in the error.
            draw_line(below, search, [[a - b for a, b in zip(*pair)]
                                      for pair in zip(curves[search], curves["none"])], shift)
        below.axhline(0, color=styles["none"][0], linewidth=1)
        above.set_title(gate, fontsize=11, loc="left", color=plot_run.COLOURS[gate])
        for axes in (above, below):
            axes.set_xscale("log", base=2)
            axes.set_xticks(shown, [str(n) for n in shown])
            axes.minorticks_off()
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(axis="y", color="#E5E5E5", linewidth=.8)
            axes.set_axisbelow(True)
        below.set_xlabel("trials")
    upper[0].set_ylabel("best validation cross-entropy")
    lower[0].set_ylabel("difference to no search")
    upper[0].legend(frameon=False, fontsize=9)
    seeds = f", mean and standard error of {arguments.seeds} seeds" if arguments.seeds > 1 else ""
    figure.suptitle(f"Random search, task {arguments.task}: best of n trials{seeds}", fontsize=11,
                    x=.01, ha="left")
    figure.savefig(path, dpi=110)
    print(f"\n{path}")


def parse():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=sorted(GATES), default="domains")
    parser.add_argument("--gates", nargs="+", help="default: all with a search that suits the task")
    parser.add_argument("--trials", type=positive, default=32)
    parser.add_argument("--seeds", type=positive, default=5, help="0 to N-1 (default: %(default)s)")
    parser.add_argument("--epochs", type=positive, default=2,
                        help="of a trial (default: %(default)s)")
    parser.add_argument("--jobs", type=positive, default=1, help="trials at a time, a thread each")
    parser.add_argument("--perm-until", type=float, default=.1)
    parser.add_argument("--perm-scope", default="shared", choices=("shared", "per_gate"))
    parser.add_argument("--perm-interval", type=int, default=0)
    parser.add_argument("--validation-images", type=positive, default=10000,
                        help="of task domains, the last training images (default: %(default)s)")
    parser.add_argument("--results", help="file of JSON lines (default: search_TASK.jsonl)")
    parser.add_argument("-o", "--output", help="picture (default: search_TASK.png)")
    parser.add_argument("--program", default=study.find_program("train_fashion"), help="(default: %(default)s)")
    parser.add_argument("--device", help="as of train_fashion")
    parser.add_argument("--data", help="as of train_fashion")
    parser.add_argument("--quick", action="store_true",
                        help="two trials of one seed with a few steps, to see that all of it works")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.trials, arguments.seeds = 2, 1
        arguments.validation_images = min(arguments.validation_images, 64)
    arguments.gates = arguments.gates or list(GATES[arguments.task])
    for gate in arguments.gates:
        if gate not in GATES[arguments.task]:
            parser.error(f"--gates: {gate} is not one of {' '.join(GATES[arguments.task])}")
    return arguments


def main():
    arguments = parse()
    path = pathlib.Path(arguments.results or f"search_{arguments.task}.jsonl")
    try:
        results = run_all(arguments, path)
        print_table(arguments, results)
        draw(arguments, results, arguments.output or f"search_{arguments.task}.png")
    except OSError as error:
        study.fail(error)


if __name__ == "__main__":
    main()
