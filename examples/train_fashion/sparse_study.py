#!/usr/bin/env python3
"""Sparse experts with a hidden layer, on task domains.

    python3 examples/train_fashion/sparse_study.py --part groups --jobs 2
    python3 examples/train_fashion/sparse_study.py --part experts --jobs 2

groups: experts that keep 1 of 8, 16 or 32 neighbours, by each method, against dense ones. experts: the
same number of non-zero weights as few dense experts, as more sparse ones, or as wider sparse ones, with
static and with moving masks. Results go to a file of JSON lines, one a run; the same command continues
an interrupted study.
"""
import argparse
import pathlib
import statistics
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import study  # noqa: E402  # of the folder above

MASKS = ("static", "set", "rigl")


def groups_cases():
    """By name: flags. 1024 pixels and 256 hidden units suit groups of up to 8 * 32."""
    shape = ["--d-ff", "256", "--pad-images"]
    cases = {"dense": shape}
    for size in (8, 16, 32):
        for method in ("nm_dst", "srste", "mdgf_lin", "mdgf_exp", "sdgf_step", "sdgf_geo"):
            cases[f"{method} 1:{size}"] = shape + ["--dst", method, "--dst-nm", f"1:{size}"]
    return cases


def experts_cases():
    cases = {"8 experts of 64, dense": ["--d-ff", "64"]}
    for title, shape in (("32 experts of 64", ["--num-experts", "32", "--d-ff", "64"]),
                         ("32 experts of 64, top-8",
                          ["--num-experts", "32", "--d-ff", "64", "--top-k", "8"]),
                         ("8 experts of 256", ["--d-ff", "256"])):
        for masks in MASKS:
            cases[f"{title}, {masks}"] = shape + ["--sparsity", "0.75", "--dst", masks]
    return cases


CASES = {"groups": groups_cases(), "experts": experts_cases()}
KEPT = ("accuracy", "cross_entropy", "num_experts", "d_ff", "nnz", "itop_rate",
        "experts_per_token", "max_vio", "domain_nmi", "seconds")


def protocol(arguments):
    return {"part": arguments.part, "gate": arguments.gate, "epochs": arguments.epochs,
            "lr": arguments.lr, "quick": arguments.quick}


def key_of(result):
    return result["case"], result["seed"]


def run_case(arguments, key):
    case, seed = key
    command = [arguments.program, "--gate", arguments.gate, "--seed", str(seed), "--threads", "1",
               "--plain", "--log-interval", "1000000", "--lr", repr(arguments.lr)]
    command += CASES[arguments.part][case]
    if {"set", "rigl", "nm_dst"} & set(command):
        command += ["--dst-every", "4" if arguments.quick else str(arguments.dst_every)]
    if arguments.quick:
        command += ["--train-iters", "12", "--global-batch-size", "32"]
    else:
        command += ["--epochs", str(arguments.epochs)]
    if arguments.data:
        command += ["--data", arguments.data]
    _, run = study.run_program(command)
    return {**protocol(arguments), "case": case, "seed": seed,
            **{name: run[name] for name in KEPT if name in run}}


def non_zeros(arguments, run):
    """Of the weights of all experts, without biases."""
    pixels = 1024 if arguments.part == "groups" else 784
    return run.get("nnz", run["num_experts"] * run["d_ff"] * (pixels + 10))


def print_results(arguments, results):
    cases = arguments.cases
    accuracy = {case: [100 * results[case, seed]["accuracy"] for seed in range(arguments.seeds)]
                for case in cases}
    rows = [["experts", "non-zero", "accuracy %", "against dense", "cross-entropy", "ever active",
             "domain nmi", "max_vio", "s a run"]]
    for case in cases:
        runs = [results[case, seed] for seed in range(arguments.seeds)]
        pairs = [a - b for a, b in zip(accuracy[case], accuracy[cases[0]])]

        def mean(name, digits, runs=runs):
            return f"{statistics.fmean(run[name] for run in runs):.{digits}f}"
        rows.append([case, f"{non_zeros(arguments, runs[0]):,}",
                     "{:.2f} ±{:.2f}".format(*study.mean_and_error(accuracy[case])),
                     "" if case == cases[0] else
                     "{:+.2f} ±{:.2f}".format(*study.mean_and_error(pairs)),
                     "{:.4f} ±{:.4f}".format(
                         *study.mean_and_error([run["cross_entropy"] for run in runs])),
                     mean("itop_rate", 3) if "itop_rate" in runs[0] else "",
                     mean("domain_nmi", 2), mean("max_vio", 2), mean("seconds", 0)])
    print(f"\ntask domains, gate {arguments.gate}, {arguments.epochs} epochs, {arguments.seeds} "
          "seed(s) with standard errors; against dense: of the same seed")
    study.print_table(rows)
    print()
    best = max(cases, key=lambda case: statistics.fmean(accuracy[case]))
    print(f"* best: {best}, {statistics.fmean(accuracy[best]):.2f} %")
    if arguments.part == "experts":
        for case in cases:
            if not case.endswith(", static"):
                continue
            for masks in ("set", "rigl"):
                moving = case.removesuffix("static") + masks
                gain, error = study.mean_and_error(
                    [a - b for a, b in zip(accuracy[moving], accuracy[case])])
                verdict = ("beats" if gain > error else "is worse than" if gain < -error
                           else "is level with")
                print(f"* {moving} {verdict} static masks: {gain:+.2f} ±{error:.2f} points")


def parse():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=sorted(CASES), default="experts")
    parser.add_argument("--gate", default="topk", help="(default: %(default)s)")
    parser.add_argument("--seeds", type=study.positive, default=5,
                        help="0 to N-1 (default: %(default)s)")
    parser.add_argument("--epochs", type=study.positive, default=3, help="(default: %(default)s)")
    parser.add_argument("--lr", type=float, default=8e-3, help="(default: %(default)s)")
    parser.add_argument("--dst-every", type=study.positive, default=25,
                        help="as of train_fashion (default: %(default)s)")
    parser.add_argument("--jobs", type=study.positive, default=1, help="runs at a time")
    parser.add_argument("--results", help="file of JSON lines (default: sparse_PART.jsonl)")
    parser.add_argument("--program", default=study.find_program("train_fashion"),
                        help="(default: %(default)s)")
    parser.add_argument("--data", help="as of train_fashion")
    parser.add_argument("--quick", action="store_true",
                        help="a few steps of some cases, one seed, to see that all of it works")
    arguments = parser.parse_args()
    arguments.cases = list(CASES[arguments.part])
    if arguments.quick:
        arguments.seeds = 1
        arguments.cases = arguments.cases[:1] + arguments.cases[-3:]
    return arguments


def main():
    arguments = parse()
    path = pathlib.Path(arguments.results or f"sparse_{arguments.part}.jsonl")
    keys = [(case, seed) for seed in range(arguments.seeds) for case in arguments.cases]
    try:
        results = study.run_missing(
            keys, path, study.load(path, protocol(arguments), key_of),
            lambda key: run_case(arguments, key), arguments.jobs,
            lambda result: f"{100 * result['accuracy']:.2f} %")
        print_results(arguments, results)
    except OSError as error:
        study.fail(error)


if __name__ == "__main__":
    main()
