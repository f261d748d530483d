"""compile and load: what makes a Runtime, from a Hugging Face model or from what was saved of one."""

from __future__ import annotations

import os
from dataclasses import replace

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from d3rt import storage
from d3rt.backends import make_backend
from d3rt.backends.base import MAX_BATCH_SIZE
from d3rt.models.loading import open_model
from d3rt.models.source import SharedModule
from d3rt.policies import Policy
from d3rt.quantize import Widths
from d3rt.runtime import Runtime, checked_fill


def compile(
    model: nn.Module | str | os.PathLike | None,
    policy: Policy | str | None = None,
    backend: str = "auto",
    dtype: torch.dtype | str | None = None,
    max_seq_len: int | None = None,
    batch_size: int = 1,
    threads: int | None = None,
    kv_fill: str = "auto",
    tokenizer: PreTrainedTokenizerBase | None = None,
    weights: torch.dtype | str | None = None,
    lm_head: torch.dtype | str | None = None,
    kv_cache_dtype: torch.dtype | str | None = None,
) -> Runtime:
    """Makes a Runtime from a Hugging Face causal LM, which is not changed and keeps working.

    model: the model, or what `d3rt.load_model` takes (a folder, a GGUF file, a hub id, None for the embedded one);
        that is read one matrix at a time, so that beside the runtime's weights no full copy of it takes memory.
    policy: which layers each step runs, as a Policy or its text form; None is FullDepth: the same tokens, faster.
    backend: "auto" (cuda where a usable GPU is found, else cpu), "cpu", "cuda", or "reference" (plain PyTorch, for
        tests).
    dtype: of weights and K,V cache: float32, bfloat16 or float16; None keeps the model's. Weights that already have
        it, and are on the backend's device, are shared with the model, not copied.
    weights: the width of the weights alone: a dtype, or "int8" or "int4" (groups of 32 columns; products with them
        quantise the activations to int8). Blocks of a GGUF file that have this width are taken as they are.
    lm_head: the same for the embedding and the lm_head; None is as `weights`, but int8 where those are int4.
    kv_cache_dtype: of the K,V cache alone: a dtype, or "int8" (a float32 scale for each position of each head); None is
        `dtype`, else bfloat16 with int8 and int4 weights.
    max_seq_len: longest sequence, prompt included; None is the model's own limit, at most 8192.
    batch_size: most rows that one `generate` may have (up to 16).
    threads: of the cpu backend's decode steps; None is every core the process may use (affinity, cgroup quota,
        OMP_NUM_THREADS). The prefill uses torch's own threads.
    kv_fill: what becomes of the K,V of a skipped layer, beside what a later step of the same generation reads, which is
        always written at once. "eager" writes it at every step, from the last computed hidden state. "deferred" keeps
        that hidden state, and writes K,V when a session's next turn first reads it. "recompute" does nothing, and the
        next turn runs these tokens through all layers: exact. "auto" is "recompute". See `session`. A policy
        that decides the depth while it runs (CALM) is always "eager".
    tokenizer: for `stream` with text; found by itself when `model` is a path.

    Raises UnsupportedModelError, PolicyError, BackendUnavailableError or ValueError before any work starts.
    """
    _check_options(policy, max_seq_len, batch_size, threads, kv_fill)
    widths = Widths.parse(dtype, weights, lm_head, kv_cache_dtype)
    chosen = make_backend(backend, threads)
    if isinstance(model, nn.Module):
        source = SharedModule(model, chosen.device)
    else:
        source, found = open_model(model, widths.load_dtype)
        tokenizer = tokenizer or found
    return Runtime(source, policy, chosen, widths, max_seq_len, batch_size, kv_fill, tokenizer)


def load(
    folder: str | os.PathLike[str],
    policy: Policy | str | None = None,
    backend: str = "auto",
    max_seq_len: int | None = None,
    batch_size: int | None = None,
    threads: int | None = None,
    kv_fill: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    kv_cache_dtype: torch.dtype | str | None = None,
) -> Runtime:
    """The Runtime that `Runtime.save` wrote as `folder`: with the same options, the same tokens bit for bit.

    The options are `compile`'s. Policy, max_seq_len, batch_size, kv_fill, tokenizer and kv_cache_dtype are the saved
    ones where they are not given; backend and threads are this machine's. Weights stay as they were saved. They are
    read tensor by tensor into the runtime's own memory, and Hugging Face's model is never made.

    Raises, before any tensor is read: ModelNotFoundError for a folder or file that is not there, UnsupportedModelError
    for one that is damaged, foreign or of a later version, and what `compile` raises for its options.
    """
    _check_options(policy, max_seq_len, 1 if batch_size is None else batch_size, threads, kv_fill or "auto")
    kv_cache = Widths.parse(None, None, None, kv_cache_dtype).kv_cache
    chosen = make_backend(backend, threads)
    saved = storage.open_saved(folder)
    kept = saved.settings
    options = {
        "policy": saved.policy() if policy is None else policy,
        "max_seq_len": kept.max_seq_len if max_seq_len is None else max_seq_len,
        "batch_size": kept.batch_size if batch_size is None else batch_size,
        "kv_fill": kept.kv_fill if kv_fill is None else kv_fill,
    }
    _check_options(**options, threads=threads)  # a settings file can be edited
    widths = replace(kept.widths, kv_cache=kv_cache or kept.widths.kv_cache)
    return Runtime(
        saved.source, backend=chosen, widths=widths, tokenizer=tokenizer or saved.tokenizer(), **options
    )


def _check_options(policy, max_seq_len, batch_size, threads, kv_fill) -> None:
    """Refuses what is wrong whatever the model."""
    for name, value in (("batch_size", batch_size), ("threads", threads), ("max_seq_len", max_seq_len)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise ValueError(f"{name}={value!r}: it must be a whole number of at least 1.")
    if batch_size > MAX_BATCH_SIZE:
        raise ValueError(
            f"batch_size={batch_size}: at most {MAX_BATCH_SIZE} rows decode together; split the batch."
        )
    checked_fill(kv_fill)
    if policy is not None and not isinstance(policy, Policy | str):
        raise TypeError(
            f"policy={policy!r}: it must be a d3rt.Policy or its text, such as 'd3:alpha=0.999,start=0.5'."
        )
