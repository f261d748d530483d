"""The time of a decode step on a GPU, from the bytes of its nodes: modelled, not measured.

    step = launch + sum over nodes of max(bytes / bandwidth, multiply-adds / rate) + ramp + gap

A node is one kernel of a step's CUDA graph; what it reads comes from nodes.py. Decoding is bound by memory, so the
first term is most of it; the others are what keeps a real engine from the roof, and each constant below has its source
beside it. Hugging Face's step is the larger of the GPU's time and the time that the CPU takes to launch its kernels.
What no model knows: clocks, caches, a bad tile, a driver. Standard library only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from d3rt.config import DecoderConfig
from d3rt.gpus import Gpu

STATUS = "modelled, not measured"

# Between two dependent nodes of a graph. 0.58 us a node for empty kernels (github.com/ahrefs/ocannl, issue 488), 0.9 us
# with the kernel's own time for 80 tiny ones (cuda.juliagpu.org/dev/usage/graphs: 70 us in all).
NODE_GAP = 1.0e-6
# What a kernel loses until its memory stream is full, and while its last blocks drain: "a setup and teardown period",
# for which vLLM and SGLang reach at most half of an H100's bandwidth with some hundred kernels a step of Llama-3.2-1B
# (hazyresearch.stanford.edu/blog/2025-05-27-no-bubbles). That is 6.4 us a kernel at most, some of it the host's; two
# trips to memory, the least there can be, are 1 us. In between; the softest number here.
NODE_RAMP = 3.0e-6
# One graph launch: 3.5 to 8 us of the CPU (cuda.juliagpu.org/dev/usage/graphs). The dispatcher launches ahead, which
# hides most of it; counted in full.
GRAPH_LAUNCH = 6.0e-6
# CPU time of one kernel of eager PyTorch under transformers: from "~10 us" to "~5-25 us" an op in texts on it. 14 us
# is what a Qwen2.5-7B step leaves on an H100 that reaches 27 % of its memory floor (arXiv 2605.30571): 15.8 ms over
# some 1140 kernels.
EAGER_LAUNCH = 14.0e-6
# Kernels of transformers 5.23: counted with a TorchDispatchMode around one step of LlamaForCausalLM (views left out),
# tests/gpu/test_roofline.py counts again.
EAGER_KERNELS_PER_LAYER = 40
EAGER_KERNELS_PER_STEP = 22


@dataclass(frozen=True)
class Node:
    """One kernel of a step: what it moves and multiplies, for all slots together.

    line_bytes: K and V of one position of one slot, where the node reads the cache; `window` of them at most, 0 is all.
    """

    op: str
    weight_bytes: int = 0
    activation_bytes: int = 0  # read and written
    line_bytes: int = 0
    window: int = 0
    multiply_adds: int = 0  # float32, of weights with activations

    def cache_bytes(self, lengths: Sequence[int]) -> int:
        """K,V bytes read where slot i has lengths[i] positions, this step's own included."""
        return self.line_bytes * sum(min(length, self.window or length) for length in lengths)

    def moved_bytes(self, lengths: Sequence[int]) -> int:
        return self.weight_bytes + self.activation_bytes + self.cache_bytes(lengths)


# How many there are of each node of a step: layers are alike.
Nodes = Mapping[Node, int]


def node_seconds(node: Node, gpu: Gpu, lengths: Sequence[int]) -> float:
    """Seconds from one node's start to the next one's."""
    memory = node.moved_bytes(lengths) / gpu.reached_bandwidth
    arithmetic = node.multiply_adds / (gpu.float32_flops / 2)
    return max(memory, arithmetic) + NODE_RAMP + NODE_GAP


def step_seconds(nodes: Nodes, gpu: Gpu, lengths: Sequence[int]) -> float:
    """Seconds of one graph launch of these nodes."""
    return GRAPH_LAUNCH + sum(count * node_seconds(node, gpu, lengths) for node, count in nodes.items())


def step_bytes(nodes: Nodes, lengths: Sequence[int]) -> int:
    """Weight and K,V bytes of the step, as GenerationStats counts them: activations stay in the caches."""
    return sum(count * (node.weight_bytes + node.cache_bytes(lengths)) for node, count in nodes.items())


def eager_nodes(nodes: Nodes) -> Nodes:
    """What Hugging Face moves in the place of these nodes: its DynamicCache is written anew at every step, so K,V are
    read twice and written once. Activations are left as they are, small as they are."""
    return {
        replace(node, line_bytes=3 * node.line_bytes): count
        for node, count in nodes.items()
        if node.op not in ("sample", "advance")
    }


def eager_kernels(layers: float) -> float:
    """Kernels of a step of transformers through that many layers."""
    return EAGER_KERNELS_PER_STEP + EAGER_KERNELS_PER_LAYER * layers


def eager_seconds(nodes: Nodes, layers: float, gpu: Gpu, lengths: Sequence[int]) -> float:
    """Seconds of one step of transformers, whose kernels are launched one by one: nodes of eager_nodes, `layers` of the
    model. The CPU runs ahead of the GPU, so the slower of the two sets the pace."""
    kernels = eager_kernels(layers)
    moved = sum(count * node.moved_bytes(lengths) for node, count in nodes.items())
    return max(kernels * EAGER_LAUNCH, moved / gpu.reached_bandwidth + kernels * NODE_GAP)


def memory_needed(config: DecoderConfig, weight_bytes: int, line_bytes: int, rows: int, length: int) -> int:
    """Bytes of weights and of `rows` slots of K,V at `length` positions; line_bytes as a Node's."""
    return weight_bytes + config.num_hidden_layers * line_bytes * rows * length
