"""A multipart/form-data body, whole in memory and bounded before, taken apart: texts and files, no disk touched."""

from dataclasses import dataclass, field

from python_multipart import MultipartParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header

from zops.serving.errors import ApiError

MAX_PARTS = 64
MAX_PART_HEADER_BYTES = 4096
MAX_TEXT_BYTES = 1 << 20


@dataclass(slots=True)
class Form:
    """The texts of a form by name, and its files by name in their order."""

    texts: dict[str, str] = field(default_factory=dict)
    files: dict[str, list[bytes]] = field(default_factory=dict)


def read_form(content_type: str, body: bytes) -> Form:
    """Take a form apart; slow for a large body, for a thread.

    Raises:
        ApiError: `unsupported_media_type` or `invalid_form`.
    """
    kind, options = parse_options_header(content_type)
    if kind.lower() != b"multipart/form-data":
        raise ApiError("unsupported_media_type", "the body must be multipart/form-data")
    if not options.get(b"boundary"):
        raise ApiError("invalid_form", "the content type names no boundary")
    parts = _Parts()
    try:
        parser = MultipartParser(options[b"boundary"], parts.callbacks())  # type: ignore[arg-type] # its own type is private
        parser.write(body)
        parser.finalize()
    except FormParserError:
        raise ApiError("invalid_form", "the form is damaged or breaks off") from None
    if not parts.ended:
        raise ApiError("invalid_form", "the form breaks off")
    return parts.form


class _Parts:
    """Collects what the parser finds."""

    def __init__(self) -> None:
        self.form = Form()
        self.ended = False
        self._count = 0
        self._name, self._value, self._header_bytes = bytearray(), bytearray(), 0
        self._headers: dict[bytes, bytes] = {}
        self._data = bytearray()

    def callbacks(self) -> dict[str, object]:
        return {
            "on_part_begin": self._begin,
            "on_header_field": self._header_name,
            "on_header_value": self._header_value,
            "on_header_end": self._header_end,
            "on_part_data": self._more,
            "on_part_end": self._part_end,
            "on_end": self._end,
        }

    def _begin(self) -> None:
        self._count += 1
        if self._count > MAX_PARTS:
            raise ApiError("invalid_form", f"the form has more than {MAX_PARTS} parts")
        self._headers, self._data, self._header_bytes = {}, bytearray(), 0

    def _header_name(self, data: bytes, start: int, end: int) -> None:
        self._name += self._bounded(data[start:end])

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += self._bounded(data[start:end])

    def _bounded(self, piece: bytes) -> bytes:
        self._header_bytes += len(piece)
        if self._header_bytes > MAX_PART_HEADER_BYTES:
            raise ApiError("invalid_form", f"a part's header has more than {MAX_PART_HEADER_BYTES} bytes")
        return piece

    def _header_end(self) -> None:
        self._headers[bytes(self._name).lower()] = bytes(self._value)
        self._name, self._value = bytearray(), bytearray()

    def _more(self, data: bytes, start: int, end: int) -> None:
        self._data += data[start:end]

    def _part_end(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition", b""))
        if b"name" not in options:
            raise ApiError("invalid_form", "a part of the form has no name")
        name = options[b"name"].decode("utf-8", "replace")
        if b"filename" in options:
            # As the openai clients write a list of files.
            self.form.files.setdefault(name.removesuffix("[]"), []).append(bytes(self._data))
            return
        if name in self.form.texts:
            raise ApiError("invalid_form", "a field of the form is given twice")
        if len(self._data) > MAX_TEXT_BYTES:
            raise ApiError("invalid_form", f"a field of the form has more than {MAX_TEXT_BYTES} bytes")
        try:
            self.form.texts[name] = self._data.decode()
        except UnicodeDecodeError:
            raise ApiError("invalid_form", "a field of the form is no UTF-8 text") from None

    def _end(self) -> None:
        self.ended = True
