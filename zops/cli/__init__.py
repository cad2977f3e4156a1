"""What an operator types: each module parses, calls one thing in the house, and renders what it returned."""
