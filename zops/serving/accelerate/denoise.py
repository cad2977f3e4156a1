"""Latents in, latents out: ZImagePipeline's loop without what it repeats in every forward.

What depends on the prompt alone (the refined captions), on the size alone (rotary tables) or on the schedule alone
(modulation of every block) is computed once; the loop works on image tokens in place and never asks the GPU anything.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from zops.serving.accelerate.attention import runs
from zops.serving.accelerate.cards import ALONE, Cards
from zops.serving.accelerate.fused import Packed
from zops.serving.accelerate.graphs import Graphs, Recent, Work
from zops.serving.accelerate.refiner import refine
from zops.serving.accelerate.rope import caption_table, image_table, joint_table, padded
from zops.serving.accelerate.schedule import Schedule, make_schedule
from zops.serving.memory import count_free

PATCH = "2-1"  # the only patch size of Z-Image: 2 x 2 latents, one frame
# Called after each forward with its index and a way to the latents so far; False stops the call.
Watch = Callable[[int, Callable[[], torch.Tensor]], bool]

_SHAPES_KEPT = 8
# An image of 1024 x 1024 takes 0.7 GB of it; a card that has little left must make larger ones without a graph.
_GRAPHS_SHARE = 0.4
_SCHEDULES_KEPT = 4


class Stopped(Exception):
    """Raised when `watch` stopped a call between two forwards."""


@dataclass(frozen=True, slots=True)
class Tables:
    """What a schedule alone decides, by forward: gains of every block, scale of the last layer, change of sigma."""

    gains: torch.Tensor
    final: torch.Tensor
    changes: torch.Tensor


@dataclass(frozen=True, slots=True)
class Layout:
    """How the sequences of a call lie in memory: one image and caption each, sequences of equal length neighbours."""

    images: int
    captions: tuple[int, ...]  # padded tokens of each sequence's caption, in the order of the sequences
    height: int  # in tokens
    width: int

    @property
    def tokens(self) -> int:
        """Return the tokens of one image, without padding."""
        return self.height * self.width


class Denoiser:
    """The loop over a transformer of fused blocks. One call at a time; the caller holds the GPU anyway.

    With several cards each has a denoiser of its own, and all are called with the same at the same time.
    """

    def __init__(self, transformer: Any, scheduler: Any, *, graphs: bool = False, cards: Cards = ALONE) -> None:
        self.cards = cards
        self.transformer = transformer
        self.scheduler = scheduler
        card = str(transformer.x_pad_token.device)
        self.graphs = Graphs(_GRAPHS_SHARE, free=lambda: count_free(card)) if graphs else None
        self._blocks = [*transformer.noise_refiner, *transformer.layers]
        self._tables: Recent[Tables] = Recent(_SCHEDULES_KEPT)
        self._shapes: Recent[_Shape] = Recent(_SHAPES_KEPT, self.graphs.forget if self.graphs else _nothing)

    @torch.inference_mode()
    def __call__(
        self,
        embeds: Sequence[torch.Tensor],
        latents: torch.Tensor,
        *,
        forwards: int,
        negative: Sequence[torch.Tensor] = (),
        guidance_scale: float = 0.0,
        skip: int = 0,
        watch: Watch = lambda _index, _latents: True,
    ) -> torch.Tensor:
        """Return the denoised latents, float32, of the shape of those given: (images, channels, height, width).

        Args:
            embeds: of each image's prompt, (tokens, width).
            latents: noise; or a noisy image, then `skip` says how many forwards it is past noise.
            forwards: of the whole way from noise to image.
            negative: embeds of each image's negative prompt; used when guidance_scale is above 0.
            guidance_scale: as ZImagePipeline's: 0 is off, anything else doubles the work.
            skip: forwards left out at the noisy end.
            watch: looks at each forward and may stop the call.

        Raises:
            Stopped: when `watch` said so.
        """
        height, width = latents.shape[2] // 2, latents.shape[3] // 2
        schedule = make_schedule(self.scheduler, forwards, tokens=height * width, skip=skip)
        guided = guidance_scale > 0
        sequences = [*embeds, *negative] if guided else list(embeds)
        order = sorted(range(len(sequences)), key=lambda i: padded(len(sequences[i])))
        sequences = [sequences[i] for i in order]
        layout = Layout(len(embeds), tuple(padded(len(embed)) for embed in sequences), height, width)
        tables = self._tables.get(schedule, lambda: self._make_tables(schedule))
        shape = self._shapes.get(
            (layout, tuple(order), guidance_scale), lambda: _Shape(self, layout, tuple(order), guidance_scale)
        )
        shape.begin(to_tokens(latents.float()), refine(self.transformer, sequences))
        behind: list[torch.cuda.Event] = []
        for index in range(len(schedule)):
            shape.step(tables, index)
            if not watch(index, lambda: to_latents(shape.tokens, height, width)):
                raise Stopped
            _stay_close(behind, latents.device)
        return to_latents(shape.tokens, height, width)

    def _make_tables(self, schedule: Schedule) -> Tables:
        transformer = self.transformer
        device, dtype = transformer.x_pad_token.device, transformer.x_pad_token.dtype
        times = torch.tensor(schedule.times, dtype=torch.float32, device=device)
        timesteps = transformer.t_embedder(times * transformer.t_scale).to(dtype)
        final = transformer.all_final_layer[PATCH]
        return Tables(
            torch.stack([block.gains(timesteps) for block in self._blocks], dim=1).contiguous(),
            1.0 + final.adaLN_modulation(timesteps),
            torch.tensor(schedule.changes, dtype=torch.float32, device=device),
        )


class _Shape:
    """The buffers, tables and, from its second call on, the graph of one layout."""

    def __init__(self, owner: Denoiser, layout: Layout, order: tuple[int, ...], guidance_scale: float) -> None:
        transformer = owner.transformer
        device, dtype = transformer.x_pad_token.device, transformer.x_pad_token.dtype
        self._owner, self._layout, self._scale = owner, layout, guidance_scale
        self._dtype = dtype
        # Which image each sequence is of, and where each image's prediction is found.
        self._source = torch.tensor([i % layout.images for i in order], device=device)
        self._place = torch.tensor([order.index(i) for i in range(len(order))], device=device)
        self._straight = order == tuple(range(layout.images))
        captions = {n: caption_table(transformer, n, device) for n in set(layout.captions)}
        images = {n: image_table(transformer, n, layout.height, layout.width, device) for n in set(layout.captions)}
        image_tables = [images[n] for n in layout.captions]
        each = padded(layout.tokens)
        self._cards = cards = owner.cards
        self._noise = Packed(cards.mine(torch.cat(image_tables)), ((each, len(order)),), cards)
        self._joint = Packed(
            cards.mine(joint_table(image_tables, [captions[n] for n in layout.captions])),
            runs([each + n for n in layout.captions]),
            cards,
        )
        width = transformer.x_pad_token.shape[1]
        features = transformer.all_x_embedder[PATCH].in_features
        self.tokens = torch.zeros(layout.images, layout.tokens, features, device=device)
        self._captions = torch.zeros(sum(layout.captions), width, device=device, dtype=dtype)
        self._now: Tables | None = None
        self._calls = 0

    def begin(self, tokens: torch.Tensor, captions: torch.Tensor) -> None:
        """Take over the noise and the refined captions of a call."""
        self._calls += 1
        self._captions.copy_(captions)
        self._replay()  # captures it before the tokens come, which that changes
        self.tokens.copy_(tokens)

    def step(self, tables: Tables, index: int) -> None:
        """Do one forward and move the tokens."""
        now = Tables(tables.gains[index], tables.final[index], tables.changes[index])
        replay = self._replay()
        if replay is None or self._now is None:
            self._forward(now)
            return
        self._now.gains.copy_(now.gains)
        self._now.final.copy_(now.final)
        self._now.changes.copy_(now.changes)
        replay()

    def _replay(self) -> Work | None:
        """Return the graph of a forward, from the second call on and where there is one; never to be kept here.

        It reads from the same tensors every time, which are written before.
        """
        graphs = self._owner.graphs
        if graphs is None or self._calls < 2:
            return None
        now = self._now = self._now or self._make_tables()
        return graphs.get(self, lambda: self._forward(now))

    def _make_tables(self) -> Tables:
        final = self._owner.transformer.all_final_layer[PATCH].norm_final.normalized_shape[0]
        device = self.tokens.device
        count = len(self._owner._blocks)  # noqa: SLF001 - a part of its owner
        return Tables(
            torch.zeros(count, 4, final, device=device),
            torch.zeros(final, device=device, dtype=self._dtype),
            torch.zeros((), device=device),
        )

    def _forward(self, now: Tables) -> None:
        predicted = self._predict(self.tokens if self._straight else self.tokens[self._source], now)
        if not self._straight:
            predicted = predicted[self._place]
        if self._scale > 0:
            positive, negative = predicted.chunk(2)
            predicted = positive + self._scale * (positive - negative)
        self.tokens.add_(-predicted * now.changes)

    def _predict(self, tokens: torch.Tensor, now: Tables) -> torch.Tensor:
        """Return the transformer's prediction for each sequence, in float32."""
        transformer, layout = self._owner.transformer, self._layout
        count, length, _ = tokens.shape
        x = transformer.all_x_embedder[PATCH](tokens.to(self._dtype))
        missing = padded(length) - length
        if missing:
            x = torch.cat((x, transformer.x_pad_token.expand(count, missing, -1)), dim=1)
        gains = iter(now.gains.unbind(0))
        rows = self._through(transformer.noise_refiner, x.flatten(0, 1), gains, self._noise)
        rows = self._through(transformer.layers, self._join(rows.view(x.shape)), gains, self._joint)
        final = transformer.all_final_layer[PATCH]
        images = self._images(rows, layout.tokens)
        images = functional.layer_norm(images, images.shape[-1:], eps=final.norm_final.eps) * now.final
        return final.linear(images).float()  # type: ignore[no-any-return]  # diffusers is not typed

    def _through(
        self, blocks: Iterable[Any], rows: torch.Tensor, gains: Iterator[torch.Tensor], packed: Packed
    ) -> torch.Tensor:
        """Return the rows after some blocks, of which each card does its share."""
        mine = self._cards.mine(rows)
        for block in blocks:
            mine = block.run(mine, next(gains), packed)
        return self._cards.all(mine, len(rows))

    def _join(self, x: torch.Tensor) -> torch.Tensor:
        """Return the rows of each image followed by its caption's."""
        groups = runs(self._layout.captions)
        counts = [count for _, count in groups]
        captions = self._captions.split([length * count for length, count in groups])
        return _one([
            torch.cat((images, caption.view(len(images), -1, x.shape[-1])), dim=1).flatten(0, 1)
            for images, caption in zip(x.split(counts), captions, strict=True)
        ])  # fmt: skip

    def _images(self, rows: torch.Tensor, tokens: int) -> torch.Tensor:
        """Return the first rows of each sequence: its image."""
        groups = self._joint.packing
        pieces = rows.split([length * count for length, count in groups])
        return _one([
            piece.view(count, length, -1)[:, :tokens] for piece, (length, count) in zip(pieces, groups, strict=True)
        ])  # fmt: skip


