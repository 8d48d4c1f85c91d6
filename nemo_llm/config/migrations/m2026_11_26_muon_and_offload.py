"""Muon, moments and activations in host memory: there was Adam alone, and all stood on the GPU."""

ADDED = {"optim.muon": None, "performance.offload_optimizer_moments": False, "performance.offload_activation_layers": 0}
