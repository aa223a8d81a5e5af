"""Gates as operations: gradients, contracts of the dispatcher, and equality with plain PyTorch.

  every operation of a gate   torch.library.opcheck, gradcheck in float64 on weights and losses,
                              with and without masked tokens, with 0 tokens
  backward operations         opcheck on the arguments that autograd gives them
  formulas                    weights and losses as in a few lines of PyTorch
"""

import math
import sys
import unittest

import support
from support import leaf, torch

ops = support.load()
T, D, E, K = 9, 5, 6, 2
VALID = torch.tensor([1, 1, 0, 1, 1, 1, 0, 1, 1], dtype=torch.bool)


def comet_parameters(num_experts, top_k):
    return [
        leaf(top_k * (num_experts - 1), D, seed=1, scale=3),
        leaf(top_k * (num_experts - 1), seed=2),
        leaf(top_k * num_experts, D, seed=3),
        leaf(top_k * num_experts, seed=4),
    ]


def dselect_k_parameters(num_experts, top_k):
    bits = math.ceil(math.log2(num_experts))
    return [
        leaf(top_k * bits, D, seed=1, scale=3),
        leaf(top_k * bits, seed=2),
        leaf(top_k, D, seed=3),
        leaf(top_k, seed=4),
    ]


# name: list of (tensors by position, options). The first tensor has the tokens.
CASES = {
    "top_k_gate": [
        ([leaf(T, D), leaf(E, D, seed=1)], dict(top_k=K, z_loss_coeff=0.1, balance_coeff=0.1)),
        ([leaf(T, D), leaf(E, D, seed=1)], dict(top_k=1)),
        (
            [leaf(T, D), leaf(E, D, seed=1), leaf(E, seed=2), torch.linspace(-1, 1, E)],
            dict(top_k=3, score_function="sigmoid", route_scale=2.5, num_groups=3, topk_groups=2),
        ),
        (
            [leaf(T, D), leaf(E, D, seed=1)],
            dict(top_k=K, score_function="sqrt_softplus", normalization="all", layer_norm=True),
        ),
    ],
    "comet_gate": [
        (
            [leaf(T, D), *comet_parameters(E, K)],
            dict(num_experts=E, top_k=K, gamma=2.0, entropy_coeff=0.3, balance_coeff=0.2),
        ),
        ([leaf(T, D), *comet_parameters(5, 1)], dict(num_experts=5, top_k=1, layer_norm=False)),
    ],
    "dselect_k_gate": [
        (
            [leaf(T, D), *dselect_k_parameters(E, K)],
            dict(num_experts=E, top_k=K, gamma=20.0, entropy_coeff=0.3, balance_coeff=0.2),
        ),
        (
            [leaf(T, D), *dselect_k_parameters(5, 1)],
            dict(num_experts=5, top_k=1, renormalize=True, layer_norm=False, gamma=20.0),
        ),
    ],
    "expert_choice_gate": [
        ([leaf(T, D), leaf(E, D, seed=1)], dict(capacity_factor=2.0)),
        ([leaf(T, D), leaf(E, D, seed=1)], dict(capacity_factor=100.0, layer_norm=True)),
    ],
    "base_gate": [
        ([leaf(T, D), leaf(E, D, seed=1)], dict(training=True)),
        ([leaf(T, D), leaf(E, D, seed=1)], {}),
    ],
    "sinkhorn_gate": [
        ([leaf(T, D), leaf(E, D, seed=1)], dict(training=True)),
        ([leaf(T, D), leaf(E, D, seed=1)], dict(training=True, top_k=K, layer_norm=True)),
        ([leaf(T, D), leaf(E, D, seed=1)], dict(top_k=K)),
    ],
    "statistical_top_k_gate": [
        ([leaf(T, D), leaf(E, D, seed=1)], dict(top_k=K, balance_coeff=0.2)),
        ([leaf(T, D), leaf(E, D, seed=1)], dict(top_k=1, unbiased=True, cap=2, min_experts=0)),
    ],
    "noisy_top_k_gate": [
        (
            [leaf(T, D), leaf(E, D, seed=1), leaf(E, D, seed=2)],
            dict(top_k=K, training=True, step=5, importance_coeff=0.3, load_coeff=0.2),
        ),
        ([leaf(T, D), leaf(E, D, seed=1)], dict(top_k=K, training=True, noise_std=2.0)),
        ([leaf(T, D), leaf(E, D, seed=1)], dict(top_k=1)),
    ],
    "gshard_gate": [
        ([leaf(T, D), leaf(E, D, seed=1)], dict(training=True, z_loss_coeff=0.1)),
        ([leaf(T, D), leaf(E, D, seed=1)], dict(training=True, gumbel_second=True)),
        ([leaf(T, D), leaf(1, D, seed=1)], {}),
        (
            [leaf(T, D), leaf(E, D, seed=1)],
            dict(second_policy="threshold", normalize_after_drop=True),
        ),
    ],
    "remoe_gate": [
        ([leaf(T, D), leaf(E, D, seed=1), torch.tensor(0.5)], dict(top_k=K)),
        ([leaf(T, D), leaf(E, D, seed=1), torch.tensor(0.5)], dict(l1_balance=False)),
    ],
    "hash_gate": [
        ([torch.arange(T)], dict(num_experts=E, seed=3)),
        ([torch.arange(T)], dict(num_experts=E, num_hashes=3)),
        ([torch.arange(T), torch.tensor([5, 4, 3])], dict(num_experts=E)),
    ],
}


