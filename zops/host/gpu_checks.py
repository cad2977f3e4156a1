"""The doctor's checks of GPUs: present, enough, large enough, of the right kind, sound, and reachable by the engine."""

from zops.host.doctor import Check, Context, Finding, fail, ok, skipped, warn

# NVIDIA's data centre cards slow down from 85 to 92 degrees, consumer cards from 83; the driver says when they do.
HOT_C = 85
NO_GPU = "use a CPU-only instance with: --gpus none"


def _gpu_driver(context: Context) -> Finding:
    """The NVIDIA driver through its management library: version, newest CUDA, number of GPUs."""
    unasked = _unasked(context)
    if unasked:
        return unasked
    facts = context.gpus
    seen = {"driver": facts.driver, "cuda": facts.cuda, "gpus": [gpu.name for gpu in facts.gpus]}
    if not facts.gpus:
        return fail(facts.reason, f"install or reload the NVIDIA driver (nvidia-smi must work), or {NO_GPU}", **seen)
    reason = f"driver {facts.driver}, CUDA up to {facts.cuda}, {len(facts.gpus)} x {facts.gpus[0].name}"
    if facts.reason:
        return warn(facts.reason, "look for Xid lines in: sudo dmesg | grep -i xid", **seen)
    return ok(reason, **seen)


def _gpu_count(context: Context) -> Finding:
    """Every GPU that the specification names, by index or UUID."""
    unasked = _unasked(context)
    if unasked:
        return unasked
    facts, wanted = context.gpus, context.spec.gpus
    there = [f"{gpu.index} = {gpu.uuid}" for gpu in facts.gpus]
    if wanted == "all":
        if not facts.gpus:
            return fail("all GPUs are asked for and there is none", NO_GPU, present=there)
        return ok(f"all, which is {len(facts.gpus)} here", present=there)
    known = {gpu.index for gpu in facts.gpus} | {gpu.uuid for gpu in facts.gpus}
    # NVML lists the parts of a partitioned GPU apart from GPUs; the engine knows them by name.
    missing = [str(name) for name in wanted if name not in known and not str(name).startswith("MIG-")]
    if missing:
        remedy = "set gpus to some of: " + (", ".join(there) or "none")
        return fail(f"zops.yaml names GPU {', '.join(missing)}, which this host does not have", remedy, present=there)
    return ok(f"{len(wanted)} asked for, all present", present=there)


def _gpu_memory(context: Context) -> Finding:
    """Memory of each wanted GPU against the weights and the activations of the largest image."""
    unasked = _unasked(context) or _unseen(context)
    if unasked:
        return unasked
    need = context.need
    smallest = min(context.wanted_gpus, key=lambda gpu: gpu.memory_total_bytes)
    total, largest = smallest.memory_total_bytes, need.gpu_weights_bytes + need.gpu_activation_bytes
    seen = {
        "gpus": {gpu.uuid: [gpu.memory_used_bytes, gpu.memory_total_bytes] for gpu in context.wanted_gpus},
        "weights_bytes": need.gpu_weights_bytes,
        "activation_bytes": need.gpu_activation_bytes,
    }
    if not need.gpu_weights_bytes:
        return ok(f"{_gb(total)}; what {context.spec.model} needs is not known", **seen)
    if total < need.gpu_weights_bytes:
        reason = f"GPU {smallest.index} has {_gb(total)}, the weights alone take {_gb(need.gpu_weights_bytes)}"
        return fail(reason, "use a GPU with 24 GB or more", **seen)
    if total < largest:
        reason = f"GPU {smallest.index} has {_gb(total)}, the largest allowed image needs about {_gb(largest)}"
        return warn(reason, "lower serve.max_pixels, for example: --set serve.max_pixels=1048576", **seen)
    busy = [gpu for gpu in context.wanted_gpus if gpu.memory_free_bytes < largest]
    if busy and not context.own_ports:
        reason = f"GPU {busy[0].index} has only {_gb(busy[0].memory_free_bytes)} free, about {_gb(largest)} are needed"
        return warn(reason, "see who uses it with: nvidia-smi", **seen)
    return ok(f"{_gb(total)}, weights and the largest image need about {_gb(largest)}", **seen)


def _gpu_bfloat16(context: Context) -> Finding:
    """Compute capability of each wanted GPU: bfloat16 needs 8.0 (Ampere) or newer."""
    unasked = _unasked(context) or _unseen(context)
    if unasked:
        return unasked
    if context.spec.serve.dtype == "float32":
        return skipped("serve.dtype is float32")
    seen = {gpu.uuid: gpu.compute_capability for gpu in context.wanted_gpus}
    old = [gpu for gpu in context.wanted_gpus if gpu.has_bfloat16 is False]
    if old:
        reason = f"GPU {old[0].index} ({old[0].name}) is older than Ampere and has no bfloat16"
        remedy = "use another GPU, or set serve.dtype: float32 (twice the memory); float16 gives black images"
        return fail(reason, remedy, compute_capability=seen)
    if any(gpu.has_bfloat16 is None for gpu in context.wanted_gpus):
        return skipped("the driver does not tell the compute capability")
    return ok("every wanted GPU computes bfloat16", compute_capability=seen)


def _gpu_condition(context: Context) -> Finding:
    """Uncorrectable memory errors and temperature of each wanted GPU."""
    unasked = _unasked(context) or _unseen(context)
    if unasked:
        return unasked
    seen = {gpu.uuid: {"ecc": gpu.ecc_uncorrected, "celsius": gpu.temperature_c} for gpu in context.wanted_gpus}
    sick = [gpu for gpu in context.wanted_gpus if gpu.ecc_uncorrected]
    if sick:
        reason = f"GPU {sick[0].index} counted {sick[0].ecc_uncorrected} uncorrectable memory errors"
        return fail(reason, f"drain it and reset it: sudo nvidia-smi --gpu-reset -i {sick[0].index}", gpus=seen)
    hot = [gpu for gpu in context.wanted_gpus if (gpu.temperature_c or 0) >= HOT_C]
    if hot:
        reason = f"GPU {hot[0].index} is at {hot[0].temperature_c} degrees Celsius and slows down"
        return warn(reason, "check fans and airflow; see the reason with: nvidia-smi -q -d PERFORMANCE", gpus=seen)
    return ok("no uncorrectable memory errors, not hot", gpus=seen)


def _unasked(context: Context) -> Finding | None:
    return skipped("zops.yaml asks for no GPU") if context.spec.gpus == "none" else None


def _unseen(context: Context) -> Finding | None:
    return (
        None if context.wanted_gpus else skipped(f"no wanted GPU to look at: {context.gpus.reason or 'see gpu-count'}")
    )


def _gb(count: float) -> str:
    return f"{count / 1e9:.1f} GB"


GPU_CHECKS: tuple[Check, ...] = (
    Check("gpu-driver", "NVIDIA driver", _gpu_driver, here=True),
    Check("gpu-count", "GPUs that are asked for", _gpu_count, here=True),
    Check("gpu-memory", "GPU memory", _gpu_memory, here=True),
    Check("gpu-bfloat16", "bfloat16", _gpu_bfloat16, here=True),
    Check("gpu-condition", "condition of the GPUs", _gpu_condition, here=True),
)