def _nothing(_shape: _Shape) -> None:
    pass


def _one(pieces: list[torch.Tensor]) -> torch.Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def _stay_close(behind: list[torch.cuda.Event], device: torch.device) -> None:
    """Wait for the forward before the one just started: a call that is stopped has at most two under way."""
    if device.type != "cuda":
        return
    event = torch.cuda.Event()
    event.record()
    behind.append(event)
    if len(behind) > 1:
        behind.pop(0).synchronize()


def to_tokens(latents: torch.Tensor) -> torch.Tensor:
    """Return latents (images, channels, height, width) as tokens (images, height/2 * width/2, 4 * channels)."""
    count, channels, height, width = latents.shape
    patches = latents.view(count, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 3, 5, 1)
    return patches.reshape(count, height * width // 4, 4 * channels)


def to_latents(tokens: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Return tokens of height x width as latents; the inverse of `to_tokens`."""
    patches = tokens.view(len(tokens), height, width, 2, 2, -1).permute(0, 5, 1, 3, 2, 4)
    return patches.reshape(len(tokens), -1, 2 * height, 2 * width)


def denoise_plainly(
    transformer: Any,
    scheduler: Any,
    embeds: Sequence[torch.Tensor],
    latents: torch.Tensor,
    *,
    forwards: int,
    negative: Sequence[torch.Tensor] = (),
    guidance_scale: float = 0.0,
    skip: int = 0,
    watch: Watch = lambda _index, _latents: True,
) -> torch.Tensor:
    """Do what `Denoiser` does by diffusers' transformer as it is: what `eager` runs, and what the rest is held to.

    Raises:
        Stopped: when `watch` said so.
    """
    tokens = latents.shape[2] * latents.shape[3] // 4
    schedule = make_schedule(scheduler, forwards, tokens=tokens, skip=skip)
    guided = guidance_scale > 0
    captions = [*embeds, *negative] if guided else list(embeds)
    moving = latents.float()
    dtype = transformer.x_pad_token.dtype  # transformer.dtype walks through all modules
    behind: list[torch.cuda.Event] = []
    with torch.inference_mode():
        for index, (time, change) in enumerate(zip(schedule.times, schedule.changes, strict=True)):
            model_input = moving.to(dtype).repeat(2 if guided else 1, 1, 1, 1).unsqueeze(2)
            times = torch.full((len(captions),), time, dtype=torch.float32, device=moving.device)
            out = transformer(list(model_input.unbind(0)), times, captions, return_dict=False)[0]
            predicted = torch.stack([one.float() for one in out]).squeeze(2)
            if guided:
                positive, against = predicted.chunk(2)
                predicted = positive + guidance_scale * (positive - against)
            moving = moving + change * -predicted
            now = moving
            if not watch(index, lambda now=now: now):  # type: ignore[misc]  # mypy infers no type for its default
                raise Stopped
            _stay_close(behind, latents.device)
    return moving
