"""MiniLM, fine-tuned to tell favourable sentences of movie reviews from others, by several processes on this machine.

    python reviews.py --workers 4 --method arc --form ddp
    python reviews.py --workers 4 --method powersgd --rank 32

The weights are those of all-MiniLM-L6-v2 (22.7 million parameters); the sentences, with the mean of twenty people's scores, those
of the VADER corpus (Hutto and Gilbert, 2014), which is not SST-2. Prints the validation loss, the accuracy and the bytes over a
worker's link. Needs the package transformers.
"""

from __future__ import annotations

import argparse
import os

import torch
import training
from torch import nn


class Classifier(nn.Module):
    def __init__(self, encoder: nn.Module, width: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(width, 2)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        there = (tokens != 0).long()
        hidden = self.encoder(input_ids=tokens, attention_mask=there).last_hidden_state
        weights = there[:, :, None].to(hidden)
        return self.head((hidden * weights).sum(1) / weights.sum(1))


class Reviews:
    """Whether people found a sentence favourable."""

    def __init__(self, args: argparse.Namespace) -> None:
        # The weights lie here: nothing is to be looked for elsewhere.
        os.environ["HF_HUB_OFFLINE"] = "1"
        import transformers

        self.args = args
        self.directory = str(training.dataset("minilm"))
        lines = training.dataset("reviews.tsv").read_text().splitlines()
        rows = [line.split("\t") for line in lines]
        tokenizer = transformers.AutoTokenizer.from_pretrained(self.directory)
        texts = [text for _, _, text in rows]
        encoded = tokenizer(texts, padding="max_length", truncation=True, max_length=args.length, return_tensors="pt")
        labels = torch.tensor([int(float(score) > 0) for _, score, _ in rows])
        # The same tenth on all workers and in all runs.
        mixed = torch.randperm(len(rows), generator=torch.Generator().manual_seed(1))
        self.tokens, self.labels = encoded.input_ids[mixed], labels[mixed]
        self.held_out = len(rows) // 10

    def model(self) -> nn.Module:
        import transformers

        encoder = transformers.AutoModel.from_pretrained(self.directory, add_pooling_layer=False)
        # Dropout is left out, so that losses of runs differ by what is compared.
        for module in encoder.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        return Classifier(encoder, encoder.config.hidden_size).train()

    def batch(self, generator: torch.Generator) -> training.Batch:
        seen = len(self.labels) - self.held_out
        chosen = torch.randint(seen, (self.args.batch,), generator=generator) + self.held_out
        return self._shortened(self.tokens[chosen]), self.labels[chosen]

    def loss(self, model: nn.Module, batch: training.Batch) -> torch.Tensor:
        tokens, labels = batch
        return nn.functional.cross_entropy(model(tokens), labels)

    @torch.no_grad()
    def validate(self, model: nn.Module) -> dict[str, float]:
        tokens, labels = self.tokens[: self.held_out], self.labels[: self.held_out]
        logits = torch.cat([model(self._shortened(part)) for part in tokens.split(50)])
        right = (logits.argmax(1) == labels).float().mean()
        return {"loss": float(nn.functional.cross_entropy(logits, labels)), "accuracy": float(right)}

    @staticmethod
    def _shortened(tokens: torch.Tensor) -> torch.Tensor:
        """Without columns that hold padding alone."""
        longest = int((tokens != 0).sum(1).max())
        return tokens[:, :longest]


TASK = Reviews


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=48, help="tokens of a sentence that are looked at")
    training.add_arguments(parser, steps=100, lr=5e-5, batch=8)
    return parser


if __name__ == "__main__":
    training.run(arguments(), TASK)
