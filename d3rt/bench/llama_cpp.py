"""llama.cpp on the same weights, where llama-cpp-python is installed: a GGUF file made of the model, and a timed run.

Imports nothing of d3rt: bench/peers.py takes it into environments that have none."""

from __future__ import annotations

import ctypes
import importlib.util
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

# llama.cpp's file types (llama.h: enum llama_ftype).
GGUF_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 7, "BF16": 32}
# The format that stands for a width of ours.
FORMATS = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "int8": "Q8_0", "int4": "Q4_0"}
BATCH = 512  # prompt tokens that it reads at once


def installed() -> bool:
    """Whether its Python package is there."""
    return importlib.util.find_spec("llama_cpp") is not None


def gguf_file(model: nn.Module, folder: Path, kind: str) -> Path:
    """The model's weights as `folder`/KIND.gguf: float32 written here, anything else by llama.cpp's own quantiser.

    ValueError for a model that is no Llama."""
    path = folder / f"{kind}.gguf"
    if path.is_file():
        return path
    if kind == "F32":
        write_gguf(model, path)
        return path
    import llama_cpp

    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype = GGUF_TYPES[kind]
    source, part = gguf_file(model, folder, "F32"), path.with_suffix(".part")
    if llama_cpp.llama_model_quantize(str(source).encode(), str(part).encode(), options) != 0:
        raise ValueError(f"llama.cpp could not quantise {source} to {kind}")
    return part.rename(path)


def write_gguf(model: nn.Module, path: Path) -> None:
    """A Llama as float32 GGUF, without a vocabulary: everyone is given token ids."""
    import gguf

    config = model.config
    if config.model_type != "llama":
        raise ValueError(f"a GGUF file is made of Llama models here, and this is {config.model_type!r}")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    writer = gguf.GGUFWriter(part, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        for matrix, count in ((".q_proj.", heads), (".k_proj.", kv_heads)):
            if matrix in name:  # Hugging Face's two halves of a head to llama.cpp's neighbouring pairs
                rows, cols = tensor.shape
                tensor = tensor.view(count, 2, rows // count // 2, cols).transpose(1, 2).reshape(rows, cols)
        writer.add_tensor(names.get_name(name, (".weight",)), tensor.float().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    part.rename(path)


class LlamaCppRun:
    """Greedy decoding of a GGUF file. A call returns decode tokens/s; `prefill_seconds` has an entry for each call."""

    def __init__(
        self, path: Path, vocab_size: int, prompt: Sequence[int], new_tokens: int, threads: int, context: int
    ):
        import llama_cpp
        import numpy as np

        self._library, self._numpy = llama_cpp, np
        # The callback must outlive the calls.
        self._quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self._quiet, ctypes.c_void_p())
        options = llama_cpp.llama_model_default_params()
        model = llama_cpp.llama_model_load_from_file(str(path).encode(), options)
        if not model:
            raise ValueError(f"llama.cpp could not load {path}")
        options = llama_cpp.llama_context_default_params()
        options.n_ctx = context
        options.n_batch = options.n_ubatch = BATCH
        options.n_threads = options.n_threads_batch = threads
        self._context = llama_cpp.llama_init_from_model(model, options)
        self._vocab_size, self._prompt, self._new_tokens = vocab_size, list(prompt), new_tokens
        self.version = llama_cpp.__version__
        self.prefill_seconds: list[float] = []

    def run(self, prompt: Sequence[int], new_tokens: int) -> tuple[float, float]:
        """Seconds of the prefill, and of the decode steps after it."""
        library = self._library
        library.llama_memory_clear(library.llama_get_memory(self._context), True)
        begin = time.perf_counter()
        for at in range(0, len(prompt), BATCH):
            token = self._step(prompt[at : at + BATCH])
        prefilled = time.perf_counter()
        for _ in range(new_tokens - 1):
            token = self._step([token])
        return prefilled - begin, time.perf_counter() - prefilled

    def __call__(self) -> float:
        prefill, decode = self.run(self._prompt, self._new_tokens)
        self.prefill_seconds.append(prefill)
        return (self._new_tokens - 1) / decode

    def _step(self, tokens: Sequence[int]) -> int:
        library = self._library
        held = (library.llama_token * len(tokens))(*tokens)  # the batch only points there
        if library.llama_decode(self._context, library.llama_batch_get_one(held, len(tokens))) != 0:
            raise RuntimeError("llama_decode failed")
        # Its samplers ask the vocabulary, which the file has not; numpy's argmax takes some 10 us.
        logits = library.llama_get_logits_ith(self._context, -1)
        return int(self._numpy.ctypeslib.as_array(logits, shape=(self._vocab_size,)).argmax())
