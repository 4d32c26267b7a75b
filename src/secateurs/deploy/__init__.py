"""Real speed: measured latency in several engines, and ONNX in and out."""
