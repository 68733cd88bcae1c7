"""What ranks need on NVIDIA GPUs: driver calls, recording, maps, fingerprints. Imported only where tensors lie on CUDA."""

__all__: list[str] = []
