"""The doctor's checks of what the GPUs are: present, enough, large enough, of the right kind, and free."""

from zops.host.capacity import RESERVE_BYTES, largest_edge
from zops.host.context import Context
from zops.host.doctor import Check, Finding, fail, gigabytes, ok, skipped, unseen, warn

UNASKED = "zops.yaml asks for no GPU"
NO_GPU = "use a CPU-only instance with: --gpus none"
# First CUDA version with kernels for a compute capability; NVIDIA's CUDA release notes (Blackwell came with 12.8).
CUDA_SINCE = {10: (12, 8), 12: (12, 8)}


def unasked(context: Context) -> Finding | None:
    """Return the finding of a check that is about GPUs where none is wanted or none is seen; else None."""
    if context.spec.gpus == "none":
        return skipped(UNASKED)
    if not context.wanted_gpus:
        return unseen(f"no wanted GPU to look at: {context.gpus.reason or 'see gpu-count'}")
    return None


def _gpu_driver(context: Context) -> Finding:
    """The NVIDIA driver through its management library: version, newest CUDA, number of GPUs."""
    if context.spec.gpus == "none":
        return skipped(UNASKED)
    facts = context.gpus
    seen = {"driver": facts.driver, "cuda": facts.cuda, "gpus": [gpu.name for gpu in facts.gpus]}
    if not facts.gpus:
        return fail(facts.reason, f"install or reload the NVIDIA driver (nvidia-smi must work), or {NO_GPU}", **seen)
    if facts.reason:
        return warn(facts.reason, "look for Xid lines in: sudo dmesg | grep -i xid", **seen)
    return ok(f"driver {facts.driver}, CUDA up to {facts.cuda}, {len(facts.gpus)} x {facts.gpus[0].name}", **seen)


def _gpu_cuda(context: Context) -> Finding:
    """The newest CUDA of the driver against the one that torch is built for."""
    need, newest = context.need, context.gpus.cuda
    if found := unasked(context):
        return found
    if not need.torch_cuda or not newest:
        return unseen("nothing says for which CUDA torch is built" if newest else "the driver does not tell its CUDA")
    seen = {
        "driver": context.gpus.driver,
        "driver_cuda": newest,
        "torch_cuda": need.torch_cuda,
        "from": need.torch_from,
    }
    if need.torch_cuda == "cpu":
        remedy = "install a CUDA build of torch (image.torch_index for an image), or deploy with: --gpus none"
        return fail(f"torch is a build for CPUs ({need.torch_from})", remedy, **seen)
    built, driver = _version(need.torch_cuda), _version(newest)
    newer = next(
        (g for g in context.wanted_gpus if built < CUDA_SINCE.get((g.compute_capability or (0,))[0], (0, 0))), None
    )
    if newer:
        reason = f"GPU {newer.index} ({newer.name}) is newer than CUDA {need.torch_cuda} of {need.torch_from}"
        return fail(reason, "set image.torch_index to an index of builds for CUDA 12.8 or newer", **seen)
    if driver >= built:
        return ok(f"the driver runs CUDA {newest}, torch needs {need.torch_cuda}", **seen)
    reason = f"torch is built for CUDA {need.torch_cuda} ({need.torch_from}), the driver ends at {newest}"
    update = f"install an NVIDIA driver with CUDA {need.torch_cuda} (13.0 came with 580), or choose image.torch_index"
    # Within a major version programs run on an older driver, except what is compiled on the spot.
    return fail(reason, update, **seen) if driver[0] < built[0] else warn(reason, update, **seen)


