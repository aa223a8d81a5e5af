"""permute, combine and grouped_mlp: opcheck, gradcheck, and a loop over experts in PyTorch."""

import sys
import unittest

import support
from support import leaf, torch

ops = support.load()
T, D, E, F = 7, 5, 4, 3
VALID = torch.tensor([1, 0, 1, 1, 1, 1, 0], dtype=torch.bool)


def routing(valid=None):
    """Experts 0..2 of 4 for each token but the masked ones, in tables with a tail."""
    tokens, weight = leaf(T, D, seed=7), leaf(E, D, seed=8)
    bias = torch.tensor([0.0, 0, 0, -1000])
    weights, experts, offsets, *_ = ops.top_k_gate(tokens, weight, bias, top_k=2, valid=valid)
    return weights.detach().requires_grad_(), experts, offsets


def token_of(offsets):
    return torch.repeat_interleave(torch.arange(offsets.numel() - 1), offsets.diff())


def mlp_tensors(gated=True, bias=True):
    width = 2 * F if gated else F
    tensors = [leaf(E, width, D, seed=1), leaf(E, D + 1, F, seed=2)]
    return tensors + ([leaf(E, width, seed=3), leaf(E, D + 1, seed=4)] if bias else [])


class Movement(unittest.TestCase):
    def test_opcheck(self):
        for valid in (None, VALID):
            weights, experts, offsets = routing(valid)
            torch.library.opcheck(ops.permute, (leaf(T, D), offsets, experts), {"num_experts": E})
            rows, places, _ = ops.permute(leaf(T, D), offsets, experts, num_experts=E)
            rows = rows.detach().requires_grad_()
            torch.library.opcheck(ops.combine, (rows, places, offsets))
            torch.library.opcheck(ops.combine, (rows, places, offsets, weights))
            grad = leaf(T, D).detach()
            arguments = support.detached([grad, rows, places, offsets, weights])
            torch.library.opcheck(ops.combine_backward, arguments)
            torch.library.opcheck(ops.combine_backward, arguments[:4])

    def test_gradcheck(self):
        for valid in (None, VALID):
            weights, experts, offsets = routing(valid)

            def there_and_back(tokens, weights, experts=experts, offsets=offsets):
                rows, places, _ = ops.permute(tokens, offsets, experts, num_experts=E)
                return ops.combine(rows.square(), places, offsets, weights)

            self.assertTrue(torch.autograd.gradcheck(there_and_back, (leaf(T, D), weights)))

    def test_rows_by_expert(self):
        tokens = torch.arange(T * D).view(T, D).float() + 1
        for valid in (None, VALID):
            _, experts, offsets = routing(valid)
            rows, places, expert_offsets = ops.permute(tokens, offsets, experts, num_experts=E)
            total = int(offsets[-1])
            for e in range(E):
                begin, end = expert_offsets[e : e + 2].tolist()
                chosen = token_of(offsets)[experts[:total] == e]
                self.assertTrue(torch.equal(rows[begin:end], tokens[chosen]))
            self.assertTrue((rows[total:] == 0).all() and (places[total:] == -1).all())
            counts = offsets.diff().unsqueeze(1)
            self.assertTrue(torch.equal(ops.combine(rows, places, offsets), counts * tokens))

    def test_no_tokens(self):
        offsets, none = torch.zeros(1, dtype=torch.int32), torch.zeros(0, dtype=torch.int32)
        rows, places, expert_offsets = ops.permute(torch.ones(0, D), offsets, none, num_experts=E)
        self.assertEqual((rows.shape, expert_offsets.tolist()), ((0, D), [0] * (E + 1)))
        self.assertEqual(ops.combine(rows, places, offsets).shape, (0, D))


