"""ONNX in, ONNX out: trace, cast, calibrate, quantise, inspect.

A pass is a plain function from a graph to a new graph: it checks what it requires, leaves its argument alone and
checks what it promises before it returns. Whatever does not hold is an ExportError.
"""
