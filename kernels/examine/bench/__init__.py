"""Microbenchmarks: every op against eager PyTorch, torch.compile and the hardware. `blink bench --help`."""
