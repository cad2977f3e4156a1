"""The watch: probes the instances of this host on a schedule, latches verdicts, and heals what is unhealthy.

What is decided (latch, healing, case, fence) is apart from what is done (loop, ward, guard, page, webhook).
"""
