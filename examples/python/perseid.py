"""Perseid's gates and experts as torch.nn modules: thin wrappers of torch.ops.perseid.

    layer = perseid.MoELayer(perseid.TopKGate(d_model, num_experts=8), d_model, d_ff=256)
    output, routing = layer(tokens)         # tokens [..., d_model]
    (task_loss(output) + routing.losses.sum()).backward()
    optimizer.step()
    layer.gate.after_step(routing)

One process: experts are not spread over ranks. docs/python.md has the operations themselves.
"""

import math
import os
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

LIBRARY = "libperseid_ops.so"


def load(path=None):
    """Loads the library from path, $PERSEID_OPS, an installation around this file, or a build."""
    root = Path(__file__).resolve().parents[2]
    places = [root / "lib" / LIBRARY, root / "build" / "cpu" / "lib" / LIBRARY]
    found = path or os.environ.get("PERSEID_OPS") or next(filter(Path.exists, places), None)
    if found is None:
        tried = ", ".join(map(str, places))
        raise FileNotFoundError(f"{LIBRARY} is not in {tried}; name it in PERSEID_OPS")
    torch.ops.load_library(str(found))


load()
ops = torch.ops.perseid


class Routing(NamedTuple):
    """Row t holds assignments token_offsets[t] .. token_offsets[t+1]-1; a tail may be unused."""

    weights: torch.Tensor  # [C] differentiable
    expert_idx: torch.Tensor  # [C] int32
    token_offsets: torch.Tensor  # [T+1] int32
    losses: torch.Tensor  # [N] differentiable, coefficients applied
    tokens_per_expert: torch.Tensor  # [E] int64

    def trimmed(self):
        """Without the tail, which costs memory; a compiled graph needs it for fixed shapes."""
        if torch.compiler.is_compiling():
            return self
        total = int(self.token_offsets[-1])
        return self._replace(weights=self.weights[:total], expert_idx=self.expert_idx[:total])

    def rest(self):
        """[T] 1 - the sum of a token's weights, 0 for a token without an expert."""
        places = torch.arange(self.weights.numel(), device=self.weights.device)
        rows = torch.bucketize(places, self.token_offsets[1:], right=True)  # T for the tail
        sums = self.weights.new_zeros(self.token_offsets.numel()).index_add(0, rows, self.weights)
        return (1 - sums[:-1]) * (self.token_offsets.diff() > 0)


def uniform(*size, bound):
    return nn.Parameter(torch.empty(*size).uniform_(-bound, bound))


class Gate(nn.Module):
    """A gate maps tokens [T, D] to a Routing. Options go to the operation as they are, and so do
    the keywords of a call, such as valid=[T] bool and step."""

    operation = ""
    loss_names = ()  # of Routing.losses
    keeps_token = False  # what a token's weights leave of 1 goes to the token itself

    def __init__(self, num_experts, options):
        super().__init__()
        self.num_experts = num_experts
        self.options = options

    def route(self, *tensors, **call):
        operation = getattr(ops, self.operation)
        return Routing(*operation(*tensors, training=self.training, **self.options, **call))

    def after_step(self, routing):
        """Moves state that is not trained by gradients; call it once per optimiser step."""


class LinearGate(Gate):
    """A gate with a linear router, weight [E, D]."""

    def __init__(self, d_model, num_experts, **options):
        super().__init__(num_experts, options)
        self.weight = uniform(num_experts, d_model, bound=math.sqrt(6 / (num_experts + d_model)))

    def forward(self, tokens, **call):
        return self.route(tokens, self.weight, **call)


class TopKGate(LinearGate):
    """Exactly top_k experts per token. bias_update_rate > 0: balanced without a loss (DeepSeek-V3)."""

    operation = "top_k_gate"
    loss_names = ("aux_loss", "z_loss", "balance_loss")

    def __init__(self, d_model, num_experts, top_k=2, bias_update_rate=0.0, **options):
        super().__init__(d_model, num_experts, top_k=top_k, **options)
        self.bias_update_rate = bias_update_rate
        bias = torch.zeros(num_experts) if bias_update_rate > 0 else None
        self.register_buffer("expert_bias", bias)

    def forward(self, tokens, **call):
        return self.route(tokens, self.weight, None, self.expert_bias, **call)

    @torch.no_grad()
    def after_step(self, routing):
        if self.expert_bias is not None:
            counts = routing.tokens_per_expert
            lack = counts.sum() - self.num_experts * counts
            self.expert_bias += self.bias_update_rate * lack.sign()


class NoisyTopKGate(LinearGate):
    """top_k experts by noisy logits. learned: the noise is trained, else its width is fixed."""

    operation = "noisy_top_k_gate"
    loss_names = ("importance_loss", "load_loss")

    def __init__(self, d_model, num_experts, top_k=2, learned=True, **options):
        super().__init__(d_model, num_experts, top_k=top_k, **options)
        nn.init.zeros_(self.weight)
        self.noise_weight = nn.Parameter(torch.zeros(num_experts, d_model)) if learned else None

    def forward(self, tokens, **call):
        return self.route(tokens, self.weight, self.noise_weight, **call)


class GShardGate(LinearGate):
    """The best expert and, by second_policy, the second one."""

    operation = "gshard_gate"
    loss_names = ("aux_loss", "z_loss")


