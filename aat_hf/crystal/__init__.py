"""Attention across scales: renormalisation, topology, optics, stability and lattice structure of maps and keys.

A user of attention gets what a head does at which scale (`scales`), which tiles hang together (`cohomology`), where
tiles should be fine or coarse (`refraction`, `grading`), how a pattern answers to a perturbation (`stability`,
`drift`), and the slashes and periods of a head with their causes (`lattice`, `periodic`, `gauge`).
"""
