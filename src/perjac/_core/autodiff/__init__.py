"""Cotangents: seeds, sweeps, the order of accumulation, parametrisations, the tape path."""
