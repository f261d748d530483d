"""Request: one call of `generate`, resolved from Hugging Face's arguments before any work starts.

Names, defaults and precedence are Hugging Face's: a keyword beats generation_config, which beats the model's own
generation_config, which beats the global defaults; and max_new_tokens beats max_length, wherever each was said. What
the C++ dispatcher does itself becomes SamplingParams; what only a Python logits processor or stopping criterion can do
is built from transformers' own classes and makes the request `stepwise`: the same recorded steps, driven from Python
one by one. What is not supported is refused by name. Every value is checked here, so that a bad one costs no work.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import logits_process as hf
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxTimeCriteria, StopStringCriteria

from d3rt.config import DecoderConfig
from d3rt.errors import UnsupportedOptionError
from d3rt.kernels import reference
from d3rt.sampling import SamplingParams

# Hugging Face's global defaults (GenerationConfig._get_default_generation_params), where they matter here.
DEFAULTS: dict[str, Any] = {
    "do_sample": False,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "repetition_penalty": 1.0,
    "num_return_sequences": 1,
}
DEFAULT_NEW_TOKENS = 20

# Not supported: the values at which each does nothing. Any other is refused by name.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "num_beams": (None, 1),
    "num_beam_groups": (None, 1),
    "diversity_penalty": (None, 0, 0.0),
    "penalty_alpha": (None, 0, 0.0),
    "dola_layers": (None,),
    "constraints": (None,),
    "force_words_ids": (None,),
    "guidance_scale": (None, 1, 1.0),
    "watermarking_config": (None,),
    "prompt_lookup_num_tokens": (None,),
    "assistant_early_exit": (None,),
    "use_mtp": (None, False),
    "speculation_type": (None,),
    "token_healing": (None, False),
    "output_attentions": (None, False),
    "output_hidden_states": (None, False),
    "encoder_repetition_penalty": (None, 1, 1.0),
    "encoder_no_repeat_ngram_size": (None, 0),
    "continuous_batching_config": (None,),
    "synced_gpus": (None, False),
}
# Without effect on which tokens come out here: settings of beams, of assistants, or of Hugging Face's own caches.
WITHOUT_EFFECT = {
    *("early_stopping", "length_penalty", "low_memory", "use_cache", "cache_implementation", "cache_config"),
    *("max_cache_len", "compile_config", "disable_compile", "prefill_chunk_size", "is_assistant"),
    *("num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold"),
    *("max_matching_ngram_size", "assistant_lookbehind", "target_lookbehind", "assistant_ensemble_weight"),
    *("decoder_start_token_id", "return_legacy_cache", "transformers_version"),
}
# Arguments of model.forward or generate that are not supported at all: only None is taken. Each with the way out.
_OWN_STATE = "the runtime keeps positions, embeddings and K,V itself; pass input_ids and attention_mask"
REFUSED_INPUTS = {
    **dict.fromkeys(("inputs_embeds", "past_key_values", "position_ids", "cache_position"), _OWN_STATE),
    **dict.fromkeys(
        ("assistant_model", "assistant_tokenizer", "custom_generate")
        + ("negative_prompt_ids", "negative_prompt_attention_mask"),
        "leave it out, or use model.generate",
    ),
}
HANDLED = {
    *(
        "max_length",
        "max_new_tokens",
        "min_length",
        "min_new_tokens",
        "max_time",
        "stop_strings",
        "do_sample",
    ),
    *("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff"),
    *(
        "repetition_penalty",
        "no_repeat_ngram_size",
        "bad_words_ids",
        "renormalize_logits",
        "forced_bos_token_id",
    ),
    *("forced_eos_token_id", "remove_invalid_values", "exponential_decay_length_penalty", "suppress_tokens"),
    *("begin_suppress_tokens", "sequence_bias", "num_return_sequences", "output_scores", "output_logits"),
    *("return_dict_in_generate", "pad_token_id", "bos_token_id", "eos_token_id"),
}


@dataclass(frozen=True)
class Request:
    """What one generation is to do. prompts[row] is int64 [T_row], without padding."""

    input_ids: Tensor  # [B, T] int64 in host memory, as given, padding included
    device: torch.device  # where they were given, and where the answer goes
    prompts: tuple[Tensor, ...]
    max_new_tokens: int
    eos_tokens: tuple[int, ...]
    pad_token: int
    sampling: SamplingParams
    processors: LogitsProcessorList  # all of them, in Hugging Face's order; used when stepwise
    criteria: StoppingCriteriaList
    streamer: Any
    return_dict: bool
    output_scores: bool
    output_logits: bool
    stepwise: bool
    # Whether a finished row emits pad_token while others go on. Hugging Face pads only where an EOS token can end a
    # row; where nothing but a criterion does, the row's own tokens go on until every row is finished.
    pads: bool

    @property
    def batch(self) -> int:
        return len(self.prompts)


def resolve(
    config: DecoderConfig,
    model_defaults: GenerationConfig,
    inputs: Tensor | None = None,
    generation_config: GenerationConfig | None = None,
    *,
    attention_mask: Tensor | None = None,
    logits_processor: Sequence[LogitsProcessor] | None = None,
    stopping_criteria: Sequence[Callable] | None = None,
    prefix_allowed_tokens_fn: Callable | None = None,
    streamer: Any = None,
    tokenizer: Any = None,
    seed: int | None = None,
    generator: torch.Generator | None = None,
    **kwargs: Any,
) -> Request:
    """The Request of a `generate` call. TypeError for an unknown keyword, UnsupportedOptionError for one that is known
    and not supported, ValueError for a bad value; each names value, rule and way out."""
    if "input_ids" in kwargs:
        if inputs is not None:
            raise ValueError("generate() got both `inputs` and `input_ids`: pass the prompt once.")
        inputs = kwargs.pop("input_ids")
    _refuse_unknown(kwargs)
    if generation_config is not None and not isinstance(generation_config, GenerationConfig):
        raise TypeError(
            f"generation_config is a {type(generation_config).__name__}: it must be a transformers.GenerationConfig; "
            "pass options by keyword instead."
        )
    options = _merge(model_defaults, generation_config, kwargs)
    for name, accepted in NEUTRAL.items():
        if options.get(name) not in accepted:
            raise UnsupportedOptionError(
                f"{name}={options[name]!r} is not supported; leave it at {accepted[-1]!r}, or use model.generate."
            )

    if options.get("pad_token_id") is not None:
        try:
            options["pad_token_id"] = operator.index(options["pad_token_id"])
        except TypeError:
            raise ValueError(f"pad_token_id={options['pad_token_id']!r}: it must be a token id.") from None
    input_ids, mask = _checked_inputs(config, options, inputs, attention_mask)
    copies = _whole("num_return_sequences", options["num_return_sequences"] or 1)
    if copies > 1:
        if not options["do_sample"]:
            raise ValueError(
                f"num_return_sequences={copies}: greedy decoding gives one sequence; set do_sample=True."
            )
        input_ids, mask = input_ids.repeat_interleave(copies, 0), mask.repeat_interleave(copies, 0)
    prompts = tuple(row[keep.bool()] for row, keep in zip(input_ids, mask, strict=True))

    eos_tokens = _token_list("eos_token_id", options.get("eos_token_id"), config.vocab_size)
    pad_token = options.get("pad_token_id")
    if pad_token is None:
        pad_token = eos_tokens[0] if eos_tokens else 0
    if not 0 <= pad_token < config.vocab_size:  # the next step would embed it
        if len(prompts) > 1:
            raise ValueError(
                f"pad_token_id={pad_token}: finished rows of a batch emit it, so it must be in "
                f"0..{config.vocab_size - 1}; set pad_token_id, for example to eos_token_id."
            )
        pad_token = 0  # a single row never emits it, and some configs say -1 for "none"
    max_new_tokens = _max_new_tokens(config, options, input_ids.shape[1])
    sampling = _sampling(options, seed, generator)

    extra = _extra_processors(options, input_ids, eos_tokens, max_new_tokens, prefix_allowed_tokens_fn)
    custom = list(logits_processor or [])
    late = _late_warpers(options)
    criteria = _criteria(options, stopping_criteria, tokenizer)
    if any(type(criterion) is EosTokenCriteria for criterion in criteria):
        eos_tokens = ()  # the caller's own takes the place of ours, as in Hugging Face
    return_dict = bool(options.get("return_dict_in_generate"))
    output_scores = return_dict and bool(options.get("output_scores"))
    output_logits = return_dict and bool(options.get("output_logits"))

    return Request(
        input_ids=input_ids,
        device=inputs.device if isinstance(inputs, Tensor) else torch.device("cpu"),
        prompts=prompts,
        max_new_tokens=max_new_tokens,
        eos_tokens=eos_tokens,
        pad_token=pad_token,
        sampling=sampling,
        processors=_in_order(sampling, input_ids.shape[1], prompts, extra, custom, late),
        criteria=criteria,
        streamer=streamer,
        return_dict=return_dict,
        output_scores=output_scores,
        output_logits=output_logits,
        stepwise=bool(extra or custom or late or criteria or output_scores or output_logits),
        pads=bool(eos_tokens) or any(hasattr(criterion, "eos_token_id") for criterion in criteria),
    )


def _refuse_unknown(kwargs: dict[str, Any]) -> None:
    for name in kwargs:
        if name in REFUSED_INPUTS:
            if kwargs[name] is not None:
                raise UnsupportedOptionError(f"{name} is not supported: {REFUSED_INPUTS[name]}.")
        elif name not in HANDLED | WITHOUT_EFFECT | set(NEUTRAL):
            raise TypeError(f"generate() got an unexpected keyword argument {name!r}")


def _merge(
    model_defaults: GenerationConfig, generation_config: GenerationConfig | None, kwargs: dict[str, Any]
) -> dict[str, Any]:
    """kwargs over generation_config over the model's own over the global defaults; None in the middle two is unset."""
    options = dict(DEFAULTS)
    for source in (model_defaults, generation_config):
        if source is None:
            continue
        given = {key: value for key, value in source.to_dict().items() if value is not None and key[0] != "_"}
        unknown = set(given) - HANDLED - WITHOUT_EFFECT - set(NEUTRAL)
        if source is generation_config and unknown:
            raise UnsupportedOptionError(
                f"generation_config sets {', '.join(sorted(unknown))}, which d3rt does not know; unset it, or use "
                "model.generate."
            )
        options.update(given)
    options.update((key, value) for key, value in kwargs.items() if key not in REFUSED_INPUTS)
    return options


