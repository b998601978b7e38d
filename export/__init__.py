"""From the PyTorch definition to the canonical ONNX graph: trace, translate, bind weights by reference, verify."""
