"""Small twins of other libraries' pyramids: their class names, keys, options and results, our own code.

What `fpn_kernels.fuse` is tested on where the libraries themselves are not installed.
"""