def _checked_inputs(config, options, inputs, attention_mask) -> tuple[Tensor, Tensor]:
    """input_ids and mask, both int64 [B, T]; left padding only."""
    if inputs is None:
        bos = options.get("bos_token_id")
        if bos is None:
            raise ValueError(
                "generate() needs input_ids: no prompt was given and the model has no bos_token_id."
            )
        inputs = torch.tensor([[bos]])
    if not isinstance(inputs, Tensor):
        inputs = torch.as_tensor(inputs)
    if inputs.dim() != 2 or inputs.dtype not in (
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
    ):
        raise ValueError(
            f"input_ids is {inputs.dtype} of shape {tuple(inputs.shape)}: it must be integer token ids [batch, length]."
        )
    ids = inputs.detach().to("cpu", torch.int64)
    if not ids.numel():
        raise ValueError(
            f"input_ids has shape {tuple(ids.shape)}: it must hold at least one token in each row."
        )
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= config.vocab_size:
        wrong = low if low < 0 else high
        raise ValueError(f"input_ids holds {wrong}: token ids must be in 0..{config.vocab_size - 1}.")
    if attention_mask is None:
        pad = options.get("pad_token_id")
        eos = _token_list("eos_token_id", options.get("eos_token_id"), config.vocab_size)
        inferred = pad is not None and pad not in eos and bool((ids == pad).any())
        mask = (ids != pad).long() if inferred else torch.ones_like(ids)  # Hugging Face's own rule
    else:
        mask = torch.as_tensor(attention_mask).detach().to("cpu")
        if mask.shape != ids.shape:
            raise ValueError(
                f"attention_mask has shape {tuple(mask.shape)}, input_ids {tuple(ids.shape)}: they must be the same."
            )
        mask = (mask != 0).long()
    for row, keep in enumerate(mask):
        if not keep.any():
            raise ValueError(f"row {row} is all padding: each row needs at least one token.")
        if (keep[1:] < keep[:-1]).any():
            raise ValueError(
                f"attention_mask of row {row} has padding after a token: decoding needs left padding "
                "(tokenizer.padding_side = 'left')."
                if attention_mask is not None
                else f"row {row} holds pad_token_id={pad} after another token, and without an attention_mask pad "
                "tokens count as padding, which must be on the left; pass attention_mask."
            )
    return ids, mask


