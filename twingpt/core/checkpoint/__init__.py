"""The checkpoint schema: safetensors files, config.json, the quantized layout, saving and loading."""
