"""Optional hardware: NVDEC and NVENC, and restoring on the GPU."""
