"""Snapshots on the host SSD: where they are, what they must contain, and how they get and stay that way."""
