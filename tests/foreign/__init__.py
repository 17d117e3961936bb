"""Small twins of other libraries' pyramids, with their class names, keys, options and results.

Tests of `fpn_kernels.fuse` run on them where the libraries are not installed.
"""
