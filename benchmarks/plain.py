"""The base of a model in transformers, to compare with."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from model_adapter.msa.config import LoadedModel


class Plain:
    """The same base in transformers. weights: taken before an engine takes them."""

    def __init__(self, model: LoadedModel, device: torch.device) -> None:
        import transformers  # noqa: PLC0415  # optional

        c = model.config
        kind = "Qwen3" if c.qk_norm else "Llama"
        config = getattr(transformers, f"{kind}Config")(
            vocab_size=c.vocab_size,
            hidden_size=c.hidden_size,
            intermediate_size=c.intermediate_size,
            num_hidden_layers=c.num_layers,
            num_attention_heads=c.num_heads,
            num_key_value_heads=c.num_kv_heads,
            head_dim=c.head_dim,
            rms_norm_eps=c.rms_norm_eps,
            max_position_embeddings=c.max_positions,
            tie_word_embeddings=c.tie_word_embeddings,
            rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
            pad_token_id=0,
            eos_token_id=None,
            bos_token_id=None,
        )
        dtype = torch.bfloat16 if model.compute_dtype == "bf16" else torch.float32
        self._device = device
        with device:  # what it is initialised with first is not worth a CPU's minutes
            made = getattr(transformers, f"{kind}ForCausalLM")(config)
        self._model = made.to(device, dtype)
        own = {name: value for name, value in model.weights.items() if "router" not in name}
        missing, unexpected = self._model.load_state_dict(own, strict=False)
        assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
        self._model.tie_weights()
        self._model.eval()

    def tokens_per_s(self, prompts: Sequence[Sequence[int]], tokens: int) -> float:
        """Of greedy answers to all prompts in one left-padded batch."""
        longest = max(len(prompt) for prompt in prompts)
        ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask[row, longest - len(prompt) :] = 1
        ids, mask = ids.to(self._device), mask.to(self._device)
        exactly = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
        started = time.perf_counter()
        made = self._model.generate(input_ids=ids, attention_mask=mask, **exactly)
        made.cpu()
        return float(len(prompts) * tokens / (time.perf_counter() - started))
