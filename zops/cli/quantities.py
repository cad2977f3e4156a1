"""Rates, times and shares as an operator types them: 200MB/s, 1.5GiB/s, 90s, 30m, 1h30m, 5%."""

import re

import click

_UNITS = {
    "": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30, "Ti": 1 << 40,
}  # fmt: skip
_SECONDS = {"d": 86400, "h": 3600, "m": 60, "s": 1}


def rate(text: str) -> float:
    """Return the bytes a second that a text such as 200MB/s, 200M or 190MiB/s means.

    Raises:
        BadParameter: when it means none, or 0.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([kMGT]|[KMGT]i|)B?(?:/s)?", text)
    value = float(match[1]) * _UNITS[match[2]] if match else 0.0
    if value <= 0:
        raise click.BadParameter(f"{text!r} is no rate; write for example 200MB/s")
    return value


def time(text: str) -> float:
    """Return the seconds that a text such as 90s, 30m or 1h30m means.

    Raises:
        BadParameter: when it means none.
    """
    parts = re.findall(r"(\d+(?:\.\d+)?)([dhms])", text)
    if not parts or "".join(number + unit for number, unit in parts) != text:
        raise click.BadParameter(f"{text!r} is no time; write for example 30m or 1h30m")
    return sum(float(number) * _SECONDS[unit] for number, unit in parts)


def share(text: str) -> float:
    """Return the share, 0 to 1, that a text such as 5% or 0.05 means.

    Raises:
        BadParameter: when it means none.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(%?)", text)
    value = float(match[1]) / (100 if match[2] else 1) if match else 2.0
    if value > 1:
        raise click.BadParameter(f"{text!r} is no share; write for example 5% or 0.05")
    return value
