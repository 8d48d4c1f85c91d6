"""Arithmetic about runs that have not started: parameters, FLOPs and memory. No torch."""
