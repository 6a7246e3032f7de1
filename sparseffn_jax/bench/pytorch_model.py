"""The same programs of a whole dense model in Hugging Face's PyTorch, as what ours must beat.

The weights are drawn anew, because the clock does not depend on them. On a GPU PyTorch runs there.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Int

from sparseffn_jax.bench.external import torch_refusal
from sparseffn_jax.train.config import TrainConfig

Run = Callable[[], Any]


class PyTorchModel:
    """A dense decoder of random weights in Hugging Face's PyTorch.

    Args:
      config: Hugging Face config of the model.
      dtype: name of the precision of the computation; the weights are float32.

    Raises:
      ValueError: if PyTorch cannot run here; the message gives the reason.
    """

    def __init__(self, config: Any, dtype: str):
        if (reason := torch_refusal()) is not None:
            raise ValueError(f"PyTorch's model cannot run: {reason}")
        import torch
        from transformers import AutoModelForCausalLM

        self._torch: Any = torch
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        self._model.to(self._device)
        self._dtype = getattr(torch, dtype)

    def evaluation(self, tokens: Int[np.ndarray, "b w"]) -> Run:
        """Returns what computes the mean loss of a batch of windows, without gradients."""
        batch = self._ids(tokens)

        def run() -> float:
            self._model.eval()
            with self._torch.inference_mode(), self._precision():
                return self._loss(batch).item()

        return run

    def training_step(self, tokens: Int[np.ndarray, "b w"], config: TrainConfig) -> Run:
        """Returns what trains all parameters by one step of AdamW on a batch of windows."""
        batch, model = self._ids(tokens), self._model
        optimizer = self._torch.optim.AdamW(
            model.parameters(), lr=config.peak_rates[0], weight_decay=config.decay
        )

        def run() -> float:
            model.train()
            optimizer.zero_grad(set_to_none=True)
            with self._precision():
                loss = self._loss(batch)
            loss.backward()
            self._torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
            optimizer.step()
            return loss.item()

        return run

    def generation(self, prompt: Int[np.ndarray, "b t"], new_tokens: int) -> Run:
        """Returns what continues prompts by the likeliest tokens, with the cache."""
        ids = self._ids(prompt)

        def run() -> Any:
            self._model.eval()
            with self._torch.inference_mode(), self._precision():
                return self._model.generate(
                    ids,
                    attention_mask=self._torch.ones_like(ids),
                    max_new_tokens=new_tokens,
                    min_new_tokens=new_tokens,
                    do_sample=False,
                    pad_token_id=0,
                ).cpu()

        return run

    def _ids(self, tokens: Int[np.ndarray, "..."]) -> Any:
        return self._torch.from_numpy(tokens.astype(np.int64)).to(self._device)

    def _loss(self, batch: Any) -> Any:
        logits = self._model(input_ids=batch[:, :-1]).logits
        flat = logits.reshape(-1, logits.shape[-1]).float()
        return self._torch.nn.functional.cross_entropy(flat, batch[:, 1:].reshape(-1))

    def _precision(self) -> Any:
        if self._dtype == self._torch.float32:
            return contextlib.nullcontext()
        return self._torch.autocast(self._device, self._dtype)
