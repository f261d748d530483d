"""D3RT: a model of lm-evaluation-harness, so that any of its tasks runs at a policy's depth.

    fast = d3rt.compile(model, policy="d3:alpha=0.998,start=0.5")
    lm_eval.simple_evaluate(model=d3rt.lm_eval.D3RT(fast), tasks=["gsm8k"])
    python -m d3rt.lm_eval --model d3rt --model_args pretrained=FOLDER,policy=policy.json --tasks gsm8k

A context is a prompt: it is read as the policy reads prompts, so at full depth with most. Token i of what follows,
generated or scored, has the depth of step i. So a task of single-token choices measures no skipping at all: its one
token comes from the prompt. Greedy only. Needs `pip install d3rt[eval]`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from d3rt.compiling import compile
from d3rt.evaluation.until import answer, prompt_ids
from d3rt.progress import Bar
from d3rt.runtime import Runtime

MAX_NEW_TOKENS = 256  # the harness' own
_GREEDY = {"do_sample": (False, None), "temperature": (0, 0.0, None), "num_beams": (1, None)}


@register_model("d3rt")
class D3RT(TemplateLM):
    """A compiled model, by the harness' interface."""

    def __init__(
        self,
        runtime: Runtime | None = None,
        pretrained: str | None = None,
        policy: str | None = None,
        max_gen_toks: int = MAX_NEW_TOKENS,
        batch_size: int | str | None = None,
        device: str | None = None,
        max_batch_size: int | None = None,
        **options: Any,
    ):
        """runtime: what d3rt.compile or d3rt.load made; else one is compiled from `pretrained` (None is the embedded
        model), with `policy` and further options of d3rt.compile. batch_size and device are what the harness' command
        line always passes: requests run one by one, on the runtime's own device.
        """
        super().__init__()
        if runtime is None:
            runtime = compile(pretrained, policy=policy, **options)
        elif pretrained is not None or policy is not None or options:
            raise ValueError("D3RT(runtime, ...): the runtime is compiled already; leave its options out.")
        if runtime.tokenizer is None:
            raise ValueError("D3RT: the runtime has no tokenizer; d3rt.compile(..., tokenizer=tokenizer).")
        self.runtime, self.tokenizer = runtime, runtime.tokenizer
        self.max_gen_toks = max_gen_toks

    @property
    def max_length(self) -> int:
        return self.runtime.max_seq_len

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """As the harness' Hugging Face model does: a text that begins with BOS gets no second one."""
        if add_special_tokens is None:
            bos = self.tokenizer.bos_token
            add_special_tokens = not (bos and string.startswith(bos))
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Greedy answers up to their stops."""
        texts = []
        with Bar("generate_until", len(requests), not disable_tqdm) as bar:
            for context, given in (request.args for request in requests):
                options = dict(given)
                for name, allowed in _GREEDY.items():
                    if options.pop(name, None) not in allowed:
                        raise ValueError(
                            f"D3RT: {name}={given[name]!r}: answers are greedy here; leave it out."
                        )
                eos = self.tokenizer.decode([self.eot_token_id]) if self.eot_token_id is not None else None
                stops = handle_stop_sequences(_as_list(options.pop("until", None)), eos=eos)
                count = options.pop("max_gen_toks", options.pop("max_new_tokens", self.max_gen_toks))
                if options:
                    raise ValueError(
                        f"D3RT: generation options {', '.join(sorted(options))} are not implemented."
                    )
                ids, _ = prompt_ids(self.runtime, context, count)
                text = answer(self.runtime, ids, [stop for stop in stops if stop], count).text
                self.cache_hook.add_partial("generate_until", (context, given), text)
                texts.append(text)
                bar.advance()
        return texts

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Of each continuation: its log-likelihood, and whether greedy decoding would have chosen it."""
        found = []
        with Bar("loglikelihood", len(requests), not disable_tqdm) as bar:
            for key, context, continuation in requests:
                if len(continuation) > self.max_length:
                    raise ValueError(
                        f"D3RT: a continuation of {len(continuation)} tokens exceeds {self.max_length}."
                    )
                prompt = torch.tensor(context[-(self.max_length + 1 - len(continuation)) :])
                tokens = torch.tensor([continuation])
                total, greedy = 0.0, True
                for logits, token in zip(
                    self.runtime.forced_logits([prompt], tokens), continuation, strict=True
                ):
                    logs = torch.log_softmax(logits[0], dim=-1)
                    total += float(logs[token])
                    greedy &= int(logits[0].argmax()) == token
                if key is not None:
                    self.cache_hook.add_partial("loglikelihood", key, (total, greedy))
                found.append((total, greedy))
                bar.advance()
        return found

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Of whole texts, in windows of max_length. Each window begins anew: its first token has full depth."""
        totals = []
        for (text,) in (request.args for request in requests):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(text, add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            pairs = [(None, *make_disjoint_window(window)) for window in windows]
            total = sum(score for score, _ in self._loglikelihood_tokens(pairs, disable_tqdm=disable_tqdm))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
            totals.append(total)
        return totals


def _as_list(until: Any) -> list[str] | None:
    """A copy, since the harness' helper writes into what it is given."""
    return [until] if isinstance(until, str) else None if until is None else list(until)


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
