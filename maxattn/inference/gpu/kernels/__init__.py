"""The kernels of `maxattn.inference.gpu.ops`. Importing one imports triton."""
