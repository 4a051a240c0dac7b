"""The machine code of every kind of launch, compiled without a GPU: `python -m bench codegen`."""
