"""From a bare host to a serving one: an ordered plan of idempotent steps."""
