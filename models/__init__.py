"""PyTorch → INT8 ONNX bundle. The only package that imports torch."""