def _token_list(name: str, value: Any, vocab_size: int) -> tuple[int, ...]:
    if value is None:
        return ()
    tokens = value.flatten().tolist() if isinstance(value, Tensor) else value
    tokens = tuple(tokens) if isinstance(tokens, list | tuple) else (tokens,)
    for token in tokens:
        if not isinstance(token, int):
            raise ValueError(f"{name}={value!r}: it must be a token id, or a list of them.")
        if token >= vocab_size:
            raise ValueError(f"{name}={token}: the model's vocabulary has {vocab_size} tokens.")
    return tuple(token for token in tokens if token >= 0)  # some configs say -1 for "none"


def _whole(name: str, value: Any) -> int:
    """value as a whole number of at least 1; numpy's and torch's are taken too."""
    try:
        number = 0 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = 0
    if number < 1:
        raise ValueError(f"{name}={value!r}: it must be a whole number of at least 1.")
    return number


def _max_new_tokens(config: DecoderConfig, options: dict[str, Any], prompt_length: int) -> int:
    new_tokens, max_length = options.get("max_new_tokens"), options.get("max_length")
    if new_tokens is not None:
        return _whole("max_new_tokens", new_tokens)
    if max_length is None:
        room = config.max_position_embeddings - prompt_length
        return min(DEFAULT_NEW_TOKENS, room) if room > 0 else DEFAULT_NEW_TOKENS
    room = _whole("max_length", max_length) - prompt_length
    if room < 1:
        raise ValueError(
            f"max_length={max_length} leaves no room after a prompt of {prompt_length} tokens; raise it, or set "
            "max_new_tokens."
        )
    return room


