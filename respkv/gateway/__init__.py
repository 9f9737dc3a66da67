"""HTTP over a model with its cache: a simple API, OpenAI's, statistics and metrics (docs/gateway.md).

From the socket inwards: serve (process, signals) and protocol (one connection's time limits), guard
(token, body, request id: an ASGI layer around everything), app with its routes (one module for each
family), generation (tickets of the model loop to pieces of text), text and tokenizer. What the
OpenAPI document promises is in inputs, openai_inputs and openapi. Nothing here knows tensors.
"""
