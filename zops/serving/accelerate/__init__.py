"""Speed of a pipeline on its GPU: presets, the three stages of a request, and the gate that holds their quality."""