def _gpu_count(context: Context) -> Finding:
    """Every GPU that the specification names, by index or UUID."""
    if context.spec.gpus == "none":
        return skipped(UNASKED)
    facts, wanted = context.gpus, context.spec.gpus
    there = [f"{gpu.index} = {gpu.uuid}" for gpu in facts.gpus]
    if not facts.driver and not facts.gpus:
        return unseen(f"no wanted GPU to look at: {facts.reason}")
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
    if found := unasked(context):
        return found
    need = context.need
    smallest = min(context.wanted_gpus, key=lambda gpu: gpu.memory_total_bytes)
    total = smallest.memory_total_bytes
    largest = need.gpu_weights_bytes + need.gpu_activation_bytes + RESERVE_BYTES
    seen = {
        "gpus": {gpu.uuid: [gpu.memory_used_bytes, gpu.memory_total_bytes] for gpu in context.wanted_gpus},
        "weights_bytes": need.gpu_weights_bytes,
        "activation_bytes": need.gpu_activation_bytes,
        "reserve_bytes": RESERVE_BYTES,
    }
    if not need.gpu_weights_bytes:
        return ok(f"{gigabytes(total)}; what {context.spec.model} needs is not known", **seen)
    weights, pixels = need.gpu_weights_bytes + RESERVE_BYTES, context.spec.serve.max_pixels
    edge = largest_edge(total, need.gpu_weights_bytes, need.gpu_activation_bytes / pixels)
    if edge == 0:
        reason = f"GPU {smallest.index} has {gigabytes(total)}, the weights alone take {gigabytes(weights)}"
        return fail(reason, "use a GPU with 24 GB or more; see what fits with: zops doctor --capacity", **seen)
    needs = gigabytes(largest)
    if total < largest:
        reason = (
            f"GPU {smallest.index} has {gigabytes(total)}, an image of serve.max_pixels {pixels} needs about {needs}"
        )
        remedy = f"allow at most {edge} x {edge}: --set serve.max_pixels={edge * edge}"
        return fail(reason, remedy, **seen, largest_pixels=edge * edge)
    busy = [gpu for gpu in context.wanted_gpus if gpu.memory_free_bytes < largest]
    if busy and not context.own_ports:
        reason = f"GPU {busy[0].index} has only {gigabytes(busy[0].memory_free_bytes)} free, about {needs} are needed"
        return warn(reason, "see who uses it with: nvidia-smi", **seen)
    return ok(f"{gigabytes(total)}, weights and the largest image need about {needs}", **seen)


def _gpu_bfloat16(context: Context) -> Finding:
    """Compute capability of each wanted GPU: bfloat16 needs 8.0 (Ampere) or newer."""
    if found := unasked(context):
        return found
    if context.spec.serve.dtype == "float32":
        return skipped("serve.dtype is float32")
    seen = {gpu.uuid: gpu.compute_capability for gpu in context.wanted_gpus}
    old = [gpu for gpu in context.wanted_gpus if gpu.has_bfloat16 is False]
    if old:
        reason = f"GPU {old[0].index} ({old[0].name}) is older than Ampere and has no bfloat16"
        remedy = "use another GPU, or set serve.dtype: float32 (twice the memory); float16 gives black images"
        return fail(reason, remedy, compute_capability=seen)
    if any(gpu.has_bfloat16 is None for gpu in context.wanted_gpus):
        return unseen("the driver does not tell the compute capability")
    return ok("every wanted GPU computes bfloat16", compute_capability=seen)


def _gpu_processes(context: Context) -> Finding:
    """Programs that compute on the wanted GPUs already: who, and with how much memory."""
    if found := unasked(context):
        return found
    known = [gpu for gpu in context.wanted_gpus if gpu.processes is not None]
    if not known:
        return unseen("the driver does not tell who uses the GPUs")
    seen = {gpu.uuid: [str(process) for process in gpu.processes or ()] for gpu in known}
    users = [f"GPU {gpu.index}: {process}" for gpu in known for process in gpu.processes or ()]
    if not users:
        return ok("nobody computes on the wanted GPUs", gpus=seen)
    said = ", ".join(users[:3]) + (f" and {len(users) - 3} more" if len(users) > 3 else "")
    if context.own_ports:
        return ok(f"our own instance runs; on the GPUs: {said}", gpus=seen)
    pids = ",".join(str(process.pid) for gpu in known for process in gpu.processes or ())
    return warn(
        f"the GPUs are in use: {said}", f"see what they are with: ps -o pid,user,etime,args -p {pids}", gpus=seen
    )


def _version(text: str) -> tuple[int, int]:
    major, _, minor = text.partition(".")
    return int(major), int(minor or 0)


GPU_CHECKS: tuple[Check, ...] = (
    Check("gpu-driver", "NVIDIA driver", _gpu_driver, here=True),
    Check("gpu-cuda", "CUDA of driver and torch", _gpu_cuda, here=True),
    Check("gpu-count", "GPUs that are asked for", _gpu_count, here=True),
    Check("gpu-memory", "GPU memory", _gpu_memory, here=True),
    Check("gpu-bfloat16", "bfloat16", _gpu_bfloat16, here=True),
    Check("gpu-processes", "who uses the GPUs", _gpu_processes, here=True),
)
