"""assign against scipy.optimize.linear_sum_assignment: equal least cost.

  assignment_scipy_test.py ASSIGNMENT_COSTS

Sizes 1 to 64, rows <= columns; normal costs, whole ones with many ties, and large negative ones.
Exit code 77 tells ctest that the test was skipped, where there is no SciPy.
"""

import random
import subprocess
import sys

try:
    from scipy.optimize import linear_sum_assignment
except ImportError as error:
    print(f"SKIPPED: {sys.executable} cannot import scipy: {error}; pip install scipy")
    sys.exit(77)

DRAWS = {
    "normal": lambda: random.gauss(0, 1),
    "ties": lambda: float(random.randint(-3, 3)),
    "negative": lambda: -1e6 * random.random(),
}


def main():
    random.seed(1)
    problems = []
    for rows, columns in [(1, 1), (2, 2), (3, 3), (7, 7), (16, 16), (33, 33), (64, 64), (5, 9),
                          (40, 64)]:
        for kind, draw in DRAWS.items():
            problems.append((kind, [[draw() for _ in range(columns)] for _ in range(rows)]))
    text = []
    for _, cost in problems:
        text.append(f"{len(cost)} {len(cost[0])}")
        text += [" ".join(map(repr, row)) for row in cost]
    found = subprocess.run([sys.argv[1]], input="\n".join(text), capture_output=True, text=True,
                           check=True).stdout.split()
    assert len(found) == len(problems), f"{len(found)} costs for {len(problems)} problems"
    wrong = 0
    for (kind, cost), value in zip(problems, map(float, found)):
        expected = sum(cost[row][column] for row, column in zip(*linear_sum_assignment(cost)))
        size = sum(abs(x) for row in cost for x in row) / len(cost[0])
        if not abs(value - expected) <= 1e-12 * size:
            print(f"FAILED: {kind}, {len(cost)} x {len(cost[0])}: {value!r}, SciPy {expected!r}")
            wrong += 1
    print(f"{len(problems) - wrong} of {len(problems)} costs are SciPy's")
    sys.exit(wrong > 0)


main()
