"""The Triton kernels; importing them imports triton.

Shapes, in comments and names: B images of H x W pixels, h heads of D channels, windows of P_H x P_W = N tokens.
"""
