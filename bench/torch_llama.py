#!/usr/bin/env python3
"""Times training steps of examples/llama.h's model in PyTorch on the CPU.

torch_llama.py [option]...        e.g. --modes f32,amp,bf16 --threads 1 --steps 6

Modes: f32; bf16: weights, activations and optimizer in bfloat16; amp: float32 weights under bfloat16 autocast;
'+c' after a mode: under torch.compile. Steps of all modes are taken in turn. A step is forward, backward, clipping and AdamW, as
train_llama's. Prints torch_llama<TAB>mode<TAB>threads<TAB>tokens/s by wall time<TAB>by processor time<TAB>last loss: medians.
The same in train_llama: --precision bf16 --dim 512 --blocks 8 --heads 8 --seq 512 --batch 2 --threads 1 (random bytes here, which
take as long as text).
"""
import argparse
import os
import statistics
import sys
import time

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
try:
    import torch
except ImportError:
    print("skipped: torch_llama.py (torch is not installed)")
    sys.exit(0)
from torch import nn
from torch.nn import functional as F


class Block(nn.Module):
    def __init__(self, a):
        super().__init__()
        hd = a.dim // a.heads
        self.a, self.norm1, self.norm2 = a, nn.RMSNorm(a.dim, 1e-5), nn.RMSNorm(a.dim, 1e-5)
        self.q, self.k, self.v, self.o, self.gate, self.up, self.down = (nn.Linear(i, o, bias=False) for i, o in (
            (a.dim, a.dim), (a.dim, hd * a.kv_heads), (a.dim, hd * a.kv_heads), (a.dim, a.dim), (a.dim, a.ffn), (a.dim, a.ffn), (a.ffn, a.dim)))

    def forward(self, x, co, si):
        a, (B, T, _) = self.a, x.shape

        def heads(y):                   # (B, heads, T, hd)
            return y.view(B, T, -1, a.dim // a.heads).transpose(1, 2)

        def rope(y):                    # turns the pairs (i, i + hd/2)
            u, w = y.chunk(2, -1)
            return torch.cat((u * co - w * si, u * si + w * co), -1).to(y.dtype)
        n = self.norm1(x)
        y = F.scaled_dot_product_attention(rope(heads(self.q(n))), rope(heads(self.k(n))), heads(self.v(n)), is_causal=True, enable_gqa=a.kv_heads != a.heads)
        x = x + self.o(y.transpose(1, 2).reshape(B, T, a.dim))
        n = self.norm2(x)
        return x + self.down(F.silu(self.gate(n)) * self.up(n))


class Llama(nn.Module):
    def __init__(self, a):
        super().__init__()
        self.embed, self.norm, self.output = nn.Embedding(a.vocab, a.dim), nn.RMSNorm(a.dim, 1e-5), nn.Linear(a.dim, a.vocab, bias=False)
        self.blocks = nn.ModuleList(Block(a) for _ in range(a.blocks))
        for name, p in self.named_parameters():
            if p.dim() > 1:
                nn.init.normal_(p, std=0.02 / (2 * a.blocks) ** 0.5 if name.endswith(("o.weight", "down.weight")) else 0.02)
        half = a.dim // a.heads // 2
        angle = torch.arange(a.seq)[:, None] * 10000.0 ** (-torch.arange(half) / half)
        self.register_buffer("co", angle.cos())
        self.register_buffer("si", angle.sin())

    def forward(self, tokens, targets):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, self.co, self.si)
        return F.cross_entropy(self.output(self.norm(x)).float().flatten(0, 1), targets.flatten())


def stepper(a, mode):
    """A function that trains one step and returns the loss."""
    torch.manual_seed(1)
    kind, compiled = mode.split("+")[0], mode.endswith("+c")
    model = Llama(a)
    if kind == "bf16":
        model.bfloat16()
    matrices, vectors = ([p for p in model.parameters() if (p.dim() > 1) == m] for m in (True, False))
    update = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}], lr=1e-3, betas=(0.9, 0.95), fused=True)
    run = torch.compile(model) if compiled else model

    def step():
        tokens = torch.randint(a.vocab, (a.batch, a.seq + 1))
        update.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == "amp"):
            loss = run(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        update.step()
        return loss.item()
    step.parameters = sum(p.numel() for p in model.parameters())
    return step


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--modes", default="f32,amp,bf16")
    for name, value in (("threads", 1), ("steps", 6), ("dim", 512), ("blocks", 8), ("heads", 8), ("kv_heads", 8), ("ffn", 1408), ("seq", 512), ("batch", 2), ("vocab", 256)):
        p.add_argument("--" + name.replace("_", "-"), type=int, default=value)
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    steps = {mode: stepper(a, mode) for mode in a.modes.split(",")}
    seconds = {mode: [] for mode in steps}
    for i in range(a.steps + 2):        # the first two warm up
        for mode, step in steps.items():
            wall, cpu = time.perf_counter(), time.process_time()
            loss = step()
            if i > 1:
                seconds[mode].append((time.perf_counter() - wall, time.process_time() - cpu, loss))
    for mode, taken in seconds.items():
        wall, cpu = (a.batch * a.seq / statistics.median(column) for column in list(zip(*taken))[:2])
        print(f"torch_llama\t{mode}\t{a.threads}\t{wall:.1f}\t{cpu:.1f}\t{taken[-1][2]:.4f}", flush=True)


if __name__ == "__main__":
    main()
