"""How small archives get, beside gzip, and beside ZipNN where it is installed (pip install zipnn)."""

from collections.abc import Iterator
from pathlib import Path

from benchmarks.archive.process import run_shell, run_zops
from benchmarks.archive.table import Row
from benchmarks.archive.weights import MODEL, Weights, write_weights

# Without ZipNN at hand: what it was measured to do with normal bf16 weights, elsewhere on this project.
_ZIPNN_BF16 = 0.662


def measure_sizes(root: Path, tenth: Weights, size_gb: float) -> Iterator[Row]:
    """Yield sizes by the size of what is in the archive.

    Args:
        root: where there is room.
        tenth: a cache of true fp32, small enough for `tar -czf`.
        size_gb: of the others that are made.
    """
    ours = _ratio(root, tenth)
    packed = root / "sizes.tar.gz"
    run_shell('tar -czf "$TARGET" -C "$CACHE" .', TARGET=packed, CACHE=tenth.cache)
    gzip = packed.stat().st_size / tenth.size
    yield Row(
        "size, true fp32: by that of tar -czf", f"{ours:.4f}, {gzip:.4f} of the cache", ours / gzip, 1, at_most=True
    )
    upcast = write_weights(root / "sizes-upcast", size_gb, upcast=True)
    yield _report("size, fp32 that is bf16", _ratio(root, upcast))
    slim = write_weights(root / "sizes-slim", size_gb, fp32=0)
    yield _report("size, slim (bf16)", _ratio(root, slim))
    shard = max(slim.files, key=lambda path: path.stat().st_size)
    measured = _zipnn(shard)
    yield _report("size, slim (bf16), by ZipNN" + ("" if measured else ", not measured here"), measured or _ZIPNN_BF16)


def _report(figure: str, ratio: float) -> Row:
    return Row(figure, f"{ratio:.4f} of the cache", ratio)


def _ratio(root: Path, weights: Weights) -> float:
    store = root / f"sizes-{weights.cache.name}"
    ran = run_zops("cache", "backup", MODEL, "--cache-dir", weights.cache, "--to", store, cwd=root)
    return float(ran.answer["size_bytes"]) / weights.size


def _zipnn(file: Path) -> float:
    """Return what ZipNN makes of a file of bf16, 0 when it is not installed."""
    try:
        import zipnn  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        return 0
    content = bytearray(file.read_bytes())
    packed = zipnn.ZipNN(input_format="byte", bytearray_dtype="bfloat16").compress(content)
    return len(packed) / file.stat().st_size