def by_loop(tokens, offsets, experts, weights, up, down, up_bias, down_bias, activation, gated):
    """The experts one after the other, as one would write them."""
    total = int(offsets[-1])
    token, out = token_of(offsets), torch.zeros(tokens.size(0), down.size(1), dtype=tokens.dtype)
    function = {
        "silu": torch.nn.functional.silu,
        "gelu": torch.nn.functional.gelu,
        "relu": torch.relu,
        "identity": lambda x: x,
    }[activation]
    for e in range(down.size(0)):
        chosen = (experts[:total] == e).nonzero().squeeze(1)
        hidden = tokens[token[chosen]] @ up[e].T
        if up_bias is not None:
            hidden = hidden + up_bias[e]
        if gated:
            gate, value = hidden.chunk(2, 1)
            hidden = function(gate) * value
        else:
            hidden = function(hidden)
        rows = hidden @ down[e].T
        if down_bias is not None:
            rows = rows + down_bias[e]
        out = out.index_add(0, token[chosen], rows * weights[chosen, None])
    return out


class GroupedMlp(unittest.TestCase):
    def test_opcheck(self):
        for valid, bias, gated in ((None, False, True), (VALID, True, False)):
            weights, experts, offsets = routing(valid)
            tensors = [leaf(T, D), offsets, experts, weights, *mlp_tensors(gated, bias)]
            torch.library.opcheck(ops.grouped_mlp, tensors, {"gated": gated})

    def test_opcheck_backward(self):
        weights, experts, offsets = routing(VALID)
        tensors = support.detached([leaf(T, D), offsets, experts, weights, *mlp_tensors()])
        output, pre = ops.grouped_mlp(*tensors)
        for wanted in ([True] * 6, [False, True, False, True, False, False]):
            arguments = [output, *tensors, pre, wanted]
            options = {"activation": "silu", "gated": True}
            torch.library.opcheck(ops.grouped_mlp_backward, arguments, options)
            self.assertEqual(len(ops.grouped_mlp_backward(*arguments, **options)), sum(wanted))

    def test_gradcheck(self):
        for activation, gated, bias in (("silu", True, True), ("gelu", False, False)):
            weights, experts, offsets = routing(VALID)

            def output(tokens, weights, *parameters, activation=activation, gated=gated):
                return ops.grouped_mlp(
                    tokens, offsets, experts, weights, *parameters,
                    activation=activation, gated=gated,
                )[0]

            leaves = (leaf(T, D), weights, *mlp_tensors(gated, bias))
            self.assertTrue(torch.autograd.gradcheck(output, leaves))

    def test_equals_loop(self):
        """Values and all gradients; expert 3 has no token and gets gradients of 0."""
        for valid in (None, VALID):
            for activation, gated, bias in (
                ("silu", True, True), ("gelu", True, False), ("relu", False, True),
                ("identity", False, False),
            ):
                results = []
                for function in (self.fused, by_loop):
                    weights, experts, offsets = routing(valid)
                    tensors = mlp_tensors(gated, bias)
                    tokens = leaf(T, D)
                    parameters = [*tensors, None, None][:4]
                    out = function(tokens, offsets, experts, weights, *parameters, activation, gated)
                    out.square().sum().backward()
                    results.append([out, *(x.grad for x in (tokens, weights, *tensors))])
                for actual, expected in zip(*results):
                    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
                self.assertTrue((results[0][3][3] == 0).all())

    @staticmethod
    def fused(tokens, offsets, experts, weights, up, down, up_bias, down_bias, activation, gated):
        return ops.grouped_mlp(
            tokens, offsets, experts, weights, up, down, up_bias, down_bias,
            activation=activation, gated=gated,
        )[0]

    def test_bfloat16(self):
        weights, experts, offsets = routing()
        tensors = [x.detach().bfloat16() for x in (leaf(T, D), *mlp_tensors())]
        out, _ = ops.grouped_mlp(
            tensors[0], offsets, experts, weights.detach().float(), *tensors[1:]
        )
        exact = self.fused(
            tensors[0].double(), offsets, experts, weights.detach(),
            *(x.double() for x in tensors[1:]), "silu", True,
        )
        self.assertEqual(out.dtype, torch.bfloat16)
        scale = exact.abs().max().item()
        torch.testing.assert_close(out.double(), exact, rtol=0, atol=0.02 * scale)


if __name__ == "__main__":
    unittest.main(argv=[sys.argv[0], *sys.argv[1:]])
