"""Networks as files of ONNX: what a jaxpr computes, written as a graph of its operators."""
