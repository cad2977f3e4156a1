"""How an image was made: told in the answer, and written into the image itself.

What goes into the file is the same whenever the same seed is asked for again, so it has neither times nor the number
of pictures that were made together: equal requests give equal bytes. These are told in the answer only.
"""

import io
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any
from xml.sax.saxutils import escape

from zops import __version__
from zops.serving.fields import Format
from zops.serving.messages import Made, Mode, Preview, Ready, Shape
from zops.serving.png import write_png

# IPTC's digital source types, http://cv.iptc.org/newscodes/digitalsourcetype/: the machine-readable mark that the EU AI
# Act's article 50(2) asks for. The first is made by a model, the second is somebody's image that a model changed.
_SOURCE_TYPES = "http://cv.iptc.org/newscodes/digitalsourcetype/"
AI_GENERATED = _SOURCE_TYPES + "trainedAlgorithmicMedia"
AI_EDITED = _SOURCE_TYPES + "compositeWithTrainedAlgorithmicMedia"
SOFTWARE = f"zops {__version__}"
PNG_KEY = "zops"
_EXIF_IMAGE_DESCRIPTION, _EXIF_SOFTWARE = 0x010E, 0x0131
# From this quality on colours are kept at full resolution: 4 ms instead of 3 at 1024x1024, 14 % more bytes.
_FULL_COLOUR_QUALITY = 90
# Photo-like content at 1024x1024 and quality 95: 32 ms and 246 kB; with libwebp's default of 4, 99 ms and 263 kB.
_WEBP_METHOD = 0


@dataclass(frozen=True, slots=True)
class Receipt:
    """What must be known to make the image again."""

    model: str
    revision: str
    manifest_digest: str
    dtype: str
    preset: str
    """How the pipeline was made faster: eager, bf16 or fp8."""
    gate: str
    """What the quality gate said of the preset: reference, passed, forced or not judged."""
    preset_note: str
    """Why it is not the preset that `auto` would rather have served; empty when it is."""
    mode: Mode
    seed: int
    forwards: int
    """Forwards that were really run."""
    guidance_scale: float
    strength: float | None
    """Of an edit."""
    width: int
    height: int
    prompt_tokens: int
    truncated: bool
    """Whether the prompt was longer than the text encoder reads, and was cut."""

    @classmethod
    def of(
        cls, made: Made, shape: Shape, *, model: str, revision: str, manifest_digest: str, facts: Ready | None
    ) -> "Receipt":
        """Write the receipt of a picture that was made with a shape, by a worker with these facts."""
        return cls(
            model=model,
            revision=revision,
            manifest_digest=manifest_digest,
            dtype=facts.dtype if facts else "",
            preset=facts.preset if facts else "",
            gate=facts.gate.result if facts else "",
            preset_note=facts.fallback if facts else "",
            mode=shape.mode,
            seed=made.seed,
            forwards=made.forwards,
            guidance_scale=shape.guidance_scale,
            strength=shape.strength if shape.mode == "edit" else None,
            width=made.width,
            height=made.height,
            prompt_tokens=made.prompt_tokens,
            truncated=made.truncated,
        )

    def as_text(self) -> str:
        """Return the receipt as the JSON that is written into the image; ASCII."""
        return json.dumps(asdict(self), sort_keys=True)

    def as_json(self, seconds: Mapping[str, float], batch_size: int) -> dict[str, Any]:
        """Return the receipt for the answer, with what differs from one time to the next.

        Args:
            seconds: of each phase: queue, text, denoise, decode, encode.
            batch_size: how many pictures were made together.
        """
        rounded = {phase: round(value, 4) for phase, value in seconds.items()}
        return asdict(self) | {"batch_size": batch_size, "seconds": rounded}


def encode(rgb: bytes, receipt: Receipt, output_format: Format, quality: int, *, mark: bool = True) -> bytes:
    """Encode an image (8-bit RGB of the receipt's size) with its receipt inside.

    Args:
        rgb: the pixels, row by row.
        receipt: how it was made.
        output_format: png, jpeg or webp.
        quality: 0 to 100, of jpeg and webp.
        mark: whether to write into it that it was made, or changed, by a model.
    """
    source_type = AI_EDITED if receipt.mode == "edit" else AI_GENERATED
    xmp = _xmp(source_type if mark else "")
    return _encode((receipt.width, receipt.height), rgb, output_format, quality, receipt.as_text(), xmp)


def encode_preview(preview: Preview, output_format: Format, quality: int, *, mark: bool = True) -> bytes:
    """Encode the view of an unfinished picture; there is no receipt yet."""
    xmp = _xmp(AI_GENERATED if mark else "")
    return _encode((preview.width, preview.height), preview.rgb, output_format, quality, "", xmp)


def _encode(  # noqa: PLR0917 - one place each in the file
    size: tuple[int, int], rgb: bytes, output_format: Format, quality: int, receipt: str, xmp: str
) -> bytes:
    if output_format == "png":
        return write_png(*size, rgb, text={"Software": SOFTWARE} | ({PNG_KEY: receipt} if receipt else {}), xmp=xmp)
    from PIL import Image  # noqa: PLC0415 - spares the start of the server 20 ms before the socket answers

    exif = Image.Exif()
    exif[_EXIF_SOFTWARE] = SOFTWARE
    if receipt:
        exif[_EXIF_IMAGE_DESCRIPTION] = receipt
    options: dict[str, Any] = {"quality": quality, "exif": exif, "xmp": xmp.encode()}
    if output_format == "webp":
        options["method"] = _WEBP_METHOD
    elif quality >= _FULL_COLOUR_QUALITY:
        options["subsampling"] = "4:4:4"
    target = io.BytesIO()
    Image.frombytes("RGB", size, rgb).save(target, output_format.upper(), **options)
    return target.getvalue()


def _xmp(source_type: str) -> str:
    mark = f'Iptc4xmpExt:DigitalSourceType="{source_type}" ' if source_type else ""
    return (
        '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>'
        '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        '<rdf:Description rdf:about="" xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/" '
        'xmlns:xmp="http://ns.adobe.com/xap/1.0/" '
        f'{mark}xmp:CreatorTool="{escape(SOFTWARE)}"/>'
        '</rdf:RDF></x:xmpmeta><?xpacket end="r"?>'
    )
