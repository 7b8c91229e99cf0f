"""The architecture: shape, packing, rotary positions, attention with cache, one layer."""
