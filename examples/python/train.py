#!/usr/bin/env python3
"""Trains a small sparse mixture of experts on a problem that one expert cannot solve.

Tokens come from several domains, each with a centre and a linear map of its own; the layer must
learn which token belongs to which map. Needs PyTorch 2.11 and libperseid_ops.so, nothing else.

    python3 train.py                            # top-2 of 8
    python3 train.py --gate comet --steps 600
    python3 train.py --compile aot_eager        # or inductor, which needs a C++ compiler
"""

import argparse
import time

import torch
from torch import nn

import perseid

GATES = {
    "topk": lambda d, e: perseid.TopKGate(d, e, top_k=2),
    "topk-bias": lambda d, e: perseid.TopKGate(
        d, e, top_k=2, score_function="sigmoid", bias_update_rate=1e-3, aux_loss_coeff=0.0
    ),
    "noisy": lambda d, e: perseid.NoisyTopKGate(d, e, top_k=2),
    "gshard": perseid.GShardGate,
    "remoe": lambda d, e: perseid.ReMoEGate(d, e, top_k=2),
    "dselectk": lambda d, e: perseid.DSelectKGate(d, e, top_k=2),
    "comet": lambda d, e: perseid.CometGate(d, e, top_k=2, entropy_coeff=0.01, balance_coeff=0.1),
}


def parse():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gate", choices=sorted(GATES), default="topk")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--d-model", type=int, default=32)
    parser.add_argument("--d-ff", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=1024, help="tokens in a step")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log-interval", type=int, default=50)
    parser.add_argument("--compile", metavar="BACKEND", help="run the step through torch.compile")
    return parser.parse_args()


class Domains:
    """y = map[domain] x, with x near the centre of its domain."""

    def __init__(self, num_domains, d_model, generator):
        self.generator = generator
        self.centres = torch.randn(num_domains, d_model, generator=generator)
        self.maps = torch.randn(num_domains, d_model, d_model, generator=generator) / d_model**0.5

    def batch(self, num_tokens):
        domain = torch.randint(len(self.maps), (num_tokens,), generator=self.generator)
        noise = torch.randn(num_tokens, self.centres.size(1), generator=self.generator)
        x = self.centres[domain] + noise
        return x, torch.einsum("tij,tj->ti", self.maps[domain], x)


def max_vio(counts):
    """Largest load over the mean load, less 1: 0 is perfect balance."""
    return (counts.max() / counts.double().mean() - 1).item()


def main():
    options = parse()
    torch.manual_seed(options.seed)
    data = Domains(options.experts, options.d_model, torch.Generator().manual_seed(options.seed))
    gate = GATES[options.gate](options.d_model, options.experts)
    layer = perseid.MoELayer(gate, options.d_model, options.d_ff)
    optimiser = torch.optim.AdamW(layer.parameters(), lr=options.lr, weight_decay=0.0)

    def losses_of(x, y, step):
        output, routing = layer(x, step=step)
        return nn.functional.mse_loss(output, y), routing

    step_of = torch.compile(losses_of, backend=options.compile) if options.compile else losses_of
    parameters = sum(parameter.numel() for parameter in layer.parameters())
    print(f"gate {options.gate}, {options.experts} experts, {parameters} parameters")
    start, seen = time.perf_counter(), 0
    for step in range(1, options.steps + 1):
        x, y = data.batch(options.tokens)
        task, routing = step_of(x, y, step)
        extra = routing.losses.sum()
        optimiser.zero_grad()
        (task + extra).backward()
        optimiser.step()
        gate.after_step(routing)
        seen += options.tokens
        if step % options.log_interval == 0 or step in (1, options.steps):
            counts = routing.tokens_per_expert
            rate = seen / (time.perf_counter() - start)
            print(
                f"step {step:5}/{options.steps} | loss {task.item():.4f} | "
                f"gate loss {extra.item():.4f} | experts/token "
                f"{counts.sum().item() / options.tokens:.2f} | maxvio {max_vio(counts):.2f} | "
                f"{rate:,.0f} tok/s",
                flush=True,
            )


if __name__ == "__main__":
    main()
