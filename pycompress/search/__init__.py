"""Evolution over subnets. Plain data: no model, no tensors (arXiv:2409.17372, section 3.3)."""
