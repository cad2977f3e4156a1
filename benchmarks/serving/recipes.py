"""What the clients of the soak ask for, and what each picture must look like: made beforehand, one at a time."""

import io
import json
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from tests.support.serving import Answer, Server

TOLERANCE = 1
"""Of 255: how far a value may be from that of the same picture made alone."""
MOST_PICTURES = 3
GENERATIONS, EDITS = "/v1/images/generations", "/v1/images/edits"
_PROMPTS = ("a lighthouse at dawn", "a cat", "two ships in a storm, seen from a cliff, " * 4)
_SIZES = ((64, 64), (96, 64), (64, 128), (128, 128))


@dataclass(frozen=True)
class Recipe:
    """All that decides what a picture looks like; image i of a request has the seed + i."""

    prompt: str
    seed: int
    width: int
    height: int
    forwards: int
    guidance_scale: float = 0.0
    strength: float | None = None
    """Of an edit; None for a generation."""

    @property
    def path(self) -> str:
        """Where to ask for it."""
        return GENERATIONS if self.strength is None else EDITS

    def fields(self, count: int) -> dict[str, object]:
        """Return the fields of a request for the first pictures of the recipe."""
        found: dict[str, object] = {
            "prompt": self.prompt,
            "n": count,
            "size": f"{self.width}x{self.height}",
            "seed": self.seed,
            "num_inference_steps": self.forwards,
            "guidance_scale": self.guidance_scale,
        }
        return found if self.strength is None else found | {"strength": self.strength}

    def request(self, count: int, **more: object) -> tuple[str, bytes, dict[str, str]]:
        """Return path, body and headers of a request for the first pictures."""
        fields = self.fields(count) | more
        if self.strength is None:
            return self.path, json.dumps(fields).encode(), {"Content-Type": "application/json"}
        kind, body = form(fields, source_image())
        return self.path, body, {"Content-Type": kind}


def recipes(most: int) -> list[Recipe]:
    """Return up to `most` recipes, edits among them, of many shapes: few that can share a batch, and some that do."""
    found = [
        Recipe(prompt, 1000 * number, *size, forwards)
        for number, (forwards, size, prompt) in enumerate(
            (forwards, size, prompt) for forwards in (8, 4) for size in _SIZES for prompt in _PROMPTS
        )
    ]
    special = [
        Recipe("a red door", 90_000, 64, 64, 4, guidance_scale=3.0),
        Recipe("a painting of it", 91_000, 96, 64, 8, strength=0.6),
        Recipe("a drawing of it", 92_000, 64, 64, 4, strength=1.0),
    ]
    return special + found[: max(1, most - len(special))]


def source_image() -> bytes:
    """Return the PNG that edits begin with."""
    ramp = np.linspace(0, 255, 96, dtype=np.uint8)
    pixels = np.stack([np.tile(ramp, (64, 1)), np.full((64, 96), 90, np.uint8), np.tile(ramp[::-1], (64, 1))], -1)
    target = io.BytesIO()
    Image.fromarray(pixels).save(target, "PNG")
    return target.getvalue()


def form(fields: Mapping[str, object], image: bytes) -> tuple[str, bytes]:
    """Return media type and body of a form with a file, with a boundary of its own."""
    boundary = uuid.uuid4().hex
    head = f'--{boundary}\r\nContent-Disposition: form-data; name="%s"%s\r\n\r\n'
    parts = [(head % (name, "")).encode() + str(value).encode() for name, value in fields.items()]
    parts.append((head % ("image", '; filename="a.png"\r\nContent-Type: image/png')).encode() + image)
    return f"multipart/form-data; boundary={boundary}", b"\r\n".join([*parts, f"--{boundary}--\r\n".encode()])


class Golden:
    """The right pixels of every picture that a recipe can give."""

    def __init__(self, server: Server, wanted: Sequence[Recipe], headers: Mapping[str, str]) -> None:
        self.recipes = list(wanted)
        self._pixels = {recipe: list(self._make(server, recipe, headers)) for recipe in wanted}
        self._require_distinct()

    def fault(self, recipe: Recipe, index: int, content: bytes) -> str:
        """Return what is wrong with a PNG that should be this picture; empty when it is right."""
        wanted, found = self._pixels[recipe][index], pixels_of(content)
        if found.shape != wanted.shape:
            return f"the picture is {found.shape}, not {wanted.shape}"
        off = int(np.abs(found.astype(int) - wanted).max())
        return "" if off <= TOLERANCE else f"wrong picture: off by {off} of 255 at seed {recipe.seed}+{index}"

    def _make(self, server: Server, recipe: Recipe, headers: Mapping[str, str]) -> Iterator[np.ndarray]:
        for index in range(MOST_PICTURES):  # singly: what a request of several gives is what is to be judged
            path, body, kind = recipe.request(1, seed=recipe.seed + index)
            answer: Answer = server.call("POST", path, body, headers={**headers, **kind})
            yield pixels_of(answer.images[0])

    def _require_distinct(self) -> None:
        """Make sure that another picture in its place would be noticed."""
        every = [pixels for made in self._pixels.values() for pixels in made]
        for at, one in enumerate(every):
            for other in every[at + 1 :]:
                if one.shape == other.shape:
                    assert np.abs(one.astype(int) - other).max() > 4 * TOLERANCE, "two pictures look the same"


def pixels_of(content: bytes) -> np.ndarray:
    """Decode an image."""
    with Image.open(io.BytesIO(content)) as image:
        return np.asarray(image.convert("RGB"))
