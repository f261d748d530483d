"""D3, "Decoding at Decaying Depth": the depth decays exponentially with the index of the generated token.

arXiv 2503.08524 (Findings of ACL 2025). It gives the depth, floor(L * alpha**i), and where the dropped layers
start; it does not say which layers survive once the window reaches the top, so that is a parameter here. All
readings are nested: a layer once skipped stays skipped in that generation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from d3rt.errors import PolicyError
from d3rt.plan import LayerSet
from d3rt.policies.base import Policy, check_choice, check_integer, check_real, check_step

VARIANTS = ("window", "slide")

# num_layers -> start, by task. See D3.paper for where each comes from.
_PAPER_ALPHA = {"gsm8k": 0.9999, "bbh": 0.9}
_PAPER_START = {"gsm8k": {32: 0.8, 40: 0.7, 80: 0.8}, "bbh": {32: 0.6, 40: 0.5, 80: 0.6}}


def exponential_depth(num_layers: int, alpha: float, step: int) -> int:
    """floor(L * alpha**i), before any minimum; reaches 0 for alpha < 1.  # arXiv 2503.08524, sec. 3.4

    In float64: in float32 it is off by one at places (L = 30, alpha = .999, i = 310 gives 22 for 21).
    """
    return math.floor(num_layers * alpha**step)


@dataclass(frozen=True)
class D3(Policy):
    """Depth d(i) = floor(L * alpha**i) at step i; k = L - d(i) neighbouring layers are skipped.

    alpha: share of layers kept per token, in (0, 1]. Every alpha < 1 skips a layer from step 1 on, because of
        the floor.
    start: where the skipped window starts, as a share of the depth, in [0, 1): layer s = floor(start * L). It
        is a position among the layers, not among the tokens.
    tail: layers at the top that always run (t). 0 gives the averages that the paper prints, where the window
        may run off the top and leave a static exit at layer s; 1 honours the paper's words, "core tail
        layers".
    variant: "window" skips [s, min(s + k, L - t)), so at least s + t layers run.
        "slide" moves the window down once it touches the tail, and skips k layers down to h + t that run:
        [max(h, min(s, L - t - k)), ... + k), k <= L - t - h.
    head: layers at the bottom that always run (h); only "slide" can reach them, so only there may it differ
        from 1.
    """

    alpha: float
    start: float
    tail: int = 1
    variant: str = "window"
    head: int = 1

    name = "d3"
    makers = ("paper",)

    def __post_init__(self) -> None:
        alpha = check_real("D3", "alpha", self.alpha)
        start = check_real("D3", "start", self.start)
        check_choice("D3", "variant", self.variant, VARIANTS)
        if not 0 < alpha <= 1:
            raise PolicyError(
                f"D3(alpha={self.alpha}): alpha is the share of layers kept per token, "
                "so it must be in (0, 1]."
            )
        if not 0 <= start < 1:
            raise PolicyError(
                f"D3(start={self.start}): start is the share of the layers below the skipped ones, so it "
                "must be in [0, 1); 0.5 starts in the middle."
            )
        for name in ("tail", "head"):
            count = check_integer("D3", name, getattr(self, name))
            if count < 0:
                raise PolicyError(
                    f"D3({name}={count}): {name} counts layers that always run, so it must be >= 0."
                )
            object.__setattr__(self, name, count)
        if self.variant != "slide" and self.head != 1:
            raise PolicyError(
                f"D3(head={self.head}, variant={self.variant!r}): the window never goes below start, so head "
                "has a meaning only in variant='slide'; leave it out, or choose that."
            )
        object.__setattr__(self, "alpha", alpha)
        object.__setattr__(self, "start", start)

    @classmethod
    def paper(cls, task: str, num_layers: int) -> D3:
        """The paper's setting for a task, "gsm8k" or "bbh", and 32, 40 or 80 layers (Llama 2 7B, 13B, 70B).

        The chosen (start, alpha) are not legible in the paper's text at hand. Recovered by arithmetic from
        the printed average depths (Table 6), with i = 0..N-1 up to the maximum length (1024 and 200), a
        minimum depth of floor(start * L) and so no tail:
        - alpha, everywhere: .9999 for gsm8k (29.904, 37.512, 75.534), .9 for bbh (19.165, 20.335, 48.430).
        - start for bbh: .6, .5, .6, since the minimum depth is reached and shows in the average.
        Not recovered by arithmetic: start for gsm8k, where the minimum is never reached and every start gives
        the same average. .8 (32 layers) and .7 (40) are those whose printed accuracies (12.05, 23.43) are the
        reported ones; .8 for 80 layers is taken over from 32 layers, with nothing to support it.

        A model of another size gets the 32-layer setting, whose start is a share of the depth.
        """
        check_choice("D3.paper", "task", task, _PAPER_ALPHA)
        start = _PAPER_START[task].get(num_layers, _PAPER_START[task][32])
        policy = cls(alpha=_PAPER_ALPHA[task], start=start, tail=0)
        policy.validate(num_layers)
        return policy

    def first_skipped(self, num_layers: int) -> int:
        """s = floor(start * L), where the window starts; .7 * 90 must not become 62."""
        return math.floor(self.start * num_layers + 1e-9)

    def validate(self, num_layers: int) -> None:
        """PolicyError when no layer could ever be skipped, or every layer would be."""
        super().validate(num_layers)
        if self.alpha == 1:
            return
        if self.variant == "slide":
            below, words = self.head, f"head ({self.head})"
        else:
            below = self.first_skipped(num_layers)
            words = f"the {below} layers below start"
        if below + self.tail < 1:
            raise PolicyError(
                f"{self!r} on {num_layers} layers: {words} and tail ({self.tail}) leave no layer that always "
                "runs, so the depth would fall to 0; choose a tail of at least 1."
            )
        if below + self.tail >= num_layers:
            raise PolicyError(
                f"{self!r} on {num_layers} layers: {words} and tail ({self.tail}) leave no layer that can be "
                "skipped; lower them, or use FullDepth()."
            )

    def layer_set(self, step: int, num_layers: int) -> LayerSet:
        """All layers but the window of step `step`."""
        check_step(step)
        skipped = num_layers - exponential_depth(num_layers, self.alpha, step)
        start, top = self.first_skipped(num_layers), num_layers - self.tail
        if self.variant == "slide":
            skipped = min(skipped, top - self.head)
            start = max(self.head, min(start, top - skipped))
        return LayerSet.except_window(start, min(start + skipped, top), num_layers)
