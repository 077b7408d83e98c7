"""What compiles and runs: the traces of a model, its jobs, checks, inspection, export."""
