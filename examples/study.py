"""What studies of many runs share: a file of JSON lines, one a run, that an interrupted study goes on
from, and means with their standard errors.
"""
import argparse
import concurrent.futures
import json
import math
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile


def fail(text):
    sys.exit(f"{pathlib.Path(sys.argv[0]).stem}: {text}")


def find_program(name):
    """The program of the newest build."""
    builds = pathlib.Path(__file__).resolve().parents[1].glob(f"build/*/examples/{name}")
    return str(max(builds, key=lambda path: path.stat().st_mtime, default=name))


def positive(text):
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is below 1")
    return value


def load(path, fields, key_of):
    """Results by key. Cuts off a line that an interruption left incomplete. `fields`: names and
    values that all results of the file have."""
    results = {}
    if not path.exists():
        return results
    text = path.read_bytes()
    if text and not text.endswith(b"\n"):
        text = text[:text.rfind(b"\n") + 1]
        path.write_bytes(text)
    for number, line in enumerate(text.decode().splitlines(), 1):
        try:
            result = json.loads(line)
            key = key_of(result)
        except (ValueError, KeyError, TypeError) as error:
            fail(f"{path}:{number} is no result of this program ({error})")
        for name, value in fields.items():
            if result.get(name) != value:
                fail(f"{path}:{number} has {name}={result.get(name)}, not {value}; "
                     "choose another file with --results")
        results[key] = result
    return results


def run_missing(keys, path, results, run, jobs, describe):
    """Results of all keys, in their order: those that are not in `results` by run(key), which go to
    the end of the file at `path`, `jobs` of them at a time.
    @param describe  a few words on a result"""
    missing = [key for key in keys if key not in results]
    print(f"{len(keys)} runs, {len(keys) - len(missing)} of them in {path}", flush=True)
    with open(path, "a", encoding="utf-8") as file, \
            concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        futures = {pool.submit(run, key): key for key in missing}
        try:
            for number, future in enumerate(concurrent.futures.as_completed(futures), 1):
                key, result = futures[future], future.result()
                file.write(json.dumps(result) + "\n")
                file.flush()
                results[key] = result
                print(f"{number}/{len(missing)} {' '.join(map(str, key))}: {describe(result)}",
                      flush=True)
        except (OSError, RuntimeError, ValueError) as error:
            pool.shutdown(cancel_futures=True)
            fail(error)
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
            fail(f"stopped; the same command goes on from {path}")
    return {key: results[key] for key in keys}


def run_program(command, allowed=(0,)):
    """Runs a program that takes --json, with one thread. @return its exit status and, if that is 0,
    the one object that it wrote; {} otherwise"""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "run.jsonl")
        command = command + ["--json", path]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                              env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False)
        if done.returncode not in allowed:
            raise RuntimeError(f"exit status {done.returncode}: {' '.join(command)}\n{done.stdout}")
        if done.returncode != 0:
            return done.returncode, {}
        return 0, json.loads(pathlib.Path(path).read_text(encoding="utf-8"))


def mean_and_error(values):
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0
    return statistics.fmean(values), error


def expected_best(values, scores, k):
    """The value whose score is the largest among k of the runs: the mean over all choices of k."""
    count = len(values)
    order = sorted(range(count), key=lambda i: -scores[i])
    # The i-th is the best of a choice if all others come from those behind it.
    return sum(values[run] * math.comb(count - 1 - i, k - 1)
               for i, run in enumerate(order)) / math.comb(count, k)


def print_table(rows):
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
