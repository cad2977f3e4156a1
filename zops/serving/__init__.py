"""The container side: `zops serve`, the bundled inference entrypoint. Nothing of the host side imports it."""