class ReMoEGate(LinearGate):
    """ReLU weights, any number of experts; an L1 loss that adapts keeps the mean at top_k."""

    operation = "remoe_gate"
    loss_names = ("aux_loss", "l1_loss")

    def __init__(self, d_model, num_experts, top_k=2, l1_coeff_factor=1.2, **options):
        super().__init__(d_model, num_experts, top_k=top_k, **options)
        self.l1_coeff_factor = l1_coeff_factor
        self.register_buffer("l1_coeff", torch.tensor(1e-8, dtype=torch.float64))

    def forward(self, tokens, **call):
        return self.route(tokens, self.weight, self.l1_coeff, **call)

    @torch.no_grad()
    def after_step(self, routing):
        num_tokens = routing.token_offsets.numel() - 1
        is_dense = routing.tokens_per_expert.sum() > self.options["top_k"] * num_tokens
        factor = self.l1_coeff_factor if is_dense else 1 / self.l1_coeff_factor
        self.l1_coeff.mul_(factor).clamp_(1e-12, 1e2)


class ExpertChoiceGate(LinearGate):
    """Experts choose tokens: equal loads, 0 to E experts per token. Not causal."""

    operation = "expert_choice_gate"


class BaseGate(LinearGate):
    """One expert per token by a balanced assignment (BASE layers), mixed with the token itself."""

    operation = "base_gate"
    keeps_token = True

    def __init__(self, d_model, num_experts, **options):
        super().__init__(d_model, num_experts, **options)
        nn.init.orthogonal_(self.weight, gain=0.1)


class SinkhornGate(LinearGate):
    """top_k experts per token, in training from a balanced plan. Not causal in training."""

    operation = "sinkhorn_gate"


class StatisticalTopKGate(LinearGate):
    """About top_k experts per token: those above a threshold by mean and spread of the logits."""

    operation = "statistical_top_k_gate"
    loss_names = ("balance_loss",)


class CometGate(Gate):
    """top_k trees of smooth-step switches: dense at first, at most top_k experts later."""

    operation = "comet_gate"
    loss_names = ("entropy_loss", "balance_loss")

    def __init__(self, d_model, num_experts, top_k=2, gamma=1.0, **options):
        sizes = {"num_experts": num_experts, "top_k": top_k, "gamma": gamma}
        super().__init__(num_experts, {**sizes, **options})
        splits, leaves = top_k * (num_experts - 1), top_k * num_experts
        self.split_weight = uniform(splits, d_model, bound=gamma / 100)
        self.split_bias = uniform(splits, bound=gamma / 100)
        self.leaf_weight = uniform(leaves, d_model, bound=0.05)
        self.leaf_bias = uniform(leaves, bound=0.05)

    def forward(self, tokens, **call):
        splits, leaves = (self.split_weight, self.split_bias), (self.leaf_weight, self.leaf_bias)
        return self.route(tokens, *splits, *leaves, **call)


class DSelectKGate(Gate):
    """top_k selectors by the bits of an expert's number: dense at first, at most top_k later."""

    operation = "dselect_k_gate"
    loss_names = ("entropy_loss", "penalty_loss", "balance_loss")

    def __init__(self, d_model, num_experts, top_k=2, gamma=1.0, **options):
        sizes = {"num_experts": num_experts, "top_k": top_k, "gamma": gamma}
        super().__init__(num_experts, {**sizes, **options})
        switches = top_k * (num_experts - 1).bit_length()
        self.code_weight = uniform(switches, d_model, bound=gamma / 100)
        self.code_bias = uniform(switches, bound=gamma / 100)
        self.selector_weight = uniform(top_k, d_model, bound=0.05)
        self.selector_bias = uniform(top_k, bound=0.05)

    def forward(self, tokens, **call):
        codes = (self.code_weight, self.code_bias)
        return self.route(tokens, *codes, self.selector_weight, self.selector_bias, **call)


class HashGate(Gate):
    """Experts by an integer key; call it with keys=[T] int64."""

    operation = "hash_gate"

    def __init__(self, num_experts, table=None, **options):
        super().__init__(num_experts, {"num_experts": num_experts, **options})
        self.register_buffer("table", table)

    def forward(self, tokens, keys, **call):
        return self.route(keys, self.table, **call)


class GroupedMLP(nn.Module):
    """Two-layer experts of one shape, SwiGLU unless gated=False, in the layout of transformers 5."""

    def __init__(self, num_experts, d_model, d_ff, activation="silu", gated=True):
        super().__init__()
        width = 2 * d_ff if gated else d_ff
        self.up_proj = uniform(num_experts, width, d_model, bound=d_model**-0.5)
        self.down_proj = uniform(num_experts, d_model, d_ff, bound=d_ff**-0.5)
        self.options = {"activation": activation, "gated": gated}

    def forward(self, tokens, routing):
        output, _ = ops.grouped_mlp(
            tokens, routing.token_offsets, routing.expert_idx, routing.weights,
            self.up_proj, self.down_proj, **self.options,
        )
        return output


class MoELayer(nn.Module):
    """A gate and its experts. Returns output [..., D] and the routing, with the gate's losses."""

    def __init__(self, gate, d_model, d_ff, **options):
        super().__init__()
        self.gate = gate
        self.experts = GroupedMLP(gate.num_experts, d_model, d_ff, **options)

    def forward(self, tokens, **call):
        flat = tokens.flatten(0, -2)
        routing = self.gate(flat, **call).trimmed()
        output = self.experts(flat, routing)
        if self.gate.keeps_token:
            output = output + routing.rest().to(flat.dtype)[:, None] * flat
        return output.view_as(tokens), routing
