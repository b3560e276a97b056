"""The command ``pml-ext``: one module for each of its commands, which load on first use."""
