"""From the tensors of a Triton request to a message for the engine process.

Standard library only: like model.py it runs in the server's own Python, out of a model repository.
"""

import base64
import json

SCALARS = {
    "stream": bool,
    "max_tokens": int,
    "temperature": float,
    "top_k": int,
    "top_p": float,
    "repetition_penalty": float,
    "presence_penalty": float,
    "frequency_penalty": float,
    "seed": int,
    "end_id": int,
    "return_log_probs": bool,
    "top_log_probs": int,
    "prompt_log_probs": bool,
    "n": int,
    "echo": bool,
    "session_start": bool,
}
TEXTS = (
    "text_input",
    "session_id",
    "client_id",
    "request_id",
    "guided_decoding_guide_type",
    "guided_decoding_guide",
)
# How image files begin; none of these is how one begins in base64.
FILES = (b"\x89PNG", b"\xff\xd8\xff", b"RIFF")


class Refused(Exception):
    """A request that cannot be understood."""


def read(request, engine):
    """A request's tensors as plain values; parameters that are no inputs are refused, not ignored. `engine`: what it says of itself."""
    unknown = sorted(json.loads(request.parameters() or "{}"))
    if unknown:
        raise Refused(f"unknown field {unknown[0]!r}; known are the inputs in this model's config")
    message: dict = {}
    for tensor in request.inputs():
        name, array = tensor.name(), tensor.as_numpy()
        if name in ("input_ids", "logit_bias_ids"):
            message[name] = [int(token) for token in array.reshape(-1)]
        elif name == "logit_bias_values":
            message[name] = [float(str(value)) for value in array.reshape(-1)]
        elif name == "stop_words":
            message[name] = [text(name, value) for value in array.reshape(-1)]
        elif name == "images":
            message[name] = images(array.reshape(-1), engine)
        elif array.size != 1:
            raise Refused(f"{name} must hold one value, not {array.size}")
        elif name in TEXTS:
            message[name] = text(name, array.reshape(-1)[0])
        else:
            value = array.reshape(-1)[0]
            # The shortest decimal of a float32: 0.7 means 0.7, as it does on the command line.
            message[name] = float(str(value)) if SCALARS[name] is float else SCALARS[name](value)
    if request.request_id():
        message.setdefault("request_id", request.request_id())
    if request.correlation_id():
        message.setdefault("client_id", f"correlation id {request.correlation_id()}")
    longest = engine["max_text_bytes"]
    size = max(len(message.get("text_input", "")), len(message.get("input_ids", ())))
    if size > longest:
        unit = "characters" if "text_input" in message else "tokens"
        held = engine["max_seq_len"]
        raise Refused(f"the prompt is too long: it has {size} {unit}, and the engine holds at most {held} tokens")
    return message


def images(values, engine):
    """Image files, each as its bytes or in base64 (JSON cannot hold bytes): all in base64."""
    if engine["no_images"]:
        raise Refused(engine["no_images"])
    found, size = [], 0
    for value in values:
        data = value if isinstance(value, bytes) else str(value).encode()
        raw = data.startswith(FILES)
        size += len(data) if raw else len(data) * 3 // 4
        found.append(base64.b64encode(data) if raw else data)
    if size > engine["max_image_bytes"]:
        most = engine["max_image_bytes"]
        raise Refused(f"images: the files have {size} bytes together; those of a request may have {most} at most")
    return [data.decode("ascii", "replace") for data in found]


def text(name, value):
    """UTF-8 bytes to text."""
    try:
        return value.decode() if isinstance(value, bytes) else str(value)
    except UnicodeDecodeError as error:
        raise Refused(f"{name} is not UTF-8 (byte {error.start})") from error