DIFFERENTIABLE = {
    "top_k_gate": ["tokens", "weight", "bias"],
    "comet_gate": ["tokens", "split_weight", "split_bias", "leaf_weight", "leaf_bias"],
    "noisy_top_k_gate": ["tokens", "weight", "noise_weight"],
    "gshard_gate": ["tokens", "weight"],
    "remoe_gate": ["tokens", "weight"],
    "dselect_k_gate": ["tokens", "code_weight", "code_bias", "selector_weight", "selector_bias"],
    "expert_choice_gate": ["tokens", "weight"],
    "base_gate": ["tokens", "weight"],
    "sinkhorn_gate": ["tokens", "weight"],
    "statistical_top_k_gate": ["tokens", "weight"],
    "hash_gate": [],
}


def calls():
    """All cases, then the same with masked tokens and with none."""
    for name, cases in CASES.items():
        for tensors, options in cases:
            yield name, tensors, options
        tensors, options = cases[0]
        yield name, tensors, dict(options, valid=VALID)
        first = tensors[0].detach()[:0]
        first = first.requires_grad_(first.is_floating_point())
        yield name, [first, *tensors[1:]], options


def differentiable(tensors):
    return [tensor for tensor in tensors if tensor.requires_grad]


class EveryGate(unittest.TestCase):
    def test_each_operation_has_a_case(self):
        gates = {name for name in support.operations() if name.endswith("_gate")}
        self.assertEqual(gates, set(CASES))

    def test_opcheck(self):
        for name, tensors, options in calls():
            with self.subTest(name, **options):
                torch.library.opcheck(getattr(ops, name), tensors, options)

    def test_opcheck_backward(self):
        for name, tensors, options in calls():
            backward = getattr(ops, name + "_backward")
            flags = [argument < len(tensors) for argument in range(len(DIFFERENTIABLE[name]))]
            with self.subTest(name, **options):
                weights, _, _, losses, _ = getattr(ops, name)(*tensors, **options)
                arguments = support.detached([weights, losses, flags, *tensors])
                torch.library.opcheck(backward, arguments, options)
                self.assertEqual(len(backward(*arguments, **options)), sum(flags))
                arguments[0] = None  # no gradient of the weights
                torch.library.opcheck(backward, arguments, options)

    def test_gradcheck(self):
        for name, tensors, options in calls():
            leaves = differentiable(tensors)
            if not leaves or tensors[0].size(0) == 0:
                continue

            def outputs(*leaves, name=name, tensors=tensors, options=options):
                values = iter(leaves)
                given = [next(values) if tensor.requires_grad else tensor for tensor in tensors]
                weights, _, _, losses, _ = getattr(ops, name)(*given, **options)
                return weights, losses

            with self.subTest(name, **options):
                self.assertTrue(torch.autograd.gradcheck(outputs, leaves))

    def test_routing(self):
        """Rows by descending weight, tails of -1 and 0, counts, empty rows of masked tokens."""
        for name, tensors, options in calls():
            with self.subTest(name, **options):
                weights, experts, offsets, losses, counts = getattr(ops, name)(*tensors, **options)
                num_tokens, total = tensors[0].size(0), int(offsets[-1])
                self.assertEqual(offsets.tolist(), sorted(offsets.tolist()))
                self.assertEqual((offsets.numel(), int(offsets[0])), (num_tokens + 1, 0))
                self.assertEqual(weights.shape, experts.shape)
                self.assertTrue((experts[total:] == -1).all() and (weights[total:] == 0).all())
                self.assertEqual(
                    torch.bincount(experts[:total].long(), minlength=counts.numel()).tolist(),
                    counts.tolist(),
                )
                self.assertTrue(torch.isfinite(losses).all())
                for t in range(num_tokens):
                    row = weights[offsets[t] : offsets[t + 1]]
                    self.assertTrue((row[:-1] >= row[1:]).all())
                    if "valid" in options and not options["valid"][t]:
                        self.assertEqual(row.numel(), 0)

    def test_threads(self):
        """The same bits for any number of threads."""
        before = torch.get_num_threads()
        try:
            for name, tensors, options in calls():
                results = []
                for threads in (1, 2):
                    torch.set_num_threads(threads)
                    results.append(getattr(ops, name)(*tensors, **options))
                for one, two in zip(*results):
                    self.assertTrue(torch.equal(one, two), name)
        finally:
            torch.set_num_threads(before)