def _sampling(options: dict[str, Any], seed: int | None, generator: torch.Generator | None) -> SamplingParams:
    def number(name: str, default: float, low: float, high: float, rule: str) -> float:
        value = default if options.get(name) is None else options[name]
        if not isinstance(value, int | float) or isinstance(value, bool) or not low <= value <= high:
            raise ValueError(f"{name}={value!r}: it must be {rule}.")
        return value

    tiny, huge = 1e-30, 1e30
    sample = bool(options["do_sample"])
    temperature = number(
        "temperature", 1.0, tiny if sample else 0.0, huge, "above 0 (or set do_sample=False)"
    )
    top_k = number("top_k", 0, 0, huge, "a whole number of at least 0 (0 is off)")
    if top_k != int(top_k):
        raise ValueError(f"top_k={top_k!r}: it must be a whole number of at least 0 (0 is off).")
    top_p = number("top_p", 1.0, 0.0, 1.0, "in 0..1 (1 is off)")
    min_p = number("min_p", 0.0, 0.0, 1.0, "in 0..1")
    penalty = number("repetition_penalty", 1.0, tiny, huge, "above 0")
    if seed is not None and generator is not None:
        raise ValueError("seed and generator were both given: pass one.")
    if seed is not None and (not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**64):
        raise ValueError(f"seed={seed!r}: it must be a whole number in 0..2**64 - 1.")
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator={generator!r}: it must be a torch.Generator; pass a number as seed.")
    if not sample:
        return SamplingParams(repetition_penalty=penalty)
    if seed is None:  # torch.manual_seed, or the generator, decides
        device = "cpu" if generator is None else generator.device
        seed = int(torch.randint(0, 2**62, (1,), generator=generator, device=device))
    return SamplingParams(True, temperature, int(top_k), top_p, min_p, penalty, seed)


