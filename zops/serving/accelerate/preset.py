"""What a preset does to a pipeline, and the three stages that a request then goes through.

`eager` changes nothing; `bf16` computes the same with fewer and larger pieces of work; `fp8` also multiplies in fp8.
Each transformation says what it did or why it was left out, so that a receipt and a log can.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from zops.serving.accelerate.attention import NATIVE, Backend, probe
from zops.serving.accelerate.cards import ALONE, Cards
from zops.serving.accelerate.choice import Preset
from zops.serving.accelerate.decoder import FusedDecoder
from zops.serving.accelerate.denoise import Denoiser, Watch, denoise_plainly
from zops.serving.accelerate.fp8 import has_fp8, quantise_linears
from zops.serving.accelerate.fused import FusedBlock, fuse_blocks
from zops.serving.accelerate.homes import Homes, current
from zops.serving.accelerate.rows import PLAIN, operations
from zops.serving.accelerate.text import TextEncoder, reads_backwards_only
from zops.serving.memory import give_back

Encode = Callable[[Sequence[str]], list[torch.Tensor]]
Decode = Callable[[torch.Tensor], torch.Tensor]

# A 1024 x 1024 image with a caption of up to 64 tokens: the size that the model is made for.
_PROBE_TOKENS = 4160
# Two measurements of the same kernel differ by less; backends differ in their rounding, so equal seeds would, too.
_CLEARLY = 0.9


class Denoise(Protocol):
    """Latents in, latents out; see `Denoiser.__call__`."""

    def __call__(
        self,
        embeds: Sequence[torch.Tensor],
        latents: torch.Tensor,
        *,
        forwards: int,
        negative: Sequence[torch.Tensor] = (),
        guidance_scale: float = 0.0,
        skip: int = 0,
        watch: Watch = ...,
    ) -> torch.Tensor:
        """Return denoised latents."""


@dataclass(frozen=True, slots=True)
class Note:
    """One transformation: what it is, and why it was left out (empty when it was done)."""

    what: str
    left_out: str = ""

    def __str__(self) -> str:
        """Return it in words."""
        return f"{self.what}: left out, {self.left_out}" if self.left_out else self.what


@dataclass(frozen=True, slots=True)
class Applied:
    """A pipeline under a preset: its three stages and what was done to get them.

    `encode` gives each prompt's embeds, (tokens, width), on the transformer's card. `denoise` takes and gives float32
    latents there. `decode` takes latents and gives pixels 0..1, (images, 3, height, width), on the VAE's card.
    """

    preset: Preset
    encode: Encode
    denoise: Denoise
    decode: Decode
    notes: tuple[Note, ...] = ()
    graphs: bool = False
    """Whether the second call with a shape captures a CUDA graph."""

    @property
    def done(self) -> tuple[str, ...]:
        """Return the transformations that were done."""
        return tuple(note.what for note in self.notes if not note.left_out)


def apply(
    pipeline: Any,
    preset: Preset,
    *,
    fp8_text: bool = False,
    graphs: bool = True,
    fused_text: bool = True,
    fused_decoder: bool = True,
    probe_attention: bool = True,
    homes: Homes | None = None,
    cards: Cards = ALONE,
) -> Applied:
    """Transform a pipeline in place and return its stages.

    Args:
        pipeline: a ZImagePipeline on its device, changed for good: fp8 keeps no other weights.
        preset: which one.
        fp8_text: quantise the text encoder too (fp8 only): 4 GB less.
        graphs: start the kernels of a forward by one CUDA graph, from the second call with a shape on.
        fused_text: encode prompts without padding.
        fused_decoder: decode with channels last and fused steps.
        probe_attention: measure which attention is fastest here; torch's choice otherwise.
        homes: the card of each component; as they are by default.
        cards: those that denoise each image together, of which this process serves the first; not with eager.
    """
    homes = homes or Homes.of(pipeline)
    if preset == "eager":
        return _between(_eager(pipeline, homes), homes)
    transformer = pipeline.transformer
    device = homes.transformer
    rows = operations(device)
    fp8 = preset == "fp8"
    direct = has_fp8(device)
    count = fuse_blocks(transformer, rows, fp8=fp8)
    on_gpu = "" if device.type == "cuda" else "no GPU"
    # Exchanges between cards could be captured too; that no call is ever half captured was not shown yet.
    no_graphs = on_gpu or ("several cards work on an image" if cards.count > 1 else "" if graphs else "not asked for")
    notes = [
        Note(f"{count} blocks with fused projections, real rotary tables and modulation once a schedule"),
        Note("captions refined once a prompt"),
        Note("row kernels", left_out="" if rows is not PLAIN else on_gpu or "no Triton"),
    ]
    if fp8:
        notes.append(Note("fp8 products", left_out="" if direct else "this device has none; computed in float32"))
    applied = replace(
        _eager(pipeline, homes),
        preset=preset,
        denoise=Denoiser(transformer, pipeline.scheduler, graphs=not no_graphs, cards=cards),
        graphs=not no_graphs,
    )
    notes.append(Note("CUDA graphs", no_graphs))
    notes.append(
        choose_attention(transformer, device, heads=-(-transformer.n_heads // cards.count))
        if probe_attention and not on_gpu
        else Note("attention probe", on_gpu or "not asked for")
    )
    if fp8 and fp8_text:
        notes.append(Note(f"{quantise_linears(pipeline.text_encoder, rows)} layers of the text encoder in fp8"))
    if fused_text:
        applied, note = _use_text_encoder(applied, pipeline, graphs=graphs and not on_gpu)
        notes.append(note)
    if fused_decoder:
        applied = replace(applied, decode=fused_decode(pipeline))
        notes.append(Note("decoder with channels last and fused norms"))
    # The weights that were replaced came by another stream or in another size: nothing here could use their memory.
    give_back(str(device))
    return _between(replace(applied, notes=tuple(notes)), homes)


def _between(applied: Applied, homes: Homes) -> Applied:
    """Run each stage on its card, and take what it makes to the next one's."""

    def encode(prompts: Sequence[str]) -> list[torch.Tensor]:
        with current(homes.text_encoder):
            return [embeds.to(homes.transformer) for embeds in applied.encode(prompts)]

    def denoise(embeds: Sequence[torch.Tensor], latents: torch.Tensor, **how: Any) -> torch.Tensor:
        with current(homes.transformer):
            return applied.denoise(embeds, latents, **how)

    def decode(latents: torch.Tensor) -> torch.Tensor:
        with current(homes.vae):
            return applied.decode(latents.to(homes.vae))

    notes = (*applied.notes, Note(str(homes))) if homes.several else applied.notes
    return replace(applied, encode=encode, denoise=denoise, decode=decode, notes=notes)


