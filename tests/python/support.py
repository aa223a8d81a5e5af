"""What the Python tests share: a skip with its reason where PyTorch is missing, and the library.

PERSEID_OPS names libperseid_ops.so. Exit code 77 tells ctest that the test was skipped.
"""

import os
import sys
import warnings

SKIPPED = 77
REQUIRED = (2, 11)


def skip(reason):
    print(f"SKIPPED: {reason}")
    sys.exit(SKIPPED)


warnings.filterwarnings("ignore", message="Failed to initialize NumPy")
try:
    import torch
except (ImportError, OSError) as error:
    skip(f"{sys.executable} cannot import torch: {error}; bash tests/run.sh --python installs it")
version = tuple(int(part) for part in torch.__version__.split(".")[:2])
if version != REQUIRED:
    skip(f"torch {torch.__version__} is not {REQUIRED[0]}.{REQUIRED[1]}, which the library was built for")

LIBRARY = os.environ["PERSEID_OPS"]


def load():
    torch.ops.load_library(LIBRARY)
    return torch.ops.perseid


def operations():
    """Names of all operations that the library has registered."""
    names = torch._C._dispatch_get_all_op_names()
    return sorted(name.removeprefix("perseid::") for name in names if name.startswith("perseid::"))


def leaf(*size, seed=0, scale=1.0):
    """Float64 normal values that want a gradient."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(*size, generator=generator, dtype=torch.float64)
    return values.mul_(scale).requires_grad_()


def detached(values):
    return [value.detach() if isinstance(value, torch.Tensor) else value for value in values]
