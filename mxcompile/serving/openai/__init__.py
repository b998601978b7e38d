"""An OpenAI-compatible API in front of Triton."""
