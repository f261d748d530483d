"""What a generation gives back: GenerationStats (what happened) and GenerateOutput (Hugging Face's dict, plus that)."""

from __future__ import annotations

from dataclasses import dataclass

from transformers.generation.utils import GenerateDecoderOnlyOutput


@dataclass(frozen=True)
class GenerationStats:
    """What one generation did. Index i of a per-step field is the step that emitted token i; step 0 is the prefill."""

    num_layers: int  # L
    batch: int
    prompt_tokens: tuple[int, ...]  # of each row, padding left out
    depths: tuple[float, ...]  # retained layers, of each step
    layers: tuple[str, ...]  # the same as text, "0-15,29-31"
    weight_bytes: tuple[
        int, ...
    ]  # weight bytes read by each decode step; step 0 counts its lm_head pass only
    full_weight_bytes: int  # of one decode step at full depth
    kv_bytes: tuple[int, ...]  # K,V bytes read by each decode step, all rows together
    prefill_seconds: float
    step_seconds: tuple[float, ...]  # of each step; step 0 is sampling only

    @property
    def steps(self) -> int:
        """Tokens emitted by each row that did not finish before."""
        return len(self.depths)

    @property
    def decode_seconds(self) -> float:
        return sum(self.step_seconds)

    @property
    def tokens_per_second(self) -> float:
        """Tokens of one row over decode time, the prefill and its token left out; 0 with nothing decoded."""
        seconds = sum(self.step_seconds[1:])
        return (self.steps - 1) / seconds if seconds > 0 else 0.0

    @property
    def mean_depth(self) -> float:
        """Mean over all steps, the prefill included, as the papers count."""
        return sum(self.depths) / len(self.depths)

    @property
    def layers_skipped(self) -> float:
        """Sum over steps of the layers that did not run."""
        return sum(self.num_layers - depth for depth in self.depths)

    @property
    def byte_share(self) -> float:
        """Mean share of a full-depth step's weight bytes that a decode step read; 1 with nothing decoded."""
        decoded = self.weight_bytes[1:]
        return sum(decoded) / len(decoded) / self.full_weight_bytes if decoded else 1.0

    def __str__(self) -> str:
        return (
            f"{self.steps} tokens, mean depth {self.mean_depth:.2f} of {self.num_layers}, "
            f"{self.byte_share:.0%} of the weight bytes, prefill {self.prefill_seconds * 1e3:.0f} ms, "
            f"{self.tokens_per_second:.1f} tokens/s"
        )


@dataclass
class GenerateOutput(GenerateDecoderOnlyOutput):
    """With return_dict_in_generate: Hugging Face's own output, and `stats`. sequences [B, prompt + new]; scores
    (processed) and logits (as they came) one [B, V] a step where asked for; attentions, hidden_states and
    past_key_values are always None: the K,V cache is the runtime's."""

    stats: GenerationStats | None = None
