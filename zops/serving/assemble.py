"""A pipeline from tensors that are on the device already: the models are made empty and given their weights.

`from_pretrained` would read the files itself, with one thread, cast on the CPU, and copy through pageable memory.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from zops.errors import SnapshotDamaged


def weight_files(snapshot: Path) -> dict[str, tuple[str, ...]]:
    """Return, for each component with weights, its safetensors files relative to the snapshot, the smallest first.

    Where there is an index it decides; a stray file beside the shards is none of the model's.
    """
    found: dict[str, tuple[str, ...]] = {}
    for component in components(snapshot):
        folder = snapshot / component
        indices = sorted(folder.glob("*.safetensors.index.json"))
        if indices:
            names = sorted(set(json.loads(indices[0].read_text(encoding="utf-8"))["weight_map"].values()))
        else:
            names = sorted(path.name for path in folder.glob("*.safetensors"))
        if names:
            found[component] = tuple(f"{component}/{name}" for name in names)
    return found


def components(snapshot: Path) -> dict[str, tuple[str, str]]:
    """Return the components that model_index.json names: name -> (library, class)."""
    body = json.loads((snapshot / "model_index.json").read_text(encoding="utf-8"))
    return {name: (str(v[0]), str(v[1])) for name, v in body.items() if isinstance(v, list) and len(v) == 2 and v[0]}


def make_empty(snapshot: Path, component: str) -> Any:
    """Return a component without weights: parameters on the meta device, buffers computed as in any start."""
    import diffusers  # noqa: PLC0415 - only the worker may pay for it
    import transformers  # noqa: PLC0415
    from accelerate import init_empty_weights  # noqa: PLC0415

    library, name = components(snapshot)[component]
    with init_empty_weights(include_buffers=False):
        if library == "diffusers":
            model_class = getattr(diffusers, name)
            return model_class.from_config(model_class.load_config(str(snapshot / component), local_files_only=True))
        config = transformers.AutoConfig.from_pretrained(str(snapshot / component), local_files_only=True)
        return transformers.AutoModel.from_config(config)


def give_weights(model: Any, component: str, tensors: Mapping[str, Any], device: str) -> Any:
    """Put tensors in the places of an empty model's parameters, without a copy.

    Raises:
        SnapshotDamaged: when a parameter gets no tensor, one of another shape, or a tensor has no parameter.
    """
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    wanted = {name for name, _ in model.named_parameters()}
    named = {_without(prefix, name) if name not in wanted else name: tensor for name, tensor in tensors.items()}
    in_fp8 = _put_fp8(model, named)
    try:
        missing, unexpected = model.load_state_dict(
            {name: tensor for name, tensor in named.items() if name not in in_fp8}, strict=False, assign=True
        )
    except RuntimeError as error:
        raise _misfit(component, str(error).partition("\n")[2].strip()[:200]) from None
    # A model for text generation brings a head that an encoder has no use for.
    unexpected = [name for name in unexpected if not name.startswith("lm_head.")]
    missing = [name for name in missing if name not in in_fp8]
    if missing or unexpected:
        raise _misfit(component, f"missing {missing[:3]}, unexpected {unexpected[:3]}")
    return model.eval().requires_grad_(requires_grad=False).to(device)


def _put_fp8(model: Any, named: Mapping[str, Any]) -> set[str]:
    """Put layers in fp8 in place of those whose weights came in fp8; return the names that this accounts for."""
    import torch  # noqa: PLC0415 - only the worker may pay for it

    from zops.serving.accelerate.fp8 import Fp8Linear  # noqa: PLC0415 - as above
    from zops.serving.accelerate.rows import Quantised  # noqa: PLC0415 - as above

    done = set()
    dtype = next((tensor.dtype for tensor in named.values() if not isinstance(tensor, Quantised)), torch.bfloat16)
    for name, tensor in named.items():
        if isinstance(tensor, Quantised):
            layer = name.removesuffix(".weight")
            parent, _, leaf = layer.rpartition(".")
            try:
                place = model.get_submodule(parent)
                getattr(place, leaf)
            except AttributeError:
                continue  # reported with the other misfits
            setattr(place, leaf, Fp8Linear(tensor, dtype))
            done |= {name, f"{layer}.scales"}
    return done


def _without(prefix: str, name: str) -> str:
    return name.removeprefix(prefix) if len(prefix) > 1 else name


def _misfit(component: str, what: str) -> SnapshotDamaged:
    return SnapshotDamaged(f"the weights of {component} do not fit its configuration: {what}", code="pipeline-unknown")


def load_rest(snapshot: Path, without: Sequence[str]) -> dict[str, Any]:
    """Return the components that have no weights: tokenizer and scheduler, read by their own libraries."""
    import diffusers  # noqa: PLC0415 - as above
    import transformers  # noqa: PLC0415

    libraries = {"diffusers": diffusers, "transformers": transformers}
    return {
        name: getattr(libraries[library], class_name).from_pretrained(str(snapshot / name), local_files_only=True)
        for name, (library, class_name) in components(snapshot).items()
        if name not in without
    }
