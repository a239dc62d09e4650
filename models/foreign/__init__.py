"""Other people's models, and ONNX Runtime's own quantisation tools."""
