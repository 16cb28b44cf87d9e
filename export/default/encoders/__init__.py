"""Encoders that the default model could have, one file each, and the measurement that chooses between them.

A candidate's file has ``CHANNELS`` of its maps c2..c5 (strides 4, 8, 16, 32) and ``build(path)``: a module with
ImageNet weights that takes tiles [N,5,H,W] in [-1, 1] and gives the maps by name.
"""
