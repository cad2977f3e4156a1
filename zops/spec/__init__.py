"""zops.yaml as typed, frozen, validated objects: the one input of everything. Nothing here looks at the host."""

from zops.spec.load import RESERVED_VARIABLES, Loaded, Origin, find_file, load, parse_scalar
from zops.spec.model import (
    Backup,
    Cache,
    Host,
    Image,
    Resources,
    Serve,
    Source,
    Spec,
    Watch,
    fields,
    type_name,
    value_at,
    variable,
)

__all__ = [
    "RESERVED_VARIABLES",
    "Backup",
    "Cache",
    "Host",
    "Image",
    "Loaded",
    "Origin",
    "Resources",
    "Serve",
    "Source",
    "Spec",
    "Watch",
    "fields",
    "find_file",
    "load",
    "parse_scalar",
    "type_name",
    "value_at",
    "variable",
]
