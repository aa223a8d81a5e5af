"""Loading libperseid_ops.so registers operations and does nothing else."""

import os
import re
import sys
import unittest

import support
from support import torch


def mapped_files():
    with open("/proc/self/maps") as maps:
        return {line.split()[-1] for line in maps if "/" in line}


class Load(unittest.TestCase):
    def test_loading_only_registers(self):
        self.assertEqual(support.operations(), [])
        files, threads = mapped_files(), len(os.listdir("/proc/self/task"))
        ops = support.load()
        new_files = mapped_files() - files
        self.assertTrue(any("libperseid_ops" in file for file in new_files))
        for file in mapped_files():
            self.assertNotRegex(file, r"libmpi|libopen-rte|libopen-pal|libpmix|/dev/nvidia")
        self.assertLessEqual({os.path.basename(file) for file in new_files}, {"libperseid_ops.so"})
        self.assertEqual(len(os.listdir("/proc/self/task")), threads)
        self.assertFalse(torch.cuda.is_initialized())
        self.assertIn("top_k_gate", support.operations())

        # Nor does a call.
        ops.top_k_gate(torch.zeros(3, 4), torch.zeros(2, 4), top_k=1)
        self.assertFalse(any(re.search("libmpi", file) for file in mapped_files()))
        self.assertFalse(torch.cuda.is_initialized())

    def test_needs_neither_mpi_nor_python(self):
        with open(support.LIBRARY, "rb") as library:
            content = library.read()
        # With CUDA it needs the libraries of that, which `import torch` loads as well.
        for name in (b"libmpi", b"libnccl", b"libpython", b"libtorch_python"):
            self.assertFalse(name in content, name)


if __name__ == "__main__":
    unittest.main(argv=[sys.argv[0], *sys.argv[1:]])