def _criteria(
    options: dict[str, Any], given: Sequence[Callable] | None, tokenizer: Any
) -> StoppingCriteriaList:
    """The criteria that options ask for, and the caller's own; his takes the place of ours of the same class."""
    given, ours = list(given or []), []
    if options.get("max_time") is not None:
        limit = options["max_time"]
        if not isinstance(limit, int | float) or isinstance(limit, bool) or not limit >= 0:
            raise ValueError(f"max_time={limit!r}: it must be a number of seconds, at least 0.")
        ours.append(MaxTimeCriteria(max_time=limit))
    if options.get("stop_strings") is not None:
        if tokenizer is None:
            raise ValueError(
                "stop_strings needs the tokenizer: generate(..., stop_strings=..., tokenizer=tokenizer)."
            )
        ours.append(StopStringCriteria(stop_strings=options["stop_strings"], tokenizer=tokenizer))
    return StoppingCriteriaList(_merged(ours, given))


def _merged(ours: list[Any], given: list[Any]) -> list[Any]:
    """Hugging Face's rule: one of the caller's stands where ours of the same class did, the others follow."""
    same = {type(one): one for one in reversed(given)}  # the first of a class counts
    merged = [same.get(_hf_class(one), one) for one in ours]
    for one in given:
        if one not in merged:
            merged.append(one)
    return merged


def _hf_class(processor: Any) -> type:
    return (
        hf.RepetitionPenaltyLogitsProcessor if isinstance(processor, RepetitionPenalty) else type(processor)
    )


def _extra_processors(
    options: dict[str, Any],
    input_ids: Tensor,
    eos_tokens: tuple[int, ...],
    max_new_tokens: int,
    prefix_allowed_tokens_fn: Callable | None,
) -> list[LogitsProcessor]:
    """Those of Hugging Face's processors, other than repetition_penalty and the common warpers, that the options ask
    for, in its order."""
    length, eos = input_ids.shape[1], list(eos_tokens)
    wanted = options.get
    processors: list[LogitsProcessor] = []
    if wanted("sequence_bias") is not None:
        processors.append(hf.SequenceBiasLogitsProcessor(wanted("sequence_bias")))
    if wanted("no_repeat_ngram_size"):
        processors.append(hf.NoRepeatNGramLogitsProcessor(wanted("no_repeat_ngram_size")))
    if wanted("bad_words_ids") is not None:
        processors.append(hf.NoBadWordsLogitsProcessor(wanted("bad_words_ids"), eos or None))
    min_length = wanted("min_length")
    if wanted("min_new_tokens") is not None:  # it takes the place of min_length
        min_length = wanted("min_new_tokens") + length
    if min_length and eos:
        processors.append(hf.MinLengthLogitsProcessor(min_length, eos))
    if wanted("min_new_tokens") and eos:
        processors.append(hf.MinNewTokensLengthLogitsProcessor(length, wanted("min_new_tokens"), eos))
    if prefix_allowed_tokens_fn is not None:
        processors.append(hf.PrefixConstrainedLogitsProcessor(prefix_allowed_tokens_fn, 1))
    if wanted("forced_bos_token_id") is not None:
        processors.append(hf.ForcedBOSTokenLogitsProcessor(wanted("forced_bos_token_id")))
    if wanted("forced_eos_token_id") is not None:
        processors.append(
            hf.ForcedEOSTokenLogitsProcessor(length + max_new_tokens, wanted("forced_eos_token_id"))
        )
    if wanted("remove_invalid_values"):
        processors.append(hf.InfNanRemoveLogitsProcessor())
    if wanted("exponential_decay_length_penalty") is not None:
        decay = wanted("exponential_decay_length_penalty")
        processors.append(hf.ExponentialDecayLengthPenalty(decay, eos, length))
    if wanted("suppress_tokens") is not None:
        processors.append(hf.SuppressTokensLogitsProcessor(wanted("suppress_tokens")))
    if wanted("begin_suppress_tokens") is not None:
        # A forced BOS is the first new token of a prompt of one: what may begin comes after it.
        begin = length + 1 if length == 1 and wanted("forced_bos_token_id") is not None else length
        processors.append(hf.SuppressTokensAtBeginLogitsProcessor(wanted("begin_suppress_tokens"), begin))
    return processors