def choose_attention(transformer: Any, device: torch.device, *, heads: int | None = None) -> Note:
    """Give all fused blocks the attention that a probe finds fastest here; say what it found.

    Args:
        transformer: with fused blocks.
        device: its card.
        heads: that this card computes; all of them by default.
    """
    head = transformer.layers[0].head
    heads = heads or transformer.n_heads
    with current(device):
        found = probe(device, transformer.x_pad_token.dtype, heads=heads, head=head, tokens=_PROBE_TOKENS)
    best = _clearly_best(found)
    said = ", ".join(f"{one.name} {one.trouble or f'{one.seconds * 1e3:.3f} ms'}" for one in found)
    if not best.usable:
        return Note("attention probe", f"none passed: {said}")
    for block in transformer.modules():
        if isinstance(block, FusedBlock):
            block.attend = best.attend
    return Note(f"attention by {best.name} ({said})")


def _clearly_best(found: Sequence[Backend]) -> Backend:
    """Return the fastest, or torch's own where nothing is clearly faster: a start must choose as the last one did."""
    native = next((one for one in found if one.name == NATIVE.name and one.usable), found[0])
    return found[0] if found[0].seconds < _CLEARLY * native.seconds else native


def _use_text_encoder(applied: Applied, pipeline: Any, *, graphs: bool) -> tuple[Applied, Note]:
    what = "prompts encoded without padding"
    if not reads_backwards_only(pipeline.text_encoder):
        return applied, Note(what, "the text encoder's attention is not torch's own")
    return replace(applied, encode=TextEncoder(pipeline, graphs=graphs).encode), Note(what)


def _eager(pipeline: Any, homes: Homes) -> Applied:
    def encode(prompts: Sequence[str]) -> list[torch.Tensor]:
        with torch.inference_mode():
            # To be asked for its device, the pipeline walks through all modules.
            embeds, _ = pipeline.encode_prompt(
                list(prompts), device=homes.text_encoder, do_classifier_free_guidance=False
            )
        return list(embeds)

    def denoise(embeds: Sequence[torch.Tensor], latents: torch.Tensor, **how: Any) -> torch.Tensor:
        return denoise_plainly(pipeline.transformer, pipeline.scheduler, embeds, latents, **how)

    def decode(latents: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            return _pixels(pipeline.vae.decode(_unscaled(pipeline.vae, latents), return_dict=False)[0])

    return Applied("eager", encode, denoise, decode)


def fused_decode(pipeline: Any) -> Decode:
    """Return a decode stage with channels last and fused steps; the weights of the VAE are reordered in place."""
    decoder = FusedDecoder(pipeline.vae)

    def decode(latents: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            z = _unscaled(pipeline.vae, latents)
            if not decoder.fits(z):
                return _pixels(pipeline.vae.decode(z, return_dict=False)[0])
            # One at a time: an image is the same to the bit whatever its neighbours, and memory does not grow.
            return torch.cat([_pixels(decoder(one)) for one in z.split(1)])

    return decode


def _unscaled(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    dtype = vae.decoder.conv_in.weight.dtype  # vae.dtype walks through all modules
    scaled: torch.Tensor = latents.to(dtype) / vae.config.scaling_factor + vae.config.shift_factor
    return scaled


def _pixels(images: torch.Tensor) -> torch.Tensor:
    return (images * 0.5 + 0.5).clamp(0, 1)


def to_rgb(pixels: torch.Tensor) -> torch.Tensor:
    """Return pixels 0..1 as 8-bit RGB on the CPU, (images, height, width, 3), rounded as diffusers rounds.

    What is not a number comes out as some color: look for it before.
    """
    return (pixels.permute(0, 2, 3, 1).float() * 255).round().to(torch.uint8).contiguous().cpu()
