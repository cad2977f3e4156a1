"""Prompts to embeddings: the text encoder without the padding, the layers and the statistics that nobody reads.

ZImagePipeline pads every prompt to 512 tokens, keeps the output of all layers, takes the last but one and drops the
padding again. The encoder looks only backwards, so padding on the right changes nothing before it: a prompt is padded
to the next 32 tokens (so that few shapes exist), needs no mask, and the last layer is never run.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from zops.serving.accelerate.graphs import Graphs, Recent
from zops.serving.accelerate.rope import padded
from zops.serving.memory import count_free

_SHAPES_KEPT = 16
_GRAPHS_SHARE = 0.05
# At most 2.6 MB each.
_PROMPTS_KEPT = 32


class TextEncoder:
    """The encoder of a pipeline; `graphs` replays it by CUDA graph from a shape's second use on."""

    def __init__(self, pipeline: Any, *, graphs: bool = False) -> None:
        self._tokenizer = pipeline.tokenizer
        self._model = pipeline.text_encoder
        card = str(self._model.embed_tokens.weight.device)
        self._graphs = Graphs(_GRAPHS_SHARE, free=lambda: count_free(card)) if graphs else None
        self._shapes: Recent[_Shape] = Recent(_SHAPES_KEPT, self._graphs.forget if self._graphs else _nothing)

    def encode(self, prompts: Sequence[str]) -> list[torch.Tensor]:
        """Return the embeds of each prompt, encoded alone: equal to the bit in any batch.

        So there are as many shapes as there are lengths, each of which soon has its graph (8 ms a prompt on an H200).
        """
        return [self([prompt])[0] for prompt in prompts]

    @torch.inference_mode()
    def __call__(self, prompts: Sequence[str], *, longest: int = 512) -> list[torch.Tensor]:
        """Return the embeds of each prompt, (tokens, width); longer prompts are cut at `longest` tokens."""
        texts = [
            self._tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True, enable_thinking=True
            )
            for prompt in prompts
        ]
        ids = [self._tokenizer(text, truncation=True, max_length=longest)["input_ids"] for text in texts]
        length = padded(max(map(len, ids)))
        batch = torch.zeros(len(ids), length, dtype=torch.long)
        for row, own in zip(batch, ids, strict=True):
            row[: len(own)] = torch.tensor(own)
        shape = self._shapes.get(batch.shape, lambda: _Shape(self._model, *batch.shape, graphs=self._graphs))
        hidden = shape.encode(batch)
        return [hidden[i, : len(own)].clone() for i, own in enumerate(ids)]


def remember(encode: Callable[[Sequence[str]], list[torch.Tensor]]) -> Callable[[Sequence[str]], list[torch.Tensor]]:
    """Return an encoder that knows the prompts it was asked last: many images of one prompt are a common wish.

    For an encoder whose embeds do not depend on the batch, as `TextEncoder.encode`.
    """
    known: Recent[torch.Tensor] = Recent(_PROMPTS_KEPT)

    def encode_new(prompts: Sequence[str]) -> list[torch.Tensor]:
        return [known.get(prompt, partial(_only, encode, prompt)) for prompt in prompts]

    return encode_new


def _only(encode: Callable[[Sequence[str]], list[torch.Tensor]], prompt: str) -> torch.Tensor:
    (embeds,) = encode([prompt])
    return embeds


class _Shape:
    """The buffers and, from its second call on, the graph of one batch and length."""

    def __init__(self, model: Any, count: int, length: int, *, graphs: Graphs | None) -> None:
        self._model, self._graphs = model, graphs
        self._device = model.embed_tokens.weight.device
        self._ids = torch.zeros(count, length, dtype=torch.long, device=self._device)
        self._places = torch.arange(length, device=self._device)[None]
        self._hidden: torch.Tensor | None = None
        self._calls = 0

    def encode(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the hidden states of a batch; they are overwritten by the next one."""
        self._ids.copy_(ids)
        self._calls += 1
        replay = self._graphs.get(self, self._run) if self._graphs and self._calls > 1 else None
        (replay or self._run)()
        assert self._hidden is not None
        return self._hidden

    def _run(self) -> None:
        model = self._model
        hidden = model.embed_tokens(self._ids)
        rotary = model.rotary_emb(hidden, self._places)
        for layer in model.layers[: model.config.num_hidden_layers - 1]:
            out = layer(hidden, attention_mask=None, position_embeddings=rotary, position_ids=self._places)
            hidden = out[0] if isinstance(out, tuple) else out
        if self._hidden is None:
            self._hidden = torch.empty_like(hidden)
        self._hidden.copy_(hidden)


def _nothing(_shape: _Shape) -> None:
    pass


def reads_backwards_only(model: Any) -> bool:
    """Return whether a missing mask means a causal one to this encoder, which `TextEncoder` relies on."""
    return bool(model.config._attn_implementation == "sdpa")  # noqa: SLF001 - there is no public way to ask
