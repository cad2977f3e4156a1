"""Where instances run, behind one protocol: docker, process (the embedded default) and kubernetes."""
