#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Decode attention of PyTorch on a GPU, for comparison with `fkv-bench --backend cuda`.

scaled_dot_product_attention with enable_gqa, one query token, bf16, Llama-3.1-8B's shape: 32 query heads, 8 KV heads,
dimension 128. A graph goes over several caches, together some times larger than the second-level cache; the kernels'
graphs are replayed in turns. Prints a line of JSON for each shape and kernel: medians, in microseconds a cache.
"""
import argparse
import json
import statistics

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

HQ, HK, DIM = 32, 8, 128
SHAPES = [(1, 8192), (1, 32768), (1, 131072), (1, 1048576), (16, 32768), (8, 131072)]
KERNELS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}


def record(kernel, q, caches):
    """A graph of one step over every cache, or None where the kernel refuses the shape."""
    stream = torch.cuda.Stream()

    def step():
        with sdpa_kernel(kernel):
            return [scaled_dot_product_attention(q, k, v, enable_gqa=True) for k, v in caches]

    try:
        with torch.cuda.stream(stream):
            for _ in range(3):
                step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            out = step()
    except RuntimeError as error:
        return None, str(error).splitlines()[0]
    return graph, out


def measure(batch, tokens, repeats, total):
    per_cache = batch * tokens * HK * DIM * 4
    count = max(2, -(-total // per_cache))
    make = lambda heads, n: torch.randn(batch, heads, n, DIM, device="cuda", dtype=torch.bfloat16)
    q = make(HQ, 1)
    caches = [(make(HK, tokens), make(HK, tokens)) for _ in range(count)]
    graphs, times = {}, {}
    for name, kernel in KERNELS.items():
        graph, out = record(kernel, q, caches)
        if graph is None:
            print(json.dumps({"batch": batch, "tokens": tokens, "kernel": name, "error": out}), flush=True)
            continue
        graphs[name] = graph, out
        times[name] = []
    for i in range(repeats + 3):
        for name, (graph, _) in graphs.items():
            first, second = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            graph.replay()
            second.record()
            second.synchronize()
            if i >= 3:
                times[name].append(first.elapsed_time(second) * 1e3 / count)
    for name, t in times.items():
        us = statistics.median(t)
        print(json.dumps({"batch": batch, "tokens": tokens, "kernel": "torch " + name, "us": round(us, 2),
                          "mb": round(per_cache * 1e-6, 1), "tb_per_s": round(per_cache / us * 1e-6, 3)}), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--megabytes", type=int, default=600, help="size of all caches of a graph")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--tokens", type=int)
    arguments = parser.parse_args()
    print(json.dumps({"device": torch.cuda.get_device_name(), "torch": torch.__version__,
                      "cuda": torch.version.cuda}), flush=True)
    shapes = [(arguments.batch or 1, arguments.tokens)] if arguments.tokens else SHAPES
    for batch, tokens in shapes:
        measure(batch, tokens, arguments.repeats, arguments.megabytes * 1_000_000)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
