"""The command ``sparseffn evaluate``."""

import math

from rich.console import Console

from sparseffn_jax.checkpoints.pretrained import load_pretrained
from sparseffn_jax.commands.arguments.evaluate import EvaluateArguments
from sparseffn_jax.commands.common import matching_tokenizer
from sparseffn_jax.evaluate.losses import evaluate_tokens
from sparseffn_jax.evaluate.perplexity import strided_loss
from sparseffn_jax.evaluate.windows import check_window
from sparseffn_jax.measure.records import make_folder, write_json
from sparseffn_jax.ops.plans.choice import platform_of
from sparseffn_jax.progress import counter, stage
from sparseffn_jax.train.data import check_has_completions, join_tokens, left_out
from sparseffn_jax.train.documents import Source


class Evaluate(EvaluateArguments):
    """Measures a model's loss on a text."""

    def run(self, console: Console) -> None:
        """Runs the command."""
        batch_size = self.batch_size
        if batch_size is None:
            batch_size = 2 if platform_of(None) == "cpu" else 8
        if self.json is not None:
            make_folder(self.json.parent)
        source = Source(self.text)
        documents = list(source)
        check_has_completions(documents, self.loss_on, self.text)
        with stage("loading the model"):
            pretrained = load_pretrained(self.model)
            tokenizer = matching_tokenizer(self.model, pretrained)
        with stage("reading the text"):
            tokens, counted = join_tokens(documents, tokenizer, self.loss_on)
        for line in left_out(source.unread, source.empty):
            console.print(line, markup=False, highlight=False, soft_wrap=True)
        if len(tokens) < 2:
            raise ValueError(f"{self.text} has {len(tokens)} tokens: at least 2 are needed")
        window = check_window(self.window, pretrained.spec.n_positions)
        model = pretrained.model()
        arguments = (model, pretrained.params, tokens, window)
        with counter("evaluating") as on_batch:
            if self.stride is None:
                loss = evaluate_tokens(*arguments, batch_size, on_batch, counted)
            else:
                loss = strided_loss(*arguments, self.stride, batch_size, on_batch)
        result = {
            "loss": loss,
            "tokens": len(tokens) - 1 if counted is None else int(counted[1:].sum()),
            "loss_on": self.loss_on,
            "perplexity": math.exp(loss),
            "window": window,
            "stride": self.stride,
            "model": self.model,
            "text": self.text,
        }
        if self.json is not None:
            write_json(self.json, result)
        console.print(
            f"loss {loss:.4f} nats a token, perplexity {result['perplexity']:.3f}, "
            f"{result['tokens']:,} tokens"
        )
