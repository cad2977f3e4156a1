"""What runs in a measuring process of its own, started by `zops.bench.child`; the only part of bench with torch."""
