"""examples/python: the training program lowers its loss, compiled and not; modules save and load."""

import pathlib
import re
import subprocess
import sys
import unittest

import support
from support import torch

FOLDER = pathlib.Path(__file__).resolve().parents[2] / "examples" / "python"
sys.path.insert(0, str(FOLDER))
import perseid  # noqa: E402  (the folder is known only now)


def train(*arguments):
    """Losses that train.py prints."""
    command = [sys.executable, "-B", str(FOLDER / "train.py"), "--log-interval", "10", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise AssertionError(done.stdout + done.stderr)
    return [float(loss) for loss in re.findall(r"\| loss ([0-9.]+) \|", done.stdout)]


def gate_classes():
    classes = {cls for cls in vars(perseid).values() if isinstance(cls, type)}
    return {cls for cls in classes if issubclass(cls, perseid.Gate) and cls.operation}


class Train(unittest.TestCase):
    def test_loss_falls(self):
        for gate in ("topk", "topk-bias", "remoe", "comet"):
            losses = train("--gate", gate, "--steps", "120", "--tokens", "512")
            self.assertLess(losses[-1], 0.6 * losses[0], gate)

    def test_compiled_prints_the_same(self):
        arguments = ("--steps", "5", "--tokens", "64", "--log-interval", "1")
        self.assertEqual(train(*arguments), train(*arguments, "--compile", "aot_eager"))


class Modules(unittest.TestCase):
    def test_every_gate_is_wrapped(self):
        gates = {name for name in support.operations() if name.endswith("_gate")}
        self.assertEqual({cls.operation for cls in gate_classes()}, gates)

    def test_losses_are_named(self):
        for cls in gate_classes() - {perseid.HashGate}:
            layer = perseid.MoELayer(cls(4, 3), 4, 8)
            output, routing = layer(torch.randn(2, 5, 4))
            self.assertEqual(output.shape, (2, 5, 4))
            self.assertEqual(routing.losses.numel(), len(cls.loss_names), cls.__name__)

    def test_base_keeps_the_token(self):
        gate = perseid.BaseGate(4, 3).eval()
        layer = perseid.MoELayer(gate, 4, 8)
        tokens, valid = torch.randn(6, 4), torch.tensor([True, False, True, True, False, True])
        output, routing = layer(tokens, valid=valid)
        alpha = (tokens @ gate.weight.T).max(1).values.sigmoid()[:, None]
        expected = layer.experts(tokens, routing) + (1 - alpha) * valid[:, None] * tokens
        torch.testing.assert_close(output, expected)

    def test_state(self):
        layer = perseid.MoELayer(perseid.TopKGate(4, 3, bias_update_rate=0.5), 4, 8)
        tokens = torch.randn(7, 4)
        _, routing = layer(tokens)
        layer.gate.after_step(routing)
        lack = (7 * 2 / 3 - routing.tokens_per_expert).sign()
        self.assertTrue(torch.equal(layer.gate.expert_bias, 0.5 * lack))
        other = perseid.MoELayer(perseid.TopKGate(4, 3, bias_update_rate=0.5), 4, 8)
        other.load_state_dict(layer.state_dict())
        self.assertTrue(torch.equal(other(tokens)[0], layer(tokens)[0]))

        gate = perseid.ReMoEGate(4, 3, top_k=1)
        with torch.no_grad():
            gate.weight.fill_(1.0)
        for tokens, expected in ((torch.ones(5, 4), 1.2e-8), (-torch.ones(5, 4), 1e-8)):
            gate.after_step(gate(tokens))
            self.assertAlmostEqual(gate.l1_coeff.item(), expected, delta=1e-15)

    def test_hash_gate(self):
        layer = perseid.MoELayer(perseid.HashGate(3, torch.tensor([2, 0])), 4, 8)
        _, routing = layer(torch.randn(2, 4), keys=torch.tensor([0, 0]))
        self.assertEqual(routing.tokens_per_expert.tolist(), [0, 0, 2])


if __name__ == "__main__":
    unittest.main(argv=[sys.argv[0], *sys.argv[1:]])
