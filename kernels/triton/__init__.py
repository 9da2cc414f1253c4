"""The Triton kernels and their launches, a module for each op, under the op's name.

An op imports its module when the first tensor on a GPU comes: a run on a CPU never imports Triton.
"""
