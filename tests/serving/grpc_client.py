"""gRPC clients, run with the Python that has `tritonclient`: grpc_client.py PORT < requests > results

One JSON object per line, in and out. A request is {"id", "inputs": {...}, "types": {...}, "options": {...},
"decode": [...], "leave_after": responses or null} and starts when its line is read, over a connection of its own;
`types` replaces a tensor's type, the inputs in `decode` are bytes that the line has in base64, `options` are those of
`async_stream_infer`. Its result, when it ends, is {"id", "responses": [{...}], "error": text or null}. Ends when no more
requests come and all have ended.
"""

import base64
import json
import queue
import sys
import threading

import numpy as np
import tritonclient.grpc as triton

TYPES = {
    "text_input": "BYTES",
    "images": "BYTES",
    "stop_words": "BYTES",
    "session_id": "BYTES",
    "input_ids": "INT32",
    "max_tokens": "INT32",
    "n": "INT32",
    "top_k": "INT32",
    "end_id": "INT32",
    "temperature": "FP32",
    "top_p": "FP32",
    "repetition_penalty": "FP32",
    "seed": "UINT64",
    "stream": "BOOL",
    "session_start": "BOOL",
    "return_log_probs": "BOOL",
    "echo": "BOOL",
    "client_id": "BYTES",
    "presence_penalty": "FP32",
    "frequency_penalty": "FP32",
}
ARRAYS = {"BYTES": np.object_, "INT32": np.int32, "FP32": np.float32, "UINT64": np.uint64, "BOOL": np.bool_}
LIMIT_S = 300
writing = threading.Lock()


def ask(port, request):
    responses, answers = [], queue.Queue()
    inputs = []
    for name, value in request["inputs"].items():
        values = value if isinstance(value, list) else [value]
        kind = request.get("types", {}).get(name) or TYPES.get(name, "INT32")
        if name in request.get("decode", ()):
            values = [base64.b64decode(v) for v in values]
        array = np.array([v.encode() if isinstance(v, str) else v for v in values], ARRAYS[kind])
        inputs.append(triton.InferInput(name, list(array.shape), kind))
        inputs[-1].set_data_from_numpy(array)
    with triton.InferenceServerClient(f"127.0.0.1:{port}") as client:
        client.start_stream(callback=lambda result, error: answers.put((result, error)))
        options = request.get("options", {})
        client.async_stream_infer("mxcompile", inputs, enable_empty_final_response=True, **options)
        while len(responses) != request.get("leave_after"):
            result, problem = answers.get(timeout=LIMIT_S)
            if problem is not None:
                return {"responses": responses, "error": problem.message()}
            response = result.get_response()
            values = {out.name: result.as_numpy(out.name) for out in response.outputs}
            if values:
                responses.append(
                    {k: [v.decode() if isinstance(v, bytes) else v for v in a.tolist()] for k, a in values.items()}
                )
            if response.parameters["triton_final_response"].bool_param:
                break
        client.stop_stream(cancel_requests=True)
    return {"responses": responses, "error": None}


def serve(port, request):
    try:
        result = ask(port, request)
    except queue.Empty:
        result = {"responses": [], "error": f"no answer within {LIMIT_S} s"}
    with writing:
        print(json.dumps({"id": request["id"], **result}), flush=True)


threads = []
for line in sys.stdin:
    threads.append(threading.Thread(target=serve, args=(sys.argv[1], json.loads(line))))
    threads[-1].start()
    threads = [thread for thread in threads if thread.is_alive()]
for thread in threads:
    thread.join()
