"""Answers from an actor that is a DeepSpeed Hybrid Engine."""

import contextlib
from collections.abc import Iterator

from transformers import PreTrainedTokenizerBase

from dschat.arguments import RolloutArguments
from dschat.console import messages
from dschat.engines.hybrid import Injection, generating
from dschat.engines.step import DeepSpeedEngine
from dschat.models.lora import adapters_fused, lora_config
from dschat.rlhf.rollout.backend import RolloutBackend
from dschat.rlhf.rollout.hf_generate import Gather, HuggingFaceGenerate


class HybridGenerate(HuggingFaceGenerate):
    """`generate` of a Hybrid Engine: through DeepSpeed's kernels where it has some.

    A session is a phase of the engine: its `eval()` at the beginning and `train()` at the end, whole weights,
    and adapters added into them. Other back ends over this one share its sessions.
    """

    def __init__(
        self,
        actor: DeepSpeedEngine,
        tokenizer: PreTrainedTokenizerBase,
        injection: Injection,
        *,
        gather: Gather,
    ) -> None:
        self.injection = injection
        super().__init__(actor, tokenizer, gather="never" if injection.gathers_by_layer else gather)
        if not injection.obstacle:
            self.name = "DeepSpeed's kernels"

    @contextlib.contextmanager
    def session(self) -> Iterator[None]:
        """As that of `generate()`, and a generation phase of the engine."""
        whole = not self.keeps_in_step  # adapters are added into weights that are whole
        fused = adapters_fused(self.engine.module) if whole else contextlib.nullcontext()
        with super().session(), generating(self.engine, self.injection), fused:
            yield

    def announce(self, backend: RolloutBackend) -> None:
        """Say in one line what was injected, what generates and why."""
        injection, kernels = self.injection, "Hybrid Engine: DeepSpeed's kernels"
        if not injection.obstacle:
            messages.info(f"{kernels} took the place of {injection.layer} and generate")
            return
        how = []
        if self.shards_weights:
            how.append(
                "a layer's weights gathered at a time" if self.keeps_in_step else "all weights gathered"
            )
        if lora_config(self.engine.module) is not None and not self.keeps_in_step:
            how.append("the adapters added into the weights")
        phases = f", with {' and '.join(how)} in each phase" if how else ""
        messages.info(
            f"{kernels} are not used, as {injection.obstacle}; {backend.name} generates instead{phases}"
        )


def plain_generate(
    args: RolloutArguments, engine: DeepSpeedEngine, tokenizer: PreTrainedTokenizerBase
) -> HuggingFaceGenerate:
    """Hugging Face's `generate` of the actor, a Hybrid Engine or not."""
    injection = getattr(engine, "injection", None)
    if injection is None:
        return HuggingFaceGenerate(engine, tokenizer, gather=args.rollout_gather)
    return HybridGenerate(engine, tokenizer, injection, gather=args.rollout_gather)
