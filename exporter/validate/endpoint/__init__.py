"""An artifact behind OpenAI's HTTP interface, so that anyone's harness can ask it.

vocabulary    tokens as bytes and texts as tokens
predictors    one sequence in a runtime: llama.cpp, ONNX Runtime, our own forward
worker        a predictor in a process of its own, from both sides
sampling      from logits to a token
requests      what a client asks, checked
generation    a prompt and what is written after it, token by token
answers       the objects that a client gets
server        HTTP
"""
