"""A model in other runtimes' forms: StableHLO, ONNX, and folders that CTranslate2 and llama.cpp's converter read."""

FORMATS = ("stablehlo", "onnx", "ctranslate2", "gguf-ready")