def _late_warpers(options: dict[str, Any]) -> list[LogitsProcessor]:
    """Warpers that the dispatcher does not have; Hugging Face applies them after top_k, top_p and min_p."""
    wanted, warpers = options.get, []
    if options["do_sample"]:
        if wanted("top_h") is not None:
            warpers.append(hf.TopHLogitsWarper(top_h=wanted("top_h")))
        if wanted("typical_p") is not None and wanted("typical_p") < 1.0:
            warpers.append(hf.TypicalLogitsWarper(mass=wanted("typical_p")))
        if wanted("epsilon_cutoff"):
            warpers.append(hf.EpsilonLogitsWarper(epsilon=wanted("epsilon_cutoff")))
        if wanted("eta_cutoff"):
            warpers.append(hf.EtaLogitsWarper(epsilon=wanted("eta_cutoff")))
    if wanted("renormalize_logits"):
        warpers.append(hf.LogitNormalization())
    return warpers


class RepetitionPenalty(LogitsProcessor):
    """repetition_penalty over the tokens of a row, its padding left out."""

    def __init__(self, penalty: float, padding: Sequence[int]):
        self.penalty = penalty
        self.padding = padding  # leading pad tokens of each row

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        rows = zip(input_ids, scores, self.padding, strict=True)
        return torch.stack(
            [reference.penalise(row, set(ids[pad:].tolist()), self.penalty) for ids, row, pad in rows]
        )


def _in_order(
    sampling: SamplingParams,
    padded_length: int,
    prompts: Sequence[Tensor],
    extra: list[LogitsProcessor],
    custom: list[LogitsProcessor],
    late: list[LogitsProcessor],
) -> LogitsProcessorList:
    """All processors in Hugging Face's order: sequence bias, repetition penalty, others, the caller's, warpers."""
    biases = [processor for processor in extra if isinstance(processor, hf.SequenceBiasLogitsProcessor)]
    biases = [processor for processor in biases if not isinstance(processor, hf.NoBadWordsLogitsProcessor)]
    processors = LogitsProcessorList(biases)
    if sampling.repetition_penalty != 1.0:
        padding = [padded_length - len(prompt) for prompt in prompts]
        processors.append(RepetitionPenalty(sampling.repetition_penalty, padding))
    processors.extend(processor for processor in extra if processor not in biases)
    processors = LogitsProcessorList(_merged(processors, custom))
    if sampling.do_sample:
        if sampling.temperature != 1.0:
            processors.append(hf.TemperatureLogitsWarper(float(sampling.temperature)))
        processors.extend(warper for warper in late if isinstance(warper, hf.TopHLogitsWarper))
        if sampling.top_k:
            processors.append(hf.TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1.0:
            processors.append(hf.TopPLogitsWarper(sampling.top_p))
        if sampling.min_p:
            processors.append(hf.MinPLogitsWarper(sampling.min_p))
    processors.extend(warper for warper in late if not isinstance(warper, hf.TopHLogitsWarper))
    return processors
