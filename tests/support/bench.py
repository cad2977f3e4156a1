"""Results of the bench made by hand."""

from zops.bench.result import Figure, Result

MACHINE = {
    "gpus": [{"name": "Some GPU", "memory_bytes": 80_000_000_000}], "driver": "1.2", "cpu": "Some CPU", "cores": 8,
    "disk": "ext4 on /dev/x", "clocks": [], "cuda": "13.0", "memory_bytes": 1, "kernel": "Linux",
    "versions": {"torch": "2"},
}  # fmt: skip
MODEL = {
    "model": "zops/synthetic-full", "revision": "seed-0", "manifest_digest": "ab", "parameters": 10**10,
    "weight_bytes": 3 * 10**10, "synthetic": True, "dtypes": {"vae": ["F32"]},
}  # fmt: skip


def figure(*samples, table="load", quantity="time", unit="s", better="less", method="by hand", **case):
    case = {name.replace("_", " "): value for name, value in case.items()}
    return Figure(table, case or {"way": "zops"}, quantity, unit, tuple(map(float, samples)), better, method)


def result(*figures, machine=MACHINE, model=MODEL, **changes):
    made = Result(machine, model, **changes)
    made.figures.extend(figures)
    made.finish(complete=True)
    return made


def whole(**changes):
    """A result with figures in every table."""
    made = result(**changes)
    for way, seconds in (("zops", 1.8), ("device_map", 5.4), ("low_cpu_mem_usage=True", 5.9)):
        for state in ("warm", "cold"):
            case = {"way": way, "weights": "full", "page_cache": state}
            made.add(figure(seconds, seconds * 1.1, **case))
            made.add(figure(seconds / 2, quantity="host memory", unit="GB", **case))
    for preset, seconds in (("eager", 1.3), ("bf16", 0.8), ("fp8", 0.55)):
        case = {"table": "precision", "preset": preset, "forwards": "8"}
        for quantity, share in (("time", 1), ("encode", 0.03), ("denoise", 0.9), ("decode", 0.07)):
            made.add(figure(seconds * share, quantity=quantity, **case))
        made.add(figure(20, quantity="GPU memory", unit="GB", **case))
        if preset != "eager":
            made.add(figure(40, 42, quantity="PSNR", unit="dB", better="more", **case))
            made.add(figure(0.98, quantity="SSIM", unit="", better="more", **case))
        for size in (512, 1024):
            case = {"table": "sizes", "preset": preset, "size": str(size), "forwards": "8", "guidance": "0"}
            made.add(figure(seconds * size / 1024, **case))
            made.add(figure(20, quantity="GPU memory", unit="GB", **case))
    made.add(figure(1.4, table="precision", preset="eager", forwards="9"))
    for clients in ("1", "32"):
        case = {"table": "serve", "size": "512", "clients": clients}
        made.add(figure(6, quantity="images/s", unit="images/s", better="more", **case))
        made.add(figure(0.2, 0.3, quantity="latency", **case))
        made.add(figure(1, 8, quantity="batch size", unit="images", better="neither", **case))
        made.add(figure(0, quantity="refused", unit="requests", better="neither", **case))
        made.add(figure(0, quantity="failed", unit="requests", **case))
    for weights in ("full", "slim"):
        case = {"table": "cache", "step": "verify deep", "weights": weights, "page_cache": "warm"}
        made.add(figure(8, **case))
        made.add(figure(4, quantity="rate", unit="GB/s", better="more", **case))
    for part, rate in (("bf16 products", 740), ("fp8 products", 1500), ("attention", 550)):
        made.add(
            figure(rate, table="roofline", quantity="rate", unit="TFLOP/s", better="more", part=part, shape="cube")
        )
    for part, seconds in (("bf16", 0.6), ("fp8", 0.4)):
        case = {"part": f"floor with {part} products", "shape": "1024 x 1024, 8 forwards"}
        made.add(figure(seconds, table="roofline", quantity="floor", better="neither", **case))
    made.skip("gpus", {"gpus": "all"}, "fewer than two GPUs are visible")
    return made
