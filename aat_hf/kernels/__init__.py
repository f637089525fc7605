"""Attention kernels: each takes q, k, v, a mask and (where tiled) a `TileMap`; each is exact on what it keeps."""
