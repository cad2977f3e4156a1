"""Facts about this machine: GPUs, disks, memory, the container engine; and the doctor who judges them."""
