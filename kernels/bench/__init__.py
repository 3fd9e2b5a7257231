"""Microbenchmarks: every op against eager PyTorch, torch.compile and the hardware. `python -m kernels.bench --help`."""