def dense(weights, experts, offsets, num_experts):
    """[T, E] weights of a routing."""
    total = int(offsets[-1])
    token = torch.repeat_interleave(torch.arange(offsets.numel() - 1), offsets.diff())
    table = torch.zeros(offsets.numel() - 1, num_experts, dtype=weights.dtype)
    return table.index_put((token, experts[:total].long()), weights[:total])


class Formulas(unittest.TestCase):
    def close(self, actual, expected):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)

    def test_top_k_softmax(self):
        tokens, weight = leaf(T, D), leaf(E, D, seed=1)
        weights, experts, offsets, losses, counts = ops.top_k_gate(
            tokens, weight, top_k=K, aux_loss_coeff=0.1, z_loss_coeff=0.01
        )
        logits = tokens @ weight.T
        best = logits.topk(K)
        self.close(weights.view(T, K), best.values.softmax(1))
        self.assertEqual(experts.tolist(), best.indices.flatten().tolist())
        share = torch.bincount(best.indices.flatten(), minlength=E).double() / (T * K)
        self.close(losses[0], 0.1 * E * (share * logits.softmax(1).mean(0)).sum())
        self.close(losses[1], 0.01 * logits.logsumexp(1).square().mean())

    def test_top_k_sigmoid_with_expert_bias(self):
        tokens, weight, expert_bias = leaf(T, D), leaf(E, D, seed=1), torch.linspace(1, -1, E)
        weights, experts, *_ = ops.top_k_gate(
            tokens, weight, None, expert_bias, top_k=K, score_function="sigmoid", route_scale=2.5
        )
        scores = (tokens @ weight.T).sigmoid()
        chosen = (scores + expert_bias).topk(K).indices
        expected = scores.gather(1, chosen)
        expected = 2.5 * expected / expected.sum(1, keepdim=True)
        table = dense(weights, experts, torch.arange(0, T * K + 1, K), E)
        self.close(table, torch.zeros_like(table).scatter(1, chosen, expected))

    def test_share_of_the_tokens(self):
        """With tokens_global the losses of two ranks add up to their mean over all tokens."""
        tokens, weight = leaf(T, D), leaf(E, D, seed=1)
        options = dict(top_k=K, z_loss_coeff=0.01, aux_loss_coeff=0)
        whole = ops.top_k_gate(tokens, weight, **options)[3]
        parts = [
            ops.top_k_gate(part, weight, tokens_global=T, **options)[3]
            for part in (tokens[:4], tokens[4:])
        ]
        self.close(sum(parts), whole)

    def test_comet(self):
        num_experts, gamma = 6, 2.0
        tokens = leaf(T, D)
        parameters = comet_parameters(num_experts, K)
        weights, experts, offsets, losses, _ = ops.comet_gate(
            tokens, *parameters, num_experts=num_experts, top_k=K, gamma=gamma, entropy_coeff=0.3
        )
        split_weight, split_bias, leaf_weight, leaf_bias = parameters
        features = torch.nn.functional.layer_norm(tokens, [D]) / math.sqrt(D)
        u = ((features @ split_weight.T + split_bias) / gamma + 0.5).clamp(0, 1)
        left = (u * u * (3 - 2 * u)).view(T, K, num_experts - 1)

        def reach(node, mass, tree):
            if node >= num_experts - 1:
                return [mass]
            go_left = left[:, tree, node]
            return reach(2 * node + 1, mass * go_left, tree) + reach(
                2 * node + 2, mass * (1 - go_left), tree
            )

        reached = torch.stack(
            [torch.stack(reach(0, torch.ones(T).double(), k), 1) for k in range(K)], 1
        )
        logits = (features @ leaf_weight.T + leaf_bias).view(T, K, num_experts)
        joint = logits.exp() * reached
        expected = joint.sum(1) / joint.sum((1, 2))[:, None]
        self.close(dense(weights, experts, offsets, num_experts), expected)
        entropy = -(reached * (reached + 1e-6).log()).sum((1, 2)).mean()
        self.close(losses[0], 0.3 * entropy)

    def test_dselect_k(self):
        num_experts, bits, gamma = 6, 3, 2.0
        tokens = leaf(T, D)
        parameters = dselect_k_parameters(num_experts, K)
        weights, experts, offsets, losses, _ = ops.dselect_k_gate(
            tokens, *parameters, num_experts=num_experts, top_k=K, gamma=gamma, entropy_coeff=0.3
        )
        code_weight, code_bias, selector_weight, selector_bias = parameters
        features = torch.nn.functional.layer_norm(tokens, [D]) / math.sqrt(D)
        u = ((features @ code_weight.T + code_bias) / gamma + 0.5).clamp(0, 1)
        one = (u * u * (3 - 2 * u)).view(T, K, bits)
        choice = []
        for expert in range(num_experts):
            code = [(expert >> (bits - 1 - bit)) & 1 for bit in range(bits)]
            factors = [one[..., b] if bit else 1 - one[..., b] for b, bit in enumerate(code)]
            choice.append(torch.stack(factors).prod(0))
        choice = torch.stack(choice, 2)  # [T, K, E]
        mixture = (features @ selector_weight.T + selector_bias).softmax(1)
        self.close(
            dense(weights, experts, offsets, num_experts), (mixture[..., None] * choice).sum(1)
        )
        entropy = -(choice * (choice + 1e-6).log()).sum((1, 2)).mean()
        penalty = (1 / (1e-6 + choice.sum(2))).sum(1).mean()
        self.close(losses, torch.stack([0.3 * entropy, penalty, 0 * penalty]))

    def test_expert_choice(self):
        """Each expert takes round(2 T / E) tokens of largest softmax."""
        tokens, weight = leaf(T, D), leaf(E, D, seed=1)
        weights, experts, offsets, losses, counts = ops.expert_choice_gate(tokens, weight)
        scores = (tokens @ weight.T).softmax(1)
        self.assertEqual((counts.tolist(), losses.numel()), ([2 * T // E] * E, 0))
        chosen = scores.topk(2 * T // E, dim=0).indices
        expected = torch.zeros_like(scores).scatter(0, chosen, scores.gather(0, chosen))
        self.close(dense(weights, experts, offsets, E), expected)

    def test_base(self):
        """Loads that differ by at most one; no other balanced assignment of two tokens is better."""
        tokens, weight = leaf(T, D), leaf(E, D, seed=1)
        weights, experts, offsets, losses, counts = ops.base_gate(tokens, weight, training=True)
        scores = tokens @ weight.T
        self.assertEqual((offsets.tolist(), losses.numel()), (list(range(T + 1)), 0))
        self.assertLessEqual(counts.max() - counts.min(), 1)
        mine = scores[torch.arange(T), experts.long()]
        self.close(weights, mine.sigmoid())
        swapped = scores[:, experts.long()]  # [token, expert of another token]
        self.assertTrue((mine[:, None] + mine[None] >= swapped + swapped.T - 1e-12).all())
        _, best, *_ = ops.base_gate(tokens, weight)
        self.assertEqual(best.tolist(), scores.argmax(1).tolist())

    def test_sinkhorn(self):
        tokens, weight = leaf(T, D), leaf(E, D, seed=1)
        scores = (tokens @ weight.T).softmax(1)
        weights, experts, offsets, *_ = ops.sinkhorn_gate(tokens, weight, top_k=K)
        chosen = scores.topk(K, dim=1).indices
        expected = torch.zeros_like(scores).scatter(1, chosen, scores.gather(1, chosen))
        self.close(dense(weights, experts, offsets, E), expected)
        # In training the loads come closer to each other, and weights follow the same formula.
        weights, experts, offsets, _, balanced = ops.sinkhorn_gate(
            tokens, weight, top_k=K, training=True
        )
        plain = torch.bincount(chosen.flatten(), minlength=E)
        self.assertLess(balanced.max(), plain.max())
        table = dense(weights, experts, offsets, E)
        self.close(table, scores * (table > 0))

    def test_statistical_top_k(self):
        tokens, weight = leaf(T, D), leaf(E, D, seed=1)
        weights, experts, offsets, *_ = ops.statistical_top_k_gate(
            tokens, weight, top_k=K, min_experts=0
        )
        logits = tokens @ weight.T
        point = torch.special.ndtri(torch.tensor(1 - K / E, dtype=torch.float64))
        threshold = logits.mean(1) + point * logits.std(1, unbiased=False)
        self.close(dense(weights, experts, offsets, E), (logits - threshold[:, None]).relu())

    def test_remoe(self):
        tokens, weight = leaf(T, D), leaf(E, D, seed=1)
        weights, experts, offsets, losses, counts = ops.remoe_gate(
            tokens, weight, torch.tensor(0.5), top_k=K
        )
        expected = (tokens @ weight.T).relu()
        self.close(dense(weights, experts, offsets, E), expected)
        share = (expected > 0).sum(0).double() / (T * K)
        self.assertEqual(counts.tolist(), (expected > 0).sum(0).tolist())
        self.close(losses, torch.stack([0.5 * E * (share * expected.mean(0)).sum(), losses[1] * 0]))

    def test_gshard(self):
        tokens, weight = leaf(T, D), leaf(E, D, seed=1)
        weights, experts, _, losses, _ = ops.gshard_gate(
            tokens, weight, second_policy="all", aux_loss_coeff=0.1
        )
        scores = (tokens @ weight.T).softmax(1)
        best = scores.topk(2)
        self.close(weights.view(T, 2), best.values / (best.values.sum(1, keepdim=True) + 1e-9))
        self.assertEqual(experts.tolist(), best.indices.flatten().tolist())
        first = torch.bincount(best.indices[:, 0], minlength=E).double() / T
        self.close(losses[0], 0.1 * E * (first * scores.mean(0)).sum())

    def test_noisy(self):
        """Without training no noise; in training the noise is that of the step."""
        tokens, weight, noise = leaf(T, D), leaf(E, D, seed=1), leaf(E, D, seed=2)
        weights, _, _, losses, counts = ops.noisy_top_k_gate(
            tokens, weight, noise, top_k=K, importance_coeff=0.3, load_coeff=0.2
        )
        best = (tokens @ weight.T).topk(K)
        self.close(weights.view(T, K), best.values.softmax(1))
        importance = torch.zeros(T, E).double().scatter(1, best.indices, best.values.softmax(1))
        for coeff, values, loss in zip((0.3, 0.2), (importance.sum(0), counts.double()), losses):
            mean = values.mean()
            self.close(loss, coeff * (values - mean).square().mean() / (mean.square() + 1e-10))
        at_step = [
            ops.noisy_top_k_gate(tokens, weight, noise, top_k=K, training=True, step=step)[0]
            for step in (1, 1, 2)
        ]
        self.assertTrue(torch.equal(at_step[0], at_step[1]))
        self.assertFalse(torch.equal(at_step[0], at_step[2]))

    def test_hash(self):
        """A table gives its experts; a hash depends on key and seed alone."""
        table = torch.tensor([5, 4, 3])
        keys = torch.tensor([2, 0, 1, 0])
        self.assertEqual(ops.hash_gate(keys, table, num_experts=6)[1].tolist(), [3, 5, 4, 5])
        many = torch.arange(1000)
        experts = ops.hash_gate(many, num_experts=4, seed=1)[1]
        turned = ops.hash_gate(many.flip(0), num_experts=4, seed=1)[1]
        self.assertTrue(torch.equal(turned.flip(0), experts))
        self.assertFalse(torch.equal(ops.hash_gate(many, num_experts=4, seed=2)[1], experts))

    def test_bfloat16_tokens(self):
        """Gate arithmetic is float32 whatever the tokens are; gradients have their type."""
        tokens = leaf(T, D).detach().bfloat16().requires_grad_()
        weight = leaf(E, D, seed=1).detach().float().requires_grad_()
        weights = ops.top_k_gate(tokens, weight, top_k=K)[0]
        expected = (tokens.float() @ weight.T).topk(K).values.softmax(1)
        torch.testing.assert_close(weights.view(T, K), expected, rtol=1e-5, atol=1e-6)
        weights.square().sum().backward()
        self.assertEqual((tokens.grad.dtype, weight.grad.dtype), (torch.bfloat16, torch.float32))


class Compile(unittest.TestCase):
    def test_compiled_equals_eager(self):
        """One graph without breaks, also after the number of tokens has changed."""

        def step(tokens, weight):
            weights, _, _, losses, _ = ops.top_k_gate(tokens, weight, top_k=K)
            return weights.square().sum() + losses.sum()

        compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
        for num_tokens in (T, T + 4, 1):
            results = []
            for function in (step, compiled):
                tokens, weight = leaf(num_tokens, D), leaf(E, D, seed=1)
                loss = function(tokens, weight)
                loss.backward()
                results.append((loss, tokens.grad, weight.grad))
            for eager, traced in zip(*results):
                self.assertTrue(torch.equal(eager, traced))


if __name__ == "__main__":
    unittest.main(argv=[sys.argv[0], *sys.argv[1:]])
