"""Wrong arguments are exceptions with the library's text, never a read outside of a tensor."""

import sys
import unittest

import support
from support import torch


class Errors(unittest.TestCase):
    """The texts of the library arrive in Python."""

    @classmethod
    def setUpClass(cls):
        cls.ops = support.load()
        cls.tokens = torch.zeros(3, 4)
        cls.weight = torch.zeros(6, 4)

    def refused(self, text, call):
        with self.assertRaises(RuntimeError) as caught:
            call()
        self.assertIn(text, str(caught.exception))

    def test_gates(self):
        gate, tokens, weight = self.ops.top_k_gate, self.tokens, self.weight
        self.refused(
            "[top_k_gate] top_k=9 exceeds num_experts=6; choose top_k in [1, 6]",
            lambda: gate(tokens, weight, top_k=9),
        )
        self.refused(
            "[top_k_gate] score_function=tanh is none of softmax, sigmoid, sqrt_softplus",
            lambda: gate(tokens, weight, top_k=2, score_function="tanh"),
        )
        self.refused(
            "[top_k_gate] bias=Float[5] is not a floating tensor [6]",
            lambda: gate(tokens, weight, torch.zeros(5), top_k=2),
        )
        self.refused(
            "[top_k_gate] expert_bias=Float[7] is not a floating tensor [6]",
            lambda: gate(tokens, weight, None, torch.zeros(7), top_k=2),
        )
        self.refused("tokens=", lambda: gate(torch.zeros(3, 5), weight, top_k=2))
        self.refused("valid=", lambda: gate(tokens, weight, top_k=2, valid=torch.ones(3)))
        self.refused(
            "[comet_gate] leaf_bias=Float[3] is not a floating tensor [4]",
            lambda: self.ops.comet_gate(
                tokens, torch.zeros(2, 4), torch.zeros(2), torch.zeros(4, 4), torch.zeros(3),
                num_experts=2, top_k=2,
            ),
        )
        self.refused(
            "[hash_gate] table[1]=6 is outside [0, num_experts=6)",
            lambda: self.ops.hash_gate(torch.arange(3), torch.tensor([0, 6]), num_experts=6),
        )

    def test_routing(self):
        """A routing that was made by hand cannot make a kernel read outside of its tensors."""
        tokens, offsets = self.tokens, torch.tensor([0, 1, 2, 4], dtype=torch.int32)
        experts = torch.tensor([0, 1, 0, 1], dtype=torch.int32)
        permute, combine = self.ops.permute, self.ops.combine

        def with_expert(expert):
            wrong = experts.clone()
            wrong[1] = expert
            return lambda: permute(tokens, offsets, wrong, num_experts=2)

        self.refused("[permute] expert_idx=2 is outside [0, num_experts=2)", with_expert(2))
        self.refused("[permute] expert_idx=-1 is outside", with_expert(-1))
        self.refused(
            "[permute] token_offsets=4 is not between 0 and the 3 entries",
            lambda: permute(tokens, offsets, experts[:3], num_experts=2),
        )
        self.refused(
            "[permute] token_offsets=Int[4] is not int32 [num_tokens + 1 = 3]",
            lambda: permute(tokens[:2], offsets, experts, num_experts=2),
        )
        rows, places, _ = permute(tokens, offsets, experts, num_experts=2)
        self.refused("[combine] places=9", lambda: combine(rows, places + 9 - places, offsets))
        self.refused("is there twice", lambda: combine(rows, places * 0, offsets))
        self.refused(
            "[combine] weights=Double[4] is not Float[4]",
            lambda: combine(rows, places, offsets, torch.ones(4, dtype=torch.float64)),
        )
        self.refused("[combine] token_offsets=", lambda: combine(rows, places, offsets.flip(0)))

    def test_experts(self):
        offsets = torch.tensor([0, 1, 2, 3], dtype=torch.int32)
        experts, weights = torch.zeros(3, dtype=torch.int32), torch.ones(3)
        up, down = torch.zeros(2, 10, 4), torch.zeros(2, 4, 5)
        mlp = self.ops.grouped_mlp
        self.refused(
            "[grouped_mlp] up_proj=Float[2, 10, 4] is not a floating tensor [2, 5, 4]",
            lambda: mlp(self.tokens, offsets, experts, weights, up, down, gated=False),
        )
        self.refused(
            "[grouped_mlp] activation=tanh is none of silu, gelu, relu, identity",
            lambda: mlp(self.tokens, offsets, experts, weights, up, down, activation="tanh"),
        )
        self.refused(
            "[grouped_mlp] down_proj=Double differs from tokens=Float; convert one of them",
            lambda: mlp(self.tokens, offsets, experts, weights, up, down.double()),
        )
        self.refused(
            "[grouped_mlp] weights=Double is not Float",
            lambda: mlp(self.tokens, offsets, experts, weights.double(), up, down),
        )

    def test_second_derivative(self):
        tokens = self.tokens.clone().requires_grad_()
        weights, *_ = self.ops.top_k_gate(tokens, self.weight, top_k=2)
        (grad,) = torch.autograd.grad(weights.square().sum(), tokens, create_graph=True)
        with self.assertRaisesRegex(RuntimeError, "top_k_gate_backward is not implemented"):
            grad.sum().backward()


if __name__ == "__main__":
    unittest.main(argv=[sys.argv[0], *sys.argv[1:]])
